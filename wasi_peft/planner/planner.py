"""One plan for a whole model: ranks of weights and of compressed inputs under the budget that a user can afford.

Energies come from calibration, costs are counted, estimated or timed here, :mod:`choosing` chooses. Where costs do not
simply add up over layers (the peak of a step, products of two ranks) a plan is chosen under a bound on those that do,
and the bound moves until the true cost meets the budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..cost.estimate import GIGA, MIB, OptimizerFactory, PlannedPeaks, estimate_peak, input_sizes
from ..cost.timing import LayerTimer
from ..factors.calibration import Calibration, dense_targets
from ..forms.dense import dense_weight
from ..linalg.tucker import canonical
from ..models.calls import evaluating, hooked, layer_input, model_output
from ..ranks.allocate import allocate_ranks
from ..ranks.choosing import activation_options, choose_plan, plan_error
from ..ranks.knapsack import InfeasibleError
from ..ranks.plan import MEMORY_MODES, WasiPlan, build_plan
from ..ranks.spectrum import InputGroup, LayerSpectrum, input_groups
from ..tuner.config import WasiConfig
from ..updates.costs import (
    break_even_rank,
    dense_forward_flops,
    input_elements,
)

logger = logging.getLogger(__name__)

BUDGETS = (
    "weight_share",
    "peak_bytes",
    "training_flops",
    "inference_flops",
    "step_seconds",
    "inference_seconds",
    "error",
)
SHARES = ("weight_share", "step_seconds", "inference_seconds", "error")  # never above 1
GRADIENT_ERROR = 0.08  # of a weight gradient's energy, where activation ranks are not part of the budget
MODE_TOLERANCE = 0.1  # how much more the ranks of a better memory mode may lose
PEAK_MARGIN = 0.02  # of a peak in bytes, left free for what the estimate may miss
OPTIMIZER_STATES = {"sgd": 0, "sgd_momentum": 1}  # elements per parameter; 2 for the others
AIM = 0.96  # of a budget that is met by trying
TRIES = 6

# what a plan does not decide, so that the step it is checked in is the one that will run
_KEPT_FIELDS = (
    "modules_to_save",
    "bias",
    "train_vectors",
    "activation_interval",
    "update",
    "update_rank",
    "memory_mode",
    "saved_tensors",
    "base_weight",
)
_DECIDED_FIELDS = ("weight_rank", "rank_pattern", "weight_share", "plan", "activation_ranks")


def plan_wasi(
    model: nn.Module,
    calibration: Calibration,
    *,
    weight_share: float | None = None,
    peak_bytes: int | None = None,
    training_flops: float | None = None,
    inference_flops: float | None = None,
    step_seconds: float | None = None,
    inference_seconds: float | None = None,
    error: float | None = None,
    batch: Any = None,
    optimizer: str | OptimizerFactory | None = "adamw",
    config: WasiConfig | None = None,
    memory_modes: Sequence[str] | None = None,
    timer: LayerTimer | None = None,
) -> WasiPlan:
    """Choose the ranks of all layers under exactly one budget; hand the plan to `WasiConfig(plan=...)`.

    No rank goes past break-even; layers where no rank saves anything are not in the plan and stay dense. Ranks, with
    that of the update, are multiples of 16 wherever the budget and the layer's size allow (:func:`costs.rank_step`).
    Where the budget does not depend on the compressed inputs (`weight_share`, `inference_flops`, `inference_seconds`,
    `error`), each of them takes the fewest features that keep all but 8 % of the energy of the weight gradients. A
    calibration without gradients says nothing about them: inputs stay exact then.

    Args:
        model: The dense model. It is not changed.
        calibration: What :func:`calibrate_wasi` measured on it.
        weight_share: Elements of all factors over those of the dense weights, in (0, 1].
        peak_bytes: All memory of a training step at its peak, in bytes: parameters, gradients, optimizer state,
            activations and temporary tensors, as :func:`estimate_wasi` counts them. 2 % are left free.
        training_flops: FLOPs of the planned layers in forward and backward: up to 1 a share of the dense ones, above
            1 the absolute number for one step on `batch`.
        inference_flops: The same for the forward pass.
        step_seconds: Time of the planned layers in forward and backward, as a share of that of the dense ones, in
            (0, 1]. Layers of every shape are timed on this machine; what else a step does is not part of it.
        inference_seconds: The same for the forward pass.
        error: Tolerated share of the weight energy to lose, in (0, 1], for the least parameters. Energy sits in few
            directions: 0.01 is a third of the weights of a small pretrained ViT, 0.004 a half.
        batch: What the model will be called with, of the real shapes, as :func:`estimate_wasi` takes it. Needed for
            `peak_bytes`, times and absolute FLOPs. Tokens are compressed only where it has as many as the
            calibration.
        optimizer: For `peak_bytes`; as :func:`estimate_wasi` takes it.
        config: What else will be injected: targets, `modules_to_save`, `update` and so on. With
            `activation_threshold=None` inputs stay exact. By default all layers of the calibration are planned.
        memory_modes: For `peak_bytes`, the values of `memory_mode` to choose from, best first, such as `("exact",
            "fast", "small")`: the first under which the ranks that fit lose at most a tenth more than under any other.
            The plan says which; `WasiConfig(plan=...)` takes it from there. By default the configuration's alone.
        timer: Measures the layers for `step_seconds` and `inference_seconds`; by default on the model's device.

    Raises:
        ValueError: If there is not exactly one budget, it is out of range or below the least feasible one (which the
            message names), the batch is missing, `memory_modes` is empty, unknown or given with another budget, the
            calibration is of another model, the model has an adapter, or the configuration decides ranks itself.

    Example:
        >>> from wasi_peft import WasiConfig, calibrate_wasi
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)))
        >>> calibration = calibrate_wasi(model, [torch.randn(64, 32)], progress_bar=False)
        >>> plan = plan_wasi(model, calibration, weight_share=0.5, config=WasiConfig(update="factor"))
        >>> 0.4 < plan.kept_share <= 0.5
        True
    """
    values = weight_share, peak_bytes, training_flops, inference_flops, step_seconds, inference_seconds, error
    name, value = _one_budget(dict(zip(BUDGETS, values, strict=True)), batch)
    targets = _planned_targets(model, calibration, config)
    config = WasiConfig() if config is None else config
    modes = _modes_to_try(memory_modes, name, config)
    shapes = dict.fromkeys(targets, (1, calibration.rows))
    if batch is not None:
        shapes = input_shapes(model, targets, batch)
    exact = config.compression_rule("") is None
    spectra = _comparable(calibration.spectra(targets, config.layer_update), shapes, exact)
    problem = _Problem(spectra, shapes, {name: value})

    try:
        if name == "weight_share":
            plan = problem.with_tolerable_inputs(allocate_ranks(spectra, value))
        elif name == "error":
            plan = problem.weights_alone(LayerSpectrum.elements, error_bound=value)
        elif name == "peak_bytes":
            plan = _plan_peak(problem, model, config, modes, value, batch, optimizer, calibration.bytes_per_element)
        else:
            work: _Work = _Flops(problem, config.activation_interval)
            if name.endswith("_seconds"):
                weight = dense_weight(next(iter(targets.values())))
                timer = timer or LayerTimer(weight.dtype, weight.device, config.layer_update)
                work = _Seconds(problem, timer)
            plan = _plan_work(problem, work, value, training=name in ("training_flops", "step_seconds"))
    except InfeasibleError as infeasible:
        least = _rounded_up(infeasible.least)
        raise ValueError(
            f"{name} must be at least {_readable(name, least)} for this model, got {_readable(name, value)}."
        ) from infeasible
    return replace(plan, update=config.update, update_rank=config.update_rank)


# -------------------------------------------------------------------- what is asked, and of what


def _one_budget(budgets: Mapping[str, float | None], batch: Any) -> tuple[str, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one budget of {list(BUDGETS)}, got {list(given) or 'none'}.")
    name, value = next(iter(given.items()))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0 or (name in SHARES and value > 1):
        bounds = "in (0, 1]" if name in SHARES else "above 0"
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}.")
    if batch is None and (name == "peak_bytes" or name.endswith("_seconds") or (name not in SHARES and value > 1)):
        raise ValueError(f"{name}={value!r} depends on the batch; give one of the real shapes as `batch`, got None.")
    return name, value


def _modes_to_try(memory_modes: Sequence[str] | None, budget: str, config: WasiConfig) -> tuple[str, ...]:
    if memory_modes is None:
        return (config.memory_mode or "exact",)
    if budget != "peak_bytes":
        raise ValueError(f"memory_modes is for peak_bytes alone, got it with {budget}.")
    if isinstance(memory_modes, str) or not memory_modes or not set(memory_modes) <= set(MEMORY_MODES):
        raise ValueError(f"memory_modes must be a list of any of {list(MEMORY_MODES)}, got {memory_modes!r}.")
    return tuple(memory_modes)


def _planned_targets(model: nn.Module, calibration: Calibration, config: WasiConfig | None) -> dict[str, nn.Module]:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("plan_wasi needs the dense model, got one with an adapter.")
    for field in _DECIDED_FIELDS:
        if config is not None and getattr(config, field):
            raise ValueError(f"a plan decides all ranks; leave {field} out, got {getattr(config, field)!r}.")
    if config is None:
        modules = dict(model.named_modules())
        missing = [name for name in calibration.layers if name not in modules]
        if missing:
            raise ValueError(f"{missing[0]}: the calibration belongs to another model, which has this layer.")
        config = WasiConfig(target_modules=list(calibration.layers))
    targets = dense_targets(model, config)
    calibration.require(targets)
    saving = {name: module for name, module in targets.items() if break_even_rank(*dense_weight(module).shape) > 0}
    if not saving:
        raise ValueError(
            f"no rank of any target saves anything, got {len(targets)} targets of at most 2 rows or columns."
        )
    return saving


def input_shapes(model: nn.Module, targets: Mapping[str, nn.Module], batch: Any) -> dict[str, tuple[int, int]]:
    """Samples and tokens that each layer meets when the model runs on a batch, by layer name.

    Raises:
        ValueError: If the batch is empty or does not reach a layer.
    """
    sizes = input_sizes(model, targets, batch)
    if sizes is None:
        sizes = _run_for_sizes(model, targets, batch)
    empty = next((name for name, size in sizes.items() if math.prod(size) == 0), None)
    if empty is not None:
        raise ValueError(f"{empty}: the batch must have at least one row, got an input of {sizes[empty]}.")
    missed = [name for name in targets if name not in sizes]
    if missed:
        raise ValueError(f"{missed[0]}: the batch must reach every planned layer; it misses {len(missed)}.")
    shapes = {name: canonical(torch.empty(sizes[name], device="meta")).shape for name in targets}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def _run_for_sizes(model: nn.Module, targets: Mapping[str, nn.Module], batch: Any) -> dict[str, tuple[int, ...]]:
    """What :func:`estimate.input_sizes` gives, by running the model."""
    sizes: dict[str, tuple[int, ...]] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes[name] = tuple(layer_input(args, kwargs).shape)

    with evaluating(model, gradients=False), hooked(model, targets, before=look):
        model_output(model, batch, with_labels=True)
    return sizes


def _comparable(
    spectra: Sequence[LayerSpectrum], shapes: Mapping[str, tuple[int, int]], exact: bool
) -> list[LayerSpectrum]:
    """Gradient energies as shares of each layer's own; tokens only where the batch has as many.

    Adaptive optimizers give every layer updates of one size, however small its gradient is.
    """
    scaled = []
    for spectrum in spectra:
        total = sum(spectrum.gradient_energies.get("feature", ()))
        shares = {
            mode: tuple(energy / total if total > 0 else 0.0 for energy in energies)
            for mode, energies in spectrum.gradient_energies.items()
            if not exact and (mode != "token" or len(energies) == shapes[spectrum.name][1])
        }
        scaled.append(replace(spectrum, gradient_energies=shares))
    return scaled


def _rounded_up(value: float) -> float | int:
    """To four digits, bytes and FLOPs to whole numbers: a budget that is feasible."""
    if value > 1:
        return math.ceil(value)
    scale = 10 ** (4 - math.ceil(math.log10(value))) if value > 0 else 1
    return math.ceil(value * scale) / scale


def _readable(name: str, value: float) -> str:
    """A budget as a person reads it, the exact number included."""
    if name == "peak_bytes":
        return f"{math.ceil(10 * value / MIB) / 10:,.1f} MiB ({value:,} bytes)"
    if value > 1:
        return f"{value / GIGA:,.3g} GFLOP ({value:,} FLOPs)"
    if name.endswith(("_flops", "_seconds")):
        return f"{value} of the dense layers'"
    return f"{value}"


# -------------------------------------------------------------------- solving


WeightCost = Callable[[LayerSpectrum, int], float]
ActivationCost = Callable[[InputGroup, "dict[str, int] | None"], float]


@dataclass(frozen=True)
class _Problem:
    """Spectra of all layers, the shapes of their inputs (samples, tokens) and what was asked."""

    spectra: list[LayerSpectrum]
    shapes: Mapping[str, tuple[int, int]]
    asked: dict[str, Any]

    def rows(self, spectrum: LayerSpectrum) -> int:
        return math.prod(self.shapes[spectrum.name])

    def kept_elements(self, group: InputGroup, ranks: dict[str, int] | None) -> float:
        """Elements kept of an input; infinite where the compressed form would not be smaller and so is not used."""
        shape = self.shapes[group.spectra[0].name]
        elements = input_elements(*shape, group.in_features, ranks)
        return elements if ranks is None or elements < input_elements(*shape, group.in_features, None) else math.inf

    def tolerable_inputs(self) -> dict[str, dict[str, int] | None]:
        """For each input the fewest features with which its layers' gradients keep enough of their energy."""
        chosen = {}
        for group in input_groups(self.spectra):
            bound = GRADIENT_ERROR * sum(group.energies("feature"))
            options = [x for x in activation_options(group, self.kept_elements) if "token" not in (x.choice or {})]
            chosen[group.name] = min((x for x in options if x.error <= bound), key=lambda x: x.cost).choice
        return chosen

    def with_tolerable_inputs(self, weight_ranks: Mapping[str, int]) -> WasiPlan:
        return build_plan(self.spectra, weight_ranks, self.tolerable_inputs(), self.asked)

    def weights_alone(
        self, cost: WeightCost, budget: float | None = None, error_bound: float | None = None
    ) -> WasiPlan:
        plan = choose_plan(self.spectra, weight_cost=cost, budget=budget, error_bound=error_bound)
        return self.with_tolerable_inputs({layer.name: layer.weight_rank for layer in plan.layers})


