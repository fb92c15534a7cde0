"""Factors made before the injection: what preparation gives, what a file holds, and what injection takes.

They wait on the modules that they are for, as PEFT's own `preprocess_*` helpers leave theirs, because `get_peft_model`
takes a model and a configuration and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.whole import whole_file
from ..forms.attention import projections_exposed
from ..forms.dense import dense_bias, dense_weight
from ..linalg.coordinates import ImageMoments
from ..updates.base import InitialFactors
from .config import WasiConfig
from .layer import WasiLayer
from .targets import asked_rank

ATTACHED = "_wasi_prepared_layer"  # attribute of a module on which factors wait for the injection
FORMAT = "wasi-factors-1"


@dataclass(frozen=True)
class PreparedLayer:
    """Factors of one layer, and what they were made for.

    Args:
        initial: Factors of `rank` directions, and of those on top that train.
        rank: K.
        rank_or_threshold: What the configuration asked for.
        weight_share: The share under which the rank was allocated, if it was.
        update: What is going to train.
        update_rank: Directions of that on top of K.
        residual: The frozen weight beside the factors, None for none.
        frozen_dtype: In what factors that do not train will be stored, which decides ranks under a `weight_share`.
    """

    initial: InitialFactors
    rank: int
    rank_or_threshold: int | float
    weight_share: float | None
    update: str
    update_rank: int = 0
    residual: str | None = None
    frozen_dtype: str | None = None


@dataclass(frozen=True)
class WasiFactors:
    """Initial factors of the layers of a model; :func:`preprocess_wasi` makes them, repairs give new ones.

    A configuration says what they are for, so they serve that configuration only (see :meth:`attach`).

    Args:
        layers: By module name, at least one.

    Example:
        >>> from peft import get_peft_model
        >>> from wasi_peft import WasiConfig, preprocess_wasi
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> config = WasiConfig(target_modules=["0"], weight_rank=3)
        >>> factors = preprocess_wasi(model, config, [torch.randn(32, 8)], progress_bar=False)
        >>> folder = getfixture("tmp_path")
        >>> factors.save(folder / "factors.safetensors")
        >>> WasiFactors.load(folder / "factors.safetensors").attach(model)
        >>> get_peft_model(model, config).wasi_summary().layers[0].rank
        3
    """

    layers: Mapping[str, PreparedLayer]

    def __repr__(self) -> str:
        if not self.layers:
            return "WasiFactors(0 layers)"
        ranks = sorted(self.ranks.values())
        updates = ", ".join(sorted({layer.update for layer in self.layers.values()}))
        return f"WasiFactors({len(ranks)} layers, ranks {ranks[0]} to {ranks[-1]}, for update {updates})"

    @property
    def initial(self) -> dict[str, InitialFactors]:
        """L, R, bias and moments of every layer."""
        return {name: layer.initial for name, layer in self.layers.items()}

    def require_factors(self, action: str) -> None:
        """Refuse additions to a frozen weight where factors that replace one are meant.

        Raises:
            ValueError: If a layer has a residual.
        """
        for name, layer in self.layers.items():
            if layer.residual is not None:
                raise ValueError(
                    f"{name}: {action} is for factors that replace a weight; got an addition to one, "
                    f"residual={layer.residual!r}."
                )

    @property
    def ranks(self) -> dict[str, int]:
        """K of every layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def with_initial(self, initial: Mapping[str, InitialFactors]) -> WasiFactors:
        """The same with other factors of the same ranks in all layers."""
        return WasiFactors({name: replace(layer, initial=initial[name]) for name, layer in self.layers.items()})

    def attach(self, model: nn.Module) -> None:
        """Have the next `get_peft_model` on this model start from these factors; those attached before are dropped.

        The injection takes copies, so this object can be attached and saved again.

        Args:
            model: The dense model that they were made for, or one with the same layers.

        Raises:
            ValueError: If it lacks a layer, or has one of another shape, with another bias, or adapted already.
                Nothing is attached then.
        """
        with projections_exposed(model):
            modules = dict(model.named_modules())
            for name, layer in self.layers.items():
                _check_module(name, layer.initial, modules.get(name))
            for module in modules.values():
                drop_prepared(module)
            for name, layer in self.layers.items():
                modules[name].__dict__[ATTACHED] = layer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file whose metadata say what is for which layer; it replaces another one as a whole.

        Raises:
            ValueError: If there are none, as where packed experts alone were prepared.
            OSError: If the file cannot be written.
        """
        if not self.layers:
            raise ValueError("factors must be of at least one layer to be saved, got none.")
        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            parts = _parts(layer.initial)
            # clones: one storage under two names is more than such a file can hold
            tensors |= {f"{name}.{part}": value.detach().cpu().clone().contiguous() for part, value in parts.items()}
            entries[name] = {key: getattr(layer, key) for key in _KINDS}
            if layer.initial.moments is not None:
                entries[name]["mean_square"] = layer.initial.moments.mean_square
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "layers": json.dumps(entries)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WasiFactors:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no such file, is damaged, or its parts do not fit together or are not finite.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} must be a safetensors file of factors, got {error}.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)} must have format {FORMAT!r}, got {metadata.get('format')!r}.")
        try:
            entries = json.loads(metadata.get("layers", ""))
            layers = {name: _read_layer(name, entry, tensors) for name, entry in entries.items()}
            if tensors:
                raise ValueError(f"{next(iter(tensors))} belongs to none of its {len(layers)} layers.")
            return cls(layers)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "rank_or_threshold": (int, float),
    "weight_share": (float, int, type(None)),
    "update": (str,),
    "update_rank": (int,),
    "residual": (str, type(None)),
    "frozen_dtype": (str, type(None)),
}
assert set(_KINDS) == {field.name for field in fields(PreparedLayer)} - {"initial"}


def _parts(initial: InitialFactors) -> dict[str, Tensor]:
    """Tensors of a layer's factors, by the name that they have in a file."""
    parts = {"L": initial.L, "R": initial.R}
    if initial.bias is not None:
        parts["bias"] = initial.bias
    if initial.moments is not None:
        parts |= {"image": initial.moments.image, "gradient": initial.moments.gradient}
    return parts


