"""Accuracy of full fine-tuning, LoRA and WASI under one protocol: tuned on held-out images, then several seeds.

DINOv2-small ViT, Fashion-MNIST at 56 px, the first 6,000 training images, 2 epochs of batches of 32 (376 steps), AdamW
without weight decay, warm-up over a tenth of the steps, then cosine decay. Learning rates are compared on training
images 6,000 to 7,999, which are never trained on; the test images play no part in that. Testing is on all 10,000 test
images, and on the first 2,000 of them. This needs the full Fashion-MNIST (see ``load_images``). With the shipped
subset alone the first 5,000 images are trained on, the next 1,000 are held out, and testing is on 2,000; such runs are
kept apart from the others.

Each run is one entry of ``docs/benchmarks/finetune_accuracy.json``; finished runs are skipped. Without ``--lr``, a
method's learning rates of ``GRID`` are run with seed 0, then the best of them with the other seeds::

    python benchmarks/finetune_accuracy.py --method full lora residual --epochs 3 --seed 0 1 2 3 4
    python benchmarks/finetune_accuracy.py --method full lora residual --epochs 3 --dtype float32 bfloat16
    python benchmarks/finetune_accuracy.py --method residual --residual int8 int4 --rank 32 64 --epochs 3
    python benchmarks/finetune_accuracy.py --method wasi --target-share 0.5
    python benchmarks/finetune_accuracy.py --method full --lr 3e-5 --seed 0 --threads 1
    python benchmarks/finetune_accuracy.py --method full lora residual --epochs 3 --summarise

"residual" is ``WasiConfig()``, "wasi" the two factors that take the weight's place. Their initial factors come in the
five variants of ``initial_factors.py``. Their preparation, minutes long, depends neither on the seed nor on learning
rates or the memory mode, so it is done once and kept in the cache folder for all the runs that differ in these only
(``prepared.py``). Several shares, variants or memory modes can be given at once::

    python benchmarks/finetune_accuracy.py --method wasi --memory-mode exact fast small --lr 5e-4 --seed 0 1 2
    python benchmarks/finetune_accuracy.py --method wasi --target-share 0.5 0.33 0.25 --lr 5e-4 --seed 0 1 2 \\
        --variant plain one-sided two-sided repaired --plot docs/benchmarks/finetune_accuracy.png

Frozen factors in few bits against those in float32, at the same bytes, of which the former keep more directions::

    python benchmarks/finetune_accuracy.py --method wasi --target-share 0.25 0.4 0.5 --frozen-dtype float32 int8

The summary begins with a table of the runs asked for. The first also gives a table of what rounding costs: each run
minus the one that differs from it in exact memory only.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from common import RESULTS_FOLDER, environment, read_json
from finetuning import METHODS, accuracy, build, build_optimizer, predict, train
from images import SHIPPED_IMAGES, ImageSet, fashion_mnist_folder, load_images, part
from initial_factors import REPAIRS, steps_of
from prepared import VARIANTS, attach_factors, build_config
from runs import (
    Scores,
    Settings,
    add_run_arguments,
    chosen_runs,
    comparison,
    group_of,
    key_of,
    mean_and_spread,
    plan_of,
    precision,
    residual_options,
    run_missing,
    unless_float32,
    updates_for,
)
from vit import load_vit
from wasi_peft.factors.block_repair import BLOCK_STEPS
from wasi_peft.factors.model_repair import REPAIR_STEPS
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.updates import UPDATES

RESULTS = RESULTS_FOLDER / "finetune_accuracy.json"
GRID = {
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "lora": (2e-4, 5e-4, 1e-3, 2e-3),
    "residual": (2e-4, 5e-4, 1e-3, 2e-3),
    "wasi": (2e-4, 5e-4, 1e-3, 2e-3),
}
JUDGED = Scores("validation_accuracy", "test_accuracy")
SCORES = (JUDGED.held_out, JUDGED.test, "test_accuracy_first_2000")
DEFAULT_VARIANT, DEFAULT_MODE = "repaired", "exact"


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates once; returns the entry."""
    count, held_out = settings["train"], settings["validation"]
    pool, test_set = load_images(train=count + held_out, test=settings["test"])
    train_set, validation_set = part(pool, 0, count), part(pool, count, count + held_out)
    transformers.set_seed(settings["seed"])
    model = load_vit(num_labels=len(pool.classes), seed=settings["seed"])
    bf16 = settings["dtype"] == "bfloat16"
    if settings["base_dtype"] == "bfloat16":
        model = model.to(torch.bfloat16)
    factors = None
    if settings["method"] == "wasi":
        model, factors = build_wasi(settings, model, train_set)
    else:
        model = build(settings["method"], model, train_set, settings["wasi"], prepare=settings["prepare"] or 0)
    optimizer = build_optimizer(settings["method"], model, settings["lr"], settings["head_lr"])
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model, optimizer, train_set, Path(scratch),
            steps=settings["steps"], epochs=settings["epochs"], batch_size=32, seed=settings["seed"], bf16=bf16,
        )  # fmt: skip
    validation = predict(model, validation_set, description="Validating", bf16=bf16)
    test = predict(model, test_set, description="Testing", bf16=bf16)
    entry = {
        "settings": settings,
        "steps": max(item["step"] for item in log),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_accuracy": accuracy(validation, validation_set.labels),
        "test_accuracy": accuracy(test, test_set.labels),
        "test_accuracy_first_2000": accuracy(test[:2000], test_set.labels[:2000]),
        "losses": [item["loss"] for item in log if "loss" in item],
        "environment": environment(),
    }
    if settings["method"] in ("residual", "wasi"):
        entry["kept_share"] = model.wasi_summary().kept_share
        entry["initial_factors"] = factors
    return entry


