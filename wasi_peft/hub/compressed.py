"""Compressed checkpoints: forms in a model without an adapter, saved and loaded by transformers itself.

A compressed model is an ordinary transformers model some of whose Linear layers are
:class:`forms.compressed.CompressedLinear`, and packed experts
:class:`forms.compressed_stack.CompressedStack`. What is which is in its config (:class:`WasiQuantizationConfig`), so
`save_pretrained` and `from_pretrained` need nothing but the import of this package: transformers asks the quantizer
registered here to put empty layers of the right sizes into the skeleton, and no dense weight is ever allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..factors.data import CalibrationData
from ..factors.prepare import drop_all_prepared, preprocess_wasi
from ..forms.compressed import Compressed
from ..forms.compressed_stack import accept_stored_names
from ..forms.compressing import from_stored, stack_from_stored
from ..forms.dense import weight_shape
from ..forms.residual import Layout
from ..forms.stored import StoredForm, key_of, stored_layout
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from ..tuner.config import WasiConfig
from ..tuner.layer import wasi_layers
from ..tuner.model import WasiModel
from .claims import check_files

METHOD = "wasi"
FORMAT_VERSION = 1


class WasiQuantizationConfig(QuantizationConfigMixin):
    """What a compressed model's `config.json` says of its layers.

    Args:
        layers: By name of the module, or of the packed parameter, what :class:`forms.stored.StoredForm` says of it:
            `{"form": "factors" | "int8" | "int4" | ..., "rank": directions of the factors}`.
        format_version: Of the checkpoint, 1.

    Raises:
        ValueError: If there are no layers, an entry is no such dict, or the version is another one.
    """

    def __init__(
        self, layers: Mapping[str, Mapping[str, Any]] | None = None, format_version: int = FORMAT_VERSION, **_: Any
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this version of wasi_peft reads compressed checkpoints of format_version {FORMAT_VERSION}, got "
                f"{format_version!r}. Install the version that wrote it."
            )
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"layers of a compressed checkpoint must be a dict by module name, got {layers!r}.")
        for name, entry in layers.items():
            if not _is_entry(entry):
                raise ValueError(
                    f"layers[{name!r}] must have the keys form (a string) and rank (an integer, at least 0), and may "
                    f"have side_rank (the same) and bits (strings by name), got {entry!r}."
                )
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.layers = {name: dict(entry) for name, entry in layers.items()}


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not {"form", "rank"} <= set(entry) <= {*StoredForm._fields}:
        return False
    bits = entry.get("bits", {})
    ranks = entry["rank"], entry.get("side_rank", 0)
    return (
        all(type(rank) is int and rank >= 0 for rank in ranks)
        and isinstance(bits, Mapping)
        and all(type(text) is str for text in (entry["form"], *bits, *bits.values()))
    )


class WasiQuantizer(HfQuantizer):
    """How transformers loads and saves a compressed model; not called by hand."""

    quantization_config: WasiQuantizationConfig
    requires_calibration = True  # `from_pretrained(dense, quantization_config=...)` cannot compress: see compress

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to leave compressed layers on disk."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError("a compressed model cannot be offloaded to disk: its layers are small; got device_map.")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> None:
        dtype = dtype or model.dtype
        loading: dict[str, _Loading] = {}
        layouts: dict[str, Layout] = {}
        expose_experts(model)
        for name, module_name in _names_in(model, self.quantization_config.layers).items():
            module, entry = model.get_submodule(module_name), StoredForm(**self.quantization_config.layers[name])
            shape: tuple[int, ...] = weight_shape(module)
            transposed = None
            if isinstance(module, ExpertStack):
                shape, transposed = (module.experts, *shape), module.transposed
            try:
                layouts[name] = stored_layout(entry, shape, module.bias is not None, dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            loading[module_name] = _Loading(entry, shape, type(module), dtype, layouts[name], transposed)
        conceal_experts(model)
        check_files(model, layouts, checkpoint_files)
        for module_name, each in loading.items():
            each.make_room(model, module_name)
        self._loading = loading
        self._shapes = shapes_of(model)
        layers = self.quantization_config.layers
        known = {module_name: layers[name] for module_name, name in zip(loading, layouts, strict=True)}
        self.quantization_config = WasiQuantizationConfig(known)  # by their names in this model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        check_shapes(model, self._shapes)
        for name, each in self._loading.items():
            each.finish(model, name)
        accept_stored_names(model)
        del self._loading, self._shapes
        _own_names(model)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with the tensors of compressed layers under the names that they have in files."""
        found = dict(compressed_layers(model))
        if not getattr(model, "_hf_peft_config_loaded", False):  # of transformers' own adapters no base is saved
            adapted = next((name for name in found if name.endswith(".base_layer")), None)
            if adapted is not None:
                raise ValueError(
                    f"{adapted.removesuffix('.base_layer')}: there is an adapter on this layer. Save the PEFT model, "
                    "or merge the adapter first."
                )
            _renew_mark(model)  # layers may have changed
        state = model.state_dict()
        for name, layer in found.items():
            for stored, own in layer.stored_names.items():
                state[key_of(name, stored, layer.packed)] = state.pop(f"{name}.{own}")
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        _restore_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Loading(NamedTuple):
    """What a layer becomes once its tensors are there (:mod:`forms.compressing`).

    While transformers loads them, they have the names of the file.
    """

    stored: StoredForm
    shape: tuple[int, ...]
    dense_class: type[nn.Module]
    dtype: torch.dtype
    layout: Layout
    transposed: bool | None  # of packed experts, whether model code reads them so; None for a linear layer

    def make_room(self, model: nn.Module, name: str) -> None:
        """Put empty tensors where those of a file go."""
        tensors = {
            part: torch.empty(shape, dtype=dtype, device="meta") for part, (shape, dtype) in self.layout.items()
        }
        parameters = {part: nn.Parameter(tensor, requires_grad=False) for part, tensor in tensors.items()}
        if self.transposed is None:
            model.set_submodule(name, _Stored(parameters))
            return
        parent, leaf = _place(model, name)
        del parent._parameters[leaf]
        for part, parameter in parameters.items():
            parent.register_parameter(key_of(leaf, part, packed=True), parameter)

    def finish(self, model: nn.Module, name: str) -> None:
        """Make a layer of the tensors that have come."""
        layer: nn.Module
        if self.transposed is None:
            stored = model.get_submodule(name)
            parts = {part: tensor.detach() for part, tensor in stored.named_parameters()}
            out_features, in_features = self.shape
            sizes = (out_features, in_features)
            layer = from_stored(self.stored, parts, sizes, self.dense_class, self.dtype).train(stored.training)
            hook = getattr(stored, "_hf_hook", None)
            if hook is not None:
                remove_hook_from_module(stored)
                add_hook_to_module(layer, hook)
            model.set_submodule(name, layer)
            return
        parent, leaf = _place(model, name)
        keys = {part: key_of(leaf, part, packed=True) for part in self.layout}
        parts = {part: parent.get_parameter(key).detach() for part, key in keys.items()}
        for key in keys.values():
            del parent._parameters[key]
        layer = stack_from_stored(self.stored, parts, self.shape, self.transposed, self.dtype)
        parent.add_module(leaf, layer.train(parent.training))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the compressed layers and packed experts of a model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Compressed))


