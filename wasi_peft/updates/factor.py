"""Both factors train, by their plain gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..forms.factored import FactoredLinear
from ..linalg.tucker import Tucker
from .base import ProductGradientSink, Update
from .factored import factored_linear
from .resizing import Carry, grow_factors, shrink_factors


@dataclass(frozen=True)
class Factor(Update):
    """Weight `L R`, of which L and R train by their Euclidean gradients."""

    name: ClassVar[str] = "factor"
    reads_input: ClassVar[str | None] = "R"
    trained: ClassVar[tuple[str, ...]] = ("L", "R")
    basis: ClassVar[str | None] = "L"

    def parts_on(self, factors: FactoredLinear) -> Mapping[str, Tensor]:
        """Both factors, L with orthonormal columns."""
        L, corner = torch.linalg.qr(factors.L.detach().double())
        return {"L": L, "R": corner @ factors.R.detach().double()}

    def forward(
        self, form: FactoredLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        return factored_linear(x, form.L, form.R, form.bias, compressed, tangent=False)

    def image_width(self, form: FactoredLinear) -> int:
        return form.weight_rank if form.L.requires_grad and not form.R.requires_grad else 0

    def shrink(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        """The best approximation of `L R`, L orthonormal."""
        shrink_factors(form.L, form.R, rank, carry)

    def grow(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        """Random directions in L, zero rows in R."""
        grow_factors(form.L, form.R, rank, carry)

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * rank * (out_features + 2 * in_features) if exact else 0

    def compressed_gradient_flops(self, rows: int, out_features: int, in_features: int, input_rank: int) -> int:
        return 2 * rows * input_rank * out_features

    def product_flops(self, out_features: int, in_features: int, rank: int, input_rank: int) -> int:
        return 2 * self.forward_flops(input_rank, out_features, in_features, rank)
