"""Modules that learn something of the first batch they see, where that batch comes to them in parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .trials import trial


class Meeting:
    """What modules see of a batch that comes to them in parts: sums over its rows.

    Example:
        >>> meeting, seen = Meeting(), []
        >>> for part in torch.ones(5, 2).split(2):
        ...     meeting.add("layer", part.sum(0), seen.append)
        >>> meeting.end()
        >>> seen
        [tensor([5., 5.])]
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Tensor, Callable[[Tensor], None]]] = {}

    def add(self, who: Hashable, sums: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Add the sums over some rows; `keep` is to be given those over all of them."""
        if who in self._seen:
            sums = self._seen[who][0] + sums
        self._seen[who] = sums, keep

    def end(self) -> None:
        """Hand out the sums over all rows."""
        for sums, keep in self._seen.values():
            keep(sums)


class MeetsABatch(Protocol):
    """A module that learns something of the first batch it sees, such as coordinates for its factors.

    Of a batch that came in parts it learns in the next call: outside of its own calls its parameters may be elsewhere.

    Attributes:
        meets_next_batch: True until it has seen one.
        meeting: Where it adds what it sees, while the batch comes in parts.
    """

    meeting: Meeting | None

    @property
    def meets_next_batch(self) -> bool: ...


def waiting_parts(module: nn.Module) -> list[Any]:
    """The parts that are to meet a batch, less those to which one is coming in parts already."""
    return [part for part in fresh_parts(module) if getattr(part, "meeting", None) is None]


def fresh_parts(module: nn.Module) -> list[Any]:
    """The parts that are to meet a batch (:class:`MeetsABatch`)."""
    return [part for part in module.modules() if getattr(part, "meets_next_batch", False)]


@contextmanager
def attending(parts: list[Any], meeting: Meeting) -> Iterator[None]:
    """Context in which parts add what they see to a meeting."""
    before = [getattr(part, "meeting", None) for part in parts]
    try:
        for part in parts:
            part.meeting = meeting
        yield
    finally:
        for part, outer in zip(parts, before, strict=True):
            part.meeting = outer


@torch.no_grad()
def meet_in_parts(module: nn.Module, answers: Iterator[Any]) -> None:
    """Have all parts that wait for a batch meet the one that these answers of the module are made of."""
    meeting = Meeting()
    with attending(waiting_parts(module), meeting):
        for _ in answers:
            pass
        meeting.end()


class FirstBatches:
    """Has parts that wait for a batch meet one that comes in parts, before the first of these counts."""

    def __init__(self) -> None:
        self._passed_by: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()

    def meet(self, block: nn.Module, device: torch.device, answers: Callable[[], Iterator[Any]]) -> None:
        """Meet the batch whose parts a block answers, unless none waits but parts that a batch did not reach."""
        passed_by, waiting = self._passed_by.get(block, []), waiting_parts(block)
        if any(part not in passed_by for part in waiting):
            with trial(block, device):
                meet_in_parts(block, answers())
            waiting = waiting_parts(block)
        self._passed_by[block] = waiting
