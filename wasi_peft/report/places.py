"""Kinds and blocks of layers, told by their names; and what tables and plots say of a planned layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..linalg.spectra import rank_for_threshold
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import FACTORS, LayerSpectrum
from ..tuner.summary import WasiSummary


class Place(NamedTuple):
    """Where a layer is in a model: its kind, such as "fc1", and the index of its block."""

    kind: str
    depth: int


def layer_places(names: Iterable[str]) -> dict[str, Place]:
    """Kind and depth of every layer, told by its name: layers of one kind differ in block numbers only.

    Example:
        >>> layer_places(["block.0.fc1", "block.0.fc2", "block.1.fc1"])["block.1.fc1"]
        Place(kind='fc1', depth=1)
    """
    patterns = {name: tuple("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    labels = _kind_labels(set(patterns.values()))
    stems: dict[tuple[str, ...], int] = {}
    blocks = {}
    for name, pattern in patterns.items():
        stem = pattern[: pattern.index("*")] if "*" in pattern else pattern
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        blocks[name] = stems.setdefault(stem, len(stems)), numbers
    depths = {block: depth for depth, block in enumerate(sorted(set(blocks.values())))}
    return {name: Place(labels[pattern], depths[blocks[name]]) for name, pattern in patterns.items()}


def _kind_labels(patterns: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest end of each pattern that no other one has; block numbers in it are left out."""
    labels = {}
    for pattern in patterns:
        others = patterns - {pattern}
        count = 1
        while count < len(pattern) and any(other[-count:] == pattern[-count:] for other in others):
            count += 1
        runs = ".".join(pattern[-count:]).split("*")
        label = "…".join(part for part in (runs[0].strip("."), runs[-1].strip(".")) if part)
        labels[pattern] = label if len(runs) > 1 else ".".join(pattern[-count:])
    if len(set(labels.values())) < len(labels):
        return {pattern: ".".join(pattern) for pattern in patterns}
    return labels


class PlannedLayer(NamedTuple):
    """A layer of a plan, or of an adapter, whose energy is not known.

    `rank` is that of the headline: K in a plan, and in an adapter with the directions that train beside the K. So is
    `break_even`, None for another form than factors. `dense` and `stored` count bytes.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    break_even: int | None
    dense: int
    stored: int
    form: str = FACTORS
    energy: float | None = None
    activation_ranks: dict[str, int] | None = None


def planned_layers(plan: WasiPlan | WasiSummary) -> list[PlannedLayer]:
    """The layers of a plan or of an adapter."""
    layers = []
    if isinstance(plan, WasiSummary):
        for x in plan.layers:
            sizes, form = (x.out_features, x.in_features), x.update.residual or FACTORS
            break_even = x.update.break_even_rank(*sizes) + x.rank - x.weight_rank if form == FACTORS else None
            layers.append(PlannedLayer(x.name, *sizes, x.rank, break_even, x.dense_bytes, x.stored_bytes, form))
        return layers
    for layer in plan.layers:
        sizes = layer.out_features, layer.in_features
        break_even = plan.layer_update.break_even_rank(*sizes) if layer.form == FACTORS else None
        dense, stored = plan.dense_bytes(layer), plan.stored_bytes(layer)
        planned = PlannedLayer(layer.name, *sizes, layer.weight_rank, break_even, dense, stored, layer.form)
        layers.append(planned._replace(energy=layer.kept_energy, activation_ranks=layer.activation_ranks))
    return layers


def layer_at_share(spectrum: LayerSpectrum, share: float) -> PlannedLayer:
    """A layer at the rank that keeps a share of its energy."""
    sizes, rank = (spectrum.out_features, spectrum.in_features), rank_at_share(spectrum, share)
    costs = spectrum.update.break_even_rank(*sizes), spectrum.dense_bytes, spectrum.stored_bytes(rank)
    return PlannedLayer(spectrum.name, *sizes, rank, *costs)


def rank_at_share(spectrum: LayerSpectrum, share: float) -> int:
    """Rank that keeps a share of a layer's energy."""
    return rank_for_threshold(torch.tensor(spectrum.weight_energies, dtype=torch.float64), share)
