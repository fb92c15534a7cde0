"""The tuner: injects the layers, decides what trains, translates the adapter's state dict."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..forms.dense import dense_bias, dense_weight
from ..linalg.spectra import factorize_weight, rank_for_threshold
from ..memory.modes import apply_memory_mode, check_memory_mode, leave_memory_mode
from ..ranks.allocate import allocate_ranks
from ..ranks.spectrum import LayerSpectrum
from ..updates.base import InitialFactors
from .config import WasiConfig
from .layer import RELEASED, Linear, WasiLayer, wasi_layers
from .prepared import PreparedLayer, check_prepared, take_prepared
from .summary import WasiSummary, wasi_summary
from .targets import asked_rank, check_targets, fixed_rank, resolve_targets, selected_modules, vector_parameter_names

logger = logging.getLogger(__name__)

PLAIN_SVD_WARNING = (
    "The initial factors come from a plain truncated SVD of the weights. On pretrained models this usually destroys "
    "what the model knows at any rank that saves something (docs/benchmarks has a measured case). Run "
    "wasi_peft.preprocess_wasi(model, config, dataloader) first, or load an adapter."
)


def rank_for(asked: int | float, energies: torch.Tensor) -> int:
    """K as asked for: a rank (int), or the smallest whose energies reach a threshold (float)."""
    return asked if isinstance(asked, int) else rank_for_threshold(energies, asked)


def initial_rank(rank: int, update_rank: int, shape: Sequence[int]) -> int:
    """Directions that a layer starts with: K, and those of the update as far as the weight, (out, in), has them."""
    return min(rank + update_rank, *shape)


def _dense_parts(target: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense weight, in Linear layout, and bias of a target, which may be a layer with another adapter."""
    if isinstance(target, WasiLayer):
        return target._base_weight(), target._base_bias()
    return dense_weight(target), dense_bias(target)


def _shared_ranks(
    targets: dict[str, nn.Module], prepared: dict[str, PreparedLayer], config: WasiConfig
) -> dict[str, int]:
    """Ranks of all targets under `weight_share`: those they were prepared at, else allocated from their weights.

    Energies of plain weights are not comparable between layers, so each counts as a share of its layer's total.

    Raises:
        ValueError: If only some of the targets were prepared.
    """
    if prepared:
        missing = sorted(set(targets) - set(prepared))
        if missing:
            raise ValueError(
                f"{missing[0]}: preprocess_wasi did not prepare this layer ({len(missing)} in all), so the share of "
                "all layers is unknown. Run preprocess_wasi again with this configuration."
            )
        return {name: layer.rank for name, layer in prepared.items()}
    spectra = []
    for name, module in targets.items():
        weight, _ = _dense_parts(module)
        energies = torch.linalg.svdvals(weight.double()).square()
        shares = energies / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
        out_features, in_features = weight.shape
        energies = tuple(shares.tolist())
        sizes = out_features, in_features
        spectra.append(LayerSpectrum(name, *sizes, name, energies, {}, config.reserved_rank, config.has_core))
    assert config.weight_share is not None
    return allocate_ranks(spectra, config.weight_share)


