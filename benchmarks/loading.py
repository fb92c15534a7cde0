"""What compressed checkpoints take to load, against the dense one: bytes on disk, seconds, memory, the same answers.

DINOv2-small and SmolLM2-135M in float32, as they are, in 8 and in 4 bits, and as factors of 0.40 of the weights (from
plain decompositions: loading is measured, not quality). Each load is a process of its own, which has imported
everything before: it reads the model by `from_pretrained`, then answers one batch. All are loaded in each round,
in alternating order. Measured are seconds, and the peak of the process (resident set) above what it held before,
after loading and after the answer: what is mapped from a file counts once it is touched. The answer is compared with
that of the model that was saved, with products that do not round their input.

Results: docs/benchmarks/loading.json. ::

    python benchmarks/loading.py --threads 1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor

import wasi_peft
from common import RESULTS_FOLDER, environment, process_peak_bytes, read_json, write_json
from texts import smollm2_folder
from vit import load_vit
from wasi_peft.hub.plain import multiply_exactly

RESULTS = RESULTS_FOLDER / "loading.json"
MIB = 2**20
FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "8 bits": {},
    "4 bits": {"residual": "int4"},
    "factors, 0.40": {"weight_share": 0.4},
}
CLASSES = {
    "DINOv2-small": transformers.AutoModelForImageClassification,
    "SmolLM2-135M": transformers.AutoModelForCausalLM,
}


def dense_model(name: str) -> Any:
    """The dense model in float32."""
    if name == "DINOv2-small":
        return load_vit()
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


def batch(name: str) -> dict[str, Tensor]:
    """Two images of noise, or two texts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    if name == "DINOv2-small":
        return {"pixel_values": torch.randn(2, 3, 98, 98, generator=generator)}
    return {"input_ids": torch.randint(1000, (2, 64), generator=generator)}


@torch.inference_mode()
def answer(model: Any, name: str) -> Tensor:
    """What a model says of the batch."""
    multiply_exactly(model)
    logits: Tensor = model(**batch(name)).logits
    return logits


def write(name: str, form: str, folder: Path) -> None:
    """Saves a model in one form, and its answer beside it."""
    model, options = dense_model(name), FORMS[form]
    if options is not None:
        model = wasi_peft.compress(model, wasi_peft.WasiConfig(**options)).eval()
    model.save_pretrained(folder)
    torch.save(answer(model, name), folder.with_suffix(".pt"))


def load(name: str, folder: Path) -> dict[str, float]:
    """What one process measures."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    idle, start = psutil.Process().memory_info().rss, time.perf_counter()
    model = CLASSES[name].from_pretrained(folder, dtype=torch.float32).eval()
    seconds, peak = time.perf_counter() - start, process_peak_bytes()
    logits, expected = answer(model, name), torch.load(folder.with_suffix(".pt"))
    return {
        "seconds": seconds,
        "peak_mib": (peak - idle) / MIB,
        "peak_with_answer_mib": (process_peak_bytes() - idle) / MIB,
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
    }


def child(action: str, name: str, form: str, folder: Path, threads: int) -> str:
    """The output of a process of its own."""
    command = [sys.executable, __file__, "--child", action, "--model", name, "--form", form, "--folder", str(folder)]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings).stdout


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Formats one model as a Markdown table."""
    lines = [
        "| stored as | MiB on disk | seconds to load | peak of loading, MiB | with the first answer | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for form, entry in entries.items():
        medians = {key: statistics.median(values) for key, values in entry["loads"].items()}
        lines.append(
            f"| {form} | {entry['bytes'] / MIB:.1f} | {medians['seconds']:.2f} | {medians['peak_mib']:.0f} | "
            f"{medians['peak_with_answer_mib']:.0f} | {max(entry['loads']['difference']):.1g} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=["write", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child == "write":
        write(args.model, args.form, args.folder)
        return {}
    if args.child == "load":
        print(json.dumps(load(args.model, args.folder)))
        return {}
    content = read_json(args.results)
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            folders = {form: Path(scratch) / str(index) for index, form in enumerate(FORMS)}
            for form, folder in folders.items():
                child("write", name, form, folder, args.threads)
            loads: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
            forms = list(FORMS)
            for index in range(args.rounds):
                for form in forms[index % len(forms) :] + forms[: index % len(forms)]:
                    text = child("load", name, form, folders[form], args.threads)
                    loads[form].append(json.loads(text.splitlines()[-1]))
            entries = {
                form: {
                    "bytes": sum(path.stat().st_size for path in folders[form].glob("*.safetensors")),
                    "loads": {key: [each[key] for each in loads[form]] for key in loads[form][0]},
                }
                for form in forms
            }
        print(f"\n{name}\n\n{table(entries)}\n", flush=True)
        content[name] = {"threads": args.threads, "forms": entries, "environment": environment()}
        write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
