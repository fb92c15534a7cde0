"""A plot of the Trainer's log: losses, and what `WasiCallback` adds to it. It needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .plots import Path, finished, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: dict[str, dict[str, str]] = {  # title -> key of the log -> label
    "Loss": {"loss": "training", "eval_loss": "evaluation"},
    "Weight rank": {"wasi/rank_max": "largest", "wasi/rank_mean": "mean", "wasi/rank_min": "smallest"},
    "How far subspaces turned since the last point, from 0 to 1": {
        "wasi/weight_drift": "weights",
        "wasi/activation_drift": "inputs",
    },
    "Energy of the inputs that their compressed copies keep, %": {
        "wasi/activation_energy_mean": "mean of the layers",
        "wasi/activation_energy_min": "layer that keeps least",
    },
    "Ranks that 99 % of the weights' energy takes, %": {"wasi/weight_rank_used": "mean of the layers"},
}


def plot_training(log_history: Sequence[Mapping[str, Any]], path: Path | None = None) -> Figure:
    """Draws what `trainer.state.log_history` holds over the steps, a panel for each quantity that changes.

    Args:
        log_history: The Trainer's log; with a `WasiCallback` also ranks, drift and kept energy.
        path: Where to save the figure; the ending says in which format.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the log holds none of these quantities.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {}
    for title, labels in PANELS.items():
        scale = 100 if title.endswith("%") else 1
        points = {
            label: [(line["step"], scale * line[key]) for line in log_history if key in line]
            for key, label in labels.items()
        }
        points = {label: line for label, line in points.items() if line}
        changes = any(y != line[0][1] for line in points.values() for _, y in line)
        if points and (changes or title == "Loss"):
            panels[title] = points
    if not panels:
        raise ValueError("log_history must hold a loss or what WasiCallback logs, got none.")
    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    for ax, (title, points) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for label, line in points.items():
            ax.plot(*zip(*line, strict=True), "o-", markersize=3.5, linewidth=1.2, label=label)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        if len(points) > 1:
            ax.legend(frameon=False, fontsize="small")
    return finished(figure, path)
