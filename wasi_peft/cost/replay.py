"""What operations on tensors without memory give, worked out once and replayed for further inputs of the same shapes.

torch's `FakeTensorMode` finds out what an operation gives: shape, strides, type, and what shares memory with an
argument. That takes it about 0.1 ms, even where it remembers the answer. Model code repeats a few hundred operations
thousands of times, so here the answer is a recipe, looked up by everything that it depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
aten = torch.ops.aten
# plain enough to ask their meta kernels at once: the mode's many cases take up to twenty times as long
_PLAIN_OPERATIONS = {
    aten.mm.default,
    aten.addmm.default,
    aten.mul.Tensor,
    aten.sum.default,
    aten.abs.default,
    aten.linalg_vector_norm.default,
    aten.linalg_qr.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_solve_triangular.default,
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.diagonal.default,
    aten.detach.default,
    aten.cat.default,
    aten.clone.default,
    aten.zeros_like.default,
    aten._to_copy.default,
}
_META = torch.device("meta")
_ANOTHER_OUTPUT = -1


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


class Recipe(NamedTuple):
    """How outputs come about: None, an argument (its position among the tensors), a view of one, or a new tensor.

    `container` is what they come in, None for a single one.
    """

    parts: tuple[_View | _New | int | None, ...]
    container: type | None
    flops: int
    workspace_bytes: int


class Recipes:
    """Recipes of the operations on the tensors of one `FakeTensorMode`.

    There is none where shapes alone do not decide: for custom operations, outputs that depend on values, complex
    numbers, and tensors that are not the mode's.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._recipes: dict[Any, Recipe | None] = {}
        self._suitable: dict[Any, bool] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a fresh tensor

    def signature(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[FakeTensor]]:
        """What the outputs depend on, None where that is unknown, and the tensors among the arguments, in order."""
        tensors: list[FakeTensor] = []
        suitable = self._suitable.get(func)
        if suitable is None:
            suitable = self._suitable[func] = _decided_by_shapes(func)
        if not suitable:
            return None, tensors
        parts: list[Any] = [func, torch.get_default_dtype()]
        known = _describe(args, parts, tensors)
        for name, value in kwargs.items():
            parts.append(name)
            known = known and _describe((value,), parts, tensors)
        if not known or any(tensor.fake_mode is not self._mode for tensor in tensors):
            return None, []  # a copy of a tensor brings a copy of its mode
        return tuple(parts), tensors

    def find(self, signature: Any) -> Recipe | None:
        """The recipe for a signature, if there is one."""
        return self._recipes.get(signature)

    def work_out(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[FakeTensor]) -> Any:
        """What an operation gives of which there is no recipe."""
        devices = {tensor.fake_device for tensor in tensors}
        if func not in _PLAIN_OPERATIONS or len(devices) != 1 or kwargs.get("device") is not None:
            return self._mode.dispatch(func, (), args, kwargs)  # spares entering the mode and dispatching once more
        device = devices.pop()
        with in_kernel_invocation_manager(self._mode):
            plain = func(*args, **kwargs)
        if isinstance(plain, Tensor):
            return self._without_memory(plain, device)
        return type(plain)(self._without_memory(part, device) for part in plain)

    def learn(
        self, signature: Any, tensors: list[FakeTensor], out: Any, flops: int = 0, workspace_bytes: int = 0
    ) -> None:
        """Remember what an operation with this signature and these tensors among its arguments gave."""
        if signature not in self._recipes:
            container = type(out) if type(out) in (list, tuple) else None
            parts = _parts([out] if container is None else out, tensors)
            known = None if parts is None else Recipe(tuple(parts), container, flops, workspace_bytes)
            self._recipes[signature] = known

    def replay(self, recipe: Recipe, tensors: list[FakeTensor]) -> tuple[Any, list[Tensor]]:
        """What the operation gives for these tensors, and those of it that have memory of their own."""
        outputs: list[Tensor | None] = []
        made: list[Tensor] = []
        for part in recipe.parts:
            if isinstance(part, _New):
                plain = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device=_META)
                outputs.append(self._without_memory(plain, part.device))
                made.append(outputs[-1])  # type: ignore[arg-type]
            elif isinstance(part, _View):
                plain = torch.empty(0, dtype=part.dtype, device=_META)
                plain.set_(tensors[part.argument].untyped_storage(), part.offset, part.shape, part.stride)
                outputs.append(self._without_memory(plain, part.device))
            else:
                outputs.append(None if part is None else tensors[part])
        return (outputs[0] if recipe.container is None else recipe.container(outputs)), made

    def _without_memory(self, plain: Tensor, device: torch.device) -> Tensor:
        """A meta tensor as one that says it is on a device."""
        attributes = self._attributes.get(device)
        if attributes is None:
            made = FakeTensor(self._mode, plain, device)
            self._attributes[device] = dict(vars(made))
            return made
        # what FakeTensor's constructor does, without its checks
        tensor = Tensor._make_subclass(FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=device)
        vars(tensor).update(attributes)
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        return tensor


def _decided_by_shapes(func: Any) -> bool:
    """Whether shapes decide what an operation gives; `out=` may be resized."""
    written = any(argument.is_out for argument in func._schema.arguments)
    return func.namespace == "aten" and not written and not _BY_VALUE & set(func.tags)


def _describe(values: Sequence[Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append what describes these arguments; whether that is possible."""
    for value in values:
        kind = type(value)
        if isinstance(value, FakeTensor):
            dtype = value.dtype
            if value.constant is not None or dtype.is_complex or value.layout is not torch.strided:
                return False
            parts += (value.shape, value.stride(), value.storage_offset(), dtype, value.fake_device)
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


def _parts(outputs: Sequence[Any], tensors: list[FakeTensor]) -> list[_View | _New | int | None] | None:
    """How these outputs come about, None where a recipe could not say."""
    places = {id(tensor.untyped_storage()): index for index, tensor in enumerate(tensors)}
    parts: list[_View | _New | int | None] = []
    for output in outputs:
        if output is None:
            parts.append(None)
            continue
        if type(output) is not FakeTensor or output.constant is not None or output.dtype.is_complex:
            return None
        same = next((index for index, tensor in enumerate(tensors) if tensor is output), None)
        if same is not None:
            parts.append(same)
            continue
        storage, offset = output.untyped_storage(), int(output.storage_offset())
        layout, kind = (tuple(output.shape), output.stride()), (output.dtype, output.fake_device)
        place = places.get(id(storage))
        if place == _ANOTHER_OUTPUT:
            return None
        if place is not None:
            parts.append(_View(place, *layout, offset, *kind))
            continue
        plain = torch.empty_strided(*layout, dtype=output.dtype, device=_META)
        if offset or plain.untyped_storage().nbytes() != storage.nbytes():
            return None
        places[id(storage)] = _ANOTHER_OUTPUT
        parts.append(_New(*layout, *kind))
    return parts
