"""The whole job within 600 MiB: prepare, fine-tune, save, reload in a fresh process, predict; beside full and LoRA.

Two processes a method. The first one, in the compressed case, writes a compressed checkpoint of the dense one block by
block (`prepare_checkpoint`, 8 bits), loads it, fine-tunes it for 20 steps with `WasiConfig(memory_mode="small")` and
saves the adapter; the second one loads both and predicts. Full fine-tuning and LoRA r=16 (with gradient checkpointing)
load the dense checkpoint instead. Two models: DINOv2-small, images of 56 px in batches of 32, and SmolLM2-135M in
bfloat16, as it is published, 8 mails of 128 tokens.

With `--limit`, the address space of a process (RLIMIT_AS) may grow by that much above what its imports have taken:
files that are mapped count. A method that needs more fails, which is noted. Peaks are of the resident set, stage by
stage, above that after the imports. Each job is an entry of docs/benchmarks/small_machine.json::

    python benchmarks/small_machine.py --limit 600
    python benchmarks/small_machine.py --methods full lora
    python benchmarks/small_machine.py --summarise
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, Dinov2ForImageClassification

import finetuning
import wasi_peft
from common import RESULTS_FOLDER, add_entry, cache_dir, environment, process_peak_bytes, read_json, with_lora
from finetune_perplexity import windows
from images import load_images
from runs import key_of
from texts import smollm2_folder
from vit import dinov2_folder

RESULTS = RESULTS_FOLDER / "small_machine.json"
MODELS = ("dinov2", "smollm2")
METHODS = ("compressed", "full", "lora")
RATES = {
    "dinov2": {"full": 2e-5, "lora": 5e-4, "compressed": 2e-4},
    "smollm2": {"full": 1e-4, "lora": 3e-3, "compressed": 3e-3},
}
MIB = 2**20
# one arena, since each further one takes 64 MiB of addresses; large blocks go back to the system when they are freed
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


# ---------------------------------------------------------------------------------------------------------------------
# What runs in a process
# ---------------------------------------------------------------------------------------------------------------------


class Stages:
    """Seconds, and peaks of the resident set above that of now, of what a process does one after the other."""

    def __init__(self) -> None:
        self.idle = _resident()
        self.measured: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what happens inside."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.measured[name] = {"seconds": seconds, "peak_mib": (process_peak_bytes() - self.idle) / MIB}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit_memory(mib: int) -> None:
    """Lets the address space grow by this much above what it is now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + mib * MIB, size + mib * MIB))


def dense_folder(model: str) -> Path:
    """Returns the dense checkpoint, as it is published: SmolLM2 in bfloat16."""
    if model == "dinov2":
        return dinov2_folder()
    folder = cache_dir() / "smollm2-135m-bfloat16"
    if not folder.is_dir():
        published = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        published.save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    return folder


