"""What dense and WASI cost against weight rank, batch size and tokens, and where WASI stops paying.

A ViT of a few blocks, by default of DINOv2-small's width; one variable moves at a time, the others stay at a default
(the sweep "image" is that of the tokens with a single image, to find the fewest rows at which a step pays).
Random weights and images: costs do not depend on values, since all ranks are fixed. Every gain is dense over WASI
(`update="low_rank"`), above 1 where WASI is better:

* step, inference: median over interleaved rounds of the ratio of the seconds in a round. Bases of compressed inputs
  move in one step of eight, which a median does not see; step_mean and inference_mean are gains of the sum over all
  rounds, and eight rounds have exactly one such step;
* peak_memory: tracked peak of two complete steps, everything counted; deterministic;
* training_flops, inference_flops: of the whole model, attention included; deterministic.

The rank is the total width K + update_rank of the factors as a share of min(out, in), past break-even too. Where a
gain is 1 is interpolated between neighbouring points, the cost relative to dense taken as linear in between.

The sweep "activations" is about the Linear layers of ViT-B/32 alone, by the paper's accounting (arXiv 2510.09160): the
inputs that they keep for backward, 4 bytes an element, once for every layer that reads them (so the input of q, k and
v counts three times, on both sides); also with every tensor counted once, as it is kept. Both without and with the
`update_rank` exact numbers a row that `update="low_rank"` keeps in every layer for B besides, and which ranks save 62
times. Whether training works at such ranks is another question (finetune_accuracy.py).

Sweeps that are in the results with the same settings are not run again. Results: docs/benchmarks/cost_curves.json
and .png. Run it on an idle machine, about ten minutes::

    python benchmarks/cost_curves.py
    python benchmarks/cost_curves.py --rounds 0     # what is deterministic only
"""

import argparse
import copy
import functools
import itertools
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import wasi_peft
from common import (
    RESULTS_FOLDER,
    Batch,
    adamw,
    add_entry,
    cache_dir,
    environment,
    inference,
    interleaved_seconds,
    median_ratio,
    read_json,
    step_peak_bytes,
    training_step,
    vit_b32,
)
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.updates import make_update
from wasi_peft.updates.costs import input_elements

