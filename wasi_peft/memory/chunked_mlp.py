"""The MLP of a transformer block, run over a few tokens at a time.

Where blocks are recomputed in backward, the peak of a training step is what the widest part of one block keeps while
its own backward runs: the MLP's intermediate tensors for all tokens. An MLP treats every token alone, so it can run in
chunks, each of which is recomputed when backward reaches it: the intermediate tensors then exist for one chunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ..tuner.layer import WasiLayer
from ..tuner.targets import _inside_blocks

COMPRESSED = (
    "{name}: its WASI layers keep compressed inputs, whose bases belong to whole batches. Chunks keep no inputs for "
    "longer than their own backward: set activation_threshold=None (and no activation_ranks) to run it in chunks."
)


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


def _compresses(module: nn.Module) -> bool:
    """Whether the active WASI adapters in a module keep compressed inputs."""
    layers = (layer for layer in module.modules() if isinstance(layer, WasiLayer))
    return any(layer.compresses_input for layer in layers)


def _forward_in_chunks(module: nn.Module, chunk_rows: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    rows = hidden.shape[:-1].numel()
    if args or kwargs or rows <= chunk_rows or torch.compiler.is_compiling() or _compresses(module):
        return forward(hidden, *args, **kwargs)
    if torch.is_grad_enabled():
        forward = partial(checkpoint, forward, use_reentrant=False)
    chunks = hidden.reshape(1, rows, -1).split(chunk_rows, dim=1)
    return torch.cat([forward(chunk) for chunk in chunks], dim=1).view(hidden.shape)


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers under a module, those with an adapter as one."""
    for child in module.children():
        if isinstance(child, (nn.Linear, Conv1D, BaseTunerLayer)):
            yield child
        else:
            yield from _linears(child)


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1


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


def is_position_wise(module: nn.Module) -> bool:
    """Whether a module maps hidden states to hidden states, each token by itself.

    Told from its operations on four tokens, its linear layers left out, so that no weight has to be there.
    """
    linear = next(_linears(module), None)
    width = getattr(linear, "in_features", getattr(linear, "nx", None))
    if width is None or not _takes_hidden_states_alone(module):
        return False
    like = next(p for p in module.parameters() if p.is_floating_point())
    tokens = torch.zeros(1, 4, width, device=like.device, dtype=like.dtype)
    places = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent._modules.items()
        if isinstance(child, (nn.Linear, Conv1D, BaseTunerLayer))
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
    """The position-wise modules with two or more linear layers inside the blocks, outermost ones only."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        numbered = _inside_blocks(name) and not isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))
        if not inside and numbered and len(list(_linears(module))) > 1 and is_position_wise(module):
            found[name] = module
    return found


def chunk_mlps(model: nn.Module, *, chunk_rows: int = 256) -> list[str]:
    """Run the MLPs of a transformer's blocks over `chunk_rows` tokens at a time.

    Outputs and gradients stay exact (dropout draws other numbers). In training every chunk is recomputed in backward,
    so that of the MLP only its input and output are kept; inside a recomputed block this costs one more forward pass
    of the MLP. MLPs are found by their operations, not by their names.

    Args:
        model: A transformers model or a PEFT model of one; it may become a PEFT model before or after.
        chunk_rows: Tokens (of all samples together) in a chunk. Smaller batches run as usual.

    Returns:
        Names of the modules that now run in chunks.

    Raises:
        ValueError: If `chunk_rows` is not positive, no such module exists, or one holds WASI layers that keep
            compressed inputs. Nothing is changed then. (Where such an adapter comes later, the MLP runs as usual.)

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        ... )
        >>> chunk_mlps(LlamaForCausalLM(config))
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    if not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be an integer of at least 1, got {chunk_rows!r}.")
    mlps = position_wise_modules(model)
    if not mlps:
        raise ValueError(f"no module inside the blocks of {type(model).__name__} treats every token by itself.")
    for name, module in mlps.items():
        if _compresses(module):
            raise ValueError(COMPRESSED.format(name=name))
        if "forward" in module.__dict__ and not _is_chunked(module):
            raise ValueError(f"{name}: its forward was replaced by {module.forward!r}, which must be undone first.")
    for module in mlps.values():
        module.__dict__["forward"] = partial(_forward_in_chunks, module, chunk_rows)
    return list(mlps)


def _is_chunked(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward_in_chunks


def unchunk_mlps(model: nn.Module) -> None:
    """Undo :func:`chunk_mlps`; nothing happens where it is not in use."""
    for module in model.modules():
        if _is_chunked(module):
            del module.__dict__["forward"]
