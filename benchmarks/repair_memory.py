"""Peak memory of the ways to repair initial factors.

One process for each model, way and kind of measurement. It loads the dense model, its factors (plain truncated SVDs
at half of the weights) and the data, then repairs for three steps, of each block with "blocks": the peak depends
neither on how many steps there are nor on what the factors hold. Measured are the peak of the process (resident set)
and, for the smallest in a run of its own, that of the tensors that the repair makes.

* dinov2-56, dinov2-224: DINOv2-small ViT, 16 batches of 32 random images of 56 or 224 px (17 or 257 tokens);
* smollm2: the shape of SmolLM2-135M, with random weights, 128 batches of 4 windows of 128 random tokens.

Results: docs/benchmarks/repair_memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn

from common import environment, read_json, write_json
from wasi_peft import WasiFactors
from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.factors.calibration import dense_targets
from wasi_peft.factors.repairs import REPAIRS
from wasi_peft.forms.dense import dense_bias, dense_weight
from wasi_peft.linalg.spectra import factorize_weight
from wasi_peft.tuner.prepared import PreparedLayer
from wasi_peft.updates.base import InitialFactors

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "repair_memory.json"
MODELS = ("dinov2-56", "dinov2-224", "smollm2")
MIB = 2**20
SEED, STEPS = 0, 3
Batches = list[dict[str, torch.Tensor]]


def load(name: str) -> tuple[nn.Module, Batches]:
    """The dense model, and data for its repair."""
    generator = torch.Generator().manual_seed(SEED)
    if name == "smollm2":
        torch.manual_seed(SEED)
        shape = transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        tokens = torch.randint(shape.vocab_size, (512, 128), generator=generator)
        return transformers.LlamaForCausalLM(shape).eval(), [{"input_ids": part} for part in tokens.split(4)]
    from vit import load_vit

    size = int(name.rpartition("-")[2])
    images = (torch.randn(32, 3, size, size, generator=generator) for _ in range(16))
    return load_vit(), [{"pixel_values": part} for part in images]


def half_of(model: nn.Module) -> WasiFactors:
    """Factors with half of the elements of every target layer."""
    layers = {}
    for name, module in dense_targets(model, None).items():
        weight = dense_weight(module)
        rank = weight.numel() // (2 * sum(weight.shape))
        L, R, _ = factorize_weight(weight, lambda _, rank=rank: rank)
        layers[name] = PreparedLayer(InitialFactors(L, R, dense_bias(module)), rank, rank, None, "factor")
    return WasiFactors(layers)


def measure(name: str, way: str, tensors: bool) -> dict[str, float]:
    """What one process measures, in MiB."""
    torch.set_num_threads(1)
    model, batches = load(name)
    factors = half_of(model)

    def repair() -> None:
        REPAIRS[way].run(model, factors, batches, steps=STEPS, progress_bar=False)

    if tensors:
        return {"tensors_mib": measure_peak_memory(repair).peak_bytes / MIB}
    before = psutil.Process().memory_info().rss
    repair()
    return {"loaded_mib": before / MIB, "process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main(arguments: list[str] | None = None) -> None:
    """Measures what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repair", nargs="+", choices=list(REPAIRS), default=list(REPAIRS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=("process", "tensors"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(measure(args.model[0], args.repair[0], args.child == "tensors")))
        return
    torch.set_num_threads(1)  # as in the processes that measure
    for name in args.model:
        for way in args.repair:
            key = f"{name} {way}"
            if key in read_json(args.results) or (way == "tokens" and name != "smollm2"):
                continue
            entry: dict[str, Any] = {"model": name, "repair": way, "steps": STEPS, "seed": SEED}
            # the record of all allocations of the larger ones would itself take gigabytes
            for kind in ("process", "tensors") if name == "dinov2-56" else ("process",):
                command = [sys.executable, __file__, "--model", name, "--repair", way, "--child", kind]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                entry |= json.loads(output.splitlines()[-1])
            write_json(args.results, {**read_json(args.results), key: {**entry, "environment": environment()}})
            print(key, entry, flush=True)


if __name__ == "__main__":
    main()