def _fit(
    problem: _Problem,
    weight_cost: WeightCost,
    activation_cost: ActivationCost,
    true_cost: Callable[[WasiPlan], float],
    budget: float,
    fixed: float | None = None,
) -> tuple[WasiPlan, float]:
    """A plan whose true cost is at most the budget, close to it unless more rank helps nothing, and that cost.

    Plans are chosen under a bound on the costs that add up, which moves a few times at most. `fixed` is a guess of
    what the true cost has on top of them; without one the bound starts in the middle.

    Raises:
        InfeasibleError: If the cheapest plan costs more than the budget; it carries that cost.
    """
    costs = [[weight_cost(x, rank) for rank in (1, x.rank_choices[-1])] for x in problem.spectra]
    for group in input_groups(problem.spectra):
        costs.append([option.cost for option in activation_options(group, activation_cost)])
    least, most = math.fsum(map(min, costs)), math.fsum(map(max, costs))

    def plan_at(bound: float) -> tuple[WasiPlan, float]:
        plan = choose_plan(
            problem.spectra,
            weight_cost=weight_cost,
            activation_cost=activation_cost,
            budget=bound,
            asked=problem.asked,
        )
        return plan, true_cost(plan)

    goal = (1 + AIM) / 2 * budget
    best: tuple[WasiPlan, float] | None = None
    tried: list[tuple[float, float]] = []  # bounds and true costs
    bound = (least + most) / 2 if fixed is None else goal - fixed
    for _ in range(TRIES):
        bound = min(most, max(least, bound))
        plan, spent = plan_at(bound)
        if spent <= budget:
            if best is None or spent > best[1]:
                best = plan, spent
            if bound == most or spent >= AIM * budget:
                return best
        elif bound == least:
            raise InfeasibleError("cost", budget, spent)
        tried.append((bound, spent))
        bound = _next_bound(tried, goal)
    if best is not None:
        return best
    plan, spent = plan_at(least)
    if spent > budget:
        raise InfeasibleError("cost", budget, spent)
    return plan, spent


