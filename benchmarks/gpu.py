"""Both forms of WASI against full fine-tuning and LoRA on a CUDA device, in fp32 and in bf16: time and memory.

Two models from their configurations with random weights, so no data are needed: ViT-B/32 geometry at batch 128, and a
Llama of SmolLM2-135M's shape (or, with `--large`, of about 1.1 billion parameters) on 8 x 512 tokens. One model is on
the device at a time; its steps and its inference alternate, each waited for. Peaks are those of the caching allocator,
everything counted. Rows in bf16 train under autocast; "base in bf16" has the model loaded in it too. Which int8
products the layers chose is recorded. Where there is no GPU, this says so and ends. Results: docs/benchmarks/gpu.json,
minutes::

    python benchmarks/gpu.py
    make test-gpu       # the tests marked gpu, and this
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from common import (
    RESULTS_FOLDER,
    Batch,
    adamw,
    environment,
    inference,
    interleaved_seconds,
    median_ratio,
    read_json,
    step_peak_bytes,
    training_step,
    vit_b32,
    write_json,
)
from wasi_peft.tuner.layer import wasi_layers
from workloads import CHECKPOINTED, MIB, Workload, build, random_images

RESULTS = RESULTS_FOLDER / "gpu.json"
VARIANTS = (
    *("full", "lora", CHECKPOINTED, "residual exact", "residual fast", "residual small", "residual int4 exact"),
    *("residual dense exact", "wasi exact", "wasi fast", "wasi small"),
)
PRECISIONS = {"": (torch.float32, False), ", bf16": (torch.float32, True), ", base in bf16": (torch.bfloat16, True)}
NO_GPU = "no CUDA device is available: nothing is measured"


def llama(large: bool = False) -> nn.Module:
    """A Llama with random weights, of the shape of SmolLM2-135M or a larger one."""
    torch.manual_seed(0)
    small_shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    large_shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    shape, heads = (large_shape, 4) if large else (small_shape, 3)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=heads, vocab_size=49152, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def random_tokens() -> Batch:
    """8 x 512 random tokens."""
    tokens = torch.randint(0, 49152, (8, 512), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


def workloads(large: bool) -> dict[str, Workload]:
    """Models with their batches; factors keep 0.40 of the weights."""
    name = "llama_1b" if large else "llama_135m"
    return {
        "vit_b32": Workload(vit_b32, random_images, "classifier", None, 0.4, 48),
        name: Workload(functools.partial(llama, large), random_tokens, None, None, 0.4, 48),
    }


def waited_for(task: Callable[[], Any]) -> None:
    """Runs a task and waits until the device has done it."""
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(workload: Workload, variants: list[str], rounds: int, device: str = "cuda") -> dict[str, dict[str, Any]]:
    """Peak and times of every variant in every precision. A variant is built, measured and let go before the next."""
    batch = {name: tensor.to(device) for name, tensor in workload.batch().items()}
    results: dict[str, dict[str, Any]] = {}
    for variant in variants:
        for suffix, (dtype, bf16) in PRECISIONS.items():
            in_dtype = dataclasses.replace(workload, load=lambda dtype=dtype: workload.load().to(dtype))
            model = build(variant, in_dtype).to(device)
            waited_for(functools.partial(inference, model, batch, bf16))  # products are chosen here
            entry: dict[str, Any] = {"peak_bytes": step_peak_bytes(model, adamw, batch, bf16)}
            step = functools.partial(training_step, model, adamw(model), batch, bf16)
            reading = functools.partial(inference, model, batch, bf16)
            tasks = {
                "step": functools.partial(waited_for, step),
                "inference": functools.partial(waited_for, reading),
            }
            seconds = interleaved_seconds(tasks, rounds, warmup=3, description=f"{variant}{suffix}")
            entry |= {f"{kind}_seconds": values for kind, values in seconds.items()}
            entry["products"] = chosen_products(model)
            results[f"{variant}{suffix}"] = entry
            print(f"{variant}{suffix}: {entry['peak_bytes'] / MIB:.0f} MiB", flush=True)
            del model, step, reading, tasks
    for row in results.values():
        for base in ("full", "full, bf16", "lora", "lora, bf16"):
            if base in results:
                pair = {"row": row["step_seconds"], "base": results[base]["step_seconds"]}
                row.setdefault("step_speedup", {})[base] = median_ratio(pair, "row", "base")
    return results


def chosen_products(model: nn.Module) -> dict[str, str]:
    """Which way of multiplying the layers of a model chose, by kind of operands."""
    for _, layer in wasi_layers(model):
        products = getattr(layer.residual, "products", None)
        return {} if products is None else products.chosen
    return {}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one workload as a Markdown table."""
    bases = list(next(iter(results.values()))["step_speedup"])
    lines = [f"| | peak MiB | step ms | {' | '.join(f'than {base}' for base in bases)} | inference ms |"]
    lines.append(f"|{(4 + len(bases)) * ' --- |'}")
    for row, entry in results.items():
        milliseconds = [1000 * statistics.median(entry[f"{kind}_seconds"]) for kind in ("step", "inference")]
        speedups = [f"{entry['step_speedup'][base]:.2f}x" for base in bases]
        cells = [f"{entry['peak_bytes'] / MIB:.0f}", f"{milliseconds[0]:.1f}", *speedups, f"{milliseconds[1]:.1f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON; models measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="see build() in workloads.py")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="a Llama of 1.1 billion parameters")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return {}
    transformers.logging.set_verbosity_error()
    content = read_json(args.results)
    for name, workload in workloads(args.large).items():
        results = measure(workload, args.variants, args.rounds)
        print(f"\n{name}\n\n{table(results)}\n", flush=True)
        device = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        content[name] = {"rounds": args.rounds, "results": results, "environment": {**environment(), **device}}
        write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
