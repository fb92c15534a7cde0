"""The first batch of a model that is compiled before it has trained.

Fresh layers meet the first batch inside of their own calls. A compiler breaks its graph there, at each layer, and
what it has compiled around the breaks stays. So where one traces a model, all layers meet the batch before, in a
forward pass of their own, and the only break is where the model begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..memory.meeting import waiting_parts
from ..memory.trials import trial
from .layer import wasi_layers


class FirstBatch:
    """Two hooks of a model, until its layers have met a batch.

    Args:
        model: With fresh layers.

    Attributes:
        over: Whether a batch was met before a compiled call; layers that it did not reach meet another by themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.over = False
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the layers meet the batch now, where the call is to be compiled."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and model.training and not self.over:
            self._meet(model, args, kwargs)

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Remove the hooks where no layer waits any more."""
        if model.training and not torch.compiler.is_compiling() and not _is_fresh(model):
            self.remove()

    @torch.compiler.disable
    def _meet(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not waiting_parts(model) or not _is_plain((args, kwargs)):
            return
        with torch.no_grad(), trial(model, next(model.parameters()).device):
            model.forward(*args, **kwargs)
        self.over = True

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def await_first_batch(model: nn.Module) -> None:
    """Watch for the first batch of a model, where its active adapter has fresh factors."""
    forget_first_batch(model)
    if _is_fresh(model):
        FirstBatch(model)


def forget_first_batch(model: nn.Module) -> None:
    """Undo :func:`await_first_batch`."""
    for hook in list(model._forward_pre_hooks.values()):
        watch = getattr(hook, "__self__", None)
        if isinstance(watch, FirstBatch):
            watch.remove()


def _is_fresh(model: nn.Module) -> bool:
    """Whether the active adapter has factors that have met no data; those of a disabled one go on waiting."""
    return any(layer.active_name in layer.fresh_adapters for _, layer in wasi_layers(model))


def _is_plain(arguments: Any) -> bool:
    """Whether a model can be called twice with them: a cache would be filled twice."""
    if isinstance(arguments, Mapping):
        return all(map(_is_plain, arguments.values()))
    if isinstance(arguments, (tuple, list)):
        return all(map(_is_plain, arguments))
    return arguments is None or isinstance(arguments, (Tensor, int, float, str))
