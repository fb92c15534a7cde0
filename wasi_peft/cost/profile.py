"""Where the bytes and the milliseconds of a training step go, measured by running steps on a copy of the model.

Time is taken without any instrument; a trace only says how it divides among modules and kinds of operations. Memory
comes from a step of its own, in which every allocation is followed to its end.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..models.calls import Arguments, call_arguments, call_explained, tensors_in, training_loss
from ..ranks.plan import WasiPlan
from ..tuner.config import WasiConfig
from ..tuner.layer import wasi_layers
from .estimate import (
    CATEGORIES,
    MIB,
    NOTHING_TRAINS,
    Autocast,
    OptimizerFactory,
    active_autocast,
    age_bases,
    base_of,
    check_config,
    decide_products,
    optimizer_factory,
)
from .peak import profiler
from .simulation import isolated
from .trace import KINDS, MemoryTrace, Site, Times, kept_by, marked_modules, one_round, phase, read_memory, read_times

ROUNDS = 5
TIMELINE_POINTS = 200  # of each phase, at most
TRAINING = ("forward", "backward", "optimizer")
MILLI = 1000

Blocks = dict[str, dict[int, int]]  # bytes by address, by category
Watch = Callable[[str], AbstractContextManager[Any]]


class Moment(NamedTuple):
    """What was held at one moment of a step: the phase, and bytes by category."""

    phase: str
    held: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of inference, and bytes kept for backward, of a module or of several."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    inference_seconds: float = 0.0
    saved_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_seconds + other.forward_seconds,
            self.backward_seconds + other.backward_seconds,
            self.inference_seconds + other.inference_seconds,
            self.saved_bytes + other.saved_bytes,
        )


@dataclass(frozen=True)
class ModuleCost(Cost):
    """Cost of one module without that of the modules inside it.

    Attributes:
        name: As in the model without adapter; empty for the model itself, with everything that is in no module.
        kind: Class, with the method's name before it if it is a layer of an adapter: such a layer is one module.
    """

    name: str = ""
    kind: str = ""

    @property
    def block(self) -> str:
        """Name of the block: up to the first number, or the first two parts.

        Example:
            >>> ModuleCost(name="vit.layers.3.mlp.fc1").block, ModuleCost(name="vit.embeddings.dropout").block
            ('vit.layers.3', 'vit.embeddings')
        """
        parts = self.name.split(".")
        numbered = next((index for index, part in enumerate(parts) if part.isdigit()), 1)
        return ".".join(parts[: numbered + 1])


@dataclass(frozen=True)
class StepProfile:
    """Where bytes and seconds of a training step go. `str()` gives tables.

    Seconds by kind add up to those of a step, those of the modules to the phases; bytes by category to the peak, those
    by operation or module to `saved_bytes`.

    Attributes:
        forward_seconds: Forward pass and loss; like the next two of the round with the median total.
        backward_seconds: Backward pass.
        optimizer_seconds: Optimizer step and release of the gradients.
        inference_seconds: Forward pass in evaluation mode, without gradients; median.
        seconds_by_kind: Seconds of a step by kind of operation (:data:`trace.KINDS`); Python and the autograd engine
            are "other".
        inference_seconds_by_kind: The same of inference.
        peak_bytes: The most at any moment of the first step or of one in which activation bases move; weights and
            optimizer state included, the batch not. What follows is of the same step.
        at_peak: `peak_bytes` by category, at that moment: weights, state (what layers keep between steps), optimizer,
            gradients, saved (for backward), temporary.
        saved_bytes: What is kept between forward and backward.
        saved_by_operation: `saved_bytes` by the operation that keeps them, once for each storage.
        timeline: What was held in the course of the step, the most of each stretch of equally many allocations.
        modules: Cost of every module by itself.
    """

    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    inference_seconds: float
    seconds_by_kind: dict[str, float]
    inference_seconds_by_kind: dict[str, float]
    peak_bytes: int
    at_peak: dict[str, int]
    saved_bytes: int
    saved_by_operation: dict[str, int]
    timeline: tuple[Moment, ...]
    modules: tuple[ModuleCost, ...]

    @property
    def step_seconds(self) -> float:
        """Forward, backward and optimizer."""
        return self.forward_seconds + self.backward_seconds + self.optimizer_seconds

    def by_class(self) -> dict[str, Cost]:
        """Cost of all modules of a class, the most expensive first."""
        return self._grouped(lambda module: module.kind)

    def by_block(self) -> dict[str, Cost]:
        """Cost of every block of the model, in its order; empty name for what is in no module."""
        groups: dict[str, Cost] = {}
        for module in self.modules:
            groups[module.block] = groups.get(module.block, Cost()) + module
        return groups

    def by_module(self) -> dict[str, Cost]:
        """Cost of every module without what is inside it, the most expensive first."""
        return self._grouped(lambda module: module.name)

    def _grouped(self, key: Callable[[ModuleCost], str]) -> dict[str, Cost]:
        groups: dict[str, Cost] = {}
        for module in self.modules:
            groups[key(module)] = groups.get(key(module), Cost()) + module
        by_time = sorted(groups.items(), key=lambda item: item[1].forward_seconds + item[1].backward_seconds)
        return dict(reversed(by_time))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by field name."""
        return {
            **asdict(self),
            "step_seconds": self.step_seconds,
            "timeline": [{"phase": moment.phase, **moment.held} for moment in self.timeline],
            "modules": [asdict(module) for module in self.modules],
        }

    def __str__(self) -> str:
        line = "{:<34}{:>12}{:>12}{:>12}{:>12}".format
        lines = [line("", "step, ms", "of it", "infer., ms", "")]
        for name in TRAINING:
            seconds = getattr(self, f"{name}_seconds")
            lines.append(line(name, _ms(seconds), f"{seconds / self.step_seconds:.1%}", "", ""))
        lines.append(line("all", _ms(self.step_seconds), "", _ms(self.inference_seconds), ""))
        for kind in KINDS:
            seconds, inference = self.seconds_by_kind[kind], self.inference_seconds_by_kind[kind]
            lines.append(line(kind, _ms(seconds), f"{seconds / self.step_seconds:.1%}", _ms(inference), ""))
        lines.append("")
        lines.append(line("modules", "forward, ms", "backw., ms", "infer., ms", "saved, MiB"))
        for name, cost in self.by_class().items():
            times = cost.forward_seconds, cost.backward_seconds, cost.inference_seconds
            lines.append(line(name, *map(_ms, times), _mib(cost.saved_bytes)))
        lines += ["", line("kept for backward by", "MiB", "of it", "", "")]
        for name, size in self.saved_by_operation.items():
            lines.append(line(name, _mib(size), f"{size / self.saved_bytes:.1%}", "", ""))
        lines.append(line("all", _mib(self.saved_bytes), "", "", ""))
        lines += ["", line("held at the peak", "MiB", "of it", "", "")]
        for name, size in self.at_peak.items():
            lines.append(line(name, _mib(size), f"{size / self.peak_bytes:.1%}", "", ""))
        lines.append(line("all", _mib(self.peak_bytes), "", "", ""))
        return "\n".join(text.rstrip() for text in lines)


