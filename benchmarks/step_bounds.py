"""What bounds a training step: time by kind of operation, bytes at the peak, for the workloads of workloads.py.

Matrix products are the part of a step that only other ranks, or a faster library, could shorten; what is kept between
forward and backward, with the parameters and their state, is the part of the peak that only fewer bits or
recomputation could lower. Rows in bf16 train the same models under autocast. Times are those of a few traced steps on
an idle machine, bytes are deterministic. Results: docs/benchmarks/step_bounds.json::

    python benchmarks/step_bounds.py
    python benchmarks/step_bounds.py --workloads smollm2 --variants lora "residual exact" --dtype float32 bfloat16
"""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

import wasi_peft
from common import RESULTS_FOLDER, adamw
from runs import DTYPES
from wasi_peft.tuner.config import MEMORY_MODES
from workloads import MIB, WORKLOADS, build, measure_workloads

RESULTS = RESULTS_FOLDER / "step_bounds.json"
VARIANTS = ("full", "lora", *(f"{form} {mode}" for form in ("residual", "wasi") for mode in MEMORY_MODES))
KINDS = ("matrix products", "attention", "quantization", "elementwise")  # that have a column of their own
FIELDS = ("peak_bytes", "at_peak", "saved_bytes", "saved_by_operation", "seconds_by_kind", "inference_seconds_by_kind")


def measure(name: str, variants: list[str], dtypes: list[str], rounds: int) -> dict[str, Any]:
    """Profiles every variant of a workload in every dtype, one after the other."""
    workload = WORKLOADS[name]
    batch = workload.batch()
    results = {}
    for variant, dtype in itertools.product(variants, dtypes):
        row = f"{variant}, bf16" if dtype == "bfloat16" else variant
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            profile = wasi_peft.profile_wasi(build(variant, workload), batch=batch, optimizer=adamw, rounds=rounds)
        content = dataclasses.asdict(profile)
        results[row] = {field: content[field] for field in FIELDS}
        print(f"{name} {row}: {profile.step_seconds:.2f} s", flush=True)
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one workload as a Markdown table.

    Lasting are parameters, their state and the optimizer's. The last column is how much faster than the first row of
    its precision a step could be at most, if its products alone took time.
    """
    lines = [
        f"| variant | lasting MiB | kept for backward MiB | else MiB | {' | '.join(f'{kind} s' for kind in KINDS)} "
        "| else s | all s | bound |",
        f"|{(7 + len(KINDS)) * ' --- |'}",
    ]
    baselines: dict[bool, float] = {}
    for row, entry in results.items():
        at_peak, seconds = entry["at_peak"], entry["seconds_by_kind"]
        lasting = sum(at_peak.get(kind, 0) for kind in ("weights", "state", "optimizer"))
        kept = at_peak.get("saved", 0)
        cells = [f"{size / MIB:.0f}" for size in (lasting, kept, entry["peak_bytes"] - lasting - kept)]
        total, named = sum(seconds.values()), [seconds[kind] for kind in KINDS]
        cells += [f"{value:.2f}" for value in (*named, total - sum(named), total)]
        baseline = baselines.setdefault(row.endswith(", bf16"), total)
        cells.append(f"{baseline / seconds['matrix products']:.2f}x")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints tables and writes the JSON; workloads measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="see workloads.py")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--rounds", type=int, default=5, help="timed and traced steps")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    measure_workloads(args, lambda name: measure(name, args.variants, args.dtype, args.rounds), table)


if __name__ == "__main__":
    main()
