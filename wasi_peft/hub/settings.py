"""What a compressed checkpoint that was prepared on the disk has beside its weights."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR, GENERATION_CONFIG_NAME

from ..forms.compressing import from_stored, stack_from_stored
from ..forms.dense import weight_shape
from ..forms.stored import StoredForm, stored_layout
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from .cards import write_card
from .compressed import quantization_config

PROCESSOR_FILES = (".json", ".txt", ".model", ".jinja", ".spm", ".vocab", ".tiktoken")  # their endings
# of other things that end so
_OTHERS = re.compile(r"config\.json|.*\.index\.json|adapter_.*|trainer_state\.json|.*_results\.json")
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
    copy_processors(Path(dense), Path(result))
    expose_experts(model)
    for name, entry in layers.items():
        model.set_submodule(name, _without_numbers(StoredForm(**entry), targets[name], model.dtype))
    conceal_experts(model)
    write_card(model, result)


def copy_processors(source: Path, target: Path) -> None:
    """Copy files of tokenizers and processors, and licences, but for those that are there."""
    templates = source.joinpath(CHAT_TEMPLATE_DIR).glob("*.jinja")
    for path in sorted([*source.iterdir(), *templates]):
        name, copy = path.name.lower(), target / path.relative_to(source)
        wanted = name.endswith(PROCESSOR_FILES) and not _OTHERS.fullmatch(name)
        if (wanted or name.startswith(_LICENCES)) and path.is_file() and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _without_numbers(stored: StoredForm, dense: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What a layer has become, on the meta device."""
    sizes = weight_shape(dense)
    shape = (dense.experts, *sizes) if isinstance(dense, ExpertStack) else sizes
    layout = stored_layout(stored, shape, dense.bias is not None, dtype)
    tensors = {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in layout.items()}
    if isinstance(dense, ExpertStack):
        return stack_from_stored(stored, tensors, shape, dense.transposed, dtype)
    return from_stored(stored, tensors, sizes, type(dense), dtype)
