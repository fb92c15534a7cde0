"""The low-rank update: a linear layer with weight `L R + B A` of which only B and A train.

Names as in :mod:`wasi_peft.autograd`; r is the rank of `B A`. The products are those of one pair of factors, `[L B]`
and `[R; A]`, so the change costs what r more directions of L and R would, and no pass over the rows on top. Backward
keeps r numbers a row for B, and the (compressed) input for A.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tucker import Tucker, expand_rows, roundable


def joined(
    L: Tensor, R: Tensor, B: Tensor | None, A: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """One pair of factors for a weight, `[L B]` and `[R; A]`; L and R themselves where there is no B A.

    **Shape**
        - L: (out, K); R: (K, in); B: (out, r); A: (r, in); returns (out, K + r), (K + r, in)
    """
    outer, inner = (L, R) if B is None or A is None else (torch.cat([L, B], 1), torch.cat([R, A], 0))
    return outer.to(dtype or L.dtype), inner.to(dtype or L.dtype)


class LowRankLinear(torch.autograd.Function):
    """`y = (x [R; A]^T) [L B]^T + b` with gradients for x, B, A and b.

    What is saved of the input: `x A^T` for B (exact, r wide), the compressed form or the input itself for A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        L: Tensor,
        R: Tensor,
        B: Tensor,
        A: Tensor,
        bias: Tensor | None,
        core: Tensor | None,
        feature: Tensor | None,
        token: Tensor | None,
        batch: Tensor | None,
    ) -> Tensor:
        outer, inner = joined(L, R, B, A, x.dtype)
        hidden = F.linear(x, inner)
        y = F.linear(hidden, outer, None if bias is None else bias.to(x.dtype))

        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, _, _, needs_B, needs_A = ctx.needs_input_grad[:5]
        # a copy: a view would keep all columns alive
        trained = hidden[..., L.shape[1] :].clone(memory_format=torch.contiguous_format) if needs_B else None
        trained = None if trained is None else roundable(trained)
        kept: tuple[Tensor | None, ...] = (None, None, None, None)
        ctx.compressed = core is not None
        if needs_A:
            kept = (x, None, None, None) if core is None else (core, feature, token, batch)
        factors = (L, R, B, A) if needs_x or needs_A else (None, None, B, A)
        ctx.save_for_backward(*factors, trained, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        # where `backward` is called inside autocast, that would lower what was saved in float32
        with torch.autocast(device_type=dY.device.type, enabled=False):
            return LowRankLinear._backward(ctx, dY)

    @staticmethod
    def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, B, A, trained, first, feature, token, batch = ctx.saved_tensors
        needs_x, _, _, needs_B, needs_A, needs_bias = ctx.needs_input_grad[:6]
        dY = dY.reshape(-1, dY.shape[-1])
        grad_x = grad_B = grad_A = grad_bias = None
        if needs_bias:
            grad_bias = dY.sum(0, dtype=ctx.bias_dtype)
        if needs_B:
            grad_B = (dY.T @ trained.reshape(-1, trained.shape[-1])).to(B.dtype)
        hidden_grad = None
        if needs_x:
            outer, inner = joined(L, R, B, A, ctx.dtype)
            hidden_grad = dY @ outer
            grad_x = (hidden_grad @ inner).reshape(ctx.shape)
            hidden_grad = hidden_grad[:, L.shape[1] :]
        if needs_A:
            if hidden_grad is None:
                hidden_grad = dY @ B.to(ctx.dtype)
            if ctx.compressed:
                grad_A = (hidden_grad.T @ expand_rows(Tucker(first, feature, token, batch))) @ feature.T
            else:
                grad_A = hidden_grad.T @ first.reshape(-1, first.shape[-1])
            grad_A = grad_A.to(A.dtype)
        return grad_x, None, None, grad_B, grad_A, grad_bias, *[None] * 4


def low_rank_linear(
    x: Tensor,
    L: Tensor,
    R: Tensor,
    B: Tensor,
    A: Tensor,
    bias: Tensor | None = None,
    compressed: Tucker | None = None,
) -> Tensor:
    """Linear layer with weight `L R + B A`, of which L and R do not train.

    **Shape**
        - x: (..., in); L: (out, K); R: (K, in); B: (out, r); A: (r, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        L: Frozen factor.
        R: The other one.
        B: Trained factor. Its gradient is exact.
        A: The other one.
        bias: Optional bias.
        compressed: Compressed form of `x`, kept instead of it. The gradient of A is then that of the reconstructed
            input.

    Returns:
        `(x [R; A]^T) [L B]^T + b`. Not differentiable twice.
    """
    parts = compressed if compressed is not None else (None, None, None, None)
    return LowRankLinear.apply(x, L, R, B, A, bias, *parts)
