"""A block that is tried: called again and again to see what its answers depend on, while nothing is random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .watching import Watch

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
        """Whether it chose among what it computed, as routers do."""
        return self._randomness.chose


_CODES = (torch.int8, torch.uint8)


@contextmanager
def trial(block: nn.Module, device: torch.device) -> Iterator[Answers]:
    """Context in which a block may answer again and again: nothing is random, and what changes is put back after."""
    randomness = _NothingRandom()
    answers = Answers(block, randomness)
    generators = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**generators), randomness:
            yield answers
    finally:
        for buffer, before in answers.buffers:
            buffer.copy_(before)


def parts_agree(whole: Any, parts: Iterable[Any]) -> bool:
    """Whether a block's answers to parts of a batch are its answer to all of it, up to the rounding of rows in layers.

    The parts are never joined.
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
            if not leaf.is_floating_point():
                if not torch.equal(expected, piece):
                    return False
                continue
            off, size = squares[index]
            squares[index] = off + (expected - piece).norm().float() ** 2, size + expected.norm().float() ** 2
    complete = all(not isinstance(leaf, Tensor) or start[index] == len(leaf) for index, leaf in enumerate(ours))
    return complete and all(bool(off <= TOLERANCE**2 * size) for off, size in squares)


class _NothingRandom(Watch):
    """Context in which dropout drops nothing, and every draw of stochastic depth is the same.

    A block in training mode draws other numbers for slices than for the batch.

    Attributes:
        asked: Whether something was to be drawn.
        chose: Whether something was chosen by its value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.chose = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.chose |= _chooses(func, args, kwargs)
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


def _chooses(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation picks or places values by others, as routers do; a few others do as well."""
    name = getattr(func, "__name__", "")
    if name in ("max", "min"):  # with a dimension, they say where
        return "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name in ("__getitem__", "__setitem__"):
        return any(isinstance(index, Tensor) for index in (args[1] if isinstance(args[1], tuple) else args[1:2]))
    return name.rstrip("_") in _CHOOSING


_CHOOSING = frozenset(
    "topk sort argsort msort argmax argmin kthvalue median mode quantile multinomial gumbel_softmax nonzero argwhere "
    "searchsorted bucketize one_hot unique unique_consecutive cumsum cumprod cummax cummin logcumsumexp bincount "
    "histc index_select index_add index_put index_copy scatter scatter_add scatter_reduce gather take take_along_dim "
    "masked_select masked_scatter".split()
)
_ALPHA = frozenset((F.alpha_dropout, F.feature_alpha_dropout))  # off unless asked for
_DROPOUTS = frozenset(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
)
