"""What training on some of an image's patches costs and saves: `WasiConfig(token_keep=...)`.

DINOv2-small on Fashion-MNIST at 98 px, 49 patches and a class token; the residual form and its head, AdamW without
weight decay, warm-up over a tenth of the steps, then cosine decay. Testing is on whole images. Beside accuracy, what a
step takes: FLOPs and peak memory by `estimate_wasi`, and processor time of the training, which is that of this process
alone. Each run is one entry of docs/benchmarks/token_dropping.json; finished runs are skipped::

    python benchmarks/token_dropping.py --keep 1 0.7 0.5 --seed 0 1 2
    python benchmarks/token_dropping.py --summarise
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import default_collate

import wasi_peft
from common import RESULTS_FOLDER, add_entry, cache_dir, environment, read_json
from finetuning import HEAD, LEARNING_RATES, accuracy, build, build_optimizer, predict, train
from images import load_images
from runs import key_of, mean_and_spread
from vit import load_vit

RESULTS = RESULTS_FOLDER / "token_dropping.json"
SIZE, BATCH = 98, 32
MIB, GIGA = 2**20, 10**9


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains and tests once; returns the entry."""
    torch.set_num_threads(settings["threads"])
    train_set, test_set = load_images(train=settings["train"], test=settings["test"], image_size=SIZE)
    options = {"token_keep": settings["keep"], "memory_mode": settings["memory_mode"]}
    config = wasi_peft.WasiConfig(modules_to_save=[HEAD], **options)
    batch = default_collate(train_set.__getitems__(range(BATCH)))
    step = wasi_peft.estimate_wasi(load_vit(num_labels=len(train_set.classes)), config, batch=batch)
    transformers.set_seed(settings["seed"])
    model = build("residual", load_vit(num_labels=len(train_set.classes)), train_set, options)
    optimizer = build_optimizer("residual", model, settings["lr"])
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()
        train(
            model, optimizer, train_set, Path(scratch),
            epochs=settings["epochs"], batch_size=BATCH, seed=settings["seed"],
        )  # fmt: skip
        seconds = time.process_time() - started
    return {
        "settings": settings,
        "test_accuracy": accuracy(predict(model, test_set), test_set.labels),
        "training_processor_seconds": seconds,
        "step_gflop": step.training_flops / GIGA,
        "step_peak_mib": step.peak_bytes / MIB,
        "environment": environment(),
    }


def summary(results: Path) -> str:
    """Formats a table, one row a share and memory mode; time as a multiple of that of all patches."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in read_json(results).values():
        settings = {name: value for name, value in entry["settings"].items() if name != "seed"}
        groups.setdefault(key_of(settings), []).append(entry)
    lines = [
        "| patches kept | memory mode | seeds | accuracy | processor s | GFLOP a step | peak of a step, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entries in sorted(groups.values(), key=lambda group: -group[0]["settings"]["keep"]):
        first = entries[0]
        lines.append(
            f"| {first['settings']['keep']:g} | {first['settings']['memory_mode']} | {len(entries)} | "
            f"{mean_and_spread([entry['test_accuracy'] for entry in entries])} | "
            f"{statistics.mean(entry['training_processor_seconds'] for entry in entries):.0f} | "
            f"{first['step_gflop']:.0f} | {first['step_peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.7, 0.5])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--memory-mode", nargs="+", default=["exact"])
    parser.add_argument("--lr", type=float, default=LEARNING_RATES["residual"])
    parser.add_argument("--train", type=int, default=2000, help="images")
    parser.add_argument("--test", type=int, default=2000, help="images")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summarise", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    if not args.summarise:
        for seed, mode, keep in itertools.product(args.seed, args.memory_mode, args.keep):
            settings = {
                "keep": keep, "memory_mode": mode, "lr": args.lr, "train": args.train, "test": args.test,
                "epochs": args.epochs, "threads": args.threads, "seed": seed,
            }  # fmt: skip
            key = key_of(settings)
            if key in read_json(args.results):
                continue
            print(f"running: {key}", flush=True)
            add_entry(args.results, key, run(settings), cache_dir() / f"{args.results.name}.lock")
    print(summary(args.results))


if __name__ == "__main__":
    main()
