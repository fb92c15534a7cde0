"""What layers keep of their inputs for backward, and what those that read one input share of it.

Source: activation subspace iteration (ASI), as in arXiv 2510.09160; :mod:`linalg.tucker` has the mathematics.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..forms.products import OUTLIERS
from ..linalg.low_bit import RoundedRows, quantize_rows
from ..linalg.tucker import Bases, CompressionRule, Tucker, compress, placeholder


@dataclass
class InputCompression:
    """How one adapter of one layer compresses its input: the rule, and the warm bases that the next pass goes on from.

    Args:
        rule: Modes and ranks or threshold; None keeps what is needed exactly.
        interval: Optimizer steps from one iteration of the bases to the next.
        bases: As the last pass left them.
        age: Optimizer steps since the bases last moved.
    """

    rule: CompressionRule | None
    interval: int = 1
    bases: Bases = field(default_factory=Bases)
    age: int = 0


class SharedInput:
    """What the layers that read one input tensor share: its cast and its compressed form.

    Attributes:
        version: Of the tensor when this was made.
        place: Where its memory was.
        casts: By dtype.
        rounded: In 8 bits, by dtype.
        compressed: By rule and dtype; None where compression would not pay.
        announced: What form a first pass of checkpointing gave out, and whose bases it has, by adapter too:
            recomputation may come to another reader of the input first.
    """

    def __init__(self, x: Tensor) -> None:
        self.version, self.place = x._version, _place(x)
        self.casts: dict[torch.dtype, Tensor] = {}
        self.rounded: dict[torch.dtype, RoundedRows] = {}
        self.compressed: dict[tuple[CompressionRule, torch.dtype], Tucker | None] = {}
        self.announced: dict[tuple[CompressionRule, torch.dtype, str], tuple[InputCompression, Tucker | None]] = {}

    def describes(self, x: Tensor) -> bool:
        """Whether the tensor is as it was: neither changed in place nor given other memory."""
        return self.version == x._version and self.place == _place(x)


class _Latest:
    """The input that layers read last without gradients, in 8 bits, and those who read it, while the tensor lives."""

    def __init__(self, x: Tensor, gone: Callable[[Any], None]) -> None:
        self.x, self.entry = weakref.ref(x, gone), SharedInput(x)
        self.readers: set[Any] = set()

    def serves(self, reader: Any, x: Tensor) -> bool:
        """Whether it is this tensor, as it was, for a layer that has not read it."""
        return self.x() is x and self.entry.describes(x) and reader not in self.readers


class SharedInputs:
    """The inputs that the layers of one model have read, each for as long as the tensor lives.

    Layers that read one tensor (q, k, v; gate, up) keep ONE compressed copy of it. Entries go with their tensors; what
    is still alive is forgotten when an optimizer has moved a layer of this model. A change of an input by
    `.data`, which torch itself cannot see, is not seen here either.

    One object for all layers of a model. A copy of the model gets an empty one of its own.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        self._latest: _Latest | None = None

    def of(self, x: Tensor) -> SharedInput:
        """The entry of a tensor, a new one where it has none that describes it."""
        entry = self._entries.get(x)
        if entry is None or not entry.describes(x):
            entry = self._entries[x] = SharedInput(x)
        return entry

    def clear(self) -> None:
        """Forget all of them."""
        self._entries.clear()
        self._latest = None

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInputs:
        memo[id(self)] = copy = SharedInputs()
        return copy

    def __reduce__(self) -> Any:
        return SharedInputs, ()

    # ---------------------------------------------------------------- what layers ask for

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in another dtype; layers that read the same tensor get the same cast."""
        if x.dtype == dtype:
            return x
        if x.is_leaf and x.requires_grad:
            return x.to(dtype)  # its graph would hold the leaf, so the entry would never go
        casts = self.of(x).casts
        if dtype not in casts:
            casts[dtype] = x.to(dtype)
        return casts[dtype]

    def round(self, x: Tensor, rows: Tensor) -> RoundedRows:
        """The rows of an input in 8 bits, the same for all layers that read the tensor.

        Args:
            x: The input as the layers got it.
            rows: The same in the compute dtype.
        """
        if torch.compiler.is_compiling():
            return _round(rows)
        return _rounded_once(self.of(x), rows)

    def round_for(self, reader: Any, x: Tensor, rows: Tensor) -> RoundedRows:
        """The same without gradients, kept until a layer reads another input, or a reader of this one comes again.

        So nothing is held beside states that outlive the pass, and a later pass, which may find other values where
        the tensor's memory is, rounds anew.

        Args:
            reader: The layer.
            x: As for :meth:`round`.
            rows: As for :meth:`round`.
        """
        if x.is_inference() or torch.is_inference_mode_enabled():  # such tensors do not say when they change
            return _round(rows)
        latest = self._latest
        if latest is None or not latest.serves(reader, x):
            latest = self._latest = _Latest(x, self._forget)
        latest.readers.add(reader)
        return _rounded_once(latest.entry, rows)

    def _forget(self, x: Any) -> None:
        if self._latest is not None and self._latest.x is x:
            self._latest = None

    @torch.compiler.disable
    def compress(self, x: Tensor, rows: Tensor, state: InputCompression, adapter: str) -> Tucker | None:
        """The compressed form of an input, the same for all layers that read the tensor by the same rule.

        The basis takes one iteration every `state.interval` optimizer steps, in the first forward pass that trains: a
        further micro-batch meets the same basis again. In a pass whose saved tensors are thrown away nothing is
        compressed as soon as bases exist; the first step makes them there.

        Args:
            x: The input as the layers got it.
            rows: The same in the compute dtype.
            state: Of the layer's adapter; its bases move.
            adapter: Its name.
        """
        rule = state.rule
        assert rule is not None
        entry, key = self.of(x), (rule, rows.dtype)
        if key in entry.compressed:
            return entry.compressed[key]
        owner, _ = entry.announced.get((*key, adapter), (state, None))
        rows = rows.detach()
        if _saved_tensors_are_dropped():
            form = placeholder(rows, rule, owner.bases)
            entry.announced[(*key, adapter)] = owner, form
            if form is not None:
                return form
        advance = owner.age >= owner.interval
        with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
            result = compress(rows, rule, owner.bases, advance)
            if result is None and advance:  # NaN and Inf move no basis, but the form may have been announced
                advance, result = False, compress(rows, rule, owner.bases, False)
        if result is not None:
            owner.bases = result[1]
            owner.age = 0 if advance else owner.age
        entry.compressed[key] = None if result is None else result[0]
        return entry.compressed[key]


def _round(rows: Tensor) -> RoundedRows:
    return quantize_rows(rows.detach().reshape(-1, rows.shape[-1]), OUTLIERS)


def _rounded_once(entry: SharedInput, rows: Tensor) -> RoundedRows:
    """Rows of an input in 8 bits, of those that it has in their dtype, or made now."""
    if rows.dtype not in entry.rounded:
        entry.rounded[rows.dtype] = _round(rows)
    return entry.rounded[rows.dtype]


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape


def _saved_tensors_are_dropped() -> bool:
    """Whether this is the first pass of non-reentrant checkpointing, which looks only at what form saved tensors have.

    Where it also keeps the results of some operations, to replay them in their order, both passes must run the same.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = None if hooks is None else hooks[0]
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return False
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):  # the other one is of the second pass
        return False
    return not any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())
