"""Two pairs of factors in place of a dense weight: one that stays and one that trains."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factored import FactoredLinear, check_rank

FEW_ROWS = 16  # below, putting the pairs side by side costs more than multiplying by each


class SplitLinear(FactoredLinear):
    """`y = (x [R; A]^T) [L B]^T + b`: a linear layer with weight `L R + B A`.

    **Shape**
        - L: (out, K); R: (K, in); B: (out, r); A: (r, in); bias: (out,) or None

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: K.
        bias: Whether there is a bias.
        side_rank: r.
        dense_class: As for :class:`FactoredLinear`.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Example:
        >>> form = SplitLinear(8, 6, rank=2, side_rank=1)
        >>> form.rank, form.weight_rank, form.B.shape
        (3, 2, torch.Size([6, 1]))
    """

    parts: ClassVar[tuple[str, ...]] = ("L", "R", "B", "A")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        side_rank: int,
        dense_class: type[nn.Module] = nn.Linear,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shapes = self.part_shapes(out_features, in_features, rank, side_rank=side_rank)
        self._make(shapes, bias, dense_class, {"device": device, "dtype": dtype})

    @classmethod
    def part_shapes(
        cls, out_features: int, in_features: int, rank: int, *, side_rank: int = 0, **_: int
    ) -> dict[str, tuple[int, int]]:
        check_rank("side_rank", side_rank, out_features, in_features)
        side = {"B": (out_features, side_rank), "A": (side_rank, in_features)}
        return super().part_shapes(out_features, in_features, rank) | side

    @property
    def B(self) -> nn.Parameter:
        """The left factor of the pair that trains."""
        return self.part("B")

    @property
    def A(self) -> nn.Parameter:
        """The right factor of the pair that trains."""
        return self.part("A")

    @property
    def rank(self) -> int:
        return self.weight_rank + len(self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        return joined(self.L, self.R, self.B, self.A)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < FEW_ROWS or self.frozen("R") is not None:
            return super().forward(x) + self.multiply(self.multiply(x, "A"), "B")
        outer, inner, bias = self.cast(x.dtype, *self.factors(), self.bias)
        return F.linear(F.linear(x, inner), outer, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side_rank={len(self.A)}"


def joined(L: Tensor, R: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of factors for the weight `L R + B A`: copies of `[L B]` and `[R; A]`.

    **Shape**
        - L: (out, K); R: (K, in); B: (out, r); A: (r, in); returns (out, K + r), (K + r, in)
    """
    return torch.cat([L.T, B.T]).T, torch.cat([R, A])
