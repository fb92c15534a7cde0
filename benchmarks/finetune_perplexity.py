"""Perplexity of a language model fine-tuned in full, with LoRA and with WASI in the memory modes.

SmolLM2-135M on the first 128 tokens of mails. Windows of the first 1,500 mails are trained on; on 192 of mails after
them perplexity is measured; 64 in between are for choosing learning rates. WASI calibrates on 128 of the training
windows and repairs on 512, which depends on no seed and is kept in the cache folder.
Each run is one entry of docs/benchmarks/finetune_perplexity.json; finished runs are skipped::

    python benchmarks/finetune_perplexity.py --method wasi
    python benchmarks/finetune_perplexity.py --method wasi --update low_rank --activation-ranks 48
    python benchmarks/finetune_perplexity.py --method full lora
    python benchmarks/finetune_perplexity.py --summarise

The summary ends with what rounding costs: each run's perplexity relative to that of the run which differs from it in
the memory mode only. "small" compresses no inputs, so its counterpart is the run with exact ones (0 activation ranks).
"""

import argparse
import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

import wasi_peft
from common import RESULTS_FOLDER, add_entry, cache_dir, environment, read_json, with_lora
from finetune_accuracy import key_of, mean_and_spread
from finetuning import METHODS, build_optimizer, train
from prepared import digest, prepared_once
from texts import load_mails, smollm2_folder, token_windows
from wasi_peft.factors.token_repair import TOKEN_STEPS
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.updates import DEFAULT_UPDATE, UPDATES

RESULTS = RESULTS_FOLDER / "finetune_perplexity.json"
RATES = {"full": 2e-5, "lora": 5e-4, "wasi": 5e-4}
CALIBRATION_WINDOWS, REPAIR_WINDOWS, CALIBRATION_BATCH = 128, 512, 4
Settings = dict[str, Any]


def windows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token windows to train on, to choose by and to test on, (n, 128) each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    mails = load_mails(2000)
    return (
        token_windows(tokenizer, mails[:1500], count),
        token_windows(tokenizer, mails[1500:1700], 64),
        token_windows(tokenizer, mails[1700:], 192),
    )


def build(settings: Settings, model: nn.Module, train_set: torch.Tensor) -> nn.Module:
    """Makes the model trainable by the method of the settings."""
    if settings["method"] == "full":
        return model
    if settings["method"] == "lora":
        return with_lora(model)
    config = wasi_peft.WasiConfig(
        weight_share=settings["target_share"],
        activation_threshold=None,
        activation_ranks=settings["activation_ranks"],
        memory_mode=settings["memory_mode"],
        update=settings["update"],
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
def perplexity(model: nn.Module, tokens: torch.Tensor, description: str) -> float:
    """Returns exp of the mean loss of all tokens but the first of each window."""
    model.eval()
    parts = tqdm(tokens.split(8), desc=description)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in parts]
    return math.exp(sum(losses) / len(tokens))


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates once; returns the entry."""
    train_set, held_out, test_set = windows(max(REPAIR_WINDOWS, settings["steps"] * settings["batch_size"]))
    transformers.set_seed(settings["seed"])
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    model = build(settings, model, train_set)
    before = perplexity(model, test_set, "Testing")
    items = [{"input_ids": window, "labels": window} for window in train_set]
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model, build_optimizer(settings["method"], model, settings["lr"]), items, Path(scratch),
            steps=settings["steps"], batch_size=settings["batch_size"], seed=settings["seed"],
        )  # fmt: skip
    entry = {
        "settings": settings,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "perplexity_before": before,
        "held_out_perplexity": perplexity(model, held_out, "Validating"),
        "perplexity": perplexity(model, test_set, "Testing"),
        "losses": [item["loss"] for item in log if "loss" in item],
        "environment": environment(),
    }
    if settings["method"] == "wasi":
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


def every_settings(args: argparse.Namespace) -> list[Settings]:
    """Returns the settings of all runs asked for, seeds outermost."""
    kinds = [(method, mode) for method in args.method for mode in (args.memory_mode if method == "wasi" else [None])]
    return [
        {
            "method": method,
            "memory_mode": mode,
            "update": args.update if method == "wasi" else None,
            "target_share": args.target_share if method == "wasi" else None,
            "activation_ranks": (args.activation_ranks or None) if method == "wasi" else None,
            "repair_steps": args.repair_steps if method == "wasi" else None,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "lr": rate,
            "seed": seed,
        }
        for seed in args.seed
        for method, mode in kinds
        for rate in args.lr or [RATES[method]]
    ]


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--memory-mode", nargs="+", choices=MEMORY_MODES, default=["exact", "fast"])
    add("--seed", type=int, nargs="+", default=[0, 1, 2])
    add("--lr", type=float, nargs="+", help=f"learning rates (default: {RATES})")
    add("--target-share", type=float, default=0.4, help="WASI: share of the weights to keep")
    add("--update", choices=UPDATES, default=DEFAULT_UPDATE, help="WASI: what trains")
    add("--activation-ranks", type=int, default=0, help="WASI: features of each input kept, 0: all")
    add("--repair-steps", type=int, default=TOKEN_STEPS, help="WASI: steps of the repair")
    add("--steps", type=int, default=60, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="windows a step")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--results", type=Path, default=RESULTS, help="the JSON file")
    add("--summarise", action="store_true", help="run nothing, print mean and spread of the finished runs")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    for settings in [] if args.summarise else every_settings(args):
        key = key_of(settings)
        if key in read_json(args.results):
            print(f"finished before: {key}", flush=True)
            continue
        print(f"running: {key}", flush=True)
        entry = run(settings)
        add_entry(args.results, key, entry, lock=cache_dir() / f"{args.results.name}.lock")
        print(f"perplexity {entry['perplexity_before']:.2f} -> {entry['perplexity']:.3f}: {key}", flush=True)
    print(summary(read_json(args.results)))


if __name__ == "__main__":
    main()
