"""What a training step would take, found without running one.

The model is rebuilt from tensors that have a shape but no memory, the adapter is put into it, and whole steps go over
it: forward, loss, backward, optimizer. Every tensor that comes and goes is written down with its size. So temporary
tensors, gradient checkpointing and unusual architectures come out as they are, and no formula has to know them.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers.pytorch_utils import Conv1D

from .config import WasiConfig
from .costs import factored_elements
from .layer import WasiLayer, _shared, wasi_layers
from .planning import WasiPlan
from .targets import default_target_names

MIB = 2**20
GIGA = 10**9
LARGEST_COMPUTED = 2**20  # elements of a mask or the like that is computed
SMALL_NORM = 0.005  # of a correction, where code asks for it: not zero, and within every tolerance
PAPER_ELEMENT_BYTES = 4
CATEGORIES = ("weights", "state", "optimizer", "gradients", "saved", "temporary")

_injection_log = logging.getLogger(f"{__package__}.model")

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]

# fused is what transformers' Trainer takes by default; it makes no temporary tensors
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}

NOTHING_TRAINS = "The model must have parameters that require a gradient, got none: there is no step."
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
            linear layers keep, at 4 bytes an element, once for every layer that reads them.
        paper_inference_bytes: Weights of the linear layers in the blocks, or of those that WASI replaced, at 4 bytes
            an element.
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
        batch: What the model is called with: a mapping of arguments, a tuple, or one tensor, of the real shapes. With
            labels the loss is the model's own, otherwise the sum of its first floating point output.
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
        return run.estimate(_optimizer_factory(optimizer))


def estimate_peak(
    model: nn.Module,
    config: PeftConfig | WasiPlan | None = None,
    *,
    batch: Any,
    optimizer: str | OptimizerFactory | None = "adamw",
) -> int:
    """`peak_bytes` of :func:`estimate_wasi` alone, in bytes and in half the time."""
    with _simulated(model, config, batch) as run:
        return run.peak(_optimizer_factory(optimizer))


@contextmanager
def _simulated(model: nn.Module, config: PeftConfig | WasiPlan | None, batch: Any) -> Iterator[_Run]:
    """The model without memory, with the adapter in it, ready to run."""
    if isinstance(config, WasiPlan):
        config = WasiConfig(plan=config)
    if config is not None:
        _check_config(model, config)
    arguments, keywords = _call_arguments(batch)
    autocast = _active_autocast(model)
    simulation = _Simulation()
    with _isolated(autocast.device):
        twin = simulation.without_memory(model)
        if config is not None:
            twin = simulation.inject(twin, copy.deepcopy(config))
        if not any(parameter.requires_grad for parameter in twin.parameters()):
            raise ValueError(NOTHING_TRAINS)
        run = _Run(simulation, twin, simulation.batch(arguments), simulation.batch(keywords), autocast)
        try:
            yield run
        except _UnknownValue as error:
            if _has_threshold(twin):
                fields = "activation_ranks (or activation_threshold=None for exact inputs)"
                raise ValueError(UNKNOWN_RANK.format(what="Activation ranks", fields=fields)) from None
            raise _depends_on_values(error) from None


def _optimizer_factory(optimizer: str | OptimizerFactory | None) -> OptimizerFactory | None:
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, str)):
        return optimizer
    if optimizer not in OPTIMIZERS:
        options = ", ".join(repr(name) for name in OPTIMIZERS)
        raise ValueError(f"optimizer must be one of {options}, a function or None, got {optimizer!r}.")
    make = OPTIMIZERS[optimizer]
    return lambda model: make([parameter for parameter in model.parameters() if parameter.requires_grad])


def _check_config(model: nn.Module, config: PeftConfig) -> None:
    if not isinstance(config, PeftConfig):
        raise TypeError(f"config must be a PEFT configuration, a WasiPlan or None, got {type(config).__name__}.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("config must be None for a model that has an adapter already; it is estimated as it is.")


def _call_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as positional arguments and keywords."""
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        keywords = dict(batch)
    elif isinstance(batch, (tuple, list)):
        arguments = tuple(batch)
    elif isinstance(batch, Tensor):
        arguments = (batch,)
    else:
        raise TypeError(f"batch must be a mapping, a tuple or a tensor, got {type(batch).__name__}.")
    tensors = _tensors((arguments, keywords))
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"batch must hold at least one tensor and no empty one, got shapes {shapes}.")
    return arguments, keywords


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _operands(values: Iterable[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Tensors among what an operation takes or gives: they are there by themselves or in lists."""
    found: list[Tensor] = []
    for value in itertools.chain(values, keywords.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


class _Autocast(NamedTuple):
    device: str
    dtype: torch.dtype
    enabled: bool


def _active_autocast(model: nn.Module) -> _Autocast:
    device = next((parameter.device.type for parameter in model.parameters() if not parameter.is_meta), "cpu")
    return _Autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


# ---------------------------------------------------------------- memory


class _Memory:
    """Numbers storages in the order in which tensors first use them, and follows each to its end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # bytes by number
        self.live: set[int] = set()
        self.events: list[tuple[int, int]] = []  # (number, bytes that come or go)
        self._numbers: dict[int, int] = {}  # id of a live storage -> its number

    def follow(self, tensor: Tensor, counted: bool = True) -> int:
        """Number of the tensor's storage. One that is not counted takes no bytes."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            self._numbers[key] = self._begin(storage.nbytes() if counted else 0)
            weakref.finalize(storage, self._end, key).atexit = False
        return self._numbers[key]

    def workspace(self, size: int) -> None:
        """A kernel's own memory, there and gone within one call."""
        number = self._begin(size)
        self.live.discard(number)
        self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        return {self.follow(tensor) for tensor in tensors}

    def _begin(self, size: int) -> int:
        number = len(self.sizes)
        self.sizes.append(size)
        self.live.add(number)
        self.events.append((number, size))
        return number

    def _end(self, key: int) -> None:
        number = self._numbers.pop(key)
        self.live.discard(number)
        self.events.append((number, -self.sizes[number]))


def _eigh_workspace(matrix: Tensor, **_: Any) -> int:
    """LAPACK syevd with vectors: 1 + 6 n + 2 n^2 numbers and 3 + 5 n integers."""
    n = matrix.shape[-1]
    return (1 + 6 * n + 2 * n * n) * matrix.element_size() + (3 + 5 * n) * 4


def _convolution_workspace(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Bytes per weight and thread, as measured with oneDNN on patch embeddings; the batch hardly matters."""
    threads = torch.get_num_threads()
    return weight.numel() * (16 * threads if weight.element_size() >= 4 else 25 * (threads + 1))


aten = torch.ops.aten
_CPU_WORKSPACES: dict[Any, Callable[..., int]] = {
    aten._linalg_eigh: _eigh_workspace,
    aten.convolution_backward: _convolution_workspace,
}
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's registry lacks the attention kernel of the CPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


# ---------------------------------------------------------------- simulation


@contextmanager
def _isolated(device: str) -> Iterator[None]:
    """Keeps random state, modes and warnings of the caller out of the simulation, and the other way round."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(setattr, _injection_log, "disabled", _injection_log.disabled)
        _injection_log.disabled = True
        yield


class _UnknownValue(Exception):
    """An operation needs the values of a tensor that has none."""


def _depends_on_values(reason: Exception) -> ValueError:
    return ValueError(
        f"Shapes or branches of the model depend on values of its tensors ({reason}), so a step cannot be followed "
        "without running it. Measure one with measure_peak_memory."
    )


class _Simulation(TorchDispatchMode):
    """Runs operations on tensors without memory; follows the memory they would take and counts their FLOPs.

    What depends on no such tensor and is small is computed: token ids, masks, counters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = _Memory()
        self.flops = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._injecting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls; the general way is slow
            return args[0].fake_device
        kwargs = kwargs or {}
        symbolic = any(isinstance(tensor, FakeTensor) for tensor in _operands(args, kwargs))
        if symbolic and func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if symbolic or self._injecting or not self._small(func, args, kwargs):
            out = self._without_memory(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = _operands(out if isinstance(out, tuple) else (out,), {})
        for tensor in outputs:
            self.memory.follow(tensor)
        operation = func._overloadpacket
        if operation in _CPU_WORKSPACES and outputs[0].device.type == "cpu":
            self.memory.workspace(_CPU_WORKSPACES[operation](*args, **kwargs))
        if operation in _FLOPS:
            self.flops += _FLOPS[operation](*args, **kwargs, out_val=out)
        return out

    def _small(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on computed tensors, or on none, gives small ones."""
        if func._schema.is_mutable:
            return True
        try:
            outputs = _tensors(self._without_memory(func, args, kwargs))
        except _UnknownValue:  # it reads values, which computed tensors have
            return True
        return all(tensor.numel() <= LARGEST_COMPUTED for tensor in outputs)

    def _without_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            out = self._fake.dispatch(func, (), args, kwargs)  # spares entering the mode and dispatching once more
            if self._injecting:  # Module.to refuses parameters to which there is a weak reference
                self._fake.fake_tensor_converter.tensor_memo.clear()
            return out
        except (DynamicOutputShapeException, DataDependentOutputException):
            raise _UnknownValue(func) from None

    def _number(self, tensor: Tensor) -> bool | int | float:
        """Answers for a healthy step: checks pass, decompositions succeed, norms of corrections are small."""
        if tensor.dtype == torch.bool:
            return True
        if self._injecting or tensor.dtype == torch.int64:
            raise _UnknownValue(aten._local_scalar_dense)
        return SMALL_NORM if tensor.is_floating_point() else 0

    # ---- building

    def like(self, tensor: Tensor, counted: bool = True) -> Tensor:
        """A tensor of the same shape, strides, type and device, without memory; one on meta becomes one on the CPU."""
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with torch._C.DisableTorchFunction(), self._fake:
            own = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        self.memory.follow(own, counted)
        return own

    def without_memory(self, model: nn.Module) -> nn.Module:
        """Copy of a model all of whose tensors have no memory; ties stay."""
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(self.like(parameter), parameter.requires_grad)
        with _CopyWithoutMemory(self):
            return copy.deepcopy(model, memo)

    def inject(self, twin: nn.Module, config: PeftConfig) -> nn.Module:
        """The model with an adapter, by PEFT's own way."""
        self._injecting = True
        try:
            with self:
                return get_peft_model(twin, config)
        except _UnknownValue as error:
            if isinstance(config, WasiConfig):
                raise ValueError(
                    UNKNOWN_RANK.format(what="Weight ranks", fields="weight_rank or rank_pattern")
                ) from None
            raise _depends_on_values(error) from None
        finally:
            self._injecting = False

    def batch(self, tree: Any) -> Any:
        """The batch without memory, but with its integers and masks, which are copied."""

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point() or value.is_meta:
                return self.like(value, counted=False)
            own = value.detach().clone()
            self.memory.follow(own, counted=False)
            return own

        return tree_map(stand_in, tree)


class _CopyWithoutMemory(TorchFunctionMode):
    """While active, `copy.deepcopy` of a tensor gives one without memory."""

    def __init__(self, simulation: _Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._simulation.like(tensor)
        return memo[id(tensor)]


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
        simulation: _Simulation,
        model: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        autocast: _Autocast,
    ) -> None:
        self.simulation, self.memory = simulation, simulation.memory
        self.model, self.arguments, self.keywords, self.autocast = model, arguments, keywords, autocast

    def forward(self) -> Any:
        with torch.autocast(self.autocast.device, self.autocast.dtype, self.autocast.enabled):
            output = self.model(*self.arguments, **self.keywords)
        torch.clear_autocast_cache()
        return output

    def loss(self) -> Tensor:
        return _loss_of(self.forward())

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
        return steps + [self.step(optimizer)] if _age_bases(self.model) else steps

    def peak(self, make_optimizer: OptimizerFactory | None) -> int:
        """The most at any moment of the first step or of one that meets what it made and moves the bases.

        A step in which they stay takes the same tensors but those of the moves.
        """
        gc.collect()  # cycles may hold what injection let go
        optimizer = None if make_optimizer is None else make_optimizer(self.model)
        self.model.train()
        first = self.step(optimizer)
        _age_bases(self.model)
        return max(first.peak, self.step(optimizer).peak)

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
        states = [] if optimizer is None else _tensors(list(optimizer.state.values()))
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
        weight_elements, input_elements = self.paper_elements()
        return Estimate(
            weights_bytes=last.sizes["weights"],
            state_bytes=last.sizes["state"],
            gradients_bytes=last.sizes["gradients"],
            optimizer_bytes=last.sizes["optimizer"],
            saved_bytes=max(step.sizes["saved"] for step in steps),
            temporary_bytes=max(step.temporary for step in steps),
            peak_bytes=highest.peak,
            at_peak=highest.at_peak,
            batch_bytes=sum(tensor.nbytes for tensor in _tensors((self.arguments, self.keywords))),
            training_flops=warm.flops + round((last.flops - warm.flops) / _basis_interval(self.model)),
            inference_flops=inference_flops,
            paper_training_bytes=PAPER_ELEMENT_BYTES * (weight_elements + input_elements),
            paper_inference_bytes=PAPER_ELEMENT_BYTES * weight_elements,
        )

    def paper_elements(self) -> tuple[int, int]:
        """Elements of linear weights, and of the inputs that linear layers keep, counted for each layer."""
        layers = _linear_layers(self.model)
        inputs = 0

        def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal inputs
            inputs += _input_elements(layer, next(iter((*args, *kwargs.values()))))

        for layer in layers:
            layer.register_forward_hook(count, with_kwargs=True)
        with self.simulation:
            self.loss()
        return sum(_weight_elements(layer) for layer in layers), inputs


def _loss_of(output: Any) -> Tensor:
    """The loss that a model gives, or the sum of its first floating point output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        loss = next(tensor for tensor in _tensors(output) if tensor.is_floating_point()).sum()
    return loss


def _age_bases(model: nn.Module) -> bool:
    """Makes all bases move in the next step; whether there are any."""
    compressing = [layer for _, layer in wasi_layers(model) if any(layer.wasi_rule.values())]
    for layer in compressing:
        layer.wasi_basis_age.update(layer.wasi_basis_interval)
    return bool(compressing)


def _has_threshold(model: nn.Module) -> bool:
    """Whether the rank of an input is left to a threshold in any layer."""
    rules = [rule for _, layer in wasi_layers(model) for rule in layer.wasi_rule.values() if rule is not None]
    return any(set(rule.modes) - set(dict(rule.ranks)) for rule in rules)


def _basis_interval(model: nn.Module) -> int:
    intervals = [interval for _, layer in wasi_layers(model) for interval in layer.wasi_basis_interval.values()]
    return max(intervals, default=1)


# ---------------------------------------------------------------- the paper's accounting


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that WASI replaced; without any, all Linear layers of the blocks and those an adapter put there."""
    replaced: list[nn.Module] = [layer for _, layer in wasi_layers(model) if layer.active_name is not None]
    if replaced:
        return replaced
    kinds = (nn.Linear, Conv1D)
    try:
        layers = [model.get_submodule(name) for name in default_target_names(model, WasiConfig())]
    except ValueError:  # no numbered blocks
        return [module for module in model.modules() if isinstance(module, kinds)]
    adapted = [module.base_layer for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return layers + [layer for layer in adapted if isinstance(layer, kinds)]


def _weight_elements(layer: nn.Module) -> int:
    if isinstance(layer, WasiLayer):
        assert layer.active_name is not None
        return factored_elements(layer.out_features, layer.in_features, layer.rank(layer.active_name))
    assert isinstance(layer.weight, Tensor)
    return layer.weight.numel()


def _input_elements(layer: nn.Module, x: Tensor) -> int:
    """Elements that a layer keeps for the gradients of its factors, shared with other layers or not."""
    if not isinstance(layer, WasiLayer):
        assert isinstance(layer.weight, Tensor)
        return x.numel() if layer.weight.requires_grad else 0
    name = layer.active_name
    assert name is not None
    trained = name in layer.wasi_A
    outer, inner = (layer.wasi_B[name], layer.wasi_A[name]) if trained else (layer.wasi_L[name], layer.wasi_R[name])
    image = x.shape[:-1].numel() * outer.shape[1]  # of the input, from which the gradient of `outer` can come
    if not inner.requires_grad:
        return image if outer.requires_grad else 0
    kept = x.numel()
    for (rule, _), compressed in _shared(x).compressed.items():
        if rule == layer.wasi_rule[name] and compressed is not None:
            kept = sum(part.numel() for part in compressed if part is not None)
    return kept + (image if trained and outer.requires_grad else 0)
