"""A second model beside the dense one: the same tensors, but factors for the weights of its target layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..tuner.config import WasiConfig
from ..tuner.layer import Linear
from ..tuner.prepared import attached_layers
from ..updates.base import InitialFactors

ADAPTER = "repair"


def student_of(model: nn.Module, factors: Mapping[str, InitialFactors]) -> tuple[nn.Module, dict[str, Linear]]:
    """A second model that shares every tensor with the first, but has factored target layers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(layer): layer for layer in attached_layers(model)}  # those that wait on the modules
    student = copy.deepcopy(model, shared)
    config = WasiConfig(update="factor", activation_threshold=None)
    layers = {}
    for name, given in factors.items():
        initial = InitialFactors(given.L.clone(), given.R.clone(), given.bias)  # a layer trains what it is given
        layer = Linear(student.get_submodule(name), ADAPTER, config, name, initial.L.shape[1], initial)
        layer.release_base("release")
        student.set_submodule(name, layer)
        layers[name] = layer
    return student, layers


@torch.no_grad()
def orthonormal_factors(layer: Linear) -> InitialFactors:
    """The factors of a trained layer in the form that training starts from: L with orthonormal columns."""
    L, R = layer.wasi_L[ADAPTER], layer.wasi_R[ADAPTER]
    basis, corner = torch.linalg.qr(L.double())
    right = corner @ R.double()
    bias = layer.wasi_bias[ADAPTER].detach() if ADAPTER in layer.wasi_bias else None
    return InitialFactors(basis.to(L.dtype), right.to(R.dtype), bias)