class WasiModel(BaseTuner):
    """Weight-activation subspace iteration (arXiv 2510.09160) with weights that really are gone.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`): The model to be adapted.
        config ([`WasiConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`): Create empty adapter weights on meta device.

    Example:
        ```py
        >>> import wasi_peft
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification

        >>> vit_config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTForImageClassification(vit_config)
        >>> model = get_peft_model(model, wasi_peft.WasiConfig(weight_rank=4))
        >>> len(model.wasi_summary().layers)
        6

        ```
    """

    prefix: str = "wasi_"
    tuner_layer_cls = WasiLayer
    target_module_mapping: dict[str, list[str]] = {}

    def wasi_summary(self, adapter_name: str | None = None) -> WasiSummary:
        """Layers, ranks and share of weights kept of an adapter (the active one by default)."""
        return wasi_summary(self.model, adapter_name or self.active_adapters[0])

    # ---------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the target modules; afterwards one log line says what it amounts to."""
        self._used_plain_svd = False
        self._loading_group: dict[str, WasiLayer] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        apply_memory_mode(model, self.peft_config[adapter_name])
        if self._used_plain_svd:
            warnings.warn(PLAIN_SVD_WARNING, UserWarning, stacklevel=2)
        summary = wasi_summary(model, adapter_name)
        logger.log(logging.WARNING if summary.past_break_even else logging.INFO, summary.headline())

    def _prepare_adapter_config(self, peft_config: WasiConfig, model_config: dict[str, Any]) -> WasiConfig:
        resolve_targets(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: WasiConfig, model: nn.Module) -> None:
        """Everything that can be wrong is found here, before the first layer is replaced."""
        check_targets(model, peft_config)
        check_memory_mode(model, peft_config)
        if not peft_config.init_weights:
            return
        targets = dict(selected_modules(model, peft_config))
        prepared = check_prepared(targets, peft_config)
        if peft_config.weight_share is not None:
            peft_config.ranks = _shared_ranks(targets, prepared, peft_config)
            return
        peft_config.ranks = {}

    def _check_new_adapter_config(self, config: WasiConfig) -> None:
        others = [other for other in self.peft_config.values() if other is not config]
        for name in ("memory_mode", "saved_tensors"):
            values = [getattr(other, name) for other in [*others, config]]
            if len(set(values)) > 1:
                raise ValueError(f"All adapters of a model must have the same {name}, got {values}.")
        for name in ("train_vectors", "bias"):
            shared = {"train_vectors": True, "bias": "all"}[name]
            values = [getattr(other, name) for other in [*others, config]]
            if others and shared in values:
                raise ValueError(
                    f"Only one adapter can have {name}={shared!r}, because it trains parameters of the base model "
                    f"that all adapters share; got {values} for {len(values)} adapters."
                )

    def _create_and_replace(
        self,
        peft_config: WasiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        initial = None
        if peft_config.init_weights:
            initial, rank = self._initial_factors(peft_config, target, current_key)
            assert peft_config.ranks is not None
            peft_config.ranks[current_key] = rank
        else:
            given = fixed_rank(current_key, peft_config)
            assert given is not None  # check_targets saw to it
            rank = given
        if isinstance(target, WasiLayer):
            target.update_layer(adapter_name, peft_config, current_key, rank, initial)
            if initial is None:
                target.await_loading(self._loading_group, current_key)
            return
        layer = Linear(target, adapter_name, peft_config, current_key, rank, initial)
        if initial is None:
            layer.await_loading(self._loading_group, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        # another adapter that does not target this layer still needs it dense
        layer.release_base("keep" if len(self.peft_config) > 1 else peft_config.base_weight)

    def _initial_factors(self, config: WasiConfig, target: nn.Module, name: str) -> tuple[InitialFactors, int]:
        prepared = take_prepared(target)
        weight, bias = _dense_parts(target)
        if prepared is not None:
            return prepared.initial, prepared.rank
        asked = asked_rank(name, config)

        def directions(energies: torch.Tensor) -> int:
            return initial_rank(rank_for(asked, energies), config.reserved_rank, weight.shape)

        L, R, energies = factorize_weight(weight, directions)
        self._used_plain_svd |= L.shape[1] < min(weight.shape)
        return InitialFactors(L, R, bias), rank_for(asked, energies)

    # ---------------------------------------------------------------- what trains

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The factors are the weight: they keep the dtype of the model, whatever `autocast_adapter_dtype` says."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for _, layer in wasi_layers(model):
            for parameter in layer.base_layer.parameters():
                parameter.requires_grad = False  # bias="all" means the adapter's bias, not the unused one below it
            for name, parameter in layer.wasi_bias.items():
                if self.peft_config[name].inference_mode:
                    parameter.requires_grad = False
        configs = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if any(config.train_vectors and not config.inference_mode for config in configs):
            parameters = dict(model.named_parameters())
            for name in vector_parameter_names(model):
                parameters[name].requires_grad = True

    # ---------------------------------------------------------------- base model

    def _require_base(self, action: str) -> None:
        for name, layer in wasi_layers(self.model):
            if layer.base_is_released:
                raise ValueError(f"{name}: {RELEASED.format(action=action)}")

    def disable_adapter_layers(self) -> None:
        """Switch to the base model's weights; needs `base_weight="keep"` or "cpu"."""
        self._require_base("disabling the adapter")
        if any(self.peft_config[name].train_vectors for name in self.active_adapters):
            warnings.warn(
                "Disabling a WASI adapter with train_vectors=True leaves the trained norms, layer scales and tokens "
                "in place, so the output is not that of the base model once they were trained.",
                stacklevel=2,
            )
        self._enable_adapter_layers(enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the last one only where the dense weights were kept."""
        if set(self.peft_config) == {adapter_name}:
            self._require_base(f"deleting the only adapter ({adapter_name!r})")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model with its original weights; needs `base_weight="keep"` or "cpu"."""
        self._require_base("unloading without merging")
        return super().unload()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        leave_memory_mode(model)
        return model

    # ---------------------------------------------------------------- state dict

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: WasiConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # contiguous: L and B may be transposed views (`lay_side_by_side`), which files cannot hold
        selected = {key: value.contiguous() for key, value in selected.items() if ".base_layer." not in key}
        if config.train_vectors:
            selected.update({name: state_dict[name] for name in vector_parameter_names(model) if name in state_dict})
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls._check_loadable(model, config, adapter_name, remapped)
        return remapped

    @staticmethod
    def _check_loadable(
        model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> None:
        """Refuse, before anything is copied, a state dict that lacks a factor, has another shape, or holds NaN."""
        own = model.state_dict()
        for module_name, layer in wasi_layers(model):
            for part in layer.adapter_layer_names:
                if adapter_name not in getattr(layer, part):
                    continue
                key = f"{module_name}.{part}.{adapter_name}"
                value = state_dict.get(key)
                if value is None:
                    raise ValueError(f"{module_name}: the adapter lacks {part}; it is incomplete or of another model.")
                if value.shape != own[key].shape:
                    raise ValueError(
                        f"{module_name}: {part} must have shape {tuple(own[key].shape)}, got {tuple(value.shape)}. "
                        "The adapter belongs to another model or has other ranks."
                    )
        vectors = vector_parameter_names(model) if config.train_vectors else ()
        for key in vectors:
            if key not in state_dict and f"base_model.model.{key}" not in state_dict:
                raise ValueError(f"{key}: the adapter lacks this vector; it is incomplete or of another model.")
        for key, value in state_dict.items():
            if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key}: the adapter file holds NaN or Inf.")
