"""What the demo and the benchmarks share: the machine's description, result files, fair timing, whole-step memory."""

import contextlib
import copy
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

import wasi_peft
from wasi_peft.memory.heap import with_lean_heap
from wasi_peft.tuner.targets import default_target_names

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS_FOLDER = REPOSITORY / "docs" / "benchmarks"
Batch = Mapping[str, torch.Tensor]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def cache_dir() -> Path:
    """Returns the folder for what is made once and used again: ``$WASI_CACHE``, or ``.cache`` in the repository."""
    return Path(os.environ.get("WASI_CACHE") or REPOSITORY / ".cache")


def environment() -> dict[str, Any]:
    """Describes software and hardware, without anything that names the machine."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate", "wasi_peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "commit": commit_of(REPOSITORY),
        "processor": _processor_name(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit_of(checkout: Path) -> str | None:
    """Returns the commit of a checkout, marked if files differ from it; None outside git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor()


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one move, so that a reader or a crash never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
        os.chmod(scratch, 0o644)  # mkstemp makes it private
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or an empty dict if there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def measured_in_a_process(command: list[str], lean_heap: bool = False) -> dict[str, Any]:
    """Returns the JSON object that a command prints last; with ``lean_heap`` in the heap of `wasi-peft run`."""
    surroundings = with_lean_heap(os.environ) if lean_heap else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=surroundings)
    return json.loads(done.stdout.splitlines()[-1])


def add_entry(path: Path, key: str, entry: Any, lock: Path) -> None:
    """Adds one entry to a JSON file of entries; processes that share ``lock`` do not lose each other's."""
    from filelock import FileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        write_json(path, dict(sorted({**read_json(path), key: entry}.items())))


def vit_b32(**changes: Any) -> nn.Module:
    """ViT-B/32 from its configuration, or from a changed one, with seeded random weights."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{"patch_size": 32, "num_labels": 10, **changes}))


def with_lora(
    model: nn.Module, modules_to_save: list[str] | None = None, checkpointing: bool = False, rank: int = 16
) -> nn.Module:
    """Returns the model with LoRA, of an alpha of twice its rank, on the layers that WASI takes by default."""
    targets = list(default_target_names(model, wasi_peft.WasiConfig(residual=None)))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=modules_to_save)
    model = peft.get_peft_model(model, config)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over everything that trains, fused as transformers' Trainer makes it and `estimate_wasi` takes it.

    At its learning rate the factors stay nearly orthonormal, as they do in any sensible training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def autocast(batch: Batch, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16 on the device of a batch, or none."""
    return torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=enabled)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, bf16: bool = False) -> float:
    """Runs one complete step: forward and loss (under autocast if asked), backward, optimizer, gradients released.

    Returns:
        The loss.
    """
    model.train()
    with autocast(batch, bf16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.inference_mode()
def inference(model: nn.Module, batch: Batch, bf16: bool = False) -> None:
    """Runs one forward pass without labels and without anything kept for a backward pass.

    Under autocast if asked, or where the caller is.
    """
    model.eval()
    with autocast(batch, True) if bf16 else contextlib.nullcontext():
        model(**{name: value for name, value in batch.items() if name != "labels"})


def interleaved_seconds(
    tasks: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, description: str = "Timing"
) -> dict[str, list[float]]:
    """Times tasks in rounds, every task once a round, so that a slow moment of the machine meets all of them.

    Args:
        tasks: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before, which do not count.
        description: Text of the progress bar.

    Returns:
        Seconds of each counted run, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for index in tqdm(range(warmup + rounds), desc=description):
        for name in names[index % len(names) :] + names[: index % len(names)]:  # nobody is always first
            start = time.perf_counter()
            tasks[name]()
            elapsed = time.perf_counter() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, baseline: str) -> float:
    """Returns how many times faster ``name`` is than ``baseline``: the median over rounds of the ratio in a round."""
    return statistics.median(base / own for base, own in zip(seconds[baseline], seconds[name], strict=True))


def step_peak_bytes(model: nn.Module, make_optimizer: OptimizerFactory, batch: Batch, bf16: bool = False) -> int:
    """Returns the tracked peak memory of training: everything that exists during complete steps.

    A copy of the model is made, its optimizer is built, and two complete steps are run, all inside the measurement: so
    parameters, buffers, any other state of the layers, gradients, optimizer state, activations and temporary tensors
    all count. The first step makes the optimizer's state, the second one meets it. Not counted: the batch itself,
    libraries, the interpreter, and what the allocator keeps beyond what tensors asked for.
    """
    from wasi_peft.cost.peak import measure_peak_memory

    def train_a_copy() -> None:
        twin = copy.deepcopy(model)
        optimizer = make_optimizer(twin)
        for _ in range(2):
            training_step(twin, optimizer, batch, bf16)

    return measure_peak_memory(train_a_copy).peak_bytes


def inference_peak_bytes(model: nn.Module, batch: Batch) -> int:
    """Returns the tracked peak memory of inference: the model and one forward pass, counted as for training."""
    from wasi_peft.cost.peak import measure_peak_memory

    return measure_peak_memory(lambda: inference(copy.deepcopy(model), batch)).peak_bytes


def process_peak_bytes() -> int:
    """Returns the largest resident set that this process has had.

    Linux's own figure is preferred to `getrusage`, which begins with that of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
