"""What a training step would take, found without running one.

The model is rebuilt from tensors that have a shape but no memory, the adapter is put into it, and whole steps go over
it: forward, loss, backward, optimizer. Every tensor that comes and goes is written down with its size. So temporary
tensors, gradient checkpointing and unusual architectures come out as they are, and no formula has to know them.
"""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forms.compressed import Compressed
from ..forms.residual import Int8Residual
from ..models.calls import Arguments, call_arguments, call_explained, hooked, layer_input, tensors_in, training_loss
from ..models.experts import packed_parameters, routed_rows
from ..models.structure import Structure, linear_layers
from ..ranks.plan import WasiPlan
from ..tuner.config import WasiConfig
from ..tuner.inputs import InputCompression
from ..tuner.layer import WasiLayer, wasi_layers
from ..updates.base import InitialFactors
from .simulation import Simulation, UnknownValue, isolated

MIB = 2**20
GIGA = 10**9
PAPER_ELEMENT_BYTES = 4
CATEGORIES = ("weights", "state", "optimizer", "gradients", "saved", "temporary")

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]

# fused is what transformers' Trainer takes by default; it makes no temporary tensors
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}

NOTHING_TRAINS = "The model must have parameters that require a gradient, got none: there is no step."
READS_ARRAYS = (
    "{model} makes NumPy arrays of what it computes, as losses that match predictions with labels do, so a step "
    "cannot be followed without running it. Leave labels out of the batch, or measure a step with measure_peak_memory."
)
UNKNOWN_RANK = (
    "{what} are chosen by a threshold, so what a step takes is known only once data have been seen. Fix them with "
    "{fields}, or give the config a plan."
)


@dataclass(frozen=True)
class Estimate:
    """What one training step takes; all bytes are those that tensors ask for. `str()` gives a table.

    Attributes:
        weights_bytes: All parameters and buffers.
        state_bytes: What layers keep from step to step besides: activation bases, parked dense weights.
        gradients_bytes: Gradients of all parameters that train.
        optimizer_bytes: Optimizer state.
        saved_bytes: What is kept between forward and backward.
        temporary_bytes: The most that anything else takes at any moment.
        peak_bytes: The most at any moment of the first or any later step, everything above included; less than their
            sum, since they do not all exist at the same moment. Without the batch, which is there before the step.
        at_peak: `peak_bytes` by category, at that moment.
        batch_bytes: The batch.
        training_flops: FLOPs of a step in the long run, the optimizer's matrix products included.
        inference_flops: FLOPs of the forward pass in evaluation mode.
        paper_training_bytes: The paper's accounting (arXiv 2510.09160): `paper_inference_bytes` and the inputs that
            linear layers keep, at 4 bytes an element, once for every layer that reads them. What is stored in fewer
            bits beside an addition, which the paper does not have, counts as stored.
        paper_inference_bytes: Weights of the linear layers in the blocks, or of those that WASI replaced, in the same
            way.
    """

    weights_bytes: int
    state_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    temporary_bytes: int
    peak_bytes: int
    at_peak: dict[str, int]
    batch_bytes: int
    training_flops: int
    inference_flops: int
    paper_training_bytes: int
    paper_inference_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by field name."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("weights and buffers", self.weights_bytes, "weights"),
            ("kept by layers between steps", self.state_bytes, "state"),
            ("gradients", self.gradients_bytes, "gradients"),
            ("optimizer state", self.optimizer_bytes, "optimizer"),
            ("saved for backward", self.saved_bytes, "saved"),
            ("temporary", self.temporary_bytes, "temporary"),
        ]
        lines = [f"{'training step':<30}{'most, MiB':>12}{'at peak, MiB':>14}"]
        lines += [f"{name:<30}{most / MIB:>12,.2f}{self.at_peak[key] / MIB:>14,.2f}" for name, most, key in rows]
        lines += [f"{'peak':<30}{'':>12}{self.peak_bytes / MIB:>14,.2f}"]
        lines += [f"{'batch (not in the peak)':<30}{self.batch_bytes / MIB:>12,.2f}"]
        lines += [f"{'training, GFLOP':<30}{self.training_flops / GIGA:>12,.2f}"]
        lines += [f"{'inference, GFLOP':<30}{self.inference_flops / GIGA:>12,.2f}"]
        lines += [f"{'paper: training, MiB':<30}{self.paper_training_bytes / MIB:>12,.2f}"]
        lines += [f"{'paper: inference, MiB':<30}{self.paper_inference_bytes / MIB:>12,.2f}"]
        return "\n".join(lines)


