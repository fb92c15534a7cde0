"""Transformer blocks run one at a time, on hidden states that are kept.

So a model can be worked on block by block, at the cost of a few passes over the data whatever its depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.calls import Reached, features_of, hooked, layer_input, model_output, real_rows, token_mask
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


@dataclass
class BlockStates:
    """A model on its way through the blocks of a segment: the hidden states of every batch before the next block."""

    root: nn.Module
    hidden: list[Tensor]
    masks: list[Tensor | None]
    calls: dict[str, list[_Call]]

    @classmethod
    def before(cls, blocks: Sequence[str], root: nn.Module, batches: Sequence[Any]) -> BlockStates:
        """The states before the first of some blocks."""
        states = cls(root, [], [token_mask(batch) for batch in batches], {name: [] for name in blocks})

        def on_call(name: str, args: Any, kwargs: Any) -> None:
            named = "hidden_states" in kwargs
            if name == blocks[0]:
                hidden = hidden_states(args, kwargs)
                assert hidden is not None
                states.hidden.append(hidden)
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

    def run(self, block: str, index: int) -> Tensor:
        """What a block answers one batch."""
        return self.calls[block][index](self.root.get_submodule(block), self.hidden[index])

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
