"""Perplexity of a language model fine-tuned in full, with LoRA and with WASI in its two forms and the memory modes.

SmolLM2-135M on the first 128 tokens of mails. Windows of the first 1,500 mails are trained on, then of those after the
first 2,000; on 192 of mails 1,700 to 1,999 perplexity is measured; 64 of those in between are for choosing learning
rates. "residual" is `WasiConfig()`; "wasi", the factors that take the weight's place, calibrates on 128 of the
training windows and repairs on 512, which depends on no seed and is kept in the cache folder.

Each run is one entry of docs/benchmarks/finetune_perplexity.json; finished runs are skipped. Without `--lr`, a
method's learning rates of `GRID` are run with seed 0, then the best of them with the other seeds::

    python benchmarks/finetune_perplexity.py --method full lora residual --steps 40
    python benchmarks/finetune_perplexity.py --method full lora residual --steps 40 --dtype bfloat16
    python benchmarks/finetune_perplexity.py --method full lora residual --steps 400 --seed 0
    python benchmarks/finetune_perplexity.py --method residual --residual int8 int4 --rank 32 96 --steps 40
    python benchmarks/finetune_perplexity.py --method wasi --memory-mode exact fast --lr 5e-3 --seed 0 1 2
    python benchmarks/finetune_perplexity.py --method wasi --target-share 0.4 0.5 --frozen-dtype float32 int8
    python benchmarks/finetune_perplexity.py --method full lora residual --steps 40 --summarise

The summary begins with a table of the runs asked for, each at its best rate. It ends with what rounding costs: each
run's perplexity relative to that of the run which differs from it in the memory mode only. "small" compresses no
inputs, so its counterpart is the run with exact ones (0 activation ranks).
"""

import argparse
import functools
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

import wasi_peft
from common import RESULTS_FOLDER, environment, read_json, with_lora
from finetuning import METHODS, build_optimizer, train, with_residual
from prepared import digest, prepared_once
from runs import (
    Scores,
    Settings,
    add_run_arguments,
    comparison,
    key_of,
    mean_and_spread,
    plan_of,
    precision,
    residual_options,
    run_missing,
    unless_float32,
    updates_for,
)
from texts import load_mails, smollm2_folder, token_windows
from wasi_peft.factors.token_repair import TOKEN_STEPS
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.updates import DEFAULT_UPDATE, UPDATES

RESULTS = RESULTS_FOLDER / "finetune_perplexity.json"
JUDGED = Scores("held_out_perplexity", "perplexity", min)
GRID = {
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "lora": (5e-4, 1.5e-3, 3e-3, 5e-3),
    "residual": (5e-4, 1.5e-3, 3e-3, 5e-3),
    "wasi": (5e-4, 1.5e-3, 5e-3, 1.5e-2),
}
CALIBRATION_WINDOWS, REPAIR_WINDOWS, CALIBRATION_BATCH = 128, 512, 4


def windows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token windows to train on, to choose by and to test on, (n, 128) each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    mails = load_mails(10_000)
    return (
        token_windows(tokenizer, mails[:1500] + mails[2000:], count),
        token_windows(tokenizer, mails[1500:1700], 64),
        token_windows(tokenizer, mails[1700:2000], 192),
    )