def _read_layer(name: str, entry: Any, tensors: dict[str, Tensor]) -> PreparedLayer:
    """One layer from its entry and from its tensors, which are taken out of those of the file."""
    if isinstance(entry, dict):
        entry = {"frozen_dtype": None, **entry}  # which a file may leave out
    if not isinstance(entry, dict) or not set(_KINDS) <= set(entry) <= {*_KINDS, "mean_square"}:
        raise ValueError(f"the entry of {name} must have the keys {list(_KINDS)}, got {entry!r}.")
    for key, kinds in _KINDS.items():
        if type(entry[key]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key} of {name} must be of type {expected}, got {entry[key]!r}.")
    mean_square = entry.pop("mean_square", None)
    needed = ("L", "R") if mean_square is None else ("L", "R", "image", "gradient")
    missing = next((part for part in needed if f"{name}.{part}" not in tensors), None)
    if missing is not None:
        raise ValueError(f"it must hold {missing} of {name}, got a file without it.")
    L, R = tensors.pop(f"{name}.L"), tensors.pop(f"{name}.R")
    bias = tensors.pop(f"{name}.bias", None)
    moments = None
    if mean_square is not None:
        moments = ImageMoments(tensors.pop(f"{name}.image"), tensors.pop(f"{name}.gradient"), float(mean_square))
    initial = InitialFactors(L, R, bias, moments, met_data=entry["residual"] is not None)
    _check_parts(name, initial, entry["rank"])
    return PreparedLayer(initial, **entry)


def _check_parts(name: str, initial: InitialFactors, rank: int) -> None:
    """Raise a ValueError for factors that do not fit together or hold NaN or Inf."""
    shapes = {part: tuple(value.shape) for part, value in _parts(initial).items()}
    fitting = len(shapes["L"]) == len(shapes["R"]) == 2 and shapes["L"][1] == shapes["R"][0] >= rank >= 1
    if fitting:
        (out, size), square = shapes["L"], (shapes["L"][1],) * 2
        fitting = shapes.get("bias", (out,)) == (out,)
        fitting &= shapes.get("image", square) == shapes.get("gradient", square) == (size, size)
    if not fitting:
        raise ValueError(
            f"{name}: L must be (out, n), R (n, in), bias (out,) and moments (n, n) with n at least the rank {rank}, "
            f"got {shapes}."
        )
    broken = next((part for part, value in _parts(initial).items() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise ValueError(f"{name}: its factors must be finite, got NaN or Inf in {broken}.")


def _check_module(name: str, initial: InitialFactors, module: nn.Module | None) -> None:
    """Raise a ValueError for a module that the factors are not for."""
    if isinstance(module, WasiLayer):
        raise ValueError(f"{name}: already a WASI layer; factors are attached to the dense model.")
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(f"{name}: the factors belong to another model, which has this layer.")
    shape, factored = tuple(dense_weight(module).shape), (len(initial.L), initial.R.shape[1])
    if shape != factored:
        raise ValueError(
            f"{name}: the factors belong to another model; its weight must have shape {factored}, got {shape}."
        )
    if (dense_bias(module) is None) != (initial.bias is None):
        there = "none" if initial.bias is not None else "one"
        raise ValueError(f"{name}: the factors belong to another model; they must agree about a bias, got {there}.")


# ---------------------------------------------------------------- for the injection


def attached_layers(model: nn.Module) -> list[PreparedLayer]:
    """All that waits on the modules of a model."""
    return [module.__dict__[ATTACHED] for module in model.modules() if ATTACHED in module.__dict__]


def check_prepared(targets: Mapping[str, nn.Module], config: WasiConfig) -> dict[str, PreparedLayer]:
    """What is attached to targets, by name.

    Raises:
        ValueError: If it was prepared for another share, rank, threshold or update.
    """
    attached = {name: module.__dict__.get(ATTACHED) for name, module in targets.items()}
    prepared: dict[str, PreparedLayer] = {name: layer for name, layer in attached.items() if layer is not None}
    for name, layer in prepared.items():
        made_for: list[tuple[str, Any, Any]] = [
            ("update", layer.update, config.update_of(name).name),
            ("update_rank", layer.update_rank, config.update_of(name).side_rank),
            ("residual", layer.residual, config.residual_of(name)),
        ]
        if config.weight_share is not None:
            made_for.append(("weight_share", layer.weight_share, config.weight_share))
            made_for.append(("frozen_dtype", layer.frozen_dtype, config.frozen_dtype))
        else:
            made_for.append(("rank or threshold", layer.rank_or_threshold, asked_rank(name, config)))
        for what, given, now in made_for:
            if given != now:
                raise ValueError(
                    f"{name}: preprocess_wasi prepared it for {what} {given}, the configuration now asks for "
                    f"{now}. Run preprocess_wasi again with this configuration."
                )
    return prepared


def prepared_for(target: nn.Module) -> PreparedLayer | None:
    """What is attached to a target, in copies, because what trains is changed in place."""
    layer: PreparedLayer | None = target.__dict__.get(ATTACHED)
    if layer is None:
        return None
    initial = layer.initial
    return replace(layer, initial=replace(initial, L=initial.L.clone(), R=initial.R.clone()))


def drop_prepared(module: nn.Module) -> None:
    """Nothing is attached to a module any more."""
    module.__dict__.pop(ATTACHED, None)
