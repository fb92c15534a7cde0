"""Dense again, for inference, where two thin products are slower than one."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .estimate import input_sizes
from .layer import WasiLayer, wasi_layers
from .timing import LayerTimer


def merge_slow_layers(
    model: nn.Module, batch: Any, *, least_gain: float = 0.05, timer: LayerTimer | None = None
) -> dict[str, float]:
    """Multiply out the layers that this machine runs faster dense, for inference on batches of this size.

    Two products cost twice the calls of one: with a few tokens, or at ranks near break-even, that can be more than the
    smaller products save. Every kind of layer (its sizes, its rank, its number of rows in the batch) is timed alone
    with random values, in both forms, and those that gain are merged. The model then computes the same up to
    rounding; dense weights take memory beside the factors, which stay. `model.unmerge_adapter()` undoes it, before
    training. Saving is not affected.

    Args:
        model: A PEFT model with a WASI adapter.
        batch: What the model will be called with: a mapping of arguments, a tuple, or one tensor, of the real shapes.
        least_gain: Share of a layer's time that the dense form must save. Timing varies by a few percent.
        timer: Measures the layers; by default in their dtype and on their device.

    Returns:
        Time of the dense form over that of the factors, by name of the layers that were merged.

    Raises:
        ValueError: If there is no active WASI layer, one is merged, `least_gain` is not in [0, 1), or the batch is
            empty or its shapes cannot be followed without running the model.

    Example:
        >>> import peft, torch, wasi_peft
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> config = wasi_peft.WasiConfig(target_modules=["0"], weight_rank=7, update="factor")
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
    ratios: dict[tuple[Any, ...], float] = {}
    found = {}
    for name in (name for name in layers if name in sizes):
        layer, rows = layers[name], math.prod(sizes[name][:-1])
        kind = _kind(layer, rows)
        if kind not in ratios:
            ratios[kind] = _dense_over_factored(layer, rows, timer)
        if ratios[kind] <= 1 - least_gain:
            found[name] = ratios[kind]
    for name in found:
        layers[name].merge()
    return found


def _kind(layer: WasiLayer, rows: int) -> tuple[Any, ...]:
    assert layer.active_name is not None
    L = layer.wasi_L[layer.active_name]
    return rows, layer.out_features, layer.in_features, layer.rank(layer.active_name), L.dtype, L.device


def _dense_over_factored(layer: WasiLayer, rows: int, timer: LayerTimer | None) -> float:
    """Time of a forward pass of the dense layer, over that of the factors."""
    assert layer.active_name is not None
    L = layer.wasi_L[layer.active_name]
    timer = timer or LayerTimer(L.dtype, L.device, change_rank=layer.rank(layer.active_name) - L.shape[1])
    out_features, in_features = layer.out_features, layer.in_features
    dense = timer.dense(rows, out_features, in_features, training=False)
    return dense / timer.factored(rows, out_features, in_features, L.shape[1], None, training=False)