def _ms(seconds: float) -> str:
    return f"{seconds * MILLI:,.2f}"


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"


def profile_wasi(
    model: nn.Module,
    config: PeftConfig | WasiPlan | None = None,
    *,
    batch: Any,
    optimizer: str | OptimizerFactory | None = "adamw",
    rounds: int = ROUNDS,
) -> StepProfile:
    """Run training steps and inference on a copy of the model, and say where bytes and seconds go.

    The first step and one in which the activation bases move run with every allocation followed; then come `rounds`
    timed steps and inference passes without any instrument, and as many traced ones, which say how the time divides.
    The model itself, its gradients, the random state and the batch stay as they are, whatever happens; the copy takes
    the model's memory once more. In a `torch.autocast` context the forward pass is the mixed-precision one.

    The median time leaves out steps in which bases move, one in `activation_interval`. Where operations are tiny, the
    trace makes the time between them look longer than it is.

    Args:
        model: Any model on the CPU; an adapter that it has already is taken as it is.
        config: What is put into the copy before: a `WasiConfig`, a `WasiPlan`, or the configuration of any PEFT method
            that injects layers. None takes the model as it is: for a plain model that is full fine-tuning.
        batch: What the model is called with, as for :func:`estimate_wasi`.
        optimizer: As for :func:`estimate_wasi`, of which the named ones run at a learning rate of 0; None for no step.
        rounds: How many steps are timed, and traced; at least 1.

    Raises:
        ValueError: If the model is not on the CPU, the batch is empty, nothing trains, the optimizer is unknown,
            `rounds` is below 1, or the model has an adapter and a config is given.

    Example:
        >>> layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> profile = profile_wasi(layers, batch=torch.ones(8, 64), rounds=1)
        >>> profile.saved_by_operation  # the first layer keeps the batch, which is not counted
        {'gelu': 8192, 'linear': 8192}
    """
    if isinstance(config, WasiPlan):
        config = WasiConfig(plan=config)
    if config is not None:
        check_config(model, config)
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {rounds!r}.")
    arguments = call_arguments(batch)
    make_optimizer = optimizer_factory(optimizer)
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers(), *tensors_in(arguments))}
    if devices != {"cpu"}:
        raise ValueError(f"profile_wasi needs model and batch on the CPU, got {', '.join(sorted(devices))}.")
    autocast = active_autocast(model)
    with isolated(autocast.device):
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        if config is not None:
            twin = get_peft_model(twin, copy.deepcopy(config))
        if not any(parameter.requires_grad for parameter in twin.parameters()):
            raise ValueError(NOTHING_TRAINS)
        decide_products(twin, autocast)  # once a process, on operands of its own: no part of a step
        made = None if make_optimizer is None else make_optimizer(twin)
        if made is not None and isinstance(optimizer, str):
            for group in made.param_groups:
                group["lr"] = 0.0  # the same work, and values cannot run away
        try:
            return _Runner(twin, arguments, autocast, made).profile(rounds)
        finally:
            del twin, made
            gc.collect()


