"""The core update: a linear layer with weight `L M R` of which only the K x K core M trains.

Names as in :mod:`wasi_peft.updates.factored`. L and R span the subspaces that the weight is kept in, as LoRA-XS (arXiv
2405.17604) trains a small matrix between the factors of a weight. What makes it train fast are the coordinates
(:func:`coordinates.core_form`). Backward keeps `h = x R^T`, K numbers a row, and all gradients are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linalg.tucker import roundable
from .factored import outside_autocast


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


def three_linears(x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
    """`((x R^T) M^T) L^T + b` in the dtype of x."""
    return _from_image(F.linear(x, R.to(x.dtype)), L, M, bias)


def _from_image(h: Tensor, L: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(h, M.to(h.dtype)), L.to(h.dtype), None if bias is None else bias.to(h.dtype))


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
