"""Swin-T: what inputs compressed as maps save beside flattened ones, and where the paper's 62x comes from.

Swin-T from its configuration with random weights; the linear layers of its MLPs train, as in the paper (arXiv
2510.09160). Their inputs are maps, [batch, height, width, features], which transformers flattens: hooks give them
their places back. Activation ranks are the same numbers in every layer, cut to its size, so that the core of a
flattened form (49 token directions) is as large as that of a map (7 of its height, 7 of its width).

"step": bytes and FLOPs of whole training steps with AdamW, counted by `estimate_wasi`; with `--rounds` also tracked
peaks and seconds. "paper": the paper's accounting at batch 128, arithmetic: float32 weights of the MLPs and what is
kept of their inputs. Results: docs/benchmarks/swin.json::

    python benchmarks/swin.py
    python benchmarks/swin.py --rounds 5        # on an idle machine
"""

import argparse
import functools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

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
from wasi_peft.cost.estimate import input_sizes
from wasi_peft.updates import costs

MIB, GIGA = 2**20, 10**9
RESULTS = RESULTS_FOLDER / "swin.json"
TARGETS = ["fc1", "fc2"]
KEPT = 0.86  # share of the weights that the paper's threshold of 0.9 keeps on Swin-T
PAPER_BATCH = 128
FLAT, MAP = {"feature": 24, "token": 49}, {"feature": 24, "height": 7, "width": 7}
COMPRESSED: dict[str, dict[str, int] | None] = {
    "inputs exact": None,
    "features": {"feature": 24},
    "features, tokens": FLAT,
    "features, height, width": MAP,
}
BASELINES = DENSE, DENSE_MLPS, RESIDUAL = "dense, all train", "dense, MLPs train", "residual"


def _as_map(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    side = math.isqrt(args[0].shape[1])
    return (args[0].unflatten(1, (side, side)),)


def _flattened(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y.flatten(1, 2)


def swin(size: Mapping[str, Any]) -> nn.Module:
    """The dense model, whose MLPs read maps."""
    torch.manual_seed(0)
    model = SwinForImageClassification(SwinConfig(num_labels=10, **size))
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(_as_map)
            module.register_forward_hook(_flattened)
    return model


def rank_for_share(out_features: int, in_features: int, share: float = KEPT) -> int:
    """The largest K whose factors are no more than a share of the dense weight."""
    return max(1, int(share * costs.dense_elements(out_features, in_features) / (out_features + in_features)))


def configuration(row: str, model: nn.Module) -> wasi_peft.WasiConfig | None:
    """What is put into the model for a row; None for dense ones."""
    if row in (DENSE, DENSE_MLPS):
        return None
    if row == RESIDUAL:
        return wasi_peft.WasiConfig(target_modules=TARGETS, modules_to_save=["classifier"])
    ranks = {
        f"{name}$": rank_for_share(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS))
    }
    modes = COMPRESSED[row]
    return wasi_peft.WasiConfig(
        residual=None, update="factor", target_modules=TARGETS, rank_pattern=ranks, modules_to_save=["classifier"],
        activation_threshold=None, activation_ranks=modes, activation_modes=list(modes or ["feature"]),
    )  # fmt: skip


def batch_of(samples: int, image_size: int) -> dict[str, Tensor]:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(samples, 3, image_size, image_size, generator=generator),
        "labels": torch.randint(10, (samples,), generator=generator),
    }


def build(row: str, size: Mapping[str, Any]) -> nn.Module:
    """The model of a row, ready to train."""
    model = swin(size)
    config = configuration(row, model)
    if row == DENSE_MLPS:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name or "classifier" in name)
    return model if config is None else get_peft_model(model, config)


