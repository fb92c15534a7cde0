"""Modules that treat every token by itself, such as the MLPs of blocks, told by trying and not by their names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .structure import LINEAR_LAYERS, Structure, linear_layers

# operations by name: elementwise, or over the last dimension
_POINTWISE = frozenset(
    (
        *("relu", "relu_", "gelu", "silu", "silu_", "tanh", "tanh_", "sigmoid", "hardswish", "leaky_relu", "softplus"),
        *("mish", "elu", "selu", "quick_gelu", "erf", "exp", "sqrt", "rsqrt", "square", "abs", "clamp", "clip"),
        *("add", "add_", "sub", "mul", "mul_", "div", "neg", "pow", "__add__", "__mul__", "__sub__", "__truediv__"),
        *("__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__pow__", "__rpow__", "__neg__"),
        *("dropout", "dropout_", "layer_norm", "rms_norm", "to", "type_as", "float", "half", "bfloat16", "contiguous"),
        *("new_zeros", "size", "dim", "is_floating_point", "__get__", "__bool__"),
    )
)
_OVER_FEATURES = frozenset(("mean", "var", "chunk", "split", "unbind"))


class _Stub(nn.Module):
    """Stands in for a linear layer: the right width, no values needed."""

    def __init__(self, layer: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.out_features: int = getattr(layer, "out_features", None) or layer.nf  # type: ignore[assignment]
        self.weight = like  # some models look at its dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class _TokensApart(TorchFunctionMode):
    """Raises at the first operation that is not known to treat every token by itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        of_features = name in _OVER_FEATURES and (kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, 2))
        if name not in _POINTWISE and not of_features:
            raise _TokensMeet(name)
        return func(*args, **kwargs)


class _TokensMeet(Exception):
    """An operation may mix tokens."""


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1


def is_position_wise(module: nn.Module) -> bool:
    """Whether a module maps hidden states to hidden states, each token by itself.

    Told from its operations on four tokens, its linear layers left out, so that no weight has to be there.
    """
    linear = next((layer for _, layer in linear_layers(module)), None)
    width = getattr(linear, "in_features", getattr(linear, "nx", None))
    if width is None or not _takes_hidden_states_alone(module):
        return False
    # of layers in few bits no parameter may be left
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    tokens = torch.zeros(1, 4, width, device=like.device, dtype=like.dtype)
    places = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent._modules.items()
        if isinstance(child, LINEAR_LAYERS)
    ]
    try:
        for parent, key, child in places:
            parent._modules[key] = _Stub(child, tokens)
        with torch.no_grad(), _TokensApart():
            result = type(module).forward(module, tokens)
    except Exception:  # whatever it misses besides hidden states, it is not position-wise
        return False
    finally:
        for parent, key, child in places:
            parent._modules[key] = child
    return isinstance(result, Tensor) and result.shape == tokens.shape


def position_wise_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The MLPs of the blocks: position-wise modules with two or more linear layers, outermost ones only.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> list(position_wise_modules(ViTModel(small)))
        ['layers.0.mlp', 'layers.1.mlp']
    """
    structure = Structure(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        able = structure.is_inside_blocks(name) and not isinstance(module, LINEAR_LAYERS)
        if not inside and able and sum(1 for _ in linear_layers(module)) > 1 and is_position_wise(module):
            found[name] = module
    return found
