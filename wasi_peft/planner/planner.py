"""One plan for a whole model: ranks of weights and of compressed inputs under the budget that a user can afford.

Energies come from calibration; costs are counted or timed in :mod:`work` and estimated in :mod:`peak`;
:mod:`ranks.choosing` chooses, and :mod:`fit` where costs do not simply add up over layers (the peak of a step,
products of two ranks).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..cost.estimate import GIGA, OptimizerFactory, input_sizes, watched_sizes
from ..cost.timing import LayerTimer
from ..factors.calibration import Calibration, all_targets
from ..forms.attention import with_projections
from ..forms.compressed import Compressed
from ..forms.dense import dense_weight, weight_shape
from ..forms.residual import RESIDUALS
from ..linalg.tucker import canonical
from ..memory.modes import MEMORY_MODES
from ..models.calls import evaluating, model_output, token_mask
from ..models.tokens import patches_left, token_places
from ..ranks.allocate import allocate_ranks
from ..ranks.choosing import plan_error
from ..ranks.knapsack import InfeasibleError
from ..ranks.plan import FORMS, WasiPlan, build_plan, readable_bytes
from ..ranks.spectrum import FACTORS, LayerSpectrum, with_forms
from ..tuner.config import WasiConfig
from ..updates import RESIDUAL_UPDATE
from .fit import Problem
from .peak import plan_peak
from .work import Flops, Seconds, Work, plan_work

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

_DECIDED_FIELDS = ("weight_rank", "rank_pattern", "weight_share", "plan", "activation_ranks")
DEFAULT_FORMS = (FACTORS, *RESIDUALS)


@with_projections
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
    forms: Sequence[str] | None = None,
) -> WasiPlan:
    """Choose form and rank of every layer under exactly one budget; hand the plan to `WasiConfig(plan=...)`.

    A layer becomes two factors that replace its weight, which lose energy, or its weight stays, exact or in few bits,
    beside an addition that trains (:mod:`forms.residual`), which loses what rounding does, in the same unit. Where a
    layer has this choice, a tenth of the energy in directions that do not train counts as well
    (:data:`choosing.UNTRAINED_WEIGHT`). Never is the error of such a plan above that of factors alone under the same
    budget. It is the error before repair and training (docs/benchmarks).

    No rank of factors goes past break-even; layers where no rank saves anything are not in the plan and stay dense.
    Ranks, with that of the update, are multiples of 16 wherever the budget and the layer's size allow
    (:func:`costs.rank_step`). Where the budget does not depend on the compressed inputs (`weight_share`,
    `inference_flops`, `inference_seconds`, `error`), each of them takes the fewest features that keep all but 8 % of
    the energy of the weight gradients. A calibration without gradients says nothing about them: inputs stay exact.

    Args:
        model: The dense model. It is not changed.
        calibration: What :func:`calibrate_wasi` measured on it.
        weight_share: Bytes of all that is stored over those of the dense weights, in (0, 1].
        peak_bytes: All memory of a training step at its peak, in bytes: parameters, gradients, optimizer state,
            activations and temporary tensors, as :func:`estimate_wasi` counts them. 2 % are left free.
        training_flops: FLOPs of the planned layers in forward and backward: up to 1 a share of the dense ones, above
            1 the absolute number for one step on `batch`.
        inference_flops: The same for the forward pass.
        step_seconds: Time of the planned layers in forward and backward, as a share of that of the dense ones, in
            (0, 1]. Layers of every shape are timed on this machine; what else a step does is not part of it.
        inference_seconds: The same for the forward pass.
        error: Tolerated share of the weight energy to lose, in (0, 1], for the least bytes; with a choice of forms,
            what does not train counts a tenth. Energy sits in few directions: as factors 0.01 is a third of the
            weights of a small pretrained ViT, 0.004 a half.
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
        forms: What a layer may become: "factors", residuals by name ("int8", "int4", "exact"), and "dense" for a layer
            that stays as it is and does not train. By default factors and all residuals, and factors alone where the
            configuration asks for these (`residual=None`, or an update that cannot train beside a residual). K beside
            a residual is chosen too (:func:`spectrum.addition_ranks`), unless the configuration has a `weight_rank`.

    Raises:
        ValueError: If there is not exactly one budget, it is out of range or below the least feasible one (which the
            message names), the batch is missing, `memory_modes` is empty, unknown or given with another budget, the
            calibration is of another model, the model has an adapter or is compressed, or the configuration decides
            ranks itself.

    Example:
        >>> from wasi_peft import calibrate_wasi
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)))
        >>> calibration = calibrate_wasi(model, [torch.randn(64, 32)], progress_bar=False)
        >>> plan = plan_wasi(model, calibration, weight_share=0.5)
        >>> 0.4 < plan.kept_share <= 0.5
        True
    """
    asked_nothing = config is None
    values = weight_share, peak_bytes, training_flops, inference_flops, step_seconds, inference_seconds, error
    name, value = _one_budget(dict(zip(BUDGETS, values, strict=True)), batch)
    asked = WasiConfig() if config is None else config
    chosen_forms = _forms_to_try(forms, asked)
    config = asked.for_factors()
    if asked.residual is not None:
        config = replace(config, weight_rank=None)  # that of additions
    targets = _planned_targets(model, calibration, None if asked_nothing else config)
    modes = _modes_to_try(memory_modes, name, config)
    shapes = dict.fromkeys(targets, (1, calibration.rows))
    if batch is not None:
        shapes = input_shapes(model, targets, batch)
        if asked.skip_padding:
            shapes = _real_shapes(shapes, token_mask(batch))
        if asked.token_keep is not None:
            shapes = _fewer_tokens(shapes, model, batch, asked.token_keep)
    exact = config.compression_rule("") is None
    spectra = _comparable(calibration.spectra(targets, config.layer_update), shapes, exact)
    beside = asked.update if asked.residual is not None else None
    offered = with_forms(spectra, chosen_forms, asked.weight_rank, beside or RESIDUAL_UPDATE)

    def ranks_for(problem: Problem) -> WasiPlan:
        if name == "weight_share":
            if not any(spectrum.forms for spectrum in problem.spectra):
                ranks = allocate_ranks(problem.spectra, value)
                return problem.with_tolerable_inputs(build_plan(problem.spectra, ranks, {}, {}))
            dense = sum(spectrum.dense_bytes for spectrum in problem.spectra)
            try:
                return problem.weights_alone(LayerSpectrum.stored_bytes, budget=value * dense)
            except InfeasibleError as infeasible:
                raise InfeasibleError(name, value, infeasible.least / dense) from infeasible
        if name == "error":
            return problem.weights_alone(LayerSpectrum.stored_bytes, error_bound=value)
        if name == "peak_bytes":
            return plan_peak(problem, model, config, modes, value, batch, optimizer, calibration.bytes_per_element)
        work: Work = Flops(problem, config.activation_interval)
        if name.endswith("_seconds"):
            work = Seconds(problem, measure)
        return plan_work(problem, work, value, training=name in ("training_flops", "step_seconds"))

    def plan_for(problem: Problem) -> WasiPlan:
        made_for = {field: getattr(config, field) for field in ("update", "update_rank", "frozen_dtype")}
        return replace(ranks_for(problem), **made_for)

    weight = dense_weight(next(iter(targets.values())))
    measure = timer or LayerTimer(weight.dtype, weight.device, config.layer_update, config.residual_product)
    try:
        plan = plan_for(Problem(offered, shapes, {name: value}))
    except InfeasibleError as infeasible:
        least = _rounded_up(infeasible.least)
        raise ValueError(
            f"{name} must be at least {_readable(name, least)} for this model, got {_readable(name, value)}."
            + (_in_modes(modes) if name == "peak_bytes" else "")
        ) from infeasible
    if FACTORS in chosen_forms and len(chosen_forms) > 1:
        plan = _never_worse(plan, plan_for, Problem(spectra, shapes, {name: value}), offered)
    return plan


def _never_worse(
    plan: WasiPlan, plan_for: Callable[[Problem], WasiPlan], factors: Problem, offered: Sequence[LayerSpectrum]
) -> WasiPlan:
    """The plan with forms, or that of factors alone where the search found less with more to choose from."""
    try:
        alone = plan_for(factors)
    except ValueError:  # factors alone cannot meet the budget
        return plan
    goal: Callable[[WasiPlan], float] = functools.partial(plan_error, offered)
    if "error" in factors.asked:
        goal = operator.attrgetter("kept_share")
    return min(plan, alone, key=goal)


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


def _forms_to_try(forms: Sequence[str] | None, config: WasiConfig) -> tuple[str, ...]:
    if forms is None:
        return DEFAULT_FORMS if config.residual is not None else (FACTORS,)
    if isinstance(forms, str) or not forms or not set(forms) <= set(FORMS):
        raise ValueError(f"forms must be a list of any of {list(FORMS)}, got {forms!r}.")
    return tuple(forms)


def _modes_to_try(memory_modes: Sequence[str] | None, budget: str, config: WasiConfig) -> tuple[str, ...]:
    if memory_modes is None:
        return (config.memory_mode or "exact",)
    if budget != "peak_bytes":
        raise ValueError(f"memory_modes is for peak_bytes alone, got it with {budget}.")
    if isinstance(memory_modes, str) or not memory_modes or not set(memory_modes) <= set(MEMORY_MODES):
        raise ValueError(f"memory_modes must be a list of any of {list(MEMORY_MODES)}, got {memory_modes!r}.")
    return tuple(memory_modes)


def _in_modes(modes: Sequence[str]) -> str:
    """What a peak was found in, and how to have more tried."""
    considered = f"memory_mode={modes[0]!r}" if len(modes) == 1 else f"memory_modes={tuple(modes)}"
    others = f"; memory_modes={MEMORY_MODES} tries all" if set(modes) != set(MEMORY_MODES) else ""
    return f" This is with {considered}{others}."


def _planned_targets(model: nn.Module, calibration: Calibration, config: WasiConfig | None) -> dict[str, nn.Module]:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("plan_wasi needs the dense model, got one with an adapter.")
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise ValueError(
            "plan_wasi needs the dense model, got a compressed one: model.dequantize() restores its layers."
        )
    for field in _DECIDED_FIELDS:
        if config is not None and getattr(config, field):
            raise ValueError(f"a plan decides all ranks; leave {field} out, got {getattr(config, field)!r}.")
    if config is None:
        known = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
        missing = [name for name in calibration.layers if name not in known]
        if missing:
            raise ValueError(f"{missing[0]}: the calibration belongs to another model, which has this layer.")
        config = WasiConfig(residual=None, target_modules=list(calibration.layers))
    targets = all_targets(model, config)
    calibration.require(targets)
    update = config.layer_update
    sizes = {name: weight_shape(module) for name, module in targets.items()}
    saving = {name: module for name, module in targets.items() if update.break_even_rank(*sizes[name]) > 0}
    if not saving:
        raise ValueError(
            f"with update={update.name!r} no rank of any target saves anything, got {len(targets)} targets of at most "
            f"{max(map(min, sizes.values()))} rows or columns."
        )
    return saving


def input_shapes(model: nn.Module, targets: Mapping[str, nn.Module], batch: Any) -> dict[str, tuple[int, int]]:
    """Samples and tokens that each layer meets when the model runs on a batch, by layer name.

    Packed experts meet a row for each token and expert that it goes to, as one sample. A layer that the batch does not
    reach (an expert without tokens, a weight that is read and not called) counts as one that meets as much as any
    other does.

    Raises:
        ValueError: If the batch reaches none of the layers.
    """
    sizes = input_sizes(model, targets, batch)
    if sizes is None:
        sizes = _run_for_sizes(model, targets, batch)
    met = {name: canonical(torch.empty(size, device="meta")).shape for name, size in sizes.items() if math.prod(size)}
    if not met:
        raise ValueError(
            f"the batch must reach a planned layer with at least one row, got one that reaches none of {len(targets)}."
        )
    largest = max(met.values(), key=lambda shape: shape[0] * shape[1])
    shapes = {name: met.get(name, largest) for name in targets}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def _real_shapes(shapes: dict[str, tuple[int, int]], mask: torch.Tensor | None) -> dict[str, tuple[int, int]]:
    """Samples and tokens without padding, as one sequence, where a layer reads the very tokens of the mask."""
    if mask is None:
        return shapes
    real = 1, int(mask.bool().sum())
    return {name: real if shape == tuple(mask.shape) else shape for name, shape in shapes.items()}


def _fewer_tokens(
    shapes: dict[str, tuple[int, int]], model: nn.Module, batch: Any, keep: float
) -> dict[str, tuple[int, int]]:
    """Samples and tokens where blocks see a share of an image's patches, of layers that read all of its tokens."""
    embedding, block = token_places(model)
    sizes = input_sizes(model, (embedding, block), batch) or _run_for_sizes(model, (embedding, block), batch)
    stride: Any = model.get_submodule(embedding).stride
    patches = math.prod(side // step for side, step in zip(sizes[embedding][2:], stride, strict=True))
    samples, tokens, _ = sizes[block]
    fewer = samples, tokens - patches + patches_left(patches, keep)
    return {name: fewer if shape == (samples, tokens) else shape for name, shape in shapes.items()}


def _run_for_sizes(model: nn.Module, names: Collection[str], batch: Any) -> dict[str, tuple[int, ...]]:
    """What :func:`estimate.input_sizes` gives, by running the model."""
    with evaluating(model, gradients=False), watched_sizes(model, names) as sizes:
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
        return f"{readable_bytes(value, math.ceil)} ({value:,} bytes)"
    if value > 1:
        return f"{value / GIGA:,.3g} GFLOP ({value:,} FLOPs)"
    if name.endswith(("_flops", "_seconds")):
        return f"{value} of the dense layers'"
    return f"{value}"
