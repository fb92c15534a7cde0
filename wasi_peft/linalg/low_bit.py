"""Weights and rows in few bits: how they are rounded, and what the codes stand for.

int8: codes `q` with one scale s a channel, `w ~ s q`, symmetric. int4: groups of 32 entries of a row, each with a
scale and a smallest value of its own, `w ~ s q + z`, two codes a byte, as in GGUF's Q4_1. Rows of an activation are
rounded like channels of a weight, each by its own largest entry (vector-wise, LLM.int8, arXiv 2208.07339).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_CODE = 127
GROUP = 32
TILE = 2**19  # elements of a CPU's temporary tensors: larger ones cost more to get than to compute


class RoundedRows(NamedTuple):
    """Rows in 8 bits: `x ~ codes * scale`, and in some columns, whose codes are zero, `x = values`.

    **Shape**
        - codes: (rows, n), int8; scale: (rows, 1), at least float32
        - columns: (m,), int64; values: (rows, m), in the dtype of x; or None for no such columns
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor | None = None
    values: Tensor | None = None


def row_tiles(rows: int, width: int, device: torch.device) -> list[slice]:
    """Ranges of rows, alike but for the last, of about :data:`TILE` elements each on a CPU; else all rows in one.

    The first one is the longest.
    """
    whole = device.type != "cpu" or torch.compiler.is_compiling()
    count = 1 if whole else max(1, -(-rows * width // TILE))
    step = max(1, -(-rows // count))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def quantize_rows(x: Tensor, outliers: int = 0, factor: Tensor | None = None) -> RoundedRows:
    """Each row to int8 by its largest entry: `x ~ codes * scale`, no entry off by more than half a scale.

    The inputs of a transformer's layers have a few columns that are many times as large as the others, always the same
    ones (LLM.int8); kept as they are, they no longer decide the scale of all others.

    A row of zeros gets a scale of 0. NaN or Inf in a row makes its scale NaN or Inf, so that a product of codes and
    scales is not finite either.

    **Shape**
        - x: (rows, n); factor: (1, n)

    Args:
        x: Rows.
        outliers: Columns that are kept as they are, those with the largest entries; an eighth of all at most.
        factor: What the columns are multiplied by before they are rounded, in at least float32; not with outliers.

    Example:
        >>> codes, scale, *_ = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
        >>> codes.tolist(), scale.mul(127).tolist()
        ([[64, -127, 32], [0, 0, 0]], [[2.0], [0.0]])
    """
    x = x.detach()  # codes have no gradient, and an exported program runs this where autograd records
    dtype = torch.promote_types(x.dtype, torch.float32)  # 16 bits hold no more digits than the code
    columns = values = None
    outliers = min(outliers, x.shape[1] // 8)
    if outliers and len(x):
        columns = largest_magnitude(x, 0).topk(outliers).indices
        values = x.index_select(1, columns)
    tiles = row_tiles(len(x), x.shape[1], x.device)
    if len(tiles) == 1:
        part = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        scale = _scale_of(part, columns, factor)
        return RoundedRows(_codes_of(part, scale).to(torch.int8), scale, columns, values)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), 1, dtype=dtype)
    work = x.new_empty(tiles[0].stop if tiles else 0, x.shape[1], dtype=dtype)
    for rows in tiles:
        part = work[: rows.stop - rows.start].copy_(x[rows])
        scale[rows] = own = _scale_of(part, columns, factor)
        codes[rows] = _codes_of(part, own)
    return RoundedRows(codes, scale, columns, values)


def _scale_of(part: Tensor, columns: Tensor | None, factor: Tensor | None) -> Tensor:
    """Scales of rows, which are multiplied by a factor, and some of their columns emptied, in place."""
    if factor is not None:
        part.mul_(factor)
    if columns is not None:
        part.index_fill_(1, columns, 0)
    return largest_magnitude(part, -1).unsqueeze_(-1).div_(LARGEST_CODE)


def _codes_of(part: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers for rows, in place."""
    return part.div_(scale.clamp_min(torch.finfo(part.dtype).tiny)).round_()


def transposed_times_rows(h: Tensor, rows: RoundedRows) -> Tensor:
    """`h^T x`, the gradient of a weight from rows x in 8 bits, which are restored some at a time.

    **Shape**
        - h: (rows, K); x: (rows, n); returns (K, n), summed over the parts in at least float32

    Example:
        >>> x, h = torch.tensor([[1.0, -2.0], [4.0, 4.0]]), torch.tensor([[1.0], [0.5]])
        >>> transposed_times_rows(h, quantize_rows(x))
        tensor([[3.0079, 0.0000]])
    """
    narrow = h.dtype == torch.float16  # in whose range h and scales multiplied may be nothing
    scaled = h if narrow else h * rows.scale.to(h.dtype)
    n = rows.codes.shape[1]
    product = h.new_zeros(h.shape[1], n, dtype=torch.promote_types(h.dtype, torch.float32))
    for part in row_tiles(len(h), n, h.device):
        codes = rows.codes[part]
        product += scaled[part].t() @ (codes * rows.scale[part] if narrow else codes).to(h.dtype)
    if rows.columns is not None:  # which are kept as they are
        assert rows.values is not None
        product.index_add_(1, rows.columns, (h.t() @ rows.values).to(product.dtype))
    return product


def largest_magnitude(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude along a dimension, which is gone then.

    From float32 on without a copy of the magnitudes: that takes longer than to look twice, and memory.

    Example:
        >>> largest_magnitude(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), 1)
        tensor([2.0000, 0.5000])
    """
    if x.element_size() < 4:
        return x.abs().amax(dim)
    return torch.maximum(x.amax(dim), x.amin(dim).neg_())


class Groups(NamedTuple):
    """A weight in 4 bits.

    **Shape**
        - codes: (out, in_padded / 2), uint8, the code of an even column in the low half of a byte
        - scale, smallest: (out, in_padded / 32), float16; in_padded is the next multiple of 32
    """

    codes: Tensor
    scale: Tensor
    smallest: Tensor


def quantize_groups(weight: Tensor) -> Groups:
    """A weight to 4 bits, each group of 32 entries of a row from its smallest to its largest entry.

    Its values must be in the range of float16.

    **Shape**
        - weight: (out, in)

    Example:
        >>> weight = torch.tensor([[-1.0, 2.0] + 30 * [0.0]])
        >>> restore_groups(quantize_groups(weight), 2).round(decimals=2)
        tensor([[-1.,  2.]])
    """
    out_features, in_features = weight.shape
    padding = -in_features % GROUP
    padded = F.pad(weight.float(), (0, padding), mode="constant")
    if padding:
        padded[:, in_features:] = weight[:, -1:].float()  # widens no group
    groups = padded.reshape(out_features, -1, GROUP)
    smallest, largest = torch.aminmax(groups, dim=-1)
    smallest = smallest.to(torch.float16)
    scale = ((largest - smallest.float()) / 15).to(torch.float16)
    divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((groups - smallest.float()[..., None]) / divisor[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    low, high = codes.reshape(out_features, -1, 2).unbind(-1)
    return Groups(low | (high << 4), scale, smallest)


def restore_groups(groups: Groups, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes stand for, (out, in)."""
    out_features = len(groups.codes)
    codes = torch.stack([groups.codes & 15, groups.codes >> 4], dim=-1).view(out_features, -1, GROUP)
    weight = codes.to(dtype).mul_(groups.scale.to(dtype)[..., None]).add_(groups.smallest.to(dtype)[..., None])
    return weight.view(out_features, -1)[:, :in_features]
