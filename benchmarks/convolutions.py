"""What factors bring to convolutions with larger kernels: a ResNet-18 of random weights, all of them targets.

Peaks and FLOPs of whole training steps with AdamW, counted by `estimate_wasi`. Factors keep half of the weights of
each convolution, (K, in, k, k) x (out, K). Results: docs/benchmarks/convolutions.json::

    python benchmarks/convolutions.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import wasi_peft
from common import RESULTS_FOLDER, environment, write_json
from wasi_peft.updates import costs

MIB, GIGA = 2**20, 10**9
RESULTS = RESULTS_FOLDER / "convolutions.json"
RESNET18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
TARGETS = r".*\.convolution"
OPTIONS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "factors": {"residual": None},
    "factors, both train": {"residual": None, "update": "factor", "activation_threshold": None},
    "residual": {},
}


def measure(samples: int, image_size: int, share: float) -> dict[str, dict[str, int]]:
    """What a step takes, by row."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=10, **RESNET18))
    batch = {"pixel_values": torch.randn(samples, 3, image_size, image_size), "labels": torch.zeros(samples).long()}
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            out, inner = module.out_channels, module.weight[0].numel()
            ranks[f"{name}$"] = max(1, int(share * costs.dense_elements(out, inner) / (out + inner)))
    rows = {}
    for row, options in OPTIONS.items():
        config = None
        if options is not None:
            pattern = {} if row.startswith("residual") else {"rank_pattern": ranks}
            config = wasi_peft.WasiConfig(target_modules=TARGETS, modules_to_save=["classifier"], **pattern, **options)
        estimate = wasi_peft.estimate_wasi(model, config, batch=batch)
        rows[row] = {
            name: getattr(estimate, name)
            for name in ("peak_bytes", "saved_bytes", "weights_bytes", "training_flops", "inference_flops")
        }
    return rows


def table(rows: dict[str, dict[str, int]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = ["| | weights MiB | kept for backward MiB | peak MiB | step GFLOP | inference GFLOP |", "|" + 6 * " --- |"]
    for row, entry in rows.items():
        sizes = " | ".join(f"{entry[name] / MIB:.0f}" for name in ("weights_bytes", "saved_bytes", "peak_bytes"))
        flops = " | ".join(f"{entry[name] / GIGA:.1f}" for name in ("training_flops", "inference_flops"))
        lines.append(f"| {row} | {sizes} | {flops} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Counts, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--share", type=float, default=0.5, help="of the weights that factors keep")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = measure(args.batch, args.image_size, args.share)
    content = {"batch": args.batch, "share": args.share, "rows": rows, "environment": environment()}
    print(table(rows))
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
