"""The state dict of an adapter: where its vectors are in it, and whether one can be loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..forms.factored import FactoredLinear
from ..forms.shards import is_sharded
from .config import WasiConfig
from .layer import wasi_layers
from .targets import plain_name
from .vectors import AdapterVectors

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
FORM = ".wasi_form."
_MAPPING = "Where the model has other names for its modules, pass key_mapping to from_pretrained."


def shared_vectors(model: nn.Module) -> AdapterVectors:
    """The vectors that the WASI layers of a model share."""
    layer = next((layer for _, layer in wasi_layers(model)), None)
    return AdapterVectors() if layer is None else layer.vectors


def vectors_by_key(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """An adapter's vectors by their keys in the model's state dict, PEFT's model or the base model itself."""
    first = next((name for name, _ in wasi_layers(model)), "")
    prefix = PEFT_PREFIX if first.startswith(PEFT_PREFIX) else ""
    for name, vector in shared_vectors(model).items(adapter_name):
        yield prefix + name, vector


def with_model_keys(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict from a file, its vectors under the keys that they have in this model, compiled or not."""
    keys = {}
    for key, _ in vectors_by_key(model, adapter_name):
        keys[plain_name(key)] = keys[PEFT_PREFIX + plain_name(key)] = key
    return {keys.get(key, key): value for key, value in state_dict.items()}


def _whole_module_keys(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Keys of the modules that an adapter's file may hold whole.

    They are those of `modules_to_save`, and embeddings, which PEFT saves where a vocabulary was resized or on request.
    """
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError):  # of models that read no tokens
            embeddings.append(getattr(model, getter, lambda: None)())
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
        elif any(module is layer for layer in embeddings):
            yield from (f"{name}.{key}" for key in module.state_dict())


def forms_in(
    model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, FactoredLinear]:
    """An adapter's forms by layer name, with the ranks that they have in a state dict.

    Those of other ranks are of no numbers, on the meta device: a run that goes on from a checkpoint may have been
    calibrated anew, and so have other ranks. Where the configuration was saved with the state dict it knows better.
    """
    forms = {}
    for name, layer in wasi_layers(model):
        if adapter_name not in layer.wasi_form:
            continue
        form = layer.form_of(adapter_name)
        forms[name] = form
        if form.shared_parts:  # which have the rank of the base model
            continue
        stored = next(part for part, _ in form.tensors() if part.partition(".")[0] == f"{form.prefix}R")
        saved = state_dict.get(f"{name}{FORM}{adapter_name}.{stored}")
        if config.awaits_loading or saved is None or saved.dim() != 2 or is_sharded(form.part("L")):
            continue
        rank = len(saved)
        if rank != form.weight_rank and 1 <= rank <= min(form.out_features, form.in_features):
            forms[name] = layer.new_form(adapter_name, rank)
    return forms


def take_ranks(model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Give an adapter the ranks of a state dict that it can load; parameters stay the same objects, without values."""
    layers = dict(wasi_layers(model))
    for name, form in forms_in(model, config, adapter_name, state_dict).items():
        there = layers[name].form_of(adapter_name)
        if form is there:
            continue
        for part in form.parts:
            frozen, parameter = form.frozen(part), there.part(part)
            if frozen is not None:
                there.add_module(form.prefix + part, frozen.to_empty(device=there.device))
            else:
                parameter.data = parameter.data.new_empty(form.part(part).shape)
        assert config.resolved_ranks is not None  # the adapter was injected
        config.resolved_ranks[plain_name(name.removeprefix(PEFT_PREFIX))] = form.weight_rank
        logger.info("%s: takes rank %d of what is loaded.", name, form.weight_rank)


def _check_storage(layer: str, config: WasiConfig, own: list[str], given: Iterable[str]) -> None:
    """Refuse factors that a file stores in other bits: `wasi_R` where `wasi_R.codes` is called for, or the reverse."""
    for part in own:
        factor = part.partition(".")[0]
        stored = sorted(name for name in given if name.partition(".")[0] == factor)
        if stored and not set(stored) & set(own):
            raise ValueError(
                f"{layer}: the adapter must store {factor} as {part}, by frozen_dtype={config.frozen_dtype!r} of its "
                f"configuration, got {' and '.join(stored)}: it was saved with another one."
            )


def check_loadable(model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse, before anything is copied, a state dict that is not this adapter's.

    Args:
        model: With the adapter injected.
        config: The adapter's configuration.
        adapter_name: Its name.
        state_dict: By the model's keys.

    Raises:
        ValueError: If a tensor of a form, a vector or a whole module is missing, is one that the adapter does not
            have, is stored in another way, has another shape or kind of dtype, or holds NaN or Inf.
    """
    given: dict[str, list[str]] = {}  # parts in the file by layer; those that the model lacks have no adapter's name
    for key in state_dict:
        place, separator, part = plain_name(key).removeprefix(PEFT_PREFIX).partition(FORM)
        if separator:
            given.setdefault(place, []).append(part.removeprefix(f"{adapter_name}."))
    forms: dict[str, tuple[str, str, Tensor]] = {}
    for name, form in forms_in(model, config, adapter_name, state_dict).items():
        parts = dict(form.tensors())
        _check_storage(name, config, list(parts), given.get(plain_name(name).removeprefix(PEFT_PREFIX), ()))
        forms |= {f"{name}{FORM}{adapter_name}.{part}": (name, part, tensor) for part, tensor in parts.items()}
    present = model.state_dict()
    own: dict[str, Tensor] = {key: tensor for key, (_, _, tensor) in forms.items()}
    own |= {key: present[key] for key in _whole_module_keys(model, adapter_name) if key in present}
    own.update(vectors_by_key(model, adapter_name))
    for key, (name, part, _) in forms.items():
        if key not in state_dict:
            raise ValueError(
                f"{name}: the adapter lacks {part}: it is incomplete, or belongs to another model. {_MAPPING}"
            )
    for key, _ in vectors_by_key(model, adapter_name):
        if key not in state_dict:
            raise ValueError(
                f"{key}: the adapter lacks this vector: it is incomplete, or belongs to another model. {_MAPPING}"
            )
    for key, value in state_dict.items():
        known = own.get(key, own.get(key.removeprefix(PEFT_PREFIX)))
        if known is None:
            raise ValueError(
                f"{key}: the adapter holds this tensor, which its configuration (update={config.update!r}) and this "
                "model do not call for. They do not belong together."
            )
        if value.shape != known.shape:
            raise ValueError(
                f"{key}: must have shape {tuple(known.shape)}, got {tuple(value.shape)}. "
                "The adapter belongs to another model or has other ranks."
            )
        alike = value.is_floating_point() if known.is_floating_point() else value.dtype == known.dtype
        if not alike:
            raise ValueError(f"{key}: must be of a dtype like {known.dtype}, got {value.dtype}.")
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key}: the adapter file holds NaN or Inf.")
