"""What autograd keeps of the operations inside transformer blocks, stored in few bits.

Everything that the layers of this package do not compress themselves: inputs of norms and activations, gated products,
attention's queries, keys, values and output. Exact stay: all that no gradient flows through (parameters, buffers, the
batch, masks, rotary tables, the statistics that a kernel keeps for itself: logsumexp, mean, rstd), views and casts of
parameters, per-row statistics, what is divided by or compared for equality (`amax`), and small tensors.

Attention by torch's function keeps queries, keys and values in 8 bits (16 with 'bf16') and runs again
(:mod:`attention`). Where it cannot (dropout, attention written out), errors in its tensors leave sums that
do not cancel, so tensors of four and more dimensions, which is what attention works on, are kept as 'int16'.

On request the inputs of GELU and SiLU take 4 bits (:mod:`wasi_peft.memory.activation`).

Tensors without a graph stay exact, but for those that a layer of this package marks (:func:`tucker.roundable`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..linalg.tucker import is_roundable
from ..models.structure import blocks_of
from .activation import low_bit_activation
from .attention import low_bit_attention
from .quantization import Quantized, dense_stride, dequantize_flat, is_dense, quantize
from .watching import Watch
from .wrapping import hooks_in_force, unwrap_all, wrap

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


# operations whose backward compares what they saved for equality, of which rounding leaves nothing; or divides by it,
# where small numbers are rounded to zero
_COMPARE = frozenset(("amax", "amin", "max", "min"))
_DIVIDE = frozenset(("sqrt", "sqrt_", "log", "log_", "log2", "log10", "reciprocal"))
_DIVIDE_BY_SECOND = frozenset(("div", "div_", "divide", "true_divide", "__truediv__", "__rtruediv__", "__itruediv__"))
_POWERS = frozenset(("pow", "__pow__"))


def _needs_exact(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether backward of an operation may not see rounded what the operation saves."""
    name = getattr(func, "__name__", None)
    if name in _DIVIDE_BY_SECOND and len(args) > 1:
        divisor = args[0] if name == "__rtruediv__" else args[1]
        return isinstance(divisor, Tensor) and not stays_exact(divisor)
    if name in _POWERS and len(args) > 1:
        return not isinstance(args[1], (int, float)) or args[1] < 1
    return name in _COMPARE or name in _DIVIDE


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
        regions: What contexts share, so that memory that several of them save is stored once.

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
        self,
        kind: str = "int8",
        minimum_elements: int = MINIMUM_ELEMENTS,
        low_bit_activations: bool = False,
        *,
        regions: Regions | None = None,
    ) -> None:
        _check(kind, minimum_elements)
        regions = Regions() if regions is None else regions

        def pack(tensor: Tensor) -> _Exact | _View:
            if functions.exact:
                return _Exact(tensor.detach(), tensor._version)
            return _pack_past_modes(tensor, kind, minimum_elements, regions)

        super().__init__(pack, _unpack)
        least_activation = minimum_elements if low_bit_activations else None
        functions = self._functions = _LowBitFunctions(pack, _ATTENTION[kind], least_activation)

    def __enter__(self) -> None:
        self._functions.__enter__()
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._functions.__exit__(*args)


class _LowBitFunctions(Watch):
    """Context in which functions that keep less take the place of torch's, while certain hooks are the innermost.

    Under other hooks, as of checkpointing inside the context, what is saved must be what it is without the context.

    Args:
        pack: The pack hook.
        attention_kind: How attention keeps its inputs.
        least_activation: Elements from which on GELU and SiLU keep theirs in 4 bits; None: they stay torch's.

    Attributes:
        exact: Whether an operation is running whose backward needs what it saved as it is.
    """

    def __init__(self, pack: Callable[..., Any], attention_kind: str, least_activation: int | None) -> None:
        super().__init__()
        self._pack, self._attention_kind, self._least_activation = pack, attention_kind, least_activation
        self.exact = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _needs_exact(func, args):
            self.exact = True
            try:
                return func(*args, **kwargs)
            finally:
                self.exact = False
        if func is F.scaled_dot_product_attention and self._is_in_charge():
            return low_bit_attention(*args, **kwargs, kind=self._attention_kind)
        if func in (F.gelu, F.silu) and self._least_activation is not None and not kwargs.get("inplace"):
            if len(args) == 1 and args[0].numel() >= self._least_activation and self._is_in_charge():
                return low_bit_activation(func, *args, **{key: kwargs[key] for key in kwargs if key != "inplace"})
        return func(*args, **kwargs)

    def _is_in_charge(self) -> bool:
        hooks = hooks_in_force()
        return hooks is not None and hooks[0] is self._pack


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