def steps(size: Mapping[str, Any], samples: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What a whole step takes, by row."""
    batch = batch_of(samples, SwinConfig(**size).image_size)
    rows: dict[str, dict[str, Any]] = {}
    tasks = {}
    for row in (*BASELINES, *COMPRESSED):
        model = build(row, size)
        estimate = wasi_peft.estimate_wasi(model, batch=batch)
        rows[row] = {
            name: getattr(estimate, name) for name in ("peak_bytes", "saved_bytes", "state_bytes", "training_flops")
        }
        print(f"{row}: {estimate.peak_bytes / MIB:.0f} MiB, {estimate.training_flops / GIGA:.0f} GFLOP", flush=True)
        if rounds:
            rows[row]["tracked_peak_bytes"] = step_peak_bytes(model, adamw, batch)
            tasks[row] = functools.partial(training_step, model, adamw(model), batch)
    if rounds:
        seconds = interleaved_seconds(tasks, rounds, warmup=1)
        for row, values in seconds.items():
            rows[row] |= {"step_seconds": values, "speedup": median_ratio(seconds, row, DENSE_MLPS)}
    return rows


def paper(size: Mapping[str, Any], samples: int = PAPER_BATCH) -> dict[str, dict[str, float]]:
    """The paper's accounting, by activation ranks: bytes of weights and inputs of the MLPs, and the ratio to dense."""
    model = swin(size)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS))
    }
    one = batch_of(1, SwinConfig(**size).image_size)
    shapes = input_sizes(model, layers, one)
    assert shapes is not None
    weights = inputs = kept_weights = 0
    kept: dict[str, int] = dict.fromkeys(
        ("smallest ranks, map", "smallest ranks, flattened", "7 x 7 x 24, map", "49 x 24, flattened", "24 features"), 0
    )
    for name, layer in layers.items():
        _, height, width, features = shapes[name]
        out = layer.out_features
        weights += costs.dense_elements(out, features)
        kept_weights += costs.factored_elements(out, features, rank_for_share(out, features))
        inputs += samples * height * width * features
        tokens = height * width
        kept["smallest ranks, map"] += 1 + samples + height + width + features
        kept["smallest ranks, flattened"] += costs.input_elements(
            samples, tokens, features, {"feature": 1, "token": 1, "batch": 1}
        )
        rows, columns = min(7, height), min(7, width)
        kept["7 x 7 x 24, map"] += samples * rows * columns * 24 + rows * height + columns * width + 24 * features
        kept["49 x 24, flattened"] += costs.input_elements(samples, tokens, features, FLAT)
        kept["24 features"] += costs.input_elements(samples, tokens, features, {"feature": 24})
    dense = {"weight_bytes": 4 * weights, "input_bytes": 4 * inputs, "ratio": 1.0}
    return {"dense": dense} | {
        name: {
            "weight_bytes": 4 * kept_weights,
            "input_bytes": 4 * elements,
            "ratio": (weights + inputs) / (kept_weights + elements),
        }
        for name, elements in kept.items()
    }


def tables(content: Mapping[str, Any]) -> str:
    """Formats both parts as Markdown tables."""
    lines = ["| step | peak MiB | kept for backward MiB | GFLOP | s |", "| --- | --- | --- | --- | --- |"]
    for row, entry in content["step"].items():
        seconds = f"{statistics.median(entry['step_seconds']):.2f}" if "step_seconds" in entry else ""
        sizes = f"{entry['peak_bytes'] / MIB:.0f} | {entry['saved_bytes'] / MIB:.0f}"
        lines.append(f"| {row} | {sizes} | {entry['training_flops'] / GIGA:.1f} | {seconds} |")
    lines += ["", "| paper's accounting | weights MiB | inputs MiB | ratio |", "| --- | --- | --- | --- |"]
    for row, entry in content["paper"].items():
        sizes = f"{entry['weight_bytes'] / MIB:.1f} | {entry['input_bytes'] / MIB:.2f}"
        lines.append(f"| {row} | {sizes} | {entry['ratio']:.1f}x |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Counts, prints tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="of timing; 0: counts only")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--depths", type=int, nargs=4, default=[2, 2, 6, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    size = {"image_size": args.image_size, "depths": args.depths}
    content = {
        "batch": args.batch,
        "paper": paper(size),
        "step": steps(size, args.batch, args.rounds),
        "environment": environment(),
    }
    print(f"\n{tables(content)}")
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