def build(settings: Settings, model: nn.Module, train_set: torch.Tensor) -> nn.Module:
    """Makes the model trainable by the method of the settings."""
    if settings["method"] == "full":
        return model
    if settings["method"] == "lora":
        return with_lora(model)
    if settings["method"] == "residual":
        mode = settings["memory_mode"]
        config = wasi_peft.WasiConfig(task_type="CAUSAL_LM", memory_mode=mode, **settings["residual"])
        batches = [{"input_ids": part} for part in train_set.split(CALIBRATION_BATCH)]
        return with_residual(model, config, batches, settings["prepare"] or 0)
    config = wasi_peft.WasiConfig(
        weight_share=settings["target_share"],
        activation_threshold=None,
        activation_ranks=settings["activation_ranks"],
        memory_mode=settings["memory_mode"],
        update=settings["update"],
        frozen_dtype=settings["frozen_dtype"],
    )
    windows = train_set[:REPAIR_WINDOWS]
    batches = [{"input_ids": part} for part in windows.split(CALIBRATION_BATCH)]
    steps = settings["repair_steps"]
    key = {"model": digest(model.state_dict()), "windows": digest({"windows": windows}), "repair_steps": steps}
    count = CALIBRATION_WINDOWS // CALIBRATION_BATCH
    prepare = functools.partial(
        wasi_peft.preprocess_wasi, model, config, batches, max_batches=count, repair_steps=steps
    )
    prepared_once(model, config, key, prepare)
    return peft.get_peft_model(model, config)


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: torch.Tensor, description: str, bf16: bool = False) -> float:
    """Returns exp of the mean loss of all tokens but the first of each window; under autocast if asked."""
    model.eval()
    parts = tqdm(tokens.split(8), desc=description)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in parts]
    return math.exp(sum(losses) / len(tokens))


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates once; returns the entry."""
    train_set, held_out, test_set = windows(max(REPAIR_WINDOWS, settings["steps"] * settings["batch_size"]))
    transformers.set_seed(settings["seed"])
    dtype = getattr(torch, settings["base_dtype"] or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype)
    model = build(settings, model, train_set)
    bf16 = settings["dtype"] == "bfloat16"
    before = perplexity(model, test_set, "Testing", bf16)
    items = [{"input_ids": window, "labels": window} for window in train_set]
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model, build_optimizer(settings["method"], model, settings["lr"]), items, Path(scratch),
            steps=settings["steps"], batch_size=settings["batch_size"], seed=settings["seed"], bf16=bf16,
        )  # fmt: skip
    entry = {
        "settings": settings,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "perplexity_before": before,
        "held_out_perplexity": perplexity(model, held_out, "Validating", bf16),
        "perplexity": perplexity(model, test_set, "Testing", bf16),
        "losses": [item["loss"] for item in log if "loss" in item],
        "environment": environment(),
    }
    if settings["method"] in ("residual", "wasi"):
        entry["kept_share"] = model.wasi_summary().kept_share
    return entry


def summary(entries: dict[str, Any]) -> str:
    """Formats mean and spread over seeds, and each memory mode against "exact" seed by seed."""
    lines = [
        "| runs | seeds | before | held-out | test | held-out against exact, % | test against exact, % |",
        f"|{7 * ' --- |'}",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries.values():
        groups.setdefault(key_of({**entry["settings"], "seed": None}), []).append(entry)
    for group, found in groups.items():
        runs = sorted(found, key=lambda entry: entry["settings"]["seed"])
        cells = [", ".join(str(entry["settings"]["seed"]) for entry in runs)]
        for field in ("perplexity_before", "held_out_perplexity", "perplexity"):
            cells.append(mean_and_spread([entry[field] for entry in runs]))
        twins = [(entry, entries.get(key_of({**entry["settings"], "memory_mode": "exact"}))) for entry in runs]
        rounded = runs[0]["settings"]["memory_mode"] not in (None, "exact")
        for field in ("held_out_perplexity", "perplexity"):
            change = [100 * (entry[field] / twin[field] - 1) for entry, twin in twins if twin is not None]
            each = ", ".join(f"{value:+.2f}" for value in change)
            cells.append(f"{mean_and_spread(change, sign='+')} ({each})" if rounded and change else "")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def every_settings(args: argparse.Namespace) -> Iterator[Settings]:
    """Yields the settings of all runs asked for, but for learning rates and seed."""
    for method, dtype in itertools.product(args.method, args.dtype):
        fields = itertools.product(updates_for(method, args.update), args.memory_mode)
        if method == "residual":
            for kind, rank, (update, mode) in itertools.product(args.residual, args.rank, fields):
                yield settings_of(args, method, dtype, mode, residual=residual_options(kind, rank, update))
        elif method == "wasi":
            for share, frozen, (update, mode) in itertools.product(args.target_share, args.frozen_dtype, fields):
                wasi = {"target_share": share, "frozen_dtype": unless_float32(frozen)}
                yield settings_of(args, method, dtype, mode, update or DEFAULT_UPDATE, wasi=wasi)
        else:
            yield settings_of(args, method, dtype)


def settings_of(
    args: argparse.Namespace,
    method: str,
    dtype: str = "float32",
    mode: str | None = None,
    update: str | None = None,
    residual: dict[str, Any] | None = None,
    wasi: dict[str, Any] | None = None,
) -> Settings:
    """Returns the settings of a run, but for learning rates and seed; None is what a key leaves out."""
    given = wasi or {}
    return {
        "method": method,
        "memory_mode": mode,
        "update": update,
        "residual": residual or {},
        "prepare": (args.prepare or None) if method == "residual" else None,
        "target_share": given.get("target_share"),
        "frozen_dtype": given.get("frozen_dtype"),
        "activation_ranks": (args.activation_ranks or None) if method == "wasi" else None,
        "repair_steps": args.repair_steps if method == "wasi" else None,
        **precision(dtype, args.base_dtype),
        "steps": args.steps,
        "batch_size": args.batch_size,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["full", "lora", "residual"])
    add("--memory-mode", nargs="+", choices=MEMORY_MODES, default=["exact"])
    add_run_arguments(parser, RESULTS, torch.get_num_threads())
    add("--target-share", type=float, nargs="+", default=[0.4], help="WASI: shares of the weights to keep")
    add("--update", nargs="+", choices=UPDATES, help="WASI: what trains, where the form can")
    add("--activation-ranks", type=int, default=0, help="WASI: features of each input kept, 0: all")
    add("--repair-steps", type=int, default=TOKEN_STEPS, help="WASI: steps of the repair")
    add("--steps", type=int, default=40, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="windows a step")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    for settings in [] if args.summarise else every_settings(args):
        run_missing(settings, plan_of(args, GRID[settings["method"]]), args.results, JUDGED, run)
    entries = read_json(args.results)
    shares = ("kept_share",) if set(args.method) <= {"residual", "wasi"} else ()
    print(comparison(entries, every_settings(args), JUDGED, ("perplexity_before", *shares)), end="\n\n")
    print(summary(entries))


if __name__ == "__main__":
    main()