RESULTS = RESULTS_FOLDER / "cost_curves.json"
MIB = 2**20
HEAD = 64  # features of an attention head
PATCH = 8  # a third of DINOv2's embedding for a third of its blocks
UPDATE_RANK = make_update("low_rank").side_rank
SEEDS = {"weights": 0, "batch": 1}
SWEEPS = {  # what moves, as the axis says it
    "rank": "(K + update_rank) / min(out, in)",
    "batch": "images in a batch",
    "tokens": "tokens of an image",
    "image": "tokens of the only image",
    "activations": "feature rank",
}
CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # gains that are drawn
    "step": ("step time", {"color": "C0", "marker": "."}),
    "training_flops": ("FLOPs of a step", {"color": "C0", "linestyle": "--"}),
    "inference": ("inference time", {"color": "C1", "marker": "."}),
    "inference_flops": ("FLOPs of inference", {"color": "C1", "linestyle": "--"}),
    "peak_memory": ("peak memory of a step", {"color": "C2", "marker": "."}),
}
Ranks = dict[str, int]
Point = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of the models, and the values of the sweeps.

    Attributes:
        width: Of the models; MLPs are four times as wide.
        blocks: Of every model.
        activation_ranks: Features of an input that are kept.
        default: Values of what does not move; the sweep "image" has one image.
        values: Values of what moves, by sweep.
        paper_blocks: Blocks of ViT-B/32 in the paper's accounting.
        paper_ranks: Activation ranks by mode that are reported there.
    """

    width: int
    blocks: int
    activation_ranks: int
    default: dict[str, Any]
    values: dict[str, list[Any]]
    paper_blocks: int
    paper_ranks: list[Ranks]


FULL = Scale(
    width=384,
    blocks=4,
    activation_ranks=48,
    default={"rank": 0.25, "batch": 16, "tokens": 128},
    values={
        "rank": [1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1],
        "batch": [1, 2, 4, 8, 16, 32, 64],
        "tokens": [16, 32, 64, 128, 256, 512],
        "image": [2, 4, 8, 16, 32, 64, 128],
    },
    paper_blocks=12,
    paper_ranks=[
        {"feature": 48},
        {"feature": 15},
        {"feature": 48, "token": 25},
        {"feature": 48, "token": 10},
        {"feature": 48, "token": 25, "batch": 32},
        {"feature": 48, "token": 10, "batch": 32},
    ],
)
QUICK = Scale(
    width=64,
    blocks=1,
    activation_ranks=8,
    default={"rank": 0.5, "batch": 4, "tokens": 17},
    values={"rank": [0.5, 1], "batch": [1, 4], "tokens": [5, 17], "image": [2, 5]},
    paper_blocks=1,
    paper_ranks=[{"feature": 48, "token": 10}],
)

# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------


# The batch sweep asks for the same two models again and again, and decompositions take seconds. They are never run.
@functools.lru_cache(maxsize=2)
def build(width: int, blocks: int, tokens: int, share: float | None, mode: str, activation_ranks: int) -> nn.Module:
    """A ViT that sees that many tokens, the class token among them; dense where `share` is None.

    Raises:
        ValueError: If the share leaves no direction beside those of the update.
    """
    torch.manual_seed(SEEDS["weights"])
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // HEAD, intermediate_size=4 * width,
        image_size=(PATCH, PATCH * (tokens - 1)), patch_size=PATCH, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    if share is None:
        return model
    rank = int(share * width) - UPDATE_RANK  # no side of a layer is smaller than the width
    if rank < 1:
        raise ValueError(f"share * width must be at least update_rank + 1 = {UPDATE_RANK + 1}, got {share * width}.")
    adapter = wasi_peft.WasiConfig(
        weight_rank=rank,
        update="low_rank",
        activation_threshold=None,
        activation_ranks=activation_ranks,
        memory_mode=mode,
        modules_to_save=["classifier"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain factors and ranks past break-even are what is meant here
        return peft.get_peft_model(model, adapter)


def noise(samples: int, tokens: int) -> Batch:
    """Images of one row of patches, with labels."""
    generator = torch.Generator().manual_seed(SEEDS["batch"])
    pixels = torch.randn(samples, 3, PATCH, PATCH * (tokens - 1), generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(10, (samples,), generator=generator)}


def measure(
    width: int, scale: Scale, samples: int, tokens: int, shares: Sequence[float], mode: str, rounds: int
) -> list[Point]:
    """Costs and gains at each rank, all measured in the same rounds as the dense model."""
    batch = noise(samples, tokens)
    models = {
        "dense" if share is None else f"{share:g}": build(
            width, scale.blocks, tokens, share, mode, scale.activation_ranks
        )
        for share in (None, *shares)
    }
    costs = {name: count(model, batch) for name, model in models.items()}
    gains = {
        name: {cost.removesuffix("_bytes"): costs["dense"][cost] / own[cost] for cost in own}
        for name, own in costs.items()
    }
    if rounds:
        twins = copy.deepcopy(models)
        steps = {name: functools.partial(training_step, twin, adamw(twin), batch) for name, twin in twins.items()}
        passes = {name: functools.partial(inference, twin, batch) for name, twin in twins.items()}
        for kind, tasks in (("step", steps), ("inference", passes)):
            seconds = interleaved_seconds(tasks, rounds, description=f"{samples} x {tokens}: {kind}")
            for name in models:
                costs[name][f"{kind}_seconds"] = seconds[name]
                gains[name][kind] = median_ratio(seconds, name, "dense")
                gains[name][f"{kind}_mean"] = sum(seconds["dense"]) / sum(seconds[name])
    sizes = {"batch": samples, "tokens": tokens, "dense": costs["dense"]}
    return [{"rank": share, **sizes, "wasi": costs[f"{share:g}"], "gains": gains[f"{share:g}"]} for share in shares]


def count(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What is deterministic: the measured peak, and FLOPs."""
    estimate = wasi_peft.estimate_wasi(model, batch=batch)
    return {
        "peak_memory_bytes": step_peak_bytes(model, adamw, batch),
        "training_flops": estimate.training_flops,
        "inference_flops": estimate.inference_flops,
    }


def variable(sweep: str, scale: Scale) -> tuple[str, dict[str, Any]]:
    """What moves in a sweep, and the values of the others."""
    moving = "tokens" if sweep == "image" else sweep
    values = {**scale.default, "batch": 1} if sweep == "image" else scale.default
    return moving, {name: value for name, value in values.items() if name != moving}