def load(model: str, folder: Path) -> torch.nn.Module:
    """Loads a checkpoint, dense or compressed, to be trained: in float32."""
    if model == "dinov2":
        torch.manual_seed(0)
        return Dinov2ForImageClassification.from_pretrained(folder, num_labels=10, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(job: dict[str, Any], model: torch.nn.Module) -> torch.nn.Module:
    """Returns what is trained."""
    head = [finetuning.HEAD] if job["model"] == "dinov2" else None
    if job["method"] == "full":
        return model
    if job["method"] == "lora":
        return with_lora(model, head, checkpointing=True)
    return peft.get_peft_model(model, wasi_peft.WasiConfig(memory_mode="small", modules_to_save=head))


def fine_tune(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The first process: from the dense checkpoint to the saved adapter (or model)."""
    vision, base = job["model"] == "dinov2", dense_folder(job["model"])
    if vision:
        items: Any = load_images(train=32 * job["steps"], test=1)[0]
    else:
        items = [{"input_ids": window, "labels": window} for window in windows(8 * job["steps"])[0]]
    stages = Stages()
    if job["limit_mib"]:
        limit_memory(job["limit_mib"])
    if job["method"] == "compressed":
        with stages.stage("prepare"):
            base = wasi_peft.prepare_checkpoint(base, folder / "compressed", progress_bar=False)
    with stages.stage("load"):
        model = adapted(job, load(job["model"], base))
    with stages.stage("train"):
        method = {"compressed": "residual"}.get(job["method"], job["method"])
        optimizer = finetuning.build_optimizer(method, model, RATES[job["model"]][job["method"]])
        amount = {"epochs": 1.0, "batch_size": 32} if vision else {"steps": job["steps"], "batch_size": 8}
        log = finetuning.train(model, optimizer, items, folder / "trainer", seed=0, **amount)
    with stages.stage("save"):
        model.save_pretrained(folder / "saved")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    sizes = {name: _bytes_of(folder / name) for name in ("compressed", "saved") if (folder / name).exists()}
    return {"stages": stages.measured, "losses": [losses[0], losses[-1]], "bytes_on_disk": sizes}


def predict(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The second process: what was saved, loaded again, answers one batch."""
    base = folder / "compressed" if job["method"] == "compressed" else dense_folder(job["model"])
    if job["model"] == "dinov2":
        images = load_images(train=1, test=32)[1]
        batch = {"pixel_values": torch.stack([item["pixel_values"] for item in images.__getitems__(range(32))])}
    else:
        batch = {"input_ids": windows(8)[2][:8], "logits_to_keep": 1}  # the next token
    stages = Stages()
    if job["limit_mib"]:
        limit_memory(job["limit_mib"])
    with stages.stage("reload"):
        if job["method"] == "full":
            model = load(job["model"], folder / "saved")
        else:
            model = peft.PeftModel.from_pretrained(load(job["model"], base), folder / "saved")
    with stages.stage("predict"), torch.inference_mode():
        answer = model.eval()(**batch).logits
    return {"stages": stages.measured, "finite": bool(answer.isfinite().all())}


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


PROCESSES: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {"fine-tune": fine_tune, "predict": predict}


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs both processes of a job; one that fails is noted with its last line."""
    entry: dict[str, Any] = {"settings": job, "stages": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in PROCESSES:
            content = json.dumps({**job, "process": name, "folder": scratch})
            command = [sys.executable, str(Path(__file__).resolve()), "--job", content]
            quiet = {**os.environ, **MALLOC}
            done = subprocess.run(command, capture_output=True, text=True, env=quiet)
            if done.returncode:
                entry["failed"] = {name: (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
                break
            measured = json.loads(done.stdout.splitlines()[-1])
            entry["stages"] |= measured.pop("stages")
            entry |= measured
    return {**entry, "environment": environment()}


def every_job(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the jobs that are asked for."""
    for model, method in itertools.product(args.models, args.methods):
        yield {
            "model": model,
            "method": method,
            "steps": args.steps,
            "limit_mib": args.limit,
            "threads": torch.get_num_threads(),
        }


def summary(entries: dict[str, Any], jobs: list[dict[str, Any]]) -> str:
    """Formats peaks and seconds of the stages."""
    names = ("prepare", "load", "train", "save", "reload", "predict")
    titles = ["model, method", "limit", *(f"{name}: peak MiB (s)" for name in names), "saved MiB", "outcome"]
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * ' --- |'}"]
    for job in jobs:
        found = entries.get(key_of(job))
        if found is None:
            continue
        cells = [f"{job['model']}, {job['method']}", str(job["limit_mib"] or "none")]
        for name in names:
            stage = found["stages"].get(name)
            cells.append("" if stage is None else f"{stage['peak_mib']:.0f} ({stage['seconds']:.1f})")
        sizes = found.get("bytes_on_disk", {})
        cells.append(" + ".join(f"{size / MIB:.1f}" for size in sizes.values()))
        failed = found.get("failed")
        cells.append("done" if failed is None else f"fails: {next(iter(failed))}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the jobs that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--steps", type=int, default=20)
    add("--limit", type=int, help="MiB that the address space may grow by; default: no limit")
    add("--results", type=Path, default=RESULTS)
    add("--summarise", action="store_true", help="run nothing, print the jobs asked for")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    if args.job:
        measured = PROCESSES[args.job.pop("process")](args.job, Path(args.job.pop("folder")))
        print(json.dumps(measured), flush=True)
        return
    jobs = list(every_job(args))
    for job in [] if args.summarise else jobs:
        key = key_of(job)
        if key in read_json(args.results):
            print(f"finished before: {key}", flush=True)
            continue
        dense_folder(job["model"])  # made outside of what is measured
        print(f"running: {key}", flush=True)
        add_entry(args.results, key, run_job(job), lock=cache_dir() / f"{args.results.name}.lock")
    print(summary(read_json(args.results), jobs))


if __name__ == "__main__":
    main()
