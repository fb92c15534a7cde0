"""Calibration: what the layers' inputs look like, and initial factors that respect it.

A few unlabelled batches run through the dense model; forward hooks accumulate the second moment and the mean of each
layer's input. Layers that read the same tensor share one accumulator. Where all accumulators together would exceed a
memory bound, the batches run again for the layers left over.
"""

from __future__ import annotations

import copy
import json
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import WasiConfig
from .layer import InitialFactors, WasiLayer, dense_bias, dense_weight
from .model import INITIAL_FACTORS, PreparedFactors, factors_for
from .targets import asked_rank, check_targets, resolve_targets, selected_modules

RunModel = Callable[[], Any]
CalibrationData = Iterable[Any] | RunModel

_LABEL_KEYS = ("labels", "label", "label_ids")
_FORMAT = 1


@dataclass
class InputStatistics:
    """Sums over the rows of one input, shared by the modules that read it.

    **Shape**
        - second_moment: (in, in), float32, sum of `x x^T`
        - total: (in,), float32, sum of `x`
    """

    second_moment: Tensor
    total: Tensor
    rows: int = 0
    modules: list[str] = field(default_factory=list)

    def update(self, x: Tensor) -> None:
        """Add the rows of a batch, shape (..., in)."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.second_moment)
        self.second_moment.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.rows += rows.shape[0]

    def moments(self) -> tuple[Tensor, Tensor]:
        """`E[x x^T]` (in, in) and `E[x]` (in,), float64."""
        return self.second_moment.double() / self.rows, self.total.double() / self.rows


def calibrated_factors(
    weight: Tensor, bias: Tensor | None, statistics: InputStatistics, asked: int | float
) -> InitialFactors:
    """Initial factors of one layer from the statistics of its input.

    With a bias, the mean of the input is taken out first: `L R` approximates `W` on `x - E[x]`, and the bias becomes
    `b + (W - L R) E[x]`, which is the best possible bias. Without one the second moment itself weighs the error, so
    that the layer's structure stays what the architecture says.

    **Shape**
        - weight: (out, in); bias: (out,) or None
    """
    second_moment, mean = statistics.moments()
    if bias is not None:
        second_moment = second_moment - torch.outer(mean, mean)
    factors = factors_for(asked, weight, second_moment.to(weight.device))
    if bias is None:
        return InitialFactors(factors.L, factors.R, None)
    mean = mean.to(weight.device)
    missing = weight.double() @ mean - factors.L.double() @ (factors.R.double() @ mean)
    return InitialFactors(factors.L, factors.R, (bias.detach().double() + missing).to(bias.dtype))


def preprocess_wasi(
    model: nn.Module,
    config: WasiConfig,
    data: CalibrationData | None = None,
    *,
    statistics_dir: str | os.PathLike[str] | None = None,
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    progress_bar: bool = True,
) -> None:
    """Prepare data-aware initial factors; the next `get_peft_model(model, config)` uses them.

    Args:
        model: The dense model. Its weights are not changed; the prepared factors are attached to the target modules
            and consumed by the injection.
        config: The configuration that will be injected: it decides targets and ranks.
        data: Calibration batches without labels (a few hundred samples do): a DataLoader or list of dicts, tensors, or
            tuples whose first element is the input; or a function without arguments that runs the model on them. It
            may be iterated more than once. None reads the statistics from `statistics_dir` instead.
        statistics_dir: Folder to save the statistics in (with `data`), or to load them from (without), so that other
            ranks need no new calibration.
        max_batches: Stop after that many batches.
        max_memory_bytes: Bound on the memory for statistics at any time, bytes; one layer is always collected.
        progress_bar: Show progress bars.

    Raises:
        ValueError: If the data are empty, not finite, can be iterated only once, or do not reach a target; if the
            saved statistics belong to another model; and whatever :func:`targets.check_targets` finds. Nothing is
            attached then.

    References:
        SVD-LLM (arXiv 2403.07378) for the weighting by the input's second moment.
    """
    resolved = copy.copy(config)
    resolve_targets(model, resolved)
    check_targets(model, resolved)
    targets = dict(selected_modules(model, resolved))
    adapted = [name for name, module in targets.items() if isinstance(module, WasiLayer)]
    if adapted:
        raise ValueError(f"{adapted[0]}: already a WASI layer; preprocess_wasi needs the dense model.")
    if data is None:
        if statistics_dir is None:
            raise ValueError("preprocess_wasi needs data, or a statistics_dir to load from; got neither.")
        collected = _load_statistics(targets, statistics_dir)
    else:
        collected = _collect(model, targets, data, max_batches, max_memory_bytes, progress_bar)
        if statistics_dir is not None:
            collected = _saving(collected, targets, statistics_dir)

    prepared: dict[str, PreparedFactors] = {}
    with tqdm(total=len(targets), desc="WASI initial factors", disable=not progress_bar) as bar:
        for statistics in collected:
            for name in statistics.modules:
                module, asked = targets[name], asked_rank(name, resolved)
                initial = calibrated_factors(dense_weight(module), dense_bias(module), statistics, asked)
                prepared[name] = PreparedFactors(initial, asked)
                bar.update()
    for name, factors in prepared.items():
        targets[name].__dict__[INITIAL_FACTORS] = factors


# -------------------------------------------------------------------- collecting


class _Collector:
    """Forward hooks of one pass over the data; decides at a module's first call whether its input fits the bound."""

    def __init__(self, pending: dict[str, nn.Module], max_memory_bytes: int) -> None:
        self.pending = pending
        self.max_memory_bytes = max_memory_bytes
        self.collected: list[InputStatistics] = []
        self.leaders: dict[str, InputStatistics] = {}  # module that feeds an accumulator
        self.seen: set[str] = set()
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._last_version = 0
        self._last_statistics: InputStatistics | None = None

    @property
    def bytes_held(self) -> int:
        return sum(4 * (s.second_moment.numel() + s.total.numel()) for s in self.collected)

    def see(self, name: str, x: Tensor) -> None:
        """One call of a module with its input."""
        if name in self.leaders:
            self.leaders[name].update(x)
        elif name not in self.seen:
            self.seen.add(name)
            if self._last_input() is x and self._last_version == x._version:
                if self._last_statistics is not None:
                    self._last_statistics.modules.append(name)
                return
            self._last_input, self._last_version = weakref.ref(x), x._version
            self._last_statistics = self._start(name, x)

    def _start(self, name: str, x: Tensor) -> InputStatistics | None:
        size = x.shape[-1]
        if self.collected and self.bytes_held + 4 * size * (size + 1) > self.max_memory_bytes:
            return None  # left for the next pass
        second_moment = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        statistics = InputStatistics(second_moment, torch.zeros_like(second_moment[0]), modules=[name])
        statistics.update(x)
        self.collected.append(statistics)
        self.leaders[name] = statistics
        return statistics

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for name, module in self.pending.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.see(name, args[0] if args else next(iter(kwargs.values())))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _collect(
    model: nn.Module,
    targets: dict[str, nn.Module],
    data: CalibrationData,
    max_batches: int | None,
    max_memory_bytes: int,
    progress_bar: bool,
) -> Iterator[InputStatistics]:
    """Statistics of every distinct input, in as many passes over the data as the memory bound needs."""
    if isinstance(data, Iterator):
        raise ValueError("calibration data must allow several iterations (a DataLoader, a list), got an iterator.")
    pending = dict(targets)
    while pending:
        collector = _Collector(pending, max_memory_bytes)
        description = f"WASI calibration ({len(pending)} layers)"
        with collector.attached(), _evaluating(model):
            _run(model, data, max_batches, description if progress_bar else None)
        empty = {name for statistics in collector.collected if not statistics.rows for name in statistics.modules}
        missed = [name for name in pending if name not in collector.seen or name in empty]
        if missed:
            raise ValueError(f"{missed[0]}: the calibration data never reached this layer ({len(missed)} in all).")
        for statistics in collector.collected:
            if not bool(torch.isfinite(statistics.second_moment).all()):
                raise ValueError(f"{statistics.modules[0]}: its input holds NaN or Inf on the calibration data.")
        for statistics in collector.collected:
            pending = {name: module for name, module in pending.items() if name not in statistics.modules}
        while collector.collected:
            collector.leaders.clear()
            collector._last_statistics = None
            yield collector.collected.pop(0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _run(model: nn.Module, data: CalibrationData, max_batches: int | None, description: str | None) -> None:
    if callable(data):
        data()
        return
    total = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    device = next(model.parameters()).device
    count = 0
    for batch in tqdm(data, total=total, desc=description, disable=description is None):
        if count == max_batches:
            break
        _forward(model, batch, device)
        count += 1
    if count == 0:
        raise ValueError("calibration data must hold at least one batch, got none.")


def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in _LABEL_KEYS
        }
        if not inputs:
            raise ValueError(f"calibration batches must hold model inputs, got only {sorted(batch)}.")
        model(**inputs)
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(first, Tensor):
            raise ValueError(f"calibration batches must be dicts, tensors or tuples of tensors, got {type(first)}.")
        model(first.to(device))


