"""A trained linear map of an image: what follows a product with a factor in few bits.

Such a factor multiplies by itself (:meth:`forms.residual.Residual.multiply`) and keeps nothing for backward. What is
kept is the image `h = x R^T`, K numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linalg.tucker import roundable
from .factored import linear_without_view, outside_autocast


class ImageLinear(torch.autograd.Function):
    """`y = h P^T + b` with gradients for h, P and b."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, P: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtype, ctx.shape = h.dtype, h.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_h, needs_P, _ = ctx.needs_input_grad
        rows = h.reshape(-1, h.shape[-1])
        ctx.save_for_backward(P if needs_h or needs_P else None, roundable(rows) if needs_P else None)
        return linear_without_view(h, P, bias)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        P, h = ctx.saved_tensors
        needs_h, needs_P, needs_bias = ctx.needs_input_grad
        dY = dY.reshape(-1, dY.shape[-1])
        grad_h = (dY @ P.to(ctx.dtype)).reshape(ctx.shape) if needs_h else None
        grad_P = (dY.T @ h).to(P.dtype) if needs_P else None
        return grad_h, grad_P, dY.sum(0, dtype=ctx.bias_dtype) if needs_bias else None


def image_linear(h: Tensor, P: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer on an image that is kept for the gradient of its weight.

    **Shape**
        - h: (..., K); P: (n, K); bias: (n,); returns (..., n)

    Args:
        h: Image. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        P: Trained factor. Its gradient is exact.
        bias: Optional bias.

    Returns:
        `h P^T + b`. Not differentiable twice.

    Example:
        >>> h, P = torch.ones(5, 2), torch.ones(3, 2, requires_grad=True)
        >>> image_linear(h, P).sum().backward()
        >>> P.grad.tolist()
        [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]
    """
    y: Tensor = ImageLinear.apply(h, P, bias)
    return y
