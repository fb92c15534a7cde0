"""Tensors of a model that transformers makes of several of a checkpoint: packed experts, of one tensor an expert.

transformers has a table of such conversions by architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor in a file, as its header says.

    Attributes:
        path: Of the file.
        key: Its name there.
        shape: Its shape.
        dtype: As safetensors call it: "BF16".
    """

    path: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def paths(self) -> set[str]:
        """Of the files that hold it."""
        return {self.path}

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, in memory of its own."""
        with safe_open(self.path, framework="pt") as file:  # for one tensor: pages of the file do not add up
            tensor: Tensor = file.get_tensor(self.key)
            return tensor.to(dtype, copy=True)


class Conversion:
    """Tensors of a file that become one of the model, or several.

    Args:
        model: Without weights.
        converter: What transformers does with them.
        name: What the first tensor of the model is called.
    """

    def __init__(self, model: PreTrainedModel, converter: WeightConverter, name: str) -> None:
        self.model, self.converter, self.name = model, converter, name
        self.sources: dict[str, list[StoredTensor]] = {}

    def add(self, pattern: str, tensor: StoredTensor) -> None:
        """One more tensor of the file, in the order of their names."""
        self.sources.setdefault(pattern, []).append(tensor)

    @property
    def tensors(self) -> list[StoredTensor]:
        """All of the file."""
        return [tensor for group in self.sources.values() for tensor in group]

    def made(self) -> dict[str, ConvertedTensor]:
        """The tensors of the model, by name; nothing is read.

        Raises:
            ValueError: If the tensors of the file do not fit together.
        """
        made = self._convert(lambda tensor: torch.empty(tensor.shape, dtype=FLOATS.get(tensor.dtype), device="meta"))
        return {name: ConvertedTensor(self, name, tuple(tensor.shape)) for name, tensor in made.items()}

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the model."""
        operations = [(type(each), each.dim) for each in self.converter.operations if hasattr(each, "dim")]
        if operations in _STACKING and len(operations) == len(self.converter.operations):
            return self._stacked(shape, dtype)
        return self._convert(lambda tensor: tensor.read(FLOATS[tensor.dtype]))[name].to(dtype, copy=True)

    def _stacked(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same where experts are only put together, with one of them in memory beside the result."""
        whole, row = torch.empty(shape, dtype=dtype), 0
        for pattern in self.converter.source_patterns:
            group = self.sources.get(pattern, [])
            for expert, tensor in enumerate(group):
                whole[expert, row : row + tensor.shape[0]] = tensor.read(dtype)
            row += group[0].shape[0] if group else 0
        return whole

    def _convert(self, load: Callable[[StoredTensor], Tensor]) -> dict[str, Tensor]:
        converter: Any = copy.deepcopy(self.converter)
        for pattern, tensors in self.sources.items():
            for tensor in tensors:
                converter.add_tensor(self.name, tensor.key, pattern, partial(load, tensor))
        try:
            made = converter.convert(self.name, model=self.model, config=self.model.config)
        except Exception as error:  # whatever a conversion of transformers stumbles over
            raise ValueError(
                f"{self.name}: transformers must make it of {len(self.tensors)} tensors of the checkpoint, such as "
                f"{self.tensors[0].key}, which do not fit together: {' '.join(str(error).split())}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


_STACKING = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


class ConvertedTensor(NamedTuple):
    """One of the tensors that a conversion makes."""

    conversion: Conversion
    name: str
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """What it is made of."""
        return f"{self.name}, of {self.conversion.tensors[0].key} and others"

    @property
    def dtype(self) -> str:
        """As safetensors call it: that of the tensors of the file, or one that is no floating one."""
        kinds = [tensor.dtype for tensor in self.conversion.tensors]
        return next((kind for kind in kinds if kind not in FLOATS), kinds[0])

    @property
    def paths(self) -> set[str]:
        """Of the files that hold the others."""
        return {tensor.path for tensor in self.conversion.tensors}

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, in memory of its own."""
        return self.conversion.read(self.name, self.shape, dtype)
