"""What happens where the model inside of a PEFT model is saved as if it had no adapter."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

INNER_SAVE = (
    "this model has WASI layers, which a dense model that is loaded again would fill with random weights. Save the "
    "adapter, by save_pretrained of the PEFT model, or the whole as a model of its own: "
    "wasi_peft.compress(peft_model).save_pretrained(folder)."
)


def guard_saving(model: nn.Module) -> None:
    """Have a transformers model that got an adapter refuse to be saved alone, as transformers would do in silence."""
    if isinstance(model, PreTrainedModel):
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)


def allow_saving(model: nn.Module) -> None:
    """Undo :func:`guard_saving`."""
    model.__dict__.pop("save_pretrained", None)


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if not getattr(model, "_hf_peft_config_loaded", False):  # transformers' own adapters are saved by it
        raise ValueError(INNER_SAVE)
    return type(model).save_pretrained(model, *args, **kwargs)
