"""Initial factors for a model: calibration, ranks, truncation and repair in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..forms.attention import with_projections
from ..forms.compressed import Compressed
from ..forms.dense import dense_weight
from ..models.experts import conceal_experts, expose_experts
from ..ranks.allocate import allocate_ranks
from ..tuner.config import WasiConfig
from ..tuner.model import initial_rank, rank_for
from ..tuner.prepared import PreparedLayer, WasiFactors, drop_prepared
from ..tuner.targets import asked_rank, resolve_targets
from .additions import prepare_additions
from .calibration import Calibration, calibrate_layers, dense_targets
from .collecting import NoGradientsError
from .data import CalibrationData, check_repeatable
from .expert_factors import prepare_experts
from .moments import MOMENT_BATCHES, with_moments
from .repairs import REPAIRS, RepairName, default_repair

logger = logging.getLogger(__name__)


@with_projections
def preprocess_wasi(
    model: nn.Module,
    config: WasiConfig,
    data: CalibrationData | None = None,
    *,
    calibration: Calibration | None = None,
    repair: RepairName | None = None,
    repair_steps: int | None = None,
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    progress_bar: bool = True,
) -> WasiFactors:
    """Prepare data-aware initial factors; the next `get_peft_model(model, config)` uses them.

    Beside a residual they start as what rounding loses, in closed form, from one forward pass over 8 batches: worth it
    in 4 bits; in 8 bits there is next to nothing to prepare. What follows is about factors that replace the weight.
    Under a plan with both, each layer is prepared in its own way; without `data` additions start by themselves.

    Where the update leaves R as it is and there are batches, one more pass measures in which
    coordinates the rest trains best. Packed experts get factors for the inputs that are routed to each; they are not
    repaired, and wait on the model alone: what is returned does not have them.

    Args:
        model: The dense model. Its weights are not changed; the prepared factors are attached to the target modules
            and consumed by the injection.
        config: The configuration that will be injected: it decides targets and ranks.
        data: Calibration batches without labels, see [`calibrate_wasi`]; also what the factors are repaired on.
        calibration: A calibration made before, so that only the factors are computed (and repaired, with `data`).
        repair: How the truncated factors are repaired: "model", all at once, by what blocks answer
            ([`repair_factors`]); "tokens", all at once, by the tokens predicted ([`repair_tokens`]); or "blocks",
            one after the other ([`repair_blocks`]), which takes the least memory and restores less. By default
            "tokens" for language models, else "model": measured.
        repair_steps: Steps of that, with "blocks" of each block; by default 400 for "model", 128 for "tokens" and 64
            for "blocks" where `data` are batches, 0 (no repair) where they are a function or missing. Beside a
            residual there is nothing to repair, and no step is taken.
        max_batches: Calibrate on that many batches; the repair goes through all of them.
        max_memory_bytes: Bound on the memory for sums during calibration, bytes.
        progress_bar: Show progress bars.

    Returns:
        The factors, which are attached already. They can be repaired further, saved, and attached to the model of
        another process.

    Raises:
        TypeError: If there is no configuration.
        ValueError: If neither data nor a calibration is given, or repair is asked for without batches; and whatever
            [`calibrate_wasi`] finds. Nothing is attached then.
    """
    if not isinstance(config, WasiConfig):
        raise TypeError(f"config must be a WasiConfig, got {type(config).__name__}.")
    if config.residual is not None and repair is not None:
        raise ValueError(
            f"repair is for factors that replace a weight; leave it out with residual={config.residual!r}, got "
            f"repair={repair!r}."
        )
    residuals = config.planned_residuals
    adds_only = config.residual is not None or (bool(residuals) and set(residuals) == config.planned_names())
    batches = None if data is None or callable(data) else data
    if repair not in (*REPAIRS, None):
        raise ValueError(f"repair must be one of {', '.join(map(repr, REPAIRS))}, None, got {repair!r}.")
    chosen = REPAIRS[repair or default_repair(model)]
    if not adds_only:
        chosen.check(model)
    if repair_steps is None:
        repair_steps = 0 if batches is None else chosen.steps
    if repair_steps < 0:
        raise ValueError(f"repair_steps must be at least 0, got {repair_steps!r}.")
    if repair_steps and batches is None:
        raise ValueError(f"repair needs batches in `data`, got {type(data).__name__} and repair_steps={repair_steps}.")
    resolved = copy.copy(config)
    resolve_targets(model, resolved)
    targets = dense_targets(model, resolved)
    compressed = next((name for name, module in targets.items() if isinstance(module, Compressed)), None)
    if compressed is not None:
        raise ValueError(
            f"{compressed}: a compressed model needs no preparation: adapters train on what it stores. "
            "model.dequantize() restores the dense layers."
        )
    limits: dict[str, Any] = {"max_batches": max_batches, "max_memory_bytes": max_memory_bytes}
    if not targets and data is None:
        raise ValueError("packed experts are prepared from data, and nothing else; got none.")
    if adds_only and (data is None or (calibration is not None and not residuals)):
        given = "no data" if data is None else "a calibration"
        raise ValueError(f"additions to a residual are prepared from data, and nothing else; got {given}.")
    beside = {name: module for name, module in targets.items() if resolved.residual_of(name) is not None}
    additions: dict[str, PreparedLayer] = {}
    if beside and data is not None:
        prepared = prepare_additions(
            model,
            resolved,
            beside,
            data,
            **limits,
            progress_bar=progress_bar,
        )
        if adds_only:  # there is nothing to repair
            prepared.attach(model)
            return prepared
        additions = dict(prepared.layers)
    targets = {name: module for name, module in targets.items() if name not in beside}
    layers: dict[str, PreparedLayer] = {}
    if targets:
        if calibration is None:
            calibration = _calibrate(model, data, targets, **limits, progress_bar=progress_bar)
        calibration.require(targets)
        resolve_ranks(resolved, calibration, targets)
        for name, module in tqdm(targets.items(), desc="WASI initial factors", disable=not progress_bar):
            layers[name] = prepared_factors(name, module, resolved, calibration)
        factors, update = WasiFactors(layers), resolved.layer_update
        if repair_steps and batches is not None:
            factors = chosen.run(model, factors, batches, steps=repair_steps, progress_bar=progress_bar)
        if update.keeps_image and batches is not None:
            count = MOMENT_BATCHES if max_batches is None else min(max_batches, MOMENT_BATCHES)
            factors = with_moments(model, factors, batches, max_batches=count, progress_bar=progress_bar)
        layers = dict(factors.layers)
    factors = WasiFactors({**layers, **additions})
    factors.attach(model)
    if data is not None:
        try:
            prepare_experts(model, config, data, **limits, progress_bar=progress_bar)
        except BaseException:
            drop_all_prepared(model)
            raise
    return factors


@with_projections
def drop_all_prepared(model: nn.Module) -> None:
    """Nothing is attached to a model any more, to its packed experts neither."""
    expose_experts(model)
    for module in model.modules():
        drop_prepared(module)
    conceal_experts(model)


def _calibrate(
    model: nn.Module, data: CalibrationData | None, targets: dict[str, nn.Module], **options: Any
) -> Calibration:
    """What the targets do with the data, by gradients where the model lets them flow."""
    if data is None:
        raise ValueError("preprocess_wasi needs data, a calibration, or both; got neither.")
    check_repeatable(data)
    try:
        return calibrate_layers(model, data, targets, **options)
    except NoGradientsError as error:
        logger.warning("%s Its layers are prepared that way.", error)
        return calibrate_layers(model, data, targets, None, **options)


def resolve_ranks(config: WasiConfig, calibration: Calibration, names: Iterable[str]) -> None:
    """Allocate ranks over all layers where one budget is to decide them.

    Args:
        config: Gets them in `resolved_ranks`.
        calibration: Of these layers.
        names: All targets whose weights factors replace.
    """
    if config.weight_share is not None:
        spectra = calibration.spectra(names, config.layer_update)
        config.resolved_ranks = allocate_ranks(spectra, config.weight_share)


def prepared_factors(name: str, module: nn.Module, config: WasiConfig, calibration: Calibration) -> PreparedLayer:
    """The factors of one layer, cut from its spectrum.

    Args:
        name: Of the layer.
        module: The dense layer.
        config: With the ranks of a budget resolved (:func:`resolve_ranks`).
        calibration: Of this layer.
    """
    update = config.layer_update
    rank_or_threshold = asked_rank(name, config)
    rank = rank_for(rank_or_threshold, calibration.energies(name))
    directions = initial_rank(rank, update.side_rank, dense_weight(module).shape)
    initial = calibration.factors(name, module, directions)
    made_for = rank_or_threshold, config.weight_share, update.name, update.side_rank
    return PreparedLayer(initial, rank, *made_for, frozen_dtype=update.frozen_dtype)
