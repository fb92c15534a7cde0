"""Accuracy of full fine-tuning, LoRA and WASI under one protocol: tuned on held-out images, then several seeds.

DINOv2-small ViT, Fashion-MNIST at 56 px, the first 6,000 training images, 2 epochs of batches of 32 (376 steps), AdamW
without weight decay, warm-up over a tenth of the steps, then cosine decay. Learning rates are compared on training
images 6,000 to 7,999, which are never trained on; the test images play no part in that. Testing is on all 10,000 test
images, and on the first 2,000 of them. This needs the full Fashion-MNIST (see ``load_images``). With the shipped
subset alone the first 5,000 images are trained on, the next 1,000 are held out, and testing is on 2,000; such runs are
kept apart from the others.

Each run is one entry of ``docs/benchmarks/finetune_accuracy.json``; finished runs are skipped. Without ``--lr``, a
method's learning rates of ``GRID`` are run with seed 0, then the best of them with the other seeds::

    python examples/benchmark/finetune_accuracy.py
    python examples/benchmark/finetune_accuracy.py --method wasi --target-share 0.5
    python examples/benchmark/finetune_accuracy.py --method full --lr 3e-5 --seed 0 --threads 1
    python examples/benchmark/finetune_accuracy.py --summarise
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import wasi_peft

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets import SHIPPED_IMAGES, ImageSet, cache_dir, fashion_mnist_folder, load_images, load_vit
from finetune import METHODS, accuracy, build, build_optimizer, predict, train

from benchmark.common import add_entry, environment, read_json

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "finetune_accuracy.json"
GRID = {"full": (2e-5, 5e-5, 1e-4), "lora": (2e-4, 5e-4, 1e-3), "wasi": (2e-5, 5e-5, 1e-4, 2e-4)}
Settings = dict[str, Any]


def part(images: ImageSet, start: int, stop: int) -> ImageSet:
    """Returns images ``start`` to ``stop`` - 1."""
    return ImageSet(images.images[start:stop], images.labels[start:stop], images.image_size, images.classes)


def key_of(settings: Settings) -> str:
    """Returns the name of a run's entry: all that its result depends on."""
    return " ".join(
        f"{name}={json.dumps(value, sort_keys=True) if isinstance(value, dict) else value}"
        for name, value in settings.items()
        if value not in (None, {})
    )


def group_of(settings: Settings) -> str:
    """Returns what runs share that differ in learning rates and seed only."""
    return key_of({name: value for name, value in settings.items() if name not in ("lr", "head_lr", "seed")})


