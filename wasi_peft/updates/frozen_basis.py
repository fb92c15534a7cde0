"""The frozen basis: a linear layer with weight `L R` of which only L trains.

R keeps its row space, in coordinates in which the image `R x` is white (:func:`coordinates.basis_form`): plain Adam on
L then takes the steps that a Kronecker-factored preconditioner would. Backward keeps `R x`, K numbers a row, from
which the gradients are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forms.factored import FactoredLinear
from ..forms.residual import ResidualLinear
from ..linalg.coordinates import basis_form
from ..linalg.tucker import Tucker
from .addition import addition_linear, image_sums, whiten
from .base import InitialFactors, ProductGradientSink, Update
from .factored import factored_linear
from .image import image_linear
from .resizing import Carry, random_rows, set_part


@dataclass(frozen=True)
class FrozenBasis(Update):
    """Only L trains, at LoRA's learning rates or above; inputs need no compression."""

    name: ClassVar[str] = "frozen_basis"
    trained: ClassVar[tuple[str, ...]] = ("L",)
    takes_residual: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True
    takes_image: ClassVar[bool] = True

    def start(self, initial: InitialFactors, rank: int) -> Mapping[str, Tensor]:
        if initial.residual is not None:
            return super().start(initial, rank)
        return dict(zip(("L", "R"), basis_form(initial.L, initial.R, initial.moments), strict=True))

    def forward(
        self, form: FactoredLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        if isinstance(form, ResidualLinear):
            return addition_linear(x, form.residual, form.L, form.R, form.bias)
        if form.frozen("R") is not None:
            return self.from_image(form, form.multiply(x, "R"))
        return factored_linear(x, form.L, form.R, form.bias, None, tangent=False)

    def from_image(self, form: FactoredLinear, h: Tensor) -> Tensor:
        return image_linear(h, form.L, form.bias)

    def input_sums(self, form: FactoredLinear, rows: Tensor) -> Tensor | None:
        return image_sums(form.R, rows) if isinstance(form, ResidualLinear) else None

    def meet(self, form: FactoredLinear, sums: Tensor) -> None:
        """Beside a residual, put R into coordinates in which the image of this input is white."""
        whiten(form.L, form.R, sums)

    def shrink(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        """`L = U D V^T`: the new factors are `L V_k` and `V_k^T R`, so rows of R stay as orthogonal as they were."""
        L, R = form.L, form.R
        V = torch.linalg.svd(L.double(), full_matrices=False).Vh[:rank].T
        carry(L, lambda state: state @ V, lambda state: state @ V.square())
        set_part(L, L.double() @ V)
        set_part(R, V.T @ R.double())

    def grow(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        """Random directions in R, zeros in L."""
        L, R = form.L, form.R
        added = rank - L.shape[1]

        def padded(state: Tensor) -> Tensor:
            return F.pad(state, (0, added))

        carry(L, padded, padded)
        set_part(L, padded(L.double()))
        set_part(R, torch.cat([R.double(), random_rows(R, added)], 0))

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * rank * out_features
