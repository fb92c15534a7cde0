"""Counts what one training step of ViT-B/32 costs, dense and with WASI at K = 0.15 min(out, in).

Deterministic: FLOPs by torch's flop counter, bytes of gradients and optimizer state, and the tracked peak of whole
steps. The model has the geometry of ViT-B/32 and random weights, since none of these depends on their values but the
ranks of the activations: those are fixed here, at the same share of the features. Results:
docs/benchmarks/step_costs.json.
"""

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import wasi_peft
from common import RESULTS_FOLDER, Batch, environment, step_peak_bytes, training_step, vit_b32, write_json
from wasi_peft.updates import UPDATES

RESULTS = RESULTS_FOLDER / "step_costs.json"
LINEAR_OPS = ("mm", "addmm")  # what Linear layers, dense or factored, run as; attention runs as others


def factor(model: nn.Module, share: float, activation_share: float, update: str) -> nn.Module:
    """Turns every Linear of the blocks into factors of rank ``share`` times the smaller of its sizes."""
    ranks = {
        name: int(share * min(module.out_features, module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    activation_rank = int(activation_share * model.config.hidden_size)
    config = wasi_peft.WasiConfig(
        residual=None,
        rank_pattern=ranks,
        activation_ranks=activation_rank,
        modules_to_save=["classifier"],
        update=update,
    )
    return peft.get_peft_model(model, config)


def linear_flops(counter: FlopCounterMode) -> int:
    """FLOPs of the matrix products that Linear layers run as."""
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if str(op).split(".")[-1] in LINEAR_OPS)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over everything that trains."""
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)


def count(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Counts one complete training step after a first one has made every state."""
    peak_bytes = step_peak_bytes(model, make_optimizer, batch)
    optimizer = make_optimizer(model)
    training_step(model, optimizer, batch)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
        gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
    state_bytes = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "linear_training_flops": linear_flops(counter),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": state_bytes,
        "whole_step_peak_bytes": peak_bytes,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Counts both, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.15, help="rank over min(out, in)")
    parser.add_argument("--activation-share", type=float, default=0.15, help="activation rank over hidden size")
    parser.add_argument("--update", choices=UPDATES, default="subspace")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)

    torch.manual_seed(1)
    batch = {"pixel_values": torch.randn(args.batch, 3, 224, 224), "labels": torch.randint(10, (args.batch,))}
    results = {"dense": count(vit_b32(), batch)}
    results["wasi"] = count(factor(vit_b32(), args.share, args.activation_share, args.update), batch)
    print(f"{'':24}{'dense':>16}{'wasi':>16}{'dense/wasi':>12}")
    for quantity, dense in results["dense"].items():
        own = results["wasi"][quantity]
        print(f"{quantity:24}{dense:>16,}{own:>16,}{dense / own:>12.2f}")
    settings = {
        "batch": args.batch, "share": args.share, "activation_share": args.activation_share, "update": args.update
    }  # fmt: skip
    write_json(args.results, {"settings": settings, "results": results, "environment": environment()})
    return results


if __name__ == "__main__":
    main()
