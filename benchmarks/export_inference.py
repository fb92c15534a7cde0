"""Exported models in onnxruntime: factors with 0.40 of the weights against the dense model, in fp32 and in 8 bits.

DINOv2-small, one image and 32. All four models run in each round, in alternating order, and ratios are taken round by
round. What is fast in PyTorch need not be elsewhere: here the graph is fused, and products in 8 bits are onnxruntime's
(weights rounded once, inputs as they come). Answers of factors come from plain decompositions: speed is measured, not
quality. "difference" is that of what was written from the model in PyTorch. Results:
docs/benchmarks/export_inference.json. Run it on an idle machine::

    python benchmarks/export_inference.py --threads 1
"""

import argparse
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import wasi_peft
from common import RESULTS_FOLDER, environment, interleaved_seconds, median_ratio, read_json, write_json
from workloads import WORKLOADS, build

RESULTS = RESULTS_FOLDER / "export_inference.json"
WORKLOAD = "dinov2"
MODELS = {"dense": "full", "factors": "wasi exact"}
PRECISIONS = {"fp32": {}, "int8": {"int8": True}}
BASELINE = "dense, fp32"


def written(folder: Path, image_size: int) -> dict[str, dict[str, Any]]:
    """Exports every model in every precision; returns by variant its file, bytes and difference from PyTorch."""
    entries = {}
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    for name, variant in MODELS.items():
        model = build(variant, WORKLOADS[WORKLOAD]).eval()
        for precision, options in PRECISIONS.items():
            place = folder / f"{name}-{precision}"
            batch = {"pixel_values": images}
            difference = wasi_peft.export(model, place, "onnx", batch=batch, **options)
            size = sum(path.stat().st_size for path in place.glob("model.onnx*"))
            entries[f"{name}, {precision}"] = {"file": place / "model.onnx", "bytes": size, "difference": difference}
    return entries


def session(path: Path, threads: int) -> Any:
    """An onnxruntime session on so many threads of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(
    models: dict[str, dict[str, Any]], images: int, image_size: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Seconds of all models on so many images, by variant."""
    pixels = torch.randn(images, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)).numpy()
    tasks = {
        name: functools.partial(session(entry["file"], threads).run, None, {"pixel_values": pixels})
        for name, entry in models.items()
    }
    seconds = interleaved_seconds(tasks, rounds, description=f"{images} images")
    return {
        name: {
            "bytes": entry["bytes"],
            "difference": entry["difference"],
            "seconds": seconds[name],
            "faster_than_dense": median_ratio(seconds, name, BASELINE),
            "faster_than_dense_of_its_precision": median_ratio(seconds, name, f"dense, {name.split(', ')[1]}"),
        }
        for name, entry in models.items()
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one case as a Markdown table."""
    lines = [
        "| model | MiB | milliseconds | faster than dense in fp32 | than dense of its precision |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, entry in results.items():
        milliseconds, size = 1000 * statistics.median(entry["seconds"]), entry["bytes"] / 2**20
        ratios = f"{entry['faster_than_dense']:.2f}x | {entry['faster_than_dense_of_its_precision']:.2f}x"
        lines.append(f"| {name} | {size:.1f} | {milliseconds:.1f} | {ratios} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON; cases measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, nargs="+", default=[98, 224])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    content = read_json(args.results)
    for size in args.image_size:
        with tempfile.TemporaryDirectory() as folder:
            models = written(Path(folder), size)
            for images in args.images:
                case = f"{images} x {size} px, {args.threads} threads"
                results = measure(models, images, size, args.rounds, args.threads)
                print(f"\n{case}\n\n{table(results)}\n", flush=True)
                content[case] = {"rounds": args.rounds, "results": results, "environment": environment()}
                write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