def _next_bound(tried: Sequence[tuple[float, float]], goal: float) -> float:
    """Where the true cost should meet the goal: along the secant through the points next to it.

    With one point, or where two do not tell, each unit of the bound counts as one of the true cost.
    """
    below = max((point for point in tried if point[1] <= goal), default=None)
    above = min((point for point in tried if point[1] > goal), default=None)
    first, last = (below, above) if below and above else (tried[max(0, len(tried) - 2)], tried[-1])
    rate = 1.0
    if last[1] != first[1]:
        rate = min(4.0, max(0.25, (last[0] - first[0]) / (last[1] - first[1])))
    return last[0] + rate * (goal - last[1])


# -------------------------------------------------------------------- peak memory


def _plan_peak(
    problem: _Problem,
    model: nn.Module,
    config: WasiConfig,
    modes: Sequence[str],
    budget: float,
    batch: Any,
    optimizer: str | OptimizerFactory | None,
    bytes_per_element: int,
) -> WasiPlan:
    """The plan of the first mode that loses little more than the best one."""
    spectra = problem.spectra
    unlimited = build_plan(spectra, {spectrum.name: spectrum.rank_choices[-1] for spectrum in spectra}, {}, {})
    good_enough = (1 + MODE_TOLERANCE) * plan_error(spectra, unlimited)
    plans: list[tuple[float, WasiPlan]] = []
    least = math.inf
    for mode in modes:
        chosen = replace(config, memory_mode=mode)  # type: ignore[arg-type]
        try:
            plan = _plan_peak_in_mode(problem, model, chosen, budget, batch, optimizer, bytes_per_element)
        except InfeasibleError as error:
            least = min(least, error.least)
            continue
        plans.append((plan_error(spectra, plan), plan))
        if plans[-1][0] <= good_enough:
            break  # no mode after it can lose so much less that it would be chosen
    if not plans:
        raise InfeasibleError("peak_bytes", budget, least)
    bound = (1 + MODE_TOLERANCE) * min(error for error, _ in plans)
    return next(plan for error, plan in plans if error <= bound)


