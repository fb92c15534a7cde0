"""Command line: `wasi-peft inspect | estimate | plan`. Parses, loads what is named, calls the library, prints."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import report
from ._registration import NAME
from .calibration import Calibration, calibrate_wasi
from .config import UPDATES, WasiConfig
from .estimate import OPTIMIZERS, estimate_wasi
from .layer import dense_weight
from .planner import BUDGETS, plan_wasi
from .planning import WasiPlan
from .summary import LayerSummary, WasiSummary
from .targets import default_target_names

LORA_RANK = 16
SEQUENCE_LENGTH = 128
SAMPLES = 256
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
DTYPES = ("float32", "bfloat16", "float16")


class Task(NamedTuple):
    """What a model is for: the ends of its architecture's name, its auto class, what its labels are."""

    architectures: tuple[str, ...]
    auto_class: str
    labels: str | None


TASKS = {
    "image-classification": Task(("ForImageClassification",), "AutoModelForImageClassification", "classes"),
    "text-classification": Task(("ForSequenceClassification",), "AutoModelForSequenceClassification", "classes"),
    "token-classification": Task(("ForTokenClassification",), "AutoModelForTokenClassification", "tokens"),
    "causal-lm": Task(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM", "tokens"),
    "masked-lm": Task(("ForMaskedLM",), "AutoModelForMaskedLM", "tokens"),
    "seq2seq-lm": Task(("ForConditionalGeneration",), "AutoModelForSeq2SeqLM", "tokens"),
    "features": Task(("Model",), "AutoModel", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can set right."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"wasi-peft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# -------------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="wasi-peft", description="Look at, estimate and plan WASI fine-tuning.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("inspect", help="what a model, adapter, plan or calibration holds")
    command.set_defaults(run=_inspect)
    command.add_argument("model", metavar="WHAT", help="model (hub id or folder), adapter folder, plan, calibration")
    _add_model_options(command)

    command = commands.add_parser("estimate", help="memory and FLOPs of a training step, without running one")
    command.set_defaults(run=_estimate)
    command.add_argument("model", metavar="MODEL", help="hub id or folder; its weights are not loaded")
    wasi = command.add_mutually_exclusive_group()
    wasi.add_argument("--plan", metavar="JSON", help="add WASI with this plan")
    wasi.add_argument("--weight-rank", metavar="K", type=_count, help="add WASI with this rank in every layer")
    wasi.add_argument("--dense", action="store_true", help="full fine-tuning only")
    command.add_argument(
        "--activation-rank", metavar="R", type=_count, help="with --weight-rank: feature rank of the inputs (exact)"
    )
    command.add_argument("--lora", metavar="R", type=_count, help=f"rank of LoRA ({LORA_RANK})")
    _add_batch_options(command)
    _add_model_options(command)

    command = commands.add_parser("plan", help="choose the ranks of all layers under a budget")
    command.set_defaults(run=_plan)
    command.add_argument("model", metavar="MODEL", help="hub id or folder")
    budget = command.add_mutually_exclusive_group(required=True)
    for flag, dest, kind, text in (
        ("--weight-share", "weight_share", _share, "factors over dense weights, in (0, 1]"),
        ("--peak-memory", "peak_bytes", _size, "peak of a training step, such as 1.5GiB"),
        ("--training-flops", "training_flops", _positive, "share of the dense FLOPs, or an absolute number above 1"),
        ("--inference-flops", "inference_flops", _positive, "the same for the forward pass"),
        ("--step-time", "step_seconds", _share, "share of the dense layers' time in a training step, in (0, 1]"),
        ("--inference-time", "inference_seconds", _share, "the same for the forward pass"),
        ("--error", "error", _share, "tolerated share of the energy to lose, in (0, 1]"),
    ):
        budget.add_argument(flag, dest=dest, type=kind, metavar=flag.split("-")[-1].upper(), help=text)
    command.add_argument("--data", metavar="PATH", help="folder of images, or text file (a sample a line) or .jsonl")
    command.add_argument("--text-key", default="text", help="key of the text in a .jsonl file (text)")
    command.add_argument("--samples", type=_count, default=SAMPLES, help=f"how many to calibrate on ({SAMPLES})")
    command.add_argument(
        "--calibration", metavar="DIR", help="keep the calibration here, or use the one that is there"
    )
    command.add_argument("--output", metavar="JSON", help="where to write the plan")
    _add_batch_options(command)
    _add_model_options(command)
    return parser


def _add_batch_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", metavar="B", type=_count, required=True, help="samples of a training step")
    command.add_argument("--sequence-length", metavar="N", type=_count, help=f"tokens of a text ({SEQUENCE_LENGTH})")
    command.add_argument("--image-size", metavar="P", type=_count, help="pixels of an image's side (the model's)")
    command.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(adamw)")
    command.add_argument("--update", choices=UPDATES, default=WasiConfig.update, help=f"({WasiConfig.update})")
    command.add_argument(
        "--update-rank", metavar="R", type=_count, default=WasiConfig.update_rank, help=f"({WasiConfig.update_rank})"
    )


def _update(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"update": arguments.update, "update_rank": arguments.update_rank}


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", choices=list(TASKS), help="what the model is for (told by its configuration)")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (the checkpoint's)")
    command.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model")
    command.add_argument("--json", action="store_true", help="print JSON only")
    command.add_argument("--plot", metavar="PNG", help="write a figure (needs matplotlib)")


def _count(text: str) -> int:
    if not re.fullmatch(r"\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _positive(text: str, largest: float = math.inf) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= largest or number == math.inf:
        bounds = "above 0" if largest == math.inf else f"in (0, {largest}]"
        raise argparse.ArgumentTypeError(f"must be a number {bounds}, got {text!r}")
    return number


def _share(text: str) -> float:
    return _positive(text, 1)


def _size(text: str) -> int:
    """Bytes from a number with a unit.

    Example:
        >>> _size("1.5GiB"), _size("20 MB")
        (1610612736, 20000000)
    """
    units = {unit.lower(): 1024**power for power, unit in enumerate(report.BYTE_UNITS)}
    units.update({unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))})
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(
            f"must be a number with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), such as 1.5GiB, got {text!r}"
        )
    return int(float(match[1]) * units[match[2]])


# -------------------------------------------------------------------- commands


def _inspect(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments.plot, plot=True)
    what = Path(arguments.model)
    if what.is_file():
        plan = WasiPlan.load(what)
        _show(arguments, report.plan_table(plan), plan.to_dict())
        if arguments.plot:
            report.plot_plan(plan, path=arguments.plot)
    elif (what / "adapter_config.json").is_file():
        _inspect_adapter(arguments, what)
    elif (what / "index.json").is_file():
        calibration = Calibration.load(what)
        rows = report.calibration_rows(calibration)
        _show(arguments, report.table(rows), {"layers": rows})
        if arguments.plot:
            report.plot_calibration(calibration, arguments.plot)
    else:
        _inspect_model(arguments)


def _inspect_adapter(arguments: argparse.Namespace, folder: Path) -> None:
    config, summary = _read_adapter(folder)
    shown = summary if config.plan is None else WasiPlan.from_dict(config.plan)
    inputs = {layer.name: _input_rule(config, layer.name) for layer in summary.layers}
    settings = {
        "base_model": config.base_model_name_or_path,
        "update": config.update,
        "kept_share": summary.kept_share,
    }
    lines = [report.plan_table(shown), f"update {config.update}, base model {config.base_model_name_or_path}"]
    if config.plan is None:
        lines.append(f"input kept for backward: {next(iter(inputs.values()))}")
    layers = [
        {
            "layer": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "weight_rank": layer.rank,
            "input": inputs[layer.name],
        }
        for layer in summary.layers
    ]
    _show(arguments, "\n".join(lines), {**settings, "layers": layers})
    if arguments.plot:
        report.plot_plan(shown, path=arguments.plot)


def _read_adapter(folder: Path) -> tuple[WasiConfig, WasiSummary]:
    """Configuration and layers of a saved adapter; the base model is not needed."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != NAME:
        raise ValueError(f"{folder}: must be an adapter of type {NAME}, got {kind}.")
    config = WasiConfig.from_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    layers = []
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    for key in (key for key in shapes if key.endswith(".wasi_L")):
        L, R = shapes[key], shapes.get(key.removesuffix("L") + "R", [])
        if len(L) != 2 or len(R) != 2 or L[1] != R[0]:
            raise ValueError(f"{path}: {key} must have a matching wasi_R, got the shapes {L} and {R}.")
        name = key.removeprefix("base_model.model.").removesuffix(".wasi_L")
        trained = shapes.get(key.removesuffix("L") + "A", [0])[0]  # of update="low_rank"
        layers.append(LayerSummary(name, L[0], R[1], L[1] + trained))
    if not layers:
        raise ValueError(f"{path}: must hold WASI factors, got none.")
    return config, WasiSummary(folder.name, tuple(layers))


def _input_rule(config: WasiConfig, name: str) -> str:
    rule = config.compression_rule(name)
    if rule is None:
        return "exact"
    ranks = dict(rule.ranks)
    return ", ".join(f"{mode} {ranks[mode] if mode in ranks else f'{rule.threshold:.0%}'}" for mode in rule.modes)


def _inspect_model(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        raise ValueError("--plot needs a plan, an adapter or a calibration, got a model.")
    model, task = _load_model(arguments, weights=False)
    sizes = _target_sizes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    targeted = sum(out * in_features for out, in_features in sizes.values())
    rows = report.target_rows(sizes)
    share = targeted / parameters
    text = f"{type(model).__name__} ({task}): {parameters:,} parameters, {share:.1%} in {len(sizes)} target layers"
    data = {
        "model": arguments.model,
        "architecture": type(model).__name__,
        "task": task,
        "parameters": parameters,
        "target_share": share,
        "kinds": rows,
        "layers": {name: {"out_features": size[0], "in_features": size[1]} for name, size in sizes.items()},
    }
    _show(arguments, f"{report.table(rows)}\n{text}", data)


def _estimate(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments.plot, plot=True)
    if arguments.activation_rank and not arguments.weight_rank:
        raise ValueError("--activation-rank goes with --weight-rank; a plan has its own.")
    if arguments.dense and arguments.lora:
        raise ValueError("--dense leaves LoRA out; give --lora or --dense, not both.")
    model, task = _load_model(arguments, weights=False)
    batch = _dummy_batch(arguments, model, task)
    heads = _heads(model, task)
    configs: dict[str, PeftConfig | None] = {"dense": None}
    if not arguments.dense:
        rank, names = arguments.lora or LORA_RANK, sorted(_target_sizes(model))
        configs[f"LoRA r={rank}"] = LoraConfig(r=rank, target_modules=names, modules_to_save=heads)
    if arguments.plan:
        configs["WASI plan"] = WasiConfig(plan=arguments.plan, modules_to_save=heads, **_update(arguments))
    if arguments.weight_rank:
        configs[f"WASI K={arguments.weight_rank}"] = WasiConfig(
            weight_rank=arguments.weight_rank,
            activation_ranks=arguments.activation_rank,
            activation_threshold=None,
            modules_to_save=heads,
            **_update(arguments),
        )
    estimates = {}
    with tqdm(reversed(configs), desc="Estimates", total=len(configs), leave=False) as labels:
        for label in labels:  # WASI first: it may be refused
            estimates[label] = estimate_wasi(model, configs[label], batch=batch, optimizer=arguments.optimizer)
    estimates = {label: estimates[label] for label in configs}
    shapes = {key: list(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    text = ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in shapes.items())
    _show(
        arguments,
        f"{report.estimates_table(estimates)}\n{type(model).__name__}, {arguments.optimizer}, {text}",
        {
            "model": arguments.model,
            "task": task,
            "optimizer": arguments.optimizer,
            "batch": shapes,
            "estimates": {label: estimate.to_dict() for label, estimate in estimates.items()},
        },
    )
    if arguments.plot:
        report.plot_estimates(estimates, arguments.plot)


def _plan(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments.output)
    _check_outputs(arguments.plot, plot=True)
    if arguments.data is None and arguments.calibration is None:
        raise ValueError("--data is needed, or --calibration with a finished calibration; got neither.")
    model, task = _load_model(arguments, weights=True)
    batch = _dummy_batch(arguments, model, task)
    if arguments.data is None:
        calibration = Calibration.load(arguments.calibration)
    else:
        data = _calibration_batches(arguments, model, task)
        calibration = calibrate_wasi(model, data, directory=arguments.calibration)
    plan = plan_wasi(
        model,
        calibration,
        **{name: getattr(arguments, name) for name in BUDGETS},
        batch=batch,
        optimizer=arguments.optimizer,
        config=WasiConfig(modules_to_save=_heads(model, task), **_update(arguments)),
    )
    if arguments.output:
        plan.save(arguments.output)
    _show(arguments, report.plan_table(plan, calibration.bytes_per_element), plan.to_dict())
    if arguments.plot:
        report.plot_plan(plan, calibration, arguments.plot, calibration.bytes_per_element)


def _check_outputs(path: str | None, plot: bool = False) -> None:
    """Before any work: can what is asked for be written?"""
    if path is None:
        return
    if plot:
        report.require_matplotlib()
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder must exist.")


def _show(arguments: argparse.Namespace, text: str, data: Any) -> None:
    print(json.dumps(data, indent=2) if arguments.json else text)


# -------------------------------------------------------------------- models


def _load_model(arguments: argparse.Namespace, weights: bool) -> tuple[transformers.PreTrainedModel, str]:
    """The model and its task; without weights it takes no memory, whatever its size."""
    source = arguments.model
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if not os.path.isdir(source) and (source.endswith(".json") or source.startswith((".", os.sep))):
        raise ValueError(f"{source}: no such file or folder.")
    config = transformers.AutoConfig.from_pretrained(source, **options)
    task = arguments.task or _task_of(config)
    auto_class = getattr(transformers, TASKS[task].auto_class)
    if arguments.dtype:
        options["dtype"] = getattr(torch, arguments.dtype)
    if weights:
        return auto_class.from_pretrained(source, **options), task
    with torch.device("meta"):
        return auto_class.from_config(config, **options), task


def _task_of(config: transformers.PretrainedConfig) -> str:
    architectures = config.architectures or ["nothing"]
    for name, task in TASKS.items():
        if architectures[0].endswith(task.architectures):
            return name
    raise ValueError(f"the model's configuration says {architectures[0]}; name one of {list(TASKS)} with --task.")


def _target_sizes(model: transformers.PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the layers that WASI replaces by default, in the model's order."""
    targets = default_target_names(model, WasiConfig())
    modules = [(name, module) for name, module in model.named_modules() if name in targets]
    return {name: (dense_weight(module).shape[0], dense_weight(module).shape[1]) for name, module in modules}


def _heads(model: transformers.PreTrainedModel, task: str) -> list[str] | None:
    """Modules of a classification model outside its backbone, which are trained whole."""
    if not task.endswith("classification"):
        return None
    others = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    return [name for name, module in others if any(True for _ in module.parameters())] or None


def _reads_images(model: transformers.PreTrainedModel) -> bool:
    if model.main_input_name not in ("pixel_values", "input_ids"):
        raise ValueError(f"the model must read 'pixel_values' or 'input_ids', got {model.main_input_name!r}.")
    return bool(model.main_input_name == "pixel_values")


def _dummy_batch(arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str) -> dict[str, Any]:
    """A batch of the asked shape without content, on the model's device where it holds floating point numbers."""
    samples, config = arguments.batch_size, model.config
    if _reads_images(model):
        shape = (samples, getattr(config, "num_channels", 3), *_image_size(arguments, model))
        batch: dict[str, Any] = {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}
        batch.update(_image_options(arguments, model))
        tokens = None
    else:
        # an id that is no padding
        tokens = torch.full((samples, _sequence_length(arguments, model)), int(config.pad_token_id == 0))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if TASKS[task].labels == "tokens":
        batch["labels"] = tokens
    elif TASKS[task].labels == "classes":
        several = config.problem_type == "multi_label_classification"
        kind = torch.float32 if several or config.num_labels == 1 else torch.long
        batch["labels"] = torch.zeros((samples, config.num_labels) if several else (samples,), dtype=kind)
    return batch


def _image_size(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> tuple[int, int]:
    if arguments.sequence_length:
        raise ValueError(f"--sequence-length is for text, {type(model).__name__} reads images.")
    size = arguments.image_size or getattr(model.config, "image_size", None)
    if size is None:
        raise ValueError("--image-size is needed: the model's configuration does not say.")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _image_options(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> dict[str, bool]:
    """What a model must be told about images of another size than its own."""
    name = "interpolate_pos_encoding"
    return {name: True} if arguments.image_size and name in inspect.signature(model.forward).parameters else {}


def _sequence_length(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> int:
    if arguments.image_size:
        raise ValueError(f"--image-size is for images, {type(model).__name__} reads text.")
    largest = getattr(model.config, "max_position_embeddings", None) or arguments.sequence_length or SEQUENCE_LENGTH
    length = arguments.sequence_length or min(SEQUENCE_LENGTH, largest)
    if length > largest:
        raise ValueError(f"--sequence-length must be at most {largest} for this model, got {length}.")
    return int(length)


# -------------------------------------------------------------------- data


def _calibration_batches(
    arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str
) -> Iterable[dict[str, Any]]:
    path = Path(arguments.data)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder.")
    if _reads_images(model):
        items: list[Any] = _image_paths(path)
        collate = _image_collator(arguments, model)
    else:
        items = _texts(path, arguments.text_key)
        collate = _text_collator(arguments, model, task)
    # spread over the whole: sorted folders hold one class after another
    items = items[:: max(1, len(items) // arguments.samples)][: arguments.samples]
    return DataLoader(items, batch_size=arguments.batch_size, collate_fn=collate)  # type: ignore[arg-type]


def _image_paths(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: must be a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
    return paths


def _image_collator(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> Any:
    processor = transformers.AutoImageProcessor.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code
    )
    options: dict[str, Any] = {}
    if arguments.image_size:
        square = {"height": arguments.image_size, "width": arguments.image_size}
        cropped = getattr(processor, "do_center_crop", False)
        options = (
            {"size": {"shortest_edge": arguments.image_size}, "crop_size": square} if cropped else {"size": square}
        )
    extra = _image_options(arguments, model)

    def collate(paths: list[Path]) -> dict[str, Any]:
        from PIL import Image

        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        return {"pixel_values": pixels.to(model.dtype), **extra}

    return collate


def _texts(path: Path, key: str) -> list[str]:
    if path.is_dir():
        raise ValueError(f"{path}: must be a text file or a .jsonl file for a text model, got a folder.")
    with path.open(encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    texts = [line.strip() for _, line in lines]
    if path.suffix == ".jsonl":
        texts = [_text_of(line, key, f"{path}, line {number}") for number, line in lines]
    if not texts:
        raise ValueError(f"{path}: must hold at least one line of text, got none.")
    return texts


def _text_of(line: str, key: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        found = list(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: must be an object with the text under {key!r} (see --text-key), got {found}.")
    return str(entry[key])


def _text_collator(arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        arguments.model, trust_remote_code=arguments.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = _sequence_length(arguments, model)

    def collate(texts: list[str]) -> dict[str, Any]:
        tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        # the decoder's input; there is no other text to give it
        return {**batch, "labels": tokens["input_ids"]} if task == "seq2seq-lm" else batch

    return collate


if __name__ == "__main__":
    sys.exit(main())
