"""Tables of plans, adapters, calibrations and estimates, as text, by rich and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost.estimate import Estimate
from ..factors.calibration import Calibration
from ..ranks.plan import WasiPlan
from ..tuner.summary import WasiSummary
from ..updates.costs import break_even_rank, dense_elements
from .places import layer_places, planned_layers, rank_at_share

if TYPE_CHECKING:
    from rich.text import Text

Row = dict[str, Any]

SHOWN_ENERGIES = (0.9, 0.95, 0.99)
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
STYLES = {  # of a terminal
    r"(?:\A|\n\n).+\n": "bold",  # headers
    r"(?m)^all\b.*$": "bold",
    r"\bfactors\b": "green",
    r"\b(int8|int4)\b": "cyan",
    r"\bdense(?= +\d)": "dim",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text; the keys are the header.

    Whole numbers get thousands separators, numbers in columns named "... share" are percentages.

    Example:
        >>> print(table([{"layer": "fc1", "rank": 48, "kept share": 0.5}, {"layer": "fc2", "rank": 1200}]))
        layer   rank  kept share
        fc1       48       50.0%
        fc2    1,200           -
    """
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([first.lstrip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown.

    Example:
        >>> print(markdown_table([{"layer": "fc1", "rank": 48}, {"layer": "fc2", "rank": 1200}]))
        | layer | rank |
        | --- | ---: |
        | fc1 | 48 |
        | fc2 | 1,200 |
    """
    header, *lines = _cells(rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows in colour where standard output is a terminal, in Markdown where it is none."""
    if not sys.stdout.isatty():
        print(markdown_table(rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, *lines = _cells(rows)
    shown = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for index, title in enumerate(header):
        shown.add_column(title, justify="right" if index else "left", style=None if index else "cyan")
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)


def coloured(text: str) -> Text:
    """A table as `table` gives it, with the colours of a terminal: header, forms, totals."""
    from rich.text import Text

    lines = Text(text)
    for pattern, style in STYLES.items():
        lines.highlight_regex(pattern, style)
    return lines


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    header = list(rows[0])
    return [header, *([_cell(key, row.get(key)) for key in header] for row in rows)]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}" if key.endswith("share") else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def byte_unit(largest: float) -> tuple[str, int]:
    """Name and size of the largest unit in which `largest` bytes are at least 10.

    Example:
        >>> byte_unit(5 * 2**20), byte_unit(50 * 2**20)
        (('KiB', 1024), ('MiB', 1048576))
    """
    return _unit(largest, BYTE_UNITS, 1024)


def _unit(largest: float, names: Sequence[str], base: int) -> tuple[str, int]:
    power = 0
    while power + 1 < len(names) and largest >= 10 * base ** (power + 1):
        power += 1
    return names[power], base**power


def target_rows(
    sizes: Mapping[str, tuple[int, int]], experts: Mapping[str, int] | None = None, every: bool = False
) -> list[Row]:
    """One row per kind of layer and shape, from (out_features, in_features) by layer name.

    Args:
        sizes: By layer name.
        experts: How many weights of that size a layer has, where it has more than one: packed experts.
        every: Whether each layer gets a row instead.
    """
    counts = {name: (experts or {}).get(name, 1) for name in sizes}
    if every:
        several = max(counts.values(), default=1) > 1
        return [
            {"layer": name, **({"experts": counts[name]} if several else {}), **_target_row(counts[name], size)}
            for name, size in sizes.items()
        ]
    places = layer_places(sizes)
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for name, size in sizes.items():
        key = places[name].kind, size
        kinds[key] = kinds.get(key, 0) + counts[name]
    return [{"layers": kind, "count": count, **_target_row(count, size)} for (kind, size), count in kinds.items()]


def _target_row(count: int, size: tuple[int, int]) -> Row:
    sizes = {"out": size[0], "in": size[1], "break-even rank": break_even_rank(*size)}
    return {**sizes, "parameters": count * dense_elements(*size)}


def plan_table(plan: WasiPlan | WasiSummary) -> str:
    """Every layer with form and rank, what it keeps and its bytes dense and stored; totals and headline at the end."""
    layers = planned_layers(plan)
    unit, size = byte_unit(sum(layer.dense for layer in layers))
    inputs = {x.name: plan.input_kept(x) for x in plan.layers} if isinstance(plan, WasiPlan) else {}
    experts = {x.name: x.experts for x in plan.layers}
    rows = []
    for layer in layers:
        row: Row = {"layer": layer.name}
        row |= {"experts": experts[layer.name]} if max(experts.values()) > 1 else {}
        row |= {"out": layer.out_features, "in": layer.in_features}
        row |= {"form": layer.form, "rank": layer.rank, "break-even": layer.break_even}
        if inputs:
            row["energy share"] = layer.energy
            row["input"] = inputs[layer.name]
        row[f"dense, {unit}"], row[f"stored, {unit}"] = layer.dense / size, layer.stored / size
        rows.append(row)
    total: Row = dict.fromkeys(rows[0], "")
    total["layer"] = "all"
    total[f"dense, {unit}"] = sum(layer.dense for layer in layers) / size
    total[f"stored, {unit}"] = sum(layer.stored for layer in layers) / size
    return f"{table([*rows, total])}\n{plan.headline()}"


def calibration_rows(calibration: Calibration) -> list[Row]:
    """One row per layer: the ranks that keep 90, 95 and 99 % of its energy, and its share of all energy."""
    spectra = calibration.spectra()
    total = sum(sum(spectrum.weight_energies) for spectrum in spectra) or 1.0
    rows = []
    several = any(spectrum.experts > 1 for spectrum in spectra)
    for spectrum in spectra:
        row: Row = {"layer": spectrum.name, **({"experts": spectrum.experts} if several else {})}
        row |= {"out": spectrum.out_features, "in": spectrum.in_features}
        row["break-even"] = spectrum.update.break_even_rank(spectrum.out_features, spectrum.in_features)
        row.update({f"rank at {share:.0%}": rank_at_share(spectrum, share) for share in SHOWN_ENERGIES})
        row["energy share"] = sum(spectrum.weight_energies) / total
        rows.append(row)
    return rows


def estimates_table(estimates: Mapping[str, Estimate]) -> str:
    """What a training step takes, one column per estimate; the peak also relative to the first one."""
    columns = dict(estimates)
    unit, size = byte_unit(max(estimate.peak_bytes for estimate in columns.values()))
    work_unit, flops = flop_unit(columns)
    baseline, estimate = next(iter(columns.items()))
    first = estimate.peak_bytes
    quantities: dict[str, Callable[[Estimate], Any]] = {
        f"weights, {unit}": lambda x: x.weights_bytes / size,
        f"kept by layers, {unit}": lambda x: x.state_bytes / size,
        f"gradients, {unit}": lambda x: x.gradients_bytes / size,
        f"optimizer, {unit}": lambda x: x.optimizer_bytes / size,
        f"saved for backward, {unit}": lambda x: x.saved_bytes / size,
        f"temporary, {unit}": lambda x: x.temporary_bytes / size,
        f"peak, {unit}": lambda x: x.peak_bytes / size,
        f"peak, of {baseline}": lambda x: f"{x.peak_bytes / first:.1%}",
        f"training step, {work_unit}": lambda x: x.training_flops / flops,
        f"inference, {work_unit}": lambda x: x.inference_flops / flops,
    }
    rows = [{"": name} for name in quantities]
    for row, value in zip(rows, quantities.values(), strict=True):
        row.update({label: value(estimate) for label, estimate in columns.items()})
    return table(rows)


def flop_unit(estimates: Mapping[str, Estimate]) -> tuple[str, int]:
    """Name and size of the unit for the work of the largest step."""
    return _unit(max(estimate.training_flops for estimate in estimates.values()), FLOP_UNITS, 1000)
