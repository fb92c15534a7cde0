"""Command line, `wasi-peft inspect | estimate | profile | plan | prepare | run | merge | export`: parses and calls."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from ..cost.estimate import OPTIMIZERS, Estimate, estimate_wasi
from ..cost.profile import ROUNDS, StepProfile, profile_wasi
from ..factors.calibration import Calibration, calibrate_wasi
from ..files.folders import check_apart, check_target, new_folder
from ..files.headers import read_header
from ..forms.frozen import FROZEN
from ..forms.residual import RESIDUALS
from ..forms.stored import STORABLE
from ..forms.vocabulary import VOCABULARIES
from ..hub.cases import EXAMPLE_SAMPLES, EXAMPLE_TOKENS, example_batch
from ..hub.compressed import METHOD, compress, compressed_layers
from ..hub.export import FORMATS, export, ready_format
from ..hub.headers import Checkpoint, StoredLayer, is_compressed, read_headers
from ..hub.plain import PlainFormat
from ..hub.prepare import prepare_checkpoint
from ..hub.working import check_output
from ..memory.heap import with_lean_heap
from ..memory.modes import MEMORY_MODES
from ..planner.planner import BUDGETS, DEFAULT_FORMS, plan_wasi
from ..ranks.plan import FORMS, WasiPlan
from ..ranks.spectrum import FACTORS
from ..report import plots, tables
from ..report.kinds import kinds_table, stored_rows
from ..report.profiles import GROUPINGS, costs_table, plot_profiles, profiles_table
from ..tuner.config import AUTO, RESIDUAL_RANK, WasiConfig
from ..tuner.summary import LayerSummary, WasiSummary
from ..updates import DEFAULT_UPDATE, RESIDUAL_UPDATE, UPDATES
from .loading import (
    ADAPTER_CONFIG,
    SEQUENCE_LENGTH,
    TASKS,
    adapter_config,
    base_of,
    calibration_batches,
    check_file,
    check_model,
    copy_processors,
    dummy_batch,
    load_model,
    load_with_adapter,
    naming,
    padding_share,
    quantized_by,
    random_content,
    read_config,
    target_sizes,
    task_heads,
)

LORA_RANK = 16
SAMPLES = 256
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_COUNT = 2**31 - 1
# what comes of files and sizes that the user names; anything else is a fault of this package
USER_ERRORS = (
    ValueError, OSError, ImportError, SafetensorError, RecursionError, MemoryError, torch.OutOfMemoryError
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can set right."""
    try:
        parser = _parser()
        arguments = parser.parse_args(_words(sys.argv[1:] if argv is None else argv))
        if arguments.run is None:
            parser.print_help()
        else:
            with warnings.catch_warnings():  # what libraries tell each other is not for users
                warnings.simplefilter("ignore", FutureWarning)
                arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        print(f"wasi-peft: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


# -------------------------------------------------------------------- parsing


def _words(argv: Sequence[str]) -> list[str]:
    """The arguments, those of a program that is to run kept from being taken for ours."""
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        return ["run", "--", *argv[1:]]
    return list(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wasi-peft",
        description="Look at, estimate, profile and plan WASI fine-tuning; prepare models, merge and export them.",
    )
    version = f"%(prog)s {importlib.metadata.version('wasi_peft')}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    command = commands.add_parser("inspect", help="what a model, checkpoint, adapter, plan or calibration holds")
    command.set_defaults(run=_inspect)
    command.add_argument(
        "model", metavar="WHAT", help="model (hub id or folder), compressed checkpoint, adapter, plan, calibration"
    )
    _add_layers_option(command)
    _add_model_options(command)

    command = commands.add_parser("estimate", help="memory and FLOPs of a training step, without running one")
    command.set_defaults(run=_estimate)
    command.add_argument("model", metavar="MODEL", help="hub id or folder; its weights are not loaded")
    _add_variant_options(command)
    _add_batch_options(command)
    _add_model_options(command)

    command = commands.add_parser(
        "profile", help="time and memory of a training step by module and operation, measured"
    )
    command.set_defaults(run=_profile)
    command.add_argument("model", metavar="MODEL", help="hub id or folder")
    _add_variant_options(command)
    command.add_argument("--by", choices=list(GROUPINGS), default="class", help="what the time is grouped by (class)")
    command.add_argument(
        "--rounds", metavar="N", type=_count, default=ROUNDS, help=f"how many steps are timed ({ROUNDS})"
    )
    _add_batch_options(command)
    _add_model_options(command)

    command = commands.add_parser("plan", help="choose forms and ranks of all layers under a budget")
    command.set_defaults(run=_plan)
    command.add_argument("model", metavar="MODEL", help="hub id or folder")
    budget = command.add_mutually_exclusive_group(required=True)
    for flag, dest, kind, text in (
        ("--weight-share", "weight_share", _share, "bytes stored over those of the dense weights, in (0, 1]"),
        ("--peak-memory", "peak_bytes", _size, "peak of a training step, such as 1.5GiB"),
        ("--training-flops", "training_flops", _positive, "share of the dense FLOPs, or an absolute number above 1"),
        ("--inference-flops", "inference_flops", _positive, "the same for the forward pass"),
        ("--step-time", "step_seconds", _share, "share of the dense layers' time in a training step, in (0, 1]"),
        ("--inference-time", "inference_seconds", _share, "the same for the forward pass"),
        ("--error", "error", _share, "tolerated share of the energy to lose, in (0, 1]"),
    ):
        budget.add_argument(flag, dest=dest, type=kind, metavar=flag.split("-")[-1].upper(), help=text)
    command.add_argument(
        "--memory-mode", nargs="+", choices=MEMORY_MODES, dest="memory_modes", metavar="MODE",
        help=f"with --peak-memory: modes to choose from, best first ({' '.join(MEMORY_MODES)})",
    )  # fmt: skip
    command.add_argument(
        "--forms", nargs="+", choices=FORMS, metavar="FORM",
        help=f"what layers may become ({' '.join(DEFAULT_FORMS)}; with an update of factors alone {FACTORS})",
    )  # fmt: skip
    command.add_argument(
        "--addition-rank", metavar="K", type=_count, help="rank of additions to residuals (chosen with the form)"
    )
    command.add_argument("--data", metavar="PATH", help="folder of images, or text file (a sample a line) or .jsonl")
    command.add_argument("--text-key", default="text", help="key of the text in a .jsonl file (text)")
    command.add_argument("--samples", type=_count, default=SAMPLES, help=f"how many to calibrate on ({SAMPLES})")
    command.add_argument(
        "--calibration", metavar="DIR", help="keep the calibration here, or use the one that is there"
    )
    command.add_argument("--output", metavar="JSON", help="where to write the plan")
    _add_layers_option(command)
    _add_batch_options(command)
    _add_model_options(command)

    command = commands.add_parser("prepare", help="write a compressed checkpoint, one transformer block at a time")
    command.set_defaults(run=_prepare, trust_remote_code=False)
    command.add_argument("model", metavar="MODEL", help="hub id or folder, in safetensors files")
    command.add_argument("--output", metavar="FOLDER", required=True, help="where to write the checkpoint")
    command.add_argument("--overwrite", action="store_true", help="replace the output when the new one is complete")
    command.add_argument(
        "--residual",
        choices=(*STORABLE, "none"),
        help="weights in few bits, or none for factors in their place (int8)",
    )
    command.add_argument("--weight-share", metavar="SHARE", type=_share, help="factors: share of the weights to keep")
    command.add_argument(
        "--weight-rank", metavar="K", type=_count, help="rank of factors, or of additions to weights in few bits"
    )
    command.add_argument("--data", metavar="PATH", help="folder of images, or text file (a sample a line) or .jsonl")
    command.add_argument("--text-key", default="text", help="key of the text in a .jsonl file (text)")
    command.add_argument("--samples", type=_count, default=SAMPLES, help=f"how many to calibrate on ({SAMPLES})")
    command.add_argument("--batch-size", metavar="B", type=_count, default=8, help="samples of a batch of data (8)")
    command.add_argument("--sequence-length", metavar="N", type=_count, help=f"tokens of a text ({SEQUENCE_LENGTH})")
    command.add_argument("--image-size", metavar="P", type=_count, help="pixels of an image's side (the model's)")
    command.add_argument("--task", choices=list(TASKS), help="with --data: what the model is for (its configuration)")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (the checkpoint's)")
    command.add_argument("--json", action="store_true", help="print JSON only")

    command = commands.add_parser(
        "run",
        help="run a Python program with less memory (Linux with glibc)",
        description="Run a Python program with malloc set so that freed memory is used again.",
        usage="wasi-peft run SCRIPT [ARGUMENTS ...] | -m MODULE [ARGUMENTS ...]",
    )
    command.set_defaults(run=_run)
    command.add_argument("program", nargs=argparse.REMAINDER, help="what would follow `python`")

    command = commands.add_parser("merge", help="a model of its own from an adapter and its base model")
    command.set_defaults(run=_merge)
    command.add_argument("model", metavar="ADAPTER", help="folder of a WASI adapter")
    command.add_argument("--dense", action="store_true", help="dense layers instead of compressed ones")
    _add_output_options(command)

    command = commands.add_parser("export", help="a folder for programs that know no wasi_peft")
    command.set_defaults(run=_export)
    command.add_argument("model", metavar="MODEL_OR_ADAPTER", help="hub id, folder, or folder of a WASI adapter")
    command.add_argument("--format", choices=list(FORMATS), default=PlainFormat.name, help="(plain)")
    command.add_argument("--int8", action="store_true", help="with --format onnx, openvino, gguf: weights in 8 bits")
    command.add_argument("--tokenizer", metavar="FOLDER", help="with --format gguf: the tokenizer (the model's own)")
    command.add_argument(
        "--samples", metavar="N", type=_count, default=EXAMPLE_SAMPLES, help=f"of noise, to run ({EXAMPLE_SAMPLES})",
    )  # fmt: skip
    command.add_argument(
        "--tokens", metavar="N", type=_count, default=EXAMPLE_TOKENS, help=f"of each text in it ({EXAMPLE_TOKENS})",
    )  # fmt: skip
    command.add_argument("--image-size", metavar="P", type=_count, help="pixels of an image's side (the model's)")
    command.add_argument(
        "--tolerance", metavar="SHARE", type=_positive,
        help="largest difference of answers, relative to the largest one (what the dtype explains)",
    )  # fmt: skip
    _add_output_options(command)
    return parser


def _add_layers_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layers", action="store_true", help="a line for each layer, and not for all of a kind and form"
    )


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="FOLDER", required=True, help="the folder to make")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that is there, as a whole")
    command.add_argument("--base", metavar="MODEL", help="base model of an adapter (the one that it names)")
    command.add_argument("--num-labels", metavar="N", type=_count, help="classes of the head (the base model's)")
    _add_model_options(command, plot=False)


