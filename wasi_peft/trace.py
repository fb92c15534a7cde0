"""Reading `torch.profiler`: to which module, operation and phase each nanosecond and each allocation belongs.

What runs is marked with names (phases, modules, tensors that autograd keeps), and the profiler's tree of events then
says what lies inside what. Backward work belongs to the module whose forward operation has the same sequence number.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

ROUND = "wasi round"
PHASE, MODULE, SAVED = "wasi phase ", "wasi module ", "wasi saved "
NODE = "autograd::engine::evaluate_function: "
KINDS = ("matrix products", "attention", "normalisation", "elementwise", "copies", "optimizer", "other")

Times = dict[tuple[str, str, str], float]  # by phase, module and kind of operation

_ATTENTION = re.compile("scaled_dot_product|flash_attention|efficient_attention")
_NORMALISATION = re.compile("(layer|batch|group|instance|rms)_norm")
_CONVOLUTION = re.compile("conv[1-3]d|conv_transpose|convolution")
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "matmul", "linear", "einsum", "addr"}
_COPIES = {"copy", "clone", "to", "to_copy", "contiguous", "cat", "stack", "fill", "zero", "index", "index_select"}


class Site(NamedTuple):
    """Where something happened: name of the innermost module, and the operation that was called there."""

    module: str
    operation: str


@dataclass
class MemoryTrace:
    """All blocks of memory of a traced round, numbered; first those that were there before.

    Attributes:
        sizes: Bytes by number.
        sites: Where a block was first kept for backward, else where it was allocated.
        changes: (phase, number, bytes that come or go) in order.
        alive: Number by address at the end of each phase.
    """

    sizes: list[int] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    changes: list[tuple[str, int, int]] = field(default_factory=list)
    alive: dict[str, dict[int, int]] = field(default_factory=dict)


def one_round() -> Any:
    """A context for phases that belong together; other phases are not read."""
    return record_function(ROUND)


def phase(name: str) -> Any:
    """A context that marks what runs inside as a phase."""
    return record_function(PHASE + name)


@contextmanager
def marked_modules(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Marks every call of these modules."""
    handles = []
    for name, module in modules.items():
        calls: list[record_function] = []

        def enter(*_: Any, name: str = name, calls: list[record_function] = calls) -> None:
            calls.append(record_function(MODULE + name))
            calls[-1].__enter__()

        def leave(*_: Any, calls: list[record_function] = calls) -> None:
            calls.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def marked_saving() -> Any:
    """A context that marks what autograd keeps, with its address."""

    def pack(tensor: Tensor) -> Tensor:
        with record_function(f"{SAVED}{tensor.untyped_storage().data_ptr()}"):
            return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@functools.cache
def operation_kind(name: str) -> str:
    """Kind of an operation, by the profiler's name of it.

    Example:
        >>> [operation_kind(name) for name in ("aten::addmm", "aten::gelu_backward", "aten::copy_", "aten::view")]
        ['matrix products', 'elementwise', 'copies', 'other']
    """
    stem = name.removeprefix("aten::")
    bare = stem.strip("_")
    if _ATTENTION.search(bare):
        return "attention"
    if _NORMALISATION.search(bare):
        return "normalisation"
    if bare in _PRODUCTS or _CONVOLUTION.search(bare):
        return "matrix products"
    if bare in _COPIES:
        return "copies"
    packet = getattr(torch.ops.aten, stem, None) if name.startswith("aten::") else None
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    if "softmax" in bare or any(torch.Tag.pointwise in overload.tags for overload in overloads):
        return "elementwise"
    return "other"


def _takes_all(name: str) -> bool:
    """Whether what an operation calls is of its kind too."""
    return operation_kind(name) in ("attention", "normalisation") or bool(_CONVOLUTION.search(name))


def _rounds(profile: torch.profiler.profile) -> list[Any]:
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    roots = profile.profiler.kineto_results.experimental_event_tree()
    return [root for root in roots if root.name == ROUND]


def _is_allocation(event: Any) -> bool:
    return bool(event.typed[0] == torch._C._profiler._EventType.Allocation)


