"""Blocks run without the padding of a batch: samples of about one length together, cut to the longest of them.

A token that no query may attend to changes nothing but its own row of a block's output. Where the loss does not depend
on such rows either, they need neither be computed nor kept: the rows of real tokens, and all gradients, stay exact.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..models.structure import blocks_of, hidden_states
from .meeting import FirstBatches, Meeting, attending, fresh_parts
from .pieces import PLAIN, without_caches
from .recording import records
from .trials import lacks_memory, parts_agree, trial
from .watching import unaccounted
from .wrapping import unwrap_all, wrap

MASKED = -9999.0  # added to a score, from here on: masks without -inf have -10000 or the least number of the dtype
GROUP_COST = 256  # rows that cost as much as the small operations of one more group
WORTH_IT = 0.9  # share of the rows above which nothing is left out
MASK_NAMES = ("attention_mask", "attn_mask")
OTHER_TOKENS = re.compile("(encoder|cross|memory|key_value|context|vision|image)")  # arguments of another sequence
PADDING_IN_LOSS = (
    "the loss depends on padded tokens, which blocks that skip padding leave out. Give them no part in the loss "
    "(labels of -100, pooling by the attention mask), or leave skip_padding (UnpaddedBlocks) out. With padding on the "
    "left a causal model predicts the first real token of a sample from a padded one: its label must be -100 too, or "
    "the padding on the right."
)


# -------------------------------------------------------------------- which rows


class Group(NamedTuple):
    """Samples, (n,), that run together, on the tokens from `start` to before `stop`."""

    samples: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """How a padded batch is taken apart.

    **Shape**
        - real: (B, N), True for tokens that are no padding
    """

    real: Tensor
    groups: tuple[Group, ...]

    def shortened(self) -> tuple[Tensor, Layout]:
        """At most four samples from all over the batch, and how they are taken apart: two groups if there are two."""
        first, last = self.groups[0], self.groups[-1]
        if first is last and len(first.samples) > 1:
            first, last = (first._replace(samples=first.samples[part]) for part in (slice(1), slice(1, None)))
        groups = [last] if first is last else [last, first]  # no group has its samples in the batch's order by chance
        chosen = [group.samples[[0, -1] if len(group.samples) > 1 else [0]] for group in groups]
        places = torch.arange(sum(map(len, chosen)), device=self.real.device).split([len(part) for part in chosen])
        cut = tuple(group._replace(samples=place) for group, place in zip(groups, places, strict=True))
        samples = torch.cat(chosen)
        return samples, Layout(self.real[samples], cut[::-1])

    def kept(self) -> Tensor:
        """Tokens that are in the group of their sample, (B, N)."""
        samples, tokens = (torch.arange(size, device=self.real.device) for size in self.real.shape)
        kept = torch.zeros_like(self.real)
        for group in self.groups:
            inside = (tokens >= group.start) & (tokens < group.stop)
            kept |= (samples[:, None] == group.samples).any(1, keepdim=True) & inside
        return kept


def real_tokens(mask: Tensor, samples: int, tokens: int) -> Tensor | None:
    """Tokens that any query may attend to, (B, N), by what a block gets as its attention mask; None for other masks.

    **Shape**
        - mask: (B, N), or (B, H, N or 1, N), True or a number added to the score

    Example:
        >>> real_tokens(torch.tensor([[1, 1, 0]]), 1, 3).tolist()
        [[True, True, False]]
    """
    if mask.shape == (samples, tokens):
        return mask != 0
    if mask.dim() != 4 or mask.shape[0] != samples or mask.shape[3] != tokens or mask.shape[2] not in (1, tokens):
        return None
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    return seen.flatten(1, 2).any(1)


def grouped(first: Sequence[int], stop: Sequence[int], cost: int = GROUP_COST) -> list[list[int]]:
    """Samples in groups such that rows, and `cost` for each group, are fewest; neighbours by length go together.

    Args:
        first: First real token of every sample.
        stop: The token after its last one.
        cost: Rows that a group counts for.

    Example:
        >>> grouped([0, 0, 0, 0], [9, 2, 2, 8], cost=3)
        [[1, 2], [3, 0]]
    """
    order = sorted(range(len(first)), key=lambda sample: stop[sample] - first[sample])
    least, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        least.append(float("inf"))
        begins.append(0)
        start, last = first[order[end - 1]], 0
        for begin in range(end - 1, -1, -1):
            start, last = min(start, first[order[begin]]), max(last, stop[order[begin]])
            rows = (end - begin) * (last - start) + cost
            if rows > least[end]:
                break  # more samples make it only dearer
            if least[begin] + rows < least[end]:
                least[end], begins[end] = least[begin] + rows, begin
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def layout_of(real: Tensor) -> Layout | None:
    """How a batch runs whose real tokens, (B, N), are known; None where that would save next to nothing."""
    tokens = real.shape[1]
    places = torch.arange(tokens, device=real.device)
    first = torch.where(real, places, tokens - 1).amin(1).tolist()
    stop = (torch.where(real, places, 0).amax(1) + 1).tolist()
    stop = [max(last, start + 1) for start, last in zip(first, stop, strict=True)]  # of a sample without real tokens
    groups = tuple(
        Group(
            torch.tensor(samples, device=real.device),
            min(first[sample] for sample in samples),
            max(stop[sample] for sample in samples),
        )
        for samples in grouped(first, stop)
    )
    rows = sum(len(group.samples) * (group.stop - group.start) for group in groups)
    return Layout(real, groups) if rows <= WORTH_IT * real.numel() else None


class _Layouts:
    """Layouts by attention mask, which all blocks of a model are given; an entry goes with its tensor."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, mask: Tensor, hidden: Tensor) -> Layout | None:
        form = (mask._version, hidden.shape[:2])
        known = self._known.get(mask)
        if known is None or known[0] != form:
            real = None if mask.requires_grad else real_tokens(mask, *hidden.shape[:2])
            known = self._known[mask] = form, None if real is None else layout_of(real)
        layout: Layout | None = known[1]
        return layout