def _restore_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    for name, layer in list(compressed_layers(model)):
        model.set_submodule(name, layer.to_dense().to(dtype))
    conceal_experts(model)


class _Stored(nn.Module):
    """The tensors of a layer under the names that they have in the file, while transformers loads them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all parameters, by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_shapes(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse parameters that do not have the shapes of the model that they were loaded into.

    Before it asked quantizers, transformers took all shapes where there was one, and so the head of a checkpoint for a
    new one.

    Raises:
        ValueError: If one has another shape.
    """
    for name, shape in shapes_of(model).items():
        if shapes.get(name, shape) != shape:
            raise ValueError(
                f"{name}: must have shape {tuple(shapes[name])}, got {tuple(shape)} from the checkpoint, which this "
                "version of transformers cannot leave out here. Load the model as it was saved and replace the head, "
                "or install a newer transformers."
            )


def _own_names(model: PreTrainedModel) -> None:
    """Have the model saved under the names that its modules have: files of other names hold dense weights."""
    model._weight_conversions = []


def _candidates(model: PreTrainedModel, name: str) -> Iterator[str]:
    """What a module of a checkpoint may be called in a model with or without the head."""
    prefix = f"{model.base_model_prefix}."
    yield name
    yield prefix + name
    if name.startswith(prefix):
        yield name.removeprefix(prefix)


