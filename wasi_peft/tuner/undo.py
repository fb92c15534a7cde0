"""A model's structure at one moment, to return to when an injection fails or is interrupted."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from .layer import WasiLayer


class Structure:
    """Which modules, parameters, buffers, hooks and replaced methods a model has; no values, and no copies of them.

    Args:
        model: The model.
    """

    _TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")

    def __init__(self, model: nn.Module) -> None:
        self._tables = [
            (module, name, OrderedDict(module.__dict__[name])) for module in model.modules() for name in self._TABLES
        ]
        self._attributes = [(module, set(module.__dict__)) for module in model.modules()]
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._adapters = [
            (layer, set(layer.wasi_form), layer._active_adapter, layer.vectors.active)
            for layer in model.modules()
            if isinstance(layer, WasiLayer)
        ]

    def restore(self) -> None:
        """Put everything back; values were never touched."""
        for layer, adapters, active_adapter, active_vectors in self._adapters:
            for name in set(layer.wasi_form) - adapters:
                layer.vectors.activate(active_vectors)
                layer.vectors.remove(name)
                layer.forget_adapter(name)
            layer._active_adapter = active_adapter
        for module, name, table in self._tables:
            present: dict[str, Any] = module.__dict__[name]
            present.clear()
            present.update(table)
        for module, attributes in self._attributes:
            for name in set(module.__dict__) - attributes:
                del module.__dict__[name]
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