def _plan_peak_in_mode(
    problem: _Problem,
    model: nn.Module,
    config: WasiConfig,
    budget: float,
    batch: Any,
    optimizer: str | OptimizerFactory | None,
    bytes_per_element: int,
) -> WasiPlan:
    """An element of a factor that trains costs itself and its optimizer state, one of an input or an image itself.

    Gradients hardly exist where the peak usually is, at the start of backward; where they do, the estimate tells.
    What else there is in a step is guessed from the dense model's.
    """
    fields = {field: getattr(config, field) for field in _KEPT_FIELDS}
    states = OPTIMIZER_STATES.get(optimizer, 2) if isinstance(optimizer, str) else 2

    def lasting(spectrum: LayerSpectrum, rank: int) -> int:
        sizes, update = (spectrum.out_features, spectrum.in_features, rank), spectrum.update
        image = problem.rows(spectrum) * rank if update.keeps_image else 0
        return update.elements(*sizes) + states * update.trained_elements(*sizes) + image

    def kept(group: InputGroup, ranks: dict[str, int] | None) -> float:
        return 0.0 if config.layer_update.keeps_image else problem.kept_elements(group, ranks)

    peaks = PlannedPeaks(model, batch=batch, optimizer=optimizer)
    planned = [model.get_submodule(spectrum.name) for spectrum in problem.spectra]
    dense = fixed = None
    if all(parameter.requires_grad for module in planned for parameter in module.parameters()):
        dense = estimate_peak(model, batch=batch, optimizer=optimizer)
        weights = sum(dense_weight(module).numel() for module in planned)
        inputs = sum(problem.kept_elements(group, None) for group in input_groups(problem.spectra))
        # at the peak there are the inputs (before backward) or the gradients of the weights (in the optimizer's step)
        fixed = dense - bytes_per_element * ((1 + states) * weights + max(weights, inputs))
    try:
        plan, needed = _fit(
            problem,
            lambda spectrum, rank: bytes_per_element * lasting(spectrum, rank),
            lambda group, ranks: bytes_per_element * kept(group, ranks),
            lambda plan: peaks(WasiConfig(plan=plan, **fields)),
            (1 - PEAK_MARGIN) * budget,
            fixed,
        )
    except InfeasibleError as error:
        raise InfeasibleError("peak_bytes", budget, error.least / (1 - PEAK_MARGIN)) from error
    if dense is not None and needed >= dense:  # a model with frozen layers is not what fine-tuning takes
        logger.warning(
            "A step under this plan needs %.1f MiB, dense fine-tuning %.1f MiB: the plan saves no memory. "
            "Lower peak_bytes, or fine-tune the dense model.",
            needed / MIB,
            dense / MIB,
        )
    return replace(plan, memory_mode=config.memory_mode)