def best_rates(entries: dict[str, Any], group: str) -> tuple[float, float | None]:
    """Returns the learning rates of a group's seed-0 run that is most accurate on the held-out images.

    Raises:
        ValueError: If the group has no such run yet.
    """
    runs = [entry for entry in entries.values() if group_of(entry["settings"]) == group]
    runs = [entry for entry in runs if entry["settings"]["seed"] == 0]
    if not runs:
        raise ValueError(f"--lr best needs finished runs with --seed 0 of: {group}")
    best = max(runs, key=lambda entry: entry["validation_accuracy"])["settings"]
    return best["lr"], best["head_lr"]


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates once; returns the entry."""
    count, held_out = settings["train"], settings["validation"]
    pool, test_set = load_images(train=count + held_out, test=settings["test"])
    train_set, validation_set = part(pool, 0, count), part(pool, count, count + held_out)
    transformers.set_seed(settings["seed"])
    model = load_vit(num_labels=len(pool.classes), seed=settings["seed"])
    model = build(
        settings["method"],
        model,
        train_set,
        settings["wasi"],
        settings["target_share"],
        settings["calibration_images"] or 0,
        settings["repair_steps"] or 0,
    )
    optimizer = build_optimizer(settings["method"], model, settings["lr"], settings["head_lr"])
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model, optimizer, train_set, Path(scratch),
            steps=settings["steps"], epochs=settings["epochs"], batch_size=32, seed=settings["seed"],
        )  # fmt: skip
    validation = predict(model, validation_set, description="Validating")
    test = predict(model, test_set, description="Testing")
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
    if settings["method"] == "wasi":
        entry["kept_share"] = model.wasi_summary().kept_share
    return entry


def summary(entries: dict[str, Any]) -> str:
    """Formats mean and spread over seeds, at the learning rates that are best on the held-out images."""
    lines = [
        "| runs | lr (head) | seeds | held-out | test | first 2,000 of the test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups = dict.fromkeys(group_of(entry["settings"]) for entry in entries.values())
    for group in groups:
        try:
            rates = best_rates(entries, group)
        except ValueError:
            continue  # no run with seed 0 yet
        runs = [
            entry
            for entry in entries.values()
            if group_of(entry["settings"]) == group
            and (entry["settings"]["lr"], entry["settings"]["head_lr"]) == rates
        ]
        columns = ("validation_accuracy", "test_accuracy", "test_accuracy_first_2000")
        spread = [mean_and_spread([entry[column] for entry in runs]) for column in columns]
        seeds = ", ".join(str(seed) for seed in sorted(entry["settings"]["seed"] for entry in runs))
        lines.append(f"| {group} | {rates[0]:g} ({rates[1] or rates[0]:g}) | {seeds} | {' | '.join(spread)} |")
    lines += ["", "Every run on held-out images (these chose the learning rates):", ""]
    lines += [f"* {entry['validation_accuracy']:.4f}  {key}" for key, entry in entries.items()]
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    """Formats a mean, with the sample standard deviation if there are several values."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    full = fashion_mnist_folder() != SHIPPED_IMAGES
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--lr", nargs="+", help="learning rates, or best: that of the finished runs of seed 0 (default: GRID, best)")
    add("--head-lr", type=float, help="learning rate of the head (default: the same)")
    add("--seed", type=int, nargs="+", help="seeds (default: 0 with --lr, else 0, 1 and 2)")
    add("--wasi", type=json.loads, default={}, metavar="JSON", help='fields of WasiConfig, as {"weight_rank": 64}')
    add("--target-share", type=float, help="WASI: share of the weights to keep")
    add("--calibration-images", type=int, default=512, help="WASI: unlabelled training images looked at first")
    add("--repair-steps", type=int, default=wasi_peft.REPAIR_STEPS, help="WASI: steps of the label-free repair")
    add("--train", type=int, default=6000 if full else 5000, help="images trained on")
    add("--validation", type=int, default=2000 if full else 1000, help="images held out, those after them")
    add("--test", type=int, default=10000 if full else 2000, help="test images")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--threads", type=int, default=1)
    add("--results", type=Path, default=RESULTS, help="the JSON file")
    add("--summarise", action="store_true", help="run nothing, print mean and spread of the finished runs")
    return parser.parse_args(arguments)


def settings_of(method: str, args: argparse.Namespace) -> Settings:
    """Returns a method's settings, but for learning rates and seed."""
    wasi = method == "wasi"
    return {
        "method": method,
        "wasi": args.wasi if wasi else {},
        "target_share": args.target_share if wasi else None,
        "calibration_images": args.calibration_images if wasi else None,
        "repair_steps": args.repair_steps if wasi else None,
        "train": args.train,
        "validation": args.validation,
        "test": args.test,
        "epochs": None if args.steps else args.epochs,
        "steps": args.steps,
    }


def run_missing(method: str, rate: str | float, seed: int, args: argparse.Namespace) -> None:
    """Does one run and stores its entry, unless it was done before."""
    settings = settings_of(method, args)
    entries = read_json(args.results)
    rates = best_rates(entries, group_of(settings)) if rate == "best" else (float(rate), args.head_lr)
    settings |= {"lr": rates[0], "head_lr": rates[1], "seed": seed}
    key = key_of(settings)
    if key in entries:
        print(f"finished before: {key}", flush=True)
        return
    print(f"running: {key}", flush=True)
    entry = run(settings)
    add_entry(args.results, key, entry, lock=cache_dir() / f"{args.results.name}.lock")
    print(f"held-out {entry['validation_accuracy']:.4f}, test {entry['test_accuracy']:.4f}: {key}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the summary."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # the new head is reported as missing, which is meant
    for method in [] if args.summarise else args.method:
        seeds = args.seed or ([0] if args.lr else [0, 1, 2])
        plan = [(rate, seed) for seed in seeds for rate in args.lr or (GRID[method] if seed == 0 else ["best"])]
        for rate, seed in plan:
            run_missing(method, rate, seed, args)
    print(summary(read_json(args.results)))


if __name__ == "__main__":
    main()
