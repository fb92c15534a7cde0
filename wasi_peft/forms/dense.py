"""Dense layers: what they hold, how one is made, and what answers for a weight that is not stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.experts import ExpertStack
from .shards import whole

LOST = (
    "{what}: this weight is multiplied out of what is stored for each use, so what is written to it would be lost. "
    "Restore the dense layers first (model.dequantize())."
)
_CHANGES = {"__setitem__", *(f"__i{name}__" for name in "add sub mul div truediv floordiv mod pow and or xor".split())}


def refuse_in_place(name: str) -> None:
    """Raise an AttributeError for the name of a method that changes a tensor's values in place."""
    changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__"))
    if changes and name != "requires_grad_":
        raise AttributeError(LOST.format(what=f"{name} cannot be applied"))


# what can be said of a tensor that has no values and so no graph
METADATA: frozenset[Any] = frozenset(
    {
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.element_size),
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
        *(getattr(Tensor, name).__get__ for name in ("is_meta", "requires_grad", "grad_fn", "is_leaf")),
    }
)


class StandIn(ABC):
    """What answers for a dense weight that is not stored: its shape, dtype and device at no cost, values on use."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def multiplied_out(self) -> Tensor:
        """The dense weight, as model code sees it, a tensor of its own."""

    def is_floating_point(self) -> bool:
        """Whether the dense weight is of floating point numbers, as `Tensor.is_floating_point`."""
        return self.dtype.is_floating_point

    def size(self, dim: int | None = None) -> Any:
        """Shape, or one size of it, as `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Dimensions of the dense weight."""
        return len(self.shape)

    def numel(self) -> int:
        """Elements of the dense weight."""
        return self.shape.numel()


class FactoredWeight(StandIn):
    """Stand-in for a dense weight: knows shape, dtype and device at no cost, and is multiplied out only on use.

    Model code reads `layer.weight.dtype` and the like in its forward pass (T5 does); multiplying out `L R` for that
    would bring the dense matrix back. Passing the stand-in to any torch function, or asking for anything else than the
    attributes below, computes the dense weight for that one use. So it cannot be changed in place, except by a factor
    (RWKV rescales its layers so), where `rescale` says what becomes of that.

    Args:
        shape: Of the dense weight.
        dtype: Of the dense weight.
        device: Of what is stored.
        dense: Computes the dense weight.
        rescale: Takes a factor by which the weight is multiplied for good.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        dense: Callable[[], Tensor],
        rescale: Callable[[float], None] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.ndim = 2
        self.is_meta = device.type == "meta"
        self._is_hf_initialized = True  # transformers must not fill it with numbers
        self._dense = dense
        self._rescale = rescale
        self._made = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dense", "qweight", "ds_shape", "quant_state"):
            raise AttributeError(name)
        refuse_in_place(name)
        return getattr(self._dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad" and not value:
            return  # as it is: nobody trains a stand-in
        if "_made" in self.__dict__:
            raise AttributeError(LOST.format(what=f"{name} cannot be set"))
        super().__setattr__(name, value)

    def mul_(self, factor: Any) -> FactoredWeight:
        """Multiply the weight by a number, for good."""
        if self._rescale is None or not isinstance(factor, (int, float)):
            refuse_in_place("mul_")
        else:
            self._rescale(float(factor))
        return self

    def div_(self, divisor: Any) -> FactoredWeight:
        """Divide the weight by a number, for good."""
        return self.mul_(1 / divisor)

    def multiplied_out(self) -> Tensor:
        return self._dense()

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

        if args and isinstance(args[0], FactoredWeight):
            refuse_in_place(getattr(func, "__name__", ""))
        return func(*dense(args), **{key: dense(value) for key, value in (kwargs or {}).items()})


def is_transposed(dense_class: type[nn.Module]) -> bool:
    """Whether layers of a class hold their weight as (in, out): transformers' `Conv1D` does."""
    return issubclass(dense_class, Conv1D)


def is_quantized(layer: nn.Module) -> bool:
    """Whether there is no dense weight: a library keeps it in few bits (bitsandbytes, torchao, HQQ), or a form."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, StandIn)
        or hasattr(layer, "W_q")
        or type(weight).__module__.partition(".")[0] in ("bitsandbytes", "torchao")
    )


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear, Conv1D or parked layer in Linear layout, (out, in), detached.

    One in few bits is restored, and one in shards gathered, for which all processes must ask: a tensor of its own.
    """
    stored: Any = layer.weight
    if isinstance(stored, StandIn):
        return stored.multiplied_out()
    if type(stored).__name__ == "Int8Params":
        return _of_bitsandbytes(layer)
    if is_quantized(layer):
        weight = dequantize_module_weight(layer).detach()
    else:
        assert isinstance(layer.weight, Tensor)
        weight = whole(layer.weight.detach())
    return weight.T if is_transposed(getattr(layer, "dense_class", type(layer))) else weight


def _of_bitsandbytes(layer: Any) -> Tensor:
    """The weight of its 8-bit layer, without the change of the state that PEFT's own function leaves behind."""
    weight, state = layer.weight, layer.state
    codes = next(part for part in (state.CB, weight.CB, weight.data) if part is not None)
    largest = next(part for part in (state.SCB, weight.SCB) if part is not None)
    restored: Tensor = codes.float() * (largest.view(-1, 1) / 127)
    return restored


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight, which is not restored for that; of packed experts, those of one."""
    if isinstance(layer, ExpertStack):
        return layer.out_features, layer.in_features
    if isinstance(layer.weight, StandIn):
        return layer.weight.shape[0], layer.weight.shape[1]
    out_features, in_features = dense_weight(layer).shape
    return out_features, in_features


def empty_like_weight(layer: nn.Module) -> Tensor:
    """A tensor without elements, of the dtype and device of a layer's weight, which is not restored for that."""
    if isinstance(layer.weight, StandIn):
        return torch.empty(0, dtype=layer.weight.dtype, device=layer.weight.device)
    return dense_weight(layer).new_empty(0)


def dense_bias(layer: nn.Module) -> Tensor | None:
    """The bias of such a layer, detached, or None."""
    bias = layer.bias
    return whole(bias.detach()) if isinstance(bias, Tensor) else None


def build_dense(dense_class: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer of the given class around existing tensors, without initialising anything first.

    **Shape**
        - weight: (out, in) for Linear and its subclasses, (in, out) for transformers' Conv1D

    Returns:
        A frozen `nn.Linear` or `Conv1D`; a subclass of Linear that only PyTorch itself uses becomes a plain Linear.
    """
    with torch.device("meta"):
        layer: nn.Module
        if is_transposed(dense_class):
            layer = Conv1D(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    # not by `register_parameter`, which `low_cpu_mem_usage=True` has make parameters on the meta device
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


class ParkedLinear(nn.Module):
    """A dense layer whose weight waits in main memory: it owns no parameter and no buffer.

    So it is not moved to an accelerator, not saved, and not trained.

    Args:
        dense: The dense layer.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        weight, bias = dense.weight, dense_bias(dense)
        assert isinstance(weight, Tensor)
        self.dense_class = type(dense)
        self.weight = weight.detach().cpu()
        self.bias = None if bias is None else bias.cpu()
        self.out_features, self.in_features = dense_weight(dense).shape

    def restore(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The dense layer again."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return build_dense(self.dense_class, self.weight.to(device, dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.restore(x.device, x.dtype)(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight=parked on cpu"