class Regions(WeakValueDictionary[tuple[Any, ...], _Region]):
    """What is stored of the memory of some tensors; an entry lives as long as some graph holds its region."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of another model, starts without any."""
        return Regions, ()

    def __deepcopy__(self, memo: Any) -> Regions:
        return Regions()


def _pack_past_modes(tensor: Tensor, kind: str, minimum_elements: int, regions: Regions) -> _Exact | _View:
    """:func:`_pack`, its many small calls out of sight of the function mode, which would take each in Python."""
    with torch._C.DisableTorchFunction():
        return _pack(tensor, kind, minimum_elements, regions)


@torch.no_grad()
def _pack(tensor: Tensor, kind: str, minimum_elements: int, regions: Regions) -> _Exact | _View:
    if tensor.numel() >= minimum_elements and not stays_exact(tensor):
        kind = _kind_for(tensor, kind)
        region = _region(tensor, kind, regions) if _BYTES[kind] < tensor.element_size() else None
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


def _region(tensor: Tensor, kind: str, regions: Regions) -> _Region | None:
    """The stored memory of a tensor, from an earlier view of it if there was one; None if it holds NaN or Inf."""
    source = StorageWeakRef(tensor.untyped_storage())
    form = (tensor.numel(),) if is_dense(tensor) else (tensor.shape, tensor.stride())
    place = (source.cdata, tensor.storage_offset(), form, tensor.dtype, tensor._version)
    for stored in (kind, "int16"):
        region = regions.get((stored, *place))
        if region is not None:
            return region
    kept = quantize(tensor, kind)
    if not kept.is_finite():
        return None
    region = regions[(kind, *place)] = _Region(kept, source)
    return region


# -------------------------------------------------------------------------------- blocks


class _InFewBits:
    """Calls a block inside :class:`LowBitSavedTensors`, unless other saved-tensor hooks are in force already."""

    def __init__(self, settings: LowBitBlocks, regions: Regions) -> None:
        self.settings, self.regions = settings, regions

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _hooks_are_free():
            return forward(*args, **kwargs)
        settings = self.settings
        with LowBitSavedTensors(
            settings.kind, settings.minimum_elements, settings.low_bit_activations, regions=self.regions
        ):
            return forward(*args, **kwargs)


def _hooks_are_free() -> bool:
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return enabled and hooks_in_force() is None


@dataclass(frozen=True)
class LowBitBlocks:
    """Technique: every transformer block of a model runs inside :class:`LowBitSavedTensors`.

    Embeddings, head and loss stay exact. Nothing happens without gradients, while `torch.compile` traces, and where
    other saved-tensor hooks are in force when the block starts (offloading): those stay in charge, as do those of
    checkpointing inside the block, of which only the input is stored in few bits then. The model can be copied and
    pickled.

    Args:
        kind: As for :class:`LowBitSavedTensors`.
        minimum_elements: As for :class:`LowBitSavedTensors`.
        low_bit_activations: As for :class:`LowBitSavedTensors`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTModel(small)
        >>> LowBitBlocks("int8").install(model)
        >>> model(torch.randn(2, 3, 224, 224)).last_hidden_state.sum().backward()
        >>> LowBitBlocks().remove(model)
    """

    kind: str = "int8"
    minimum_elements: int = MINIMUM_ELEMENTS
    low_bit_activations: bool = False

    def __post_init__(self) -> None:
        _check(self.kind, self.minimum_elements)

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no blocks."""
        blocks_of(model)

    def install(self, model: nn.Module) -> None:
        """Have the blocks store less; raises as :meth:`check`."""
        stages = blocks_of(model).stages
        self.remove(model)
        run = _InFewBits(self, Regions())  # shared, because blocks save views of the same memory
        for stage in stages.values():
            wrap(stage, run)

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _InFewBits)
