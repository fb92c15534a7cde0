"""Real models through every tool, as a user would: does it work, in what time and memory, and is the result right.

DINOv2-small, MiniLM and SmolLM2-135M with their weights, Swin-T and a Mixtral geometry from their configurations
(`real_cases.py`), small batches, ten steps. Each cell, a model and a tool (`real_tools.py`), is a process of its own.
It "works" if what came out is right: outputs equal where they must, the loss falls where it trains, a measured peak is
the estimated one; a sentence that refuses is no failure. `seconds` are those of the tool without imports and without
what is checked afterwards, `peak_mib` the resident set of the process in that time above that of its imports.

Results: docs/benchmarks/real_models.json, and the page docs/real_models.md made of it. Finished cells are skipped,
those that failed are not. What the command line printed is in `printed.txt` of a model's folder below `--work`::

    python benchmarks/real_models.py
    python benchmarks/real_models.py --models minilm --tools "wasi-peft plan" skip_padding
    python benchmarks/real_models.py --summarise
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

import wasi_peft
from common import REPOSITORY, RESULTS_FOLDER, add_entry, cache_dir, environment, process_peak_bytes, read_json
from real_cases import MODELS, Place
from real_tools import MIB, TOOLS, Refused, tools_of

RESULTS = RESULTS_FOLDER / "real_models.json"
PAGE = REPOSITORY / "docs" / "real_models.md"
PACKAGE = str(Path(wasi_peft.__file__).parent)
INTRODUCTION = """# Real models through every tool

Written by `python benchmarks/real_models.py --summarise` from `real_models.json`: DINOv2-small, MiniLM and SmolLM2-135M with
their weights, Swin-T and a Mixtral geometry (8 experts of 256 x 896, 4 blocks) with random ones, {threads} thread, small
batches ({batches}), ten steps, factors at half of the weights. Each cell is a process of its own: seconds without imports, and
the resident set above that after the imports, in MiB. Other work ran on the machine meanwhile, so seconds are upper bounds.

A cell is there if its result was right: outputs equal where they must (an adapter that a fresh process loads, merged,
exported), the loss falls where it trains, the tracked peak of a step is the estimated one to 1 %, a plan's step stays within
its budget. "-": not for this kind of model. A letter is a sentence below.
"""  # noqa: E501


def run_cell(name: str, tool: str, work: Path) -> dict[str, Any]:
    """Runs one cell in this process; returns its entry."""
    place = Place(name, work)
    imports, start = process_peak_bytes(), time.perf_counter()
    entry: dict[str, Any] = {"status": "works"}
    try:
        verify = TOOLS[tool][0](place)
        entry |= {
            "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": round((process_peak_bytes() - imports) / MIB, 1),
        }
        entry["checks"] = verify()
    except Exception as error:
        refused = isinstance(error, Refused) or (isinstance(error, (ValueError, TypeError)) and _is_ours(error))
        entry |= {"status": "refused" if refused else "fails", "sentence": f"{error}".strip() or type(error).__name__}
        traceback.print_exc()
    return {**entry, "environment": environment()}


def _is_ours(error: Exception) -> bool:
    """Whether the package raised it itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(PACKAGE)


def in_a_process(name: str, tool: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a cell in a process of its own; returns its entry."""
    options = ["--threads", str(args.threads), "--work", str(args.work), "--cell", name, tool]
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"status": "fails", "sentence": f"the process ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def page_of(entries: dict[str, Any]) -> str:
    """Formats the page."""
    names = [name for name in MODELS if any(key.startswith(f"{name}: ") for key in entries)]
    sentences: dict[str, list[str]] = {}
    lines = [f"| tool | {' | '.join(MODELS[name].title for name in names)} |", f"|{' --- |' * (1 + len(names))}"]
    for tool in TOOLS:
        cells = []
        for name in names:
            absent = "not run" if tool in tools_of(MODELS[name]) else "-"
            entry = entries.get(f"{name}: {tool}")
            where = f"{MODELS[name].title}, {tool}"
            cells.append(absent if entry is None else _cell(entry, where, sentences))
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    models = [MODELS[name] for name in names]
    batches = ", ".join(f"{x.title} {x.samples} x {x.size} {'px' if x.images else 'tokens'}" for x in models)
    threads = next((entry["environment"]["threads"] for entry in entries.values() if "environment" in entry), "one")
    found = [f"{chr(97 + index)}. {', '.join(where)}: {text}" for index, (text, where) in enumerate(sentences.items())]
    counts = ", ".join(
        f"{sum(entry['status'] == status for entry in entries.values())} {text}"
        for status, text in (("works", "work"), ("refused", "are refused in a sentence"), ("fails", "fail"))
    )
    parts = [
        INTRODUCTION.format(threads=threads, batches=batches),
        f"Of {len(entries)} cells, {counts}.",
        "\n".join(lines),
    ]
    return "\n".join([*parts[:2], "", parts[2], *(["", "## Sentences", "", *found] if found else []), ""])


def _cell(entry: dict[str, Any], where: str, sentences: dict[str, list[str]]) -> str:
    if entry["status"] == "works":
        return f"{entry['seconds']:.1f} s, {entry['peak_mib']:.0f}"
    places = sentences.setdefault(entry["sentence"], [])
    places.append(where)
    letter = chr(97 + list(sentences).index(entry["sentence"]))
    return f"{'refused' if entry['status'] == 'refused' else '**fails**'} ({letter})"


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells that are missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--work", type=Path, default=cache_dir() / "real-models", help="where models, adapters and the like are kept")
    add("--results", type=Path, default=RESULTS)
    add("--page", type=Path, default=PAGE)
    add("--summarise", action="store_true", help="run nothing, write the page")
    add("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.cell:
        transformers.logging.set_verbosity_error()
        print(json.dumps(run_cell(*args.cell, args.work)), flush=True)
        return
    for name in [] if args.summarise else args.models:
        for tool in (tool for tool in tools_of(MODELS[name]) if tool in args.tools):
            key = f"{name}: {tool}"
            if read_json(args.results).get(key, {}).get("status") in ("works", "refused"):
                continue
            entry = in_a_process(name, tool, args)
            print(f"{key}: {entry['status']} {entry.get('seconds', '')} {entry.get('sentence', '')}", flush=True)
            add_entry(args.results, key, entry, lock=cache_dir() / f"{args.results.name}.lock")
    args.page.write_text(page_of(read_json(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