# -------------------------------------------------------------------- saving and loading


def _checksum(module: nn.Module) -> int:
    """CRC-32 of a weight's bytes: tells whether statistics belong to this very model."""
    weight = dense_weight(module).cpu().contiguous()
    return zlib.crc32(weight.view(torch.uint8).numpy().tobytes())


def _saving(
    collected: Iterator[InputStatistics], targets: dict[str, nn.Module], directory: str | os.PathLike[str]
) -> Iterator[InputStatistics]:
    """Pass statistics through and write each to a file; the index, written last, makes the folder valid."""
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    entries: list[dict[str, Any]] = []
    run = os.urandom(4).hex()  # new file names each time: an interrupted run leaves the previous folder valid
    for statistics in collected:
        file_name = f"{run}-{len(entries):05d}.safetensors"
        tensors = {"second_moment": statistics.second_moment.cpu(), "total": statistics.total.cpu()}
        save_file(tensors, os.path.join(directory, file_name))
        entries.append({"file": file_name, "rows": statistics.rows, "modules": statistics.modules})
        yield statistics
    index = {"format": _FORMAT, "inputs": entries, "weights": {name: _checksum(m) for name, m in targets.items()}}
    temporary = os.path.join(directory, f"index.json.{run}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(index, file)
    os.replace(temporary, os.path.join(directory, "index.json"))
    current = {entry["file"] for entry in entries}
    for name in os.listdir(directory):
        if (name.endswith(".safetensors") and name not in current) or name.startswith("index.json."):
            os.remove(os.path.join(directory, name))


def _load_statistics(targets: dict[str, nn.Module], directory: str | os.PathLike[str]) -> Iterator[InputStatistics]:
    path = os.path.join(os.fspath(directory), "index.json")
    if not os.path.isfile(path):
        raise ValueError(f"statistics_dir must hold saved calibration statistics, got {os.fspath(directory)!r}.")
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    if index.get("format") != _FORMAT:
        raise ValueError(f"the statistics must have format {_FORMAT}, got {index.get('format')!r}.")
    for name, module in targets.items():
        if index["weights"].get(name) != _checksum(module):
            raise ValueError(f"{name}: the saved statistics belong to another model (or do not cover this layer).")
    return _read_statistics(targets, os.fspath(directory), index["inputs"])


def _read_statistics(
    targets: dict[str, nn.Module], directory: str, entries: list[dict[str, Any]]
) -> Iterator[InputStatistics]:
    for entry in entries:
        modules = [name for name in entry["modules"] if name in targets]
        if modules:
            with safe_open(os.path.join(directory, entry["file"]), framework="pt") as file:
                tensors = file.get_tensor("second_moment"), file.get_tensor("total")
            yield InputStatistics(*tensors, rows=entry["rows"], modules=modules)
