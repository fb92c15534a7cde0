"""Gated products that keep their two inputs, and not what the activation made of one of them.

`silu(g) * u`, in the MLP of most language models, keeps g for the activation and silu(g) and u for the product. Here
backward computes silu(g) once more. Output and gradients are the same to the bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ..models.structure import block_parts
from .watching import Watch
from .wrapping import hooks_in_force, unwrap_all, wrap

# activations that keep their input; those that keep their output (relu, sigmoid, tanh) share it with the product
_ACTIVATIONS = frozenset((F.silu, F.gelu))
_PRODUCTS = frozenset((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__))

Activation = Callable[[Tensor], Tensor]


class GatedProduct(torch.autograd.Function):
    """`activation(gate) * other`, of which the activation's value is known already."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, other: Tensor, value: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, other)
        ctx.activation = activation
        return value * other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, other = ctx.saved_tensors
        gate = gate.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            value = ctx.activation(gate)
        grad_gate = torch.autograd.grad(value, gate, grad * other)[0] if gate.requires_grad else None
        return grad_gate, grad * value.detach() if ctx.needs_input_grad[1] else None, None, None


class _Activated(NamedTuple):
    """The latest result of an activation, while somebody holds it."""

    value: weakref.ref[Tensor]
    version: int
    gate: Tensor
    gate_version: int
    activation: Activation


class _Gates(Watch):
    """Context in which the product of an activation's result with another tensor is a :class:`GatedProduct`.

    Only while the same saved-tensor hooks are in force.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks = hooks_in_force()
        self._latest: _Activated | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and self._latest is not None and len(args) == 2 and not kwargs:
            product = self._gated(self._latest, *args)
            return func(*args) if product is None else product
        result = func(*args, **kwargs)
        if func in _ACTIVATIONS and len(args) == 1 and hooks_in_force() == self._hooks:
            if _is_plain(args[0]) and result.requires_grad and not kwargs.pop("inplace", False):
                gate, again = args[0], functools.partial(func, **kwargs)
                self._latest = _Activated(weakref.ref(result), result._version, gate, gate._version, again)
        return result

    def _gated(self, latest: _Activated, first: Any, second: Any) -> Tensor | None:
        value = latest.value()
        if value is None or not (first is value or second is value):
            return None
        if value._version != latest.version or latest.gate._version != latest.gate_version:
            return None
        other = second if first is value else first
        if not _is_plain(other) or not _is_like(other, value) or other is value:
            return None
        if hooks_in_force() != self._hooks:
            return None
        self._latest = None
        result: Tensor = GatedProduct.apply(latest.gate, other, value.detach(), latest.activation)
        return result


def _is_plain(x: Any) -> bool:
    return type(x) in (Tensor, FakeTensor) and x.is_floating_point()


def _is_like(x: Tensor, other: Tensor) -> bool:
    return (x.shape, x.dtype, x.device) == (other.shape, other.dtype, other.device)


class _WithLeanGates:
    """Calls a module inside :class:`_Gates`."""

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        unusual = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if unusual or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _Gates():
            return forward(*args, **kwargs)


@dataclass(frozen=True)
class LeanGates:
    """Technique: gated products in the blocks of a model keep what goes into them, and no activation's result.

    It is put around the modules inside of a block, as checkpointing calls them again. Nothing happens without
    gradients, while `torch.compile` traces, nor to a model without blocks or gates.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> small = LlamaConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaModel(small)
        >>> LeanGates().install(model)
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.sum().backward()
        >>> LeanGates().remove(model)
    """

    def check(self, model: nn.Module) -> None:
        """Every model will do."""

    def install(self, model: nn.Module) -> None:
        """Put it around the modules that make up the blocks, if the model has blocks."""
        self.remove(model)
        for part in block_parts(model):
            wrap(part, _WithLeanGates())

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _WithLeanGates)
