"""What may be given on the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..cost.estimate import OPTIMIZERS
from ..cost.profile import ROUNDS
from ..forms.frozen import FROZEN
from ..forms.residual import RESIDUALS
from ..forms.stored import STORABLE
from ..forms.vocabulary import VOCABULARIES
from ..hub.cases import EXAMPLE_SAMPLES, EXAMPLE_TOKENS
from ..hub.export import FORMATS
from ..hub.plain import PlainFormat
from ..memory.modes import MEMORY_MODES
from ..planner.planner import DEFAULT_FORMS
from ..ranks.plan import FORMS
from ..ranks.spectrum import FACTORS
from ..report import tables
from ..report.profiles import GROUPINGS
from ..tuner.config import RESIDUAL_RANK
from ..updates import DEFAULT_UPDATE, RESIDUAL_UPDATE, UPDATES
from .loading import SEQUENCE_LENGTH, TASKS

LORA_RANK = 16
SAMPLES = 256
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_COUNT = 2**31 - 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def build_parser(commands: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the command line, whose `run` is the command that was asked for, or None.

    Args:
        commands: By name.
    """
    parser = _Parser(
        prog="wasi-peft",
        description="Look at, estimate, profile and plan WASI fine-tuning; prepare models, merge and export them.",
    )
    version = f"%(prog)s {importlib.metadata.version('wasi_peft')}"
    parser.add_argument("--version", action="version", version=version)
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(metavar="COMMAND")

    command = subparsers.add_parser("inspect", help="what a model, checkpoint, adapter, plan or calibration holds")
    command.set_defaults(run=commands["inspect"])
    command.add_argument(
        "model", metavar="WHAT", help="model (hub id or folder), compressed checkpoint, adapter, plan, calibration"
    )
    _add_layers_option(command)
    _add_model_options(command)

    command = subparsers.add_parser("estimate", help="memory and FLOPs of a training step, without running one")
    command.set_defaults(run=commands["estimate"])
    command.add_argument("model", metavar="MODEL", help="hub id or folder; its weights are not loaded")
    _add_variant_options(command)
    _add_batch_options(command)
    _add_model_options(command)

    command = subparsers.add_parser(
        "profile", help="time and memory of a training step by module and operation, measured"
    )
    command.set_defaults(run=commands["profile"])
    command.add_argument("model", metavar="MODEL", help="hub id or folder")
    _add_variant_options(command)
    command.add_argument("--by", choices=list(GROUPINGS), default="class", help="what the time is grouped by (class)")
    command.add_argument(
        "--rounds", metavar="N", type=_count, default=ROUNDS, help=f"how many steps are timed ({ROUNDS})"
    )
    _add_batch_options(command)
    _add_model_options(command)

    command = subparsers.add_parser("plan", help="choose forms and ranks of all layers under a budget")
    command.set_defaults(run=commands["plan"])
    command.add_argument("model", metavar="MODEL", help="hub id or folder")
    budget = command.add_mutually_exclusive_group(required=True)
    for flag, dest, kind, text in (
        ("--weight-share", "weight_share", _share, "bytes stored over those of the dense weights, in (0, 1]"),
        ("--peak-memory", "peak_bytes", size_in_bytes, "peak of a training step, such as 1.5GiB"),
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

    command = subparsers.add_parser("prepare", help="write a compressed checkpoint, one transformer block at a time")
    command.set_defaults(run=commands["prepare"], trust_remote_code=False)
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

    command = subparsers.add_parser(
        "run",
        help="run a Python program with less memory (Linux with glibc)",
        description="Run a Python program with malloc set so that freed memory is used again.",
        usage="wasi-peft run SCRIPT [ARGUMENTS ...] | -m MODULE [ARGUMENTS ...]",
    )
    command.set_defaults(run=commands["run"])
    command.add_argument("program", nargs=argparse.REMAINDER, help="what would follow `python`")

    command = subparsers.add_parser("merge", help="a model of its own from an adapter and its base model")
    command.set_defaults(run=commands["merge"])
    command.add_argument("model", metavar="ADAPTER", help="folder of a WASI adapter")
    command.add_argument("--dense", action="store_true", help="dense layers instead of compressed ones")
    _add_output_options(command)

    command = subparsers.add_parser("export", help="a folder for programs that know no wasi_peft")
    command.set_defaults(run=commands["export"])
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


RUNNING = ("vocabulary", "slice_tokens", "skip_padding", "token_keep")  # how a step runs, which no plan says


def training_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `WasiConfig` that say how a step runs."""
    fields = ("update", "update_rank", "frozen_dtype", "memory_mode", *RUNNING)
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


def size_in_bytes(text: str) -> int:
    """Bytes from a number with a unit.

    Example:
        >>> size_in_bytes("1.5GiB"), size_in_bytes("20 MB")
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
