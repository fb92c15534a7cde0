"""Calibration: what a model does with its weights, measured on a few batches and kept in a folder.

Batches run through the dense model. Forward hooks add up the second moment and the mean of each layer's input; a
backward pass from the model's features (or its loss) gives the second moment of each output's gradient, and how well
the weight's gradient survives compressed inputs. Where all sums together would exceed a memory bound, the batches run
again for the layers left over. As soon as a layer's sums are complete they become its spectrum, which is written to
the folder; the sums are then dropped.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files.whole import whole_file
from ..forms.attention import with_projections
from ..forms.convolution import CONVOLUTIONS
from ..forms.dense import dense_bias, dense_weight
from ..linalg.spectra import WeightSpectrum, truncate
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from ..ranks.spectrum import LayerSpectrum
from ..tuner.config import WasiConfig
from ..tuner.layer import WasiLayer
from ..tuner.targets import check_targets, resolve_targets, selected_modules
from ..updates import DEFAULT_UPDATE, InitialFactors, Update, make_update
from .collecting import Gradients, log_unreached, passes, through_model
from .data import CalibrationData, check_repeatable, describe_data
from .expert_factors import StackSpectrum, measure_experts
from .folder import (
    check_file,
    free_file_name,
    open_index,
    read_index,
    read_tensor,
    weight_checksum,
    write_index,
)
from .statistics import InputStatistics

logger = logging.getLogger(__name__)


class Calibration:
    """Spectra of all target layers of one model, in a folder; made by :func:`calibrate_wasi`.

    The folder holds one safetensors file a layer and `index.json`, which is replaced after every input whose layers
    are done, so that an interrupted calibration goes on where it stopped.
    """

    def __init__(self, directory: str | os.PathLike[str], index: dict[str, Any]) -> None:
        self.directory = os.fspath(directory)
        self._index = index

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are done."""
        return tuple(self._index["layers"])

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one element of the weights."""
        return int(self._index["bytes_per_element"])

    @property
    def rows(self) -> int:
        """Rows (samples times tokens) that the first layer saw which the data reached."""
        return int(next(entry["rows"] for entry in self._index["layers"].values() if entry["rows"]))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Calibration:
        """Read a finished calibration.

        Raises:
            ValueError: If the folder holds none, a damaged one, one of another format, or one that was interrupted.
        """
        index = read_index(os.fspath(directory))
        if index is None:
            raise ValueError(f"directory must hold a saved calibration, got {os.fspath(directory)!r}.")
        if not index["complete"]:
            raise ValueError(f"{os.fspath(directory)!r}: this calibration was interrupted; run calibrate_wasi again.")
        for name, entry in index["layers"].items():
            try:
                check_file(os.fspath(directory), name, entry)
            except FileNotFoundError as error:
                raise ValueError(f"{error} Run calibrate_wasi again.") from error
        return cls(directory, index)

    def require(self, targets: Mapping[str, nn.Module]) -> None:
        """Check that this calibration was made for these very layers.

        Raises:
            ValueError: If a layer is missing or has another weight.
        """
        for name, module in targets.items():
            entry = self._index["layers"].get(name)
            if entry is None or entry["checksum"] != weight_checksum(module):
                raise ValueError(f"{name}: the calibration belongs to another model (or does not cover this layer).")

    def energies(self, name: str) -> Tensor:
        """What dropping each direction of a layer's weight costs, descending, (min(out, in),), float64."""
        return self._tensor(name, "energies").double()

    def spectra(self, names: Iterable[str] | None = None, update: Update | None = None) -> list[LayerSpectrum]:
        """Plain numbers of all layers (or of some), for planning.

        Energies that no gradient weighs are not comparable to those of other layers; they are scaled so that such a
        layer counts as much as the average of those with gradients.
        """
        entries = self._index["layers"]
        weighed = [entry["energy"] for entry in entries.values() if entry["weighed"]]
        unit = sum(weighed) / len(weighed) if weighed else 1.0
        update = update or make_update(DEFAULT_UPDATE)
        spectra = []
        for name in self.layers if names is None else names:
            entry = entries[name]
            gradients = {mode: read_tensor(self._path(name), f"gradient.{mode}") for mode in ("feature", "token")}
            gradient = {mode: tuple(each.tolist()) for mode, each in gradients.items() if each is not None}
            energies = self._tensor(name, "energies")
            scale = 1.0
            if not entry["weighed"]:
                scale = unit / max(float(energies.sum()), torch.finfo(energies.dtype).tiny)
            out_features, in_features = entry["shape"]
            spectra.append(
                LayerSpectrum(
                    name,
                    out_features,
                    in_features,
                    entry["input"],
                    tuple((energies * scale).tolist()),
                    gradient,
                    update,
                    {residual: error * scale for residual, error in entry["rounding"].items()},
                    self.bytes_per_element,
                    experts=entry["experts"],
                )
            )
        return spectra

    def factors(self, name: str, module: nn.Module, rank: int) -> InitialFactors:
        """Initial factors of a layer at a rank.

        With a bias, the mean of the input is taken out first: `L R` approximates `W` on `x - E[x]`, and the bias
        becomes `b + (W - L R) E[x]`, which is the best possible bias. Without one the second moment itself weighs the
        error, so that the layer's structure stays what the architecture says.
        """
        weight, bias = dense_weight(module), dense_bias(module)
        spectrum = WeightSpectrum(*(self._tensor(name, part).to(weight.device) for part in WeightSpectrum._fields))
        L, R = truncate(weight, spectrum, rank)
        if bias is not None:
            mean = self._tensor(name, "mean").to(weight.device).double()
            bias = (bias.double() + weight.double() @ mean - L @ (R @ mean)).to(bias.dtype)
        return InitialFactors(L.to(weight.dtype), R.to(weight.dtype), bias)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, self._index["layers"][name]["file"])

    def _tensor(self, name: str, part: str) -> Tensor:
        tensor = read_tensor(self._path(name), part)
        if tensor is None:
            raise ValueError(f"{self._path(name)} must hold {part!r} of {name}, got a file without it.")
        return tensor


