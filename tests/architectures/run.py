"""Runs every check on every architecture in every form, and writes the table.

    python tests/architectures/run.py                 all; what an interrupted run of the same sources did is kept
    python tests/architectures/run.py Llama Swin      some, without writing the table

Each architecture runs in a process of its own, forked from one that has everything imported, for a bounded time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from checks import CHECKS, FORMS, Case, check
from families import FAMILIES
from table import write_table

import wasi_peft

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "models.json"
PARTIAL = ROOT / ".models"
CPU_SECONDS = 90  # for one architecture; a busy machine takes longer


def digest() -> str:
    """Of all that results depend on."""
    sources = sorted(Path(wasi_peft.__file__).parent.rglob("*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    versions = "".join(versions_used().values())
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + versions.encode()).hexdigest()[:16]


def versions_used() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "transformers", "peft", "timm", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def results_of(name: str, forms: list[str], checks: list[str]) -> dict[str, Any]:
    """Results of one architecture, by form and check."""
    family = FAMILIES[name]
    torch.set_num_threads(1)
    start = time.process_time()
    dense = family.model()
    entry: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in dense.parameters())}
    for form in forms:
        case = Case(family, form, dense)
        entry[form] = {}
        for key in checks:
            result = check(case, key)
            entry[form][key] = [result.status, result.text, result.trace]
            if key == "targets" and result.status != "works":
                break  # without targets there is nothing to check
    entry["seconds"] = round(time.process_time() - start, 1)
    return entry


def _work(name: str, forms: list[str], checks: list[str], path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            entry = results_of(name, forms, checks)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            entry = {"broken": text}
        path.write_text(json.dumps(entry))


def run_one(name: str, forms: list[str], checks: list[str], folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    path = folder / f"{name.replace('/', '_')}.json"
    process = multiprocessing.get_context("fork").Process(target=_work, args=(name, forms, checks, path))
    process.start()
    process.join(10 * CPU_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"broken": f"took more than {CPU_SECONDS} s"}
    if not path.exists():
        return {"broken": f"the process ended with code {process.exitcode}"}
    entry: dict[str, Any] = json.loads(path.read_text())
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, by default all")
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--checks", nargs="*", default=list(CHECKS))
    parser.add_argument("--traces", action="store_true", help="show where failures come from")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(FAMILIES))
    if unknown:
        parser.error(f"names must be of the list, got {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    folder = PARTIAL / digest()
    if arguments.names:
        folder = PARTIAL / "some"
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    start = time.perf_counter()
    for name in arguments.names or FAMILIES:
        family = FAMILIES[name]
        path = folder / f"{name.replace('/', '_')}.json"
        if arguments.names and path.exists():
            path.unlink()
        if family.missing:
            entries[name] = {"skipped": f"{' and '.join(family.missing)} not installed"}
        elif path.exists():
            entries[name] = json.loads(path.read_text())
        else:
            entries[name] = run_one(name, arguments.forms, arguments.checks, folder)
        _show(name, entries[name], time.perf_counter() - start, arguments.traces)
    if arguments.names:
        return 0
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    content = {
        "versions": {**versions_used(), "python": sys.version.split()[0]},
        "minutes": round(sum(entry.get("seconds", 0.0) for entry in entries.values()) / 60, 1),
        "models": {name: _without_traces(entry) for name, entry in entries.items()},
    }
    write_results(content)
    write_table(content)
    return _verdict(content, before)


def write_results(content: dict[str, Any]) -> None:
    """The JSON that the table is written from, a line for each architecture."""
    head = json.dumps({key: value for key, value in content.items() if key != "models"})
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in content["models"].items())
    RESULTS.write_text(f'{head[:-1]}, "models": {{\n{lines}\n}}}}\n')


def _without_traces(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {name: result[:2] if result[1] else result[:1] for name, result in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in entry.items()
    }


def _show(name: str, entry: dict[str, Any], seconds: float, traces: bool) -> None:
    if "broken" in entry or "skipped" in entry:
        print(f"{seconds:6.0f} s  {name}: {entry.get('broken') or entry.get('skipped')}", flush=True)
        return
    bad = [
        (form, key, result)
        for form, results in entry.items()
        if isinstance(results, dict)
        for key, result in results.items()
        if result[0] in ("refused", "fails")
    ]
    print(f"{seconds:6.0f} s  {name}: {'works' if not bad else ''}", flush=True)
    for form, key, (status, text, *trace) in bad:
        print(f"          {form}, {key}, {status}: {text[:200]}", flush=True)
        if traces:
            print("\n".join(trace), flush=True)


def _verdict(content: dict[str, Any], before: dict[str, Any] | None) -> int:
    """1 where something fails that is no refusal, or no longer works."""
    worse = 0
    for name, entry in content["models"].items():
        if "broken" in entry:
            worse += 1
        for form in FORMS:
            for key, result in entry.get(form, {}).items():
                former = (((before or {}).get("models", {}).get(name, {})).get(form, {})).get(key, ["works"])
                if result[0] == "fails" or (result[0] == "refused" and former[0] == "works" and before):
                    worse += 1
                    print(f"{name}, {form}, {key}: {result}")
    print(f"{worse} failures, or refusals of what worked before")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
