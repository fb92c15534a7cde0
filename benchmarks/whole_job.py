"""Whole fine-tuning jobs, from the start of a process to the saved adapter: wall time, peak memory, quality.

Every job is a process of its own, in rounds, all methods once a round and nobody always first: full fine-tuning, LoRA
r=16 with and without gradient checkpointing, WASI's residual form in the three memory modes, also at LoRA's rank
("residual 16 small"), with the vocabulary in 8 bits too ("residual vocabulary exact"), with blocks that take 544
tokens at once, a batch of images, and MLPs that take half of it ("residual 16 small, 544 tokens"), and WASI's factors
with their preparation; each in float32 and under autocast to bfloat16. With ", stepping" steps happen inside backward,
without clipping. Two models: DINOv2-small on Fashion-MNIST at 56 px, 3 epochs of 6,000 images in batches of 32, and
SmolLM2-135M, 40 steps of 8 mails of 128 tokens.

Wall time is split into import, load (model and data), prepare (calibration, repair, injection, optimizer), train and
save. The peak is that of the process (resident set) until the adapter is saved, above that of a process which only
imports the same packages. Quality is measured afterwards, in the same process. The time that importing wasi_peft takes
is not counted for the methods without it. Ratios are to LoRA in the same precision, round by round. Results:
docs/benchmarks/whole_job.json, rounds that are finished are skipped. Run it on an idle machine::

    python benchmarks/whole_job.py --models dinov2 smollm2 --rounds 3
    python benchmarks/whole_job.py --models dinov2 --methods lora "residual exact" --dtype float32 --images 600
    python benchmarks/whole_job.py --models dinov2 --lean-heap
    python benchmarks/whole_job.py --summarise
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401  not loaded before they are named

BEFORE_WASI = time.monotonic()
import wasi_peft  # noqa: E402

AFTER_WASI = time.monotonic()
import finetune_perplexity  # noqa: E402
import finetuning  # noqa: E402
from common import (  # noqa: E402
    RESULTS_FOLDER,
    add_entry,
    cache_dir,
    environment,
    measured_in_a_process,
    process_peak_bytes,
    read_json,
    with_lora,
)
from images import ImageSet, load_images  # noqa: E402
from runs import DTYPES, key_of  # noqa: E402
from texts import smollm2_folder  # noqa: E402
from vit import load_vit  # noqa: E402
from wasi_peft.tuner.config import MEMORY_MODES  # noqa: E402

RESULTS = RESULTS_FOLDER / "whole_job.json"
LORA, CHECKPOINTED, IDLE = "lora", "lora, checkpointing", "idle"
STEPPING = ", stepping"  # OptimizerInBackward
SLICE_TOKENS = 544  # 32 images of 17
SLICED = f", {SLICE_TOKENS} tokens"
VOCABULARY = "vocabulary"  # of a language model, in 8 bits too
RESIDUALS = tuple(
    f"residual {option}{mode}"
    for option in ("", "16 ", f"{VOCABULARY} ")
    for mode in (*MEMORY_MODES, f"small{STEPPING}", f"small{SLICED}", f"small{SLICED}{STEPPING}")
)
METHODS = ("full", LORA, CHECKPOINTED, f"{CHECKPOINTED}{STEPPING}", *RESIDUALS, "factors")
# the best of those tried, by held-out data: finetune_accuracy.py and finetune_perplexity.py
RATES = {
    "dinov2": {"full": 2e-5, "lora": 5e-4, "residual": 2e-4, "factors": 5e-4},
    "smollm2": {"full": 1e-4, "lora": 3e-3, "residual": 3e-3, "factors": 5e-3},
}
PARTS = ("import", "load", "prepare", "train", "save")
MIB = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# One job: what runs in the process
# ---------------------------------------------------------------------------------------------------------------------


def load(job: dict[str, Any]) -> tuple[torch.nn.Module, Any, Any]:
    """Returns the dense model, what it is trained on and what it is tested on."""
    if job["model"] == "dinov2":
        train_set, test_set = load_images(train=job["images"], test=max(1, job["test"]))
        return load_vit(num_labels=len(train_set.classes)), train_set, test_set
    repaired = finetune_perplexity.REPAIR_WINDOWS if job["method"] == "factors" else 0
    train_set, _, test_set = finetune_perplexity.windows(max(repaired, job["steps"] * 8))
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    return model, train_set, test_set[: job["test"]]


def adapt(job: dict[str, Any], model: torch.nn.Module, train_set: Any) -> torch.nn.Module:
    """Returns the model to train, preparation included."""
    vision, form = job["model"] == "dinov2", job["method"].split()[0]
    head, method = [finetuning.HEAD] if vision else None, job["method"].removesuffix(STEPPING)
    if method == "full":
        return model
    if method in (LORA, CHECKPOINTED):
        return with_lora(model, head, checkpointing=method == CHECKPOINTED)
    if form == "residual":
        _, *option, mode = method.removesuffix(SLICED).split()
        options: dict[str, Any] = {"slice_tokens": SLICE_TOKENS if method.endswith(SLICED) else None}
        if option:
            options |= {"vocabulary": "int8"} if option == [VOCABULARY] else {"weight_rank": int(option[0])}
        return peft.get_peft_model(model, wasi_peft.WasiConfig(memory_mode=mode, modules_to_save=head, **options))
    config = wasi_peft.WasiConfig(weight_share=0.4, modules_to_save=head)
    batches = (
        finetuning.calibration_loader(train_set) if vision else [{"input_ids": part} for part in train_set.split(4)]
    )
    wasi_peft.preprocess_wasi(
        model, config, batches, max_batches=16 if vision else 32, repair_steps=job["repair_steps"]
    )
    return peft.get_peft_model(model, config)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Does a whole job and returns its measurements; `job["started"]` is when the process was started."""
    moments = [time.monotonic()]
    if job["method"] == IDLE:
        return {"peak_bytes": process_peak_bytes()}
    transformers.set_seed(job["seed"])
    vision, bf16, kind = job["model"] == "dinov2", job["dtype"] == "bfloat16", job["method"].split()[0].rstrip(",")
    model, train_set, test_set = load(job)
    moments.append(time.monotonic())
    model = adapt(job, model, train_set)
    method = {"factors": "wasi"}.get(kind, kind)
    optimizer = finetuning.build_optimizer(method, model, RATES[job["model"]][kind])
    amount: dict[str, float] = {}
    if job["method"].endswith(STEPPING):
        optimizer, amount = wasi_peft.OptimizerInBackward(optimizer), {"max_grad_norm": 0}
    moments.append(time.monotonic())
    items = train_set if vision else [{"input_ids": window, "labels": window} for window in train_set]
    amount |= {"epochs": job["epochs"], "batch_size": 32} if vision else {"steps": job["steps"], "batch_size": 8}
    with tempfile.TemporaryDirectory() as scratch:
        finetuning.train(model, optimizer, items, Path(scratch), seed=job["seed"], bf16=bf16, **amount)
        moments.append(time.monotonic())
        model.save_pretrained(Path(scratch) / "adapter")
        moments.append(time.monotonic())
    measured: dict[str, Any] = {"peak_bytes": process_peak_bytes()}
    imports = moments[0] - job["started"] - (0 if method in ("residual", "wasi") else AFTER_WASI - BEFORE_WASI)
    spans = [imports, *(after - before for before, after in itertools.pairwise(moments))]
    measured |= {f"{part}_seconds": span for part, span in zip(PARTS, spans, strict=True)}
    measured["wall_seconds"] = sum(spans)
    if job["test"]:
        measured["quality"] = quality(model, test_set, bf16)
    return {**measured, "environment": environment()}