# -------------------------------------------------------------------- FLOPs and time


class _Work(Protocol):
    """What the planned layers cost, in FLOPs or seconds; K is the weight rank, r that of the feature mode."""

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        """Forward pass of one layer, of the dense one for None."""

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        """The part of forward and backward that depends on K alone; all of it for the dense layer or exact input."""

    def compression(self, group: InputGroup, rank: int) -> float:
        """The part that depends on r alone, of all layers that read one input."""

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        """The part that depends on K and r."""


def _plan_work(problem: _Problem, work: _Work, value: float, training: bool) -> WasiPlan:
    spectra = problem.spectra
    if training:
        dense = math.fsum(work.weight(spectrum, None, True) for spectrum in spectra)
    else:
        dense = math.fsum(work.forward(spectrum, None) for spectrum in spectra)
    unit = dense if value <= 1 else 1.0
    try:
        if not training:
            return problem.weights_alone(work.forward, budget=value * unit)
        return _plan_training_work(problem, work, value * unit)
    except InfeasibleError as error:
        raise InfeasibleError("work", value, error.least / unit) from error


def _plan_training_work(problem: _Problem, work: _Work, budget: float) -> WasiPlan:
    """Features alone are compressed, wherever that is possible: exact inputs and tokens save memory, not work."""
    groups = {group.name: group for group in input_groups(problem.spectra)}
    compressed = {
        name
        for name, group in groups.items()
        if group.energies("feature") and problem.kept_elements(group, {"feature": 1}) < math.inf
    }

    def weight_cost(spectrum: LayerSpectrum, rank: int) -> float:
        return work.weight(spectrum, rank, spectrum.shared_input not in compressed)

    def activation_cost(group: InputGroup, ranks: dict[str, int] | None) -> float:
        if ranks is None:
            return math.inf if group.name in compressed else 0.0
        usable = set(ranks) == {"feature"} and problem.kept_elements(group, ranks) < math.inf
        return work.compression(group, ranks["feature"]) if usable else math.inf

    def true_cost(plan: WasiPlan) -> float:
        ranks = {layer.name: layer.activation_ranks for layer in plan.layers}
        costs = [activation_cost(group, ranks[group.spectra[0].name]) for group in groups.values()]
        for spectrum, layer in zip(problem.spectra, plan.layers, strict=True):
            costs.append(weight_cost(spectrum, layer.weight_rank))
            if layer.activation_ranks is not None:
                costs.append(work.product(spectrum, layer.weight_rank, layer.activation_ranks["feature"]))
        return math.fsum(costs)

    return _fit(problem, weight_cost, activation_cost, true_cost, budget)[0]


