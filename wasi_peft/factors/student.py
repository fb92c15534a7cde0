"""A second model beside the dense one: the same tensors, but factors for the weights of its target layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..forms.factored import FactoredLinear
from ..models.calls import tensors_in
from ..tuner.prepared import attached_layers
from ..updates.base import InitialFactors


def student_of(model: nn.Module, factors: Mapping[str, InitialFactors]) -> tuple[nn.Module, dict[str, FactoredLinear]]:
    """A second model that shares every tensor with the first, but has factored target layers, and those by name."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(layer): layer for layer in attached_layers(model)}  # those that wait on the modules
    # results of earlier passes that modules keep, which may be no leaves of a graph: those cannot be copied
    state = (value for module in model.modules() for value in vars(module).values())
    shared |= {id(tensor): tensor for value in state for tensor in tensors_in(value) if not tensor.is_leaf}
    student = copy.deepcopy(model, shared)
    layers = {}
    for name, initial in factors.items():
        parts = {"L": initial.L.clone(), "R": initial.R.clone()}  # a form trains what it is given
        layers[name] = FactoredLinear.from_parts(parts, initial.bias, type(student.get_submodule(name)))
        student.set_submodule(name, layers[name])
    return student, layers


@torch.no_grad()
def orthonormal_factors(layer: FactoredLinear) -> InitialFactors:
    """The factors of a trained layer in the form that training starts from: L with orthonormal columns."""
    basis, corner = torch.linalg.qr(layer.L.double())
    right = corner @ layer.R.double()
    bias = None if layer.bias is None else layer.bias.detach()
    return InitialFactors(basis.to(layer.L.dtype), right.to(layer.R.dtype), bias)