def sweep_curve(sweep: str, width: int, scale: Scale, mode: str, rounds: int) -> dict[str, Any]:
    """All points of one sweep, and where the gains are 1."""
    moving, fixed = variable(sweep, scale)
    points: list[Point] = []
    for value in [None] if sweep == "rank" else scale.values[sweep]:
        samples, tokens = (value if moving == name else fixed[name] for name in ("batch", "tokens"))
        shares = scale.values["rank"] if value is None else [fixed["rank"]]
        points += measure(width, scale, samples, tokens, shares, mode, rounds)
        for point in points[-len(shares) :]:
            gains = ", ".join(f"{name} {gain:.2f}" for name, gain in point["gains"].items())
            print(f"  {moving} {point[moving]:g}: {gains}", flush=True)
    against = [point["rank"] if sweep == "rank" else point["batch"] * point["tokens"] for point in points]
    return {
        "moving": moving,
        "fixed": fixed,
        "points": points,
        "crossovers_against": "rank" if sweep == "rank" else "batch * tokens",
        "crossovers": {
            name: crossover(against, [point["gains"][name] for point in points]) for name in points[0]["gains"]
        },
    }


def crossover(values: Sequence[float], gains: Sequence[float]) -> dict[str, Any]:
    """Where a gain passes 1, from the lowest value up, and in words where WASI pays.

    Example:
        >>> crossover([0.25, 0.75], [2.0, 2 / 3])
        {'at': [0.5], 'pays': 'up to 0.5'}
    """
    at: list[float] = []
    ranges: list[str] = []
    for (low, before), (high, after) in itertools.pairwise(zip(values, gains, strict=True)):
        if (before >= 1) != (after >= 1):
            at.append(low + (high - low) * (1 - 1 / before) / (1 / after - 1 / before))
            number = f"{at[-1]:.3g}" if at[-1] < 10 else f"{at[-1]:.0f}"
            ranges.append(f"{'up to' if before >= 1 else 'from'} {number}")
    unchanged = f"{'everywhere' if gains[0] >= 1 else 'nowhere'} from {values[0]:g} to {values[-1]:g}"
    return {"at": at, "pays": ", ".join(ranges) or unchanged}


# ---------------------------------------------------------------------------------------------------------------------
# Activation memory of Linear layers, the paper's accounting
# ---------------------------------------------------------------------------------------------------------------------

ASKED_RATIO = 62
PAPER_SAMPLES = 128
LAYERS = 6  # of a block: q, k, v, o, fc1, and fc2, which alone reads the wide input
SEARCHES: list[tuple[Ranks, str]] = [  # what is given, and the mode whose rank is sought
    ({}, "feature"),
    ({"token": 10}, "feature"),
    ({"token": 10, "batch": 32}, "feature"),
    ({"feature": 48}, "token"),
    ({"feature": 48, "token": 25}, "batch"),
]


