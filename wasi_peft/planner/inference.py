"""Other forms of the weights for inference: cores in their factors, layers dense where that is faster."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from ..cost.estimate import input_sizes
from ..linalg.timing import timed
from ..tuner.layer import WasiLayer, wasi_layers

TIMED_RUNS = 15
LARGEST_EVICTION = 2**26  # bytes; more than caches hold


@torch.no_grad()
def fold_cores(model: Any) -> None:
    """Multiply the cores of the active adapter, the K x K matrices between its factors, into L, when training is over.

    Each layer then has two products instead of three and K x K elements less, and the model computes the same up to
    rounding. The adapter becomes one of two factors that train, also when it is saved; nothing brings the cores back.

    Args:
        model: A PEFT model with a WASI adapter, or a transformers model with a natively added one.

    Raises:
        ValueError: If no active layer has a core, or one is merged; nothing is folded then.

    Example:
        >>> import peft, wasi_peft
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> config = wasi_peft.WasiConfig(target_modules=["0"], weight_rank=2, update="core")
        >>> model = peft.get_peft_model(net, config)
        >>> fold_cores(model)
        >>> f"{model.wasi_summary().kept_share:.0%}"
        '50%'
    """
    layers = {name: layer for name, layer in wasi_layers(model) if layer.active_name is not None}
    if not any(layer.update.fold(layer.form) for layer in layers.values()):
        raise ValueError("the model must have WASI layers with an active adapter with cores, got none.")
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"{merged}: the adapter is merged; call unmerge_adapter() first.")
    for layer in layers.values():
        assert layer.active_name is not None
        if not layer.fold(layer.active_name):
            continue  # its form in the plan, a residual, says how it is updated
        config = model.peft_config[layer.active_name]
        config.update, config.update_rank = layer.update.name, layer.update.side_rank or None
        config.frozen_dtype = layer.update.frozen_dtype


def merge_slow_layers(model: nn.Module, batch: Any, *, least_gain: float = 0.05) -> dict[str, float]:
    """Multiply out the layers that this machine runs faster dense, for inference on batches of this size.

    Two products cost twice the calls of one: with a few tokens, or at ranks near break-even, that can be more than the
    smaller products save. Of every kind of layer (its sizes, its rank, its number of rows in the batch) one is timed
    in both forms on random input, its weights no nearer in the caches than they are when the whole model runs; the
    kinds that gain are merged. The model then computes the same up to rounding; dense weights take memory beside the
    factors, which stay. `model.unmerge_adapter()` undoes it, before training. Saving is not affected.

    Args:
        model: A PEFT model with a WASI adapter.
        batch: What the model will be called with, of the real shapes, as for :func:`estimate_wasi`.
        least_gain: Share of a layer's time that the dense form must save. Timing varies by a few percent.

    Returns:
        Time of the dense form over that of the factors, by name of the layers that were merged.

    Raises:
        ValueError: If there is no active WASI layer, one is merged, `least_gain` is not in [0, 1), or the batch is
            empty or its shapes cannot be followed without running the model.

    Example:
        >>> import peft, wasi_peft
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> config = wasi_peft.WasiConfig(target_modules=["0"], weight_rank=7)
        >>> model = peft.get_peft_model(net, config)
        >>> ratios = merge_slow_layers(model, torch.zeros(4, 8))
        >>> all(ratio <= 0.95 for ratio in ratios.values())
        True
    """
    if isinstance(least_gain, bool) or not isinstance(least_gain, (int, float)) or not 0 <= least_gain < 1:
        raise ValueError(f"least_gain must be in [0, 1), got {least_gain!r}.")
    layers = {name: layer for name, layer in wasi_layers(model) if layer.active_name is not None}
    if not layers or any(layer.disable_adapters for layer in layers.values()):
        raise ValueError("the model must have WASI layers with an active adapter, got none.")
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"{merged}: the adapter is merged already; call unmerge_adapter() first.")
    sizes = input_sizes(model, layers, batch)
    if sizes is None:
        raise ValueError("shapes in the model depend on values of its tensors, so its layers' inputs are not known.")
    rows = {name: math.prod(sizes[name][:-1]) for name in layers if name in sizes}
    between = min(LARGEST_EVICTION, sum(parameter.nbytes for parameter in model.parameters()))
    ratios: dict[tuple[Any, ...], float] = {}
    found = {}
    for name, count in rows.items():
        kind = count, *_kind(layers[name])
        if kind not in ratios:
            ratios[kind] = dense_over_factored(layers[name], count, between)
        if ratios[kind] <= 1 - least_gain:
            found[name] = ratios[kind]
    for name in found:
        layers[name].merge()
    return found


def _kind(layer: WasiLayer) -> tuple[Any, ...]:
    assert layer.active_name is not None
    form = layer.form
    return layer.out_features, layer.in_features, layer.rank(layer.active_name), form.dtype, form.device


@torch.no_grad()
def dense_over_factored(layer: WasiLayer, rows: int, evicted_bytes: int) -> float:
    """Time of a layer's forward pass in dense form, over that of its factors: the best of several runs each.

    Args:
        layer: A layer with an active adapter.
        rows: Tokens of its input.
        evicted_bytes: Memory that is written before each run, so that weights leave the caches as they do when all
            other layers run in between.
    """
    assert layer.active_name is not None
    options: dict[str, Any] = {"device": layer.form.device}
    x = torch.randn(rows, layer.in_features, dtype=layer.form.dtype, **options)
    forms: tuple[Any, ...] = layer, layer.get_dense_layer(layer.active_name)
    scratch = torch.zeros(evicted_bytes, dtype=torch.uint8, **options)
    best = [math.inf, math.inf]
    for _ in range(TIMED_RUNS):
        for index, form in enumerate(forms):
            scratch.add_(1)
            best[index] = min(best[index], timed(functools.partial(form, x), layer.form.device))
    return best[1] / best[0]