@with_projections
def calibrate_wasi(
    model: nn.Module,
    data: CalibrationData,
    config: WasiConfig | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    gradients: Gradients | None = "features",
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    seed: int = 0,
    progress_bar: bool = True,
) -> Calibration:
    """Measure the layers of a dense model: what planning and good initial factors need to know.

    Args:
        model: The dense model. It is not changed.
        data: Calibration batches (a few hundred samples do): a DataLoader or list of mappings, tensors, or tuples that
            begin with one of them (:mod:`models.calls`); or a function without arguments that runs the model on
            them. It may be iterated more than once.
        config: Decides the target layers; the default ones if None.
        directory: Folder for the results, so that they can be used again, in another process too (a finished part is
            not repeated; model, settings and data must be the same). None keeps them in a temporary folder as long as
            the returned object lives.
        gradients: Where output gradients come from. "features": a random +-1 projection of the model's features
            (the output of its `base_model`), no labels needed; its second moment is the Gauss-Newton matrix of the
            squared error of the features. "loss": the model's own loss; the batches must be mappings with labels, and
            a function must call `backward` itself. None: no backward passes; errors then count at each layer's
            output, whatever becomes of them, and a plan can choose no activation ranks. A layer on which the features
            do not depend is treated that way in any case.
        max_batches: Stop after that many batches.
        max_memory_bytes: Bound on the memory for sums at any time, bytes. The layers that read one input are always
            collected together, even if they alone exceed it.
        seed: Seed of the random projections; torch's global generator is not touched.
        progress_bar: Show progress bars.

    Raises:
        TypeError: If a batch is of no known kind.
        ValueError: If the data are empty, not finite, can be iterated only once, hold labels only, or reach no
            target; if gradients are asked for and none arrive; or if the folder is damaged or holds the calibration of
            another model, with other settings, or on other data. (Data are compared by their number of batches and,
            where they come in a fixed order, by the first.)
    """
    if gradients not in ("features", "loss", None):
        raise ValueError(f"gradients must be one of 'features', 'loss', None, got {gradients!r}.")
    options: dict[str, Any] = {"max_batches": max_batches, "max_memory_bytes": max_memory_bytes, "seed": seed}
    check_repeatable(data)
    return calibrate_layers(
        model, data, all_targets(model, config), gradients, directory, **options, progress_bar=progress_bar
    )


def calibrate_layers(
    model: nn.Module,
    data: CalibrationData,
    targets: dict[str, nn.Module],
    gradients: Gradients | None = "features",
    directory: str | os.PathLike[str] | None = None,
    *,
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    seed: int = 0,
    progress_bar: bool = True,
) -> Calibration:
    """:func:`calibrate_wasi` of given layers, by name."""
    folder = tempfile.mkdtemp(prefix="wasi-") if directory is None else os.fspath(directory)
    settings = {"gradients": gradients, "seed": seed}
    index = open_index(folder, model, targets, settings, describe_data(data, max_batches))
    index["complete"] = False
    calibration = Calibration(folder, index)
    if directory is None:
        weakref.finalize(calibration, shutil.rmtree, folder, ignore_errors=True)
    missing = {name: module for name, module in targets.items() if name not in index["layers"]}
    stacks = {name: module for name, module in missing.items() if isinstance(module, ExpertStack)}
    pending = {name: module for name, module in missing.items() if name not in stacks}
    for collector in passes(
        model,
        through_model(model, data, max_batches, "WASI calibration ({} layers)" if progress_bar else None),
        pending,
        gradients=gradients,
        seed=seed,
        max_memory_bytes=max_memory_bytes,
        fresh=not index["layers"],
    ):
        with tqdm(total=collector.count, desc="WASI spectra", disable=not progress_bar) as bar:
            for statistics in collector.take():
                for name in statistics.modules:
                    save_layer(folder, index, name, pending.pop(name), statistics)
                    bar.update()
                write_index(folder, index)
    run = through_model(
        model, data, max_batches, f"WASI inputs of {len(stacks)} expert weights" if progress_bar else None
    )
    options: dict[str, Any] = {"gradients": gradients, "seed": seed, "max_memory_bytes": max_memory_bytes}
    for name, spectrum in measure_experts(model, stacks, run, **options):
        save_stack(folder, index, name, stacks[name], spectrum)
        write_index(folder, index)
    index["complete"] = True
    write_index(folder, index)
    unreached = [name for name in targets if not index["layers"][name]["rows"]]
    log_unreached(unreached)
    covered = {name: entry for name, entry in index["layers"].items() if name in targets}
    calibration._index = {**index, "layers": covered}
    return calibration


