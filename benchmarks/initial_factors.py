"""What initial factors keep of a pretrained model before any training, against the share of weights kept.

Five ways to get factors, each at the same share of the weights of all block Linears:

* plain: truncated SVD of the weights, the same share in every layer (the paper);
* one-sided: weighed by the input's covariance (SVD-LLM), the same share in every layer;
* two-sided: weighed by the second moment of the output's gradient too, ranks allocated over the layers;
* repaired: the same, then label-free steps of all factors together, 400 against the dense model's blocks or, with a
  language model, 128 against the tokens that the dense one predicts: the default of ``preprocess_wasi``;
* blockwise: two-sided, then each block for itself, refitted in closed form and trained for 64 steps.

Three models (``--model``), three repeats on other samples each:

* dinov2: DINOv2-small ViT, Fashion-MNIST at 56 px. A linear probe is trained on the dense features (class token,
  training images 1,000 to 1,999) and applied to the factored model's features of 1,000 test images; calibration on 512
  training images without labels. Repeat 0 uses training images 0 to 511 and the first 1,000 test images.
* minilm: MiniLM sentence encoder, mails; the same with mean-pooled features and spam as the label, and the mean cosine
  between dense and factored sentence embeddings.
* smollm2: SmolLM2-135M, perplexity on the first 128 tokens of 192 mails that calibration does not see; calibration on
  128 others, repair on 512.

Results: docs/benchmarks/initial_factors.json and .png.
"""

import argparse
import copy
import math
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import texts
import wasi_peft
from common import RESULTS_FOLDER, add_entry, cache_dir, environment, read_json
from finetuning import unlabelled
from images import ImageSet, load_images
from vit import load_vit
from wasi_peft.factors.block_repair import BLOCK_STEPS
from wasi_peft.factors.calibration import dense_targets
from wasi_peft.factors.repairs import REPAIRS as WAYS
from wasi_peft.factors.repairs import RepairName
from wasi_peft.forms.dense import dense_weight
from wasi_peft.models.structure import vocabulary_head
from wasi_peft.updates import Update, make_update

RESULTS = RESULTS_FOLDER / "initial_factors.json"
REPAIRS: dict[str, Literal["model", "blocks"]] = {"repaired": "model", "blockwise": "blocks"}
METHODS = ("plain", "one-sided", "two-sided", "repaired", "blockwise")
Metrics = dict[str, float]
Task = tuple[nn.Module, list[Any], Callable[[nn.Module], Metrics]]  # dense model, calibration batches, evaluation


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


# ---------------------------------------------------------------------------------------------------------------------
# Models and tasks
# ---------------------------------------------------------------------------------------------------------------------


def dinov2(repeat: int) -> Task:
    """DINOv2-small ViT with a probe for Fashion-MNIST."""
    train, test = load_images(train=5000, test=1000 * (repeat + 1))
    start = (0, 2000, 3000)[repeat]
    calibration = list(
        DataLoader(Subset(train, range(start, start + 512)), batch_size=32, shuffle=False, collate_fn=unlabelled)
    )
    dense = load_vit()
    probe = fit_probe(features(dense, Subset(train, range(1000, 2000)), "Probe"), train.labels[1000:2000], 10)
    part = range(1000 * repeat, 1000 * (repeat + 1))
    labels = test.labels[part.start : part.stop]

    def evaluate(model: nn.Module) -> Metrics:
        predicted = probe(features(model, Subset(test, part), "Testing").double()).argmax(1)
        return {"accuracy": (predicted == labels).double().mean().item()}

    return dense, calibration, evaluate