class _Modules:
    """The module that an event belongs to, given that of the event around it; events come in order of time."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of the next autograd node, when an operation began; ascending
        self._callers: list[str] = []  # module of the last operation that began at that number
        self._last = ""

    def of(self, event: Any, around: str) -> str:
        if event.name.startswith(MODULE):
            return str(event.name.removeprefix(MODULE))
        kind, details = event.typed
        number = details.sequence_number if kind == torch._C._profiler._EventType.TorchOp else -1
        if event.name.startswith(NODE):
            if number >= 0:  # a gradient is accumulated, without number, right after the node that gives it
                index = bisect.bisect_right(self._numbers, number) - 1  # an operation may make several nodes
                self._last = self._callers[index] if index >= 0 else around
            return self._last
        if number >= 0 and details.scope == torch._C._profiler.RecordScope.FUNCTION:
            if not self._numbers or number > self._numbers[-1]:
                self._numbers.append(number)
                self._callers.append(around)
            else:
                self._callers[-1] = around
        return around


def read_times(profile: torch.profiler.profile) -> list[Times]:
    """Nanoseconds by (phase, module, kind) of each round, counted once: what an event takes without those inside it.

    Python and the autograd engine, between operations, are of the kind "other"; in the phase "optimizer" everything is
    of the kind "optimizer".
    """
    modules = _Modules()

    def visit(times: Times, event: Any, name: str, module: str, inherited: str | None) -> None:
        module = modules.of(event, module)
        kind = inherited or operation_kind(event.name)
        inner = [child for child in event.children if not _is_allocation(child)]
        own = event.duration_time_ns - sum(child.duration_time_ns for child in inner)
        times[name, module, kind] = times.get((name, module, kind), 0) + max(0, own)
        passed_on = kind if inherited or _takes_all(event.name) else None
        for child in inner:
            visit(times, child, name, module, passed_on)

    rounds: list[Times] = []
    for one in _rounds(profile):
        rounds.append({})
        for event in one.children:
            if event.name.startswith(PHASE):
                name = event.name.removeprefix(PHASE)
                visit(rounds[-1], event, name, "", "optimizer" if name == "optimizer" else None)
    return rounds


def read_memory(profile: torch.profiler.profile, before: Sequence[Mapping[int, int]]) -> list[MemoryTrace]:
    """What came and went in each round, from the beginning of its first phase on.

    Args:
        profile: A profile with memory.
        before: Of each round, bytes by address of what was there before. Of other such blocks the end is not counted,
            and of blocks from before the profile the profiler does not see it.
    """
    modules = _Modules()
    return [
        _MemoryReader(modules, held).read(one.children) for one, held in zip(_rounds(profile), before, strict=True)
    ]


class _MemoryReader:
    """Reads the events of one round."""

    def __init__(self, modules: _Modules, before: Mapping[int, int]) -> None:
        self._trace = MemoryTrace()
        self._modules = modules
        self._alive: dict[int, int] = {}
        self._kept: set[int] = set()
        self._phase = ""
        for address, size in before.items():
            self._begin(address, size, Site("", ""))

    def read(self, events: Sequence[Any]) -> MemoryTrace:
        for event in events:
            if event.name.startswith(PHASE):
                self._phase = event.name.removeprefix(PHASE)
                self._visit(event, Site("", ""))
                self._trace.alive[self._phase] = dict(self._alive)
            elif self._phase and _is_allocation(event):
                self._visit(event, Site("", ""))
        return self._trace

    def _begin(self, address: int, size: int, site: Site) -> int:
        number = self._alive[address] = len(self._trace.sizes)
        self._trace.sizes.append(size)
        self._trace.sites.append(site)
        return number

    def _visit(self, event: Any, site: Site) -> None:
        if _is_allocation(event):
            self._change(event.typed[1].ptr, event.typed[1].alloc_size, site)
        elif event.name.startswith(SAVED):
            number = self._alive.get(int(event.name.removeprefix(SAVED)))
            if number is not None and number not in self._kept:
                self._kept.add(number)
                self._trace.sites[number] = site
        else:
            site = self._inside(event, site)
            for child in event.children:
                self._visit(child, site)

    def _change(self, address: int, size: int, site: Site) -> None:
        if address in self._alive:  # where something new begins, the end of the old one went unnoticed
            number = self._alive.pop(address)
            self._trace.changes.append((self._phase, number, -self._trace.sizes[number]))
        if size > 0:
            self._trace.changes.append((self._phase, self._begin(address, size, site), size))

    def _inside(self, event: Any, site: Site) -> Site:
        module = self._modules.of(event, site.module)
        if event.name.startswith((PHASE, MODULE, NODE)):
            return Site(module, "")
        return Site(module, site.operation or event.name.removeprefix("aten::"))