# -------------------------------------------------------------------- taking apart, putting together


def _part(tensor: Tensor, group: Group) -> Tensor:
    return tensor[:, group.start : group.stop].index_select(0, group.samples)


class _Cut(torch.autograd.Function):
    """Hidden states, (B, N, ...), to those of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        ctx.layout, ctx.shape = layout, x.shape
        return tuple(_part(x, group) for group in layout.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _put_together(grads, ctx.layout, ctx.shape), None


class _Join(torch.autograd.Function):
    """The other way round, with zeros for what is in no group."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.layout = layout
        return _put_together(parts, layout, (*layout.real.shape, *parts[0].shape[2:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        padded = grad.flatten(0, 1).index_select(0, _places(~layout.real))
        if not bool((padded == 0).all()):
            raise RuntimeError(PADDING_IN_LOSS)
        return None, *(_part(grad, group) for group in layout.groups)


def _places(chosen: Tensor) -> Tensor:
    """Numbers of the tokens that a mask, (B, N), names, counted over the whole batch."""
    return chosen.flatten().nonzero()[:, 0]


def _put_together(parts: Sequence[Tensor], layout: Layout, shape: Sequence[int]) -> Tensor:
    whole = parts[0].new_zeros(shape)
    for part, group in zip(parts, layout.groups, strict=True):
        whole[:, group.start : group.stop].index_copy_(0, group.samples, part)
    return whole


@dataclass(frozen=True)
class _Grouped:
    """A block's call in groups.

    Attributes:
        function: What is called.
        leaves: Its arguments, flattened.
        structure: How they were nested.
        others: Which of them are of another sequence than the hidden states, such as an encoder's.
        layout: How the batch is taken apart.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    others: tuple[bool, ...]
    layout: Layout

    def whole(self) -> Any:
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        return self.function(*args, **kwargs)

    def joined(self) -> Any:
        """One result of those of the groups.

        Raises:
            ValueError: If the function answers more than hidden states.
        """
        flat, structures = zip(*map(tree_flatten, self.answers()), strict=True)
        return tree_unflatten([self._join(column) for column in zip(*flat, strict=True)], structures[0])

    def answers(self) -> Iterator[Any]:
        """The results of the groups, one after the other."""
        for args, kwargs in self.parts():
            yield self.function(*args, **kwargs)

    def parts(self) -> list[Any]:
        """The arguments of every group."""
        cut = [self._cut(index) for index in range(len(self.leaves))]
        return [tree_unflatten(leaves, self.structure) for leaves in zip(*cut, strict=True)]

    def shortened(self) -> _Grouped:
        """The same call with a few samples."""
        samples, layout = self.layout.shortened()
        leaves = [
            leaf.index_select(0, samples) if isinstance(leaf, Tensor) and self._of_samples(leaf) else leaf
            for leaf in self.leaves
        ]
        return replace(self, leaves=leaves, layout=layout)

    def disturbed(self) -> _Grouped:
        """The same call with noise for all that the groups leave out, which no real token may attend to."""
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        hidden, kept = hidden_states(args, kwargs), self.layout.kept()
        leaves = list(self.leaves)
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if leaf is hidden:
                leaves[index] = _noise_outside(leaf, self.layout.real, [1])
            elif (dims := self._token_dims(index)) and not self._tells_padding(leaf):
                leaves[index] = _noise_outside(leaf, kept if self._of_samples(leaf) else kept.any(0)[None], dims)
        return replace(self, leaves=leaves)

    def _tells_padding(self, leaf: Tensor) -> bool:
        """Whether it is a mask that says which tokens are real."""
        real = None if isinstance(leaf, FakeTensor) else real_tokens(leaf, *self.layout.real.shape)
        return real is not None and torch.equal(real, self.layout.real)

    def form(self) -> tuple[Any, ...]:
        """What it depends on how the arguments are cut: their dimensions, flags, whether samples are parted."""
        samples, groups = len(self.layout.real), len(self.layout.groups)
        forms: list[Any] = [str(self.structure), samples > 1, groups > 1]
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                length = leaf.shape[0] if leaf.dim() else 0
                times = 0 if length % samples else length // samples
                forms.append((leaf.dim(), leaf.dtype, times, self._of_samples(leaf), *self._token_dims(index)))
            else:
                forms.append(leaf if isinstance(leaf, (bool, str)) else type(leaf))
        return tuple(forms)

    def _of_samples(self, leaf: Tensor) -> bool:
        return leaf.dim() > 1 and leaf.shape[0] == len(self.layout.real)

    def _token_dims(self, index: int) -> list[int]:
        """Dimensions that run over tokens: both of a mask or a table of pairs, else the first that may be one.

        Of what is of another sequence only a table of pairs has one, that of the queries.
        """
        leaf = self.leaves[index]
        samples, tokens = self.layout.real.shape
        if self.others[index]:
            return [2] if leaf.dim() == 4 and leaf.shape[2] == tokens else []
        possible = [
            dim
            for dim, size in enumerate(leaf.shape)
            if size == tokens and (dim > 0 or leaf.dim() == 1 or tokens != samples)
        ]
        pairs = leaf.dim() == 4 or not leaf.is_floating_point()
        return possible if pairs else possible[:1]

    def _cut(self, index: int) -> Sequence[Any]:
        groups, leaf = self.layout.groups, self.leaves[index]
        if not isinstance(leaf, Tensor):
            return [leaf] * len(groups)
        dims = self._token_dims(index)
        if leaf.dim() > 2 and leaf.shape[:2] == self.layout.real.shape and leaf.requires_grad and dims == [1]:
            parts: tuple[Tensor, ...] = _Cut.apply(leaf, self.layout)
            return parts
        cut = []
        for group in groups:
            part = leaf
            for dim in dims:
                part = part.narrow(dim, group.start, group.stop - group.start)
            cut.append(part.index_select(0, group.samples) if self._of_samples(leaf) else part)
        return cut

    def _join(self, column: Sequence[Any]) -> Any:
        first = column[0]
        if not isinstance(first, Tensor):
            return first
        for part, group in zip(column, self.layout.groups, strict=True):
            _check_hidden(part, len(group.samples), group.stop - group.start)
        return _Join.apply(self.layout, *column)


def _check_hidden(answer: Tensor, samples: int, tokens: int) -> None:
    if answer.dim() < 3 or answer.shape[:2] != (samples, tokens):
        raise ValueError(f"only hidden states can be put together, got a tensor of shape {tuple(answer.shape)}.")


def _noise_outside(leaf: Tensor, kept: Tensor, dims: list[int]) -> Tensor:
    """Other values, of the size of those there, and nothing masked, where a token is not kept.

    **Shape**
        - kept: (B or 1, N), where the leaf has B or any number of samples; dims: its dimensions that run over tokens
    """
    inside = kept.new_ones(())
    for dim in dims:
        shape = [1] * leaf.dim()
        shape[0], shape[dim] = len(kept), kept.shape[1]  # of a leaf without samples, dimension 0 is that of tokens
        inside = inside & kept.view(shape)
    if leaf.dtype == torch.bool:
        return torch.where(inside, leaf, ~leaf)
    if not leaf.is_floating_point():
        return torch.where(inside, leaf, leaf.amax() + leaf.amin() - leaf)
    sizes = leaf.detach().float().clamp(min=MASKED).square().mean(tuple(range(leaf.dim() - 1)), keepdim=True).sqrt()
    noise = torch.where(leaf > MASKED, torch.randn_like(leaf) * sizes.to(leaf.dtype), 0)
    return torch.where(inside, leaf, noise)


@torch.no_grad()
def _padding_apart(block: nn.Module, call: _Grouped) -> bool:
    """Whether a block answers real tokens in groups as it answers them in the batch, whatever the others hold.

    It is judged on a few samples; one that chooses, as routers do, on the whole batch too.
    """
    with unaccounted():
        apart, chooses = _real_tokens_apart(block, call.shortened())
        return apart and (not chooses or _real_tokens_apart(block, call)[0])


def _real_tokens_apart(block: nn.Module, call: _Grouped) -> tuple[bool, bool]:
    """Whether it does, and whether it chose anything."""
    layout, groups = call.layout, call.parts()
    with trial(block, layout.real.device) as answers, attending(fresh_parts(block), Meeting()):
        try:
            whole = tree_leaves(call.disturbed().whole())
            ours = [tree_leaves(call.function(*args, **kwargs)) for args, kwargs in groups]
            apart, chooses = answers.undisturbed(), answers.chooses
            return apart and _real_rows_agree(whole, ours, layout), chooses
        except Exception as error:  # whatever it lacks in groups
            if lacks_memory(error):
                raise
            return False, True


def _real_rows_agree(whole: list[Any], ours: list[list[Any]], layout: Layout) -> bool:
    """Whether the answers of the groups are that of the batch, for real tokens."""
    for leaf in whole:
        if isinstance(leaf, Tensor):
            _check_hidden(leaf, *layout.real.shape)
    theirs = [[_part(leaf, group) if isinstance(leaf, Tensor) else leaf for leaf in whole] for group in layout.groups]
    columns = zip(*_real_rows(theirs, layout), strict=True)
    expected = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return parts_agree(expected, _real_rows(ours, layout))


def _real_rows(answers: Iterable[list[Any]], layout: Layout) -> Iterator[list[Any]]:
    for answer, group in zip(answers, layout.groups, strict=True):
        real = _places(_part(layout.real, group))
        for leaf in answer:
            if isinstance(leaf, Tensor):
                _check_hidden(leaf, len(group.samples), group.stop - group.start)
        yield [leaf.flatten(0, 1).index_select(0, real) if isinstance(leaf, Tensor) else leaf for leaf in answer]


# -------------------------------------------------------------------- models


class _Unpadded:
    """Calls a block in groups of samples without the padding that its attention mask tells of."""

    def __init__(self) -> None:
        self._layouts = _Layouts()
        self._verdicts: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
        self._first_batches = FirstBatches()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of another model, judges for itself."""
        return _Unpadded, ()

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return self._run(forward, args, kwargs)

    @torch.compiler.disable
    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block: nn.Module = forward.__self__  # type: ignore[attr-defined]
        names = _names(block, args, kwargs)
        mask = next((value for name, value in names if name in MASK_NAMES), None)
        hidden = hidden_states(args, kwargs)
        if hidden is None or hidden.dim() != 3 or type(mask) is not Tensor:
            return forward(*args, **kwargs)  # of a mask without values nothing is known
        layout = self._layouts.of(mask, hidden)
        if layout is None or records(block):
            return forward(*args, **kwargs)
        if block.training:
            args, kwargs = without_caches(block, args, kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, PLAIN) for leaf in leaves):
            return forward(*args, **kwargs)
        others = tuple(
            value is not hidden and OTHER_TOKENS.match(name) is not None
            for name, value in names
            for _ in tree_leaves(value)
        )
        call = _Grouped(forward, leaves, structure, others, layout)
        verdicts = self._verdicts.setdefault(block, {})
        form = (block.training, *call.form())
        if form not in verdicts:
            verdicts[form] = _padding_apart(block, call)
        if not verdicts[form]:
            return forward(*args, **kwargs)
        if not isinstance(hidden, FakeTensor):
            self._first_batches.meet(block, hidden.device, call.answers)
        return call.joined()


def _names(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """A block's arguments by name; those whose place has none are called by nothing."""
    names = _parameters(type(block).forward) if args else ()
    names += ("",) * (len(args) - len(names))
    return [*zip(names, args, strict=False), *kwargs.items()]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


@dataclass(frozen=True)
class UnpaddedBlocks:
    """Technique: the blocks of a model neither compute nor keep the padding of a batch.

    Samples run in groups of about one length, each cut to its longest sample: time and memory follow the real tokens,
    on whichever side the padding is. Outputs of real tokens and all gradients are exact as long as the loss does not
    depend on padded tokens, whose hidden states become zeros. That is checked in every backward pass, which raises a
    RuntimeError where their gradient is not zero.

    What is padding a block's own attention mask says; what is of another sequence, such as an encoder's states, stays
    whole. Before a block runs in groups for the first time, it answers a few samples both ways (the whole batch if it
    chooses, as routers do), with noise in place of all that is left out; where the answers for real tokens differ, or
    it answers more than hidden states (T5's position bias), it goes on with whole batches. So it does without
    gradients, with `attention_mask=None`, and while hooks record inside of it. In training mode blocks get no cache of
    keys and values. Modules that are yet to meet a batch (:class:`~.meeting.MeetsABatch`) see all groups before the
    first counts.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(
        ...     vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = BertModel(small)
        >>> UnpaddedBlocks().install(model)
        >>> mask = torch.ones(32, 40, dtype=torch.int64)
        >>> mask[:16, 10:] = 0
        >>> states = model(torch.randint(30, (32, 40)), attention_mask=mask).last_hidden_state
        >>> states[mask.bool()].sum().backward()
        >>> UnpaddedBlocks().remove(model)
    """

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no blocks."""
        blocks_of(model)

    def install(self, model: nn.Module) -> None:
        """Have the blocks leave padding out; raises as :meth:`check`."""
        blocks = blocks_of(model).blocks
        self.remove(model)
        run = _Unpadded()  # shared, because all blocks get the same mask
        for block in blocks.values():
            wrap(block, run)

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _Unpadded)
