"""RWKV writes to its weights: in evaluation mode it halves those of later blocks, and doubles them again in training.

The model that it computes stays the same, the weights do not, nor what a copy that shares them computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def _rescaling(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]


def undo_rescaling(model: nn.Module) -> None:
    """Weights as they are in files, of a model that will scale them again when it needs to."""
    for module in _rescaling(model):
        if module.layers_are_rescaled:
            training, module.training = module.training, True
            try:
                module._rescale_layers()
            finally:
                module.training = training


@contextmanager
def without_rescaling(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs in evaluation mode and leaves its weights as they are in files."""
    undo_rescaling(model)
    every = {module: module.config.rescale_every for module in _rescaling(model)}
    try:
        for module in every:
            module.config.rescale_every = 0
        yield
    finally:
        for module, count in every.items():
            module.config.rescale_every = count
            module.layers_are_rescaled = False