def estimate_wasi(
    model: nn.Module,
    config: PeftConfig | WasiPlan | None = None,
    *,
    batch: Any,
    optimizer: str | OptimizerFactory | None = "adamw",
) -> Estimate:
    """What a training step of this model would take, without running one and without changing the model.

    A copy of the model without memory goes through an inference pass and complete training steps: the first one, which
    makes the optimizer state and the activation bases, one that meets them, and one in which the bases move. Only
    integers and masks (token ids, attention masks) are computed, because model code branches on them. The weights may
    be on the meta device. In a `torch.autocast` context the forward pass is the mixed-precision one.

    Args:
        model: Any model; an adapter that it has already is taken as it is. Its parameters that do not require a
            gradient stay frozen.
        config: What is put into the model before: a `WasiConfig` with fixed ranks, a `WasiPlan`, or the configuration
            of any PEFT method that injects layers. None takes the model as it is: for a plain model that is full
            fine-tuning.
        batch: What the model is called with, of the real shapes: a mapping of arguments, a tensor, or a tuple that
            begins with one of them, see :mod:`models.calls`. With labels in a mapping the loss is the model's own,
            otherwise the sum of its features.
        optimizer: 'adamw' or 'adam' (both fused, as transformers' Trainer makes it by default; the unfused ones need
            temporary tensors), 'sgd', 'sgd_momentum', a function from the model to an optimizer, or None for no step.

    Returns:
        The estimate. What kernels take inside them is counted on the CPU where it matters: exactly for
        eigen-decompositions, by a rule of thumb (from patch embeddings) for the gradient of a convolution's weight.

    Raises:
        ValueError: If a rank is left to a threshold, the batch is empty, nothing trains, the optimizer is unknown, the
            model has an adapter and a config is given, or the model's shapes depend on values of its tensors.

    Example:
        >>> layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> estimate = estimate_wasi(layers, batch=torch.zeros(8, 64), optimizer="sgd_momentum")
        >>> estimate.weights_bytes == estimate.gradients_bytes == estimate.optimizer_bytes
        True
        >>> estimate.inference_flops == 2 * 8 * 64 * 256 * 2
        True
    """
    with _simulated(model, config, batch) as run:
        return run.estimate(optimizer_factory(optimizer))


def estimate_peak(
    model: nn.Module,
    config: PeftConfig | WasiPlan | None = None,
    *,
    batch: Any,
    optimizer: str | OptimizerFactory | None = "adamw",
) -> int:
    """`peak_bytes` of :func:`estimate_wasi` alone, in bytes and in half the time."""
    with _simulated(model, config, batch) as run:
        if config is not None:
            gc.collect()  # cycles may hold what injection let go
        return run.peak(optimizer_factory(optimizer))


