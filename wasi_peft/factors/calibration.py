"""Calibration: what a model does with its weights, measured on a few batches and kept in a folder.

Batches run through the dense model. Forward hooks add up the second moment and the mean of each layer's input; a
backward pass from the model's features (or its loss) gives the second moment of each output's gradient, and how well
the weight's gradient survives compressed inputs. Where all sums together would exceed a memory bound, the batches run
again for the layers left over. As soon as a layer's sums are complete they become its spectrum, which is written to
the folder; the sums are then dropped.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..forms.dense import dense_bias, dense_weight
from ..linalg.spectra import WeightSpectrum, truncate, weight_spectrum
from ..linalg.tucker import canonical
from ..ranks.spectrum import LayerSpectrum
from ..tuner.config import WasiConfig
from ..tuner.layer import WasiLayer
from ..tuner.targets import check_targets, resolve_targets, selected_modules
from ..updates import DEFAULT_UPDATE, InitialFactors, Update, make_update
from .folder import describe_data, open_index, read_index, read_tensor, weight_checksum, write_index

RunModel = Callable[[], Any]
CalibrationData = Iterable[Any] | RunModel
Gradients = Literal["features", "loss"]

_LABEL_KEYS = ("labels", "label", "label_ids")
_SKETCH = 32  # random output directions in which the token mode's gradient error is estimated
_COMPARED_CALLS = 2  # first calls of a layer whose compressed gradients are compared with exact ones


# -------------------------------------------------------------------- what is kept


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
        """Rows (samples times tokens) that the first layer saw."""
        return int(next(iter(self._index["layers"].values()))["rows"])

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
        spectra, update = [], update or make_update(DEFAULT_UPDATE)
        for name in self.layers if names is None else names:
            entry = entries[name]
            gradients = {mode: read_tensor(self._path(name), f"gradient.{mode}") for mode in ("feature", "token")}
            gradient = {mode: tuple(found.tolist()) for mode, found in gradients.items() if found is not None}
            energies = self._tensor(name, "energies")
            if not entry["weighed"]:
                energies = energies / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny) * unit
            out_features, in_features = entry["shape"]
            values = tuple(energies.tolist())
            spectra.append(
                LayerSpectrum(
                    name,
                    out_features,
                    in_features,
                    entry["input"],
                    values,
                    gradient,
                    update or make_update(DEFAULT_UPDATE),
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
        data: Calibration batches (a few hundred samples do): a DataLoader or list of dicts, tensors, or tuples whose
            first element is the input; or a function without arguments that runs the model on them. It may be
            iterated more than once.
        config: Decides the target layers; the default ones if None.
        directory: Folder for the results, so that they can be used again, in another process too (a finished part is
            not repeated; model, settings and data must be the same). None keeps them in a temporary folder as long as
            the returned object lives.
        gradients: Where output gradients come from. "features": a random +-1 projection of the model's features
            (the output of its `base_model`), no labels needed; its second moment is the Gauss-Newton matrix of the
            squared error of the features. "loss": the model's own loss; the batches must hold labels, a function must
            call `backward` itself. None: no backward passes; errors then count at each layer's output, whatever
            becomes of them, and a plan can choose no activation ranks. A layer on which the features do not depend is
            treated that way in any case.
        max_batches: Stop after that many batches.
        max_memory_bytes: Bound on the memory for sums at any time, bytes. The layers that read one input are always
            collected together, even if they alone exceed it.
        seed: Seed of the random projections; torch's global generator is not touched.
        progress_bar: Show progress bars.

    Raises:
        ValueError: If the data are empty, not finite, can be iterated only once, hold labels only, or do not reach a
            target; if gradients are asked for and none arrive; or if the folder is damaged or holds the calibration of
            another model, with other settings, or on other data. (Data are compared by their number of batches and,
            where they come in a fixed order, by the first.)
    """
    if gradients not in ("features", "loss", None):
        raise ValueError(f"gradients must be one of 'features', 'loss', None, got {gradients!r}.")
    check_repeatable(data)
    targets = dense_targets(model, config)
    folder = tempfile.mkdtemp(prefix="wasi-") if directory is None else os.fspath(directory)
    settings = {"gradients": gradients, "seed": seed}
    index = open_index(folder, model, targets, settings, describe_data(data, max_batches))
    index["complete"] = False
    calibration = Calibration(folder, index)
    if directory is None:
        weakref.finalize(calibration, shutil.rmtree, folder, ignore_errors=True)
    pending = {name: module for name, module in targets.items() if name not in index["layers"]}
    while pending:
        collector = _Collector(pending, max_memory_bytes, gradients, seed)
        description = f"WASI calibration ({len(pending)} layers)" if progress_bar else None
        with evaluating(model, bool(gradients)), collector.attached(model):
            _run(model, data, max_batches, description, collector, gradients == "loss")
        collector.check(fresh=not index["layers"])
        with tqdm(total=len(collector.done), desc="WASI spectra", disable=not progress_bar) as bar:
            for statistics in collector.take():
                for name in statistics.modules:
                    _save_layer(folder, index, name, pending.pop(name), statistics)
                    bar.update()
                write_index(folder, index)
    index["complete"] = True
    write_index(folder, index)
    asked = {name: entry for name, entry in index["layers"].items() if name in targets}
    calibration._index = {**index, "layers": asked}
    return calibration


