"""Inference of the dense model, LoRA and both forms of WASI, in fp32, under autocast and with the model in bf16.

The dense model is also that of merged LoRA; "compressed" has weights in 8 bits and no adapter. Factors come as they
are, with slow layers dense again, and compiled.

DINOv2-small at 98 px with one image and with 64, and SmolLM2-135M reading 8 mails of 128 tokens and writing 16 tokens
after one of them, with its cache of keys and values; 0.40 of the weights kept, factors from plain decompositions.
Prefill is what generation starts with: all tokens read into the cache, logits for the last one of each row only.
Interleaved rounds; ratios are taken round by round. Generation is not compiled:
its cache changes shape with every token. Results: docs/benchmarks/inference_time.json. Run it on an idle machine::

    python benchmarks/inference_time.py
"""

import argparse
import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wasi_peft
from common import RESULTS_FOLDER, Batch, autocast, inference, interleaved_seconds, median_ratio
from workloads import WORKLOADS, build, measure_workloads

RESULTS = RESULTS_FOLDER / "inference_time.json"
NEW_TOKENS = 16
MODELS = {
    "dense": "full",
    "lora, not merged": "lora",
    "compressed": "compressed",
    "residual": "residual exact",
    "residual dense": "residual dense exact",
    "wasi": "wasi exact",
}
COMPILED = ("dense", "residual", "wasi")
PRECISIONS = ("float32", "autocast", "bfloat16")


def first(batch: Batch, samples: int | None) -> Batch:
    """The first samples of a batch, without labels."""
    return {name: tensor[:samples] for name, tensor in batch.items() if name != "labels"}


@torch.inference_mode()
def generate(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Writes `NEW_TOKENS` tokens after the given ones, the likeliest each time."""
    model.eval()
    return model.generate(
        **batch, attention_mask=torch.ones_like(batch["input_ids"]), do_sample=False,
        min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
    )  # fmt: skip


@torch.inference_mode()
def prefill(model: nn.Module, batch: Batch) -> None:
    """Reads the tokens into a cache of keys and values, as `generate` does before it writes the first one."""
    model.eval()
    model(**batch, use_cache=True, logits_to_keep=1)


def under_autocast(run: Callable[..., Any], model: nn.Module, batch: Batch) -> None:
    """Runs a task under autocast to bfloat16."""
    with autocast(batch, True):
        run(model, batch)


# name: workload, samples of its batch, what is run, whether it can be compiled, tokens that count for slow layers
CASES: dict[str, tuple[str, int | None, Callable[..., Any], bool, int | None]] = {
    "dinov2, 1 image": ("dinov2", 1, inference, True, None),
    "dinov2, 64 images": ("dinov2", None, inference, True, None),
    "smollm2, 8 x 128 tokens": ("smollm2", None, inference, True, None),
    "smollm2, prefill of 8 x 128 tokens": ("smollm2", None, prefill, False, None),
    "smollm2, writing": ("smollm2", 1, generate, False, 1),
}


def measure(name: str, rounds: int, compile_models: bool, precisions: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of one case by variant."""
    workload_name, samples, run, can_compile, tokens = CASES[name]
    workload = WORKLOADS[workload_name]
    batch = first(workload.batch(), samples)
    models = {variant: build(kind, workload) for variant, kind in MODELS.items()}
    tasks = {}
    if "autocast" in precisions:
        tasks |= {
            f"{variant}, autocast": functools.partial(under_autocast, run, models[variant], batch)
            for variant in models
        }
    if "bfloat16" in precisions:
        halves = {variant: copy.deepcopy(model).to(torch.bfloat16) for variant, model in models.items()}
        tasks |= {f"{variant}, in bf16": functools.partial(run, model, batch) for variant, model in halves.items()}
    models["wasi, slow layers dense"] = copy.deepcopy(models["wasi"])
    with torch.inference_mode():
        sizes = batch if tokens is None else {key: tensor[:, :tokens] for key, tensor in batch.items()}
        merged = wasi_peft.merge_slow_layers(models["wasi, slow layers dense"], sizes)
    results: dict[str, dict[str, Any]] = {variant: {} for variant in (*models, *tasks)}
    results["wasi, slow layers dense"]["merged"] = merged
    if can_compile and compile_models:
        for variant in COMPILED:
            compiled = torch.compile(models[variant])
            start = time.perf_counter()
            run(compiled, batch)
            results[f"{variant}, compiled"] = {"compilation_seconds": time.perf_counter() - start}
            models[f"{variant}, compiled"] = compiled
    tasks = {**{variant: functools.partial(run, model, batch) for variant, model in models.items()}, **tasks}
    seconds = interleaved_seconds(tasks, rounds, description=name)
    for variant, values in seconds.items():
        results[variant]["seconds"] = values
        results[variant]["faster_than_dense"] = median_ratio(seconds, variant, "dense")
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one case as a Markdown table."""
    lines = ["| variant | milliseconds | faster than dense | layers made dense |", "| --- | --- | --- | --- |"]
    for variant, entry in results.items():
        merged = str(len(entry["merged"])) if "merged" in entry else ""
        milliseconds = 1000 * statistics.median(entry["seconds"])
        lines.append(f"| {variant} | {milliseconds:.1f} | {entry['faster_than_dense']:.2f}x | {merged} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON; cases measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled models out")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="float32 always")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
    return measure_workloads(args, lambda name: measure(name, args.rounds, not args.no_compile, args.precision), table)


if __name__ == "__main__":
    main()