def minilm(repeat: int) -> Task:
    """MiniLM with a probe for spam."""
    folder = texts.minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dense = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    mails = texts.load_mails(3512 + 512 * repeat)

    def encode(items: list[tuple[str, int]], size: int) -> list[dict[str, torch.Tensor]]:
        """Batches of mails cut to 64 tokens, sorted by length so that little is padding."""
        items = sorted(items, key=lambda item: len(item[0]))
        return [
            dict(tokenizer([t for t, _ in items[i : i + size]], truncation=True, max_length=64, padding=True,
                           return_tensors="pt"), labels=torch.tensor([label for _, label in items[i : i + size]]))
            for i in range(0, len(items), size)
        ]  # fmt: skip

    @torch.inference_mode()
    def embed(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        rows = []
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            hidden, mask = model(**inputs).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            rows.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(rows)

    train, test = encode(mails[:1500], 64), encode(mails[1500:3000], 64)
    calibration = encode(mails[3000 + 512 * repeat : 3512 + 512 * repeat], 32)
    labels = [torch.cat([batch["labels"] for batch in part]) for part in (train, test)]
    probe = fit_probe(embed(dense, train), labels[0], 2, strength=10.0)
    reference = embed(dense, test)

    def evaluate(model: nn.Module) -> Metrics:
        rows = embed(model, test)
        correct = probe(rows.double()).argmax(1) == labels[1]
        return {"accuracy": correct.double().mean().item(), "cosine": (rows * reference).sum(1).mean().item()}

    return dense, calibration, evaluate


def smollm2(repeat: int) -> Task:
    """SmolLM2-135M on mail text in windows of 128 tokens."""
    folder = texts.smollm2_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    mails = texts.load_mails(2000)
    held_out = texts.token_windows(tokenizer, mails[1500:], 192)
    sample = texts.token_windows(tokenizer, mails[400 * repeat : 400 * repeat + 700], 512)
    calibration = [{"input_ids": part} for part in sample.split(4)]

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> Metrics:
        losses = [model(input_ids=part, labels=part).loss.item() for part in tqdm(held_out.split(8), desc="Testing")]
        return {"perplexity": math.exp(sum(losses) / len(losses))}

    return dense, calibration, evaluate


TASKS = {"dinov2": dinov2, "minilm": minilm, "smollm2": smollm2}
CALIBRATION_BATCHES = {"smollm2": 32}  # the rest is for the repair


# ---------------------------------------------------------------------------------------------------------------------
# Factors
# ---------------------------------------------------------------------------------------------------------------------


def uniform_ranks(model: nn.Module, share: float, update: Update) -> dict[str, int]:
    """Ranks that keep the same share of every target layer, all that the update stores included; at least 1."""
    ranks = {}
    for name, module in dense_targets(model, None).items():
        out, size = dense_weight(module).shape
        stored = [update.stored_bytes(out, size, rank, 4) for rank in range(1, min(out, size) + 1)]
        ranks[name] = max(1, sum(count <= share * 4 * out * size for count in stored))
    return ranks


def steps_of(method: str, repair_steps: int, block_steps: int = BLOCK_STEPS) -> int:
    """Steps of the repair: of the whole model or of each block, none with the other methods."""
    return {"repaired": repair_steps, "blockwise": block_steps}.get(method, 0)


def repair_of(method: str, model: nn.Module) -> RepairName | None:
    """How the factors of a method are repaired."""
    if method == "repaired" and vocabulary_head(model) is not None:
        return "tokens"
    return REPAIRS.get(method)


def factored(
    method: str,
    dense: nn.Module,
    share: float,
    batches: list[Any],
    calibrations: dict[str, Any],
    max_batches: int,
    repair: RepairName | None,
    repair_steps: int,
) -> tuple[nn.Module, dict[str, float]]:
    """The factored model and the seconds of what was done to get it."""
    model, seconds = copy.deepcopy(dense), {}
    uniform = method in ("plain", "one-sided")
    update = make_update("factor")  # nothing is reserved for a later change
    ranks = {"rank_pattern": uniform_ranks(model, share, update)} if uniform else {"weight_share": share}
    config = wasi_peft.WasiConfig(update=update.name, **ranks)
    if method != "plain":
        kind = "inputs" if method == "one-sided" else "both"
        if kind not in calibrations:
            start = time.perf_counter()
            gradients = "features" if kind == "both" else None
            calibrations[kind] = wasi_peft.calibrate_wasi(model, batches, gradients=gradients, max_batches=max_batches)
            calibrations[f"{kind} seconds"] = time.perf_counter() - start
        seconds["calibration"] = calibrations[f"{kind} seconds"]
        start = time.perf_counter()
        wasi_peft.preprocess_wasi(
            model, config, batches, calibration=calibrations[kind], repair=repair, repair_steps=repair_steps
        )
        seconds["factors"] = time.perf_counter() - start
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return peft.get_peft_model(model, config), seconds


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws one panel a model: the metric against the share kept, mean and range over repeats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [name for name in TASKS if any(entry["model"] == name for entry in results.values())]
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.5 * len(models), 3.6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        entries = [entry for entry in results.values() if entry["model"] == model]
        metric = "perplexity" if model == "smollm2" else "accuracy"
        for method in METHODS:
            points = {}
            for entry in entries:
                if entry["method"] == method:
                    points.setdefault(entry["share"], []).append(entry["metrics"][metric])
            if not points:
                continue
            shares = sorted(points)
            means = [sum(points[share]) / len(points[share]) for share in shares]
            panel.plot(shares, means, marker="o", label=method)
            panel.fill_between(shares, [min(points[x]) for x in shares], [max(points[x]) for x in shares], alpha=0.2)
        dense = [entry["metrics"][metric] for entry in entries if entry["method"] == "dense"]
        panel.axhline(sum(dense) / len(dense), color="black", linestyle=":", label="dense")
        panel.set(title=model, xlabel="share of weights kept", ylabel=metric)
        if metric == "perplexity":
            panel.set_yscale("log")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33, 0.25])
    parser.add_argument("--repeats", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, help="calibration batches (default: 512 samples, for smollm2 128)")
    parser.add_argument("--repair-steps", type=int, help='of "repaired" (default: that of preprocess_wasi)')
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    lock = cache_dir() / f"{args.results.name}.lock"
    for name in args.model:
        for repeat in args.repeats:
            wanted = [("dense", 1.0), *((method, share) for share in args.shares for method in args.method)]
            keys = {f"{name} {method} kept={share:g} repeat={repeat}": (method, share) for method, share in wanted}
            missing = {key: pair for key, pair in keys.items() if key not in read_json(args.results)}
            if not missing:
                continue
            dense, batches, evaluate = TASKS[name](repeat)
            max_batches = min(args.batches or CALIBRATION_BATCHES.get(name, len(batches)), len(batches))
            repaired_steps = (
                WAYS[repair_of("repaired", dense) or "model"].steps if args.repair_steps is None else args.repair_steps
            )
            calibrations: dict[str, Any] = {}
            for key, (method, share) in missing.items():
                seconds: dict[str, float] = {}
                model, kept = dense, 1.0
                repair, steps = repair_of(method, dense), steps_of(method, repaired_steps)
                if method != "dense":
                    given = batches, calibrations, max_batches
                    model, seconds = factored(method, dense, share, *given, repair, steps)
                    kept = model.wasi_summary().kept_share
                entry = {
                    "model": name, "method": method, "share": share, "repeat": repeat, "kept_share": kept,
                    "metrics": evaluate(model), "seconds": seconds,
                    "calibration_batches": max_batches,
                    "repair": repair,
                    "repair_steps": steps,
                    "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "environment": environment(),
                }  # fmt: skip
                add_entry(args.results, key, entry, lock=lock)
                print(key, entry["metrics"], flush=True)
    plot(read_json(args.results), args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
