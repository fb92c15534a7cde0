"""A block that is tried: called again and again to see what its answers depend on, while nothing is random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .watching import Watch, unaccounted

# of the norm of a block's output. Samples that meet change it by far more, layers that round their rows by up to
# 0.017: which columns they do not round depends on the batch.
TOLERANCE = 0.03


class Answers:
    """What a block is seen to do while it answers in a :func:`trial`."""

    def __init__(self, block: nn.Module, randomness: _NothingRandom) -> None:
        # running statistics, and no codes of a weight
        self.buffers = [(buffer, buffer.clone()) for buffer in block.buffers() if buffer.dtype not in _CODES]
        self._randomness = randomness

    def undisturbed(self) -> bool:
        """Whether its buffers (running statistics) are as they were."""
        return all(bool((buffer == before).all()) for buffer, before in self.buffers)

    @property
    def draws(self) -> bool:
        """Whether it asked for random numbers."""
        return self._randomness.asked

    @property
    def chooses(self) -> bool:
        """Whether it chose among what it computed, as routers do, and not by tables of its own."""
        return self._randomness.chose


_CODES = (torch.int8, torch.uint8)


@contextmanager
def trial(block: nn.Module, device: torch.device, tables: Iterable[Tensor] = ()) -> Iterator[Answers]:
    """Context in which a block may answer again and again: nothing is random, and what changes is put back after.

    Args:
        block: What is tried.
        device: Where it is.
        tables: Arguments that are the same whatever batch the block is given; its parameters and buffers are.
    """
    randomness = _NothingRandom([*block.parameters(), *block.buffers(), *tables])
    answers = Answers(block, randomness)
    generators = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with unaccounted(), torch.random.fork_rng(**generators), randomness:
            yield answers
    finally:
        with unaccounted():
            for buffer, before in answers.buffers:
                buffer.copy_(before)


def parts_agree(whole: Any, parts: Iterable[Any]) -> bool:
    """Whether a block's answers to parts of a batch are its answer to all of it, up to the rounding of rows in layers.

    The parts are never joined. Of tensors without values the shapes are compared.
    """
    ours = tree_leaves(whole)
    squares: list[tuple[Any, Any]] = [(0, 0) for _ in ours]  # of the difference, and of the whole
    start = [0] * len(ours)
    for part in parts:
        theirs = tree_leaves(part)
        if len(theirs) != len(ours):
            return False
        for index, (leaf, piece) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(leaf, Tensor):
                if not (leaf is piece or bool(leaf == piece)):
                    return False
                continue
            if not leaf.dim() or not isinstance(piece, Tensor) or not piece.dim():
                return False  # a mean over samples, say
            expected = leaf[start[index] : start[index] + len(piece)]
            start[index] += len(piece)
            if expected.shape != piece.shape:
                return False
            if isinstance(expected, FakeTensor) or isinstance(piece, FakeTensor):
                continue
            if not leaf.is_floating_point():
                if not torch.equal(expected, piece):
                    return False
                continue
            off, size = squares[index]
            squares[index] = off + (expected - piece).norm().float() ** 2, size + expected.norm().float() ** 2
    complete = all(not isinstance(leaf, Tensor) or start[index] == len(leaf) for index, leaf in enumerate(ours))
    return complete and all(bool(off <= TOLERANCE**2 * size) for off, size in squares)


def lacks_memory(error: Exception) -> bool:
    """Whether that is why a block did not answer, which says nothing about it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class _NothingRandom(Watch):
    """Context in which dropout drops nothing, and every draw of stochastic depth is the same.

    A block in training mode draws other numbers for slices than for the batch.

    Args:
        tables: Tensors that no batch changes: what is chosen by them, or by what is made of them alone, counts as
            chosen by nobody.

    Attributes:
        asked: Whether something was to be drawn.
        chose: Whether something was chosen by its value.
    """

    def __init__(self, tables: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.asked = self.chose = False
        self._tables: Any = WeakIdKeyDictionary()  # by storage
        self._mark(tables)

    def _mark(self, tensors: Iterable[Tensor], table: bool = True) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None and table:
                self._tables[storage] = True
            elif storage is not None:
                self._tables.pop(storage, None)

    def _are_tables(self, tensors: Iterable[Tensor]) -> bool:
        return all(_storage(tensor) in self._tables for tensor in tensors)

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note what is made of tables alone, and tables into which something else is written."""
        given, made = _tensors((args, kwargs)), _tensors(result)
        if getattr(func, "__name__", "") == "__setitem__":
            made = given[:1]
        self._mark(made, bool(given) and self._are_tables(given))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.chose |= _chooses(func, args, kwargs) or not self._are_tables(_places(func, args, kwargs))
        result = self._without_chance(func, args, kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _without_chance(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _DROPOUTS:
            names = ("input", "p", "train" if func is torch.dropout else "training")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.asked |= given.get("p", 0.5) > 0 and bool(given.get(names[2], func not in _ALPHA))
            return given["input"]
        if func is F.scaled_dot_product_attention:
            self.asked |= (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0)) > 0
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {**kwargs}
            kwargs.pop("dropout_p", None)
        if func is torch.rand:
            self.asked = True
            return torch.full_like(func(*args, **kwargs), 0.5)
        if func is Tensor.bernoulli_:
            self.asked = True
            return args[0].fill_(1.0)
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # of a sparse one, say
        return None


def _chooses(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation looks for places by values, as routers do; a few others do as well."""
    name = getattr(func, "__name__", "")
    if name in ("max", "min"):  # with a dimension, they say where
        return "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
    if name == "where":
        return len(args) + len(kwargs) == 1
    return name.rstrip("_") in _CHOOSING


def _places(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Integers or flags that say which values an operation picks, or where it places them."""
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        return _tensors(args[1])
    if name.rstrip("_") not in _PLACING:
        return []
    return [tensor for tensor in _tensors((args, kwargs))[1:] if not tensor.is_floating_point()]


_CHOOSING = frozenset(
    "topk sort argsort msort argmax argmin kthvalue median mode quantile multinomial gumbel_softmax nonzero argwhere "
    "searchsorted bucketize one_hot unique unique_consecutive cumsum cumprod cummax cummin logcumsumexp bincount "
    "histc".split()
)
_PLACING = frozenset(
    "index_select index_add index_put index_copy scatter scatter_add scatter_reduce gather take take_along_dim "
    "masked_select masked_scatter".split()
)
_ALPHA = frozenset((F.alpha_dropout, F.feature_alpha_dropout))  # off unless asked for
_DROPOUTS = frozenset(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
)
