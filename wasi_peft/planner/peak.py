"""A budget of all memory that a training step takes: ranks, and the memory mode that loses least with them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..cost.estimate import OptimizerFactory, PlannedPeaks, estimate_peak
from ..forms.residual import RESIDUALS
from ..ranks.choosing import least_error_of, plan_error
from ..ranks.knapsack import InfeasibleError
from ..ranks.plan import WasiPlan, readable_bytes
from ..ranks.spectrum import InputGroup, LayerSpectrum, input_groups
from ..tuner.config import WasiConfig
from .fit import Problem, fit_budget

logger = logging.getLogger(__name__)

MODE_TOLERANCE = 0.1  # how much more the ranks of a better memory mode may lose
NEGLIGIBLE_ERROR = 1e-3  # share of the energy: below it no memory mode is better than another
PEAK_MARGIN = 0.02  # of a peak in bytes, left free for what the estimate may miss
OPTIMIZER_STATES = {"sgd": 0, "sgd_momentum": 1}  # elements per parameter; 2 for the others


def plan_peak(
    problem: Problem,
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
    good_enough = _tolerated(least_error_of(spectra))
    plans: list[tuple[float, WasiPlan]] = []
    least = math.inf
    for mode in modes:
        chosen = replace(config, memory_mode=mode)  # type: ignore[arg-type]
        try:
            plan = _plan_in_mode(problem, model, chosen, budget, batch, optimizer, bytes_per_element)
        except InfeasibleError as error:
            least = min(least, error.least)
            continue
        plans.append((plan_error(spectra, plan), plan))
        if plans[-1][0] <= good_enough:
            break  # no mode after it can lose so much less that it would be chosen
    if not plans:
        raise InfeasibleError("peak_bytes", budget, least)
    bound = _tolerated(min(error for error, _ in plans))
    return next(plan for error, plan in plans if error <= bound)


def _tolerated(error: float) -> float:
    """What the ranks of a better memory mode may lose where those of another lose so much."""
    return max((1 + MODE_TOLERANCE) * error, NEGLIGIBLE_ERROR)


def _plan_in_mode(
    problem: Problem,
    model: nn.Module,
    config: WasiConfig,
    budget: float,
    batch: Any,
    optimizer: str | OptimizerFactory | None,
    bytes_per_element: int,
) -> WasiPlan:
    """A factor that trains costs itself and its optimizer state, an input or an image itself, a residual as stored.

    Gradients hardly exist where the peak usually is, at the start of backward; where they do, the estimate tells.
    What else there is in a step is guessed from the dense model's.
    """
    states = OPTIMIZER_STATES.get(optimizer, 2) if isinstance(optimizer, str) else 2
    readers = Counter(spectrum.shared_input for spectrum in problem.spectra)

    def lasting(spectrum: LayerSpectrum, rank: int) -> float:
        sizes, update = (spectrum.out_features, spectrum.in_features, rank), spectrum.update
        trained = spectrum.experts * update.trained_elements(*sizes)
        rows, state = problem.rows(spectrum), bytes_per_element * states * trained
        kept = float(rows * rank * bytes_per_element) if update.keeps_image or update.residual is not None else 0.0
        if update.residual is not None and update.reads_input is not None and rank:
            width = 1 if RESIDUALS[update.residual].rounds_inputs else bytes_per_element
            kept += rows * spectrum.in_features * width / readers[spectrum.shared_input]
        return spectrum.stored_bytes(rank) + state + kept

    def kept(group: InputGroup, ranks: dict[str, int] | None) -> float:
        return 0.0 if config.layer_update.keeps_image else problem.kept_elements(group, ranks)

    peaks = PlannedPeaks(model, batch=batch, optimizer=optimizer)
    names = tuple(f"{spectrum.name}." for spectrum in problem.spectra)  # of packed experts, a parameter is named so
    trains = [parameter.requires_grad for name, parameter in model.named_parameters() if f"{name}.".startswith(names)]
    dense = fixed = None
    if all(trains):
        dense = estimate_peak(model, batch=batch, optimizer=optimizer)
        weights = sum(spectrum.dense_bytes for spectrum in problem.spectra) // bytes_per_element
        inputs = sum(problem.kept_elements(group, None) for group in input_groups(problem.spectra))
        # at the peak there are the inputs (before backward) or the gradients of the weights (in the optimizer's step)
        fixed = dense - bytes_per_element * ((1 + states) * weights + max(weights, inputs))
    try:
        plan, needed = fit_budget(
            problem,
            lasting,
            lambda group, ranks: bytes_per_element * kept(group, ranks),
            lambda plan: peaks(config.with_plan(plan)),
            (1 - PEAK_MARGIN) * budget,
            fixed,
        )
    except InfeasibleError as error:
        raise InfeasibleError("peak_bytes", budget, error.least / (1 - PEAK_MARGIN)) from error
    if dense is not None and needed >= dense:  # a model with frozen layers is not what fine-tuning takes
        logger.warning(
            "A step under this plan needs %s, dense fine-tuning %s: the plan saves no memory. "
            "Lower peak_bytes, or fine-tune the dense model.",
            readable_bytes(needed),
            readable_bytes(dense),
        )
    return replace(plan, memory_mode=config.memory_mode)
