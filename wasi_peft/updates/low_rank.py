"""The low-rank update: a linear layer with weight `L R + B A` of which only B and A train.

Names as in :mod:`wasi_peft.updates.factored`; r is the rank of `B A`, which starts as the least important of all K + r
directions of the weight (:func:`split_off`). The products are those of one pair of factors, `[L B]` and `[R; A]`, so
B A costs what r more directions of L and R would, and no pass over the rows on top. Backward keeps r numbers a row for
B, and the (compressed) input for A.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ..linalg.tucker import Tucker, expand_rows, roundable
from .factored import outside_autocast


def joined(
    L: Tensor, R: Tensor, B: Tensor | None, A: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """One pair of factors for a weight, `[L B]` and `[R; A]`; L and R themselves where there is no B A.

    These are views where :func:`lay_side_by_side` was applied and no gradient is asked for, else copies.

    **Shape**
        - L: (out, K); R: (K, in); B: (out, r); A: (r, in); returns (out, K + r), (K + r, in)
    """
    if B is None or A is None:
        outer, inner = L, R
    else:
        outer, inner = _side_by_side(L, B, 1), _side_by_side(R, A, 0)
    return (outer, inner) if dtype is None or dtype == L.dtype else (outer.to(dtype), inner.to(dtype))


@torch.no_grad()
def split_off(L: Tensor, R: Tensor, kept: int, trained: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take factors apart into a part that stays and one that trains: `L R = L' R' + B A`.

    With `L R = sum_i s_i u_i v_i^T`, the `kept` largest terms stay, and those after them train, as in MiLoRA (arXiv
    2406.09044): `B = [s_i u_i / c]`, `A = [c v_i^T]`. So the rows of A have the norm c = 2 / sqrt(3) of rows that are
    drawn as in LoRA, at twice the size instead of LoRA's usual scaling alpha / r = 2; and LoRA's learning rates carry
    over. Rows for which there are no terms are drawn like that, with zeros in B.

    **Shape**
        - L: (out, n), orthonormal columns; R: (n, in); kept <= n <= kept + trained
        - returns L' (out, kept), R' (kept, in), B (out, trained), A (trained, in)

    Example:
        >>> L, R = torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> kept_L, kept_R, B, A = split_off(L, R, 2, 1)
        >>> (B @ A).round(decimals=4).diagonal().tolist()
        [0.0, 1.0, 0.0]
    """
    drawn = torch.empty(trained, R.shape[1], dtype=R.dtype, device=R.device).uniform_(-1, 1) * (2 / R.shape[1] ** 0.5)
    B = L.new_zeros(len(L), trained)
    found = L.shape[1] - kept
    if not found:
        return L, R, B, drawn
    right = R.double()
    turned = torch.linalg.eigh(right @ right.T).eigenvectors.flip(1)  # most important first
    left, right = L.double() @ turned, turned.T @ right
    size = right[kept:].norm(dim=1, keepdim=True) * 3**0.5 / 2
    rows = torch.where(size > 0, right[kept:] / size, drawn[:found].double())
    B[:, :found] = left[:, kept:] * size.T
    A = torch.cat([rows.to(R.dtype), drawn[found:]])
    return left[:, :kept].to(L.dtype), right[:kept].to(R.dtype), B, A


@torch.no_grad()
def lay_side_by_side(L: nn.Parameter, R: nn.Parameter, B: nn.Parameter, A: nn.Parameter) -> None:
    """Move factors in memory, in place, so that `[L B]^T` and `[R; A]` are there without a copy.

    Copying them in every pass costs as much as multiplying a few tokens by them, which is what generating text does.
    L and B are then transposed views. Parameters stay the same objects, each with its own version counter. Those of
    different dtypes or devices, and sharded or quantized ones, stay where they are.
    """
    if any(type(part.data) not in (Tensor, FakeTensor) for part in (L, R, B, A)):
        return
    if not _are_side_by_side(L, B, 1) and _same_kind(L, B):
        rows = torch.cat([L.T, B.T])
        L.data, B.data = rows[: L.shape[1]].T, rows[L.shape[1] :].T
    if not _are_side_by_side(R, A, 0) and _same_kind(R, A):
        rows = torch.cat([R, A])
        R.data, A.data = rows[: len(R)], rows[len(R) :]


def _same_kind(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device


def _side_by_side(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Both along `dim`: a view where they are side by side in memory, unless it would hide a gradient."""
    differentiable = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    if differentiable or torch.compiler.is_compiling() or not _are_side_by_side(first, second, dim):
        return torch.cat([first, second], dim)
    size = list(first.shape)
    size[dim] += second.shape[dim]
    return first.as_strided(size, first.stride())


def _are_side_by_side(first: Tensor, second: Tensor, dim: int) -> bool:
    """Whether the second follows the first in one storage, `dim` being the outer dimension of both there.

    Asked for in every forward pass, where each microsecond counts when text is generated.
    """
    width = first.shape[1 - dim]
    strides = (width, 1) if dim == 0 else (1, width)
    return (
        first.stride() == strides
        and second.stride() == strides
        and second.storage_offset() == first.storage_offset() + first.numel()
        and first.dtype == second.dtype
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
    )


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
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, B, A, trained, first, feature, token, batch = ctx.saved_tensors
        needs_x, _, _, needs_B, needs_A, needs_bias = ctx.needs_input_grad[:6]
        dY = dY.reshape(-1, dY.shape[-1])
        grad_x = grad_B = grad_A = grad_bias = None
        if needs_bias:
            grad_bias = dY.sum(0, dtype=ctx.bias_dtype)
        if needs_B:
            grad_B = (trained.reshape(-1, trained.shape[-1]).T @ dY).T.to(B.dtype)  # laid out like B
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
