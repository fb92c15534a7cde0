"""A model without weights, parts of which are read from a checkpoint for as long as they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..models.structure import Structure, blocks_of
from .checkpoint import DenseCheckpoint, StoredTensor


def empty_model(config: PretrainedConfig, dtype: torch.dtype, buffers: bool = False) -> PreTrainedModel:
    """The model that a configuration names, in evaluation mode, its parameters without memory.

    Args:
        config: Names the architecture; not changed.
        dtype: Of the parameters.
        buffers: Whether buffers are there, which no file holds (frequencies of rotary embeddings).

    Raises:
        ValueError: If it is no single architecture of transformers, or has sizes that are impossible.
    """
    names = list(config.architectures or [])
    model_class: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if not known:
        raise ValueError(f"the model's configuration must name one architecture of transformers, got {names or None}.")
    with init_empty_weights(include_buffers=not buffers):
        try:
            model: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=dtype)
        except (RuntimeError, ArithmeticError) as error:  # sizes that no tensor has
            what = " ".join(str(error).split())
            raise ValueError(
                f"the model's configuration must be one of which a model can be made, got {what}."
            ) from error
    model.tie_weights()  # which making the parameters empty undid
    return model.eval()


class Skeleton:
    """A model whose tensors are in a checkpoint.

    Args:
        config: Of the model.
        dtype: Of its parameters.
        stored: What the checkpoint's files hold.
        runs: Whether its blocks are to be run.

    Raises:
        ValueError: If the checkpoint does not fit, or there are no transformer blocks.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, stored: list[StoredTensor], runs: bool) -> None:
        self.model = empty_model(config, dtype)
        self.structure: Structure = blocks_of(self.model)
        self.checkpoint = DenseCheckpoint(self.model, stored)
        if runs:  # only now, when the sizes that the configuration claims are those of the files
            self.model = empty_model(config, dtype, buffers=True)
            self.structure = blocks_of(self.model)

    @property
    def blocks(self) -> list[str]:
        """Names of the transformer blocks."""
        return list(self.structure.blocks)

    def inside(self, name: str) -> list[str]:
        """Names of the tensors of a module."""
        return [key for key in self.checkpoint.names if key.startswith(f"{name}.")]

    @property
    def outside(self) -> list[str]:
        """Names of the tensors that are in no block."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return [key for key in self.checkpoint.names if not key.startswith(prefixes)]

    @contextmanager
    def filled(self, names: Iterable[str]) -> Iterator[None]:
        """Some tensors are there, frozen, for as long as this lasts."""
        before: list[tuple[nn.Module, str, torch.Tensor]] = []
        try:
            for name in names:
                tensor = self.checkpoint.read(name)
                for alias in self.checkpoint.aliases.get(name, [name]):
                    parent, _, leaf = alias.rpartition(".")
                    module = self.model.get_submodule(parent)
                    before.append((module, leaf, getattr(module, leaf)))
                    if leaf in module._parameters:
                        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
                    else:
                        module._buffers[leaf] = tensor
            yield
        finally:
            for module, leaf, empty in before:
                setattr(module, leaf, empty)
