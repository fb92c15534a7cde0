"""Data through the blocks of a skeleton, of which one at a time has its weights.

The model's own forward pass says what its blocks are called with, once, while they only pass hidden states on
(:mod:`factors.block_states`). Then block after block is read and run on the hidden states of all batches, which are
kept in files between the blocks, so that an interrupted sweep goes on where it stopped. Gradients go back in the same
way, through each block that is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factors.block_states import Answer, BlockStates, answer_form, passing_on, segments
from ..factors.collecting import Collector, Gradients, Run, passes
from ..factors.expert_factors import ExpertInputs, groups_within, recording
from ..factors.statistics import InputStatistics, backpropagate_signs
from ..models.calls import evaluating, features_of, model_output
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from .skeleton import Skeleton
from .working import TensorFiles, WorkingFolder

KeepInputs = Callable[[str, ExpertInputs], None]
Keep = Callable[[str, nn.Module, InputStatistics], None]  # takes what the sums over its input say of a layer


class BlockSweeps:
    """A skeleton and calibration batches, made ready to run block by block.

    Args:
        skeleton: Of the model; all its blocks run one after the other, each once.
        batches: Without labels.
        targets: The linear layers to collect, by name; all in blocks.
        max_memory_bytes: Bound on the memory for sums; a block runs again for those that exceed it.
        seed: Of random projections.

    Raises:
        ValueError: If the blocks do not run in that way, or return more than hidden states.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Any],
        targets: dict[str, nn.Module],
        max_memory_bytes: int,
        seed: int = 0,
    ) -> None:
        self.skeleton, self.batches = skeleton, batches
        self.targets, self.max_memory_bytes, self.seed = targets, max_memory_bytes, seed
        self.blocks = skeleton.blocks
        self._backbone: nn.Module = skeleton.model.base_model
        self._prefix = _prefix_of(skeleton.model, self._backbone)
        self._check_names()
        self._inner = [block.removeprefix(self._prefix) for block in self.blocks]  # names in the backbone
        self._around = [name for name in skeleton.outside if name.startswith(self._prefix)]
        self._form = self._check_runs()

    def _check_names(self) -> None:
        structure = self.skeleton.structure
        for name in self.targets:
            if structure.block_of(name) is None:
                raise ValueError(
                    f"{name}: layers prepared from data must be in transformer blocks; leave this one out."
                )
        kinds = {type(block).__name__ for block in structure.blocks.values()}
        if len(kinds) > 1 or not all(block.startswith(self._prefix) for block in self.blocks):
            raise ValueError(
                "data need transformer blocks of one kind in the base model, which run one after the other, got "
                f"{', '.join(sorted(kinds))}. Prepare this model in memory, by compress."
            )

    def _check_runs(self) -> Answer:
        """How blocks return what they answer, of a model whose blocks can be run one at a time."""
        first = self.batches[0]
        with self.skeleton.filled(self._around), evaluating(self.skeleton.model, gradients=False):
            with self.skeleton.filled(self.skeleton.inside(self.blocks[0])):
                form = answer_form(self._backbone, self._inner[0], first)
            with passing_on(self._backbone, self._inner, form):
                chains, _ = segments(self._backbone, self._inner, first)
        if chains != [self._inner]:
            raise ValueError(
                "data need transformer blocks that run one after the other, each once, got "
                f"{len(chains)} chains. Prepare this model in memory, by compress."
            )
        return form

    def begin(self, work: WorkingFolder) -> None:
        """Find out what the blocks are called with, and the hidden states before the first.

        Args:
            work: Keeps hidden states and gradients.
        """
        self._work = work
        hidden = TensorFiles(self._files("hidden", 0).folder)
        with self.skeleton.filled(self._around), evaluating(self.skeleton.model, gradients=False):
            with passing_on(self._backbone, self._inner, self._form):
                self._states = BlockStates.before(self._inner, self._backbone, self.batches, hidden)

    def _files(self, kind: str, boundary: int) -> TensorFiles:
        """Hidden states or gradients of all batches before a block."""
        return TensorFiles(self._work.at(kind, f"{boundary:05d}"), len(self.batches))

    # ---------------------------------------------------------------- sweeps

    def forward(self, index: int, keep: Keep | None = None) -> None:
        """Run a block on the hidden states before it, which gives those before the next.

        Args:
            index: Of the block.
            keep: Gets what the sums say of each target in it; None to collect nothing.
        """
        block = self._inner[index]
        before, after = self._files("hidden", index), self._files("hidden", index + 1)

        def run(collector: Collector) -> None:
            for batch in range(len(self.batches)):
                collector.mask = self._states.masks[batch]
                after[batch] = self._states.run(block, batch, before[batch])

        self._run(index, run, None, keep)

    def features(self) -> None:
        """Gradients of a random +-1 projection of the features, for the hidden states behind the last block.

        Raises:
            ValueError: If the features do not depend on them.
        """
        signs = torch.Generator().manual_seed(self.seed)
        hidden, gradients = (self._files(kind, len(self.blocks)) for kind in ("hidden", "gradient"))
        with self.skeleton.filled(self._around), evaluating(self.skeleton.model, gradients=True):
            for index, batch in enumerate(self.batches):
                last = hidden[index].requires_grad_(True)

                def replaced(block: str, last: Tensor = last) -> Tensor | None:
                    return last.clone() if block == self._inner[-1] else None

                with passing_on(self._backbone, self._inner, self._form, replaced):
                    output = model_output(self._backbone, batch)
                backpropagate_signs(features_of(output), self._states.masks[index], signs)
                if last.grad is None:
                    raise ValueError(
                        "gradients need features that depend on the last block, got none. Use gradients=None."
                    )
                gradients[index] = last.grad

    def backward(self, index: int, keep: Keep) -> None:
        """Go back through a block, which runs again for that, and collect sums over inputs and output gradients.

        Args:
            index: Of the block.
            keep: Gets what the sums say of each target in it.
        """
        block = self._inner[index]
        hidden, above = self._files("hidden", index), self._files("gradient", index + 1)
        below = self._files("gradient", index)

        def run(collector: Collector) -> None:
            for batch in range(len(self.batches)):
                collector.mask = self._states.masks[batch]
                before = hidden[batch].requires_grad_(True)
                self._states.run(block, batch, before).backward(above[batch])
                assert before.grad is not None
                below[batch] = before.grad

        self._run(index, run, "features", keep)

    def _run(self, index: int, run: Run, gradients: Gradients | None, keep: Keep | None) -> None:
        """Run a block, as often as the memory for sums calls for."""
        model, prefix = self.skeleton.model, f"{self.blocks[index]}."
        pending = {name: module for name, module in self.targets.items() if name.startswith(prefix) and keep}
        with self.skeleton.filled(self.skeleton.inside(self.blocks[index])):
            if keep is None or not pending:
                with evaluating(model, bool(gradients)):
                    run(Collector({}, self.max_memory_bytes, gradients, self.seed))
                return
            options: dict[str, Any] = {"gradients": gradients, "seed": self.seed, "fresh": False, "compared_calls": 0}
            for collector in passes(model, run, pending, max_memory_bytes=self.max_memory_bytes, **options):
                for statistics in collector.take():
                    for name in statistics.modules:
                        keep(name, pending.pop(name), statistics)

    def experts(self, index: int, stacks: Mapping[str, ExpertStack], keep: KeepInputs) -> None:
        """Run a block on the hidden states before it for the inputs of its packed experts alone.

        Args:
            index: Of the block.
            stacks: Packed weights by name, of any block.
            keep: Gets what has seen the inputs of each in the block, with its weights.
        """
        block, prefix = self._inner[index], f"{self.blocks[index]}."
        module, before = self.skeleton.model.get_submodule(self.blocks[index]), self._files("hidden", index)
        inside = {name.removeprefix(prefix): stack for name, stack in stacks.items() if name.startswith(prefix)}
        with self.skeleton.filled(self.skeleton.inside(self.blocks[index])):
            expose_experts(module)
            try:
                for group in groups_within(inside, self.max_memory_bytes):
                    with evaluating(self.skeleton.model, gradients=False), recording(module, group) as recorders:
                        for batch in range(len(self.batches)):
                            self._states.run(block, batch, before[batch])
                    for name, recorder in recorders.items():
                        keep(prefix + name, recorder)
            finally:
                conceal_experts(module)

    def forget(self, kind: str, boundary: int) -> None:
        """Hidden states or gradients before a block are not needed any more."""
        self._files(kind, boundary).remove()


def _prefix_of(model: nn.Module, inner: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is inner)
    return f"{name}." if name else ""
