"""A linear layer with weight `L R`, of which one factor or both train, and whose input is kept compressed.

Glossary (shapes after flattening the leading dimensions of the input into `rows`):

====== ==================================== ====================
x      input                                (rows, in)
y, dY  output and its gradient              (rows, out)
L, R   weight factors                       (out, K), (K, in)
h      `x R^T`, the K-wide intermediate     (rows, K)
Z      compressed rows, `x ~ Z U^T`         (rows, r)
U      feature basis of the input           (in, r)
G      gradient of the loss wrt `L R`       `left @ right`, never formed
====== ==================================== ====================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linalg.subspaces import factor_gradients, tangent_gradient
from ..linalg.tucker import NOTHING, Tucker, expand_rows, roundable
from .base import ProductGradientSink

_Gradients = tuple[Tensor | None, ...]


def product_gradient(dY: Tensor, x: Tensor | None, compressed: Tucker | None) -> tuple[Tensor, Tensor]:
    """Gradient of the loss with respect to the product `L R`, as two factors: `G = dY^T X = left @ right`.

    **Shape**
        - dY: (rows, out); x: (rows, in), used where `compressed` is None
        - returns left (out, q), right (q, in): q = rows, or the rank of the compressed input
    """
    if compressed is None:
        assert x is not None
        return dY.T, x
    return dY.T @ expand_rows(compressed), compressed.feature.T


def outside_autocast(backward: Callable[[Any, Tensor], _Gradients]) -> Callable[[Any, Tensor], _Gradients]:
    """Runs a Function's backward with autocast off: called inside it, that would lower what was saved in float32."""

    @functools.wraps(backward)
    def run(ctx: Any, dY: Tensor) -> _Gradients:
        with torch.autocast(device_type=dY.device.type, enabled=False):
            return backward(ctx, dY)

    return run


def linear_without_view(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` in the dtype of x, for what a Function answers: models may change that in place, but not a view.

    **Shape**
        - x: (..., in); weight: (out, in); bias: (out,) or None; returns (..., out)
    """
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))


class FactoredLinear(torch.autograd.Function):
    """`y = (x R^T) L^T + b`, saving for backward only what the requested gradients need.

    What is saved of the input: nothing when no factor needs a gradient; `h` when only L does (exact, K wide); the
    compressed form when one is given; the input itself otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        L: Tensor,
        R: Tensor,
        bias: Tensor | None,
        tangent: bool,
        sink: ProductGradientSink | None,
        *compressed: Tensor | None,
    ) -> Tensor:
        h = F.linear(x, R.to(x.dtype))
        y = linear_without_view(h, L, bias)

        ctx.tangent, ctx.sink = tangent, sink
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_L, needs_R = ctx.needs_input_grad[:3]
        kept: tuple[Tensor | None, ...] = (None,)
        ctx.kept = "nothing"
        if needs_R:
            ctx.kept = "input" if compressed[0] is None else "compressed"
            kept = (x,) if compressed[0] is None else compressed
        elif needs_L:
            ctx.kept, kept = "hidden", (roundable(h.reshape(-1, h.shape[-1])),)
        needs_factors = needs_x or needs_L or needs_R
        ctx.save_for_backward(L if needs_factors else None, R if needs_factors else None, *kept)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, first, *others = ctx.saved_tensors
        needs_x, needs_L, needs_R, needs_bias = ctx.needs_input_grad[:4]
        dY = dY.reshape(-1, dY.shape[-1])
        grad_x = grad_L = grad_R = grad_bias = None
        if needs_bias:
            grad_bias = dY.sum(0, dtype=ctx.bias_dtype)
        if not (needs_x or needs_L or needs_R):
            return None, None, None, grad_bias, None, None, *NOTHING

        L_compute, R_compute = L.to(ctx.dtype), R.to(ctx.dtype)
        hidden_grad = dY @ L_compute  # (rows, K)
        if needs_x:
            grad_x = (hidden_grad @ R_compute).reshape(ctx.shape)
        if ctx.kept == "hidden":
            grad_L = (dY.T @ first).to(L.dtype)
        elif ctx.kept != "nothing":
            x = first.reshape(-1, first.shape[-1]) if ctx.kept == "input" else None
            compressed = Tucker(first, *others) if ctx.kept == "compressed" else None
            left, right = product_gradient(dY, x, compressed)
            if ctx.sink is not None:
                ctx.sink(left, right)
            in_basis = hidden_grad.T if compressed is None else None
            grad_L, grad_R = _factor_gradients(L, R, left, right, ctx.tangent and needs_L, in_basis)
            grad_R = grad_R if needs_R else None
        return grad_x, grad_L if needs_L else None, grad_R, grad_bias, None, None, *NOTHING


def _factor_gradients(
    L: Tensor, R: Tensor, left: Tensor, right: Tensor, tangent: bool, left_in_basis: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`linalg.factor_gradients`; products over all rows in the compute dtype, the rest in at least float32.

    `left_in_basis` is given where `left` and `right` span all rows.
    """
    work = L.dtype if L.dtype in (torch.float32, torch.float64) else torch.float32
    if left_in_basis is None or left.dtype == work:
        parts = [part.to(work) for part in (L, R, left, right)]
        grad_L, grad_R = factor_gradients(parts[0], parts[1], parts[2], parts[3], tangent, left_in_basis)
    else:
        compute = left.dtype
        grad_L, grad_R = factor_gradients(L.to(compute), R.to(compute), left, right, False, left_in_basis)
        if tangent:
            grad_L = tangent_gradient(L.to(work), R.to(work), grad_L.to(work), grad_R.to(work))
    return grad_L.to(L.dtype), grad_R.to(R.dtype)


def factored_linear(
    x: Tensor,
    L: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    compressed: Tucker | None = None,
    tangent: bool = True,
    sink: ProductGradientSink | None = None,
) -> Tensor:
    """Linear layer with weight `L R`.

    **Shape**
        - x: (..., in); L: (out, K); R: (K, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients of the factors come back in the factors' dtype.
        L: Factor with orthonormal columns (required for `tangent`).
        R: The other factor.
        bias: Optional bias.
        compressed: Compressed form of `x`, kept instead of it. The factors' gradients are then those of the
            reconstructed input; the gradient of `x` is always exact.
        tangent: Return the tangent gradient for L instead of the Euclidean one (:func:`linalg.factor_gradients`).
        sink: Called in backward with the two factors of the product gradient (:func:`product_gradient`).

    Returns:
        `(x R^T) L^T + b`. Not differentiable twice.
    """
    parts = NOTHING if compressed is None else compressed
    return FactoredLinear.apply(x, L, R, bias, tangent, sink, *parts)
