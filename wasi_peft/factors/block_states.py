"""Transformer blocks run one at a time, on hidden states that are kept.

So a model can be worked on block by block, at the cost of a few passes over the data whatever its depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.calls import (
    Reached,
    features_of,
    hooked,
    layer_input,
    model_output,
    real_rows,
    tensors_in,
    token_mask,
)
from ..models.structure import hidden_states, without_cache


@dataclass
class _Call:
    """A block's call without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if "hidden_states" in self.kwargs:
            return features_of(block(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return features_of(block(hidden, *self.args, **self.kwargs))


def segments(model: nn.Module, blocks: Sequence[str], batch: Any) -> tuple[list[list[str]], int]:
    """Blocks in the order in which they run, cut where one does not read what the one before it returned.

    Blocks that run more than once, or read no hidden states, are left out. Also the rows of the first block's input.
    """
    calls: list[tuple[str, Tensor | None]] = []
    outputs: dict[str, Tensor] = {}

    def before(name: str, args: Any, kwargs: Any) -> None:
        calls.append((name, hidden_states(args, kwargs)))

    def after(name: str, output: Any) -> None:
        outputs[name] = features_of(output)

    with hooked(model, blocks, before, after):
        model_output(model, batch)
    count = Counter(name for name, _ in calls)
    chains: list[list[str]] = []
    rows = 0
    for name, hidden in calls:
        if hidden is None or count[name] > 1:
            continue
        rows = rows or hidden.shape[:-1].numel()
        if chains and outputs[chains[-1][-1]] is hidden:
            chains[-1].append(name)
        else:
            chains.append([name])
    return chains, rows


Answer = Callable[[Tensor], Any]  # what a block returns, of its hidden states


def answer_form(root: nn.Module, block: str, batch: Any) -> Answer:
    """How a block returns its hidden states, as it did for one batch: alone, or in a tuple.

    Raises:
        ValueError: If it returns other tensors beside them, on which the next blocks could depend.
    """
    outputs: list[Any] = []

    def after(_: str, output: Any) -> None:
        outputs.append(output)
        raise Reached

    with hooked(root, [block], after=after):
        try:
            model_output(root, batch)
        except Reached:
            pass
    output = outputs[0] if outputs else None
    if len(tensors_in(output)) != 1 or not isinstance(output, (Tensor, tuple)):
        raise ValueError(
            f"{block}: a block that is run alone must return its hidden states and no other tensor, got "
            f"{len(tensors_in(output))} tensors in a {type(output).__name__}."
        )
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    return lambda hidden: tuple(hidden if isinstance(part, Tensor) else part for part in output)


@contextmanager
def passing_on(
    root: nn.Module, blocks: Iterable[str], form: Answer, replaced: Callable[[str], Tensor | None] = lambda block: None
) -> Iterator[None]:
    """Blocks that do nothing: they return the hidden states that they are given, so none of their weights is needed.

    What else they are called with (masks, position embeddings) is what the model gives them.

    Args:
        root: The model.
        blocks: Names of all its blocks.
        form: How they return hidden states, see :func:`answer_form`.
        replaced: What a block is to return instead; None for what it is given.
    """

    def stand_in(block: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, other = hidden_states(args, kwargs), replaced(block)
            assert hidden is not None
            return form(hidden.view_as(hidden) if other is None else other)  # never the same tensor

        return forward

    modules = {block: root.get_submodule(block) for block in blocks}
    try:
        for block, module in modules.items():
            module.__dict__["forward"] = stand_in(block)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


class Hidden(Protocol):
    """Hidden states by batch: a list, or what keeps them elsewhere."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...
    def __setitem__(self, index: int, value: Tensor, /) -> None: ...
    def append(self, value: Tensor, /) -> None:
        """Add those of the next batch."""


@dataclass
class BlockStates:
    """A model on its way through the blocks of a segment: the hidden states of every batch before the next block."""

    root: nn.Module
    hidden: Hidden
    masks: list[Tensor | None]
    calls: dict[str, list[_Call]]

    @classmethod
    def before(
        cls, blocks: Sequence[str], root: nn.Module, batches: Sequence[Any], hidden: Hidden | None = None
    ) -> BlockStates:
        """The states before the first of some blocks.

        Args:
            blocks: In the order in which they run.
            root: The model.
            batches: What runs through it.
            hidden: What keeps the states, empty; a list if None.
        """
        masks, calls = [token_mask(batch) for batch in batches], dict[str, list[_Call]]()
        states = cls(root, [] if hidden is None else hidden, masks, calls)
        calls.update((name, []) for name in blocks)

        def on_call(name: str, args: Any, kwargs: Any) -> None:
            named = "hidden_states" in kwargs
            if name == blocks[0]:
                first = hidden_states(args, kwargs)
                assert first is not None
                states.hidden.append(first)
            rest = {key: without_cache(value) for key, value in kwargs.items() if key != "hidden_states"}
            rest |= {"hidden_states": None} if named else {}
            others = args if named else args[1:]
            states.calls[name].append(_Call(tuple(map(without_cache, others)), rest))
            if name == blocks[-1]:
                raise Reached

        for batch in batches:
            with hooked(root, blocks, on_call):
                try:
                    model_output(root, batch)
                except Reached:
                    continue
        return states

    def run(self, block: str, index: int, hidden: Tensor | None = None) -> Tensor:
        """What a block answers one batch, of its hidden states or of others."""
        hidden = self.hidden[index] if hidden is None else hidden
        return self.calls[block][index](self.root.get_submodule(block), hidden)

    def rows_before(self, block: str, index: int, layer: str) -> Tensor | None:
        """The rows of one batch, without padding, that a layer of a block reads; None if they are not its tokens'."""
        inputs: list[Tensor] = []

        def on_call(_: str, args: Any, kwargs: Any) -> None:
            inputs.append(layer_input(args, kwargs))
            raise Reached

        with hooked(self.root, [layer], on_call):
            try:
                self.run(block, index)
            except Reached:
                pass
        if not inputs or inputs[0].shape[:-1].numel() != self.hidden[index].shape[:-1].numel():
            return None
        return real_rows(inputs[0], self.masks[index]).to(torch.float32)

    def advance(self, block: str) -> None:
        """Run a block on every batch."""
        for index in range(len(self.hidden)):
            self.hidden[index] = self.run(block, index)
