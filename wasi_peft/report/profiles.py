"""Tables and a plot of step profiles, several side by side. The plot needs matplotlib, the extra `plot`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..cost.estimate import CATEGORIES
from ..cost.profile import MILLI, TRAINING, Cost, StepProfile
from ..cost.trace import KINDS
from .plots import CATEGORY_TITLES, Path, _short, finished, require_matplotlib
from .tables import Row, byte_unit, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPINGS: dict[str, Callable[[StepProfile], dict[str, Cost]]] = {
    "class": StepProfile.by_class,
    "block": StepProfile.by_block,
    "module": StepProfile.by_module,
}


def profiles_table(profiles: Mapping[str, StepProfile]) -> str:
    """Time and memory of a step, one column per profile; step, inference and peak also relative to the first one."""
    baseline = next(iter(profiles))
    unit = byte_unit(max(profile.peak_bytes for profile in profiles.values()))
    columns = {label: _quantities(profile, baseline, profiles[baseline], unit) for label, profile in profiles.items()}
    names = next(iter(columns.values()))
    return table([{"": name} | {label: column[name] for label, column in columns.items()} for name in names])


def _quantities(profile: StepProfile, baseline: str, first: StepProfile, unit: tuple[str, int]) -> Row:
    name, size = unit
    return {
        **{f"{phase}, ms": getattr(profile, f"{phase}_seconds") * MILLI for phase in TRAINING},
        "step, ms": profile.step_seconds * MILLI,
        f"step, of {baseline}": f"{profile.step_seconds / first.step_seconds:.1%}",
        **{f"of it {kind}, ms": seconds * MILLI for kind, seconds in profile.seconds_by_kind.items()},
        "inference, ms": profile.inference_seconds * MILLI,
        f"inference, of {baseline}": f"{profile.inference_seconds / first.inference_seconds:.1%}",
        f"saved for backward, {name}": profile.saved_bytes / size,
        f"peak, {name}": profile.peak_bytes / size,
        f"peak, of {baseline}": f"{profile.peak_bytes / first.peak_bytes:.1%}",
        **{f"of it {category}, {name}": held / size for category, held in profile.at_peak.items()},
    }


def costs_table(profile: StepProfile, by: str = "class") -> str:
    """Time of a step and bytes kept for backward by "class", "block" or "module"; the latter by operation too.

    Groups that take neither are left out.

    Raises:
        ValueError: If `by` is none of these.
    """
    if by not in GROUPINGS:
        raise ValueError(f"by must be one of {', '.join(map(repr, GROUPINGS))}, got {by!r}.")
    unit, size = byte_unit(profile.saved_bytes)
    rows: list[Row] = [
        {
            by: name or "(model)",
            "forward, ms": cost.forward_seconds * MILLI,
            "backward, ms": cost.backward_seconds * MILLI,
            "inference, ms": cost.inference_seconds * MILLI,
            f"saved, {unit}": cost.saved_bytes / size,
        }
        for name, cost in GROUPINGS[by](profile).items()
        if cost != Cost()
    ]
    saved: list[Row] = [
        {"saved for backward by": name, unit: bytes_ / size, "share": bytes_ / profile.saved_bytes}
        for name, bytes_ in profile.saved_by_operation.items()
    ]
    return "\n\n".join(table(part) for part in (rows, saved) if part)


def plot_profiles(profiles: Mapping[str, StepProfile], path: Path | None = None) -> Figure:
    """Memory in the course of a step, stacked by category, and bars of time by kind of operation.

    Args:
        profiles: Profiles by label; those of one model and batch can be compared.
        path: Where to save the figure; the ending says in which format.

    Raises:
        ImportError: If matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9, 4.2 * len(profiles)), 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    unit, size = byte_unit(max(profile.peak_bytes for profile in profiles.values()))
    panels = above.subplots(1, len(profiles), sharey=True, squeeze=False)[0].tolist()
    for ax, (label, profile) in zip(panels, profiles.items(), strict=True):
        _draw_timeline(ax, profile, size)
        ax.set_title(f"{label}: peak {_short(profile.peak_bytes / size)} {unit}")
    panels[0].set_ylabel(f"held, {unit}")
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    left, right = below.subplots(1, 2)
    _draw_bars(left, {label: profile.seconds_by_kind for label, profile in profiles.items()})
    left.set_title("Training step, ms")
    _draw_bars(right, {label: profile.inference_seconds_by_kind for label, profile in profiles.items()})
    right.set_title("Inference, ms")
    below.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize="small"
    )
    return finished(figure, path)


def _draw_timeline(ax: Axes, profile: StepProfile, size: int) -> None:
    from matplotlib import colormaps

    moments = profile.timeline
    stacks = [[moment.held[name] / size for moment in moments] for name in CATEGORIES]
    colors = colormaps["tab10"].colors[: len(CATEGORIES)]  # type: ignore[attr-defined]
    ax.stackplot(range(len(moments)), stacks, labels=CATEGORY_TITLES.values(), colors=colors)
    begin = 0
    for name, group in itertools.groupby(moments, key=lambda moment: moment.phase):
        ax.axvline(begin, color="0.4", linewidth=0.8, linestyle=":")
        ax.annotate(name, (begin, 1), (2, -8), xycoords=("data", "axes fraction"), textcoords="offset points", size=7)
        begin += len(list(group))
    ax.set_xticks([])
    ax.set_xlabel("allocations, in order")
    ax.margins(x=0, y=0.08)


def _draw_bars(ax: Axes, seconds: Mapping[str, Mapping[str, float]]) -> None:
    from matplotlib import colormaps

    positions = range(len(seconds))
    bottoms = [0.0] * len(seconds)
    for kind, color in zip(KINDS, colormaps["Set2"].colors, strict=False):  # type: ignore[attr-defined]
        heights = [MILLI * kinds[kind] for kinds in seconds.values()]
        ax.bar(positions, heights, 0.6, bottoms, label=kind, color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, top in zip(positions, bottoms, strict=True):
        ax.annotate(_short(top), (position, top), (0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(list(positions), list(seconds))
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.1)