def dense_targets(model: nn.Module, config: WasiConfig | None) -> dict[str, nn.Module]:
    """The same as :func:`all_targets`, of layers that models call alone."""
    targets = all_targets(model, config)
    return {name: module for name, module in targets.items() if not isinstance(module, ExpertStack)}


def all_targets(model: nn.Module, config: WasiConfig | None) -> dict[str, nn.Module]:
    """The layers and packed experts that a configuration selects in a dense model, checked; without convolutions.

    Convolutions need no data.

    Raises:
        ValueError: Whatever :func:`targets.check_targets` finds, or if there is no layer, or a WASI layer already.
    """
    resolved = WasiConfig() if config is None else copy.copy(config)
    expose_experts(model)
    try:
        resolve_targets(model, resolved)
        check_targets(model, resolved, convolutions=True)
        selected = dict(selected_modules(model, resolved))
    finally:
        conceal_experts(model)
    targets = {name: module for name, module in selected.items() if not isinstance(module, CONVOLUTIONS)}
    if len(targets) < len(selected):
        logger.info("%d convolutions are not prepared: they start from their weights.", len(selected) - len(targets))
    if not targets:
        raise ValueError(f"target_modules must match at least one module, got {resolved.target_modules!r}.")
    for name, module in targets.items():
        if isinstance(module, WasiLayer):
            raise ValueError(f"{name}: already a WASI layer; calibration needs the dense model.")
    return targets


def save_layer(
    directory: str,
    index: dict[str, Any],
    name: str,
    module: nn.Module,
    statistics: InputStatistics,
    rounding: bool = True,
) -> None:
    """Write what the sums say of one layer, and enter it into the index, which the caller writes.

    Args:
        directory: The folder.
        index: Its index; changed.
        name: Of the layer, which is not in the index.
        module: The dense layer.
        statistics: Of the input that it reads.
        rounding: Whether to find out what rounding the weight would lose, which plans need.
    """
    weight = dense_weight(module)
    spectrum = statistics.spectrum(name, weight, dense_bias(module))
    stored = torch.promote_types(weight.dtype, torch.float32)
    tensors = {
        "energies": spectrum.energies,
        "left": spectrum.left.to(stored),
        "right": spectrum.right.to(stored),
        "mean": statistics.moments()[1],
    }
    for mode, energies in statistics.gradient_energies.get(name, {}).items():
        if mode == "feature" or len(statistics.tokens) == 1:
            tensors[f"gradient.{mode}"] = energies.double()
    index["layers"][name] = {
        "file": _save_tensors(directory, index, name, tensors),
        "shape": list(weight.shape),
        "experts": 1,
        "input": statistics.modules[0],
        "rows": statistics.rows,
        "energy": float(spectrum.energies.sum()),
        "rounding": statistics.rounding_errors(name, module) if rounding else {},
        "weighed": statistics.output_moment(name) is not None,
        "checksum": weight_checksum(module),
    }


def save_stack(directory: str, index: dict[str, Any], name: str, stack: ExpertStack, spectrum: StackSpectrum) -> None:
    """The same of a packed weight, of which there are energies alone."""
    index["layers"][name] = {
        "file": _save_tensors(directory, index, name, {"energies": spectrum.energies}),
        "shape": [stack.out_features, stack.in_features],
        "experts": stack.experts,
        "input": name,
        "rows": spectrum.rows,
        "energy": float(spectrum.energies.sum()),
        "rounding": spectrum.rounding,
        "weighed": spectrum.weighed,
        "checksum": weight_checksum(stack),
    }


def _save_tensors(directory: str, index: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> str:
    """Write the file of a layer; returns its name."""
    file_name = free_file_name(index)
    with whole_file(os.path.join(directory, file_name)) as temporary:
        stored_tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        save_file(stored_tensors, temporary, metadata={"layer": name})
    return file_name
