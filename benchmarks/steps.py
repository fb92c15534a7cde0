"""Whole training steps of full fine-tuning, LoRA and both forms of WASI in every memory mode, in fp32 and in bf16.

"residual" is `WasiConfig()`: the weight in 8 bits with factors beside it; "wasi" are factors in its place. The rows
in bf16 train the same models under autocast, as the Trainer does with `bf16=True`. Peaks are tracked, so they are
deterministic: two complete steps from a fresh copy, everything counted. Times are interleaved rounds, all rows in each
of them; ratios are taken round by round. Neither depends on the quality of the factors, which come from plain
decompositions. The workloads are in workloads.py. Results: docs/benchmarks/steps.json. Run it on an idle machine::

    python benchmarks/steps.py                                  # DINOv2-small and SmolLM2
    python benchmarks/steps.py --workloads dinov2 --rounds 0    # peaks only
    python benchmarks/steps.py --workloads dinov2_56px --dtype float32 --variants full lora "residual exact" \\
        "wasi exact" "wasi low_rank exact" "wasi core exact" "wasi factor exact" "wasi subspace exact"
"""

import argparse
import functools
import itertools
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS_FOLDER, adamw, inference, interleaved_seconds, median_ratio, step_peak_bytes, training_step
from runs import DTYPES
from wasi_peft.tuner.config import MEMORY_MODES
from workloads import CHECKPOINTED, MIB, WORKLOADS, build, measure_workloads

RESULTS = RESULTS_FOLDER / "steps.json"
VARIANTS = (
    *("full", "lora", CHECKPOINTED),
    *(f"residual {mode}" for mode in MEMORY_MODES),
    "residual dense exact",
    *(f"wasi {mode}" for mode in MEMORY_MODES),
)
BASELINES = tuple(f"{name}{suffix}" for name in ("full", "lora", CHECKPOINTED) for suffix in ("", ", bf16"))


def measure(name: str, variants: list[str], dtypes: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Peaks, and with rounds also times, of one workload by row; a row in bf16 is named so."""
    workload = WORKLOADS[name]
    batch = workload.batch()
    models = {variant: build(variant, workload) for variant in variants}
    optimizers = {variant: adamw(model) for variant, model in models.items()}
    results: dict[str, dict[str, Any]] = {}
    steps = {}
    for (variant, model), dtype in itertools.product(models.items(), dtypes):
        bf16 = dtype == "bfloat16"
        row = f"{variant}, bf16" if bf16 else variant
        inference(model, batch, bf16)  # how products are computed is chosen in the first one of a process, by timing
        results[row] = entry = {
            "peak_bytes": step_peak_bytes(model, adamw, batch, bf16),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        if variant.startswith(("residual", "wasi")):
            entry["kept_share"] = model.wasi_summary().kept_share
        print(f"{name} {row}: {entry['peak_bytes'] / MIB:.0f} MiB", flush=True)
        steps[row] = functools.partial(training_step, model, optimizers[variant], batch, bf16)
    if rounds:
        seconds = interleaved_seconds(steps, rounds, warmup=1, description=f"{name}: steps")
        for row, values in seconds.items():
            against = {base: median_ratio(seconds, row, base) for base in BASELINES if base in seconds}
            results[row] |= {"step_seconds": values, "step_speedup": against}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one workload as a Markdown table: a row's peak as a share of the baselines', its speed as multiples."""
    weighed = [base for base in ("full", "lora", CHECKPOINTED) if base in results]
    timed = [base for base in BASELINES if base in results and not base.startswith(CHECKPOINTED)]
    titles = ["", "peak MiB", *(f"of {base}" for base in weighed), "step s", *(f"than {base}" for base in timed)]
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * ' --- |'}"]
    for row, entry in results.items():
        cells = [row, f"{entry['peak_bytes'] / MIB:.0f}"]
        cells += [f"{entry['peak_bytes'] / results[base]['peak_bytes']:.2f}" for base in weighed]
        cells.append(f"{statistics.median(entry['step_seconds']):.3f}" if "step_seconds" in entry else "")
        speedups = entry.get("step_speedup", {})
        cells += [f"{speedups[base]:.2f}x" if base in speedups else "" for base in timed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON; workloads measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["dinov2", "smollm2"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="see build() in workloads.py")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16: autocast")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; 0: peaks only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    return measure_workloads(args, lambda name: measure(name, args.variants, args.dtype, args.rounds), table)


if __name__ == "__main__":
    main()
