"""What a compressed checkpoint that was prepared on the disk has beside its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, GENERATION_CONFIG_NAME

from ..forms.compressing import from_stored, stack_from_stored
from ..forms.dense import weight_shape
from ..forms.stored import StoredForm, stored_layout
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from .cards import write_card
from .compressed import quantization_config

_COPIED = (".json", ".txt", ".model", ".jinja", ".spm", ".vocab", ".tiktoken")  # tokenizers and processors
_LICENCES = ("license", "licence", "notice")


def write_settings(
    model: PreTrainedModel,
    dense: str,
    result: str,
    layers: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, nn.Module],
) -> None:
    """Configurations, the card, and the files of tokenizers and processors, as they are in the dense folder.

    Args:
        model: The dense model without weights; becomes a compressed one without weights.
        dense: Folder of its checkpoint.
        result: Folder that gets all this.
        layers: What became of each layer and packed parameter that is not dense, by name.
        targets: What they were.
    """
    model.config.quantization_config = quantization_config(layers)
    model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__]
    model.config.save_pretrained(result)
    if model.can_generate() and not os.path.isfile(os.path.join(dense, GENERATION_CONFIG_NAME)):
        model.generation_config.save_pretrained(result)
    for name in sorted(os.listdir(dense)):
        lowered = name.lower()
        wanted = lowered.endswith(_COPIED) or lowered.startswith(_LICENCES)
        own = name == CONFIG_NAME or lowered.endswith(".index.json") or lowered.startswith("adapter_")
        if wanted and not own and os.path.isfile(os.path.join(dense, name)):
            shutil.copyfile(os.path.join(dense, name), os.path.join(result, name))
    for template in sorted(Path(dense, CHAT_TEMPLATE_DIR).glob("*.jinja")):
        os.makedirs(os.path.join(result, CHAT_TEMPLATE_DIR), exist_ok=True)
        shutil.copyfile(template, os.path.join(result, CHAT_TEMPLATE_DIR, template.name))
    expose_experts(model)
    for name, entry in layers.items():
        model.set_submodule(name, _without_numbers(StoredForm(**entry), targets[name], model.dtype))
    conceal_experts(model)
    write_card(model, result)


def _without_numbers(stored: StoredForm, dense: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a layer has become, on the meta device."""
    sizes = weight_shape(dense)
    shape = (dense.experts, *sizes) if isinstance(dense, ExpertStack) else sizes
    layout = stored_layout(stored, shape, dense.bias is not None, dtype)
    tensors = {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in layout.items()}
    if isinstance(dense, ExpertStack):
        return stack_from_stored(stored, tensors, shape, dense.transposed, dtype)
    return from_stored(stored, tensors, sizes, type(dense), dtype)
