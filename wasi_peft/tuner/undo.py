"""A model's structure at one moment, to return to when an injection fails or is interrupted."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import WasiLayer


class Structure:
    """What hangs on a model's modules: children, parameters, buffers, hooks, replaced methods, flags, adapters.

    References alone: no value of a tensor is copied, and none is restored.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            tables = {name: value.copy() for name, value in module.__dict__.items() if isinstance(value, (dict, set))}
            self._attributes.append((module, dict(module.__dict__), tables))
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        layer = next((module for module in model.modules() if isinstance(module, WasiLayer)), None)
        self._vectors = None if layer is None else layer.vectors
        self._active = None if layer is None else layer.vectors.active
        self._adapters = set() if layer is None else layer.vectors.adapters

    def restore(self) -> None:
        """Put everything back."""
        if self._vectors is not None:
            self._vectors.activate(self._active)
            for name in self._vectors.adapters - self._adapters:
                self._vectors.remove(name)
        for module, attributes, tables in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, table in tables.items():
                present = attributes[name]
                present.clear()
                present.update(table)
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
