"""Float tensors in few bits, and back: the storage format of what backward keeps.

Values are taken in memory order and cut into groups of 64. A group is kept as integers with one scale s and one
integer zero point z, `x ~ s (code - z)`, so that zero stays exactly zero (which the backward of ReLU, and of masked
softmax, relies on). Rounding is to nearest: stochastic rounding gave gradient errors 1.4 times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
KINDS = ("bf16", "int16", "int8", "int4")
_LIMITS = {"int16": (-(2**15), 2**15 - 1), "int8": (-(2**7), 2**7 - 1), "int4": (0, 2**4 - 1)}
_CODES = {"int16": torch.int16, "int8": torch.int8, "int4": torch.int8}
_CHUNK = 2**17  # elements that are converted at a time: the only float temporary


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits.

    **Shape**
        - codes: (groups, 64), or (groups, 32) with two values a byte for 'int4'; (n,) for 'bf16'
        - scale, zero: (groups, 1), None for 'bf16'
        - rest: (n % 64,), the values after the last full group, exact; empty for 'bf16'
    """

    kind: str
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    rest: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        parts = (self.codes, self.scale, self.zero, self.rest)
        return sum(part.nbytes for part in parts if part is not None)

    def is_finite(self) -> bool:
        """Whether no value was NaN or Inf, or too large for the format."""
        parts = [part for part in (self.codes if self.scale is None else self.scale, self.rest) if part.numel()]
        return all(bool(torch.isfinite(bound)) for part in parts for bound in torch.aminmax(part))


def bits_per_value(kind: str) -> float:
    """Bits kept for each value of a large float32 tensor, with the scales and zero points.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> [bits_per_value(kind) for kind in ("bf16", "int16", "int8", "int4")]
        [16.0, 16.75, 8.625, 4.625]
    """
    check_kind(kind)
    if kind == "bf16":
        return 16.0
    width = int(kind.removeprefix("int"))
    return width + (32 + 8 * _CODES[kind].itemsize) / GROUP


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
def quantize(tensor: Tensor, kind: str) -> Quantized:
    """Keep a float tensor in few bits.

    Per group: `s = (max(x, 0) - min(x, 0)) / levels`, `z = lowest - round(min(x, 0) / s)`,
    `code = clamp(round(x / s + z))`, so that `|x - s (code - z)| <= s / 2`, or s at the ends of the range. A group
    with NaN or Inf comes back as NaN. Besides the result only a float buffer of 2^17 elements is made, unless the
    tensor has gaps in memory between runs that are no multiple of 64.

    **Shape**
        - tensor: any, of any strides

    Args:
        tensor: float16, bfloat16, float32 or float64; not changed.
        kind: 'bf16', 'int16', 'int8' or 'int4'.

    Raises:
        ValueError: If the kind is unknown or the tensor is not a floating point one.

    Example:
        >>> x = torch.linspace(-1, 1, 640).view(10, 64)
        >>> kept = quantize(x, "int8")
        >>> kept.nbytes, bool((dequantize(kept) - x).abs().max() < 1 / 255)
        (690, True)
    """
    check_kind(kind)
    if not tensor.is_floating_point():
        raise ValueError(f"only floating point tensors can be quantised, got {tensor.dtype}.")
    ordered = tensor.detach().permute(_memory_order(tensor))
    form = (tensor.dtype, tensor.shape, dense_stride(tensor))
    if kind == "bf16":
        codes = ordered.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True).view(-1)
        return Quantized(kind, codes, None, None, codes[:0], *form)
    rows, rest = _groups(ordered)
    low, high = _LIMITS[kind]
    compute = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    least = rows.amin(-1, keepdim=True).to(compute).clamp_max_(0)
    scale = rows.amax(-1, keepdim=True).to(compute).clamp_min_(0).sub_(least).div_(high - low)
    inverse = scale.clamp_min(torch.finfo(compute).tiny).reciprocal_()
    zero = least.mul_(inverse).neg_().round_().add_(low)
    width = GROUP // 2 if kind == "int4" else GROUP
    codes = torch.empty((*rows.shape[:-1], width), dtype=_CODES[kind], device=rows.device)
    buffer = None
    for part in _chunks(rows):
        chunk = rows[part]
        if buffer is None:
            buffer = torch.empty(chunk.shape, dtype=compute, device=chunk.device)
        values = torch.mul(chunk, inverse[part], out=buffer[: len(chunk)])
        values.add_(zero[part]).round_().clamp_(low, high)
        if kind == "int4":
            values = values[..., :width].add_(values[..., width:], alpha=16).sub_(128)
        codes[part] = values
    groups = codes.shape[:-1].numel()
    return Quantized(
        kind, codes.view(groups, width), scale.view(groups, 1), zero.view(groups, 1).to(_CODES[kind]), rest, *form
    )


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
    if kept.scale is None or kept.zero is None:
        return kept.codes.to(kept.dtype, copy=True)
    flat = torch.empty(kept.shape.numel(), dtype=kept.dtype, device=kept.codes.device)
    count = kept.codes.shape[0] * GROUP
    flat[count:] = kept.rest
    groups, compute = flat[:count].view(-1, GROUP), kept.scale.dtype
    for part in _chunks(groups):
        values = groups[part] if kept.dtype == compute else torch.empty_like(groups[part], dtype=compute)
        if kept.kind == "int4":
            codes = kept.codes[part].view(torch.uint8) ^ 128
            values[:, : GROUP // 2] = codes & 15
            values[:, GROUP // 2 :] = codes >> 4
        else:
            values.copy_(kept.codes[part])
        values.sub_(kept.zero[part]).mul_(kept.scale[part])
        if kept.dtype != compute:
            groups[part] = values
    return flat


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
