"""Convolutions as linear layers over patches: which ones are, what rows they read, and the way back.

A convolution multiplies every patch of its input by one weight, (out, in * k * k). Where patches do not overlap (1 x
1, patch embeddings) they are the input itself in another order; with larger kernels an entry is part of several
patches, and factors `L R` are a convolution to K channels, (K, in, k, k), and one of 1 x 1 after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self

from .dense import build_dense, dense_bias

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unsuited(layer: nn.Module) -> str | None:
    """What keeps a convolution from being a linear layer over patches; None for nothing.

    Example:
        >>> unsuited(nn.Conv2d(8, 8, 3, groups=8)), unsuited(nn.Conv2d(3, 8, 4, stride=4))
        ('groups=8', None)
    """
    wanted = {"groups": 1, "dilation": 1, "padding_mode": "zeros"}
    for name, value in wanted.items():
        given = getattr(layer, name)
        if any(one != value for one in (given if isinstance(given, tuple) else (given,))):
            return f"{name}={given!r}"
    return None


@dataclass(frozen=True)
class Patches:
    """How a convolution goes over its input.

    Attributes:
        kind: Class of the convolution.
        in_channels: Of its input.
        kernel_size: Of a patch, by dimension.
        stride: From one patch to the next.
        padding: Zeros around the input, as :func:`torch.nn.functional.pad` takes them.
    """

    kind: type[nn.Module]
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    padding_option: str | tuple[int, ...]  # by which the convolution was made

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """Those of a convolution that is not :func:`unsuited`."""
        kind = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
        module: Any = layer
        zeros = tuple(module._reversed_padding_repeated_twice)
        return cls(kind, module.in_channels, tuple(module.kernel_size), tuple(module.stride), zeros, module.padding)

    def rows(self, x: Tensor) -> Tensor:
        """The patches of an input.

        **Shape**
            - x: (B, in, H, W), without B for a single one, or with one or three dimensions for H, W
            - returns (B, H', W', in * k * k)

        Example:
            >>> layer = nn.Conv2d(3, 8, 2, stride=2)
            >>> Patches.of(layer).rows(torch.zeros(5, 3, 6, 4)).shape
            torch.Size([5, 3, 2, 12])
        """
        dims = len(self.kernel_size)
        if any(self.padding):
            x = F.pad(x, self.padding)
        first = x.dim() - dims
        for dim, (size, step) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            x = x.unfold(first + dim, size, step)  # which adds a dimension at the end
        return x.movedim(first - 1, first + dims - 1).flatten(first + dims - 1)

    @property
    def overlap(self) -> bool:
        """Whether an entry of the input can be part of several patches."""
        return any(size > step for size, step in zip(self.kernel_size, self.stride, strict=True))

    def multiply(self, x: Tensor, R: Tensor) -> Tensor:
        """`rows(x) R^T` as a convolution, with a gradient for x alone, for which x is not kept.

        **Shape**
            - x: as for :meth:`rows`, with B; R: (K, in * k * k); returns (B, H', W', K)
        """
        x = F.pad(x, self.padding) if any(self.padding) else x
        kernel = R.detach().reshape(len(R), self.in_channels, *self.kernel_size)
        h: Tensor = _FrozenConvolution.apply(x, kernel, self.stride)
        return h.movedim(1, -1)

    def image(self, y: Tensor) -> Tensor:
        """What a convolution answers, (B, out, H', W'), of its rows, (B, H', W', out): a view."""
        return y.movedim(-1, y.dim() - 1 - len(self.kernel_size))

    @staticmethod
    def linear(layer: nn.Module) -> nn.Module:
        """The linear layer over patches that a convolution is; it shares the tensors."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        linear = build_dense(
            nn.Linear, weight.detach().flatten(1), bias.detach() if isinstance(bias, Tensor) else None
        )
        return linear.train(layer.training)

    def convolution(self, linear: nn.Module) -> nn.Module:
        """The convolution that a frozen linear layer over patches is; it shares the tensors."""
        weight, bias = linear.weight, dense_bias(linear)
        assert isinstance(weight, Tensor)
        sizes = (self.in_channels, len(weight), self.kernel_size, self.stride, self.padding_option)
        with torch.device("meta"):
            layer = self.kind(*sizes, bias=bias is not None)
        kernel = weight.detach().reshape(len(weight), self.in_channels, *self.kernel_size)
        layer.register_parameter("weight", nn.Parameter(kernel, requires_grad=False))
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return layer.train(linear.training)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight has no gradient, so that its input need not be kept; torch's own keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.stride, ctx.shape = stride, x.shape
        ctx.save_for_backward(weight)
        y: Tensor = torch.ops.aten.convolution(x, weight, None, *_geometry(stride))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        x = grad.new_empty(()).expand(ctx.shape)  # of which only the shape counts
        geometry = _geometry(ctx.stride)
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])
        return grads[0], None, None


def _geometry(stride: tuple[int, ...]) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed, output padding and groups, as torch's operations take them."""
    dims = len(stride)
    return list(stride), [0] * dims, [1] * dims, False, [0] * dims, 1
