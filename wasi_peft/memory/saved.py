"""What autograd keeps of the operations inside transformer blocks, stored in few bits.

Everything that the layers of this package do not compress themselves: inputs of norms and activations, gated products,
attention's queries, keys, values and output. Exact stay: all that no gradient flows through (parameters, buffers, the
batch, masks, rotary tables, the statistics that a kernel keeps for itself: logsumexp, mean, rstd), views and casts of
parameters, per-row statistics, and small tensors.

Attention by torch's function keeps queries, keys and values in 8 bits (16 with 'bf16') and runs again
(:mod:`attention`). Where it cannot (dropout, attention written out), errors in its tensors leave sums that
do not cancel, so tensors of four and more dimensions, which is what attention works on, are kept as 'int16'.

On request the inputs of GELU and SiLU take 4 bits (:mod:`wasi_peft.memory.activation`).

Tensors without a graph stay exact, but for those that a layer of this package marks (:func:`tucker.roundable`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..linalg.tucker import is_roundable
from ..tuner.config import WasiConfig
from ..tuner.targets import default_target_names
from .activation import low_bit_activation
from .attention import low_bit_attention
from .quantization import Quantized, dense_stride, dequantize_flat, is_dense, quantize

SAVED_KINDS = ("bf16", "int8", "int4")
MINIMUM_ELEMENTS = 4096
_ATTENTION = {"bf16": "int16", "int8": "int8", "int4": "int8"}  # how attention's tensors are kept with each kind
_BYTES = {"bf16": 2, "int16": 2, "int8": 1, "int4": 0.5}

# operations whose result has the values of their first input
_SAME_VALUES = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T", "ToCopy"),
        *("Transpose", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
    )
)


class LowBitSavedTensors(saved_tensors_hooks):
    """Context in which autograd keeps large intermediate tensors in few bits.

    Tensors are stored by value when they are saved: a later in-place change does not reach them (of tensors that stay
    exact it is reported, as autograd does). Each stretch of memory is stored once and expanded at most once at a time,
    however many operations saved a view of it; what holds NaN or Inf stays exact. Other saved-tensor hooks inside the
    context replace it, as always with such hooks.

    Args:
        kind: 'bf16', 'int8' or 'int4'. Tensors of four and more dimensions take 16 bits with every kind, unless
            :func:`low_bit_attention` keeps them.
        minimum_elements: Smaller tensors stay exact.
        low_bit_activations: Keep the inputs of GELU and SiLU in 4 bits, by :func:`activation.low_bit_activation`.

    Raises:
        ValueError: If the kind is unknown or `minimum_elements` is negative.

    Example:
        >>> x = torch.linspace(-3, 3, 8192, requires_grad=True)
        >>> with LowBitSavedTensors("int8"):
        ...     y = torch.nn.functional.silu(2 * x).sum()
        >>> y.backward()
        >>> x.grad.shape
        torch.Size([8192])
    """

    def __init__(
        self, kind: str = "int8", minimum_elements: int = MINIMUM_ELEMENTS, low_bit_activations: bool = False
    ) -> None:
        _check(kind, minimum_elements)
        super().__init__(lambda tensor: _pack_past_modes(tensor, kind, minimum_elements), _unpack)
        self._functions = _LowBitFunctions(_ATTENTION[kind], minimum_elements if low_bit_activations else None)

    def __enter__(self) -> None:
        self._functions.__enter__()
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._functions.__exit__(*args)


class _LowBitFunctions(TorchFunctionMode):
    """Context in which functions that keep less take the place of torch's.

    Args:
        attention_kind: How attention keeps its inputs.
        least_activation: Elements from which on GELU and SiLU keep theirs in 4 bits; None: they stay torch's.
    """

    def __init__(self, attention_kind: str, least_activation: int | None) -> None:
        super().__init__()
        self._attention_kind, self._least_activation = attention_kind, least_activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return low_bit_attention(*args, **kwargs, kind=self._attention_kind)
        if func in (F.gelu, F.silu) and self._least_activation is not None and not kwargs.get("inplace"):
            if len(args) == 1 and args[0].numel() >= self._least_activation:
                return low_bit_activation(func, *args, **{key: kwargs[key] for key in kwargs if key != "inplace"})
        return func(*args, **kwargs)


def store_saved_tensors(
    model: nn.Module,
    kind: str = "int8",
    *,
    minimum_elements: int = MINIMUM_ELEMENTS,
    low_bit_activations: bool = False,
) -> list[RemovableHandle]:
    """Have every transformer block of a model run inside :class:`LowBitSavedTensors`.

    Blocks are the outermost numbered containers of the Linear layers; embeddings, head and loss stay exact. Nothing
    happens without gradients, while `torch.compile` traces, and where other saved-tensor hooks are in force when the
    block starts (offloading, non-reentrant checkpointing): those stay in charge. The hooks hold no state, so the model
    can be copied and pickled.

    Args:
        model: Any transformer, with or without adapters.
        kind: As for :class:`LowBitSavedTensors`.
        minimum_elements: As for :class:`LowBitSavedTensors`.
        low_bit_activations: As for :class:`LowBitSavedTensors`.

    Returns:
        Handles; `handle.remove()` on each detaches the hooks.

    Raises:
        ValueError: If an argument is out of range, or the model has no numbered blocks with Linear layers.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> handles = store_saved_tensors(ViTModel(small), "int8")
        >>> len(handles)
        4
    """
    _check(kind, minimum_elements)
    handles = []
    for name in block_names(default_target_names(model, WasiConfig())):
        block = model.get_submodule(name)
        enter, leave = _EnterBlock(kind, minimum_elements, low_bit_activations), _LeaveBlock()
        handles.append(block.register_forward_pre_hook(enter, prepend=True))
        handles.append(block.register_forward_hook(leave, always_call=True))
    return handles


def keep_saved_tensors_exact(model: nn.Module) -> None:
    """Undo :func:`store_saved_tensors`; nothing happens where it is not in use."""
    for module in model.modules():
        for hooks, kind in ((module._forward_pre_hooks, _EnterBlock), (module._forward_hooks, _LeaveBlock)):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def block_names(names: Iterable[str]) -> list[str]:
    """Outermost numbered containers of some modules, each once.

    Example:
        >>> block_names(["encoder.layers.0.blocks.1.fc1", "encoder.layers.0.blocks.0.fc1", "1.0.fc1", "head"])
        ['1', 'encoder.layers.0']
    """
    found = set()
    for name in names:
        parts = name.split(".")
        numbered = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
        if numbered:
            found.add(".".join(parts[: numbered[0] + 1]))
    return sorted(found)


def _check(kind: str, minimum_elements: int) -> None:
    if kind not in SAVED_KINDS:
        raise ValueError(f"kind must be one of {list(SAVED_KINDS)}, got {kind!r}.")
    if minimum_elements < 0:
        raise ValueError(f"minimum_elements must not be negative, got {minimum_elements!r}.")


# -------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class _Exact:
    """A tensor that is kept as it is; without its graph, which would hold it in a cycle."""

    tensor: Tensor
    version: int


class _Region:
    """One stretch of memory in few bits, shared by all views of it that were saved.

    The weak reference to the original storage also keeps its address from being given to another one.
    """

    def __init__(self, kept: Quantized, source: StorageWeakRef) -> None:
        self.kept = kept
        self.source = source
        self._expanded: StorageWeakRef | None = None

    def expanded(self) -> Tensor:
        """The values in memory order; those expanded before, where someone still holds them."""
        reference = self._expanded
        storage = None if reference is None else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is not None:
            flat = torch.empty(0, dtype=self.kept.dtype, device=storage.device)
            return flat.set_(storage, 0, (self.kept.shape.numel(),), (1,))
        flat = dequantize_flat(self.kept)
        self._expanded = StorageWeakRef(flat.untyped_storage())
        return flat


@dataclass(frozen=True)
class _View:
    """A saved tensor: a view of a region."""

    region: _Region
    shape: torch.Size
    stride: tuple[int, ...]


# an entry lives as long as some graph holds its region
_regions: WeakValueDictionary[tuple[Any, ...], _Region] = WeakValueDictionary()


def _pack_past_modes(tensor: Tensor, kind: str, minimum_elements: int) -> _Exact | _View:
    """:func:`_pack`, its many small calls out of sight of the function mode, which would take each in Python."""
    with torch._C.DisableTorchFunction():
        return _pack(tensor, kind, minimum_elements)


@torch.no_grad()
def _pack(tensor: Tensor, kind: str, minimum_elements: int) -> _Exact | _View:
    if tensor.numel() >= minimum_elements and not stays_exact(tensor):
        kind = _kind_for(tensor, kind)
        region = _region(tensor, kind) if _BYTES[kind] < tensor.element_size() else None
        if region is not None:
            return _View(region, tensor.shape, dense_stride(tensor))
    return _Exact(tensor.detach(), tensor._version)


@torch.no_grad()
def _unpack(packed: _Exact | _View) -> Tensor:
    if isinstance(packed, _View):
        return packed.region.expanded().as_strided(packed.shape, packed.stride)
    if packed.tensor._version != packed.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{packed.tensor.dtype} {list(packed.tensor.shape)} is at version {packed.tensor._version}; expected "
            f"version {packed.version} instead."
        )
    return packed.tensor


def stays_exact(tensor: Tensor) -> bool:
    """Whether a tensor that an operation saves is none of those that may be stored in few bits, whatever its size."""
    if type(tensor) not in (Tensor, FakeTensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        return True
    if tensor.is_meta or tensor.dim() == 0 or tensor.shape[-1] == 1:
        return True
    if tensor.grad_fn is None:
        return not is_roundable(tensor)
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return True  # expanded: it holds less memory than its elements would need
    node: Any = tensor.grad_fn
    while type(node).__name__ in _SAME_VALUES:
        node = node.next_functions[0][0]
    return type(node).__name__ == "AccumulateGrad"


def _kind_for(tensor: Tensor, kind: str) -> str:
    """The kind, or 'int16' for what may be a query, key, output or softmax of attention that is written out."""
    return "int16" if tensor.dim() >= 4 else kind


def _region(tensor: Tensor, kind: str) -> _Region | None:
    """The stored memory of a tensor, from an earlier view of it if there was one; None if it holds NaN or Inf."""
    source = StorageWeakRef(tensor.untyped_storage())
    form = (tensor.numel(),) if is_dense(tensor) else (tensor.shape, tensor.stride())
    place = (source.cdata, tensor.storage_offset(), form, tensor.dtype, tensor._version)
    for stored in (kind, "int16"):
        region = _regions.get((stored, *place))
        if region is not None:
            return region
    kept = quantize(tensor, kind)
    if not kept.is_finite():
        return None
    region = _regions[(kind, *place)] = _Region(kept, source)
    return region


# -------------------------------------------------------------------------------- blocks


class _Running(threading.local):
    """The block whose context is open in this thread: the frame of its call, and the context."""

    frame: FrameType | None = None
    context: LowBitSavedTensors | None = None

    def close(self) -> None:
        context, self.context, self.frame = self.context, None, None
        if context is not None:
            context.__exit__(None, None, None)


_running = _Running()


@dataclass(frozen=True)
class _EnterBlock:
    kind: str
    minimum_elements: int
    low_bit_activations: bool

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        frame = _call_frame()
        if _running.frame is not None and not _is_active(_running.frame):
            _running.close()  # left by a KeyboardInterrupt, for which torch calls no hook
        if frame is None or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return
        context = LowBitSavedTensors(self.kind, self.minimum_elements, self.low_bit_activations)
        context.__enter__()
        _running.frame, _running.context = frame, context


@dataclass(frozen=True)
class _LeaveBlock:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or _running.frame is None:
            return
        if _call_frame() is _running.frame:
            _running.close()


def _call_frame() -> FrameType | None:
    """Frame of the module call that runs the hook from which this is called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame


def _is_active(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted
