"""`wasi-peft prepare | merge | export | run`: what makes folders, and runs programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..files.folders import check_apart, new_folder
from ..hub.cases import example_batch
from ..hub.compressed import compress
from ..hub.export import export, ready_format
from ..hub.headers import read_headers
from ..hub.prepare import prepare_checkpoint
from ..hub.working import check_output
from ..memory.heap import with_lean_heap
from ..report import tables
from ..tuner.config import AUTO, WasiConfig
from .loading import (
    ADAPTER_CONFIG,
    bring_processors,
    calibration_batches,
    check_model,
    load_model,
    load_with_adapter,
)
from .outputs import check_data, check_folder, check_writable, show, show_folder


def prepare(arguments: argparse.Namespace) -> None:
    """Make a compressed checkpoint of a dense one, a block at a time."""
    check_output(arguments.output, arguments.overwrite)
    check_model(arguments.model)
    check_apart(arguments.output, {"the model's": arguments.model})
    check_data(arguments.output, arguments.data)
    check_writable(arguments.output)
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
    show(arguments, text, {"output": str(folder), "total_bytes": size, "layers": layers})


def merge(arguments: argparse.Namespace) -> None:
    """Make a model of an adapter and its base."""
    folder = Path(arguments.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder}: must be the folder of a WASI adapter, got one without adapter_config.json.")
    check_folder(arguments)
    model = load_with_adapter(arguments)
    merged: Any = model.base_model.merge_and_unload(dense=True) if arguments.dense else compress(model)
    with new_folder(arguments.output, arguments.overwrite) as scratch:
        merged.save_pretrained(scratch)
        bring_processors(arguments, scratch)
    show_folder(arguments, "a dense model" if arguments.dense else "a compressed model", {})


def run(arguments: argparse.Namespace) -> None:
    """Becomes the program; returns only where it cannot."""
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise ValueError(
            "run needs a program, as in `wasi-peft run train.py --epochs 3` or `... run -m module`; got none."
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *program], with_lean_heap(os.environ))


def export_model(arguments: argparse.Namespace) -> None:
    """Write a model for programs that know nothing of this package."""
    options: dict[str, Any] = {"int8": True} if arguments.int8 else {}
    if arguments.tokenizer is not None:
        options["tokenizer"] = arguments.tokenizer
    ready_format(arguments.format, **options)
    check_folder(arguments)
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
    show_folder(arguments, text, {"format": arguments.format, "difference": difference})
