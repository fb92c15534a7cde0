"""An addition to a frozen weight, `W = Q + L R`: both factors train, or L alone.

Glossary as in :mod:`factored`; Q is the frozen weight, dense or in few bits (:mod:`forms.residual`). L starts at zero
and R in directions through which the weight lets most of its input pass, in coordinates where the image `R x` is white
(:func:`linalg.coordinates.addition_basis`). With both trained this is LoRA (arXiv 2106.09685) from another start; what
backward keeps for R is the input as the product with Q rounds it, one byte a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms.factored import FactoredLinear
from ..forms.residual import Residual, ResidualLinear
from ..forms.shards import is_distributed
from ..linalg.coordinates import whitened_rows
from ..linalg.low_bit import RoundedRows, transposed_times_rows
from ..linalg.tucker import NOTHING, Tucker, expand_rows, roundable
from .base import ProductGradientSink, Update
from .factored import outside_autocast
from .resizing import Carry, grow_factors, shrink_factors


@dataclass(frozen=True)
class Addition(Update):
    """L and R train beside a frozen weight, by their plain gradients, at LoRA's learning rates."""

    name: ClassVar[str] = "addition"
    form_cls: ClassVar[type[FactoredLinear]] = ResidualLinear
    trained: ClassVar[tuple[str, ...]] = ("L", "R")
    reads_input: ClassVar[str | None] = "R"
    takes_residual: ClassVar[bool] = True
    needs_residual: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True

    def forward(
        self,
        form: ResidualLinear,
        x: Tensor,
        compressed: Tucker | RoundedRows | None,
        sink: ProductGradientSink | None,
    ) -> Tensor:
        return addition_linear(x, form.residual, form.L, form.R, form.bias, compressed)

    def input_sums(self, form: ResidualLinear, rows: Tensor) -> Tensor:
        return image_sums(form.R, rows)

    def meet(self, form: ResidualLinear, sums: Tensor) -> None:
        """Put R into coordinates in which the image of this input is white."""
        whiten(form.L, form.R, sums)

    def image_width(self, form: ResidualLinear) -> int:
        return form.weight_rank if form.L.requires_grad else 0

    def shrink(self, form: ResidualLinear, rank: int, carry: Carry) -> None:
        """The best approximation of `L R`; the frozen weight stays."""
        shrink_factors(form.L, form.R, rank, carry)

    def grow(self, form: ResidualLinear, rank: int, carry: Carry) -> None:
        """Random directions in L, zero rows in R."""
        grow_factors(form.L, form.R, rank, carry)

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * rank * (out_features + (in_features if exact else 0))

    def compressed_gradient_flops(self, rows: int, out_features: int, in_features: int, input_rank: int) -> int:
        return 0

    def product_flops(self, out_features: int, in_features: int, rank: int, input_rank: int) -> int:
        return 2 * input_rank * rank * in_features


@torch.no_grad()
def image_sums(R: Tensor, rows: Tensor) -> Tensor:
    """Sums over rows x: of `h h^T` with `h = R x`, of the mean square of the entries of x, and how many there are.

    **Shape**
        - R: (K, in); rows: (rows, in); returns (K * K + 2,), float64
    """
    # a view of a parameter claims to need a gradient even here, and a recomputed block would ask for it
    R = R.detach()
    with torch.autocast(device_type=rows.device.type, enabled=False):
        h = (rows.to(R.dtype) @ R.t()).to(torch.promote_types(R.dtype, torch.float32))
        image, square = h.t() @ h, rows.float().square().mean(1).sum()
    return torch.cat([image.flatten(), square.reshape(1).to(image), image.new_full((1,), len(rows))]).double()


@torch.no_grad()
def whiten(L: Tensor, R: Tensor, sums: Tensor) -> None:
    """Put R of an addition into coordinates in which its image is white, in place, as long as L is zero.

    In a distributed run all processes see all inputs.

    **Shape**
        - L: (out, K); R: (K, in); sums: (K * K + 2,), of :func:`image_sums`
    """
    L, R = L.detach(), R.detach()
    if bool(L.any()):
        return
    if is_distributed():
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
    if bool(sums.isfinite().all()) and float(sums[-1]) > 0:
        moments = sums[:-1] / sums[-1]
        R.copy_(whitened_rows(R, moments[:-1].view(len(R), len(R)), float(moments[-1])))


