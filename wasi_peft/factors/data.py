"""Calibration data: batches that can be gone through more than once, or a function that runs the model on them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm

from .folder import checksum

RunModel = Callable[[], Any]
CalibrationData = Iterable[Any] | RunModel


def check_repeatable(data: CalibrationData) -> None:
    """Raise a ValueError for data that can be iterated only once."""
    if isinstance(data, Iterator):
        raise ValueError("calibration data must allow several iterations (a DataLoader, a list), got an iterator.")


def limited(data: Iterable[Any], max_batches: int | None, description: str | None) -> Iterator[Any]:
    """The first batches of calibration data, with a progress bar.

    Raises:
        ValueError: If there is not one, or none is allowed.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches!r}.")
    total = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    count = 0
    with tqdm(total=total, desc=description, disable=description is None) as bar:
        for batch in itertools.islice(data, max_batches):
            yield batch
            bar.update()
            count += 1
    if count == 0:
        raise ValueError("calibration data must hold at least one batch, got none.")


def describe_data(data: Any, max_batches: int | None) -> dict[str, int | None]:
    """What tells data from others: how many batches are used, and a checksum of the first one.

    The checksum is None where the first batch need not be the same next time (a shuffled loader) or where it is not
    known whether it is; both are for a function that runs the model.
    """
    if callable(data):
        return {"batches": None, "first_batch": None}
    count = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        count = max_batches if count is None else min(count, max_batches)
    loader = isinstance(data, DataLoader)
    ordered = isinstance(getattr(data.batch_sampler, "sampler", None), SequentialSampler) if loader else False
    if not (ordered or isinstance(data, Sequence)) or not count:
        return {"batches": count, "first_batch": None}
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        first = next(iter(data))
    return {"batches": count, "first_batch": batch_checksum(first)}


def batch_checksum(batch: Any) -> int:
    """CRC-32 of all tensors and numbers of a batch."""
    total = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            total = checksum(leaf, zlib.crc32(str((leaf.dtype, tuple(leaf.shape))).encode(), total))
        elif isinstance(leaf, (bool, int, float, str)):
            total = zlib.crc32(repr(leaf).encode(), total)
    return total
