"""What initial factors keep of a pretrained model before any training: plain SVD against data-aware factors.

A linear probe is trained on the features of the dense DINOv2-small ViT (class token, Fashion-MNIST at 56 px, training
images 1,000 to 1,999, logistic regression) and applied to the features of the factored model, on the first 1,000 test
images. Ranks are uniform: each layer keeps the same share of its weights. Calibration: training images 0 to 511
without labels. Results: docs/benchmarks/initial_factors.json.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import wasi_peft

sys.path.insert(0, str(Path(__file__).parents[1]))
from assets import ImageSet, load_images, load_vit
from finetune import unlabelled

from benchmark.common import environment, write_json

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "initial_factors.json"


@torch.inference_mode()
def features(model: nn.Module, images: ImageSet | Subset, description: str) -> torch.Tensor:
    """Class token of the last hidden state, (images, hidden)."""
    model.eval()
    rows = []
    for batch in tqdm(DataLoader(images, batch_size=64, collate_fn=unlabelled), desc=description):
        rows.append(model(**batch, output_hidden_states=True).hidden_states[-1][:, 0])
    return torch.cat(rows)


def fit_probe(x: torch.Tensor, labels: torch.Tensor, classes: int, strength: float = 0.1) -> nn.Linear:
    """Logistic regression: sum of cross-entropies times `strength` plus half the squared norm of the weights."""
    probe = nn.Linear(x.shape[1], classes).double()
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = strength * functional.cross_entropy(probe(x.double()), labels, reduction="sum")
        loss = loss + probe.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


def factored(model: nn.Module, share: float, calibration: Any) -> nn.Module:
    """The model with the same share of every block Linear kept; plain SVD where there is no calibration."""
    ranks = {
        name: max(1, int(share * module.weight.numel() / (module.in_features + module.out_features)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    }
    config = wasi_peft.WasiConfig(rank_pattern=ranks, modules_to_save=["classifier"])
    if calibration is not None:
        wasi_peft.preprocess_wasi(model, config, calibration)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return peft.get_peft_model(model, config)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measures every case, prints them and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.36])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()

    train, test = load_images(train=2000, test=1000)
    calibration = DataLoader(Subset(train, range(512)), batch_size=32, collate_fn=unlabelled)
    dense = load_vit()
    probe = fit_probe(
        features(dense, Subset(train, range(1000, 2000)), "Training features"), train.labels[1000:2000], 10
    )

    def accuracy(model: nn.Module) -> float:
        predicted = probe(features(model, test, "Testing").double()).argmax(1)
        return (predicted == test.labels).double().mean().item()

    results = {"dense": accuracy(dense)}
    for share in args.shares:
        results[f"plain SVD, kept {share:g}"] = accuracy(factored(load_vit(), share, None))
        results[f"data-aware, kept {share:g}"] = accuracy(factored(load_vit(), share, calibration))
    for name, value in results.items():
        print(f"{name:24} {value:.3f}")
    write_json(args.results, {"probe_accuracy": results, "environment": environment()})
    return results


if __name__ == "__main__":
    main()