class AdditionLinear(torch.autograd.Function):
    """`y = x Q^T + (x R^T) L^T + b` with gradients for x, L, R and b.

    What is saved of the input: `h = x R^T` for L (exact, K wide); for R its rounded or compressed form where one is
    given, else the input itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Residual,
        L: Tensor,
        R: Tensor,
        bias: Tensor | None,
        rounded: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
        *compressed: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ R.to(x.dtype).t()
        y = residual.product(rows, None if rounded is None else RoundedRows(*rounded), (h, L.to(x.dtype)))
        if bias is not None:
            y.add_(bias.to(x.dtype))

        ctx.residual, ctx.shape, ctx.dtype = residual, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, _, needs_L, needs_R = ctx.needs_input_grad[:4]
        kept: tuple[Tensor | None, ...] = (None,)
        ctx.kept = "nothing"
        if needs_R and compressed[0] is not None:
            ctx.kept, kept = "compressed", compressed
        elif needs_R and rounded is not None:
            ctx.kept, kept = "rounded", rounded
        elif needs_R:
            ctx.kept, kept = "input", (x,)
        ctx.save_for_backward(L if needs_x or needs_R else None, R, roundable(h) if needs_L else None, *kept)
        # no view of another tensor: models may add to what a layer answers, in place
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(L)))

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, h, *saved = ctx.saved_tensors
        needs_x, _, needs_L, needs_R, needs_bias = ctx.needs_input_grad[:5]
        dY = dY.reshape(-1, dY.shape[-1])
        grad_x = grad_L = grad_R = grad_bias = None
        if needs_bias:
            grad_bias = dY.sum(0, dtype=ctx.bias_dtype)
        if needs_L:
            grad_L = (dY.t() @ h).to(R.dtype)
        if needs_x or needs_R:
            hidden_grad = dY @ L.to(ctx.dtype)  # (rows, K)
        if ctx.kept == "compressed":
            form = Tucker(*saved)
            grad_R = (hidden_grad.t() @ expand_rows(form)) @ form.feature.t()
        elif ctx.kept == "rounded":
            grad_R = transposed_times_rows(hidden_grad, RoundedRows(*saved))
        elif ctx.kept == "input":
            grad_R = hidden_grad.t() @ saved[0].reshape(-1, saved[0].shape[-1])
        grad_R = None if grad_R is None else grad_R.to(R.dtype)
        if needs_x:  # after all temporary tensors of the others, since it is as large as the input
            grad_x = ctx.residual.transposed_product(dY).addmm_(hidden_grad, R.to(ctx.dtype))
            grad_x = torch.ops.aten._unsafe_view(grad_x, ctx.shape)  # autograd may add to it, but not to a view
        return grad_x, None, grad_L, grad_R, grad_bias, None, *NOTHING


def addition_linear(
    x: Tensor,
    residual: Residual,
    L: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    kept: Tucker | RoundedRows | None = None,
) -> Tensor:
    """Linear layer with weight `Q + L R`, of which Q does not train.

    **Shape**
        - x: (..., in); L: (out, K); R: (K, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        residual: Q.
        L: Trained factor. Its gradient is exact.
        R: The other one, trained or not.
        bias: Optional bias.
        kept: Rounded or compressed form of `x`, kept instead of it. The gradient of R is then that of the
            reconstructed input. A product that rounds its input takes the rounded rows as they are.

    Returns:
        `x Q^T + (x R^T) L^T + b`. Not differentiable twice.
    """
    rounded = tuple(kept) if isinstance(kept, RoundedRows) else None
    parts = kept if isinstance(kept, Tucker) else NOTHING
    y: Tensor = AdditionLinear.apply(x, residual, L, R, bias, rounded, *parts)
    return y
