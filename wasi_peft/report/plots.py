"""Tables and plots of plans, adapters, calibrations and estimates. Plots need matplotlib, the extra `plot`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..cost.estimate import CATEGORIES, Estimate
from ..factors.calibration import Calibration
from ..linalg.spectra import rank_for_threshold
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import DENSE, FACTORS, LayerSpectrum
from ..tuner.summary import WasiSummary
from ..updates.costs import break_even_rank, dense_elements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Path = str | os.PathLike[str]
Row = dict[str, Any]

SHOWN_ENERGIES = (0.9, 0.95, 0.99)
SHOWN_DECADES = 8  # of a spectrum, below its largest energy
SPECTRA_COLUMNS = 4
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
MARKERS = "osD^vP*X<>"
MOST_TICKS = 16
FORM_TITLES = {
    FACTORS: "factors",
    "int4": "4 bits + addition",
    "int8": "8 bits + addition",
    "exact": "exact + addition",
    DENSE: "dense",
}


# -------------------------------------------------------------------- tables


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text; the keys are the header.

    Whole numbers get thousands separators, numbers in columns named "... share" are percentages.

    Example:
        >>> print(table([{"layer": "fc1", "rank": 48, "kept share": 0.5}, {"layer": "fc2", "rank": 1200}]))
        layer   rank  kept share
        fc1       48       50.0%
        fc2    1,200           -
    """
    header = list(rows[0])
    cells = [header, *([_cell(key, row.get(key)) for key in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([first.lstrip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


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


def target_rows(sizes: Mapping[str, tuple[int, int]], experts: Mapping[str, int] | None = None) -> list[Row]:
    """One row per kind of layer and shape, from (out_features, in_features) by layer name.

    Args:
        sizes: By layer name.
        experts: How many weights of that size a layer has, where it has more than one: packed experts.
    """
    places = layer_places(sizes)
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for name, size in sizes.items():
        key = places[name].kind, size
        counts[key] = counts.get(key, 0) + (experts or {}).get(name, 1)
    return [
        {
            "layers": kind,
            "count": count,
            "out": size[0],
            "in": size[1],
            "break-even rank": break_even_rank(*size),
            "parameters": count * dense_elements(*size),
        }
        for (kind, size), count in counts.items()
    ]


def plan_table(plan: WasiPlan | WasiSummary) -> str:
    """Every layer with form and rank, what it keeps and its bytes dense and stored; totals and headline at the end."""
    layers = _planned(plan)
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
        row.update({f"rank at {share:.0%}": _rank_at(spectrum, share) for share in SHOWN_ENERGIES})
        row["energy share"] = sum(spectrum.weight_energies) / total
        rows.append(row)
    return rows


def _rank_at(spectrum: LayerSpectrum, share: float) -> int:
    return rank_for_threshold(torch.tensor(spectrum.weight_energies, dtype=torch.float64), share)


def estimates_table(estimates: Mapping[str, Estimate]) -> str:
    """What a training step takes, one column per estimate; the peak also relative to the first one."""
    columns = dict(estimates)
    unit, size = byte_unit(max(estimate.peak_bytes for estimate in columns.values()))
    flop_unit, flops = _flop_unit(columns)
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
        f"training step, {flop_unit}": lambda x: x.training_flops / flops,
        f"inference, {flop_unit}": lambda x: x.inference_flops / flops,
    }
    rows = [{"": name} for name in quantities]
    for row, value in zip(rows, quantities.values(), strict=True):
        row.update({label: value(estimate) for label, estimate in columns.items()})
    return table(rows)


def _flop_unit(estimates: Mapping[str, Estimate]) -> tuple[str, int]:
    return _unit(max(estimate.training_flops for estimate in estimates.values()), FLOP_UNITS, 1000)


# -------------------------------------------------------------------- kinds of layers


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


class _Planned(NamedTuple):
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


def _planned(plan: WasiPlan | WasiSummary) -> list[_Planned]:
    layers = []
    if isinstance(plan, WasiSummary):
        for x in plan.layers:
            sizes, form = (x.out_features, x.in_features), x.update.residual or FACTORS
            break_even = x.update.break_even_rank(*sizes) + x.rank - x.weight_rank if form == FACTORS else None
            layers.append(_Planned(x.name, *sizes, x.rank, break_even, x.dense_bytes, x.stored_bytes, form))
        return layers
    for layer in plan.layers:
        sizes = layer.out_features, layer.in_features
        break_even = plan.layer_update.break_even_rank(*sizes) if layer.form == FACTORS else None
        dense, stored = plan.dense_bytes(layer), plan.stored_bytes(layer)
        planned = _Planned(layer.name, *sizes, layer.weight_rank, break_even, dense, stored, layer.form)
        layers.append(planned._replace(energy=layer.kept_energy, activation_ranks=layer.activation_ranks))
    return layers


def _spectrum_at(spectrum: LayerSpectrum, share: float) -> _Planned:
    """A layer at the rank that keeps a share of its energy."""
    sizes, rank = (spectrum.out_features, spectrum.in_features), _rank_at(spectrum, share)
    costs = spectrum.update.break_even_rank(*sizes), spectrum.dense_bytes, spectrum.stored_bytes(rank)
    return _Planned(spectrum.name, *sizes, rank, *costs)


# -------------------------------------------------------------------- plots


def require_matplotlib() -> None:
    """Raise an ImportError that says how to get matplotlib, if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'wasi_peft[plot]'") from error


def plot_plan(
    plan: WasiPlan | WasiSummary, calibration: Calibration | None = None, path: Path | None = None
) -> Figure:
    """Ranks, kept energy, bytes and input ranks over the depth of the model, a colour for each kind of layer.

    Args:
        plan: A plan, or the summary of an adapter, which knows ranks and bytes only.
        calibration: Adds the spectra of the plan's layers, with the chosen ranks marked.
        path: Where to save the figure; the ending says in which format.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the calibration does not cover a layer of the plan.
    """
    layers = _planned(plan)
    spectra = [] if calibration is None else _spectra_of(calibration, [layer.name for layer in layers])
    kinds = _Kinds([layer.name for layer in layers])
    draws = [_draw_ranks]
    if any(layer.energy is not None for layer in layers):
        draws.append(_draw_energies)
    if any(layer.activation_ranks is not None for layer in layers):
        draws.append(_draw_inputs)
    if len({layer.form for layer in layers}) > 1:
        draws.append(_draw_forms)
    draws.append(_draw_bytes)
    figure, axes = _figure(len(draws), kinds, spectra)
    for draw, ax in zip(draws, axes, strict=True):
        draw(ax, layers, kinds)
    figure.suptitle(plan.headline(), fontsize="medium")
    if spectra:
        ranks = {layer.name: layer.rank for layer in layers if layer.form == FACTORS}
        _draw_spectra(figure.subfigs[1], spectra, kinds, ranks)
    return _finished(figure, path)


def plot_calibration(calibration: Calibration, path: Path | None = None) -> Figure:
    """Energies of all layers: what their sums are and how many directions hold 95 % of them, and every spectrum.

    Raises:
        ImportError: If matplotlib is missing.
    """
    spectra = calibration.spectra()
    kinds = _Kinds([spectrum.name for spectrum in spectra])
    figure, (left, right) = _figure(2, kinds, spectra)
    layers = [_spectrum_at(x, 0.95) for x in spectra]
    _draw_ranks(left, layers, kinds)
    left.set_title("Rank that keeps 95 % of the energy (dashed: break-even)")
    kinds.draw(right, {spectrum.name: sum(spectrum.weight_energies) for spectrum in spectra})
    right.set_yscale("log")
    right.set_title("Energy: what dropping the whole layer would cost")
    _draw_spectra(figure.subfigs[1], spectra, kinds, {})
    return _finished(figure, path)


def plot_estimates(estimates: Mapping[str, Estimate], path: Path | None = None) -> Figure:
    """Memory of a training step at its peak, stacked by what it is for, and FLOPs; a bar for each estimate.

    Raises:
        ImportError: If matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 + 2.2 * len(estimates), 4.5), layout="constrained")
    memory, flops = figure.subplots(1, 2)
    unit, size = byte_unit(max(estimate.peak_bytes for estimate in estimates.values()))
    positions = range(len(estimates))
    bottoms = [0.0] * len(estimates)
    for category, color in zip(CATEGORIES, colormaps["tab10"].colors, strict=False):  # type: ignore[attr-defined]
        heights = [estimate.at_peak[category] / size for estimate in estimates.values()]
        if any(heights):
            memory.bar(positions, heights, 0.6, bottoms, label=category, color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, top in zip(positions, bottoms, strict=True):
        memory.annotate(_short(top), (position, top), (0, 3), textcoords="offset points", ha="center")
    memory.set_title(f"Peak of a training step, {unit}")
    unit, size = _flop_unit(estimates)
    for offset, name in ((-0.2, "training"), (0.2, "inference")):
        heights = [getattr(estimate, f"{name}_flops") / size for estimate in estimates.values()]
        bars = flops.bar([position + offset for position in positions], heights, 0.4, label=name)
        flops.bar_label(bars, [_short(x) for x in heights], padding=2, fontsize="small")
    flops.set_title(f"Work of a step, {unit}")
    for ax in (memory, flops):
        ax.set_xticks(list(positions), list(estimates))
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.1)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False, fontsize="small")
    return _finished(figure, path)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _spectra_of(calibration: Calibration, names: Sequence[str]) -> list[LayerSpectrum]:
    missing = [name for name in names if name not in calibration.layers]
    if missing:
        raise ValueError(f"{missing[0]}: the calibration must cover every layer of the plan ({len(missing)} missing).")
    return calibration.spectra(names)


class _Kinds:
    """Colours, markers and places of layers by kind."""

    def __init__(self, names: Sequence[str]) -> None:
        require_matplotlib()
        from matplotlib import colormaps

        self.places = layer_places(names)
        self.names = list(dict.fromkeys(place.kind for place in self.places.values()))
        colors = colormaps["tab10" if len(self.names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        self.color = {kind: colors[index % len(colors)] for index, kind in enumerate(self.names)}
        self.marker = {kind: MARKERS[index % len(MARKERS)] for index, kind in enumerate(self.names)}
        self.deepest = max(place.depth for place in self.places.values())

    def draw(self, ax: Axes, values: Mapping[str, float], **style: Any) -> None:
        """A line over depth for each kind."""
        style = {"linewidth": 1.2, "markersize": 4, "alpha": 0.85} | style
        for kind in self.names:
            points = sorted(
                (self.places[name].depth, y) for name, y in values.items() if self.places[name].kind == kind
            )
            if points:
                marker = style.get("marker", self.marker[kind])
                ax.plot(*zip(*points, strict=True), color=self.color[kind], **style | {"marker": marker})
        _label_depth(ax, self.deepest)
        ax.grid(alpha=0.3)

    def legend(self, figure: Any) -> None:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=self.color[k], marker=self.marker[k], markersize=5) for k in self.names]
        figure.legend(handles, self.names, loc="outside lower center", ncols=min(8, len(handles)), frameon=False)


def _figure(panels: int, kinds: _Kinds, spectra: Sequence[LayerSpectrum]) -> tuple[Figure, list[Axes]]:
    """A figure with panels above, two in a row, and room for the spectra below."""
    from matplotlib.figure import Figure

    heights = [3.2 * math.ceil(panels / 2) + 0.6]
    if spectra:
        heights.append(2.5 * math.ceil(len(kinds.names) / SPECTRA_COLUMNS) + 0.5)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    grid = parts[0].add_gridspec(math.ceil(panels / 2), 2)
    places = [grid[index // 2, index % 2] for index in range(panels)]
    if panels % 2:  # the last one takes its whole row
        places[-1] = grid[panels // 2, :]
    kinds.legend(parts[0])
    return figure, [parts[0].add_subplot(place) for place in places]


def _finished(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _label_depth(ax: Axes, deepest: int) -> None:
    """Ticks at blocks that exist, the first one at block 0."""
    ax.set_xlabel("block")
    ax.set_xlim(-0.6, deepest + 0.6)
    ax.set_xticks(range(0, deepest + 1, 1 + deepest // MOST_TICKS))


def _draw_ranks(ax: Axes, layers: Sequence[_Planned], kinds: _Kinds) -> None:
    kinds.draw(
        ax,
        {x.name: x.break_even for x in layers if x.break_even is not None},
        linestyle="--",
        linewidth=0.8,
        marker="",
        alpha=0.6,
    )
    kinds.draw(ax, {x.name: x.rank for x in layers if x.form != DENSE})
    ax.set_ylim(bottom=0)
    ax.set_title("Weight rank (dashed: break-even)")


def _draw_energies(ax: Axes, layers: Sequence[_Planned], kinds: _Kinds) -> None:
    kinds.draw(ax, {x.name: 100 * x.energy for x in layers if x.energy is not None})
    ax.set_title("Kept energy, %")


def _draw_inputs(ax: Axes, layers: Sequence[_Planned], kinds: _Kinds) -> None:
    kinds.draw(ax, {x.name: x.activation_ranks["feature"] for x in layers if x.activation_ranks is not None})
    exact = sum(x.activation_ranks is None and x.form == FACTORS for x in layers)
    if any(x.activation_ranks is not None for x in layers):
        ax.set_ylim(bottom=0)
    ax.set_title("Feature rank of the compressed input" + (f" ({exact} layers: not compressed)" if exact else ""))


def _draw_forms(ax: Axes, layers: Sequence[_Planned], kinds: _Kinds) -> None:
    """A row for each form, the fewest bytes at the bottom; marks of several kinds stand side by side."""
    forms = [form for form in FORM_TITLES if any(layer.form == form for layer in layers)]
    forms += sorted({layer.form for layer in layers} - set(forms))
    width = 0.8 / len(kinds.names)
    for layer in layers:
        kind, depth = kinds.places[layer.name]
        x = depth + (kinds.names.index(kind) - (len(kinds.names) - 1) / 2) * width
        ax.plot(x, forms.index(layer.form), kinds.marker[kind], color=kinds.color[kind], markersize=5, alpha=0.85)
    _label_depth(ax, kinds.deepest)
    ax.set_yticks(range(len(forms)), [FORM_TITLES.get(form, form) for form in forms])
    ax.set_ylim(-0.6, len(forms) - 0.4)
    ax.grid(alpha=0.3)
    ax.set_title("Form of each layer")


def _draw_bytes(ax: Axes, layers: Sequence[_Planned], kinds: _Kinds) -> None:
    depths = range(kinds.deepest + 1)
    dense = [0.0] * len(depths)
    stacks = {kind: [0.0] * len(depths) for kind in kinds.names}
    for layer in layers:
        kind, depth = kinds.places[layer.name]
        dense[depth] += layer.dense
        stacks[kind][depth] += layer.stored
    unit, size = byte_unit(max(dense))
    ax.bar(depths, [x / size for x in dense], 0.9, color="0.9", edgecolor="0.6", linewidth=0.6)
    bottoms = [0.0] * len(depths)
    for kind, stack in stacks.items():
        ax.bar(depths, [x / size for x in stack], 0.9, bottoms, color=kinds.color[kind])
        bottoms = [bottom + x / size for bottom, x in zip(bottoms, stack, strict=True)]
    _label_depth(ax, kinds.deepest)
    ax.set_title(f"Weights of each block, {unit} (grey: dense)")


def _draw_spectra(
    figure: SubFigure, spectra: Sequence[LayerSpectrum], kinds: _Kinds, ranks: Mapping[str, int]
) -> None:
    """A panel for each kind, a line for each layer; the deeper the layer, the lighter."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades, norm = colormaps["viridis"], Normalize(0, max(1, kinds.deepest))
    grid = figure.subplots(math.ceil(len(kinds.names) / SPECTRA_COLUMNS), SPECTRA_COLUMNS, squeeze=False, sharey=True)
    panels = dict(zip(kinds.names, grid.ravel(), strict=False))
    for ax in grid.ravel()[len(panels) :]:
        ax.remove()
    dot = {"markeredgecolor": "k", "markeredgewidth": 0.6, "markersize": 4.5, "zorder": 3}
    for spectrum in spectra:
        kind, depth = kinds.places[spectrum.name]
        positive = [energy for energy in spectrum.weight_energies if energy > 0]
        panels[kind].plot(range(1, len(positive) + 1), positive, color=shades(norm(depth)), linewidth=0.9)
        rank = ranks.get(spectrum.name)
        if rank is not None and rank <= len(positive):
            panels[kind].plot(rank, positive[rank - 1], "o", color=shades(norm(depth)), **dot)
    highest = max(spectrum.weight_energies[0] for spectrum in spectra)
    for kind, ax in panels.items():
        ax.set(title=kind, yscale="log", xlabel="rank")
        if highest > 0:
            ax.set_ylim(10.0**-SHOWN_DECADES * highest, 2 * highest)
        ax.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(norm, shades), ax=grid.ravel().tolist()[: len(panels)], label="block", aspect=40)
    figure.suptitle("Energy of each direction" + (" (dots: chosen rank)" if ranks else ""), fontsize="medium")