@dataclass(frozen=True)
class _Flops:
    """FLOPs, counted from the matrix products of :mod:`autograd`, :mod:`tucker` and the retraction.

    A warm basis moves every `interval` steps. The K x K work of `update="subspace"` is bounded from above.
    """

    problem: _Problem
    interval: int

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        rows, sizes = self.problem.rows(spectrum), (spectrum.out_features, spectrum.in_features)
        if rank is None:
            return dense_forward_flops(rows, *sizes)
        return spectrum.update.forward_flops(rows, *sizes, rank)

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        if rank is None:
            return 3 * self.forward(spectrum, None)
        rows, sizes = self.problem.rows(spectrum), (spectrum.out_features, spectrum.in_features)
        gradient_of_x = self.forward(spectrum, rank)
        return self.forward(spectrum, rank) + gradient_of_x + spectrum.update.gradient_flops(rows, *sizes, rank, exact)

    def compression(self, group: InputGroup, rank: int) -> float:
        rows = self.problem.rows(group.spectra[0])
        flops = 2 * rows * rank * group.in_features * (1 + 2 / self.interval)
        layers = group.spectra
        return flops + sum(
            x.update.compressed_gradient_flops(rows, x.out_features, x.in_features, rank) for x in layers
        )

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        return spectrum.update.product_flops(spectrum.out_features, spectrum.in_features, weight_rank, rank)


