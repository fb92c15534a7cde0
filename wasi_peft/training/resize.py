"""Weight ranks that change between two steps of training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..linalg.spectra import rank_for_threshold
from ..tuner.layer import wasi_layers
from ..updates.resizing import Carry


def active_layers(model: Any) -> dict[str, Any]:
    """WASI layers that have an active adapter, by the name that configurations know them by."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: layer for name, layer in wasi_layers(base) if layer.active_name is not None}


@torch.no_grad()
def ranks_in_use(model: nn.Module, threshold: float) -> dict[str, int]:
    """Ranks K at which each layer would keep a share of the energy of its product `L R`, by layer name.

    Of the directions that this takes, those that train beside the K are subtracted: they stay whatever K is. Layers
    whose factors are not finite keep their rank.

    Args:
        model: A model with a WASI adapter.
        threshold: Share of the energy, in (0, 1].
    """
    ranks = {}
    for name, layer in active_layers(model).items():
        outer, inner = (factor.detach().double() for factor in layer.form.factors())
        if not bool(torch.isfinite(outer).all() and torch.isfinite(inner).all()):
            ranks[name] = layer.form.weight_rank
            continue
        corner = torch.linalg.qr(outer).R @ inner  # the singular values of the weight
        energies = torch.linalg.eigvalsh(corner @ corner.T).flip(0).clamp_min(0)
        directions = rank_for_threshold(energies, threshold) if float(energies[0]) > 0 else 1
        ranks[name] = max(1, directions - (layer.form.rank - layer.form.weight_rank))
    return ranks


@torch.no_grad()
def resize_rank(model: Any, name: str, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give a layer's active adapter another weight rank between two optimizer steps.

    A smaller rank keeps the directions that matter most to the update: the best approximation of `L R` where factors
    train as they are, the largest singular values of what trains where its coordinates are white
    (:meth:`updates.base.Update.shrink`). With a larger one the layer computes the same: of each new direction one side
    is random, the other zero (:meth:`updates.base.Update.grow`). Factors in few bits are restored, resized and rounded
    again, which where they turned costs what rounding does.

    Parameters stay the same objects, so they keep their places in the optimizer. Its state follows: averages of
    gradients are rotated into the new basis, those of squares by the squared rotation, new directions start at zero.
    State of other shapes (Adafactor's) or of unknown meaning (in 8 bits) is dropped for this layer and starts afresh.
    Gradients are cleared.

    Not for models wrapped for distributed training, which remember the sizes of parameters.

    Args:
        model: A PEFT model with a WASI adapter.
        name: Name of the layer in the base model.
        rank: The new K; directions that train beside it stay as they are.
        optimizer: The optimizer that trains the factors.

    Raises:
        ValueError: If there is no such WASI layer, it is merged, it trains on factors of a compressed model, or the
            rank is not in 1 to min(out_features, in_features).
    """
    layer = active_layers(model).get(name)
    if layer is None:
        raise ValueError(f"name must be that of a WASI layer with an active adapter, got {name!r}.")
    if layer.merged:
        raise ValueError(f"{name}: the adapter is merged; unmerge it before its rank changes.")
    if layer.form.shared_parts:
        raise ValueError(
            f"{name}: the adapter trains on factors of a compressed model, whose rank {layer.form.weight_rank} stays; "
            f"got {rank!r}."
        )
    largest = min(layer.out_features, layer.in_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"{name}: rank must be an integer from 1 to {largest}, got {rank!r}.")
    adapter = layer.active_name
    layer._require_loaded(adapter)
    form, update, carry = layer.form, layer.update, Carry(optimizer)
    if rank != form.weight_rank:
        with form.restored():
            (update.shrink if rank < form.weight_rank else update.grow)(form, rank, carry)
    config = copy.copy(model.peft_config[adapter])  # another adapter may have the same object
    if config.resolved_ranks is not None:
        config.resolved_ranks = {**config.resolved_ranks, name: rank}
    if isinstance(config.plan, dict):
        layers = config.plan["layers"]
        config.plan = {**config.plan, "layers": {**layers, name: {**layers[name], "weight_rank": rank}}}
    model.peft_config[adapter] = config
