"""GELU and SiLU that keep their input in 4 bits.

Backward multiplies by the derivative at the rounded input. The derivative lies in [-0.13, 1.13] and hardly changes
beyond a few units from zero, so inputs are clamped to [-8, 8] first: a group's step is then at most 16 / 15, however
large single values are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from .quantization import Quantized, dequantize, largest_magnitude, quantize

LIMIT = 8.0
KIND = "int4_half"

_BACKWARD: dict[Any, Any] = {
    F.gelu: torch.ops.aten.gelu_backward,
    F.silu: torch.ops.aten.silu_backward,
}


class LowBitActivationFunction(torch.autograd.Function):
    """An activation by torch's kernel; its rounded input is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[..., Tensor], options: dict[str, Any], largest: float
    ) -> Tensor:
        kept = quantize(x.clamp(-LIMIT, LIMIT) if largest > LIMIT else x, KIND, min(largest, LIMIT))
        ctx.form = kept.dtype, kept.shape, kept.stride
        ctx.function, ctx.options = function, options
        ctx.save_for_backward(kept.packed, kept.rest)
        return function(x, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, rest = ctx.saved_tensors
        x = dequantize(Quantized(KIND, packed, rest, *ctx.form))
        backward = _BACKWARD[ctx.function]
        if type(grad) is type(x) and grad.dtype == x.dtype and grad.stride() == x.stride():
            return backward.grad_input(grad, x, **ctx.options, grad_input=x), None, None, None  # no third tensor
        return backward(grad, x, **ctx.options), None, None, None


def low_bit_activation(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.gelu` or `silu` that keeps only its input rounded to 4 bits, 4.5 with the scales.

    The output is exact; the gradient is that at the rounded input. Inputs with NaN or Inf, and subclasses of Tensor,
    go to torch's function as it is.

    **Shape**
        - x: any; returns the same

    Args:
        function: `torch.nn.functional.gelu` or `torch.nn.functional.silu`.
        x: Input.
        options: `approximate` of gelu.

    Raises:
        ValueError: If the function is another one.

    Example:
        >>> x = torch.linspace(-3, 3, 640, requires_grad=True)
        >>> low_bit_activation(F.gelu, x).sum().backward()
        >>> exact = torch.autograd.grad(F.gelu(x).sum(), x)[0]
        >>> bool((x.grad - exact).abs().max() < 0.1)
        True
    """
    if function not in _BACKWARD:
        raise ValueError(f"function must be torch.nn.functional.gelu or silu, got {function!r}.")
    wanted = torch.is_grad_enabled() and x.requires_grad
    if not wanted or type(x) not in (Tensor, FakeTensor) or not x.is_floating_point() or not x.numel():
        return function(x, **options)
    largest = largest_magnitude(x)
    if not largest < math.inf:
        return function(x, **options)
    return LowBitActivationFunction.apply(x, function, options, largest)
