"""What stands in for a dense layer after its weight is gone: a stub module and a stand-in for its `weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FactoredWeight:
    """Stand-in for a dense weight: knows shape, dtype and device at no cost, and is multiplied out only on use.

    Model code reads `layer.weight.dtype` and the like in its forward pass (T5 does); multiplying out `L R` for that
    would bring the dense matrix back. Passing the stand-in to any torch function, or asking for anything else than the
    attributes below, computes the dense weight for that one use.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, dense: Callable[[], Tensor]):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.ndim = 2
        self.is_meta = device.type == "meta"
        self._dense = dense

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dense", "qweight", "ds_shape", "quant_state"):
            raise AttributeError(name)
        return getattr(self._dense(), name)

    def size(self, dim: int | None = None) -> Any:
        """Shape, or one size of it, as `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Elements of the dense weight."""
        return self.shape.numel()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def dense(value: Any) -> Any:
            if isinstance(value, FactoredWeight):
                return value._dense()
            if isinstance(value, (tuple, list)):
                return type(value)(dense(item) for item in value)
            return value

        return func(*dense(args), **{key: dense(value) for key, value in (kwargs or {}).items()})


class ReleasedLinear(nn.Module):
    """Base layer whose dense weight was released (or parked on the CPU): it owns no parameter.

    `weight` and `bias` are the parked ones, or answer for the adapter that is active in the owning layer. The owner is
    held in a list so that it is no submodule of its own base layer.

    Args:
        owner: The tuner layer.
        dense: The dense layer that was replaced, without its weight unless `parked` is given.
        parked: The dense weight in main memory for `base_weight="cpu"`, else None.
    """

    def __init__(self, owner: Any, dense: nn.Module, parked: tuple[Tensor, Tensor | None] | None):
        super().__init__()
        self.in_features = owner.in_features
        self.out_features = owner.out_features
        self._owner = [owner]
        self._dense_class = type(dense)
        self.parked = parked

    @property
    def weight(self) -> Any:
        if self.parked is not None:
            return self.parked[0]
        return self._owner[0].factored_weight()

    @property
    def bias(self) -> Tensor | None:
        if self.parked is not None:
            return self.parked[1]
        return self._owner[0].factored_bias()

    def restore(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The dense layer with its original weight. Only where it was parked."""
        assert self.parked is not None
        weight, bias = self.parked
        bias = None if bias is None else bias.to(device, dtype)
        return build_dense(self._dense_class, weight.to(device, dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.parked is None:
            raise RuntimeError(
                "The dense weight of this layer was released when the WASI adapter was injected. "
                "Create the adapter with base_weight='keep' or 'cpu' to use the base layer."
            )
        return self.restore(x.device, x.dtype)(x)

    def extra_repr(self) -> str:
        state = "parked on cpu" if self.parked is not None else "released"
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={state}"


def build_dense(dense_class: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer of the given class around existing tensors, without initialising anything first.

    **Shape**
        - weight: (out, in) for Linear and its subclasses, (in, out) for transformers' Conv1D

    Returns:
        A frozen `nn.Linear` or `Conv1D`; a subclass of Linear that only PyTorch itself uses becomes a plain Linear.
    """
    with torch.device("meta"):
        layer: nn.Module
        if issubclass(dense_class, Conv1D):
            layer = Conv1D(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D in Linear layout, (out, in), detached."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def dense_bias(layer: nn.Module) -> Tensor | None:
    """The bias of a Linear or Conv1D, detached, or None."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None
