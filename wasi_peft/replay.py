"""Operations on tensors without memory, each worked out once and replayed for further inputs of the same shapes.

torch's `FakeTensorMode` finds out what an operation gives: shape, strides, type, and what shares memory with an
argument. That takes it about 0.1 ms, even where it remembers the answer. Model code repeats a few thousand operations
many times, so here the answer is a recipe, looked up by everything that it depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
_META = torch.device("meta")
_ANOTHER_OUTPUT = -1


class _Same(NamedTuple):
    """An output that is an argument."""

    argument: int


class _View(NamedTuple):
    """An output in the memory of an argument."""

    argument: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _New(NamedTuple):
    """An output with memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_Part = _Same | _View | _New | None


class _Recipe(NamedTuple):
    """Outputs in order, and how they come: alone (None), in a tuple or a list."""

    parts: tuple[_Part, ...]
    container: type | None


class Replay:
    """Runs operations on the tensors of a `FakeTensorMode`; the same outputs as `mode.dispatch` gives.

    What cannot be told from shapes alone (custom operations, outputs that depend on values, complex numbers, tensors
    that are not the mode's) goes to the mode every time.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._recipes: dict[Any, _Recipe | None] = {}
        self._suitable: dict[Any, bool] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a fresh tensor, by device

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Outputs of an operation, in the containers in which it gives them."""
        signature, tensors = self._signature(func, args, kwargs)
        recipe = self._recipes.get(signature) if signature is not None else None
        if recipe is not None:
            outputs = [self._make(part, tensors) for part in recipe.parts]
            return outputs[0] if recipe.container is None else recipe.container(outputs)
        out = self._mode.dispatch(func, (), args, kwargs)  # spares entering the mode and dispatching once more
        if signature is not None and signature not in self._recipes:
            self._recipes[signature] = _recipe(out, tensors)
        return out

    def _signature(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[FakeTensor]]:
        """What the outputs depend on, None where that is unknown, and the tensors among the arguments, in order."""
        tensors: list[FakeTensor] = []
        if func not in self._suitable:
            self._suitable[func] = func.namespace in ("aten", "prims") and not _BY_VALUE & set(func.tags)
        if not self._suitable[func]:
            return None, tensors
        parts: list[Any] = [func, torch.get_default_dtype()]
        if not _describe(args, parts, tensors):
            return None, tensors
        for name, value in kwargs.items():
            parts.append(name)
            if not _describe((value,), parts, tensors):
                return None, tensors
        return tuple(parts), tensors

    def _make(self, part: _Part, tensors: list[FakeTensor]) -> Tensor | None:
        if part is None:
            return None
        if isinstance(part, _Same):
            return tensors[part.argument]
        if isinstance(part, _New):
            plain = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=_META)
        else:
            plain = torch.empty(0, dtype=part.dtype, device=_META)
            plain.set_(tensors[part.argument].untyped_storage(), part.offset, part.shape, part.stride)
        attributes = self._attributes.get(part.device)
        if attributes is None:
            made = FakeTensor(self._mode, plain, part.device)
            self._attributes[part.device] = dict(vars(made))
            return made
        # what FakeTensor's constructor does, without its checks
        tensor = Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=part.device
        )
        vars(tensor).update(attributes)
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        return tensor


def _describe(values: Sequence[Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append what describes these arguments; whether that is possible."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor or isinstance(value, FakeTensor):
            if value.constant is not None or value.dtype.is_complex or value.layout is not torch.strided:
                return False
            parts += (value.shape, value.stride(), value.storage_offset(), value.dtype, value._fake_device)
            tensors.append(value)
        elif kind in _PLAIN:
            parts += (kind, value)  # True == 1 == 1.0
        elif kind in (list, tuple):
            parts += (kind, len(value))
            if not _describe(value, parts, tensors):
                return False
        else:
            return False
    return True


def _recipe(out: Any, tensors: list[FakeTensor]) -> _Recipe | None:
    container = type(out) if type(out) in (list, tuple) else None
    outputs = [out] if container is None else out
    storages = {id(tensor.untyped_storage()): index for index, tensor in reversed([*enumerate(tensors)])}
    parts: list[_Part] = []
    for output in outputs:
        if output is None:
            parts.append(None)
            continue
        if type(output) is not FakeTensor or output.constant is not None or output.dtype.is_complex:
            return None
        same = next((index for index, tensor in enumerate(tensors) if tensor is output), None)
        if same is not None:
            parts.append(_Same(same))
            continue
        storage = output.untyped_storage()
        index = storages.get(id(storage))
        if index == _ANOTHER_OUTPUT:
            return None
        layout = tuple(output.shape), output.stride()
        offset, dtype, device = output.storage_offset(), output.dtype, output.fake_device
        if index is not None:
            parts.append(_View(index, *layout, offset, dtype, device))
        else:
            plain = torch.empty_strided(*layout, dtype=dtype, device=_META)
            if offset or plain.untyped_storage().nbytes() != storage.nbytes() or output.layout is not torch.strided:
                return None
            parts.append(_New(*layout, dtype, device))
            storages[id(storage)] = _ANOTHER_OUTPUT
    return _Recipe(tuple(parts), container)