def quality(model: torch.nn.Module, test_set: Any, bf16: bool) -> float:
    """Returns the accuracy on test images, or the perplexity of test windows."""
    if isinstance(test_set, ImageSet):
        return finetuning.accuracy(finetuning.predict(model, test_set, bf16=bf16), test_set.labels)
    return finetune_perplexity.perplexity(model, test_set, "Testing", bf16)


# ---------------------------------------------------------------------------------------------------------------------
# Rounds of jobs
# ---------------------------------------------------------------------------------------------------------------------


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job in a process of its own and returns its measurements."""
    command = [sys.executable, str(Path(__file__).resolve()), "--job"]
    content = json.dumps({**job, "started": time.monotonic()})
    return measured_in_a_process([*command, content], lean_heap=bool(job.get("heap")))


def every_job(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns all jobs, round by round; each begins with another one, and has a process that is idle."""
    jobs = []
    for repetition in range(args.rounds):
        for model in args.models:
            methods = [method for method in args.methods if model != "dinov2" or VOCABULARY not in method]
            cases = list(itertools.product(methods, args.dtype))
            first = repetition % len(cases)
            for method, dtype in [(IDLE, "float32"), *cases[first:], *cases[:first]]:
                jobs.append(settings_of(args, model, method, dtype, repetition))
    return jobs


