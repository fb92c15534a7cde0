"""Attention of few tokens in bfloat16 on a CPU, by torch's kernel and with a backward of batched products.

First the operation alone, forward and backward: many shapes, in bfloat16 by torch, in bfloat16 with a backward of
batched products whatever the length, and in float32 by torch; with each the error of the gradients against float64.
This is what `WORK_PER_QUERY` of `wasi_peft.memory.few_tokens` rests on. Then whole steps under autocast to bfloat16 of
DINOv2-small at 56 px (17 tokens) and SmolLM2-135M (8 x 128), forward and backward, of LoRA and of WASI's default,
each with and without: the technique is not tied to WASI. Runs alternate, in random order; medians, and as the spread
half the range between the quartiles. Memory that is given back to the system and taken again costs steps of a language
model more than what is measured here, so the heap is to keep it. Results: docs/benchmarks/short_attention.json; the
machine should be idle::

    export GLIBC_TUNABLES=glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184
    python benchmarks/short_attention.py
    python benchmarks/short_attention.py --parts operation
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import wasi_peft
from common import RESULTS_FOLDER, environment, read_json, write_json
from finetuning import HEAD
from texts import smollm2_folder
from vit import load_vit
from wasi_peft.memory import ShortAttention, few_tokens, short_attention

RESULTS = RESULTS_FOLDER / "short_attention.json"
SHAPES = {  # samples, heads, heads of keys, tokens, width, causal
    "ViT, 17 tokens": (32, 6, 6, 17, 64, False),
    "ViT, 50 tokens": (64, 6, 6, 50, 64, False),
    "language model, 64 tokens": (16, 9, 3, 64, 64, True),
    "language model, 128 tokens": (8, 9, 3, 128, 64, True),
    "ViT, 197 tokens": (8, 12, 12, 197, 64, False),
    "256 tokens": (4, 9, 9, 256, 64, True),
    "256 tokens, width 32": (4, 12, 12, 256, 32, False),
    "256 tokens, width 128": (4, 12, 12, 256, 128, True),
    "384 tokens": (3, 9, 9, 384, 64, True),
    "512 tokens": (2, 9, 9, 512, 64, True),
    "1024 tokens": (1, 9, 9, 1024, 64, False),
}
ALL_LENGTHS = 2**62
PARTS = ("operation", "steps")


def alternating(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each task: median, and half the range between the quartiles; one round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    shuffled = random.Random(0)
    for _ in range(rounds + 1):
        # in another order each time: what a task leaves in the heap is felt by the next one
        for name, task in shuffled.sample(list(tasks.items()), len(tasks)):
            start = time.perf_counter()
            task()
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values[1:], n=4)
        found[name] = {"milliseconds": round(middle, 2), "spread": round((high - low) / 2, 2)}
    return found


def operation(rounds: int) -> dict[str, Any]:
    """Forward and backward of attention alone."""
    results = {}
    for name, (samples, heads, groups, tokens, width, causal) in SHAPES.items():
        counts = (heads, groups, groups)
        exact = [torch.randn(samples, tokens, count, width).transpose(1, 2) for count in counts]
        grad = torch.randn(samples, tokens, heads, width).transpose(1, 2)

        def gradients(
            dtype: torch.dtype,
            function: Callable[..., Tensor] = F.scaled_dot_product_attention,
            exact: list[Tensor] = exact,
            grad: Tensor = grad,
            causal: bool = causal,
        ) -> list[Tensor]:
            tensors = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in exact]
            output = function(*tensors, is_causal=causal, enable_gqa=True)
            return list(torch.autograd.grad(output, tensors, grad.bfloat16().to(dtype)))

        ways = {
            "bfloat16": lambda run=gradients: run(torch.bfloat16),
            "batched backward": lambda run=gradients: run(torch.bfloat16, short_attention),
            "float32": lambda run=gradients: run(torch.float32),
        }
        truth = torch.cat([grad.flatten() for grad in gradients(torch.float64)])
        with mock.patch.object(few_tokens, "WORK_PER_QUERY", ALL_LENGTHS):
            row = alternating(ways, rounds)
            for way, run in ways.items():
                found = torch.cat([grad.double().flatten() for grad in run()])
                row[way]["gradient_error"] = float(f"{((found - truth).norm() / truth.norm()).item():.2g}")
        row["taken"] = tokens * width <= few_tokens.WORK_PER_QUERY
        results[name] = row
        print(name, row, flush=True)
    return results


def _vit() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    batch = {"pixel_values": torch.randn(32, 3, 56, 56), "labels": torch.randint(10, (32,))}
    return load_vit(), batch, {"modules_to_save": [HEAD]}


def _language_model() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder())
    tokens = torch.randint(model.config.vocab_size, (8, 128))
    return model, {"input_ids": tokens, "labels": tokens}, {"task_type": "CAUSAL_LM"}


def steps(rounds: int) -> dict[str, Any]:
    """Forward and backward of whole models under autocast."""
    results = {}
    for name, make in {"DINOv2-small, 32 x 17 tokens": _vit, "SmolLM2-135M, 8 x 128 tokens": _language_model}.items():
        tasks = {}
        for method in ("LoRA", "WASI"):
            for short in (False, True):
                model, batch, options = make()
                config: Any = wasi_peft.WasiConfig(**options)
                if method == "LoRA":
                    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **options)
                adapted = peft.get_peft_model(model, config).train()
                (ShortAttention().install if short else ShortAttention().remove)(adapted)

                def step(model: nn.Module = adapted, batch: dict[str, Tensor] = batch) -> None:
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(**batch).loss
                    loss.backward()
                    model.zero_grad()

                tasks[f"{method}, {'batched backward of attention' if short else 'torch alone'}"] = step
        results[name] = alternating(tasks, rounds)
        print(name, results[name], flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    parts = {"operation": operation, "steps": steps}
    found = {
        name: {"rounds": args.rounds, "heap": os.environ.get("GLIBC_TUNABLES"), **parts[name](args.rounds)}
        for name in args.parts
    }
    write_json(args.results, {**read_json(args.results), **found, "environment": environment()})


if __name__ == "__main__":
    main()