def dense_targets(model: nn.Module, config: WasiConfig | None) -> dict[str, nn.Module]:
    """The layers that a configuration selects in a dense model, checked.

    Raises:
        ValueError: Whatever :func:`targets.check_targets` finds, or if there is no layer, or a WASI layer already.
    """
    resolved = WasiConfig() if config is None else copy.copy(config)
    resolve_targets(model, resolved)
    check_targets(model, resolved)
    targets = dict(selected_modules(model, resolved))
    if not targets:
        raise ValueError(f"target_modules must match at least one module, got {resolved.target_modules!r}.")
    for name, module in targets.items():
        if isinstance(module, WasiLayer):
            raise ValueError(f"{name}: already a WASI layer; calibration needs the dense model.")
    return targets


# -------------------------------------------------------------------- collecting


@dataclass
class InputStatistics:
    """Sums over the rows of one input, and per module that reads it over the gradients of its output.

    **Shape**
        - second_moment: (in, in), float32, sum of `x x^T`
        - total: (in,), float32, sum of `x`
        - tokens: every number of tokens that was seen
        - output_moments: per module (out, out), float32, sum of `g g^T`
        - gradient_energies: per module and mode, energies of the weight's gradient; `sum(e[r:])` is the squared error
          of the gradient when the input is kept at rank r in that mode
    """

    second_moment: Tensor
    total: Tensor
    rows: int = 0
    tokens: set[int] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    output_moments: dict[str, Tensor] = field(default_factory=dict)
    gradient_energies: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of a batch, shape (..., in), without padding."""
        self.tokens.add(canonical(x).shape[1])
        rows = real_rows(x.detach(), mask).to(self.second_moment)
        self.second_moment.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.rows += rows.shape[0]

    def update_output(self, name: str, gradient: Tensor) -> None:
        """Add the gradients of a module's output, shape (..., out)."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(self.second_moment)
        if name not in self.output_moments:
            self.output_moments[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.output_moments[name].addmm_(rows.T, rows)

    def update_errors(self, name: str, mode: str, energies: Tensor) -> None:
        """Add the gradient energies of one batch, unless it has another number of tokens than the first."""
        known = self.gradient_energies.setdefault(name, {})
        if known.setdefault(mode, torch.zeros_like(energies)).shape == energies.shape:
            known[mode] = known[mode] + energies

    def moments(self) -> tuple[Tensor, Tensor]:
        """`E[x x^T]` (in, in) and `E[x]` (in,), float64."""
        return self.second_moment.double() / self.rows, self.total.double() / self.rows

    def output_moment(self, name: str) -> Tensor | None:
        """Sum of `g g^T` of a module, (out, out), float64; None where nothing downstream depends on it.

        A sum, not a mean: where layers see different numbers of rows (Swin's stages, an encoder and a decoder), it is
        the error of all of them together that makes energies comparable.
        """
        moment = self.output_moments.get(name)
        return moment.double() if moment is not None and bool(moment.any()) else None

    def spectrum(self, name: str, weight: Tensor, bias: Tensor | None) -> WeightSpectrum:
        """The spectrum of a module's weight, (out, in)."""
        second_moment, mean = self.moments()
        if bias is not None:
            second_moment = second_moment - torch.outer(mean, mean)
        output = self.output_moment(name)
        return weight_spectrum(
            weight, second_moment.to(weight.device), None if output is None else output.to(weight.device)
        )


@torch.no_grad()
def feature_gradient_energies(x: Tensor, gradient: Tensor) -> Tensor:
    """Energy of `G = dY^T X` along the right singular vectors of X, (in,), zero past the rank of X.

    The squared error of the gradient from the rows compressed to r features, `||G - G U_r U_r^T||_F^2`, is the sum of
    all entries from r on: the paper's `activation_perplexity` at every rank at once (arXiv 2510.09160, section 3.4).

    **Shape**
        - x: (..., in), gradient: (..., out)
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    dY = gradient.reshape(-1, gradient.shape[-1]).float()
    energies = rows.new_zeros(rows.shape[1])
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
        energies.copy_((dY.T @ (rows @ basis)).square().sum(0))
    else:  # G u_j = s_j dY^T v_j with X X^T = V S^2 V^T
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        squares = values.flip(0).clamp_min(0) * (dY.T @ vectors.flip(1)).square().sum(0)
        energies[: len(squares)] = squares
    return energies


@torch.no_grad()
def token_gradient_energies(x: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
    """The same for the token mode, (N,), estimated.

    The gradient is a sum over token directions whose parts are not orthogonal to each other, so its tails are
    measured, in `_SKETCH` random output directions.

    **Shape**
        - x: (B, N, in), gradient: (B, N, out)
    """
    x, gradient = x.float(), gradient.float()
    gram = torch.einsum("bni,bmi->nm", x, x)
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)  # (N, N)
    sketch = torch.randint(0, 2, (gradient.shape[-1], _SKETCH), generator=generator).to(x) * 2 - 1
    sketched = torch.einsum("nj,bns->jbs", basis, gradient @ sketch)
    inputs = torch.einsum("nj,bni->jbi", basis, x)
    tails, total = [], x.new_zeros(_SKETCH, x.shape[-1])
    for direction in range(x.shape[1] - 1, -1, -1):
        total = total + sketched[direction].T @ inputs[direction]
        tails.append(total.square().sum() / _SKETCH)
    errors = torch.stack(tails).cummax(0).values.flip(0)  # errors[r]: rank r keeps directions 0 to r - 1
    return errors - torch.cat([errors[1:], errors.new_zeros(1)])


def add_gradient_energies(
    statistics: InputStatistics, name: str, x: Tensor, gradient: Tensor, sketch_seed: int
) -> None:
    """Add what compressed inputs do to the gradient of a module's weight, for one call of it.

    **Shape**
        - x: (..., in), gradient: (..., out)
    """
    if not bool(torch.isfinite(x).all() & torch.isfinite(gradient).all()):
        return  # the sums say so too
    statistics.update_errors(name, "feature", feature_gradient_energies(x, gradient))
    rows, gradients = canonical(x), canonical(gradient)
    if rows.shape[0] > 1 and rows.shape[1] > 1:
        generator = torch.Generator().manual_seed(sketch_seed)
        statistics.update_errors(name, "token", token_gradient_energies(rows, gradients, generator))


class _Collector:
    """Hooks of one pass over the data; decides at a module's first call whether its sums fit the bound."""

    def __init__(
        self, pending: dict[str, nn.Module], max_memory_bytes: int, gradients: Gradients | None, seed: int
    ) -> None:
        self.pending = pending
        self.max_memory_bytes = max_memory_bytes
        self.gradients = gradients
        self.seed = seed
        self.signs = torch.Generator().manual_seed(seed)
        self.collected: list[InputStatistics] = []
        self.leaders: dict[str, InputStatistics] = {}  # module that feeds an accumulator
        self.owners: dict[str, InputStatistics] = {}  # module of an accumulator
        self.seen: set[str] = set()
        self.reached = False  # by a gradient, any of the layers
        self.mask: Tensor | None = None  # of the tokens that are no padding, in the running batch
        self.calls: Counter[str] = Counter()
        self.bytes_held = 0
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._last_version = 0
        self._last_statistics: InputStatistics | None = None

    @property
    def done(self) -> list[str]:
        return list(self.owners)

    def see(self, name: str, x: Tensor) -> None:
        """One call of a module with its input."""
        if name in self.leaders:
            self.leaders[name].update(x, self.mask)
        elif name not in self.seen:
            self.seen.add(name)
            version = -1 if x.is_inference() else x._version  # inference tensors do not say whether they changed
            if not (self._last_input() is x and self._last_version == version >= 0):
                self._last_input, self._last_version = weakref.ref(x), version
                self._last_statistics = self._start(name, x)
            elif self._last_statistics is not None:
                self._last_statistics.modules.append(name)
                self.bytes_held += self._output_bytes(name)
            if self._last_statistics is not None:
                self.owners[name] = self._last_statistics

    def _start(self, name: str, x: Tensor) -> InputStatistics | None:
        size = x.shape[-1]
        needed = 4 * size * (size + 1) + self._output_bytes(name)
        if self.collected and self.bytes_held + needed > self.max_memory_bytes:
            return None  # left for the next pass
        self.bytes_held += needed
        second_moment = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        statistics = InputStatistics(second_moment, torch.zeros_like(second_moment[0]), modules=[name])
        statistics.update(x, self.mask)
        self.collected.append(statistics)
        self.leaders[name] = statistics
        return statistics

    def _output_bytes(self, name: str) -> int:
        return 0 if self.gradients is None else 4 * dense_weight(self.pending[name]).shape[0] ** 2

    def _watch_output(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Have the gradient of an output collected; returns the output to go on with."""
        if not torch.is_grad_enabled():
            return y
        y = differentiable(y)
        call, version = self.calls[name], x._version
        self.calls[name] += 1
        compare = x.detach() if call < _COMPARED_CALLS and name in self.owners else None

        def on_gradient(gradient: Tensor) -> None:
            self.reached = True
            statistics = self.owners.get(name)
            if statistics is None:
                return
            statistics.update_output(name, gradient)
            if compare is not None and compare._version == version:
                # a sketch of its own for every module and call: the same one whatever else this pass collects
                sketch_seed = zlib.crc32(f"{self.seed}/{call}/{name}".encode())
                add_gradient_energies(statistics, name, compare, gradient, sketch_seed)

        y.register_hook(on_gradient)
        return y

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in self.pending.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, y: Tensor, name: str = name) -> Tensor:
                x = layer_input(args, kwargs)
                self.see(name, x)
                return y if self.gradients is None else self._watch_output(name, x, y)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if self.gradients == "features":
            backbone = getattr(model, "base_model", model)
            handles.append(backbone.register_forward_hook(self._project))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _project(self, _: nn.Module, args: Any, output: Any) -> None:
        """As soon as the features exist."""
        backpropagate_signs(features_of(output), self.mask, self.signs)

    def check(self, fresh: bool) -> None:
        """Raise if the pass left a layer without statistics, or with statistics that are not numbers.

        The first pass of a fresh calibration must also have seen a gradient; what is left for later passes may well be
        layers that none reaches.
        """
        empty = {name for name, statistics in self.owners.items() if not statistics.rows}
        missed = [name for name in self.pending if name not in self.seen or name in empty]
        if missed:
            raise ValueError(f"{missed[0]}: the calibration data never reached this layer ({len(missed)} in all).")
        if self.gradients is not None and fresh and not self.reached:
            raise ValueError(
                "gradients need a model that runs with gradients enabled and whose features (or loss) depend on the "
                f"target layers; got none for {next(iter(self.pending))}. Use gradients=None."
            )
        for statistics in self.collected:
            if not bool(torch.isfinite(statistics.second_moment).all()):
                raise ValueError(f"{statistics.modules[0]}: its input holds NaN or Inf on the calibration data.")
            for name, moment in statistics.output_moments.items():
                if not bool(torch.isfinite(moment).all()):
                    raise ValueError(f"{name}: the gradient of its output holds NaN or Inf on the calibration data.")

    def take(self) -> Iterator[InputStatistics]:
        """Hand out the statistics one by one, keeping none."""
        self.leaders.clear()
        self.owners.clear()
        self._last_statistics = None
        while self.collected:
            yield self.collected.pop(0)


def differentiable(y: Tensor) -> Tensor:
    """The output of a layer, or a new start of the graph where every parameter before it is frozen."""
    return y if y.requires_grad else y.requires_grad_(True).clone()  # the model could not change a leaf in place


def backpropagate_signs(features: Tensor, mask: Tensor | None, generator: torch.Generator) -> None:
    """Backpropagate a random +-1 projection of a model's features, those of padded tokens left out."""
    if not features.requires_grad:
        return
    signs = torch.randint(0, 2, features.shape, generator=generator).to(features) * 2 - 1
    if mask is not None and mask.shape == features.shape[:-1]:
        signs = signs * mask.to(features.device).bool()[..., None]
    features.backward(signs)


def layer_input(args: Any, kwargs: Any) -> Tensor:
    """What a Linear layer is called with."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def features_of(output: Any) -> Tensor:
    """The features in a model's output: the last hidden state, the logits, or the first floating point tensor.

    Raises:
        ValueError: If it holds no floating point tensor.
    """
    for key in ("last_hidden_state", "logits"):
        value = getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in (output, *values):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"the model's output must hold a floating point tensor, got {type(output).__name__}.")


@contextmanager
def evaluating(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Evaluation mode; frozen parameters, so that a backward pass computes no gradient of a weight."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)


def _run(
    model: nn.Module,
    data: CalibrationData,
    max_batches: int | None,
    description: str | None,
    collector: _Collector,
    with_labels: bool,
) -> None:
    if callable(data):
        data()
        return
    for batch in limited(data, max_batches, description):
        collector.mask = token_mask(batch)
        output = model_output(model, batch, with_labels)
        if with_labels:
            loss = getattr(output, "loss", None)
            if loss is None:
                raise ValueError("gradients='loss' needs batches with labels, for which the model returns a loss.")
            if loss.requires_grad:
                loss.backward()


def check_repeatable(data: CalibrationData) -> None:
    """Raise a ValueError for data that can be iterated only once."""
    if isinstance(data, Iterator):
        raise ValueError("calibration data must allow several iterations (a DataLoader, a list), got an iterator.")


def limited(data: Iterable[Any], max_batches: int | None, description: str | None) -> Iterator[Any]:
    """The first batches of calibration data, with a progress bar.

    Raises:
        ValueError: If there is not one, or none is allowed.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches!r}.")
    total = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    count = 0
    with tqdm(total=total, desc=description, disable=description is None) as bar:
        for batch in itertools.islice(data, max_batches):
            yield batch
            bar.update()
            count += 1
    if count == 0:
        raise ValueError("calibration data must hold at least one batch, got none.")


def token_mask(batch: Any) -> Tensor | None:
    """The attention mask of a batch, which says which tokens are no padding, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of (..., features), without those of padded tokens where the mask is one of these very tokens."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])


def model_output(model: nn.Module, batch: Any, with_labels: bool = False) -> Any:
    """Run a model on a calibration batch, without its labels unless they are asked for, or are its decoder's input.

    Raises:
        ValueError: If the batch holds no input.
    """
    device = next(model.parameters()).device
    with_labels = with_labels or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if isinstance(batch, Mapping):
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if with_labels or key not in _LABEL_KEYS
        }
        if not set(inputs) - set(_LABEL_KEYS):
            raise ValueError(f"calibration batches must hold model inputs, got only {sorted(batch)}.")
        return model(**inputs)
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(first, Tensor):
        raise ValueError(f"calibration batches must be dicts, tensors or tuples of tensors, got {type(first)}.")
    return model(first.to(device))


def _save_layer(
    directory: str, index: dict[str, Any], name: str, module: nn.Module, statistics: InputStatistics
) -> None:
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
    file_name = f"{len(index['layers']):05d}.safetensors"
    path = os.path.join(directory, file_name)
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    index["layers"][name] = {
        "file": file_name,
        "shape": list(weight.shape),
        "input": statistics.modules[0],
        "rows": statistics.rows,
        "energy": float(spectrum.energies.sum()),
        "weighed": statistics.output_moment(name) is not None,
        "checksum": weight_checksum(module),
    }
