"""Adapters of factors with their base models, of which the weights that the factors replaced are never read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..files.objects import read_object
from ..forms.attention import PROJECTIONS
from ..models.experts import packed_experts
from ..tuner.config import WasiConfig
from .compressed import check_shapes, shapes_of

METHOD = "wasi_absent"  # of transformers' quantizers, for the time of loading


def load_adapter(
    folder: str | os.PathLike[str],
    *,
    model_class: Any = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    **options: Any,
) -> PeftModel:
    """Load a saved adapter and its base model in one line, without the dense weights that its factors replace.

    Everything else of the base model is read as ever, packed experts and the projections of `nn.MultiheadAttention`
    too. Beside a residual, and with `base_weight="keep"` or "cpu", the dense weights are needed, and read too; a base
    that is small to load is a compressed model ([`compress`]), which is read whole.

    Args:
        folder: Of the adapter, or its hub id.
        model_class: Class or auto class of the base model; by default that with which the adapter was saved.
        adapter_name: What to call it.
        is_trainable: Whether it is going to train.
        revision: Of the adapter's hub id.
        **options: Of the base model's `from_pretrained`, such as `num_labels` of a new head, or `dtype`.

    Returns:
        The PEFT model, in evaluation mode unless it trains.

    Raises:
        ValueError: If the adapter is no WASI adapter or does not name its base, or what is loaded does not fit.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> folder = getfixture("tmp_path")
        >>> vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> ViTForImageClassification(vit).save_pretrained(folder / "base")
        >>> base = ViTForImageClassification.from_pretrained(folder / "base")
        >>> peft.get_peft_model(base, WasiConfig(weight_rank=4, residual=None)).save_pretrained(folder / "adapter")
        >>> model = load_adapter(folder / "adapter")
        >>> any(parameter.is_meta for parameter in model.parameters())
        False
    """
    config = read_adapter_config(folder, **({} if revision is None else {"revision": revision}))
    if not isinstance(config, WasiConfig):
        raise ValueError(f"{folder}: must be an adapter of type WASI, got {config.peft_type}.")
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder}: the adapter does not name its base model; load that and use PeftModel.")
    path = os.path.join(base, transformers.utils.CONFIG_NAME)
    if os.path.isfile(path):
        read_object(path)  # which names it where it is none
    absent = [name for name in config.ranks or {} if config.base_form_of(name) == "release"]
    if absent and not _is_quantized(base, config.revision):
        options["quantization_config"] = _AbsentConfig(absent)
    model_class = model_class or _saved_class(folder, config)
    model = model_class.from_pretrained(base, revision=config.revision, **options)
    loaded = PeftModel.from_pretrained(
        model,
        os.fspath(folder),
        adapter_name=adapter_name,
        is_trainable=is_trainable,
        low_cpu_mem_usage=True,
        **({} if revision is None else {"revision": revision}),
    )
    _take_dtypes_of_base(loaded, adapter_name)
    return loaded


def read_adapter_config(folder: str | os.PathLike[str], **options: Any) -> PeftConfig:
    """The configuration of an adapter.

    Args:
        folder: Of the adapter, or its hub id.
        **options: Where to find that, such as `revision`.

    Raises:
        ValueError: If there is none, or it is none of an adapter that PEFT knows.
    """
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return PeftConfig.from_pretrained(os.fspath(folder), **options)
    read_object(path)
    try:
        return PeftConfig.from_pretrained(os.fspath(folder), **options)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: must be the configuration of an adapter: {error!r}") from error


def _take_dtypes_of_base(model: nn.Module, adapter_name: str) -> None:
    """Have modules that an adapter holds whole in the dtypes of the base's own; `low_cpu_mem_usage` has the file's."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for saved, own in zip(
                _tensors(wrapper.modules_to_save[adapter_name]), _tensors(wrapper.original_module), strict=True
            ):
                if saved.is_floating_point() and own.is_floating_point():
                    saved.data = saved.data.to(own.dtype)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _saved_class(folder: Any, config: WasiConfig) -> Any:
    """The class of the base model that an adapter was saved with, or the auto class of its task."""
    if config.task_type is not None:
        for auto in vars(peft.auto).values():
            wrapper = getattr(auto, "_target_peft_class", None)
            if wrapper is not None and wrapper is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type):
                return auto._target_class
    mapping = config.auto_mapping or {}
    library, name = str(mapping.get("parent_library", "")), mapping.get("base_model_class", "")
    found = getattr(transformers, name, None) if library.partition(".")[0] == "transformers" else None
    if found is None:
        raise ValueError(f"{folder}: the adapter does not say which class its base model has; pass model_class.")
    return found


def _unowned_weights(model: nn.Module) -> Iterator[str]:
    """Names that an adapter gives to weights which no layer of a dense model owns; they are read."""
    for name, _, packed in packed_experts(model):
        yield from (f"{name}.{parameter}" for parameter in packed)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from (f"{name}.{projection}" for projection in (*PROJECTIONS, "out_proj"))


def _is_quantized(base: str, revision: str | None) -> bool:
    """Whether a checkpoint is one in few bits or in other forms, of which adapters need every layer."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    settings, _ = PretrainedConfig.get_config_dict(base, **options)
    return settings.get("quantization_config") is not None


class _AbsentConfig(QuantizationConfigMixin):
    """Names the layers whose weights are not to be read."""

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self.quant_method = METHOD
        self.layers = list(layers)


class _AbsentQuantizer(HfQuantizer):
    """Has transformers load a model without some layers, which stay on the meta device; nothing of it remains."""

    quantization_config: _AbsentConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self._hidden: dict[str, dict[str, nn.Parameter | None]] = {}
        unowned = set(_unowned_weights(model))
        for name in self.quantization_config.layers:
            if name in unowned:
                continue
            try:
                layer = model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"{name}: the adapter belongs to another model, which has this layer.") from error
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise ValueError(
                    f"{name}: must be a Linear, got {type(layer).__name__}: the adapter is of another model."
                )
            self._hidden[name] = {key: layer._parameters.pop(key) for key in ("weight", "bias")}
            for key, parameter in self._hidden[name].items():  # seen by those who ask, not by the loader
                layer.__dict__[key] = None if parameter is None else torch.empty_like(parameter, device="meta")
        ignored = [rf"(^|\.){name.replace('.', chr(92) + '.')}\.(weight|bias)$" for name in self._hidden]
        self._shapes = shapes_of(model)
        self._ignored = model._keys_to_ignore_on_load_unexpected
        kind = set if self._ignored is None else type(self._ignored)
        model._keys_to_ignore_on_load_unexpected = kind([*(self._ignored or ()), *ignored])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        check_shapes(model, self._shapes)
        for name, parameters in self._hidden.items():
            layer = model.get_submodule(name)
            for key, parameter in parameters.items():
                del layer.__dict__[key]
                layer.register_parameter(key, parameter)
        model._keys_to_ignore_on_load_unexpected = self._ignored
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _AbsentConfig
AUTO_QUANTIZER_MAPPING[METHOD] = _AbsentQuantizer