def tokens_of(config: Any) -> int:
    """Tokens of an image, the class token among them."""
    return (config.image_size // config.patch_size) ** 2 + 1


def kept_bytes(config: Any, ranks: Ranks | None, update_rank: int = 0, once: bool = False) -> int:
    """Bytes that the Linear layers of a ViT keep of their inputs, in closed form.

    Args:
        config: Of the ViT.
        ranks: By mode; None for exact copies.
        update_rank: r, the numbers a row that every layer keeps for B besides; 0 for none.
        once: Count the input that q, k and v share once, not three times.
    """
    tokens = tokens_of(config)
    inputs = [config.hidden_size] * (LAYERS - (3 if once else 1)) + [config.intermediate_size]
    compressed = sum(input_elements(PAPER_SAMPLES, tokens, features, ranks) for features in inputs)
    rows = LAYERS * PAPER_SAMPLES * tokens * update_rank
    return 4 * config.num_hidden_layers * (compressed + rows)


def ratios(config: Any, ranks: Ranks, update_rank: int) -> dict[str, float]:
    """How many times less than dense, with an input counted for every layer that reads it and once."""
    return {
        name: kept_bytes(config, None, once=once) / kept_bytes(config, ranks, update_rank, once)
        for name, once in (("ratio", False), ("ratio_counted_once", True))
    }


def largest_rank(config: Any, given: Ranks, mode: str, update_rank: int) -> int | None:
    """The largest rank of a mode that saves `ASKED_RATIO` times, None if none does."""
    size = {"feature": config.hidden_size, "token": tokens_of(config), "batch": PAPER_SAMPLES}[mode]
    reach = [
        rank for rank in range(1, size) if ratios(config, {**given, mode: rank}, update_rank)["ratio"] >= ASKED_RATIO
    ]
    return max(reach, default=None)


def estimated_bytes(model: nn.Module, batch: Batch, ranks: Ranks | None, update: str) -> int:
    """What the layers keep, by the paper's accounting of `estimate_wasi`, which follows a step through the model."""
    config = None
    if ranks is not None:
        config = wasi_peft.WasiConfig(residual=None,
            weight_rank=UPDATE_RANK, activation_threshold=None, activation_ranks=ranks,
            activation_modes=list(ranks), update=update,
        )  # fmt: skip
    estimate = wasi_peft.estimate_wasi(model, config, batch=batch, optimizer="sgd")
    return estimate.paper_training_bytes - estimate.paper_inference_bytes


def activations(scale: Scale) -> dict[str, Any]:
    """Activation memory of dense and WASI at several ranks, and the ranks that reach the asked ratio."""
    with torch.device("meta"):
        model = vit_b32(num_hidden_layers=scale.paper_blocks)
        pixels = torch.empty(PAPER_SAMPLES, 3, model.config.image_size, model.config.image_size)
    config, batch = model.config, {"pixel_values": pixels, "labels": torch.zeros(PAPER_SAMPLES, dtype=torch.long)}
    forms = []
    for ranks in scale.paper_ranks:
        form: dict[str, Any] = {"ranks": ranks}
        # update="subspace" keeps nothing but the compressed inputs
        for name, update, update_rank in (
            ("inputs", "subspace", 0),
            ("inputs_and_rows_for_B", "low_rank", UPDATE_RANK),
        ):
            kept = estimated_bytes(model, batch, ranks, update)
            form[name] = {"bytes": kept, **ratios(config, ranks, update_rank)}
        forms.append(form)
    reaching = [
        {"given": given, "mode": mode, "update_rank": update_rank,
         "largest_rank": largest_rank(config, given, mode, update_rank)}
        for update_rank in (0, 4, 8, UPDATE_RANK)
        for given, mode in SEARCHES
    ]  # fmt: skip
    return {"dense_bytes": estimated_bytes(model, batch, None, ""), "forms": forms, "reaching": reaching}


def summary(entry: Mapping[str, Any]) -> str:
    """Says where WASI pays, or formats the accounting as Markdown tables."""
    if entry["sweep"] != "activations":
        against = entry["crossovers_against"]
        return "\n".join(f"  {name} pays {found['pays']} ({against})" for name, found in entry["crossovers"].items())
    lines = [
        f"dense: {entry['dense_bytes'] / MIB:.2f} MiB",
        "",
        "| ranks | MiB | dense / WASI | tensors once | with the rows for B, MiB | dense / WASI | tensors once |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form in entry["forms"]:
        cells = [words(form["ranks"])]
        for part in (form["inputs"], form["inputs_and_rows_for_B"]):
            cells += [f"{part['bytes'] / MIB:.2f}", f"{part['ratio']:.1f}x", f"{part['ratio_counted_once']:.1f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    update_ranks = list(dict.fromkeys(found["update_rank"] for found in entry["reaching"]))
    lines += [
        "",
        f"| largest rank that saves {ASKED_RATIO} times | "
        + " | ".join(f"with {rank} a row for B" if rank else "inputs only" for rank in update_ranks)
        + " |",
        "| --- |" + " --- |" * len(update_ranks),
    ]
    for given, mode in SEARCHES:
        searches = [search for search in entry["reaching"] if (search["given"], search["mode"]) == (given, mode)]
        found = [search["largest_rank"] for search in searches]
        name = f"{mode}, given {words(given)}" if given else mode
        lines.append(f"| {name} | " + " | ".join("none" if rank is None else str(rank) for rank in found) + " |")
    return "\n".join(lines)


def words(ranks: Ranks) -> str:
    """Ranks by mode as text."""
    return ", ".join(f"{mode} {rank}" for mode, rank in ranks.items())


# ---------------------------------------------------------------------------------------------------------------------
# Figure and command line
# ---------------------------------------------------------------------------------------------------------------------


def plot(entries: Mapping[str, Any], path: Path) -> None:
    """Draws one panel a sweep: gains against what moves, crossovers marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 3.9 * rows), squeeze=False)
    shared: tuple[list[Any], list[str]] = ([], [])  # the legend of all curves
    order = list(SWEEPS)
    panels_of = sorted(entries.values(), key=lambda e: (e["settings"].get("width", math.inf), order.index(e["sweep"])))
    for panel, entry in itertools.zip_longest(panels.flat, panels_of):
        if entry is None:
            panel.set_axis_off()
            continue
        if entry["sweep"] == "activations":
            draw_activations(panel)
        else:
            draw_curves(panel, entry)
            shared = panel.get_legend_handles_labels()
        panel.set(xlabel=SWEEPS[entry["sweep"]], ylabel="dense / WASI")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
    figure.tight_layout()
    if shared[0]:
        figure.legend(*shared, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, handlelength=3.2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def draw_curves(panel: Any, entry: Mapping[str, Any]) -> None:
    """Gains of one sweep; circles where they are 1."""
    moving, settings, points = entry["moving"], entry["settings"], entry["points"]
    values = [point[moving] for point in points]
    per_value = 1 if moving == "rank" else points[0]["batch"] * points[0]["tokens"] / values[0]
    for name, (label, style) in CURVES.items():
        if name not in points[0]["gains"]:
            continue  # not timed
        panel.plot(values, [point["gains"][name] for point in points], **style, label=label)
        at = [value / per_value for value in entry["crossovers"][name]["at"]]
        panel.plot(at, [1] * len(at), "o", markersize=9, fillstyle="none", color=style["color"])
    panel.axhline(1, color="black", linestyle=":", label="dense (circles: crossovers)")
    fixed = ", ".join(f"{name} {value:g}" for name, value in entry["fixed"].items())
    panel.set_title(f'width {settings["width"]}, memory_mode="{settings["mode"]}"; {fixed}', fontsize=9)


def draw_activations(panel: Any) -> None:
    """The paper's ratio against the feature rank, without and with the rows for B."""
    config = ViTConfig(patch_size=32)  # a ratio does not depend on the number of blocks
    features = [2**power for power in range(1, 9)]
    for color, given in enumerate(given for given, mode in SEARCHES if mode == "feature"):
        for update_rank, line in ((0, "-"), (UPDATE_RANK, "--")):
            curve = [ratios(config, {"feature": rank, **given}, update_rank)["ratio"] for rank in features]
            label = None if update_rank else ", ".join(filter(None, ["features", words(given)]))
            panel.plot(features, curve, line, color=f"C{color}", marker=".", label=label)
            reached = largest_rank(config, given, "feature", update_rank)
            if reached is not None:
                panel.plot(reached, ASKED_RATIO, "o", markersize=9, fillstyle="none", color=f"C{color}")
    panel.plot([], [], "--", color="grey", label=f"with {UPDATE_RANK} a row for B")
    panel.axhline(ASKED_RATIO, color="black", linestyle=":", label=f"{ASKED_RATIO}x")
    panel.set_title(f"inputs of ViT-B/32's Linears, batch {PAPER_SAMPLES}, the paper's count", fontsize=9)
    panel.legend(fontsize=7, handlelength=3.2, loc="lower left")


def settings_of(sweep: str, width: int, scale: Scale, mode: str, rounds: int) -> tuple[str, dict[str, Any]]:
    """Key of a sweep's entry, and what its figures depend on."""
    if sweep not in scale.values:
        settings = {"blocks": scale.paper_blocks, "ranks": scale.paper_ranks, "update_rank": UPDATE_RANK}
        return f"{sweep} vit_b32 batch={PAPER_SAMPLES}", settings
    return f"{sweep} width={width} mode={mode}", {
        "width": width,
        "mode": mode,
        "rounds": rounds,
        "blocks": scale.blocks,
        "activation_ranks": scale.activation_ranks,
        "update_rank": UPDATE_RANK,
        "default": scale.default,
        "values": scale.values[sweep],
        "seeds": SEEDS,
    }


def run_missing(sweep: str, width: int, scale: Scale, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a sweep and stores its entry, unless that was done before."""
    key, settings = settings_of(sweep, width, scale, args.mode, args.rounds)
    entry = read_json(args.results).get(key, {})
    if entry.get("settings") == settings:
        print(f"finished before: {key}", flush=True)
        return entry
    print(f"running: {key}", flush=True)
    start = time.perf_counter()
    if sweep in scale.values:
        found = sweep_curve(sweep, width, scale, args.mode, args.rounds)
    else:
        found = activations(scale)
    seconds = round(time.perf_counter() - start)
    entry = {"sweep": sweep, "settings": settings, **found, "seconds": seconds, "environment": environment()}
    add_entry(args.results, key, entry, lock=cache_dir() / f"{args.results.name}.lock")
    return entry


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs what is missing, prints where WASI pays and draws all that is in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument(
        "--widths", nargs="+", type=int, help=f"of the models, multiples of {HEAD} (default: {FULL.width})"
    )
    parser.add_argument("--mode", choices=MEMORY_MODES, default="exact")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds; 0: what is deterministic only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.quick and args.results == RESULTS:
        parser.error("--quick needs --results: its figures are not worth keeping")
    transformers.logging.set_verbosity_error()
    scale = QUICK if args.quick else FULL

    for sweep in args.sweeps:
        for width in args.widths or [scale.width] if sweep in scale.values else [0]:
            entry = run_missing(sweep, width, scale, args)
            print(summary(entry), flush=True)
    entries = read_json(args.results)
    plot(entries, args.results.with_suffix(".png"))
    return entries


if __name__ == "__main__":
    main()