def input_sizes(model: nn.Module, names: Collection[str], batch: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of what modules read when the model runs on a batch, found without running it.

    Args:
        model: Any model. It is not changed.
        names: Of the modules, and of packed experts. Those that the batch does not reach are left out of what is
            returned.
        batch: As in :func:`estimate_wasi`.

    Returns:
        Shapes by name of the module; None where they depend on values, so that only running the model would tell.

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> input_sizes(layers, ["1"], torch.zeros(3, 4))
        {'1': (3, 6)}
    """
    arguments = call_arguments(batch)
    autocast = active_autocast(model)
    with isolated(autocast.device):
        run = _prepared(model, None, arguments, autocast)
        with watched_sizes(run.model, names) as sizes:
            try:
                run.inference_flops()
            except (UnknownValue, ArrayError):
                return None
    return sizes


@contextmanager
def watched_sizes(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of what modules and packed experts read in calls inside, by name; of the latter (rows, in).

    Args:
        model: The model that runs.
        names: Of modules, and of packed parameters.
    """
    modules = dict(model.named_modules())
    sizes: dict[str, tuple[int, ...]] = {}
    packed: dict[str, list[str]] = {}  # by the module that owns them
    for name in names:
        if name not in modules:
            packed.setdefault(name.rpartition(".")[0], []).append(name)

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in packed:
            sizes[name] = tuple(layer_input(args, kwargs).shape)
            return
        for stack in packed[name]:
            transposed = packed_parameters(modules[name])[stack.rpartition(".")[2]]
            sizes[stack] = routed_rows(args, kwargs), model.get_parameter(stack).shape[1 if transposed else 2]

    with hooked(model, [*(name for name in names if name in modules), *packed], before=look):
        yield sizes


class ArrayError(ValueError):
    """A model makes an array of a tensor that has no values."""


class PlannedPeaks:
    """Peaks of one model under several plans: it is copied once for plans with the same forms, which change ranks.

    Calling it with a configuration that holds a plan gives what :func:`estimate_peak` gives.
    """

    def __init__(self, model: nn.Module, *, batch: Any, optimizer: str | OptimizerFactory | None = "adamw") -> None:
        self._model, self._arguments = model, call_arguments(batch)
        self._make_optimizer = optimizer_factory(optimizer)
        self._autocast = active_autocast(model)
        self._run: _Run | None = None

    def __call__(self, config: WasiConfig) -> int:
        """Peak of a training step, in bytes."""
        with isolated(self._autocast.device):
            if self._run is None or not self._run.has_forms_of(config):
                check_config(self._model, config)
                self._run = None  # before there is another one
                self._run = _prepared(self._model, config, self._arguments, self._autocast)
                gc.collect()  # cycles may hold what injection let go
            else:
                self._run.change_plan(config)
            with _explained(self._run.model):
                return self._run.peak(self._make_optimizer)


@contextmanager
def _simulated(model: nn.Module, config: PeftConfig | WasiPlan | None, batch: Any) -> Iterator[_Run]:
    """The model without memory, with the adapter in it, ready to run."""
    if isinstance(config, WasiPlan):
        config = WasiConfig(plan=config)
    if config is not None:
        check_config(model, config)
    arguments = call_arguments(batch)
    autocast = active_autocast(model)
    with isolated(autocast.device):
        run = _prepared(model, config, arguments, autocast)
        with _explained(run.model):
            yield run


def _prepared(model: nn.Module, config: PeftConfig | None, arguments: Arguments, autocast: Autocast) -> _Run:
    simulation = Simulation()
    twin = simulation.without_memory(model)
    if config is not None:
        twin = _injected(simulation, twin, copy.deepcopy(config))
    decide_products(twin, autocast)
    return _Run(simulation, twin, simulation.batch(arguments), autocast)


def decide_products(twin: nn.Module, autocast: Autocast) -> None:
    """How layers multiply by int8 codes is measured on real tensors, as the model's own would be."""
    for module in twin.modules():
        if isinstance(module, Int8Residual):
            module.products.decide(module.codes.device, autocast.dtype if autocast.enabled else module.dtype)


@contextmanager
def _explained(twin: nn.Module) -> Iterator[None]:
    """Turns what a step cannot do into an error that says what to do."""
    if not any(parameter.requires_grad for parameter in twin.parameters()):
        raise ValueError(NOTHING_TRAINS)
    try:
        yield
    except UnknownValue as error:
        if _has_threshold(twin):
            fields = "activation_ranks (or activation_threshold=None for exact inputs)"
            raise ValueError(UNKNOWN_RANK.format(what="Activation ranks", fields=fields)) from None
        raise _depends_on_values(error) from None


def base_of(model: nn.Module) -> nn.Module:
    """The model that adapters were put into."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _depends_on_values(reason: Exception) -> ValueError:
    return ValueError(
        f"Shapes or branches of the model depend on values of its tensors ({reason}), so a step cannot be followed "
        "without running it. Measure one with measure_peak_memory."
    )


def _injected(simulation: Simulation, twin: nn.Module, config: PeftConfig) -> nn.Module:
    """The model without memory with an adapter, by PEFT's own way."""
    if isinstance(config, WasiConfig) and config.uses_residuals:
        config.init_weights = False  # how additions start depends on values, what they take does not
    try:
        with simulation.injecting():
            return get_peft_model(twin, config)
    except UnknownValue as error:
        if isinstance(config, WasiConfig):
            raise ValueError(UNKNOWN_RANK.format(what="Weight ranks", fields="weight_rank or rank_pattern")) from None
        raise _depends_on_values(error) from None


def optimizer_factory(optimizer: str | OptimizerFactory | None) -> OptimizerFactory | None:
    """What makes an optimizer, by its name too; raises a ValueError for another name."""
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, str)):
        return optimizer
    if optimizer not in OPTIMIZERS:
        options = ", ".join(repr(name) for name in OPTIMIZERS)
        raise ValueError(f"optimizer must be one of {options}, a function or None, got {optimizer!r}.")
    make = OPTIMIZERS[optimizer]
    return lambda model: make([parameter for parameter in model.parameters() if parameter.requires_grad])


