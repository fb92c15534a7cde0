"""Reading `torch.profiler`: to which module, operation and phase each nanosecond and each allocation belongs.

What runs is marked with names (phases, modules), and the profiler's tree of events then says what lies inside what.
Backward work, and what autograd keeps for it, belong to the forward operation that has the same sequence number. What
is kept is read from the autograd graph: saved-tensor hooks would take the place of the model's own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import SavedTensor
from torch.profiler import record_function

ROUND = "wasi round"
PHASE, MODULE = "wasi phase ", "wasi module "
NODE = "autograd::engine::evaluate_function: "
KINDS = (
    "matrix products", "attention", "normalisation", "elementwise", "copies", "quantization", "optimizer", "other",
)  # fmt: skip

Times = dict[tuple[str, str, str], float]  # by phase, module and kind of operation

_ATTENTION = re.compile("scaled_dot_product|flash_attention|efficient_attention")
_NORMALISATION = re.compile("(layer|batch|group|instance|rms)_norm")
_CONVOLUTION = re.compile("conv[1-3]d|conv_transpose|convolution")
_PRODUCTS = {
    "mm",
    "addmm",
    "int_mm",
    "weight_int8pack_mm",
    "bmm",
    "baddbmm",
    "addbmm",
    "mv",
    "addmv",
    "dot",
    "matmul",
    "linear",
    "einsum",
    "addr",
}
_COPIES = {"copy", "clone", "to", "to_copy", "contiguous", "cat", "stack", "fill", "zero", "index", "index_select"}


class Site(NamedTuple):
    """Where something happened: name of the innermost module, and the operation that was called there."""

    module: str
    operation: str


NOWHERE = Site("", "")


@dataclass
class MemoryTrace:
    """All blocks of memory of a traced round, numbered; first those that were there before.

    Attributes:
        sizes: Bytes by number.
        sites: The first operation that keeps a block for backward, else the one that allocated it.
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


def kept_by(loss: Tensor) -> dict[int, int]:
    """Addresses of the memory that autograd keeps for the backward pass, with the first node that keeps each.

    Nothing is unpacked: where saved-tensor hooks made something else of a tensor, that is what is kept.
    """
    first: dict[int, int] = {}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(below for below, _ in node.next_functions)
        number = node._sequence_nr()
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                for tensor in _stored(getattr(node, name)):
                    address = tensor.untyped_storage().data_ptr()
                    first[address] = min(number, first.get(address, number))
    return first


def _stored(value: Any) -> Iterator[Tensor]:
    """Tensors in what autograd keeps: by themselves, in containers, or in what a hook packed them into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, SavedTensor):
        yield from _stored(value.data)  # type: ignore[attr-defined]
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _stored(item)
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _stored(getattr(value, item.name))


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
    if name.startswith("quantized::") or bare == "aminmax":
        return "quantization"
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


class _Sites:
    """The site of an event, given that of the event around it; events come in order of time."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of the next autograd node, when an operation began; ascending
        self._makers: list[Site] = []  # of the last operation that began at that number
        self._last = ""

    def of(self, event: Any, around: Site) -> Site:
        if event.name.startswith(MODULE):
            return Site(event.name.removeprefix(MODULE), "")
        if event.name.startswith(PHASE):
            return around
        kind, details = event.typed
        number = details.sequence_number if kind == torch._C._profiler._EventType.TorchOp else -1
        if event.name.startswith(NODE):
            if number >= 0:  # a gradient is accumulated, without number, right after the node that gives it
                maker = self.maker(number)
                self._last = around.module if maker is None else maker.module
            return Site(self._last, "")
        site = Site(around.module, around.operation or event.name.removeprefix("aten::"))
        if number >= 0 and details.scope == torch._C._profiler.RecordScope.FUNCTION:
            if not self._numbers or number > self._numbers[-1]:
                self._numbers.append(number)
                self._makers.append(site)
            else:
                self._makers[-1] = site
        return site

    def maker(self, number: int) -> Site | None:
        """Site of the operation that made an autograd node, if it was seen; one operation may make several nodes."""
        index = bisect.bisect_right(self._numbers, number) - 1
        return self._makers[index] if index >= 0 else None


