"""`nn.MultiheadAttention` by linear layers that are called: PyTorch's own reads the weights of its projections."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import FactoredWeight, build_dense, dense_weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_NOTES = "_wasi_notes"  # attribute of an attention module: what waits on the projections that it does not show
_PREFIX = "_wasi_"  # of attributes that wait there

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ProjectedAttention(nn.Module):
    """What an `nn.MultiheadAttention` computes, with its projections as layers: q_proj, k_proj, v_proj, out_proj.

    Three projections and not a fused one: in cross-attention they read different inputs. Arguments and results are
    those of `nn.MultiheadAttention`. PyTorch's encoder layers never take their fast path, which reads weights.

    Args:
        attention: The module whose place it takes; parameters are shared with it.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.testing.assert_close(ProjectedAttention(attention)(x, x, x), attention(x, x, x))
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    in_proj_bias: None = None  # PyTorch's fast path is for attention with a bias
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim, self.dropout = attention.num_heads, attention.head_dim, attention.dropout
        self.batch_first, self.add_zero_attn = attention.batch_first, attention.add_zero_attn
        self.packed = attention.in_proj_weight is not None
        # what is registered would lose its values where PEFT makes empty adapters
        for name, weight, bias in _projections(attention):
            layer = build_dense(nn.Linear, weight, bias)
            packed_weight, packed_bias = _packed(attention, name)
            layer._parameters["weight"] = nn.Parameter(weight, packed_weight.requires_grad)
            layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, packed_bias.requires_grad)
            setattr(self, name, layer)
        self.out_proj = attention.out_proj
        self._parameters |= {name: attention._parameters.get(name) for name in ("bias_k", "bias_v")}
        self.training = attention.training

    @property
    def in_proj_weight(self) -> FactoredWeight | None:
        """Stand-in for the packed weight of the projections; None where theirs have different sizes."""
        if not self.packed:
            return None
        layers = [getattr(self, name) for name in PROJECTIONS]
        like = layers[0].weight

        def dense() -> Tensor:
            return torch.cat([dense_weight(layer) for layer in layers])

        return FactoredWeight((3 * self.embed_dim, self.embed_dim), like.dtype, like.device, dense)

    def to_attention(self) -> nn.MultiheadAttention:
        """An `nn.MultiheadAttention` around the weights of these layers, which must be dense."""
        bias = getattr(self.q_proj, "bias", None) is not None
        with torch.device("meta"):
            attention = nn.MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                self.dropout,
                bias,
                add_zero_attn=self.add_zero_attn,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
            )
        layers: list[Any] = [getattr(self, name) for name in PROJECTIONS]
        trains = layers[0].weight.requires_grad
        weights = {f"{name}_weight": layer.weight for name, layer in zip(PROJECTIONS, layers, strict=True)}
        if self.packed:
            weights = {"in_proj_weight": torch.cat([layer.weight.detach() for layer in layers])}
        if bias:
            weights["in_proj_bias"] = torch.cat([layer.bias.detach() for layer in layers])
        for name, weight in weights.items():
            attention.register_parameter(name, nn.Parameter(weight.detach(), trains))
        attention.bias_k, attention.bias_v = self.bias_k, self.bias_v
        attention.out_proj = self.out_proj
        return attention.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        hint = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (
            self._as_batch(layer(x)) for layer, x in zip(self._layers(), (query, key, value), strict=True)
        )  # (B, N, d); projected as they came, so that layers that read one tensor know it
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, b.to(x.dtype).expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        mask = None if hint else self._mask(attn_mask, key_padding_mask, q, added)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.mT
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
        y = y.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            y = y[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if query.dim() == 2 else weights
        return self.out_proj(y), weights

    def _layers(self) -> list[nn.Module]:
        return [getattr(self, name) for name in PROJECTIONS]

    def _as_batch(self, x: Tensor) -> Tensor:
        """(N, d), (B, N, d) or (N, B, d) to (B, N, d)."""
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, added: int) -> Tensor | None:
        """What is added to the scores, which broadcasts to (B, heads, N, S); keys that were added are never masked."""
        masks = []
        if attn_mask is not None:
            square = attn_mask.dim() == 2
            masks.append(attn_mask if square else attn_mask.unflatten(0, (len(q), self.num_heads)))
        if padding is not None:
            masks.append((padding[None] if padding.dim() == 1 else padding)[:, None, None])
        floats = [F.pad(_additive(mask, q.dtype), (0, added)) for mask in masks]
        return sum(floats[1:], floats[0]) if floats else None


def _projections(attention: nn.MultiheadAttention) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Names, weights and biases of the projections, in the memory of the module's parameters."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(getattr(attention, f"{name}_weight").detach() for name in PROJECTIONS)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
    yield from zip(PROJECTIONS, weights, biases, strict=True)


def _packed(attention: nn.MultiheadAttention, name: str) -> tuple[Any, Any]:
    """The parameters that hold weight and bias of a projection; None for no bias."""
    weight = attention.in_proj_weight
    return getattr(attention, f"{name}_weight") if weight is None else weight, attention.in_proj_bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


# ---------------------------------------------------------------- in a model


def expose_projections(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Put a :class:`ProjectedAttention` in the place of every `nn.MultiheadAttention`; those that were there, by name.

    Subclasses stay: what they compute is their own.
    """
    replaced: dict[str, nn.MultiheadAttention] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.MultiheadAttention and name:
            projected = ProjectedAttention(module)
            for child, notes in module.__dict__.pop(_NOTES, {}).items():
                getattr(projected, child).__dict__.update(notes)
            model.set_submodule(name, projected)
            replaced[name] = module
    return replaced


def conceal_projections(model: nn.Module, replaced: Mapping[str, nn.MultiheadAttention]) -> None:
    """Put modules back that :func:`expose_projections` gave, but for those whose projections are adapted now."""
    for name, attention in replaced.items():
        projected = model.get_submodule(name)
        if not isinstance(projected, ProjectedAttention) or not is_plain(projected):
            continue
        notes = {
            child: {key: value for key, value in getattr(projected, child).__dict__.items() if key.startswith(_PREFIX)}
            for child in PROJECTIONS
        }
        if any(notes.values()):
            attention.__dict__[_NOTES] = notes
        for child in PROJECTIONS:  # whoever froze the layers, or had them train, meant the module
            layer = getattr(projected, child)
            for packed, own in zip(_packed(attention, child), (layer.weight, layer.bias), strict=True):
                if packed is not None:
                    packed.requires_grad_(own.requires_grad)
        attention.train(projected.training)
        model.set_submodule(name, attention)


def is_plain(projected: ProjectedAttention) -> bool:
    """Whether all projections are dense layers."""
    return all(isinstance(getattr(projected, name), nn.Linear) for name in (*PROJECTIONS, "out_proj"))


def pack_projections(model: nn.Module) -> None:
    """Make an `nn.MultiheadAttention` again of every :class:`ProjectedAttention` with plain layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ProjectedAttention) and is_plain(module):
            model.set_submodule(name, module.to_attention())


@contextmanager
def projections_exposed(model: nn.Module) -> Iterator[None]:
    """Inside, the projections of PyTorch's attention modules are layers of the model."""
    replaced = expose_projections(model) if isinstance(model, nn.Module) else {}  # others are refused inside
    try:
        yield
    finally:
        conceal_projections(model, replaced)


def with_projections(function: _Function) -> _Function:
    """Runs a function of a model, its first argument, with the projections exposed."""

    @functools.wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with projections_exposed(model):
            return function(model, *args, **kwargs)

    return run  # type: ignore[return-value]