def check_config(model: nn.Module, config: PeftConfig) -> None:
    """Raises a TypeError for what is no configuration, a ValueError for a model that has an adapter."""
    if not isinstance(config, PeftConfig):
        raise TypeError(f"config must be a PEFT configuration, a WasiPlan or None, got {type(config).__name__}.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("config must be None for a model that has an adapter already; it is estimated as it is.")


class Autocast(NamedTuple):
    """Settings of `torch.autocast`."""

    device: str
    dtype: torch.dtype
    enabled: bool


def active_autocast(model: nn.Module) -> Autocast:
    """Those in force where the model is."""
    device = next((parameter.device.type for parameter in model.parameters() if not parameter.is_meta), "cpu")
    return Autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


# ---------------------------------------------------------------- steps


@dataclass
class _Step:
    """One simulated step: bytes of each category in all and at the peak, and the most that was temporary."""

    sizes: dict[str, int]
    at_peak: dict[str, int]
    temporary: int
    flops: int

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class _Run:
    """A model without memory, and what it is called with."""

    def __init__(
        self,
        simulation: Simulation,
        model: nn.Module,
        arguments: Arguments,
        autocast: Autocast,
    ) -> None:
        self.simulation, self.memory = simulation, simulation.memory
        self.model, self.arguments, self.autocast = model, arguments, autocast
        self._last_optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    def forward(self) -> Any:
        with torch.autocast(self.autocast.device, self.autocast.dtype, self.autocast.enabled):
            try:
                with call_explained(base_of(self.model), self.arguments):
                    output = self.model(*self.arguments.positional, **self.arguments.named)
            except RuntimeError as error:
                if ".numpy()" not in str(error):
                    raise
                raise ArrayError(READS_ARRAYS.format(model=type(base_of(self.model)).__name__)) from None
        torch.clear_autocast_cache()
        return output

    def loss(self) -> Tensor:
        return training_loss(self.forward())

    def inference_flops(self) -> int:
        self.model.eval()
        before = self.simulation.flops
        with self.simulation, torch.no_grad():
            self.forward()
        return self.simulation.flops - before

    def training_steps(self, optimizer: torch.optim.Optimizer | None) -> list[_Step]:
        """The first step, one that meets what it made, and with compressed inputs one in which the bases move."""
        self.model.train()
        steps = [self.step(optimizer), self.step(optimizer)]
        return steps + [self.step(optimizer)] if age_bases(self.model) else steps

    def peak(self, make_optimizer: OptimizerFactory | None) -> int:
        """The most at any moment of the first step or of one that meets what it made and moves the bases.

        A step in which they stay takes the same tensors but those of the moves.
        """
        optimizer = None if make_optimizer is None else make_optimizer(self.model)
        self._last_optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.model.train()
        first = self.step(optimizer)
        age_bases(self.model)
        return max(first.peak, self.step(optimizer).peak)

    def has_forms_of(self, config: WasiConfig) -> bool:
        """Whether the layers have the forms of another plan."""
        forms = {name: layer.update.residual for name, layer in self._layers().items()}
        return forms == {name: config.residual_of(name) for name in config.planned_names()}

    def _layers(self) -> dict[str, WasiLayer]:
        return dict(wasi_layers(self.model.get_base_model()))  # type: ignore[operator]

    def change_plan(self, config: WasiConfig) -> None:
        """Gives the layers the ranks of another plan with the same forms; what earlier steps left behind goes."""
        with self.simulation.injecting():
            for name, layer in self._layers().items():
                planned = config.planned_layer(name)
                adapter = layer.active_name
                assert planned is not None and adapter is not None
                form = layer.form
                L = form.L.detach().new_empty(*form.L.shape[:-1], planned.weight_rank)
                R = form.R.detach().new_empty(*form.R.shape[:-2], planned.weight_rank, layer.in_features)
                bias = None if form.bias is None else form.bias.detach()
                initial = InitialFactors(L, R, bias, residual=layer.residual, met_data=True)
                layer.update_layer(adapter, config, name, planned.weight_rank, initial)
        if self._last_optimizer is not None and self._last_optimizer() is not None:
            gc.collect()  # cycles hold the old factors

    def step(self, optimizer: torch.optim.Optimizer | None) -> _Step:
        """Forward, loss, backward, optimizer step, gradients released."""
        memory = self.memory
        before, first_event, flops = set(memory.live), len(memory.events), self.simulation.flops
        parts = {"weights": memory.numbers(itertools.chain(self.model.parameters(), self.model.buffers()))}
        with self.simulation:
            loss = self.loss()
            saved = memory.live - before - {memory.follow(loss)}
            loss.backward()
            gradients = memory.numbers(p.grad for p in self.model.parameters() if p.grad is not None)
            if optimizer is not None:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            del loss
        states = [] if optimizer is None else tensors_in(list(optimizer.state.values()))
        parts["optimizer"] = memory.numbers(states)
        parts["state"] = memory.live - parts["weights"] - parts["optimizer"]
        parts["gradients"] = gradients
        parts["saved"] = saved - parts["state"]
        sizes = {name: sum(memory.sizes[number] for number in numbers) for name, numbers in parts.items()}
        category = dict.fromkeys(before, "state")  # what is neither weights nor optimizer, and may end in this step
        category |= {number: name for name, numbers in parts.items() for number in numbers}

        held: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
        for number in before:
            held[category[number]] += memory.sizes[number]
        peak, at_peak, temporary = 0, dict(held), 0
        for number, size in memory.events[first_event:]:
            held[category.get(number, "temporary")] += size
            temporary = max(temporary, held["temporary"])
            if (total := sum(held.values())) > peak:
                peak, at_peak = total, dict(held)
        return _Step(sizes, at_peak, temporary, self.simulation.flops - flops)

    def estimate(self, make_optimizer: OptimizerFactory | None) -> Estimate:
        inference_flops = self.inference_flops()
        gc.collect()  # cycles may hold what injection let go
        optimizer = None if make_optimizer is None else make_optimizer(self.model)
        first, warm, *others = self.training_steps(optimizer)
        last = others[-1] if others else warm
        steps = (first, warm, last)
        highest = max(steps, key=lambda step: step.peak)
        weight_bytes, input_bytes = self.paper_bytes()
        return Estimate(
            weights_bytes=last.sizes["weights"],
            state_bytes=last.sizes["state"],
            gradients_bytes=last.sizes["gradients"],
            optimizer_bytes=last.sizes["optimizer"],
            saved_bytes=max(step.sizes["saved"] for step in steps),
            temporary_bytes=max(step.temporary for step in steps),
            peak_bytes=highest.peak,
            at_peak=highest.at_peak,
            batch_bytes=sum(tensor.nbytes for tensor in tensors_in(self.arguments)),
            training_flops=warm.flops + round((last.flops - warm.flops) / _basis_interval(self.model)),
            inference_flops=inference_flops,
            paper_training_bytes=weight_bytes + input_bytes,
            paper_inference_bytes=weight_bytes,
        )

    def paper_bytes(self) -> tuple[int, int]:
        """Bytes of linear weights, and of the inputs that linear layers keep, counted for each layer."""
        layers = _linear_layers(self.model)
        inputs = 0

        def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal inputs
            inputs += _input_bytes(layer, layer_input(args, kwargs))

        for layer in layers:
            layer.register_forward_hook(count, with_kwargs=True)
        with self.simulation:
            self.loss()
        return sum(map(_weight_bytes, layers)), inputs


def age_bases(model: nn.Module) -> bool:
    """Makes all bases move in the next step; whether there are any."""
    compressions = _compressions(model)
    for state in compressions:
        state.age = state.interval
    return bool(compressions)


def _compressions(model: nn.Module) -> list[InputCompression]:
    """The states of all compressed inputs."""
    states = [state for _, layer in wasi_layers(model) for state in layer.wasi_input.values()]
    return [state for state in states if state.rule is not None]


def _has_threshold(model: nn.Module) -> bool:
    """Whether the rank of an input is left to a threshold in any layer."""
    rules = [state.rule for state in _compressions(model) if state.rule is not None]
    return any(set(rule.modes) - set(dict(rule.ranks)) for rule in rules)


def _basis_interval(model: nn.Module) -> int:
    return max((state.interval for state in _compressions(model)), default=1)


# ---------------------------------------------------------------- the paper's accounting


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that WASI replaced; without any, all Linear layers of the blocks and those an adapter put there."""
    replaced: list[nn.Module] = [layer for _, layer in wasi_layers(model) if layer.active_name is not None]
    if replaced:
        return replaced
    inside = set(Structure(model).layers)
    layers: list[nn.Module] = []
    for name, layer in linear_layers(model):
        if isinstance(layer, BaseTunerLayer):
            layers += [part for part in layer.modules() if isinstance(part, (nn.Linear, Conv1D))]
        elif name in inside or not inside:  # all of a model without blocks
            layers.append(layer)
    return layers


def _weight_bytes(layer: nn.Module) -> int:
    if isinstance(layer, WasiLayer):
        sizes = layer.out_features, layer.in_features, layer.form.weight_rank
        return layer.experts * layer.update.stored_bytes(*sizes, PAPER_ELEMENT_BYTES)
    if isinstance(layer, Compressed):
        return sum(tensor.nbytes for tensor in layer.stored().values())
    assert isinstance(layer.weight, Tensor)
    return PAPER_ELEMENT_BYTES * layer.weight.numel()


def _input_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a layer keeps for the gradients of what trains of it, shared with other layers or not."""
    if not isinstance(layer, WasiLayer):
        trains = any(part.requires_grad for name, part in layer.named_parameters() if not name.endswith("bias"))
        return PAPER_ELEMENT_BYTES * x.numel() if trains else 0
    form, update = layer.form, layer.update
    image = PAPER_ELEMENT_BYTES * x.shape[:-1].numel() * update.image_width(form)
    if update.reads_input is None or not form.part(update.reads_input).requires_grad:
        return image
    entry = layer.inputs.of(x)
    if entry.rounded and layer.residual is not None:
        return image + sum(part.nbytes for part in next(iter(entry.rounded.values())) if part is not None)
    elements = x.numel()
    announced = ((rule, form) for (rule, *_), (_, form) in entry.announced.items())
    for rule, compressed in (*announced, *((rule, form) for (rule, _), form in entry.compressed.items())):
        if rule == layer.wasi_input[layer.active_name or ""].rule and compressed is not None:
            elements = sum(part.numel() for part in compressed if part is not None)
    return PAPER_ELEMENT_BYTES * elements + image
