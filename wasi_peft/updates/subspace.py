"""The paper's update to first order: both factors by tangent gradients, and a retraction after every step.

Plain SGD on the tangent gradients (:func:`subspaces.factor_gradients`) followed by the retraction moves the product as
the paper's gradient step and subspace iteration do, up to O(lr^2) (docs/method.md); any other optimizer works as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..forms.factored import FactoredLinear
from ..linalg.subspaces import retraction
from ..linalg.tucker import Tucker
from .base import ProductGradientSink
from .factor import Factor
from .factored import factored_linear


@dataclass(frozen=True)
class Subspace(Factor):
    """Weight `L R` with orthonormal columns in L, of which both factors train inside the manifold of rank K."""

    name: ClassVar[str] = "subspace"
    hands_out_product: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = False

    def forward(
        self, form: FactoredLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        return factored_linear(x, form.L, form.R, form.bias, compressed, tangent=True, sink=sink)

    @property
    def after_step(self) -> Callable[[FactoredLinear], None]:
        return retract_form

    def column_space(self, form: FactoredLinear) -> Tensor:
        return form.L.detach().clone()  # orthonormal as it is

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        """The K x K work is bounded from above."""
        tangent = 2 * rank**2 * (4 * out_features + 3 * in_features)
        return tangent + super().gradient_flops(rows, out_features, in_features, rank, exact)


@torch.no_grad()
def retract_form(form: FactoredLinear) -> None:
    """Retract L and R in place; the changes of one layer are gone before those of the next are computed."""
    change_L, change_R = retraction(form.L, form.R)
    form.L.add_(change_L)
    form.R.add_(change_R)
