"""Scaled dot-product attention that keeps queries, keys and values in few bits, and its output not at all.

A fused kernel keeps q, k, v, the output o and the row sums of the exponentials. Its backward takes p from q, k and
those sums, and `sum_k p dp` from o, so that rounded tensors leave sums that do not cancel: on DINOv2-small, int8 made
the gradients wrong by 18 %. Here backward runs attention again on the rounded q, k, v, a few heads at a time, and
takes all it needs from that, so the result is the exact gradient at a point nearby.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .quantization import Quantized, bits_per_value, check_kind, dequantize, quantize

# scores that backward holds at a time: batches of products large enough for all threads, in a few MiB
SCORES = 2**19


class _Piece(NamedTuple):
    """A part of the scores that backward computes at once: samples, key-value heads, queries."""

    samples: slice
    heads: slice
    queries: slice


def _pieces(samples: int, heads: int, queries: int, scores_per_query: int) -> Iterator[_Piece]:
    """Cuts (samples, heads, queries) into pieces of about `SCORES` scores."""
    per_head = queries * scores_per_query
    query_step = queries if per_head <= SCORES else max(1, SCORES // scores_per_query)
    head_step = max(1, min(heads, SCORES // per_head))
    sample_step = max(1, SCORES // (heads * per_head)) if head_step == heads else 1
    for sample in range(0, samples, sample_step):
        for head in range(0, heads, head_step):
            for query in range(0, queries, query_step):
                yield _Piece(
                    slice(sample, sample + sample_step),
                    slice(head, head + head_step),
                    slice(query, min(query + query_step, queries)),
                )


def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention, computed from nothing but its inputs.

    With `s = scale q k^T + mask`, `p = softmax(s)`, `o = p v`: `dv = p^T do`, `dp = do v^T`,
    `ds = p (dp - sum_k p dp)`, `dq = scale ds k`, `dk = scale ds^T q`. Holds `SCORES` scores at a time, besides the
    results. With `is_causal`, keys after the last query of a piece are not looked at.

    With 16-bit inputs s and dp, of which differences are taken, are computed in float32, and p and ds are rounded for
    the other products, as torch's fused kernels do.

    **Shape**
        - q: (B, H, N, d); k: (B, G, M, d); v: (B, G, M, e); grad: (B, H, N, e), where G divides H
        - mask: broadcastable to (B, H, N, M)
        - returns dq, dk, dv: as q, k, v, their dimensions in memory in the same order

    Args:
        q: Queries.
        k: Keys; each head of them serves H / G heads of queries.
        v: Values.
        grad: Gradient of the output.
        mask: True where a query may look, or numbers that are added to the scores.
        is_causal: Query n looks at the keys 0 to n only.
        scale: 1 / sqrt(d) by default.
    """
    samples, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    shared = heads // groups
    q_in, grad_in = q.unflatten(1, (groups, shared)), grad.unflatten(1, (groups, shared))
    if mask is not None:
        mask = mask.expand(samples, heads, queries, keys).unflatten(1, (groups, shared))
    several = queries * shared * keys > SCORES  # pieces that add to the same keys
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(tensor, dtype=work if several else q.dtype) for tensor in (k, v))
    dq_out = dq.unflatten(1, (groups, shared))
    for at, heads_at, rows in _pieces(samples, groups, queries, shared * keys):
        seen = slice(0, min(keys, rows.stop)) if is_causal else slice(0, keys)
        # (samples * groups, shared * queries, .), copied once: the queries of all heads that share a key
        q_piece, grad_piece = (_batched(tensor[at, heads_at, :, rows]) for tensor in (q_in, grad_in))
        k_piece, v_piece = (_batched(tensor[at, heads_at, seen]) for tensor in (k, v))
        place = q_in[at, heads_at, :, rows].shape[:-1]
        scores = _scaled(q_piece.to(work), k_piece.to(work).mT, scale)
        unmasked = scores.view(*place, -1)
        if mask is not None:
            part = mask[at, heads_at, :, rows, seen]
            unmasked.masked_fill_(~part, -math.inf) if part.dtype == torch.bool else unmasked.add_(part)
        if is_causal:
            size = (rows.stop - rows.start, seen.stop)
            later = torch.ones(size, dtype=torch.bool, device=q.device).triu_(1 + rows.start)
            unmasked.masked_fill_(later, -math.inf)
        # a query that may look nowhere gets zeros, as it does in the forward pass
        p = torch.softmax(scores, -1, out=scores) if mask is None else torch._safe_softmax(scores, -1)
        dp = torch.bmm(grad_piece.to(work), v_piece.to(work).mT)
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, work, grad_input=dp).to(q.dtype)
        dv[at, heads_at, seen] += torch.bmm(p.to(q.dtype).mT, grad_piece).view(*place[:2], -1, v.shape[-1])
        dq_out[at, heads_at, :, rows] = _scaled(ds, k_piece, scale).view(*place, width)
        dk[at, heads_at, seen] += _scaled(ds.mT, q_piece, scale).view(*place[:2], -1, width)
    return dq, dk.to(q.dtype), dv.to(q.dtype)


