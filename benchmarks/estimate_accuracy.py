"""Compares `estimate_wasi` with the measured tracked peak of real training steps.

Three architectures of four layers with random weights, three batch sizes, full fine-tuning, LoRA and WASI with every
update and in every memory mode. Deterministic: what is compared are bytes, not clocks. A measured run is a copy of the
model, its optimizer (fused AdamW) and two complete steps. Results: docs/benchmarks/estimate_accuracy.json.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from torch import nn

import wasi_peft
from common import RESULTS_FOLDER, Batch, adamw, environment, step_peak_bytes, write_json
from wasi_peft.cost.estimate import estimate_wasi
from wasi_peft.updates import UPDATES

RESULTS = RESULTS_FOLDER / "estimate_accuracy.json"
MIB = 2**20
VOCABULARY = 8000


def build(architecture: str, width: int, layers: int) -> nn.Module:
    """A model from its configuration, with seeded random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    if architecture == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**sizes, intermediate_size=4 * width, num_labels=10))
    sizes["vocab_size"] = VOCABULARY
    if architecture == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**sizes, intermediate_size=4 * width))
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**sizes, num_key_value_heads=width // 128, intermediate_size=8 * width // 3)
    )


def make_batch(architecture: str, samples: int, tokens: int) -> Batch:
    """Images of 224 px, or token ids of which the first sample's last quarter is padding."""
    torch.manual_seed(1)
    if architecture == "vit":
        return {"pixel_values": torch.randn(samples, 3, 224, 224), "labels": torch.randint(10, (samples,))}
    ids = torch.randint(3, VOCABULARY, (samples, tokens))
    mask = torch.ones_like(ids)
    mask[0, -tokens // 4 :] = 0
    labels = torch.randint(2, (samples,)) if architecture == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def methods(rank: int) -> dict[str, Callable[[], peft.PeftConfig | None]]:
    """Configurations by name, made afresh since injection fills them in."""

    def wasi(update: Any, memory_mode: Any = "exact") -> peft.PeftConfig:
        inputs = {} if UPDATES[update].reads_input is None else {"activation_ranks": rank}
        return wasi_peft.WasiConfig(residual=None, weight_rank=rank, update=update, memory_mode=memory_mode, **inputs)

    return {
        "dense": lambda: None,
        "lora": lambda: peft.LoraConfig(r=16, target_modules="all-linear"),
        "wasi_subspace": lambda: wasi("subspace"),
        "wasi_factor": lambda: wasi("factor"),
        "wasi_frozen_basis": lambda: wasi("frozen_basis"),
        "wasi_frozen_basis_fast": lambda: wasi("frozen_basis", "fast"),
        "wasi_frozen_basis_small": lambda: wasi("frozen_basis", "small"),
        "wasi_low_rank": lambda: wasi("low_rank"),
        "wasi_low_rank_fast": lambda: wasi("low_rank", "fast"),
        "wasi_low_rank_small": lambda: wasi("low_rank", "small"),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Estimates and measures every combination, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["vit", "bert", "llama"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16, 32])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rank", type=int, default=96, help="weight rank and activation rank of WASI")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    results: dict[str, Any] = {}
    print(f"{'architecture':14}{'batch':>6}  {'method':24}{'measured MiB':>14}{'estimate MiB':>14}{'difference':>12}")
    for architecture in args.architectures:
        for samples in args.batches:
            batch = make_batch(architecture, samples, args.tokens)
            for method, config in methods(args.rank).items():
                model = build(architecture, args.width, args.layers)
                estimate = estimate_wasi(model, config(), batch=batch)
                adapter = config()
                model = model if adapter is None else peft.get_peft_model(model, adapter)
                measured = step_peak_bytes(model, adamw, batch)
                difference = estimate.peak_bytes / measured - 1
                entry = {"measured_peak_bytes": measured, "relative_difference": difference, **estimate.to_dict()}
                results.setdefault(architecture, {}).setdefault(str(samples), {})[method] = entry
                sizes = f"{measured / MIB:>14,.1f}{estimate.peak_bytes / MIB:>14,.1f}"
                print(f"{architecture:14}{samples:>6}  {method:24}{sizes}{difference:>12.2%}", flush=True)
    settings = {key: value for key, value in vars(args).items() if key != "results"}
    write_json(args.results, {"settings": settings, "results": results, "environment": environment()})
    return results


if __name__ == "__main__":
    main()
