"""What padding costs a training step, and what is left of it with `skip_padding`.

A BERT encoder of MiniLM's geometry with random weights classifies a batch of 32 texts, padded to the longest one of
128 tokens; lengths are drawn evenly from 1 to 128, so about half of the tokens are padding. Peaks are tracked: two
complete steps from a fresh copy. Times are interleaved rounds. Neither depends on the weights. Results:
docs/benchmarks/padding.json::

    python benchmarks/padding.py
    python benchmarks/padding.py --rounds 7     # on an idle machine
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import wasi_peft
from common import (
    RESULTS_FOLDER,
    adamw,
    environment,
    interleaved_seconds,
    median_ratio,
    step_peak_bytes,
    training_step,
    write_json,
)
from wasi_peft.memory import MEMORY_MODES, UnpaddedBlocks

MIB, GIGA = 2**20, 10**9
RESULTS = RESULTS_FOLDER / "padding.json"
SAMPLES, TOKENS, VOCABULARY = 32, 128, 30522
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SKIPPING = "{}, padding skipped"


def padded_batch() -> dict[str, torch.Tensor]:
    """The batch; its longest text has no padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, TOKENS + 1, (SAMPLES,), generator=generator)
    lengths[0] = TOKENS
    return {
        "input_ids": torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=generator),
        "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "labels": torch.randint(2, (SAMPLES,), generator=generator),
    }


def build(variant: str, layers: int) -> nn.Module:
    """The dense model, whose embeddings are frozen as an adapter's are, or one with the default adapter in a mode."""
    torch.manual_seed(0)
    mode, _, skips = variant.partition(",")
    model = BertForSequenceClassification(BertConfig(**{**MINILM, "num_hidden_layers": layers}, vocab_size=VOCABULARY))
    if mode != "full":
        config = wasi_peft.WasiConfig(memory_mode=mode, skip_padding=bool(skips), modules_to_save=["classifier"])
        return get_peft_model(model, config)
    model.bert.embeddings.requires_grad_(False)
    if skips:
        UnpaddedBlocks().install(model)
    return model


def measure(rounds: int, layers: int) -> dict[str, Any]:
    """Peak and seconds of a step of every variant."""
    batch = padded_batch()
    variants = [name for mode in ("full", *MEMORY_MODES) for name in (mode, SKIPPING.format(mode))]
    rows: dict[str, dict[str, Any]] = {}
    steps = {}
    for variant in variants:
        model = build(variant, layers)
        optimizer = adamw(model)
        training_step(model, optimizer, batch)  # blocks are judged, products chosen
        flops = wasi_peft.estimate_wasi(model, batch=batch).training_flops
        rows[variant] = {"peak_bytes": step_peak_bytes(model, adamw, batch), "training_flops": flops}
        steps[variant] = functools.partial(training_step, model, optimizer, batch)
    if rounds:
        seconds = interleaved_seconds(steps, rounds, warmup=1)
        for variant, values in seconds.items():
            rows[variant]["step_seconds"] = values
            if variant.endswith("skipped"):
                rows[variant]["speedup"] = median_ratio(seconds, variant, variant.partition(",")[0])
    return {"real_share": float(batch["attention_mask"].float().mean()), "rows": rows}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = ["| | peak MiB | GFLOP | step s |", "| --- | --- | --- | --- |"]
    for variant, row in rows.items():
        seconds = f"{statistics.median(row['step_seconds']):.3f}" if "step_seconds" in row else ""
        sizes = f"{row['peak_bytes'] / MIB:.0f} | {row['training_flops'] / GIGA:.0f}"
        lines.append(f"| {variant} | {sizes} | {seconds} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="of timing; 0: counts only")
    parser.add_argument("--layers", type=int, default=MINILM["num_hidden_layers"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    content = {**measure(args.rounds, args.layers), "environment": environment()}
    print(f"{content['real_share']:.0%} of the tokens are no padding\n\n{table(content['rows'])}")
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
