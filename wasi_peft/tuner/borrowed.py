"""Tensors in memory that is not torch's own, such as a mapped file: all of it stays as long as one of them lives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


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