# ---------------------------------------------------------------- running


class _Runner:
    """A model that may be trained at will, and what it is called with."""

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        autocast: Autocast,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.model, self.autocast, self.optimizer = model, autocast, optimizer
        self._arguments = arguments

    def step(self, watch: Watch, look: Callable[[Tensor], None] = lambda loss: None) -> None:
        """One step; `look` is called with the loss between forward and backward."""
        self.model.train()
        batch = self.fresh_batch()
        with watch("forward"):
            loss = training_loss(self.forward(batch))
        look(loss)
        with watch("backward"):
            loss.backward()
        with watch("optimizer"):
            if self.optimizer is not None:
                self.optimizer.step()
            self.model.zero_grad(set_to_none=True)

    def infer(self, watch: Watch) -> None:
        self.model.eval()
        batch = self.fresh_batch()
        with torch.no_grad(), watch("inference"):
            self.forward(batch)

    def fresh_batch(self) -> Arguments:
        """New tensors: layers share what they computed of an input for as long as it is the same tensor."""
        copied: Arguments = tree_map(
            lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, self._arguments
        )
        return copied

    def forward(self, batch: Arguments) -> Any:
        with torch.autocast(self.autocast.device, self.autocast.dtype, self.autocast.enabled):
            with call_explained(base_of(self.model), batch):
                return self.model(*batch.positional, **batch.named)

    def profile(self, rounds: int) -> StepProfile:
        modules = _modules(self.model)
        memory = max(self.trace_memory(modules), key=lambda step: step.peak)
        self.infer(_unwatched)
        steps = [_timed(self.step) for _ in range(rounds)]
        passes = [_timed(self.infer) for _ in range(rounds)]
        seconds = _median(steps) | _median(passes)
        times = _shared_out(self.trace_times(modules, rounds), seconds)
        return StepProfile(
            **{f"{name}_seconds": seconds[name] for name in (*TRAINING, "inference")},
            seconds_by_kind=_by_kind(times, TRAINING),
            inference_seconds_by_kind=_by_kind(times, ("inference",)),
            peak_bytes=memory.peak,
            at_peak=max(memory.moments, key=_total).held,
            saved_bytes=sum(memory.saved.values()),
            saved_by_operation=memory.saved_by_operation(),
            timeline=tuple(_thinned(memory.moments)),
            modules=_module_costs(modules, times, memory.saved),
        )

    def trace_times(self, modules: dict[str, nn.Module], rounds: int) -> list[Times]:
        """Nanoseconds of each of several steps and inference passes."""
        with marked_modules(modules), profiler() as profile:
            for _ in range(rounds):
                with one_round():
                    self.step(phase)
                    self.infer(phase)
        return read_times(profile)

    def trace_memory(self, modules: dict[str, nn.Module]) -> list[_StepMemory]:
        """The first step, and one that meets what it made and in which the bases move."""
        gradients: set[int] = set()
        kept: list[dict[int, int]] = []
        losses: list[int] = []

        @contextmanager
        def watch(name: str) -> Iterator[None]:
            with phase(name):
                yield
            if name == "backward":
                gradients.update(_blocks(p.grad for p in self.model.parameters() if p.grad is not None))

        def look(loss: Tensor) -> None:
            kept.append(kept_by(loss))
            losses.append(loss.untyped_storage().data_ptr())

        gc.collect()
        snapshots = []
        with marked_modules(modules), profiler(profile_memory=True) as profile:
            for age in (_rest_bases, age_bases):
                age(self.model)
                before = self.kept()
                with one_round():
                    self.step(watch, look)
                snapshots.append((before, self.kept(), frozenset(gradients), losses[-1]))
                gradients.clear()
                age_bases(self.model)
                # warms up, and makes new bases: the end of those from before the profile would not be seen
                self.step(_unwatched)
        traces = read_memory(profile, [_all_blocks(before) for before, *_ in snapshots], kept)
        return [_step_memory(trace, *parts) for trace, parts in zip(traces, snapshots, strict=True)]

    def kept(self) -> Blocks:
        """What exists between steps: bytes by address, by category."""
        weights = _blocks(itertools.chain(self.model.parameters(), self.model.buffers()))
        optimizer = {} if self.optimizer is None else _blocks(tensors_in(list(self.optimizer.state.values())))
        state = {address: size for address, size in _blocks(_attributes(self.model)).items() if address not in weights}
        return {"weights": weights, "optimizer": optimizer, "state": state}


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """What modules hold besides parameters and buffers: caches, parked weights, activation bases, waiting vectors."""
    yield from tensors_in([vars(module) for module in model.modules()])
    for _, layer in wasi_layers(model):
        yield from tensors_in([state.bases for state in layer.wasi_input.values()])
        yield from layer.vectors.tensors()


