"""Two factors and a small core between them in place of a dense weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .factored import FactoredLinear, alike


class CoredLinear(FactoredLinear):
    """`y = ((x R^T) M^T) L^T + b`: a linear layer with weight `L M R`.

    **Shape**
        - L: (out, K); M: (K, K); R: (K, in); bias: (out,) or None

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: K.
        bias: Whether there is a bias.
        dense_class: As for :class:`FactoredLinear`.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Example:
        >>> form = CoredLinear(8, 6, rank=2)
        >>> torch.allclose(form(torch.ones(3, 8)), form.fold()(torch.ones(3, 8)), atol=1e-6)
        True
    """

    parts: ClassVar[tuple[str, ...]] = ("L", "M", "R")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        dense_class: type[nn.Module] = nn.Linear,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shapes = self.part_shapes(out_features, in_features, rank)
        self._make(shapes, bias, dense_class, {"device": device, "dtype": dtype})

    @classmethod
    def part_shapes(cls, out_features: int, in_features: int, rank: int, **_: int) -> dict[str, tuple[int, int]]:
        factors = super().part_shapes(out_features, in_features, rank)
        return {"L": factors["L"], "M": (rank, rank), "R": factors["R"]}

    @property
    def M(self) -> nn.Parameter:
        """The core."""
        return self.part("M")

    def factors(self) -> tuple[Tensor, Tensor]:
        L, M, R = alike(self.L, self.M, self.R)
        return L @ M, R

    def fold(self) -> FactoredLinear:
        """The core multiplied into L: two factors that compute the same up to rounding, both parameters."""
        L = (self.L.detach().double() @ self.M.detach().double()).to(self.dtype)
        R = self.R.to(self.dtype, copy=self.shares("R"))
        return FactoredLinear.from_parts({"L": L, "R": R}, self.bias, self.dense_class)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.multiply(self.multiply(x, "R"), "M"), "L", self.bias)
