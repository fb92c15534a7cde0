"""What a command writes and shows, checked before any work."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..files.folders import check_apart, check_target
from ..ranks.plan import WasiPlan
from ..report import plots, tables
from ..report.kinds import kinds_table
from ..tuner.summary import WasiSummary
from .loading import base_of


def check_folder(arguments: argparse.Namespace) -> None:
    """Refuse a folder that cannot be made, or would take along what is read."""
    check_apart(arguments.output, _sources(arguments))
    check_target(arguments.output, arguments.overwrite)
    check_writable(arguments.output)


def check_plan(path: str | None) -> None:
    """Refuse a place where no plan can be written, or something else is."""
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


def check_plot(path: str | None, data: str | None = None) -> None:
    """Refuse a place where no figure can be written, and a file of the data."""
    if path is None:
        return
    plots.check_format(path)
    _check_file(path)
    if os.path.exists(path):
        check_data(path, data)


def _check_file(path: str) -> None:
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder must exist.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: must be a file, got {'a folder' if os.path.isdir(path) else 'something else'}.")
    check_writable(path)


def check_writable(path: str) -> None:
    """Refuse a place where nothing can be made; folders above it that are not there would be made."""
    above = next(folder for folder in Path(path).resolve().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}.") from error


def check_data(output: str, data: str | None) -> None:
    """Refuse an output that would take data along, or would be taken for some."""
    if data is None:
        return
    check_apart(output, {"the data's": data})
    if Path(data).resolve() in Path(output).resolve().parents:
        raise ValueError(f"{output}: the output must be outside of the data's folder, {data}.")


def _sources(arguments: argparse.Namespace) -> dict[str, str]:
    """What `merge` and `export` read, by what it is."""
    base = base_of(arguments)
    found = (
        {"the model's": arguments.model} if base is None else {"the adapter's": arguments.model, "the base's": base}
    )
    tokenizer = getattr(arguments, "tokenizer", None)
    return found if tokenizer is None else {**found, "the tokenizer's": tokenizer}


def show(arguments: argparse.Namespace, text: str, data: Any) -> None:
    """Print a text, in colour where the terminal has it, or data as JSON."""
    if arguments.json:
        print(json.dumps(data, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(tables.coloured(text), soft_wrap=True)
    else:
        print(text)


def show_folder(arguments: argparse.Namespace, text: str, data: dict[str, Any]) -> None:
    """What was written, and how large it is."""
    size = sum(path.stat().st_size for path in Path(arguments.output).rglob("*") if path.is_file())
    data = {"output": arguments.output, **data, "bytes": size}
    show(arguments, f"{arguments.output}: {text}, {size / 2**20:,.2f} MiB", data)


def plan_text(arguments: argparse.Namespace, plan: WasiPlan | WasiSummary) -> str:
    """The table of a plan, a line for each layer or each kind."""
    return tables.plan_table(plan) if arguments.layers else kinds_table(plan)
