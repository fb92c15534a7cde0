"""A plan or an adapter in a few lines: layers of one kind and form together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..hub.headers import StoredLayer
from ..ranks.plan import WasiPlan
from ..tuner.summary import WasiSummary
from .places import PlannedLayer, layer_places, planned_layers
from .tables import Row, byte_unit, table


def kinds_table(plan: WasiPlan | WasiSummary) -> str:
    """One line for the layers of a kind that have one form: in which blocks, their ranks, the least energy kept.

    What :func:`tables.plan_table` says of every layer, in sums and ranges; totals and headline at the end.

    Example:
        >>> from wasi_peft.ranks.plan import LayerPlan
        >>> layers = [LayerPlan(f"blocks.{index}.fc", 64, 64, 8 + index, None, 0.9) for index in range(3)]
        >>> print(kinds_table(WasiPlan(tuple(layers))).splitlines()[1])
        fc          3     0-2   64  64  factors  8-10         90.0%  exact       48.00        13.50
    """
    layers = planned_layers(plan)
    places = layer_places([layer.name for layer in layers])
    unit, size = byte_unit(sum(layer.dense for layer in layers))
    planned = isinstance(plan, WasiPlan)
    inputs = {x.name: plan.input_kept(x) for x in plan.layers} if isinstance(plan, WasiPlan) else {}
    experts = {x.name: x.experts for x in plan.layers}
    groups: dict[tuple[Any, ...], list[PlannedLayer]] = {}
    for layer in layers:
        sizes = experts[layer.name], layer.out_features, layer.in_features
        groups.setdefault((places[layer.name].kind, *sizes, layer.form), []).append(layer)
    kinds = list(dict.fromkeys(kind for kind, *_ in groups))
    rows = []
    for (kind, several, out_features, in_features, form), group in sorted(
        groups.items(), key=lambda item: kinds.index(item[0][0])
    ):
        row: Row = {"layers": kind, "count": len(group)}
        row["blocks"] = ranges(sorted(places[layer.name].depth for layer in group))
        row |= {"experts": several} if max(experts.values()) > 1 else {}
        row |= {"out": out_features, "in": in_features, "form": form}
        row["rank"] = _span([layer.rank for layer in group])
        if planned:
            row["energy share"] = min(layer.energy or 0.0 for layer in group)
            row["input"] = _inputs([inputs[layer.name] for layer in group])
        row[f"dense, {unit}"] = sum(layer.dense for layer in group) / size
        row[f"stored, {unit}"] = sum(layer.stored for layer in group) / size
        rows.append(row)
    total: Row = dict.fromkeys(rows[0], "")
    total |= {"layers": "all", "count": len(layers)}
    total[f"dense, {unit}"] = sum(layer.dense for layer in layers) / size
    total[f"stored, {unit}"] = sum(layer.stored for layer in layers) / size
    return f"{table([*rows, total])}\n{plan.headline()}"


def stored_rows(layers: Sequence[StoredLayer], unit: str, size: int, every: bool) -> list[Row]:
    """Rows for :func:`tables.table` of what a compressed checkpoint stores, a layer each or a kind and form.

    Args:
        layers: All of them.
        unit: Of bytes.
        size: Bytes of the unit.
        every: Whether each layer gets a row.
    """
    stored = f"stored, {unit}"
    if every:
        return [{"layer": x.name, "form": x.form, "rank": x.rank, stored: x.stored_bytes / size} for x in layers]
    places = layer_places([layer.name for layer in layers])
    groups: dict[tuple[str, str], list[StoredLayer]] = {}
    for layer in layers:
        groups.setdefault((places[layer.name].kind, layer.form), []).append(layer)
    return [
        {
            "layers": kind,
            "count": len(group),
            "blocks": ranges(sorted(places[layer.name].depth for layer in group)),
            "form": form,
            "rank": _span([layer.rank for layer in group]),
            stored: sum(layer.stored_bytes for layer in group) / size,
        }
        for (kind, form), group in groups.items()
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words, neighbours together.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    starts = [numbers[0], *(after for before, after in pairwise(numbers) if after > before + 1)]
    ends = [*(before for before, after in pairwise(numbers) if after > before + 1), numbers[-1]]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def _inputs(texts: Sequence[str]) -> str:
    """What the layers keep of their inputs: "feature 16, token 1" and "feature 20, token 2" as "feature, token"."""
    kept = list(dict.fromkeys(texts))
    if len(kept) > 1:
        kept = list(dict.fromkeys(", ".join(part.split()[0] for part in text.split(", ")) for text in kept))
    return " or ".join(kept)
