"""Times a tiny layer and a small ViT with the default update, on the checkout that is first on the path.

The process that ``layer_overhead.py`` starts: public calls only, so that old and new checkouts run it alike. It prints
one JSON object; ``dense_forward_microseconds`` knows nothing of the package and shows what the machine does by itself.
"""

import argparse
import json
import time
import timeit
import warnings
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

import wasi_peft

FEATURES, RANK = 32, 8
CALLS = 2000  # of a forward pass, in each repeat
WARMUP = 3


def best_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Returns the time of one call in the best of the repeats, of which each makes `CALLS` calls."""
    return 1e6 * min(timeit.repeat(call, number=CALLS, repeat=repeats)) / CALLS


def forward_microseconds(repeats: int) -> dict[str, float]:
    """Times one row through a Linear, dense and factored, without gradients."""
    dense = nn.Sequential(nn.Linear(FEATURES, FEATURES)).eval()
    config = wasi_peft.WasiConfig(residual=None, weight_rank=RANK, target_modules=["0"])
    (factored,) = peft.get_peft_model(nn.Sequential(nn.Linear(FEATURES, FEATURES)), config).eval().base_model.model
    row = torch.randn(1, FEATURES)
    with torch.no_grad():
        return {
            "dense_forward_microseconds": best_microseconds(lambda: dense[0](row), repeats),
            "forward_microseconds": best_microseconds(lambda: factored(row), repeats),
        }


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Returns the shortest of the calls after `WARMUP` others."""
    seconds = []
    for _ in range(WARMUP + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[WARMUP:])


def vit_seconds(repeats: int) -> dict[str, float]:
    """Times a training step and a forward pass of a ViT of four blocks, 16 images of 65 tokens."""
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=64,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    model = peft.get_peft_model(
        transformers.ViTForImageClassification(config),
        wasi_peft.WasiConfig(residual=None, weight_rank=48, modules_to_save=["classifier"]),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batch = {"pixel_values": torch.randn(16, 3, 64, 64), "labels": torch.randint(10, (16,))}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_seconds = best_seconds(step, repeats)
    model.eval()
    with torch.inference_mode():
        return {
            "step_seconds": step_seconds,
            "inference_seconds": best_seconds(lambda: model(pixel_values=batch["pixel_values"]), repeats),
        }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(json.dumps({**forward_microseconds(args.repeats), **vit_seconds(args.repeats)}))


if __name__ == "__main__":
    main()
