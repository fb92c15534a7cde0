"""The first batch of a model that is compiled before it has trained.

Fresh layers meet the first batch inside of their own calls. A compiler breaks its graph there, at each layer, and
what it has compiled around the breaks stays. So where one traces a model, all layers meet the batch before, in a
forward pass of their own, and the only break is where the model begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..memory.trials import trial
from .layer import wasi_layers


class FirstBatch:
    """Two hooks of a model, until its layers have met a batch.

    Args:
        model: With fresh layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._waiting = _waiting(model)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the layers meet the batch now, where the call is to be compiled."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            self._meet(model, args, kwargs)

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Remove the hooks where layers have met the batch by themselves."""
        if not torch.compiler.is_compiling() and _waiting(model) < self._waiting:
            self.remove()

    @torch.compiler.disable
    def _meet(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not self._waiting or kwargs.get("past_key_values") is not None:
            return
        with torch.no_grad(), trial(model, next(model.parameters()).device):
            model.forward(*args, **kwargs)
        self._waiting = 0  # layers that it did not reach meet another batch by themselves

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def await_first_batch(model: nn.Module) -> None:
    """Watch for the first batch of a model, where a layer of it waits for one."""
    forget_first_batch(model)
    if _waiting(model):
        FirstBatch(model)


def forget_first_batch(model: nn.Module) -> None:
    """Undo :func:`await_first_batch`."""
    for hook in list(model._forward_pre_hooks.values()):
        watch = getattr(hook, "__self__", None)
        if isinstance(watch, FirstBatch):
            watch.remove()


def _waiting(model: nn.Module) -> int:
    """How many pairs of factors have met no data."""
    return sum(len(layer.fresh_adapters) for _, layer in wasi_layers(model))