def build_wasi(settings: Settings, model: nn.Module, train_set: ImageSet) -> tuple[nn.Module, str | None]:
    """Returns the model with its adapter, and the digest of the prepared factors that it starts from."""
    variant, options = settings["variant"] or DEFAULT_VARIANT, settings["wasi"]
    config = build_config(variant, model, settings["target_share"], options)
    images, steps = settings["calibration_images"] or 0, settings["repair_steps"] or 0
    factors = attach_factors(variant, model, config, options, train_set, images, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return peft.get_peft_model(model, config), factors


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def summary(entries: dict[str, Any]) -> str:
    """Formats mean and spread over seeds, at the learning rates that are best on the held-out images."""
    lines = [
        "| runs | lr (head) | seeds | held-out | test | first 2,000 of the test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups = dict.fromkeys(group_of(entry["settings"]) for entry in entries.values())
    for group in groups:
        try:
            runs = chosen_runs(entries, group, JUDGED)
        except ValueError:
            continue  # no run with seed 0 yet
        lr, head_lr = runs[0]["settings"]["lr"], runs[0]["settings"]["head_lr"]
        spread = [mean_and_spread([entry[score] for entry in runs]) for score in SCORES]
        seeds = ", ".join(str(entry["settings"]["seed"]) for entry in runs)
        lines.append(f"| {group} | {lr:g} ({head_lr or lr:g}) | {seeds} | {' | '.join(spread)} |")
    lines += ["", *differences(entries)]
    lines += ["", "Every run on held-out images (these chose the learning rates):", ""]
    lines += [f"* {entry['validation_accuracy']:.4f}  {key}" for key, entry in entries.items()]
    return "\n".join(lines)


def differences(entries: dict[str, Any]) -> list[str]:
    """Returns the lines of a table: runs minus their exact twins, seed by seed, and mean and spread of that."""
    lines = [
        "Difference to the same run with memory_mode exact:",
        "",
        "| runs | minus those with | seeds | held-out | test | first 2,000 of the test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    pairs: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for entry in entries.values():
        twin = exact_twin(entries, entry)
        if twin is not None:
            name = key_of({**entry["settings"], "seed": None})
            pairs.setdefault((name, json.dumps(twin["settings"]["wasi"], sort_keys=True)), []).append((entry, twin))
    for (name, options), found in pairs.items():
        found.sort(key=lambda pair: pair[0]["settings"]["seed"])
        cells = [", ".join(str(entry["settings"]["seed"]) for entry, _ in found)]
        for score in SCORES:
            each = [entry[score] - twin[score] for entry, twin in found]
            cells.append(f"{mean_and_spread(each, sign='+')} ({', '.join(f'{value:+.4f}' for value in each)})")
        lines.append(f"| {name} | {options} | {' | '.join(cells)} |")
    return lines if pairs else []


def exact_twin(entries: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the run that differs from another one only in what is kept exactly for backward; None if it is missing.

    That is the run without ``memory_mode``, else the one that keeps exact inputs too. It must
    have started from the same factors.
    """
    settings = entry["settings"]
    without_mode = {key: value for key, value in settings["wasi"].items() if key != "memory_mode"}
    others = {key: value for key, value in without_mode.items() if not key.startswith("activation_")}
    for options in (without_mode, {**others, "activation_threshold": None}):
        twin = entries.get(key_of({**settings, "wasi": options}))
        if twin is not None and twin is not entry and twin.get("initial_factors") == entry.get("initial_factors"):
            return twin
    return None


def plot(entries: dict[str, Any], args: argparse.Namespace, path: Path) -> None:
    """Draws test accuracy against the share of weights kept, one curve a variant, update and memory mode.

    Error bars, and the bands of full fine-tuning and LoRA, are the sample standard deviation over seeds.

    Raises:
        ValueError: If no run of WASI that was asked for is finished.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[float, float, float]]] = {}
    bands: dict[str, tuple[float, float]] = {}
    for settings in every_settings(args, METHODS):
        try:
            runs = chosen_runs(entries, group_of(settings), JUDGED)
        except ValueError:
            continue  # no run with seed 0 yet
        scores = [entry["test_accuracy"] for entry in runs]
        mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        if settings["method"] == "wasi":
            update = settings["wasi"].get("update") if args.update else None
            mode = settings["wasi"].get("memory_mode")
            label = ", ".join(filter(None, (settings["variant"] or DEFAULT_VARIANT, update, mode)))
            curves.setdefault(label, []).append((runs[0]["kept_share"], mean, spread))
        else:
            bands[settings["method"]] = mean, spread
    if not curves:
        raise ValueError("--plot needs finished runs of WASI with seed 0 and the given settings, got none")
    figure, axis = pyplot.subplots(figsize=(6.4, 4.4))
    for (label, (mean, spread)), color in zip(bands.items(), ("black", "tab:gray"), strict=False):
        axis.axhline(mean, color=color, linestyle=":", label=label)
        axis.axhspan(mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    for label, points in curves.items():
        shares, means, spreads = zip(*sorted(points), strict=True)
        axis.errorbar(shares, means, yerr=spreads, marker="o", markersize=4, capsize=3, label=label)
    axis.set(xlabel="share of weights kept", ylabel="test accuracy after fine-tuning")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    full = fashion_mnist_folder() != SHIPPED_IMAGES
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--head-lr", type=float, help="learning rate of the head (default: the same)")
    add(
        "--wasi",
        type=json.loads,
        default={},
        metavar="JSON",
        help='wasi: fields of WasiConfig, as {"weight_rank": 64}',
    )
    add("--update", nargs="+", choices=UPDATES, help="the same, one run an update")
    add("--memory-mode", nargs="+", choices=MEMORY_MODES, help="the same, one run a mode")
    add_run_arguments(parser, RESULTS, threads=1)
    add("--target-share", type=float, nargs="+", default=[None], help="WASI: shares of the weights to keep")
    add("--variant", nargs="+", choices=VARIANTS, default=[DEFAULT_VARIANT], help="WASI: initial factors")
    add("--calibration-images", type=int, default=512, help="WASI: unlabelled training images looked at first")
    add("--repair-steps", type=int, default=REPAIR_STEPS, help="WASI: steps of the label-free repair")
    add("--block-steps", type=int, default=BLOCK_STEPS, help="of each block, if blockwise")
    add("--train", type=int, default=6000 if full else 5000, help="images trained on")
    add("--validation", type=int, default=2000 if full else 1000, help="images held out, those after them")
    add("--test", type=int, default=10000 if full else 2000, help="test images")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--plot", type=Path, metavar="FILE", help="draw accuracy against the share kept, of the runs asked for")
    return parser.parse_args(arguments)


def every_settings(args: argparse.Namespace, methods: list[str] | tuple[str, ...]) -> Iterator[Settings]:
    """Yields the settings of all runs asked for, but for learning rates and seed."""
    for method, dtype in itertools.product(methods, args.dtype):
        modes = [None if mode == DEFAULT_MODE else mode for mode in args.memory_mode or [None]]
        fields = list(itertools.product(updates_for(method, args.update), modes))
        if method == "residual":
            for kind, rank, (update, mode) in itertools.product(args.residual, args.rank, fields):
                yield settings_of(args, method, dtype, options=residual_options(kind, rank, update, mode))
        elif method == "wasi":
            stored = [unless_float32(kind) for kind in args.frozen_dtype]
            options = [
                {**args.wasi, **_given(update=update, memory_mode=mode, frozen_dtype=frozen)}
                for (update, mode), frozen in itertools.product(fields, stored)
            ]
            for variant, share, given in itertools.product(args.variant, args.target_share, options):
                yield settings_of(args, method, dtype, variant, share, given)
        else:
            yield settings_of(args, method, dtype)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def settings_of(
    args: argparse.Namespace,
    method: str,
    dtype: str = "float32",
    variant: str = DEFAULT_VARIANT,
    share: float | None = None,
    options: dict[str, Any] | None = None,
) -> Settings:
    """Returns the settings of a run, but for learning rates and seed; None is what a key leaves out."""
    wasi = method == "wasi"
    repaired = wasi and variant in REPAIRS
    return {
        "method": method,
        "variant": None if variant == DEFAULT_VARIANT else variant,
        "wasi": options or {},
        "target_share": share,
        "prepare": (args.prepare or None) if method == "residual" else None,
        **precision(dtype, args.base_dtype),
        "calibration_images": args.calibration_images if wasi and variant != "plain" else None,
        "repair_steps": steps_of(variant, args.repair_steps, args.block_steps) if repaired else None,
        "train": args.train,
        "validation": args.validation,
        "test": args.test,
        "epochs": None if args.steps else args.epochs,
        "steps": args.steps,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the summary."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # the new head is reported as missing, which is meant
    for settings in [] if args.summarise else every_settings(args, args.method):
        plan = plan_of(args, GRID[settings["method"]])
        run_missing(settings, plan, args.results, JUDGED, run, args.head_lr)
    entries = read_json(args.results)
    columns = ("kept_share",) if set(args.method) <= {"residual", "wasi"} else ()
    print(comparison(entries, every_settings(args, args.method), JUDGED, columns), end="\n\n")
    print(summary(entries))
    if args.plot:
        plot(entries, args, args.plot)


if __name__ == "__main__":
    main()