def _rest_bases(model: nn.Module) -> None:
    """Makes all bases stay in the next step."""
    for _, layer in wasi_layers(model):
        for state in layer.wasi_input.values():
            state.age = 0


def _all_blocks(parts: Blocks) -> dict[int, int]:
    return {address: size for part in parts.values() for address, size in part.items()}


def _blocks(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of the distinct storages of tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _unwatched(_: str) -> AbstractContextManager[Any]:
    return nullcontext()


def _timed(run: Callable[[Watch], None]) -> dict[str, float]:
    """Seconds by phase."""
    seconds = {}

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    run(watch)
    return seconds


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The round with the median total, the lower one of two."""
    return sorted(rounds, key=lambda seconds: sum(seconds.values()))[(len(rounds) - 1) // 2]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their name in the model without adapter; a layer of an adapter counts as one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules: dict[str, nn.Module] = {}
    whole: list[str] = []
    for name, module in base.named_modules():
        if not any(name.startswith(f"{prefix}.") for prefix in whole):
            modules[name] = module
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                whole.append(name)
    return modules


def _kind(module: nn.Module) -> str:
    """Class of a module; "lora.Linear" and the like for layers of adapters."""
    name = type(module).__name__
    if not isinstance(module, BaseTunerLayer):
        return name
    package, _, method, *_ = type(module).__module__.split(".")  # peft.tuners.lora.layer, or a package of its own
    return f"{method if package == 'peft' else package.removesuffix('_peft')}.{name}"


# ---------------------------------------------------------------- accounting


def _shared_out(rounds: Sequence[Times], seconds: Mapping[str, float]) -> Times:
    """Seconds of each phase in proportion to the medians of traced times."""
    keys = {key: None for times in rounds for key in times}
    medians = {key: statistics.median(times.get(key, 0.0) for times in rounds) for key in keys}
    totals: dict[str, float] = {}
    for (name, _, _), part in medians.items():
        totals[name] = totals.get(name, 0.0) + part
    return {key: part / totals[key[0]] * seconds[key[0]] for key, part in medians.items()}


def _by_kind(times: Times, phases: Sequence[str]) -> dict[str, float]:
    return {
        kind: sum(seconds for (name, _, own), seconds in times.items() if own == kind and name in phases)
        for kind in KINDS
    }


def _module_costs(modules: Mapping[str, nn.Module], times: Times, saved: Mapping[Site, int]) -> tuple[ModuleCost, ...]:
    seconds: dict[tuple[str, str], float] = {}
    for (name, path, _), part in times.items():
        seconds[name, path] = seconds.get((name, path), 0.0) + part
    kept: Counter[str] = Counter()
    for site, size in saved.items():
        kept[site.module] += size
    return tuple(
        ModuleCost(
            forward_seconds=seconds.get(("forward", path), 0.0),
            backward_seconds=seconds.get(("backward", path), 0.0),
            inference_seconds=seconds.get(("inference", path), 0.0),
            saved_bytes=kept[path],
            name=path,
            kind=_kind(module),
        )
        for path, module in modules.items()
    )


@dataclass(frozen=True)
class _StepMemory:
    """What was held after every allocation and release of a step, and bytes kept for backward by site."""

    moments: list[Moment]
    saved: dict[Site, int]

    @property
    def peak(self) -> int:
        return max(map(_total, self.moments))

    def saved_by_operation(self) -> dict[str, int]:
        sizes: Counter[str] = Counter()
        for site, size in self.saved.items():
            sizes[site.operation or "other"] += size
        return dict(sizes.most_common())


def _step_memory(
    trace: MemoryTrace, before: Blocks, after: Blocks, gradients: frozenset[int], loss: int
) -> _StepMemory:
    category = _categories(trace, before, after, gradients, loss)
    saved: Counter[Site] = Counter()
    for number, name in category.items():
        if name == "saved":
            saved[trace.sites[number]] += trace.sizes[number]
    held = dict.fromkeys(CATEGORIES, 0) | {name: sum(part.values()) for name, part in before.items()}
    moments = [Moment(TRAINING[0], dict(held))]
    for phase_name, number, size in trace.changes:
        held[category.get(number, "temporary")] += size
        moments.append(Moment(phase_name, dict(held)))
    return _StepMemory(moments, dict(saved))


def _categories(
    trace: MemoryTrace, before: Blocks, after: Blocks, gradients: frozenset[int], loss: int
) -> dict[int, str]:
    """Category, for its whole life, of each block that is not temporary.

    Kept for backward is what was made in this step, was there when forward ended, is not the loss and does not outlive
    the step. Some of it may go only after backward, with the graph: leaves, random states.
    """
    names = [name for name, part in before.items() for _ in part]
    category = dict(enumerate(names))
    ends = trace.alive
    made = {"gradients": ("backward", gradients)} | {name: ("optimizer", part) for name, part in after.items()}
    for name, (end, addresses) in made.items():
        for address in addresses:
            if address in ends[end]:
                category.setdefault(ends[end][address], name)
    for address, number in ends["forward"].items():
        if address != loss:
            category.setdefault(number, "saved")
    return category


def _total(moment: Moment) -> int:
    return sum(moment.held.values())


def _thinned(moments: list[Moment]) -> Iterator[Moment]:
    """The highest moment of each stretch; no stretch is in two phases."""
    for _, group in itertools.groupby(moments, key=lambda moment: moment.phase):
        part = list(group)
        length = math.ceil(len(part) / TIMELINE_POINTS)
        for start in range(0, len(part), length):
            yield max(part[start : start + length], key=_total)
