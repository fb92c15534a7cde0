"""Float tensors in few bits, and back: the storage format of what backward keeps.

Values are taken in memory order and cut into groups of 64. A group is kept as whole numbers with one scale s and the
least value m of the group, `x ~ m + s code`, so that where nothing is negative zero stays exactly zero (which the
backward of ReLU, and of masked softmax, relies on). Rounding is to nearest: stochastic rounding gave gradient errors
1.4 times as large.

For 'int8' and 'int4_half' this is the row format of torch's compressed embedding tables, whose kernels do a whole
tensor in one pass each way. What they cannot do (other devices and dtypes, other kinds, NaN, groups of tiny values) is
done here. 'int4_half' keeps scale and least value in float16, for values known to be neither large nor tiny.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

GROUP = 64
KINDS = ("bf16", "int16", "int8", "int4", "int4_half")
_LEVELS = {"int16": 2**16 - 1, "int8": 2**8 - 1, "int4": 2**4 - 1, "int4_half": 2**4 - 1}
_CODE_BYTES = {"int16": 2 * GROUP, "int8": GROUP, "int4": GROUP // 2, "int4_half": GROUP // 2}  # of a group
_KERNELS = {"int8": "byte", "int4_half": "4bit"}
# largest magnitudes that the kernels do well: their epsilon adds 1e-8 to a range, which the format must have room for
_SUITABLE = {"int8": (1e-4, 2.0**126), "int4_half": (0.0, 2.0**15)}
_CHUNK = 2**17  # elements that are converted at a time: the only float temporary


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits.

    **Shape**
        - packed: (groups, bytes), a group's codes, then its scale and least value; (n,) values for 'bf16'
        - rest: (n % 64,), the values after the last full group, exact; empty for 'bf16'

    `checked` is True where it is known already that all values of the groups are finite.
    """

    kind: str
    packed: Tensor
    rest: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    checked: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.packed.nbytes + self.rest.nbytes

    def is_finite(self) -> bool:
        """Whether no value was NaN or Inf, or too large for the format."""
        groups = [] if self.checked else [self.packed if self.kind == "bf16" else _tail(self.packed, self.kind)]
        parts = [*groups, self.rest]
        return all(bool(torch.isfinite(bound)) for part in parts if part.numel() for bound in torch.aminmax(part))


def bits_per_value(kind: str) -> float:
    """Bits kept for each value of a large tensor, with the scales and least values.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> [bits_per_value(kind) for kind in ("bf16", "int16", "int8", "int4", "int4_half")]
        [16.0, 17.0, 9.0, 5.0, 4.5]
    """
    check_kind(kind)
    return 16.0 if kind == "bf16" else 8 * _group_bytes(kind) / GROUP


def check_kind(kind: str) -> None:
    """Raises ValueError unless `kind` is one of :data:`KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}.")


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in memory in the same order as those of `tensor`.

    Example:
        >>> dense_stride(torch.zeros(2, 3, 8).transpose(0, 1)), dense_stride(torch.zeros(4, 6)[:, :3])
        ((8, 24, 1), (3, 1))
    """
    stride, step = [0] * tensor.dim(), 1
    for dim in reversed(_memory_order(tensor)):
        stride[dim] = step
        step *= max(1, tensor.shape[dim])
    return tuple(stride)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor covers one stretch of memory, every element once."""
    wanted = dense_stride(tensor)
    return all(
        size <= 1 or have == want for size, have, want in zip(tensor.shape, tensor.stride(), wanted, strict=True)
    )


@torch.no_grad()
def largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value, NaN if there is one. No copy is made.

    Example:
        >>> largest_magnitude(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        3.0
    """
    if not is_dense(tensor):
        return float(torch.linalg.vector_norm(tensor, math.inf))
    least, most = torch.aminmax(tensor.as_strided((tensor.numel(),), (1,)))  # much faster, but it copies what has gaps
    return max(-float(least), float(most))


