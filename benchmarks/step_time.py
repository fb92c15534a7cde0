"""Times and weighs one training step and one inference batch: full fine-tuning, LoRA and WASI side by side.

The model, images, batch size and options of finetune_accuracy.py; memory is tracked (deterministic), times are
interleaved rounds whose ratios are taken round by round. Run it on an idle machine. Results:
docs/benchmarks/step_time.json.
"""

import argparse
import copy
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import default_collate

from common import (
    RESULTS_FOLDER,
    environment,
    inference,
    inference_peak_bytes,
    interleaved_seconds,
    median_ratio,
    step_peak_bytes,
    training_step,
    write_json,
)
from finetuning import build, build_optimizer
from images import load_images
from vit import load_vit

RESULTS = RESULTS_FOLDER / "step_time.json"
COMPRESSED: dict[str, Any] = {"activation_threshold": None, "activation_ranks": 48}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "wasi low rank": ("wasi", {**COMPRESSED, "update": "low_rank"}),
    "wasi low rank, exact inputs": ("wasi", {"activation_threshold": None, "update": "low_rank"}),
    "wasi frozen basis": ("wasi", {"activation_threshold": None, "update": "frozen_basis"}),
    "wasi core": ("wasi", {"activation_threshold": None, "update": "core"}),
    "wasi factor": ("wasi", {**COMPRESSED, "update": "factor"}),
    "wasi subspace": ("wasi", {**COMPRESSED, "update": "subspace"}),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures every variant, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-share", type=float, default=0.4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="full must be there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()

    images, _ = load_images(train=512, test=32)
    batch = default_collate(images.__getitems__(range(args.batch_size)))
    models: dict[str, nn.Module] = {}
    for name in args.variants:
        method, options = VARIANTS[name]
        share = args.target_share if method == "wasi" else None
        models[name] = build(method, load_vit(), images, options, share, repair_steps=0)

    def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(VARIANTS[name][0], model, 1e-5)

    deployed = {
        name: copy.deepcopy(model).merge_and_unload() if VARIANTS[name][0] == "lora" else model
        for name, model in models.items()
    }
    results: dict[str, dict[str, Any]] = {name: {} for name in args.variants}
    for name, model in models.items():
        results[name]["training_peak_bytes"] = step_peak_bytes(model, functools.partial(optimizer_of, name), batch)
        results[name]["inference_peak_bytes"] = inference_peak_bytes(deployed[name], batch)
        results[name]["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if VARIANTS[name][0] == "wasi":
            results[name]["kept_share"] = model.wasi_summary().kept_share
    inferences = {name: functools.partial(inference, model, batch) for name, model in deployed.items()}
    steps = {
        name: functools.partial(training_step, model, optimizer_of(name, model), batch)
        for name, model in models.items()
    }
    for kind, tasks in (("inference", inferences), ("step", steps)):
        seconds = interleaved_seconds(tasks, args.rounds, description=f"Timing {kind}")
        for name in args.variants:
            results[name][f"{kind}_seconds"] = seconds[name]
            results[name][f"{kind}_speedup"] = median_ratio(seconds, name, "full")

    print(f"{'':36}{'peak MiB':>10}{'step ms':>9}{'faster':>8}{'infer ms':>10}{'faster':>8}")
    for name, result in results.items():
        print(
            f"{name:36}{result['training_peak_bytes'] / 2**20:>10.0f}"
            f"{statistics.median(result['step_seconds']) * 1e3:>9.0f}{result['step_speedup']:>8.2f}"
            f"{statistics.median(result['inference_seconds']) * 1e3:>10.0f}{result['inference_speedup']:>8.2f}"
        )
    settings = {"batch_size": args.batch_size, "rounds": args.rounds, "target_share": args.target_share}
    write_json(args.results, {"settings": settings, "results": results, "environment": environment()})
    return results


if __name__ == "__main__":
    main()
