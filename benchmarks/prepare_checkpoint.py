"""What it takes to prepare a checkpoint block by block, and to train on it, at one billion parameters.

A checkpoint of random weights in bfloat16 with the shape of TinyLlama-1.1B is written shard by shard. Then, each run
in a process of its own:

* prepare: `prepare_checkpoint` to 8 bits, without data; with 4 batches of 2 x 512 tokens; to factors of half of the
  weights, with the same batches;
* train: three steps of 1 x 512 tokens on the model in 8 bits, as it is loaded from the prepared folder, with
  `WasiConfig(memory_mode="small")`; and on the dense model in bfloat16 with LoRA of rank 16 and gradient
  checkpointing.

Measured are the peak of the process (resident set) above what it held once everything was imported, and seconds.
Weights are random, so this says nothing of accuracy. Factors decompose moments of inputs and outputs in float64, which
additions do not, and take many times as long.

Results: docs/benchmarks/prepare_checkpoint.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import wasi_peft
from common import (
    RESULTS_FOLDER,
    adamw,
    cache_dir,
    environment,
    process_peak_bytes,
    read_json,
    training_step,
    with_lora,
    write_json,
)

RESULTS = RESULTS_FOLDER / "prepare_checkpoint.json"
MIB = 2**20
SEED, STEPS, BATCHES = 0, 3, 4
SHAPES: dict[str, dict[str, int]] = {
    "1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TOKENS = {"1.1B": 512, "tiny": 32}
PREPARATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "int8": ({}, False),
    "int8 with data": ({}, True),
    "factors with data": ({"weight_share": 0.5}, True),
}
RUNS = (*(f"prepare {name}" for name in PREPARATIONS), "train int8", "train dense LoRA")


def write_checkpoint(folder: Path, shape: str) -> None:
    """A dense checkpoint of random weights, a block at a time."""
    config = transformers.LlamaConfig(**SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else name
        shards.setdefault(block, []).append(name)
    sizes, weight_map = {name: tensor.shape for name, tensor in model.state_dict().items()}, {}
    generator = torch.Generator().manual_seed(SEED)

    def values(name: str) -> Tensor:
        if len(sizes[name]) == 1:
            return torch.ones(sizes[name], dtype=torch.bfloat16)
        return torch.empty(sizes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    folder.mkdir(parents=True)
    for index, names in enumerate(shards.values(), 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: values(name) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config.save_pretrained(folder)


def batch(shape: str, samples: int, seed: int) -> dict[str, Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SHAPES[shape]["vocab_size"], (samples, TOKENS[shape]), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def prepare(name: str, shape: str, dense: Path, output: Path) -> dict[str, Any]:
    """One preparation; returns what it is about."""
    options, with_data = PREPARATIONS[name]
    data = [batch(shape, 2, seed) for seed in range(BATCHES)] if with_data else None
    wasi_peft.prepare_checkpoint(dense, output, wasi_peft.WasiConfig(**options), data)
    return {"written_mib": sum(path.stat().st_size for path in output.glob("*.safetensors")) / MIB}


def train(name: str, shape: str, dense: Path, prepared: Path) -> dict[str, Any]:
    """A few steps; returns their seconds and losses."""
    start = time.perf_counter()
    if name == "int8":
        model = transformers.AutoModelForCausalLM.from_pretrained(prepared)
        model = peft.get_peft_model(model, wasi_peft.WasiConfig(memory_mode="small"))
    else:
        model = with_lora(transformers.AutoModelForCausalLM.from_pretrained(dense), checkpointing=True)
    loaded, optimizer, seconds, losses = time.perf_counter() - start, adamw(model), [], []
    for step in range(STEPS):
        tokens, start = batch(shape, 1, step), time.perf_counter()
        losses.append(training_step(model, optimizer, {**tokens, "labels": tokens["input_ids"]}))
        seconds.append(time.perf_counter() - start)
    return {"load_seconds": loaded, "step_seconds": seconds, "losses": losses}


def measure(run: str, shape: str, dense: Path, folder: Path) -> dict[str, Any]:
    """What one process measures."""
    transformers.logging.set_verbosity_error()
    idle, start = psutil.Process().memory_info().rss, time.perf_counter()
    kind, _, name = run.partition(" ")
    output = folder / f"prepared {name}"
    measured = prepare(name, shape, dense, output) if kind == "prepare" else train(name, shape, dense, output)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "idle_mib": idle / MIB,
        "peak_above_idle_mib": (process_peak_bytes() - idle) / MIB,
    } | measured


def main(arguments: list[str] | None = None) -> None:
    """Measures what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1B")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--folder", type=Path, default=cache_dir() / "prepare_checkpoint", help="for the checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    folder = args.folder / args.shape
    dense = folder / "dense"
    if args.child:
        print(json.dumps(measure(args.runs[0], args.shape, dense, folder)))
        return
    if not (dense / "config.json").is_file():
        shutil.rmtree(dense, ignore_errors=True)
        write_checkpoint(dense, args.shape)
    parameters = sum(path.stat().st_size for path in dense.glob("*.safetensors")) // 2
    needed = {"train int8": "prepare int8"}
    for run in args.runs:
        key = f"{args.shape} {run}"
        if key in read_json(args.results):
            continue
        output = folder / f"prepared {run.partition(' ')[2]}"
        if run in needed and not output.is_dir():
            parser.error(f"{run} needs what {needed[run]} writes: let that run first")
        if run.startswith("prepare"):
            shutil.rmtree(output, ignore_errors=True)
        command = [
            sys.executable,
            __file__,
            "--shape",
            args.shape,
            "--folder",
            str(args.folder),
            "--runs",
            run,
            "--child",
        ]
        settings = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings).stdout
        entry = {"run": run, "shape": {**SHAPES[args.shape], "parameters": parameters}, "tokens": TOKENS[args.shape]}
        entry |= {"batches": BATCHES, "seed": SEED, **json.loads(text.splitlines()[-1]), "environment": environment()}
        write_json(args.results, {**read_json(args.results), key: entry})
        print(key, {name: value for name, value in entry.items() if name not in ("shape", "environment")}, flush=True)


if __name__ == "__main__":
    main()