@torch.no_grad()
def quantize(tensor: Tensor, kind: str, largest: float | None = None) -> Quantized:
    """Keep a float tensor in few bits.

    Per group: `m = min(x)`, `s = (max(x) - m) / levels`, `code = clamp(round((x - m) / s))`, so that
    `|x - m - s code| <= s / 2`, up to the rounding of s and m to float32, or with 'int4_half' to float16, beyond whose
    range values become NaN or Inf. A group with NaN or Inf comes back as such.
    Besides the result only a float buffer of 2^17 elements is made, unless the tensor has gaps in memory between runs
    that are no multiple of 64.

    **Shape**
        - tensor: any, of any strides

    Args:
        tensor: float16, bfloat16, float32 or float64; not changed.
        kind: 'bf16', 'int16', 'int8', 'int4' or 'int4_half'.
        largest: Its largest absolute value, where that is known.

    Raises:
        ValueError: If the kind is unknown or the tensor is not a floating point one.

    Example:
        >>> x = torch.linspace(-1, 1, 640).view(10, 64)
        >>> kept = quantize(x, "int8")
        >>> kept.nbytes, bool((dequantize(kept) - x).abs().max() < 1 / 255)
        (720, True)
    """
    check_kind(kind)
    if not tensor.is_floating_point():
        raise ValueError(f"only floating point tensors can be quantised, got {tensor.dtype}.")
    contiguous = tensor.is_contiguous()
    ordered = tensor.detach() if contiguous else tensor.detach().permute(_memory_order(tensor))
    form = (tensor.dtype, tensor.shape, tensor.stride() if contiguous else dense_stride(tensor))
    if kind == "bf16":
        values = ordered.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True).view(-1)
        return Quantized(kind, values, values[:0], *form)
    rows, rest = _groups(ordered)
    if kind in _KERNELS and _suits_kernel(rows, kind, largest):
        return Quantized(kind, _pack_at_once(rows, kind), rest, *form, checked=True)
    return Quantized(kind, _pack_in_chunks(rows, kind), rest, *form)


@torch.no_grad()
def dequantize(kept: Quantized) -> Tensor:
    """The tensor that was kept: same shape and dtype, dense, its dimensions in memory in the same order."""
    return dequantize_flat(kept).as_strided(kept.shape, kept.stride)


@torch.no_grad()
def dequantize_flat(kept: Quantized) -> Tensor:
    """The values that were kept in memory order.

    **Shape**
        - returns: (n,)
    """
    if kept.kind == "bf16":
        return kept.packed.to(kept.dtype, copy=True)
    fast = kept.kind in _KERNELS and kept.packed.device.type == "cpu" and kept.dtype != torch.float64
    if fast and kept.dtype == torch.float32 and not kept.rest.numel() and kept.packed.numel():
        return _unpack_kernel(kept.packed, kept.kind).view(-1)
    flat = torch.empty(kept.shape.numel(), dtype=kept.dtype, device=kept.packed.device)
    count = len(kept.packed) * GROUP
    flat[count:] = kept.rest
    groups = flat[:count].view(-1, GROUP)
    for part in _chunks(groups):
        packed = kept.packed[part]
        groups[part] = _unpack_kernel(packed, kept.kind) if fast else _unpack(packed, kept.kind, kept.dtype)
    return flat


# -------------------------------------------------------------------------------- groups


def _group_bytes(kind: str) -> int:
    return _CODE_BYTES[kind] + 2 * _tail_dtype(kind).itemsize


def _tail_dtype(kind: str) -> torch.dtype:
    return torch.float16 if kind == "int4_half" else torch.float32


