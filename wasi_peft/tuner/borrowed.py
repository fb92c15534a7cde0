"""Tensors in memory that is not torch's own, such as a mapped file: all of it stays as long as one of them lives."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

_DONTNEED = 4  # MADV_DONTNEED of Linux
_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)  # in /proc/self/pagemap


def borrowed_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the borrowed ones among some tensors; equal views count once."""
    return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in _borrowed(tensors)}.values())


@torch.no_grad()
def own_remainder(tensors: Iterable[Tensor], before: int) -> None:
    """Copy what a model still borrows where it has given up more than that, so that the rest's memory goes too.

    Tensors that are equal views stay so; where they overlap otherwise, nothing is copied.

    Args:
        tensors: All that the model has. Their memory changes, not their values.
        before: What :func:`borrowed_bytes` said of them before some were given up.
    """
    left = list(_borrowed(tensors))
    size = borrowed_bytes(left)
    if 2 * size >= before or _overlap(left):
        return
    copies: dict[int, Tensor] = {}
    for tensor in left:
        address = tensor.data_ptr()
        if address not in copies:
            copies[address] = tensor.detach().clone()
        tensor.data = copies[address]


def _borrowed(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        # not what quantisers and simulations have in place of tensors
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if plain and tensor.layout == torch.strided and tensor.numel() and not tensor.untyped_storage().resizable():
            yield tensor


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether some have a part of their memory in common, or are not dense in it."""
    views = {(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.dtype, tensor.shape) for tensor in tensors}
    spans = sorted((start, end) for start, end, *_ in views)
    dense = all(tensor.is_contiguous() for tensor in tensors)
    return not dense or any(second[0] < first[1] for first, second in itertools.pairwise(spans))


class MappedFiles:
    """The files that this process has mapped now, on Linux; elsewhere, none."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []
        try:
            with open("/proc/self/maps") as maps:
                lines = [line.split(maxsplit=5) for line in maps]
        except OSError:
            return
        for span, *_, path in (fields for fields in lines if len(fields) == 6):
            if path.startswith("/"):
                start, end = span.split("-")
                self._spans.append((int(start, 16), int(end, 16)))

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Drop the pages of tensors that are done with, where a file holds what they hold.

        They leave this process's memory and stay in the system's cache; whoever reads them gets them from there. Pages
        that were written to are left alone.
        """
        for tensor in _borrowed(tensors):
            if not tensor.is_contiguous():
                continue
            # whole pages inside the tensor: its neighbours may be in use
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            index = bisect.bisect(self._spans, (start, end)) - 1
            of_file = start < end and index >= 0 and end <= self._spans[index][1]
            if of_file and _unwritten(start, end):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _unwritten(start: int, end: int) -> bool:
    """Whether what pages hold is in the file still: a page that was written to is this process's own."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(start // mmap.PAGESIZE * 8)
            words = np.frombuffer(pages.read((end - start) // mmap.PAGESIZE * 8), np.uint64)
    except OSError:
        return False
    present = words & _PRESENT != 0
    return len(words) * mmap.PAGESIZE == end - start and not bool(
        (words & _SWAPPED).any() or ((words & _OF_FILE == 0) & present).any()
    )
