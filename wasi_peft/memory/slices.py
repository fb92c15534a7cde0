"""A transformer block run over a few samples of the batch at a time.

What a block holds while it runs, forward or backward, grows with the rows it is given; its result for one sample does
not depend on the others. In slices its intermediate tensors exist for a few samples only, and fit the caches better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..tuner.config import WasiConfig
from ..tuner.targets import default_target_names
from .chunked_mlp import position_wise_modules
from .saved import block_names

SLICE_ROWS = 1600  # tokens of a slice, about: fewer cost time in small operations, more cost memory
TOLERANCE = 0.01  # of the norm of a block's output; samples that meet change it by far more
_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)

# whether blocks of a class can be sliced, by class and by which of its arguments belong to samples
_verdicts: dict[tuple[type, tuple[int, ...]], bool] = {}


def unpartial(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A call without `functools.partial`: function and all its arguments; a method is bound to its module."""
    if isinstance(function, functools.partial):
        args, kwargs = function.args + args, {**function.keywords, **kwargs}
        function = function.func
    if args and isinstance(args[0], nn.Module) and isinstance(function, FunctionType):
        function, args = MethodType(function, args[0]), args[1:]
    return function, args, kwargs


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states: the first positional argument, or the keyword argument of that name."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


@dataclass(frozen=True)
class BatchSlices:
    """Calls a block once for every few samples and joins what it returns.

    Arguments whose first dimension is the batch's are cut, all others are handed through. Before a block of a class is
    sliced for the first time, it answers one batch whole and in slices; where the answers differ, or it fails, its
    class is never sliced. Nor is one with forward hooks, batch normalisation, or arguments that are no plain data
    (caches).

    Args:
        run: What calls the block: `run(block, *args, **kwargs)`.
        rows: Tokens (of all samples together) in a slice, about; at least one sample.

    Raises:
        ValueError: If `rows` is not positive.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(6, 5, 4)
        >>> torch.allclose(BatchSlices(lambda block, x: block(x), rows=10)(block, x), block(x))
        True
    """

    run: Callable[..., Any]
    rows: int = SLICE_ROWS

    def __post_init__(self) -> None:
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows must be an integer of at least 1, got {self.rows!r}.")

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `run(function, *args, **kwargs)` returns."""
        function, args, kwargs = unpartial(function, args, kwargs)
        hidden = block_input(args, kwargs)
        if hidden is None or hidden.dim() < 3 or not torch.is_grad_enabled():
            return self.run(function, *args, **kwargs)
        samples, tokens = hidden.shape[0], hidden.shape[1:-1].numel()
        count = min(samples, -(-samples * tokens // self.rows))  # as few slices as the rows allow
        if count < 2:
            return self.run(function, *args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        cut = tuple(
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == samples
        )
        size = -(-samples // count)
        if not _can_be_sliced(function, leaves, structure, cut, size):
            return self.run(function, *args, **kwargs)
        calls = _sliced(leaves, structure, cut, size)
        return _joined([self.run(function, *some, **named) for some, named in calls])


def _sliced(leaves: list[Any], structure: Any, cut: Sequence[int], size: int) -> list[Any]:
    """Arguments of every slice's call, as (args, kwargs)."""
    parts = {index: leaves[index].split(size) for index in cut}
    calls = []
    for number in range(len(next(iter(parts.values())))):
        calls.append([parts[index][number] if index in parts else leaf for index, leaf in enumerate(leaves)])
    return [tree_unflatten(call, structure) for call in calls]


def _joined(results: list[Any]) -> Any:
    """One result of those of the slices."""
    flat, structures = zip(*map(tree_flatten, results), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*flat, strict=True)]
    return tree_unflatten(leaves, structures[0])


def _can_be_sliced(
    function: Callable[..., Any], leaves: list[Any], structure: Any, cut: tuple[int, ...], size: int
) -> bool:
    block = getattr(function, "__self__", function)
    if not isinstance(block, nn.Module) or not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return False
    if getattr(function, "__name__", "") != "forward" and (block._forward_hooks or block._forward_pre_hooks):
        return False  # a hook expects to see the whole batch, once
    if any(isinstance(leaf, FakeTensor) for leaf in leaves):
        return True  # without values there is nothing to compare
    key = (type(block), cut)
    if key not in _verdicts:
        _verdicts[key] = _samples_apart(block, function, leaves, structure, cut, size)
    return _verdicts[key]


@torch.no_grad()
def _samples_apart(
    block: nn.Module, function: Callable[..., Any], leaves: list[Any], structure: Any, cut: Sequence[int], size: int
) -> bool:
    """Whether a block answers slices of a batch as it answers the batch."""
    modules = [module for module in block.modules() if module.training]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        return False
    args, kwargs = tree_unflatten(leaves, structure)
    try:
        for module in modules:
            module.training = False  # dropout draws other numbers for a slice
        whole = function(*args, **kwargs)
        joined = _joined([function(*some, **named) for some, named in _sliced(leaves, structure, cut, size)])
    except Exception:  # whatever it lacks, in slices or at all: the real call will say so
        return False
    finally:
        for module in modules:
            module.training = True
    pairs = zip(tree_leaves(whole), tree_leaves(joined), strict=True)
    return all(_agree(ours, theirs) for ours, theirs in pairs)


def _agree(whole: Any, joined: Any) -> bool:
    if not isinstance(whole, Tensor):
        return whole is joined or bool(whole == joined)
    if whole.shape != joined.shape:
        return False
    return bool((whole - joined).norm() <= TOLERANCE * whole.norm())


# -------------------------------------------------------------------- models


def slice_blocks(model: nn.Module, rows: int = SLICE_ROWS, *, mlp_rows: int | None = None) -> list[str]:
    """Have the transformer blocks of a model run over a few samples at a time, in training.

    Args:
        model: Any transformer, with or without adapters.
        rows: As for :class:`BatchSlices`.
        mlp_rows: Fewer tokens for the MLPs, which hold the largest intermediate tensors: each runs in slices of its
            block's slice. None: they run as the rest of the block does.

    Returns:
        Names of the blocks, which are the outermost numbered containers of the Linear layers.

    Raises:
        ValueError: If a number of rows is not positive, or the forward of a block or MLP was replaced by something
            else. Nothing is changed then.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> slice_blocks(ViTModel(small))
        ['layers.0', 'layers.1']
    """
    blocks = {name: model.get_submodule(name) for name in block_names(default_target_names(model, WasiConfig()))}
    wanted = [(blocks, BatchSlices(_call, rows))]
    if mlp_rows is not None:
        wanted.append((position_wise_modules(model), BatchSlices(_call, mlp_rows)))
    for modules, _ in wanted:
        for name, module in modules.items():
            if "forward" in module.__dict__ and not _is_sliced(module):
                replaced = type(module.__dict__["forward"]).__name__
                raise ValueError(f"{name}: its forward was replaced by a {replaced}, which must be undone first.")
    for modules, slices in wanted:
        for module in modules.values():
            module.__dict__["forward"] = functools.partial(_forward_in_slices, module, slices)
    return list(blocks)


def unslice_blocks(model: nn.Module) -> None:
    """Undo :func:`slice_blocks`; nothing happens where it is not in use."""
    for module in model.modules():
        if _is_sliced(module):
            del module.__dict__["forward"]


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _forward_in_slices(block: nn.Module, slices: BatchSlices, *args: Any, **kwargs: Any) -> Any:
    forward = MethodType(type(block).forward, block)
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    return slices(forward, *args, **kwargs)


def _is_sliced(block: nn.Module) -> bool:
    return getattr(block.__dict__.get("forward"), "func", None) is _forward_in_slices
