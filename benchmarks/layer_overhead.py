"""Compares two checkouts of the package: a tiny layer's forward pass, a training step and inference, default update.

Fresh processes alternate between this checkout and another one, and ratios are taken pair by pair: what a change of
the code costs, however the machine drifts meanwhile. The layer is 32 x 32 and gets one row, so its time is mostly that
of the layer's own Python. Results: docs/benchmarks/layer_overhead.json. Run it on an idle machine::

    git worktree add ../before COMMIT
    python benchmarks/layer_overhead.py --against ../before
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common import REPOSITORY, RESULTS_FOLDER, commit_of, environment, write_json

RESULTS = RESULTS_FOLDER / "layer_overhead.json"
PROBE = Path(__file__).resolve().parent / "overhead_probe.py"


def probe(checkout: Path, repeats: int, threads: int) -> dict[str, float]:
    """Returns the times of one process that imports the package from a checkout."""
    settings = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(PROBE), "--repeats", str(repeats), "--threads", str(threads)]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def ratios(ours: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns median, least and greatest of ours over theirs, pair by pair; below 1 this checkout is faster."""
    results = {}
    for name in ours[0]:
        pairs = [own[name] / other[name] for own, other in zip(ours, others, strict=True)]
        results[name] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    return results


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table and writes the JSON.

    Raises:
        ValueError: If the other folder is no checkout: its processes would take the installed package.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of processes")
    parser.add_argument("--repeats", type=int, default=20, help="in each process, of which the best counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    checkouts = {"this": REPOSITORY, "other": args.against.resolve()}
    if not (checkouts["other"] / "wasi_peft" / "__init__.py").is_file():
        raise ValueError(f"--against must be a folder that holds wasi_peft, got {args.against}")
    times: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for index in tqdm(range(args.rounds), desc="Pairs of processes"):
        for name in sorted(checkouts, reverse=index % 2 == 0):  # neither is always first
            times[name].append(probe(checkouts[name], args.repeats, args.threads))
    content = {
        "settings": {"rounds": args.rounds, "repeats": args.repeats, "threads": args.threads},
        "commits": {name: commit_of(checkout) for name, checkout in checkouts.items()},
        "this_over_other": ratios(times["this"], times["other"]),
        "times": times,
        "environment": environment(),
    }
    print(f"{'this / other':28}{'median':>9}{'min':>9}{'max':>9}{'this':>12}{'other':>12}")
    for name, ratio in content["this_over_other"].items():
        medians = (statistics.median(entry[name] for entry in times[checkout]) for checkout in ("this", "other"))
        print(f"{name:28}" + "".join(f"{value:9.3f}" for value in ratio.values()), end="")
        print("".join(f"{value:12.4g}" for value in medians))
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
