"""Attention of few tokens in 16 bits on a CPU, with a backward pass of batched products.

The CPU's fused kernel (torch 2.13) is built for long sequences: with 17 tokens its backward takes ten times as long in
bfloat16 as in float32, with 128 nearly twice. Here the forward pass is torch's; backward starts from queries, keys and
values and forms the scores of some samples at once (:func:`attention.attention_gradients`), up to about 200 of width
64 in less time (`benchmarks/short_attention.py`). So the output, which the kernel's backward needs, is not kept.
Gradients come out nearer to the exact ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..models.structure import block_parts
from .attention import attention_gradients
from .watching import Watch
from .wrapping import hooks_in_force, unwrap_all, wrap

WORK_PER_QUERY = 12_800  # keys times width, up to which this was faster: 200 keys of width 64

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _BatchedBackward(torch.autograd.Function):
    """The CPU's fused kernel, with a backward of its own; `mask` is None or is added to the scores."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Tensor:
        output: Tensor = _kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        ctx.save_for_backward(q, k, v, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        return *attention_gradients(q, k, v, grad, mask, ctx.is_causal, ctx.scale), None, None, None


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with another backward where that is faster.

    That is: 16-bit tensors on a CPU for which torch takes its fused kernel, and keys times width up to
    :data:`WORK_PER_QUERY`. Everything else is torch's function as it is. The output is the same to the bit; it is not
    kept for backward.

    **Shape**
        - query: (B, H, N, d); key, value: (B, G, M, d), where G divides H; attn_mask: broadcastable to (B, H, N, M)
        - returns (B, H, N, d)

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        attn_mask: As torch's function takes it.
        dropout_p: As torch's function takes it.
        is_causal: As torch's function takes it.
        scale: As torch's function takes it.
        enable_gqa: As torch's function takes it.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        >>> short_attention(q, k, v).sum().backward()
        >>> q.grad.dtype
        torch.bfloat16
    """
    tensors, mask = [query, key, value], attn_mask
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # what torch's function does as well
        dtype = torch.get_autocast_dtype("cpu")
        tensors = [tensor.to(dtype) for tensor in tensors]
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    if not _pays(tensors, mask, dropout_p) or not _is_fused(tensors, mask, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=tensors[0].dtype).masked_fill_(~mask, -torch.inf)
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _BatchedBackward.apply(*tensors, mask, is_causal, scale)
    return result


def _pays(tensors: list[Tensor], mask: Tensor | None, dropout_p: float) -> bool:
    keys = tensors[1]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(map(_has_16_bits, tensors))
        and all(tensor.dim() == 4 and tensor.numel() > 0 for tensor in tensors)
        and keys.shape[-2] * keys.shape[-1] <= WORK_PER_QUERY
        and dropout_p == 0
        and (mask is None or not mask.requires_grad)
        and not any(map(is_traceable_wrapper_subclass, tensors))
        and not torch._C._are_functorch_transforms_active()
    )


def _is_fused(tensors: list[Tensor], mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether torch takes its fused kernel for these; its own answer is another one for tensors without data."""
    q, k, v = tensors
    heads = q.shape[1]
    fits = torch.backends.cuda.flash_sdp_enabled()  # the kernels of the CPU too
    fits &= q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    fits &= heads % k.shape[1] == 0 if enable_gqa else heads == k.shape[1]
    fits &= q.shape[-1] == k.shape[-1] == v.shape[-1] and all(tensor.stride(-1) == 1 for tensor in tensors)
    if mask is not None:
        sizes = (q.shape[0], heads, q.shape[2], k.shape[2])
        fits &= not is_causal and mask.dim() in (2, 4)
        fits &= all(found in (1, size) for found, size in zip(reversed(mask.shape), reversed(sizes), strict=False))
    return fits


class _Functions(Watch):
    """Context in which :func:`short_attention` takes the place of torch's function, while the same hooks are there."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks = hooks_in_force()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and hooks_in_force() == self._hooks:
            return short_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _WithShortAttention:
    """Calls a module inside :class:`_Functions`, where it may meet 16 bits on a CPU in training."""

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _in_16_bits(args, kwargs):
            return forward(*args, **kwargs)
        with _Functions():
            return forward(*args, **kwargs)


def _in_16_bits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return True
    return any(isinstance(value, Tensor) and _has_16_bits(value) for value in (*args, *kwargs.values()))


def _has_16_bits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ShortAttention:
    """Technique: attention in the blocks of a model goes by :func:`short_attention`.

    It is the modules inside of a block that are called in another way, such as its attention, and not the block:
    checkpointing calls them again, and has to find the same. Nothing happens without gradients, while `torch.compile`
    traces, in float32 or on another device, nor to a model without blocks. Backward keeps queries, keys and values.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTModel(small).bfloat16()
        >>> ShortAttention().install(model)
        >>> model(torch.randn(2, 3, 224, 224, dtype=torch.bfloat16)).last_hidden_state.sum().backward()
        >>> ShortAttention().remove(model)
    """

    def check(self, model: nn.Module) -> None:
        """Every model will do."""

    def install(self, model: nn.Module) -> None:
        """Put it around the modules that make up the blocks, if the model has blocks."""
        self.remove(model)
        for part in block_parts(model):
            wrap(part, _WithShortAttention())

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _WithShortAttention)