def settings_of(args: argparse.Namespace, model: str, method: str, dtype: str, repetition: int) -> dict[str, Any]:
    """Returns what a job depends on."""
    sizes = {"images": args.images, "epochs": args.epochs} if model == "dinov2" else {"steps": args.steps}
    test = args.test if model == "dinov2" else min(args.test, 192)
    repair = {"dinov2": 400, "smollm2": 128}[model] if args.repair_steps is None else args.repair_steps
    return {
        "model": model,
        "method": method,
        "dtype": dtype,
        **sizes,
        "repair_steps": repair if method == "factors" else None,
        "test": test,
        "threads": torch.get_num_threads(),
        "seed": repetition,
        "heap": "lean, kept" if args.lean_heap else None,  # "lean" before: large blocks were given back
    }


def summary(entries: dict[str, Any], jobs: list[dict[str, Any]]) -> str:
    """Formats medians over the rounds: seconds, peak above idle, both relative to LoRA in the same precision."""
    titles = [
        "model, method",
        "rounds",
        "wall s",
        *(f"{part} s" for part in PARTS),
        "of LoRA's wall",
        "peak MiB above idle",
    ]
    titles += ["of LoRA's peak", "of LoRA's, checkpointing", "quality"]
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * ' --- |'}"]
    rows: dict[str, list[dict[str, float]]] = {}
    for job in jobs:
        found = entries.get(key_of(job))
        if job["method"] == IDLE or found is None:
            continue
        twins = {
            name: entries.get(key_of({**job, "method": name, "dtype": dtype, "repair_steps": None}))
            for name, dtype in ((LORA, job["dtype"]), (CHECKPOINTED, job["dtype"]), (IDLE, "float32"))
        }
        idle = twins[IDLE]["peak_bytes"] if twins[IDLE] else 0
        row = {name: found[name] for name in ("wall_seconds", *(f"{part}_seconds" for part in PARTS))}
        row["wall"] = found["wall_seconds"] / twins[LORA]["wall_seconds"] if twins[LORA] else float("nan")
        row["peak"] = (found["peak_bytes"] - idle) / MIB
        for name in (LORA, CHECKPOINTED):
            row[name] = (
                (found["peak_bytes"] - idle) / (twins[name]["peak_bytes"] - idle) if twins[name] else float("nan")
            )
        row["quality"] = found.get("quality", float("nan"))
        rows.setdefault(f"{job['model']}, {job['method']}, {job['dtype']}", []).append(row)
    for name, found in rows.items():
        medians = {column: statistics.median(row[column] for row in found) for column in found[0]}
        digits = {**dict.fromkeys(("wall", LORA, CHECKPOINTED), 2), "quality": 4, "peak": 0}
        cells = [
            "-" if math.isnan(value) else f"{value:.{digits.get(column, 1)}f}" for column, value in medians.items()
        ]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    add("--models", nargs="+", choices=RATES, default=list(RATES))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16: autocast, as bf16=True")
    add("--rounds", type=int, default=3)
    add("--images", type=int, default=6000, help="dinov2: training images")
    add("--epochs", type=float, default=3.0, help="dinov2: passes over them")
    add("--steps", type=int, default=40, help="smollm2: optimizer steps")
    add("--repair-steps", type=int, help="factors (default: 400 for dinov2, 128 for smollm2)")
    add("--test", type=int, default=10_000, help="test images, or windows up to 192; 0: quality is not measured")
    add("--lean-heap", action="store_true", help="all methods with the heap that `wasi-peft run` gives")
    add("--results", type=Path, default=RESULTS)
    add("--summarise", action="store_true", help="run nothing, print the medians of the jobs asked for")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the jobs that are missing and prints the medians."""
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    if args.job:
        print(json.dumps(run_job(args.job)), flush=True)
        return
    jobs = every_job(args)
    for job in [] if args.summarise else jobs:
        key = key_of(job)
        if key in read_json(args.results):
            print(f"finished before: {key}", flush=True)
            continue
        print(f"running: {key}", flush=True)
        entry = {"settings": job, **in_a_process(job)}
        add_entry(args.results, key, entry, lock=cache_dir() / f"{args.results.name}.lock")
    print(summary(read_json(args.results), jobs))


if __name__ == "__main__":
    main()
