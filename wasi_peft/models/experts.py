"""Packed experts: modules that hold the weights of all their experts in 3-D parameters, which no linear layer owns.

transformers writes a mixture of experts as one module with two such parameters, `gate_up_proj` (or `up_proj`) and
`down_proj`, one matrix an expert. :func:`expose_experts` puts each into a module of its own under the name that the
parameter had; then it can be targeted, counted and replaced as linear layers are. :func:`conceal_experts` undoes that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calls import tensors_in

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_NOTES = "_wasi_notes"  # attribute of a module: what waits on its packed parameters
_PREFIX = "_wasi_"  # of attributes that wait there


class ExpertStack(nn.Module):
    """The matrices of all experts of a module, one parameter.

    **Shape**
        - weight: (E, out, in), or (E, in, out) where transposed

    Args:
        weight: The parameter; held as it is.
        transposed: Whether the last dimension is that of outputs, as gpt-oss and Llama 4 have it.

    Example:
        >>> import torch
        >>> stack = ExpertStack(nn.Parameter(torch.zeros(4, 8, 6)), transposed=True)
        >>> stack.experts, stack.out_features, stack.in_features
        (4, 6, 8)
    """

    weight: nn.Parameter
    bias: None = None  # biases of experts are vectors of the module that holds them

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self._parameters["weight"] = weight  # registered, it would lose its values where PEFT makes empty adapters
        self.transposed = transposed
        self.experts, rows, columns = weight.shape
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)

    def matrices(self) -> Tensor:
        """All weights as linear layers hold them, (E, out, in), detached, in the memory of the parameter."""
        weight = self.weight.detach()
        return weight.mT if self.transposed else weight

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


def packed_parameters(module: nn.Module) -> dict[str, bool]:
    """Names of the packed parameters that a module owns itself, and whether they are transposed.

    transformers says the latter of most modules (`is_transposed`), and so does one that is a module already. Of others
    with gates the shapes do: what goes up is twice as wide as what comes down; others are left alone.
    """
    parameters = module._parameters
    beside = next((child for child in module._modules.values() if isinstance(child, ExpertStack)), None)
    if beside is not None:
        return {name: beside.transposed for name in (*UP, DOWN) if parameters.get(name) is not None}
    up = next((name for name in UP if parameters.get(name) is not None), None)
    if up is None or parameters.get(DOWN) is None:
        return {}
    first, second = parameters[up], parameters[DOWN]
    assert first is not None and second is not None
    for weight in (first, second):
        if weight.dim() != 3 or not weight.is_floating_point() or weight.dtype.itemsize < 2:  # float8 has scales too
            return {}
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        experts, rows, columns = second.shape
        shapes = {torch.Size((experts, columns, 2 * rows)): True, torch.Size((experts, 2 * columns, rows)): False}
        transposed = shapes.get(first.shape) if up == UP[0] else None
        if transposed is None:
            return {}
    return {up: bool(transposed), DOWN: bool(transposed)}


def packed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, bool]]]:
    """Names of the modules with packed parameters, the modules, and their :func:`packed_parameters`."""
    for name, module in model.named_modules():
        packed = packed_parameters(module)
        if packed:
            yield name, module, packed


def routed_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows that meet an expert when a module of packed experts is called: one for each token and expert it goes to.

    Modules that get no indices of experts (Llama 4's) are called with such rows.

    Example:
        >>> tokens, chosen = torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.long)
        >>> routed_rows((tokens, chosen), {}), routed_rows((tokens,), {})
        (10, 5)
    """
    tensors = tensors_in((args, dict(kwargs)))
    indices = [tensor for tensor in tensors if not tensor.is_floating_point()]
    return indices[0].numel() if indices else math.prod(tensors[0].shape[:-1])


def expose_experts(model: nn.Module) -> list[str]:
    """Put every packed parameter of a model into a module of its own; their names."""
    exposed = []
    for name, module, packed in list(packed_experts(model)):
        for parameter_name, transposed in packed.items():
            parameter = module._parameters.pop(parameter_name)
            assert parameter is not None
            stack = ExpertStack(parameter, transposed)
            stack.__dict__.update(module.__dict__.get(_NOTES, {}).pop(parameter_name, {}))
            module.add_module(parameter_name, stack)
            exposed.append(f"{name}.{parameter_name}" if name else parameter_name)
    return exposed


def conceal_experts(model: nn.Module) -> None:
    """Make parameters of their modules again of all :class:`ExpertStack`, but for those inside of adapters' layers.

    Those of subclasses, which hold no parameter to put back, stay modules.
    """
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is ExpertStack and name != "base_layer":
                notes = {key: value for key, value in child.__dict__.items() if key.startswith(_PREFIX)}
                if notes:
                    module.__dict__.setdefault(_NOTES, {})[name] = notes
                del module._modules[name]
                module._parameters[name] = child.weight
                if f"{name}_bias" in module._parameters:  # which comes after its weight
                    module._parameters[f"{name}_bias"] = module._parameters.pop(f"{name}_bias")
