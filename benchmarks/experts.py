"""Mixtures of experts: share of the weights that an adapter covers, and whole steps against LoRA on the same layers.

A Mixtral geometry from its configuration, with random weights. "linear layers" is what an adapter on modules alone
covers; the rows below it cover packed experts too, LoRA by `target_parameters`. Peaks are tracked, so they are
deterministic: two complete steps from a fresh copy, everything counted. Times are interleaved rounds; ratios are taken
round by round. Results: docs/benchmarks/experts.json. Run it on an idle machine::

    python benchmarks/experts.py               # about four minutes on two cores
    python benchmarks/experts.py --rounds 0    # shares and peaks only
"""

import argparse
import functools
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import wasi_peft
from common import (
    RESULTS_FOLDER,
    Batch,
    adamw,
    environment,
    inference,
    interleaved_seconds,
    median_ratio,
    step_peak_bytes,
    training_step,
    write_json,
)
from wasi_peft.models.experts import packed_experts

RESULTS = RESULTS_FOLDER / "experts.json"
MIB = 2**20
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK = 16
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1344,  # 3.5 times as wide, as Mixtral's
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "use_cache": False,
}


def build(sizes: dict[str, Any]) -> nn.Module:
    """The dense model with seeded random weights."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes))


def packed_names(model: nn.Module) -> list[str]:
    """Names of the packed parameters, as LoRA's `target_parameters` takes them."""
    return [f"{name}.{parameter}" for name, _, packed in packed_experts(model) for parameter in packed]


def lora(model: nn.Module, experts: bool) -> nn.Module:
    """LoRA on the attention's projections, and on packed experts too."""
    options = {"target_parameters": packed_names(model)} if experts else {}
    return peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LINEAR, **options)
    )


def wasi(model: nn.Module, **options: Any) -> nn.Module:
    """Either form of WASI, at one rank everywhere."""
    return peft.get_peft_model(model, wasi_peft.WasiConfig(**options))


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: model,
    "lora, linear layers": functools.partial(lora, experts=False),
    "lora": functools.partial(lora, experts=True),
    "residual, linear layers": functools.partial(wasi, weight_rank=RANK, target_modules=LINEAR),
    "residual": functools.partial(wasi, weight_rank=RANK),
    "residual small": functools.partial(wasi, weight_rank=RANK, memory_mode="small"),
    # random factors: a step takes the same, and decompositions take longer than all steps
    "factors": lambda model: wasi(
        model, weight_rank=model.config.hidden_size * 3 // 16, residual=None, init_weights=False
    ),
}
BASELINES = ("full", "lora")


def covered(model: nn.Module, dense: nn.Module) -> float:
    """Elements of the dense weights in whose place an adapter stands, over those of all weights."""
    total = sum(parameter.numel() for parameter in dense.parameters())
    if isinstance(model, peft.PeftModel) and isinstance(model.base_model, wasi_peft.WasiModel):
        return sum(layer.dense_elements for layer in model.wasi_summary().layers) / total
    adapted = {
        name.replace("base_model.model.", "").partition(".lora_")[0].replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }
    linear = [name for name in adapted if isinstance(dense.get_submodule(name), nn.Linear)]
    elements = sum(dense.get_submodule(name).weight.numel() for name in linear)
    if len(linear) < len(adapted):
        elements += sum(dense.get_parameter(name).numel() for name in packed_names(dense))
    return elements / total


def measure(sizes: dict[str, Any], batch: Batch, rounds: int) -> dict[str, dict[str, Any]]:
    """Shares, peaks, and with rounds also times, by variant."""
    results: dict[str, dict[str, Any]] = {}
    steps = {}
    dense = build(sizes)
    for name, make in VARIANTS.items():
        model = make(build(sizes))
        inference(model, batch)  # how products are computed is chosen in the first one of a process, by timing
        results[name] = entry = {
            "covered_share": None if name == "full" else covered(model, dense),
            "peak_bytes": step_peak_bytes(model, adamw, batch),
            "stored_bytes": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        print(f"{name}: {entry['peak_bytes'] / MIB:.0f} MiB", flush=True)
        if rounds:
            steps[name] = functools.partial(training_step, model, adamw(model), batch)
        del model
        gc.collect()
    if rounds:
        seconds = interleaved_seconds(steps, rounds, warmup=1, description="steps")
        for name, values in seconds.items():
            against = {base: median_ratio(seconds, name, base) for base in BASELINES}
            results[name] |= {"step_seconds": values, "step_speedup": against}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats results as a Markdown table."""
    titles = ["", "weights covered", "peak MiB", "of full", "of lora", "step s", "than full", "than lora"]
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * ' --- |'}"]
    for name, entry in results.items():
        cells = [name, "" if entry["covered_share"] is None else f"{entry['covered_share']:.0%}"]
        cells.append(f"{entry['peak_bytes'] / MIB:.0f}")
        cells += [f"{entry['peak_bytes'] / results[base]['peak_bytes']:.2f}" for base in BASELINES]
        if "step_seconds" in entry:
            cells.append(f"{statistics.median(entry['step_seconds']):.2f}")
            cells += [f"{entry['step_speedup'][base]:.2f}x" for base in BASELINES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=SIZES["hidden_size"])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 0: peaks only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    sizes = {**SIZES, "hidden_size": args.hidden_size, "intermediate_size": args.hidden_size * 7 // 2}
    ids = torch.randint(5, sizes["vocab_size"], (args.samples, args.tokens))
    results = measure(sizes, {"input_ids": ids, "labels": ids}, args.rounds)
    print(table(results))
    shape = {"samples": args.samples, "tokens": args.tokens}
    content = {"environment": environment(), "sizes": sizes, "batch": shape, "rank": RANK, "results": results}
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