def _add_variant_options(command: argparse.ArgumentParser) -> None:
    wasi = command.add_mutually_exclusive_group()
    wasi.add_argument("--plan", metavar="JSON", help="forms and ranks of WASI from this plan")
    wasi.add_argument("--weight-rank", metavar="K", type=_count, help=f"rank of WASI in every layer ({RESIDUAL_RANK})")
    wasi.add_argument("--dense", action="store_true", help="full fine-tuning only")
    command.add_argument(
        "--residual",
        choices=(*RESIDUALS, "none"),
        help="without a plan: the frozen weight beside the factors, none for factors alone (int8)",
    )
    command.add_argument(
        "--activation-rank",
        metavar="R",
        type=_count,
        help="with --weight-rank and an update that keeps inputs: their feature rank",
    )
    command.add_argument("--lora", metavar="R", type=_count, help=f"rank of LoRA ({LORA_RANK})")
    command.add_argument(
        "--memory-mode",
        choices=MEMORY_MODES,
        help="what WASI's blocks keep for backward (what a plan says, else exact)",
    )


def _add_batch_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", metavar="B", type=_count, required=True, help="samples of a training step")
    command.add_argument("--sequence-length", metavar="N", type=_count, help=f"tokens of a text ({SEQUENCE_LENGTH})")
    command.add_argument("--image-size", metavar="P", type=_count, help="pixels of an image's side (the model's)")
    command.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(adamw)")
    command.add_argument(
        "--update",
        choices=tuple(UPDATES),
        help=f"what trains (what a plan says; else {RESIDUAL_UPDATE} beside a residual, {DEFAULT_UPDATE} for factors "
        "alone)",
    )
    command.add_argument(
        "--update-rank",
        metavar="R",
        type=_count,
        help="directions that train beside the factors (what a plan says)",
    )
    command.add_argument(
        "--frozen-dtype", choices=tuple(FROZEN), help="how factors that do not train are stored (what a plan says)"
    )
    command.add_argument(
        "--padding", metavar="SHARE", type=_share, help="texts: share of the batch's tokens that is padding"
    )
    command.add_argument(
        "--slice-tokens", metavar="N", type=_count, help="tokens that WASI's blocks take at once (the memory mode's)"
    )
    command.add_argument(
        "--vocabulary", choices=VOCABULARIES, help="texts: how WASI stores token embedding and head (as they are)"
    )
    command.add_argument(
        "--skip-padding", action="store_true", help="texts: WASI neither computes nor keeps padded tokens in training"
    )
    command.add_argument(
        "--token-keep", metavar="SHARE", type=_share, help="images: share of the patches that WASI trains on"
    )