def read_times(profile: torch.profiler.profile) -> list[Times]:
    """Nanoseconds by (phase, module, kind) of each round, counted once: what an event takes without those inside it.

    Python and the autograd engine, between operations, are of the kind "other"; in the phase "optimizer" everything is
    of the kind "optimizer".
    """
    sites = _Sites()

    def visit(times: Times, event: Any, name: str, around: Site, inherited: str | None) -> None:
        site = sites.of(event, around)
        kind = inherited or operation_kind(event.name)
        inner = [child for child in event.children if not _is_allocation(child)]
        own = event.duration_time_ns - sum(child.duration_time_ns for child in inner)
        key = (name, site.module, kind)
        times[key] = times.get(key, 0) + max(0, own)
        passed_on = kind if inherited or _takes_all(event.name) else None
        for child in inner:
            visit(times, child, name, site, passed_on)

    rounds: list[Times] = []
    for one in _rounds(profile):
        rounds.append({})
        for event in one.children:
            if event.name.startswith(PHASE):
                name = event.name.removeprefix(PHASE)
                visit(rounds[-1], event, name, NOWHERE, "optimizer" if name == "optimizer" else None)
    return rounds


def read_memory(
    profile: torch.profiler.profile, before: Sequence[Mapping[int, int]], kept: Sequence[Mapping[int, int]]
) -> list[MemoryTrace]:
    """What came and went in each round, from the beginning of its first phase on.

    Args:
        profile: A profile with memory.
        before: Of each round, bytes by address of what was there before. Of other such blocks the end is not counted,
            and of blocks from before the profile the profiler does not see it.
        kept: Of each round, what :func:`kept_by` found when the phase "forward" had ended.
    """
    sites = _Sites()
    return [
        _MemoryReader(sites, *given).read(one.children)
        for one, *given in zip(_rounds(profile), before, kept, strict=True)
    ]


class _MemoryReader:
    """Reads the events of one round."""

    def __init__(self, sites: _Sites, before: Mapping[int, int], kept: Mapping[int, int]) -> None:
        self._trace = MemoryTrace()
        self._sites = sites
        self._kept = kept
        self._alive: dict[int, int] = {}
        self._phase = ""
        for address, size in before.items():
            self._begin(address, size, NOWHERE)

    def read(self, events: Sequence[Any]) -> MemoryTrace:
        for event in events:
            if event.name.startswith(PHASE):
                self._phase = event.name.removeprefix(PHASE)
                self._visit(event, NOWHERE)
                self._trace.alive[self._phase] = dict(self._alive)
                if self._phase == "forward":
                    self._name_keepers()
            elif self._phase and _is_allocation(event):
                self._visit(event, NOWHERE)
        return self._trace

    def _name_keepers(self) -> None:
        for address, number in self._kept.items():
            maker = self._sites.maker(number)
            if maker is not None and address in self._alive:
                self._trace.sites[self._alive[address]] = maker

    def _begin(self, address: int, size: int, site: Site) -> int:
        number = self._alive[address] = len(self._trace.sizes)
        self._trace.sizes.append(size)
        self._trace.sites.append(site)
        return number

    def _visit(self, event: Any, around: Site) -> None:
        if _is_allocation(event):
            self._change(event.typed[1].ptr, event.typed[1].alloc_size, around)
            return
        site = self._sites.of(event, around)
        for child in event.children:
            self._visit(child, site)

    def _change(self, address: int, size: int, site: Site) -> None:
        if address in self._alive:  # where something new begins, the end of the old one went unnoticed
            number = self._alive.pop(address)
            self._trace.changes.append((self._phase, number, -self._trace.sizes[number]))
        if size > 0:
            self._trace.changes.append((self._phase, self._begin(address, size, site), size))
