"""The core update: a linear layer with weight `L M R` of which only the K x K core M trains.

Names as in :mod:`factored`. L and R span the subspaces that the weight is kept in, as LoRA-XS (arXiv 2405.17604)
trains a small matrix between the factors of a weight. What makes it train fast are the coordinates
(:func:`coordinates.core_form`). Backward keeps `h = x R^T`, K numbers a row, and all gradients are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms.cored import CoredLinear
from ..forms.factored import FactoredLinear
from ..linalg.coordinates import core_form
from ..linalg.tucker import Tucker, roundable
from . import costs
from .base import InitialFactors, ProductGradientSink, Update
from .factor import Factor
from .factored import linear_without_view, outside_autocast
from .image import image_linear
from .resizing import Carry, orthonormal_to, random_rows, set_part


@dataclass(frozen=True)
class Core(Update):
    """A K x K matrix M between frozen factors trains, at LoRA's learning rates or above."""

    name: ClassVar[str] = "core"
    form_cls: ClassVar[type[FactoredLinear]] = CoredLinear
    trained: ClassVar[tuple[str, ...]] = ("M",)
    takes_image: ClassVar[bool] = True

    def start(self, initial: InitialFactors, rank: int) -> Mapping[str, Tensor]:
        return dict(zip(CoredLinear.parts, core_form(initial.L, initial.R, initial.moments), strict=True))

    def parts_on(self, factors: FactoredLinear) -> Mapping[str, Tensor]:
        """M is I, between the factors in the coordinates that they have, as in LoRA-XS."""
        return {"M": torch.eye(factors.weight_rank)}

    def forward(
        self, form: CoredLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        if form.frozen("L") is not None or form.frozen("R") is not None:
            return self.from_image(form, form.multiply(x, "R"))
        return core_linear(x, form.L, form.M, form.R, form.bias)

    def fold(self, form: CoredLinear) -> tuple[FactoredLinear, Update]:
        return form.fold(), Factor()

    def from_image(self, form: CoredLinear, h: Tensor) -> Tensor:
        return form.multiply(image_linear(h, form.M), "L", form.bias)

    def column_space(self, form: CoredLinear) -> None:
        """None: what a core answers with stays within L."""

    def shrink(self, form: CoredLinear, rank: int, carry: Carry) -> None:
        """`M = U D V^T`: the new parts are `L U_k`, `D_k` and `V_k^T R`; gradients of M follow as `U_k^T g V_k`."""
        L, M, R = form.L, form.M, form.R
        U, D, Vt = torch.linalg.svd(M.double())
        left, right = U[:, :rank], Vt[:rank].T
        carry(M, lambda x: left.T @ x @ right, lambda x: left.square().T @ x @ right.square())
        set_part(L, L.double() @ left)
        set_part(M, torch.diag(D[:rank]))
        set_part(R, right.T @ R.double())

    def grow(self, form: CoredLinear, rank: int, carry: Carry) -> None:
        """Random directions in L and R, zeros in M."""
        L, M, R = form.L, form.M, form.R
        added = rank - L.shape[1]

        def padded(state: Tensor) -> Tensor:
            return F.pad(state, (0, added, 0, added))

        carry(M, padded, padded)
        set_part(L, torch.cat([L.double(), orthonormal_to(L.double(), added)], 1))
        set_part(M, padded(M.double()))
        set_part(R, torch.cat([R.double(), random_rows(R, added)], 0))

    def elements(self, out_features: int, in_features: int, rank: int) -> int:
        return costs.factored_elements(out_features, in_features, rank, core=True)

    def trained_elements(self, out_features: int, in_features: int, rank: int) -> int:
        return rank * rank

    def break_even_rank(self, out_features: int, in_features: int) -> int:
        return costs.break_even_rank(out_features, in_features, core=True)

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * rank**2


class CoreLinear(torch.autograd.Function):
    """`y = ((x R^T) M^T) L^T + b` with gradients for x, M and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
        h = F.linear(x, R.to(x.dtype))
        y = _from_image(h, L, M, bias)

        ctx.dtype, ctx.core_dtype = x.dtype, M.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, _, needs_M = ctx.needs_input_grad[:3]
        factors = (L, M if needs_x else None, R if needs_x else None) if needs_x or needs_M else (None, None, None)
        ctx.save_for_backward(*factors, roundable(h) if needs_M else None)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, M, R, h = ctx.saved_tensors
        needs_x, _, needs_M, _, needs_bias = ctx.needs_input_grad
        grad_x = grad_M = grad_bias = None
        if needs_bias:
            grad_bias = dY.reshape(-1, dY.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        if needs_x or needs_M:
            u = dY @ L.to(ctx.dtype)
            if needs_M:
                grad_M = (u.reshape(-1, u.shape[-1]).T @ h.reshape(-1, h.shape[-1])).to(ctx.core_dtype)
            if needs_x:
                grad_x = (u @ M.to(ctx.dtype)) @ R.to(ctx.dtype)
        return grad_x, None, grad_M, None, grad_bias


def _from_image(h: Tensor, L: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
    return linear_without_view(F.linear(h, M.to(h.dtype)), L, bias)


def core_linear(x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with weight `L M R`, of which L and R do not train.

    **Shape**
        - x: (..., in); L: (out, K); M: (K, K); R: (K, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        L: Frozen factor.
        M: Trained core.
        R: The other frozen factor.
        bias: Optional bias.

    Returns:
        `((x R^T) M^T) L^T + b`. Not differentiable twice.
    """
    return CoreLinear.apply(x, L, M, R, bias)
