"""Factors beside a frozen weight as a LoRA adapter, the shape that servers of language models take."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from ..forms.compressed import CompressedResidual
from ..forms.dense import is_transposed
from ..forms.residual import ResidualLinear
from ..tuner.layer import WasiLayer, wasi_layers
from .cases import answered, cases_of, example_batch, tolerance_of
from .formats import Format, Source
from .plain import multiply_exactly, wasi_copy

logger = logging.getLogger(__name__)

ON_COMPRESSED = (
    "This LoRA adapter is for the compressed model %r, which needs wasi_peft. For programs that do not know it, write "
    "that model out dense too, by model.unload().dequantize().save_pretrained(folder)."
)
_KEY = "base_model.model."


@dataclass(frozen=True)
class LoraFormat(Format):
    """A LoRA adapter of rank and alpha K, which PEFT alone loads on the dense base model.

    `W + L R` in place of `Q + L R`: answers differ by what rounding the base loses, and not at all beside an exact
    weight. What is verified is that nothing else differs. Biases that trained become those of LoRA (`lora_bias`),
    which PEFT knows, and servers do not: train with `bias="none"` for them. `modules_to_save` stay what they are.
    """

    name: ClassVar[str] = "lora"

    def write(self, source: Source, folder: Path) -> float:
        twin: Any = wasi_copy(source.model, source.adapter_name)
        name = twin.active_adapter
        layers = {key: layer for key, layer in wasi_layers(twin.base_model.model) if name in layer.wasi_form}
        for key, layer in layers.items():
            if not isinstance(layer.form_of(name), ResidualLinear):
                raise ValueError(f"{key}: its factors replace the weight; LoRA adds to one, so use format 'plain'.")
        _check_vectors(twin, name)
        config, tensors = _lora(twin, name, layers)
        config.save_pretrained(str(folder))
        if any(isinstance(layer.form_of(name).residual, CompressedResidual) for layer in layers.values()):
            logger.warning(ON_COMPRESSED, config.base_model_name_or_path)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        multiply_exactly(twin)
        cases = cases_of(twin, example_batch(source.model) if source.batch is None else source.batch)
        tolerance = tolerance_of(twin) if source.tolerance is None else source.tolerance
        return answered(PeftModel.from_pretrained(twin.unload(), str(folder)).eval(), cases, tolerance)


def _check_vectors(model: Any, adapter_name: str) -> None:
    """Refuse what no LoRA adapter holds.

    Raises:
        ValueError: If a norm, a token or another vector of the model has trained.
    """
    vectors = next(layer for _, layer in wasi_layers(model)).vectors
    base = dict(vectors.base_items())
    moved = [key for key, vector in vectors.items(adapter_name) if not torch.equal(vector, base[key].to(vector.dtype))]
    if moved:
        raise ValueError(
            f"{moved[0]}: it trained with the adapter ({len(moved)} norms, tokens and the like in all), and LoRA has "
            "no place for it. Train with train_vectors=False and no bias='all', or use format 'plain'."
        )


def _lora(model: Any, adapter_name: str, layers: dict[str, WasiLayer]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of the adapter, these by the names that PEFT saves them under."""
    settings = model.peft_config[adapter_name]
    factors = {key: layer.form_of(adapter_name).factors() for key, layer in layers.items()}
    ranks = {key: R.shape[0] for key, (_, R) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {key: other for key, other in ranks.items() if other != rank}
    moved = {key: _moved_bias(layer, adapter_name) for key, layer in layers.items()}
    has_bias = any(bool(bias.any()) for bias in moved.values())
    tensors: dict[str, Tensor] = {}
    for key, (L, R) in factors.items():
        tensors |= {f"{_KEY}{key}.lora_A.weight": R, f"{_KEY}{key}.lora_B.weight": L}
        if has_bias:
            tensors[f"{_KEY}{key}.lora_B.bias"] = moved[key]
    saved = settings.modules_to_save or []
    for key, tensor in model.state_dict().items():
        inner = key.removeprefix(_KEY)
        module, mark, part = inner.partition(f".modules_to_save.{adapter_name}.")
        if mark:
            tensors[f"{_KEY}{module}.{part}"] = tensor
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(layers),
        modules_to_save=list(saved) or None,
        lora_bias=has_bias,
        fan_in_fan_out=any(is_transposed(layer.dense_class) for layer in layers.values()),
        task_type=settings.task_type,
        base_model_name_or_path=settings.base_model_name_or_path,
        inference_mode=True,
    )
    return config, {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}


def _moved_bias(layer: WasiLayer, adapter_name: str) -> Tensor:
    """What training has added to a layer's bias, (out,)."""
    form = layer.form_of(adapter_name)
    assert isinstance(form, ResidualLinear)
    if form.bias is None:
        return form.L.new_zeros(layer.out_features)
    before = form.residual.bias
    return form.bias if before is None else form.bias - before.to(form.bias.dtype)
