"""Calibration data: batches that can be gone through more than once, or a function that runs the model on them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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
    total, count = _count(data, max_batches), 0
    with tqdm(total=total, desc=description, disable=description is None) as bar:
        for batch in itertools.islice(data, max_batches):
            yield batch
            bar.update()
            count += 1
    if count == 0:
        raise ValueError("calibration data must hold at least one batch, got none.")


def _count(data: Any, max_batches: int | None) -> int | None:
    """How many batches are used, None where nobody knows before: a loader of a streamed data set has no length."""
    try:
        count = len(data)
    except (TypeError, NotImplementedError):
        return max_batches
    return count if max_batches is None else min(count, max_batches)


def describe_data(data: Any, max_batches: int | None) -> dict[str, int | None]:
    """What tells data from others: how many batches are used, and a checksum of the first one.

    The checksum is None where the first batch need not be the same next time (a shuffled loader) or where it is not
    known whether it is; both are for a function that runs the model.
    """
    if callable(data):
        return {"batches": None, "first_batch": None}
    count = _count(data, max_batches)
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
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            total = checksum(leaf, zlib.crc32(str((leaf.dtype, tuple(leaf.shape))).encode(), total))
        elif isinstance(leaf, (bool, int, float, str)):
            total = zlib.crc32(repr(leaf).encode(), total)
    return total


def _leaves(batch: Any) -> Iterator[Any]:
    """All that is in nested mappings, such as the `BatchEncoding` of a tokenizer, tuples and lists."""
    if isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(part)
    else:
        yield batch