def _names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names of layers in the model by those in a checkpoint, in the model's order.

    Models with another head or none lack those of the head.

    Raises:
        ValueError: If the model does not have one, or it is no linear layer.
    """
    modules, found = dict(model.named_modules()), {}
    same = type(model).__name__ in (model.config.architectures or ())
    for name in names:
        known = next((other for other in _candidates(model, name) if other in modules), None)
        if known is None and not same and not name.startswith(f"{model.base_model_prefix}."):
            continue
        if known is None or not isinstance(modules[known], (nn.Linear, Conv1D, ExpertStack)):
            kind = "no such module" if known is None else type(modules[known]).__name__
            raise ValueError(
                f"{name}: the compressed checkpoint is of another model; it must be a Linear or packed experts, got "
                f"{kind}."
            )
        found[name] = known
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda names: order[names[1]]))


# ---------------------------------------------------------------- making one


def compress(
    model: nn.Module,
    config: WasiConfig | None = None,
    data: CalibrationData | None = None,
    *,
    adapter_name: str | None = None,
    **options: Any,
) -> nn.Module:
    """Put forms in place of the dense weights of a model, without an adapter: a small model of its own.

    `save_pretrained` and `push_to_hub` write it, and after `import wasi_peft` anybody reads it by
    `AutoModel....from_pretrained` in one line, without the dense weights. Adapters (WASI, LoRA) train on it, and
    `dequantize()` is the dense model again. Layers that a form would not make smaller stay dense. Packed experts are
    compressed with the linear layers.

    What fails or is interrupted leaves a dense model dense, and what trains as it was. Its weights are as before while
    the forms are made; after that they are those of the forms, rounded or of fewer ranks.

    Args:
        model: A dense transformers model, which is changed; or a PEFT model with a WASI adapter, whose layers become
            compressed ones that compute what the adapter computes.
        config: Which form, as for `get_peft_model`, and which layers; by default 8 bits. Not with a PEFT model.
        data: Calibration batches, see [`preprocess_wasi`]: what factors need, and what improves weights in 4 bits.
        adapter_name: Of a PEFT model; by default the active one.
        **options: Of [`preprocess_wasi`].

    Returns:
        The compressed model: the same object for a dense one.

    Raises:
        ValueError: If a PEFT model comes with a configuration or data, the configuration keeps the dense weights
            (`residual="exact"`), or no layer would be smaller (the model then has dense layers again); and whatever
            the preparation or the injection finds, with the model as it was.
        TypeError: If a PEFT model's adapter is no WASI adapter, or an argument has another type.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> model = compress(ViTForImageClassification(vit))
        >>> [name for name, _ in compressed_layers(model)][-2:]
        ['vit.layers.0.mlp.fc1', 'vit.layers.0.mlp.fc2']
    """
    if not isinstance(model, nn.Module) or not isinstance(config, (WasiConfig, type(None))):
        raise TypeError(
            f"compress takes a model and a WasiConfig, got {type(model).__name__} and {type(config).__name__}."
        )
    if isinstance(model, PeftModel):
        if config is not None or data is not None or options:
            raise ValueError("an adapter has its forms already: leave config, data and their options out, got some.")
        if not isinstance(model.base_model, WasiModel):
            raise TypeError(f"the adapter must be a WASI adapter, got {type(model.base_model).__name__}.")
        tuner = model.base_model
        adapter_name = adapter_name or model.active_adapter
        if not any(adapter_name in layer.wasi_form for _, layer in wasi_layers(model)):
            raise ValueError(f"adapter_name must be one of {sorted(tuner.peft_config)}, got {adapter_name!r}.")
    else:
        if adapter_name is not None:
            raise ValueError(f"adapter_name is for a PEFT model; leave it out for a dense one, got {adapter_name!r}.")
        if any(compressed_layers(model)):
            raise ValueError("the model is compressed already; restore its dense layers first, by model.dequantize().")
        config = WasiConfig() if config is None else copy.copy(config)
        config.inference_mode = True  # nothing is going to train
        if config.residual == "exact":
            raise ValueError("residual='exact' keeps the dense weights; choose 'int8', 'int4' or factors.")
        return _compress_dense(model, config, data, **options)
    names = None if adapter_name is None else [adapter_name]
    return mark_compressed(tuner.merge_and_unload(adapter_names=names, dense=False))


def _compress_dense(model: nn.Module, config: WasiConfig, data: CalibrationData | None, **options: Any) -> nn.Module:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if data is not None:
        preprocess_wasi(model, config, data, **options)
    try:
        tuner = get_peft_model(model, config).base_model
    except BaseException:
        if data is not None:
            drop_all_prepared(model)
        raise
    try:
        return mark_compressed(tuner.merge_and_unload(dense=False))
    except BaseException:
        tuner.merge_and_unload(dense=True)
        _restore_dense(model)
        _renew_mark(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        raise


def mark_compressed(model: nn.Module) -> nn.Module:
    """Have a transformers model with compressed layers saved as one.

    Raises:
        ValueError: If it has none.
    """
    layers = {name: layer.stored_form.entry() for name, layer in compressed_layers(model)}
    config = quantization_config(layers)
    accept_stored_names(model)
    if isinstance(model, PreTrainedModel):
        quantizer = WasiQuantizer(config, pre_quantized=True)
        model.hf_quantizer = quantizer
        model.is_quantized, model.quantization_method = True, METHOD
        model.config.quantization_config, model.config._is_quantized = config, True
        _own_names(model)
    return model


def quantization_config(layers: Mapping[str, Mapping[str, Any]]) -> WasiQuantizationConfig:
    """What a config says of all compressed layers, by name.

    Raises:
        ValueError: If there is none.
    """
    if not layers:
        raise ValueError("no layer became smaller, so there is nothing to save in another form; choose fewer ranks.")
    return WasiQuantizationConfig(layers)


def _renew_mark(model: nn.Module) -> None:
    """Have a model whose layers have changed saved as what it is now: compressed, in these forms, or dense."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if any(compressed_layers(model)):
        mark_compressed(model)
    elif isinstance(model, PreTrainedModel) and isinstance(quantizer, WasiQuantizer):
        quantizer.remove_quantization_config(model)
        model.config._is_quantized = False


WasiModel.after_unloading.append(_renew_mark)
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = WasiQuantizationConfig
AUTO_QUANTIZER_MAPPING[METHOD] = WasiQuantizer
