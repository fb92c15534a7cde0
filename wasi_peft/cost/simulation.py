"""Runs model code on tensors that have a shape but no memory, and writes down every tensor that comes and goes.

Operations are followed below autograd, so whatever a model, a loss, its backward pass or an optimizer does is seen as
it is. What is small and depends on no such tensor (token ids, masks, counters) is computed.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from ..memory.watching import Account
from ..models.calls import tensors_in
from .replay import Recipes

LARGEST_COMPUTED = 2**26  # bytes of a mask or the like that is computed
SMALL_NORM = 0.005  # of a correction, where code asks for it: not zero, and within every tolerance

_injection_log = logging.getLogger("wasi_peft.tuner.model")


def operands(values: Iterable[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Tensors among what an operation takes or gives: they are there by themselves or in lists."""
    found: list[Tensor] = []
    for value in itertools.chain(values, keywords.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


# ---------------------------------------------------------------- memory


class Memory:
    """Numbers storages in the order in which tensors first use them, and follows each to its end."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # bytes by number
        self.live: set[int] = set()
        self.events: list[tuple[int, int]] = []  # (number, bytes that come or go)
        self._numbers: dict[int, int] = {}  # id of a live storage -> its number
        self._ends: dict[int, weakref.ref[Any]] = {}  # id of a live storage -> what tells its end
        self._storages: Counter[int] = Counter()  # number -> storages that stand for the same memory

    def follow(self, tensor: Tensor, counted: bool = True) -> int:
        """Number of the tensor's storage. One that is not counted takes no bytes."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._numbers:
            self._join(storage, self._begin(storage.nbytes() if counted else 0))
        return self._numbers[id(storage)]

    def share(self, tensor: Tensor, other: Tensor) -> None:
        """Take both for the same memory. Where the other is not followed it takes no bytes."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._numbers:
            self._join(storage, self.follow(other, counted=False))

    def _join(self, storage: torch.UntypedStorage, number: int) -> None:
        key = id(storage)
        self._numbers[key] = number
        self._storages[number] += 1
        self._ends[key] = weakref.ref(storage, lambda _: self._end(key))

    def number_of(self, tensor: Tensor) -> int | None:
        """Number of the tensor's storage, if it is followed."""
        return self._numbers.get(id(tensor.untyped_storage()))

    def workspace(self, size: int) -> None:
        """A kernel's own memory, there and gone within one call."""
        number = self._begin(size)
        self.live.discard(number)
        self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        return {self.follow(tensor) for tensor in tensors}

    def _begin(self, size: int) -> int:
        number = len(self.sizes)
        self.sizes.append(size)
        self.live.add(number)
        self.events.append((number, size))
        return number

    def _end(self, key: int) -> None:
        del self._ends[key]
        number = self._numbers.pop(key)
        self._storages[number] -= 1
        if self._storages[number]:
            return
        del self._storages[number]
        self.live.discard(number)
        self.events.append((number, -self.sizes[number]))


def _eigh_workspace(matrix: Tensor, **_: Any) -> int:
    """LAPACK syevd with vectors: 1 + 6 n + 2 n^2 numbers and 3 + 5 n integers."""
    n = matrix.shape[-1]
    return (1 + 6 * n + 2 * n * n) * matrix.element_size() + (3 + 5 * n) * 4


def _convolution_workspace(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Bytes per weight and thread, as measured with oneDNN on patch embeddings; the batch hardly matters."""
    threads = torch.get_num_threads()
    return weight.numel() * (16 * threads if weight.element_size() >= 4 else 25 * (threads + 1))


def _grouped_shape(first: Tensor, second: Tensor, offs: Tensor | None, *_: Any, **__: Any) -> tuple[int, ...]:
    """Shape of a grouped product: groups of rows with a matrix each, or a product over each group of columns."""
    if first.dim() == second.dim() == 2:
        assert offs is not None
        return len(offs), first.shape[0], second.shape[1]
    if first.dim() == second.dim():
        return len(first), first.shape[1], second.shape[2]
    return first.shape[-2], second.shape[-1]


def _grouped_flops(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """Two for each element of the rows and column of a matrix, whichever group they are in."""
    return 2 * first.numel() * second.shape[-1]


def _weight_only_flops(rows: Tensor, codes: Tensor, *_: Any, **__: Any) -> int:
    """Two for each element of the rows and row of the codes."""
    return 2 * rows.numel() * codes.shape[0]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors with values that an operation writes to."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    written = [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]
    return [tensor for tensor in operands(written, {}) if not isinstance(tensor, FakeTensor)]


aten = torch.ops.aten
_CPU_WORKSPACES: dict[Any, Callable[..., int]] = {
    aten._linalg_eigh: _eigh_workspace,
    aten.convolution_backward: _convolution_workspace,
}
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's registry lacks products of integers and in place, and the attention kernel of the CPU
    aten._int_mm: flop_registry[aten.mm],
    aten._weight_int8pack_mm: _weight_only_flops,
    aten._grouped_mm: _grouped_flops,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


# ---------------------------------------------------------------- simulation


@contextmanager
def isolated(device: str) -> Iterator[None]:
    """Keeps random state, modes and warnings of the caller out of the simulation, and the other way round."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(setattr, _injection_log, "disabled", _injection_log.disabled)
        _injection_log.disabled = True
        yield


class UnknownValue(Exception):
    """An operation needs the values of a tensor that has none."""


class Simulation(Account):
    """Runs operations on tensors without memory; follows the memory they would take and counts their FLOPs.

    What depends on no such tensor and is small is computed: token ids, masks, counters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.flops = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake.cache_enabled = False  # the recipes are cheaper
        self._recipes = Recipes(self._fake)
        self._small_factories: set[Any] = set()  # signatures of operations without tensors
        self._overwritten: set[int] = set()  # numbers of computed storages that got values which are not known
        self._injecting = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here; torch's guard against that costs as much as an operation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls; the general way is slow
            return args[0].fake_device
        kwargs = kwargs or {}
        signature, tensors = self._recipes.signature(func, args, kwargs)
        recipe = self._recipes.find(signature) if tensors or self._injecting else None
        if recipe is not None:
            out, made = self._recipes.replay(recipe, tensors)
            self._note(made, recipe.flops, recipe.workspace_bytes)
            return out
        symbolic = any(self._is_symbolic(tensor) for tensor in operands(args, kwargs))
        if symbolic:
            if func._schema.is_mutable:
                self._overwritten |= {self.memory.follow(tensor, False) for tensor in _written(func, args, kwargs)}
            args, kwargs = tree_map(self._without_values, (args, kwargs))
        if symbolic and func is aten._local_scalar_dense.default:
            return self._number(args[0])
        without_memory = symbolic or self._injecting or not self._small(func, args, kwargs, signature)
        out = self._without_memory(func, args, kwargs, tensors) if without_memory else func(*args, **kwargs)
        outputs = operands(out if isinstance(out, tuple) else (out,), {})
        operation, flops, workspace = func._overloadpacket, 0, 0
        if operation in _CPU_WORKSPACES and outputs[0].device.type == "cpu":
            workspace = _CPU_WORKSPACES[operation](*args, **kwargs)
        if operation in _FLOPS:
            flops = _FLOPS[operation](*args, **kwargs, out_val=out)
        self._note(outputs, flops, workspace)
        if signature is not None and without_memory:
            self._recipes.learn(signature, tensors, out, flops, workspace)
        return out

    def _is_symbolic(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor are not known."""
        return isinstance(tensor, FakeTensor) or (
            bool(self._overwritten) and self.memory.number_of(tensor) in self._overwritten
        )

    def _without_values(self, value: Any) -> Any:
        """What stands for a computed tensor where others have no values."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        own = self._fake.from_tensor(value)
        self.memory.share(own, value)
        return own

    def _note(self, outputs: list[Tensor], flops: int, workspace_bytes: int) -> None:
        """Write down what an operation gave and took."""
        if self.paused:
            return
        for tensor in outputs:
            self.memory.follow(tensor)
        if workspace_bytes:
            self.memory.workspace(workspace_bytes)
        self.flops += flops

    def _small(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], signature: Any) -> bool:
        """Whether an operation on computed tensors, or on none, gives small ones."""
        if func._schema.is_mutable:
            return True
        if signature in self._small_factories:
            return True
        try:
            outputs = tensors_in(self._without_memory(func, args, kwargs, []))
        except UnknownValue:  # it reads values, which computed tensors have
            return True
        small = all(tensor.nbytes <= LARGEST_COMPUTED for tensor in outputs)
        if small and signature is not None:
            self._small_factories.add(signature)
        return small

    def _without_memory(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]
    ) -> Any:
        try:
            if func is aten._grouped_mm.default:  # torch's shapes are for bfloat16 alone
                with self._fake:
                    return args[0].new_empty(_grouped_shape(*args, **kwargs))
            out = self._recipes.work_out(func, args, kwargs, tensors)
            if self._injecting:  # Module.to refuses parameters to which there is a weak reference
                self._fake.fake_tensor_converter.tensor_memo.clear()
            return out
        except (DynamicOutputShapeException, DataDependentOutputException):
            raise UnknownValue(func) from None

    def _number(self, tensor: Tensor) -> bool | int | float:
        """Answers for a healthy step: checks pass, decompositions succeed, norms of corrections are small."""
        if tensor.dtype == torch.bool:
            return True
        if self._injecting or tensor.dtype == torch.int64:
            raise UnknownValue(aten._local_scalar_dense)
        return SMALL_NORM if tensor.is_floating_point() else 0

    # ---- building

    def like(self, tensor: Tensor, counted: bool = True) -> Tensor:
        """A tensor of the same shape, strides, type and device, without memory; one on meta becomes one on the CPU."""
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with torch._C.DisableTorchFunction(), self._fake:
            own = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        self.memory.follow(own, counted)
        return own

    def without_memory(self, model: nn.Module) -> nn.Module:
        """Copy of a model all of whose tensors have no memory; ties stay."""
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(self.like(parameter), parameter.requires_grad)
        with _CopyWithoutMemory(self):
            twin = copy.deepcopy(model, memo)
        self.memory.numbers(twin.parameters())  # layers may have moved theirs into storages that they share
        return twin

    @contextmanager
    def injecting(self) -> Iterator[None]:
        """Active, and every tensor that is made has no memory, however small."""
        self._injecting = True
        try:
            with self:
                yield
        finally:
            self._injecting = False

    def batch(self, tree: Any) -> Any:
        """The batch without memory, but with its integers and masks, which are copied."""

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point() or value.is_meta:
                return self.like(value, counted=False)
            own = value.detach().clone()
            self.memory.follow(own, counted=False)
            return own

        return tree_map(stand_in, tree)


class _CopyWithoutMemory(TorchFunctionMode):
    """While active, `copy.deepcopy` of a tensor gives one without memory."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._simulation.like(tensor)
        return memo[id(tensor)]