class _Seconds:
    """Seconds of a few ranks of every shape, linear in between; at least as much for a larger rank.

    Forward and backward with the rank r are taken as a part of K, measured at r = 1, and a part of r, measured at a
    middle K, so that they add up.
    """

    def __init__(self, problem: _Problem, timer: LayerTimer) -> None:
        self._problem, self._timer = problem, timer
        self._curves: dict[Any, tuple[list[int], Any]] = {}

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        return self._layer(spectrum, rank, None, training=False)

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        return self._layer(spectrum, rank, None if exact else 1, training=True)

    def _layer(self, spectrum: LayerSpectrum, rank: int | None, feature_rank: int | None, training: bool) -> float:
        sizes = self._sizes(spectrum)
        if rank is None:
            return self._curve(("dense", sizes, training), [0], lambda _: self._timer.dense(*sizes, training), 0)
        return self._curve(
            ("factored", sizes, feature_rank, training),
            _spread(spectrum.rank_choices, 5),
            lambda K: self._timer.factored(*sizes, K, feature_rank, training),
            rank,
        )

    def compression(self, group: InputGroup, rank: int) -> float:
        points = _spread(range(1, max(2, group.in_features)), 4)
        seconds = 0.0
        for spectrum in group.spectra:
            sizes, choices = self._sizes(spectrum), spectrum.rank_choices

            def layer(r: int, sizes: tuple[int, int, int] = sizes, middle: int = choices[len(choices) // 2]) -> float:
                return self._timer.factored(*sizes, middle, r, True)

            key = ("gradient", sizes)
            seconds += self._curve(key, points, layer, rank) - self._curve(key, points, layer, 1)
        rows, features = self._problem.rows(group.spectra[0]), group.in_features
        return seconds + self._curve(
            ("compression", rows, features), points, lambda r: self._timer.compression(rows, features, r), rank
        )

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        return 0.0

    def _sizes(self, spectrum: LayerSpectrum) -> tuple[int, int, int]:
        return self._problem.rows(spectrum), spectrum.out_features, spectrum.in_features

    def _curve(self, key: Any, points: list[int], measure: Callable[[int], float], rank: int) -> float:
        if key not in self._curves:
            self._curves[key] = points, np.maximum.accumulate([measure(point) for point in points])
        return float(np.interp(rank, *self._curves[key]))


def _spread(ranks: Sequence[int], count: int) -> list[int]:
    """About `count` of the ascending ranks, the first and the last among them."""
    return sorted({ranks[int(index)] for index in np.linspace(0, len(ranks) - 1, count)})