def _batched(tensor: Tensor) -> Tensor:
    """A contiguous batch of matrices: the first two dimensions as one, all others but the last as the rows."""
    return tensor.reshape(tensor.shape[:2].numel(), -1, tensor.shape[-1]).contiguous()


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale left right` of batches of matrices, without a pass for the scale."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class LowBitAttentionFunction(torch.autograd.Function):
    """Attention by torch's kernel; the rounded q, k, v are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        kind: str,
    ) -> Tensor:
        ctx.is_causal, ctx.scale = is_causal, scale
        kept = [quantize(tensor, kind) for tensor in (q, k, v)]
        ctx.forms = [(tensor.kind, tensor.dtype, tensor.shape, tensor.stride) for tensor in kept]
        parts = [(tensor.packed, tensor.rest) for tensor in kept]
        ctx.save_for_backward(mask, *(part for tensor in parts for part in tensor))
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *parts = ctx.saved_tensors
        tensors = []
        for index, (kind, *form) in enumerate(ctx.forms):
            tensors.append(dequantize(Quantized(kind, *parts[2 * index : 2 * index + 2], *form)))
        with torch.autocast(device_type=grad.device.type, enabled=False):
            grads = attention_gradients(tensors[0], tensors[1], tensors[2], grad, mask, ctx.is_causal, ctx.scale)
        return *grads, *[None] * 5


def low_bit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kind: str = "int8",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` that keeps only rounded queries, keys and values.

    The output is exact; gradients are those at the rounded inputs (:func:`attention_gradients`). Where that is not
    possible, torch's function is called as it is: with dropout, with a mask that needs a gradient, without four
    dimensions, or where 16-bit inputs would not become smaller.

    **Shape**
        - query: (B, H, N, d); key: (B, G, M, d); value: (B, G, M, e); attn_mask: broadcastable to (B, H, N, M)
        - returns (B, H, N, e)

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        attn_mask: As torch's function takes it.
        dropout_p: As torch's function takes it.
        is_causal: As torch's function takes it.
        scale: As torch's function takes it.
        enable_gqa: As torch's function takes it.
        kind: 'bf16', 'int16', 'int8' or 'int4' (:mod:`wasi_peft.memory.quantization`).

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(3))
        >>> low_bit_attention(q, k, v, is_causal=True).sum().backward()
        >>> q.grad.shape
        torch.Size([2, 4, 8, 16])
    """
    check_kind(kind)
    tensors = (query, key, value)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = tensors = query.to(dtype), key.to(dtype), value.to(dtype)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    possible = (
        all(tensor.dim() == 4 and 8 * tensor.itemsize > bits_per_value(kind) for tensor in tensors)
        and dropout_p == 0
        and (attn_mask is None or not (attn_mask.requires_grad or is_causal))
        and (enable_gqa or query.shape[1] == key.shape[1])
        and query.shape[0] == key.shape[0] == value.shape[0]
    )
    if not wanted or not possible:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return LowBitAttentionFunction.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa, kind)