_RUNNING = ("vocabulary", "slice_tokens", "skip_padding", "token_keep")  # how a step runs, which no plan says


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `WasiConfig` that say how a step runs."""
    fields = ("update", "update_rank", "frozen_dtype", "memory_mode", *_RUNNING)
    return {name: getattr(arguments, name, None) for name in fields}


def _add_model_options(command: argparse.ArgumentParser, plot: bool = True) -> None:
    command.add_argument("--task", choices=list(TASKS), help="what the model is for (told by its configuration)")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (the checkpoint's)")
    command.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model")
    command.add_argument("--json", action="store_true", help="print JSON only")
    if plot:
        command.add_argument("--plot", metavar="PNG", help="write a figure (needs matplotlib)")


def _count(text: str) -> int:
    if not re.fullmatch(r"\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    if len(text) > 18 or int(text) > LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_COUNT:,}, got {text[:18]!r}")
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
    units = {unit.lower(): 1024**power for power, unit in enumerate(tables.BYTE_UNITS)}
    units.update({unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))})
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(
            f"must be a number with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), such as 1.5GiB, got {text!r}"
        )
    return int(float(match[1]) * units[match[2]])


# -------------------------------------------------------------------- commands


def _inspect(arguments: argparse.Namespace) -> None:
    _check_plot(arguments.plot)
    what = Path(arguments.model)
    if what.is_file():
        plan = WasiPlan.load(what)
        _show(arguments, _plan_text(arguments, plan), plan.to_dict())
        if arguments.plot:
            plots.plot_plan(plan, path=arguments.plot)
    elif (what / ADAPTER_CONFIG).is_file():
        _inspect_adapter(arguments, what)
    elif (what / "index.json").is_file():
        calibration = Calibration.load(what)
        rows = tables.calibration_rows(calibration)
        _show(arguments, tables.table(rows), {"layers": rows})
        if arguments.plot:
            plots.plot_calibration(calibration, arguments.plot)
    elif _is_compressed(what):
        _inspect_checkpoint(arguments, read_headers(what))
    else:
        _inspect_model(arguments)


def _is_compressed(folder: Path) -> bool:
    with naming(folder / "config.json"):
        return is_compressed(folder)


def _stored_in(model: transformers.PreTrainedModel) -> Checkpoint:
    """What a compressed checkpoint holds, by the model that its configuration makes."""
    layers = []
    for name, layer in compressed_layers(model):
        form, size = layer.stored_form, sum(tensor.nbytes for tensor in layer.stored().values())
        layers.append(StoredLayer(name, form.form, form.rank + form.side_rank, size))
    tensors = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return Checkpoint(tuple(layers), sum(tensors.values()))


def _inspect_checkpoint(arguments: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if arguments.plot:
        raise ValueError("--plot needs a plan, an adapter or a calibration, got a compressed checkpoint.")
    compressed = sum(layer.stored_bytes for layer in checkpoint.layers)
    unit, size = tables.byte_unit(compressed)
    rows = stored_rows(checkpoint.layers, unit, size, every=arguments.layers)
    line = (
        f"compressed checkpoint: {len(checkpoint.layers)} layers in {compressed / size:,.2f} {unit}, "
        f"all tensors {checkpoint.stored_bytes / size:,.2f} {unit}"
    )
    data = {
        "layers": [layer._asdict() for layer in checkpoint.layers],
        "layers_bytes": compressed,
        "stored_bytes": checkpoint.stored_bytes,
    }
    _show(arguments, f"{tables.table(rows)}\n{line}", data)


def _inspect_adapter(arguments: argparse.Namespace, folder: Path) -> None:
    config, summary = _read_adapter(folder)
    shown = summary if config.plan is None else _plan_as_injected(config)
    inputs = {layer.name: _input_rule(config, layer.name) for layer in summary.layers}
    settings = {
        "base_model": config.base_model_name_or_path,
        "update": config.update,
        "kept_share": summary.kept_share,
    }
    lines = [_plan_text(arguments, shown), f"update {config.update}, base model {config.base_model_name_or_path}"]
    if config.plan is None:
        lines.append(f"input kept for backward: {next(iter(inputs.values()))}")
    layers = [
        {
            "layer": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "form": layer.update.residual or FACTORS,
            "weight_rank": layer.rank,
            "input": inputs[layer.name],
        }
        for layer in summary.layers
    ]
    _show(arguments, "\n".join(lines), {**settings, "layers": layers})
    if arguments.plot:
        plots.plot_plan(shown, path=arguments.plot)


def _plan_as_injected(config: WasiConfig) -> WasiPlan:
    """The plan of an adapter, with the update and the memory mode that the adapter has, whatever it was made for."""
    plan = WasiPlan.from_dict(config.plan)
    fields = ("memory_mode", "update", "update_rank", "frozen_dtype")
    return replace(plan, **{name: getattr(config, name) for name in fields})


_ON_FACTORS = " The factors of an adapter on a compressed model are in that model's folder: inspect it."


def _read_adapter(folder: Path) -> tuple[WasiConfig, WasiSummary]:
    """Configuration and layers of a saved adapter; the base model is not needed."""
    config = adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    layers = []
    headers = read_header(path)
    shapes = {key: list(header.shape) for key, header in headers.items()}
    widths = {key: 2 if header.dtype in ("F16", "BF16") else 4 for key, header in headers.items()}
    for key in headers:  # a factor in few bits is as large as its codes or values
        factor, _, stored = key.rpartition(".")
        if stored in ("codes", "values"):
            shapes[factor] = shapes[key]
    places = (key.partition(".wasi_form.")[0] for key in shapes if ".wasi_form." in key)
    for place in dict.fromkeys(places):
        name = place.removeprefix("base_model.model.")
        update = config.update_of(name)
        prefix, parts = update.stored_cls.prefix, update.stored_cls.parts
        key = f"{place}.wasi_form.{prefix}L"
        if key not in shapes:
            continue
        L, R = shapes[key], shapes.get(key.removesuffix("L") + "R", [])
        if len(L) not in (2, 3) or len(R) != len(L) or L[-1] != R[-2] or L[:-2] != R[:-2]:  # 3: packed experts
            raise ValueError(f"{path}: {key} must have a matching {prefix}R, got the shapes {L} and {R}.{_ON_FACTORS}")
        missing = [part for part in parts if key.removesuffix("L") + part not in shapes]
        if missing:
            raise ValueError(
                f"{path}: {key} must stand with {prefix}{missing[0]} for update={update.name!r}, got none."
            )
        width = widths[f"{place}.wasi_form.{prefix}{update.trained[0]}"]
        experts = L[0] if len(L) == 3 else 1
        layers.append(LayerSummary(name, L[-2], R[-1], L[-1], update, width, experts=experts))
    if not layers:
        raise ValueError(f"{path}: must hold WASI factors, got none.{_ON_FACTORS}")
    return config, WasiSummary(folder.name, tuple(layers))


def _input_rule(config: WasiConfig, name: str) -> str:
    rule, update = config.compression_rule(name), config.update_of(name)
    if rule is None and update.keeps_image:
        return "image"
    if rule is None:
        rounds = update.residual is not None and RESIDUALS[update.residual].rounds_inputs
        return "8 bits" if rounds else "exact"
    ranks = dict(rule.ranks)
    return ", ".join(f"{mode} {ranks[mode] if mode in ranks else f'{rule.threshold:.0%}'}" for mode in rule.modes)


def _inspect_model(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        raise ValueError("--plot needs a plan, an adapter or a calibration, got a model.")
    model, task = load_model(arguments, weights=False)
    if any(compressed_layers(model)):
        return _inspect_checkpoint(arguments, _stored_in(model))
    sizes = target_sizes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    targeted = sum(target.elements for target in sizes.values())
    shapes = {name: target[:2] for name, target in sizes.items()}
    experts = {name: target.experts for name, target in sizes.items()}
    share = targeted / parameters
    text = f"{type(model).__name__} ({task}): {parameters:,} parameters, {share:.1%} in {len(sizes)} target layers"
    data = {
        "model": arguments.model,
        "architecture": type(model).__name__,
        "task": task,
        "parameters": parameters,
        "target_share": share,
        "kinds": tables.target_rows(shapes, experts),
        "layers": {name: target._asdict() for name, target in sizes.items()},
    }
    _show(arguments, f"{tables.table(tables.target_rows(shapes, experts, every=arguments.layers))}\n{text}", data)


def _variants(
    arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str
) -> dict[str, PeftConfig | None]:
    """Configurations to compare, by label; None is full fine-tuning."""
    heads = task_heads(model, task)
    configs: dict[str, PeftConfig | None] = {"compressed" if any(compressed_layers(model)) else "dense": None}
    if not arguments.dense:
        rank, targets = arguments.lora or LORA_RANK, target_sizes(model)
        layers, packed = (
            sorted(name for name, target in targets.items() if (target.experts > 1) == several)
            for several in (False, True)
        )
        configs[f"LoRA r={rank}"] = LoraConfig(
            r=rank, target_modules=layers, target_parameters=packed or None, modules_to_save=heads
        )
    if arguments.plan:
        configs["WASI plan"] = WasiConfig(plan=arguments.plan, modules_to_save=heads, **_training(arguments))
    elif not arguments.dense:
        configs[f"WASI K={arguments.weight_rank or RESIDUAL_RANK}"] = WasiConfig(
            weight_rank=arguments.weight_rank,
            residual={None: AUTO, "none": None}.get(arguments.residual, arguments.residual),
            activation_ranks=arguments.activation_rank,
            activation_threshold=None,
            modules_to_save=heads,
            **_training(arguments),
        )
    return configs


def _check_variants(arguments: argparse.Namespace) -> None:
    if arguments.activation_rank and not arguments.weight_rank:
        raise ValueError("--activation-rank goes with --weight-rank; a plan has its own.")
    if arguments.residual and (arguments.plan or arguments.dense):
        raise ValueError("--residual is for one rank everywhere, --weight-rank; a plan has its own.")
    if arguments.dense and arguments.lora:
        raise ValueError("--dense leaves LoRA out; give --lora or --dense, not both.")
    running = ("memory_mode", *_RUNNING)
    if arguments.dense and any(getattr(arguments, name) for name in running):
        options = [f"--{name.replace('_', '-')}" for name in running]
        raise ValueError(f"{', '.join(options[:-1])} and {options[-1]} are for WASI, which --dense leaves out.")
    replaces = arguments.residual == "none" or arguments.frozen_dtype
    replaces = replaces or (arguments.update and not UPDATES[arguments.update].takes_residual)
    if replaces and not (arguments.weight_rank or arguments.plan or arguments.dense):
        raise ValueError("factors in place of the weights need --weight-rank, or --plan.")
    if arguments.plan:
        check_file(arguments.plan)
    _check_padding(arguments, "give it with --padding, such as 0.5.")


def _check_padding(arguments: argparse.Namespace, way_out: str) -> None:
    if arguments.skip_padding and arguments.padding is None:
        raise ValueError(f"--skip-padding depends on how much of a batch is padding; {way_out}")


Measured = TypeVar("Measured")


def _for_each(
    configs: dict[str, PeftConfig | None], title: str, measure: Callable[[PeftConfig | None], Measured]
) -> dict[str, Measured]:
    """What `measure` says of each configuration; WASI, which may be refused, is asked first."""
    found = {}
    with tqdm(reversed(configs), desc=title, total=len(configs), leave=False) as labels:
        for label in labels:
            found[label] = measure(configs[label])
    return {label: found[label] for label in configs}


def _compared(
    arguments: argparse.Namespace, task: str, batch: dict[str, Any], model: transformers.PreTrainedModel
) -> tuple[str, dict[str, Any]]:
    """What was compared, as a line and as data."""
    shapes = {key: list(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    text = ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in shapes.items())
    data = {"model": arguments.model, "task": task, "optimizer": arguments.optimizer, "batch": shapes}
    return f"{type(model).__name__}, {arguments.optimizer}, {text}", data


def _estimate(arguments: argparse.Namespace) -> None:
    _check_plot(arguments.plot)
    _check_variants(arguments)
    method = quantized_by(read_config(arguments))
    if method is not None and method != METHOD:
        raise ValueError(
            f"{arguments.model}: must be dense or compressed by wasi_peft, got weights stored by {method!r}."
        )
    if method == METHOD and (arguments.dense or arguments.lora):
        raise ValueError("of a compressed checkpoint WASI alone is estimated; leave --dense and --lora out.")
    model, task = load_model(arguments, weights=False)
    batch = dummy_batch(arguments, model, task)

    def estimate(config: PeftConfig | None) -> Estimate:
        return estimate_wasi(model, config, batch=batch, optimizer=arguments.optimizer)

    configs = _variants(arguments, model, task)
    if method == METHOD:
        configs = {label: config for label, config in configs.items() if isinstance(config, WasiConfig)}
    estimates = _for_each(configs, "Estimates", estimate)
    line, data = _compared(arguments, task, batch, model)
    data["estimates"] = {label: estimate.to_dict() for label, estimate in estimates.items()}
    _show(arguments, f"{tables.estimates_table(estimates)}\n{line}", data)
    if arguments.plot:
        plots.plot_estimates(estimates, arguments.plot)


def _profile(arguments: argparse.Namespace) -> None:
    _check_plot(arguments.plot)
    _check_variants(arguments)
    model, task = load_model(arguments, weights=True)
    batch = dummy_batch(arguments, model, task)
    random_content(batch, model)

    def profile(config: PeftConfig | None) -> StepProfile:
        return profile_wasi(model, config, batch=batch, optimizer=arguments.optimizer, rounds=arguments.rounds)

    profiles = _for_each(_variants(arguments, model, task), "Profiles", profile)
    line, data = _compared(arguments, task, batch, model)
    line += f", threads {torch.get_num_threads()}"
    data["threads"] = torch.get_num_threads()
    data["profiles"] = {label: profile.to_dict() for label, profile in profiles.items()}
    costs = [f"{label}\n{costs_table(profile, arguments.by)}" for label, profile in profiles.items()]
    _show(arguments, "\n\n".join([f"{profiles_table(profiles)}\n{line}", *costs]), data)
    if arguments.plot:
        plot_profiles(profiles, arguments.plot)


def _plan(arguments: argparse.Namespace) -> None:
    _check_plan(arguments.output)
    _check_plot(arguments.plot, arguments.data)
    if arguments.data is None and arguments.calibration is None:
        raise ValueError("--data is needed, or --calibration with a finished calibration; got neither.")
    if arguments.data is None:
        _check_padding(arguments, "give it with --padding, or --data to measure it on.")
    if quantized_by(read_config(arguments)) == METHOD:
        raise ValueError(f"{arguments.model}: a plan is made for a dense model, got a compressed checkpoint.")
    model, task = load_model(arguments, weights=True)
    data = None if arguments.data is None else calibration_batches(arguments, model, task)
    if data is not None and arguments.skip_padding and arguments.padding is None:
        arguments.padding = padding_share(data)
    batch = dummy_batch(arguments, model, task)
    if data is None:
        calibration = Calibration.load(arguments.calibration)
    else:
        calibration = calibrate_wasi(model, data, directory=arguments.calibration)
    heads = task_heads(model, task)
    plan = plan_wasi(
        model,
        calibration,
        **{name: getattr(arguments, name) for name in BUDGETS},
        batch=batch,
        optimizer=arguments.optimizer,
        config=WasiConfig(weight_rank=arguments.addition_rank, modules_to_save=heads, **_training(arguments)),
        forms=arguments.forms,
        memory_modes=arguments.memory_modes or (MEMORY_MODES if arguments.peak_bytes else None),
    )
    if arguments.output:
        plan.save(arguments.output)
    text = _plan_text(arguments, plan)
    if arguments.output:
        text += f"\nto train under it: {_how_to_train(arguments, heads)}"
        if any(layer.form == FACTORS for layer in plan.layers):
            text += ", and preprocess_wasi(model, config, data) before, for the layers that became factors"
    _show(arguments, text, plan.to_dict())
    if arguments.plot:
        plots.plot_plan(plan, calibration, arguments.plot)


def _plan_text(arguments: argparse.Namespace, plan: WasiPlan | WasiSummary) -> str:
    return tables.plan_table(plan) if arguments.layers else kinds_table(plan)


def _how_to_train(arguments: argparse.Namespace, heads: list[str] | None) -> str:
    """The configuration that a plan was made for, as Python."""
    fields = {"plan": arguments.output, "modules_to_save": heads}
    fields |= {name: getattr(arguments, name) or None for name in _RUNNING}
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
    return f"WasiConfig({given})"


def _prepare(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, arguments.overwrite)
    check_model(arguments.model)
    check_apart(arguments.output, {"the model's": arguments.model})
    _check_data(arguments.output, arguments.data)
    _check_writable(arguments.output)
    config = WasiConfig(
        residual={None: AUTO, "none": None}.get(arguments.residual, arguments.residual),
        weight_share=arguments.weight_share,
        weight_rank=arguments.weight_rank,
    )
    if arguments.data is None and config.residual is None:
        raise ValueError("--data is needed for factors in the weights' place; got none.")
    data = None
    if arguments.data is not None:
        model, task = load_model(arguments, weights=False)
        data = calibration_batches(arguments, model, task)
    folder = prepare_checkpoint(
        arguments.model,
        arguments.output,
        config,
        data,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        overwrite=arguments.overwrite,
    )
    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["layers"]
    size = read_headers(folder).stored_bytes
    forms = Counter(layer["form"] for layer in layers.values())
    ranks = [layer["rank"] for layer in layers.values()]
    unit, divisor = tables.byte_unit(size)
    counted = ", ".join(f"{count} {form}" for form, count in forms.items())
    ranked = f" of rank {min(ranks)} to {max(ranks)}" if max(ranks) else ""
    text = f"{arguments.output}: {counted} layers{ranked}, {size / divisor:.1f} {unit} in all"
    _show(arguments, text, {"output": str(folder), "total_bytes": size, "layers": layers})


def _merge(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder}: must be the folder of a WASI adapter, got one without adapter_config.json.")
    _check_folder(arguments)
    model = load_with_adapter(arguments)
    merged: Any = model.base_model.merge_and_unload(dense=True) if arguments.dense else compress(model)
    with new_folder(arguments.output, arguments.overwrite) as scratch:
        merged.save_pretrained(scratch)
        copy_processors(arguments, scratch)
    _show_folder(arguments, "a dense model" if arguments.dense else "a compressed model", {})


def _run(arguments: argparse.Namespace) -> None:
    """Becomes the program; returns only where it cannot."""
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise ValueError(
            "run needs a program, as in `wasi-peft run train.py --epochs 3` or `... run -m module`; got none."
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *program], with_lean_heap(os.environ))


def _export(arguments: argparse.Namespace) -> None:
    options: dict[str, Any] = {"int8": True} if arguments.int8 else {}
    if arguments.tokenizer is not None:
        options["tokenizer"] = arguments.tokenizer
    ready_format(arguments.format, **options)
    _check_folder(arguments)
    model = load_with_adapter(arguments)
    try:
        difference = export(
            model,
            arguments.output,
            arguments.format,
            batch=example_batch(model, arguments.image_size, arguments.samples, arguments.tokens),
            tolerance=arguments.tolerance,
            overwrite=arguments.overwrite,
            **options,
        )
    except TypeError as error:  # the model that was named is of a kind that this format is not for
        raise ValueError(str(error)) from error
    text = f"format {arguments.format}, answers differ by {difference:.1e} of the largest one"
    _show_folder(arguments, text, {"format": arguments.format, "difference": difference})


def _sources(arguments: argparse.Namespace) -> dict[str, str]:
    """What `merge` and `export` read, by what it is."""
    base = base_of(arguments)
    found = (
        {"the model's": arguments.model} if base is None else {"the adapter's": arguments.model, "the base's": base}
    )
    tokenizer = getattr(arguments, "tokenizer", None)
    return found if tokenizer is None else {**found, "the tokenizer's": tokenizer}


def _show_folder(arguments: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """What was written, and how large it is."""
    size = sum(path.stat().st_size for path in Path(arguments.output).rglob("*") if path.is_file())
    data = {"output": arguments.output, **data, "bytes": size}
    _show(arguments, f"{arguments.output}: {text}, {size / 2**20:,.2f} MiB", data)


# -------------------------------------------------------------------- what is asked for can be written


def _check_folder(arguments: argparse.Namespace) -> None:
    check_apart(arguments.output, _sources(arguments))
    check_target(arguments.output, arguments.overwrite)
    _check_writable(arguments.output)


def _check_plan(path: str | None) -> None:
    if path is None:
        return
    _check_file(path)
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            WasiPlan.load(path)
        except ValueError as error:
            raise ValueError(
                f"{path}: holds something else than a plan, which is not replaced: name another."
            ) from error


def _check_plot(path: str | None, data: str | None = None) -> None:
    if path is None:
        return
    plots.check_format(path)
    _check_file(path)
    if os.path.exists(path):
        _check_data(path, data)


def _check_file(path: str) -> None:
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder must exist.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: must be a file, got {'a folder' if os.path.isdir(path) else 'something else'}.")
    _check_writable(path)


def _check_writable(path: str) -> None:
    """Refuse a place where nothing can be made; folders above it that are not there would be made."""
    above = next(folder for folder in Path(path).resolve().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}.") from error


def _check_data(output: str, data: str | None) -> None:
    """Refuse an output that would take data along, or would be taken for some."""
    if data is None:
        return
    check_apart(output, {"the data's": data})
    if Path(data).resolve() in Path(output).resolve().parents:
        raise ValueError(f"{output}: the output must be outside of the data's folder, {data}.")


def _show(arguments: argparse.Namespace, text: str, data: Any) -> None:
    if arguments.json:
        print(json.dumps(data, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(tables.coloured(text), soft_wrap=True)
    else:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