def _suits_kernel(rows: Tensor, kind: str, largest: float | None = None) -> bool:
    """Whether torch's kernel does some groups well; it does not tell NaN."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float16) or not rows.numel():
        return False
    if isinstance(rows, FakeTensor):
        return True
    if largest is None:
        largest = largest_magnitude(rows)
    least, most = _SUITABLE[kind]
    return least <= largest <= most


# The kernels' own rules for tensors without values get the dtype wrong.


def _pack_kernel(rows: Tensor, kind: str) -> Tensor:
    if isinstance(rows, FakeTensor):
        return rows.new_empty((len(rows), _group_bytes(kind)), dtype=torch.uint8)
    packed: Tensor = getattr(torch.ops.quantized, f"embedding_bag_{_KERNELS[kind]}_prepack")(rows)
    return packed


def _unpack_kernel(packed: Tensor, kind: str) -> Tensor:
    if isinstance(packed, FakeTensor):
        return packed.new_empty((len(packed), GROUP), dtype=torch.float32)
    values: Tensor = getattr(torch.ops.quantized, f"embedding_bag_{_KERNELS[kind]}_unpack")(packed)
    return values


def _pack_at_once(rows: Tensor, kind: str) -> Tensor:
    """The groups by torch's kernel.

    **Shape**
        - rows: (..., 64), of CPU float32 or float16; returns (groups, bytes)
    """
    if rows.is_contiguous():
        return _pack_kernel(rows.view(-1, GROUP), kind)
    packed = torch.empty((*rows.shape[:-1], _group_bytes(kind)), dtype=torch.uint8)
    for part in _chunks(rows):
        packed[part] = _pack_kernel(rows[part].reshape(-1, GROUP), kind).view(packed[part].shape)
    return packed.view(-1, _group_bytes(kind))


def _pack_in_chunks(rows: Tensor, kind: str) -> Tensor:
    """The groups in plain operations.

    **Shape**
        - rows: (..., 64); returns (groups, bytes)
    """
    compute = torch.promote_types(rows.dtype, torch.float32)
    levels = _LEVELS[kind]
    packed = torch.empty((*rows.shape[:-1], _group_bytes(kind)), dtype=torch.uint8, device=rows.device)
    codes, tail = packed[..., : _CODE_BYTES[kind]], _tail(packed, kind)
    if rows.numel():
        least, most = (bound.to(compute) for bound in torch.aminmax(rows, dim=-1))
        tail[..., 1] = least
        tail[..., 0] = (most - tail[..., 1]) / levels  # from what is kept of the least value
    inverse = tail[..., :1].to(compute).clamp_min(torch.finfo(torch.float32).tiny).reciprocal_()
    buffer = None
    for part in _chunks(rows):
        if buffer is None:
            buffer = rows.new_empty(rows[part].shape, dtype=compute)
        values = torch.sub(rows[part], tail[part, ..., 1:], out=buffer[: len(rows[part])])
        values.mul_(inverse[part]).round_().clamp_(0, levels)
        if kind == "int16":
            codes[part].view(torch.int16).copy_(values.sub_(2**15))
        elif kind == "int4":
            half = GROUP // 2
            codes[part] = values[..., :half].add_(values[..., half:], alpha=16)
        elif kind == "int4_half":  # neighbours share a byte in the kernels' format
            codes[part] = values[..., ::2].add_(values[..., 1::2], alpha=16)
        else:
            codes[part] = values
    return packed.view(-1, _group_bytes(kind))


def _unpack(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Values of some groups in plain operations.

    **Shape**
        - packed: (groups, bytes); returns (groups, 64)
    """
    compute = torch.promote_types(dtype, torch.float32)
    codes, tail = packed[:, : _CODE_BYTES[kind]], _tail(packed, kind).to(compute)
    if kind == "int16":
        values = codes.view(torch.int16).to(compute).add_(2**15)
    elif kind == "int4":
        values = torch.cat([codes & 15, codes >> 4], -1).to(compute)
    elif kind == "int4_half":
        values = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(compute)
    else:
        values = codes.to(compute)
    return values.mul_(tail[:, :1]).add_(tail[:, 1:])


def _tail(packed: Tensor, kind: str) -> Tensor:
    """Scale and least value of every group, a view (..., 2)."""
    return packed[..., _CODE_BYTES[kind] :].view(_tail_dtype(kind))


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the one with the largest stride to the one with the smallest."""
    return sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], -tensor.shape[dim]))


def _groups(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Full groups of the values as views (rows, groups, 64), chunked over the rows, and a copy of the values after."""
    if not ordered.is_contiguous():
        rows = _as_rows(ordered)
        if rows is not None and rows.shape[1] % GROUP == 0:
            return rows.unflatten(1, (-1, GROUP)), ordered.new_empty(0)
        ordered = ordered.contiguous()
    flat = ordered.view(-1)
    count = flat.numel() // GROUP * GROUP
    return flat[:count].view(-1, 1, GROUP), flat[count:].clone()


def _as_rows(ordered: Tensor) -> Tensor | None:
    """A view (rows, columns) of a tensor with gaps, as wide as possible; None where there is no such view."""
    for split in range(1, ordered.dim()):
        columns = ordered.shape[split:].numel()
        try:
            return ordered.view(-1, columns)
        except RuntimeError:
            continue
    return None


def _chunks(groups: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, groups[0].numel())) if len(groups) else 1
    for start in range(0, len(groups), step):
        yield slice(start, start + step)
