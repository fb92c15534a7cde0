"""Heads that were just made: they have to train, and an adapter trains them only where it is told to."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import WasiConfig
from .layer import WasiLayer

FRESH_HEAD = (
    "{head!r} looks newly initialised and stays as it is: with this configuration it does not train. Name it in "
    "modules_to_save, or set task_type."
)


def fresh_heads(model: nn.Module, config: WasiConfig) -> Iterator[str]:
    """Names of linear layers outside a transformers model's backbone that look untrained and are not going to train.

    A layer looks untrained where its bias is exactly zero, which training would not leave it.

    Args:
        model: With the adapter injected.
        config: Of the adapter.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(backbone, nn.Module) or backbone is model or config.inference_mode:
        return
    inner = {id(module) for module in backbone.modules()}
    saved = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if isinstance(module, (WasiLayer, AuxiliaryTrainingWrapper)):
            inner |= {id(child) for child in module.modules()}
        if id(module) in inner or not isinstance(module, nn.Linear) or module.bias is None:
            continue
        if module.bias.is_meta or any(part in saved for part in name.split(".")):
            continue
        if not bool(module.bias.detach().any()):
            yield name
