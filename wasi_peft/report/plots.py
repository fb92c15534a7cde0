"""Plots of plans, adapters, calibrations and estimates. They need matplotlib, the extra `plot`."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost.estimate import CATEGORIES, Estimate
from ..factors.calibration import Calibration
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import DENSE, FACTORS, LayerSpectrum
from ..tuner.summary import WasiSummary
from .places import PlannedLayer, layer_at_share, layer_places, planned_layers
from .tables import byte_unit, flop_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Path = str | os.PathLike[str]

SHOWN_DECADES = 8  # of a spectrum, below its largest energy
SPECTRA_COLUMNS = 4
MARKERS = "osD^vP*X<>"
MOST_TICKS = 16
CATEGORY_TITLES = {
    "weights": "weights",
    "state": "kept by layers",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "saved": "saved for backward",
    "temporary": "temporary",
}
FORM_TITLES = {
    FACTORS: "factors",
    "int4": "4 bits + addition",
    "int8": "8 bits + addition",
    "exact": "exact + addition",
    DENSE: "dense",
}


def require_matplotlib() -> None:
    """Raise an ImportError that says how to get matplotlib, if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'wasi_peft[plot]'") from error


def check_format(path: Path) -> None:
    """Refuse a figure that cannot be saved.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If it does not know what the ending of the path says.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known, ending = FigureCanvasBase.get_supported_filetypes(), os.path.splitext(path)[1].lstrip(".").lower()
    if ending and ending not in known:
        raise ValueError(f"{os.fspath(path)}: a figure must end in one of {', '.join(sorted(known))}, got {ending}.")


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
    layers = planned_layers(plan)
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
    figure.suptitle(textwrap.fill(plan.headline(), 120), fontsize="medium")
    if spectra:
        ranks = {layer.name: layer.rank for layer in layers if layer.form == FACTORS}
        _draw_spectra(figure.subfigs[1], spectra, kinds, ranks)
    return finished(figure, path)


def plot_calibration(calibration: Calibration, path: Path | None = None) -> Figure:
    """Energies of all layers: what their sums are and how many directions hold 95 % of them, and every spectrum.

    Raises:
        ImportError: If matplotlib is missing.
    """
    spectra = calibration.spectra()
    kinds = _Kinds([spectrum.name for spectrum in spectra])
    figure, (left, right) = _figure(2, kinds, spectra)
    layers = [layer_at_share(x, 0.95) for x in spectra]
    _draw_ranks(left, layers, kinds)
    left.set_title("Rank that keeps 95 % of the energy (dashed: break-even)")
    kinds.draw(right, {spectrum.name: sum(spectrum.weight_energies) for spectrum in spectra})
    right.set_yscale("log")
    right.set_title("Energy: what dropping the whole layer would cost")
    _draw_spectra(figure.subfigs[1], spectra, kinds, {})
    return finished(figure, path)


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
            memory.bar(positions, heights, 0.6, bottoms, label=CATEGORY_TITLES[category], color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, top in zip(positions, bottoms, strict=True):
        memory.annotate(_short(top), (position, top), (0, 3), textcoords="offset points", ha="center")
    memory.set_title(f"Peak of a training step, {unit}")
    unit, size = flop_unit(estimates)
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
    return finished(figure, path)


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


def finished(figure: Figure, path: Path | None) -> Figure:
    """The figure, saved where a path is given."""
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _label_depth(ax: Axes, deepest: int) -> None:
    """Ticks at blocks that exist, the first one at block 0."""
    ax.set_xlabel("block")
    ax.set_xlim(-0.6, deepest + 0.6)
    ax.set_xticks(range(0, deepest + 1, 1 + deepest // MOST_TICKS))


def _draw_ranks(ax: Axes, layers: Sequence[PlannedLayer], kinds: _Kinds) -> None:
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


def _draw_energies(ax: Axes, layers: Sequence[PlannedLayer], kinds: _Kinds) -> None:
    kinds.draw(ax, {x.name: 100 * x.energy for x in layers if x.energy is not None})
    ax.set_title("Kept energy, %")


def _draw_inputs(ax: Axes, layers: Sequence[PlannedLayer], kinds: _Kinds) -> None:
    kinds.draw(ax, {x.name: x.activation_ranks["feature"] for x in layers if x.activation_ranks is not None})
    exact = sum(x.activation_ranks is None and x.form == FACTORS for x in layers)
    if any(x.activation_ranks is not None for x in layers):
        ax.set_ylim(bottom=0)
    ax.set_title("Feature rank of the compressed input" + (f" ({exact} layers: not compressed)" if exact else ""))


def _draw_forms(ax: Axes, layers: Sequence[PlannedLayer], kinds: _Kinds) -> None:
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


def _draw_bytes(ax: Axes, layers: Sequence[PlannedLayer], kinds: _Kinds) -> None:
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
    # once more on top, where blocks keep more than their dense weights
    ax.bar(depths, [x / size for x in dense], 0.9, fill=False, edgecolor="0.4", linewidth=0.6)
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
