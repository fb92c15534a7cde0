"""Blocks run over a few samples of the batch at a time, and their MLPs over a few tokens.

What a block holds while it runs, forward or backward, grows with the rows it is given; its result for one sample does
not depend on the others. In slices its intermediate tensors exist for a few samples only, and fit the caches better.

An MLP treats every token alone. Where a single sample is longer than a slice, it can run in chunks of tokens, each of
which is recomputed when backward reaches it: the widest tensors of a block then exist for one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..models.position_wise import position_wise_modules
from ..models.structure import blocks_of, hidden_states, without_cache
from .meeting import FirstBatches, Meeting, attending, fresh_parts
from .recording import records
from .trials import lacks_memory, parts_agree, trial
from .wrapping import unwrap_all, wrap

SLICE_ROWS = 1600  # tokens of a slice, about: fewer cost time in small operations, more cost memory
CHUNK_ROWS = 256  # tokens of a chunk
PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


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


def without_caches(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block without caches of keys and values, as transformers calls blocks that it checkpoints."""
    if getattr(block, "_can_checkpoint_with_cache", False):  # it only reads them
        return args, kwargs
    named = {key: False if key == "use_cache" else without_cache(value) for key, value in kwargs.items()}
    return tuple(map(without_cache, args)), named


def _check_rows(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


# -------------------------------------------------------------------- slices of the batch


class BatchSlices:
    """Calls a block once for every few samples and joins what it returns.

    Arguments whose first dimension is the batch's are cut, all others are handed through. Before a block is sliced for
    the first time, and again when it gets arguments of another form, it answers as many samples as a slice has, two at
    least, together and in halves, with random numbers that change nothing: samples that differ, then with all tokens
    alike. It holds no more then than it will in slices.
    One that chooses among what it computes, as routers do, is judged on the whole batch, since what experts have room
    for may depend on it. Where the answers differ, or buffers changed (running statistics), the block is never sliced
    with such arguments. Nor is it with arguments that are no plain data (caches), or while hooks record inside of it.
    Modules in it that are yet to meet a batch (:class:`~.meeting.MeetsABatch`) see all slices before the first counts.

    A block that draws random numbers in training is sliced without gradients too: where it runs again in backward, it
    then draws the same ones.

    Args:
        rows: Tokens (of all samples together) in a slice, about; at least one sample.
        drop_caches: Hand blocks in training mode None for a cache of keys and values.
        apart: Whether the blocks are known to treat samples apart: nothing is compared, so none answers a whole batch.

    Raises:
        ValueError: If `rows` is not positive.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(6, 5, 4)
        >>> torch.allclose(BatchSlices(rows=10)(block, x), block(x))
        True
    """

    def __init__(self, rows: int = SLICE_ROWS, *, drop_caches: bool = False, apart: bool = False) -> None:
        _check_rows("rows", rows)
        self.rows, self.drop_caches, self.apart = rows, drop_caches, apart
        self._verdicts: WeakKeyDictionary[nn.Module, dict[Any, _Verdict]] = WeakKeyDictionary()
        self._first_batches = FirstBatches()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of another model, judges for itself."""
        return functools.partial(BatchSlices, self.rows, drop_caches=self.drop_caches, apart=self.apart), ()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns."""
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return self._run(function, args, kwargs)

    @torch.compiler.disable
    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function, args, kwargs = unpartial(function, args, kwargs)
        block = getattr(function, "__self__", function)
        training = getattr(block, "training", False)
        if self.drop_caches and training:
            args, kwargs = without_caches(block, args, kwargs)
        hidden = hidden_states(args, kwargs)
        if hidden is None or hidden.dim() < 3 or not (training or torch.is_grad_enabled()):
            return function(*args, **kwargs)
        samples, tokens = hidden.shape[0], hidden.shape[1:-1].numel()
        count = min(samples, -(-samples * tokens // self.rows))  # as few slices as the rows allow
        if count < 2:
            return function(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        cut = tuple(
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[0] == samples
        )
        call = _Sliced(function, leaves, structure, cut, -(-samples // count))
        verdict = self._verdict(block, call)
        if not verdict.samples_apart or not (verdict.draws or torch.is_grad_enabled()):
            return function(*args, **kwargs)
        return call.joined()

    def _verdict(self, block: Any, call: _Sliced) -> _Verdict:
        if not isinstance(block, nn.Module) or not all(isinstance(leaf, PLAIN) for leaf in call.leaves):
            return _Verdict(False)
        if block is call.function and (block._forward_hooks or block._forward_pre_hooks):
            return _Verdict(False)  # a hook expects to see the whole batch, once
        if records(block):
            return _Verdict(False)
        verdicts = self._verdicts.setdefault(block, {})
        form = (block.training, *call.form())
        if form not in verdicts:
            verdicts[form] = _judge(block, call, self.apart)
        if verdicts[form].samples_apart and not call.lacks_values():
            self._first_batches.meet(block, call.leaves[call.cut[0]].device, call.answers)
        return verdicts[form]


class _Verdict(NamedTuple):
    """What is known of a block with arguments of some form.

    Attributes:
        samples_apart: Whether it answers slices of a batch as it answers the batch.
        draws: Whether it draws random numbers.
    """

    samples_apart: bool
    draws: bool = False


@dataclass(frozen=True)
class _Sliced:
    """A call in slices.

    Attributes:
        function: What is called.
        leaves: Its arguments, flattened.
        structure: How they were nested.
        cut: Which of them are cut.
        size: Samples of a slice.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    cut: tuple[int, ...]
    size: int

    def whole(self) -> Any:
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        return self.function(*args, **kwargs)

    def shortened(self) -> _Sliced:
        """The same call with as many samples as a slice, two at least, from all over the batch, and slices of half."""
        samples, kept = len(self.leaves[self.cut[0]]), max(2, self.size)
        if kept == samples:
            return self
        chosen = [round(number * (samples - 1) / (kept - 1)) for number in range(kept)]
        leaves = [leaf[chosen] if index in self.cut else leaf for index, leaf in enumerate(self.leaves)]
        return replace(self, leaves=leaves, size=-(-kept // 2))

    def lacks_values(self) -> bool:
        """Whether there is nothing but shapes to compare."""
        return any(isinstance(leaf, FakeTensor) for leaf in self.leaves)

    def tables(self) -> list[Tensor]:
        """Arguments that are the same for all samples."""
        others = (leaf for index, leaf in enumerate(self.leaves) if index not in self.cut)
        return [leaf for leaf in others if isinstance(leaf, Tensor) and leaf.shape[:1] == (1,)]

    def answers(self) -> Iterator[Any]:
        """The results of the slices, one after the other."""
        parts = {index: self.leaves[index].split(self.size) for index in self.cut}
        for number in range(len(next(iter(parts.values())))):
            leaves = [parts[index][number] if index in parts else leaf for index, leaf in enumerate(self.leaves)]
            args, kwargs = tree_unflatten(leaves, self.structure)
            yield self.function(*args, **kwargs)

    def joined(self) -> Any:
        """One result of those of the slices."""
        flat, structures = zip(*map(tree_flatten, self.answers()), strict=True)
        columns = zip(*flat, strict=True)
        return tree_unflatten(
            [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns], structures[0]
        )

    def _hidden(self) -> Tensor:
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        hidden = hidden_states(args, kwargs)
        assert hidden is not None
        return hidden

    def _with_hidden(self, hidden: Tensor, other: Tensor) -> _Sliced:
        return replace(self, leaves=[other if leaf is hidden else leaf for leaf in self.leaves])

    def alike(self) -> _Sliced:
        """The same call with every token of the hidden states the first one."""
        hidden = self._hidden()
        return self._with_hidden(hidden, hidden.reshape(-1, hidden.shape[-1])[0].expand_as(hidden).clone())

    def unlike(self) -> _Sliced:
        """The same call with each sample of the hidden states times a number of its own, from 1 to 2."""
        hidden = self._hidden()
        factors = torch.linspace(1, 2, len(hidden), device=hidden.device).to(hidden.dtype)
        return self._with_hidden(hidden, hidden * factors.view(-1, *[1] * (hidden.dim() - 1)))

    def form(self) -> tuple[Any, ...]:
        """What slicing depends on: which arguments are cut, how long others are in samples, flags."""
        samples = self.leaves[self.cut[0]].shape[0]
        forms: list[Any] = [str(self.structure)]
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                length = leaf.shape[0] if leaf.dim() else 0
                forms.append((index in self.cut, leaf.dim(), 0 if length % samples else length // samples))
            else:
                forms.append(leaf if isinstance(leaf, (bool, str)) else type(leaf))
        return tuple(forms)


@torch.no_grad()
def _judge(block: nn.Module, call: _Sliced, apart: bool = False) -> _Verdict:
    """Judge a block; of one that is known to treat samples apart, whether it draws."""
    short = call.shortened()
    device = call.leaves[call.cut[0]].device
    with trial(block, device, call.tables()) as answers, attending(fresh_parts(block), Meeting()):
        if apart:
            next(call.answers())
        else:
            found = _samples_apart(short)
            if short is not call and (found is None or answers.chooses):
                found = _samples_apart(call)
            apart = bool(found)
        return _Verdict(apart and answers.undisturbed(), answers.draws)


def _samples_apart(call: _Sliced) -> bool | None:
    """Whether a block answers slices of a batch as it answers the batch; None where it does not answer."""
    try:
        for tried in (call,) if call.lacks_values() else (call.unlike(), call.alike()):
            if not parts_agree(tried.whole(), tried.answers()):
                return False
    except Exception as error:  # whatever it lacks
        if lacks_memory(error):
            raise
        return None
    return True


@dataclass(frozen=True)
class SlicedBlocks:
    """Technique: the blocks of a model run over a few samples at a time, in training (:class:`BatchSlices`).

    Args:
        rows: As for :class:`BatchSlices`.
        mlp_rows: Fewer tokens for the MLPs, which hold the largest intermediate tensors: each runs in slices of its
            block's slice. None: they run as the rest of the block does.
        drop_caches: As for :class:`BatchSlices`.

    Raises:
        ValueError: If a number of rows is not positive.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTModel(small)
        >>> SlicedBlocks().install(model)
        >>> model(torch.randn(20, 3, 224, 224)).last_hidden_state.shape
        torch.Size([20, 197, 16])
        >>> SlicedBlocks().remove(model)
    """

    rows: int = SLICE_ROWS
    mlp_rows: int | None = None
    drop_caches: bool = False

    def __post_init__(self) -> None:
        _check_rows("rows", self.rows)
        if self.mlp_rows is not None:
            _check_rows("mlp_rows", self.mlp_rows)

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no blocks."""
        blocks_of(model)

    def install(self, model: nn.Module) -> None:
        """Slice the blocks; raises as :meth:`check`."""
        stages = blocks_of(model).stages
        mlps = {} if self.mlp_rows is None else position_wise_modules(model)
        self.remove(model)
        for stage in stages.values():
            wrap(stage, BatchSlices(self.rows, drop_caches=self.drop_caches))
        for name, mlp in mlps.items():
            if name not in stages:
                wrap(mlp, BatchSlices(self.mlp_rows or self.rows, apart=True))  # as its operations say

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, BatchSlices)


# -------------------------------------------------------------------- chunks of an MLP's tokens


class NeedsWholeBatches(Protocol):
    """A module that says whether it can be given some of a batch's tokens at a time.

    Attributes:
        needs_whole_batches: True while it cannot, for instance because it keeps its input in a form that depends on
            the batch.
    """

    @property
    def needs_whole_batches(self) -> bool: ...


def _needs_whole_batches(module: nn.Module) -> bool:
    return any(getattr(part, "needs_whole_batches", False) for part in module.modules())


class _Chunks:
    """Calls an MLP once for every few tokens."""

    def __init__(self, rows: int) -> None:
        self.rows, self._first_batches = rows, FirstBatches()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of another model, starts anew."""
        return _Chunks, (self.rows,)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mlp: nn.Module = forward.__self__  # type: ignore[attr-defined]
        hidden = hidden_states(args, kwargs)
        if torch.compiler.is_compiling() or hidden is None or len(args) + len(kwargs) > 1:
            return forward(*args, **kwargs)
        rows = hidden.shape[:-1].numel()
        if rows <= self.rows or _needs_whole_batches(mlp) or records(mlp):
            return forward(*args, **kwargs)
        chunks = hidden.reshape(1, rows, -1).split(self.rows, dim=1)
        self._first_batches.meet(mlp, hidden.device, functools.partial(map, forward, chunks))
        if torch.is_grad_enabled():
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        return torch.cat([forward(chunk) for chunk in chunks], dim=1).view(hidden.shape)


@dataclass(frozen=True)
class ChunkedMLPs:
    """Technique: the MLPs of a model's blocks run over a few tokens at a time.

    Outputs and gradients stay exact (dropout draws other numbers). In training every chunk is recomputed in backward,
    so that of the MLP only its input and output are kept; inside a recomputed block this costs one more forward pass
    of the MLP. MLPs are found by their operations, not by their names. One in which something records, or that needs
    whole batches (:class:`NeedsWholeBatches`), runs as usual.

    Args:
        rows: Tokens (of all samples together) in a chunk. Smaller batches run as usual.

    Raises:
        ValueError: If `rows` is not positive.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> ChunkedMLPs().install(model)
        >>> list(ChunkedMLPs.find(model))
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """

    rows: int = CHUNK_ROWS

    def __post_init__(self) -> None:
        _check_rows("rows", self.rows)

    @staticmethod
    def find(model: nn.Module) -> dict[str, nn.Module]:
        """The modules that run in chunks, by name."""
        return position_wise_modules(model)

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no MLPs in its blocks, or one needs whole batches."""
        mlps = self.find(model)
        if not mlps:
            raise ValueError(f"no module inside the blocks of {type(model).__name__} treats every token by itself.")
        for name, mlp in mlps.items():
            if _needs_whole_batches(mlp):
                raise ValueError(
                    f"{name}: its layers need whole batches, such as those that compress their inputs, whose bases "
                    "belong to batches. Chunks keep no inputs for longer than their own backward: leave the "
                    "compression out (in a WasiConfig: activation_threshold=None, no activation_ranks)."
                )

    def install(self, model: nn.Module) -> None:
        """Run the MLPs in chunks; raises as :meth:`check`."""
        self.check(model)
        for mlp in self.find(model).values():
            wrap(mlp, _Chunks(self.rows))

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _Chunks)
