"""PEFT's `hotswap_adapter` for WASI adapters: the numbers of a saved one take the place of those of one in use.

Nothing is injected and every parameter stays the same object, so a model that was compiled is not compiled again. PEFT
knows the exchange for LoRA alone, and offers no place to add another method.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from peft.utils import hotswap, set_peft_model_state_dict
from torch import Tensor, nn

from .config import WasiConfig
from .layer import wasi_layers
from .registration import PEFT_TYPE
from .state import FORM, PEFT_PREFIX
from .targets import plain_name

# what the answers depend on beside the tensors; PEFT compares it
ALIKE = ["residual", "frozen_dtype", "train_vectors", "modules_to_save", "trainable_token_indices"]


def install() -> None:
    """Have `peft.utils.hotswap` take WASI adapters; calling it again changes nothing."""
    hotswap.CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = ALIKE
    swap_lora = hotswap.hotswap_adapter_from_state_dict
    if getattr(swap_lora, "_wasi", False):
        return

    @functools.wraps(swap_lora)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, WasiConfig):
            swap(model, state_dict, adapter_name, config)
        else:
            swap_lora(model, state_dict, adapter_name, config, *args, **kwargs)

    hotswap_adapter_from_state_dict._wasi = True  # type: ignore[attr-defined]
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict


def swap(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: WasiConfig) -> None:
    """Give an adapter the factors, biases, vectors and whole modules of another one.

    Args:
        model: PEFT's model with the adapter, compiled or not.
        state_dict: Of the other one, its keys with the adapter's name at the end or before the last part, where PEFT
            puts it.
        adapter_name: The adapter.
        config: Of the other one.

    Raises:
        ValueError: If there is no such adapter, it is merged, its base was compiled before it had one, or the two do
            not fit. Nothing has changed then.
    """
    model = model._modules.get("_orig_mod") or model  # what PEFT's model would look up in its base, too
    configs: Mapping[str, WasiConfig] = model.peft_config  # type: ignore[assignment]
    if adapter_name not in configs:
        raise ValueError(f"adapter_name must name an adapter of the model, {sorted(configs)}, got {adapter_name!r}.")
    if any(plain_name(name) != name for name, _ in wasi_layers(model)):
        raise ValueError(
            "an adapter cannot be swapped inside a base model that was compiled before it had one, got "
            "torch.compile's module in it. Compile what get_peft_model answers instead."
        )
    layers = {
        plain_name(name).removeprefix(PEFT_PREFIX): layer
        for name, layer in wasi_layers(model)
        if adapter_name in layer.wasi_form
    }
    merged = next((name for name, layer in layers.items() if adapter_name in layer.merged_adapters), None)
    if merged is not None:
        raise ValueError(f"{merged}: an adapter that is merged cannot be swapped, call unmerge_adapter() first.")
    ranks = config.ranks or {}
    different = sorted(set(ranks).symmetric_difference(layers))
    if different:
        raise ValueError(
            f"{different[0]}: an adapter can take another's place on the same layers, {len(different)} are of one of "
            "them only. Load it beside the other, by load_adapter() and set_adapter()."
        )
    own = {name: layer.form_of(adapter_name).weight_rank for name, layer in layers.items()}
    other = [name for name, rank in ranks.items() if rank != own[name]]
    if other:
        raise ValueError(
            f"{other[0]}: an adapter that takes another's place must have its ranks, {own[other[0]]} here, got "
            f"{ranks[other[0]]} ({len(other)} layers differ). Load it beside the other, by load_adapter() and "
            "set_adapter()."
        )
    set_peft_model_state_dict(
        model, {_saved_key(key, adapter_name): value for key, value in state_dict.items()}, adapter_name
    )
    for layer in layers.values():
        layer.inputs.clear()


def _saved_key(key: str, adapter_name: str) -> str:
    """A key as it is in a file."""
    head, form, part = key.partition(FORM)
    return head + form + part.replace(f".{adapter_name}", "", 1)
