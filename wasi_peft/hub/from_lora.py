"""A saved LoRA adapter as the start of an adapter beside frozen weights: its product `s B A` becomes `L R`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..forms.residual import ResidualLinear
from ..linalg.sums import compressed_sum, stacked_sum
from ..tuner.layer import WasiLayer, wasi_layers
from ..tuner.targets import plain_name
from ..updates.resizing import set_part
from .adapters import read_adapter_config

logger = logging.getLogger(__name__)

_KEY = "base_model.model."
_MERGE = "Merge it into the base by LoRA's merge_and_unload(), and adapt what comes out."
# starts of LoRA that change the base, which its file does not have, or that PEFT computes otherwise when it loads it
_OWN_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
_OTHERWISE = (
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
)
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "moved_bias", ".base_layer.bias": "bias"}


@dataclass
class _Addition:
    """What LoRA adds to one layer, scaled: `B A`, and to its bias, or what the bias became."""

    A: Tensor | None = None
    B: Tensor | None = None
    moved_bias: Tensor | None = None
    bias: Tensor | None = None


@torch.no_grad()
def start_from_lora(
    model: PeftModel, lora: str | os.PathLike[str], adapter_name: str | None = None, **options: Any
) -> None:
    """Have an adapter beside frozen weights start from a saved LoRA adapter of the same base model.

    The product of LoRA, scaled, is added to that of the adapter, exactly where K is enough for both, else as the best
    approximation of rank K (Eckart-Young); the product itself is never formed. A fresh adapter adds nothing yet, so K
    of the rank of LoRA is enough. Modules that LoRA trained whole, such as a head, and biases are taken over too.
    Layers without LoRA stay as they are.

    Args:
        model: A PEFT model with a WASI adapter that has a residual, `WasiConfig()`, not trained yet.
        lora: Folder or hub id of the LoRA adapter.
        adapter_name: The adapter that starts from it, by default the active one.
        **options: Of the hub, such as `revision` and `subfolder`.

    Raises:
        ValueError: If `lora` is something else than additions of low rank and whole modules, or is of layers, biases
            or modules that the adapter does not have, or the adapter has no residual. Nothing has changed then.

    Example:
        >>> from peft import get_peft_model
        >>> from wasi_peft import WasiConfig
        >>> layers, folder = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), getfixture("tmp_path")
        >>> lora = get_peft_model(layers, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(3, 16)
        >>> expected = lora(x)
        >>> lora.save_pretrained(folder)
        >>> config = WasiConfig(residual="exact", weight_rank=8, target_modules=["0"])
        >>> model = get_peft_model(lora.unload(), config)
        >>> start_from_lora(model, folder)
        >>> torch.allclose(model(x), expected, atol=1e-5)
        True
    """
    name = str(model.active_adapter) if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"adapter_name must name an adapter of the model, {sorted(model.peft_config)}, got {name!r}.")
    settings = read_adapter_config(lora, **options)
    _check_settings(lora, settings)
    base = model.get_base_model()
    layers = {plain_name(key): layer for key, layer in wasi_layers(base) if name in layer.wasi_form}
    wrappers = {
        plain_name(key): module.modules_to_save[name]
        for key, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }
    merged = next((key for key, layer in layers.items() if name in layer.merged_adapters), None)
    if merged is not None:
        raise ValueError(f"{merged}: {name!r} is merged, so its factors do not answer; call unmerge_adapter() first.")
    additions: dict[str, _Addition] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for key, value in load_peft_weights(os.fspath(lora), device="cpu", **options).items():
        key = plain_name(key).removeprefix(_KEY)
        owner = next((module for module in wrappers if key.startswith(f"{module}.")), None)
        if owner is not None:
            whole.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = value
        elif not _read(key, value, additions):
            kind = "a module that the adapter does not save whole" if "lora_" not in key else "no addition of low rank"
            raise ValueError(
                f"{key}: this LoRA adapter holds it, which is {kind}; name it in modules_to_save. {_MERGE}"
            )
    for key, addition in additions.items():
        _check_addition(key, addition, layers.get(key), name)
    for key, state in whole.items():
        _check_whole(key, state, wrappers[key])

    lost = [_start_layer(layers[key].form_of(name), addition, settings, key) for key, addition in additions.items()]
    for key, state in whole.items():
        wrappers[key].load_state_dict(state)
    if any(lost):
        logger.warning(
            "K is less than LoRA's rank in %d of %d layers, which start from its best approximation: up to %.1f %% of "
            "the energy is lost.",
            sum(share > 0 for share in lost),
            len(lost),
            100 * max(lost),
        )


def _check_settings(lora: Any, settings: PeftConfig) -> None:
    if not isinstance(settings, LoraConfig):
        raise ValueError(f"{lora}: must be a LoRA adapter, got {settings.peft_type}.")
    start = str(settings.init_lora_weights).lower()
    if start.startswith(_OWN_BASE):
        raise ValueError(
            f"{lora}: init_lora_weights={settings.init_lora_weights!r} changes the base, so the adapter is no "
            "addition to the model as it is. path_initial_model_for_weight_conversion of save_pretrained makes it one."
        )
    other = next((option for option in _OTHERWISE if getattr(settings, option, None)), None)
    if other is not None:
        raise ValueError(f"{lora}: LoRA with {other} is no addition of low rank. {_MERGE}")


def _read(key: str, value: Tensor, additions: dict[str, _Addition]) -> bool:
    """Put a tensor of LoRA into its layer's addition; False for one that has no place there."""
    end = next((end for end in _PARTS if key.endswith(end)), None)
    if end is None:
        return False
    if value.dim() > 2:  # of a convolution, over patches
        value = value.flatten(1)
    setattr(additions.setdefault(key.removesuffix(end), _Addition()), _PARTS[end], value)
    return True


def _check_addition(key: str, addition: _Addition, layer: WasiLayer | None, name: str) -> None:
    if layer is None:
        raise ValueError(f"{key}: LoRA has trained this layer, and {name!r} is not on it; name it in target_modules.")
    if layer.experts > 1 or not isinstance(layer.form_of(name), ResidualLinear):
        raise ValueError(
            f"{key}: LoRA adds to a weight, so an adapter that starts from it must have a residual, as WasiConfig() "
            f"has. {_MERGE}"
        )
    A, B, form = addition.A, addition.B, layer.form_of(name)
    if A is None or B is None or A.shape[1] != form.in_features or len(B) != form.out_features:
        shapes = [None if factor is None else tuple(factor.shape) for factor in (B, A)]
        raise ValueError(
            f"{key}: LoRA's factors must be ({form.out_features}, r) and (r, {form.in_features}), got {shapes}: it is "
            "of another model."
        )
    has_bias = addition.moved_bias is not None or addition.bias is not None
    if has_bias and form.bias is None:
        raise ValueError(f"{key}: LoRA has trained a bias, and this layer has none. {_MERGE}")
    values = [value for value in vars(addition).values() if value is not None]
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(f"{key}: the LoRA adapter holds NaN or Inf.")


def _check_whole(key: str, state: Mapping[str, Tensor], module: nn.Module) -> None:
    there = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if there != given:
        raise ValueError(f"{key}: a module that is taken over whole must have {there}, got {given}.")


def _start_layer(form: Any, addition: _Addition, settings: Any, key: str) -> float:
    """Add to a form; returns the share of energy that its rank has no room for."""
    A, B = addition.A, addition.B
    assert A is not None and B is not None
    scale = _scale(settings, key)
    A, B = A.to(form.R.device).double(), scale * B.to(form.R.device).double()
    L, R = (part.detach().double() for part in form.factors())
    rank, lost = form.weight_rank, 0.0
    length = _length(R) / _length(A)  # so that learning rates keep their meaning
    A, B = A * length, B / length
    if bool(L.any()):
        B, A = stacked_sum([(L, R), (B, A)], [1.0, 1.0])
    if len(A) > rank:
        energy = _energy(B, A)
        B, A = compressed_sum(B, A, rank)
        lost = max(0.0, 1 - _energy(B, A) / energy) if energy > 0 else 0.0
    free = rank - len(A)  # directions that wait, as all do in a fresh adapter
    set_part(form.L, torch.cat([B, B.new_zeros(len(B), free)], 1))
    set_part(form.R, torch.cat([A, R[:free]]))
    if addition.bias is not None:
        form.bias.copy_(addition.bias)
    if addition.moved_bias is not None:
        form.bias.add_(scale * addition.moved_bias.to(form.bias))
    return lost


def _scale(settings: Any, key: str) -> float:
    """What LoRA multiplies a layer's product by."""
    ranks, alphas = settings.rank_pattern or {}, settings.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks, key), settings.r)
    alpha = alphas.get(get_pattern_key(alphas, key), settings.lora_alpha)
    return float(alpha / (math.sqrt(rank) if settings.use_rslora else rank))


def _length(rows: Tensor) -> Tensor:
    return rows.square().sum(1).mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)


def _energy(L: Tensor, R: Tensor) -> float:
    """`|L R|^2`, of the two small Gram matrices."""
    return float(((L.T @ L) * (R @ R.T)).sum())
