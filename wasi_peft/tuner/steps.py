"""What layers do after a step of the optimizer that trains them.

torch offers one way to hear of a step of an optimizer that one does not own: a hook on all optimizers of the process.
It is installed with the first layer that needs it, and taken away with the last. With most updates that is one layer
of each model, which tells when training diverges.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class SteppedLayer(Protocol):
    """A layer with something to do after a step."""

    def after_step(self, moved: Mapping[int, float], retracted: bool) -> None:
        """Called after every step of every optimizer.

        Args:
            moved: Learning rates of the optimizer's parameters, by identity.
            retracted: Whether the optimizer leaves factors orthonormal itself.
        """


class _Watched:
    """The layers of the process that need the hook, weakly, in the order in which they were made.

    That order is the same in every process of a distributed run, so that collective operations inside a step meet
    those of the same layer. Threads may add and lose layers while another one steps.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: collecting garbage may lose a layer at any point
        self._layers: dict[int, weakref.ref[Any]] = {}
        self._numbers = itertools.count()
        self._handle: RemovableHandle | None = None

    def add(self, layer: Any) -> None:
        with self._lock:
            if any(reference() is layer for reference in self._layers.values()):
                return
            number = next(self._numbers)
            self._layers[number] = weakref.ref(layer, lambda _: self._lose(number))
            if self._handle is None:
                self._handle = register_optimizer_step_post_hook(after_optimizer_step)

    def _lose(self, number: int) -> None:
        with self._lock:
            self._layers.pop(number, None)
            if not self._layers and self._handle is not None:
                self._handle.remove()
                self._handle = None

    def __iter__(self) -> Iterator[Any]:
        with self._lock:
            layers = [reference() for reference in self._layers.values()]
        return (layer for layer in layers if layer is not None)


_watched = _Watched()
_thread = threading.local()


def watch(layer: SteppedLayer) -> None:
    """Have `layer.after_step` called after every step of an optimizer, for as long as the layer lives."""
    _watched.add(layer)


def check_convergence(parameters: Iterable[Tensor], moved: Mapping[int, float]) -> None:
    """Refuse to go on where a step has left NaN or Inf in a parameter that it moved.

    Raises:
        FloatingPointError: If so; it names the learning rate.
    """
    for parameter in parameters:
        if id(parameter) not in moved:
            continue
        local = getattr(parameter, "_local_tensor", parameter)
        if local.numel() and not bool(torch.linalg.vector_norm(local, torch.inf).isfinite()):  # no temporary tensor
            raise FloatingPointError(
                f"training diverged: a step at learning rate {moved[id(parameter)]:g} left NaN or Inf in what trains. "
                "Start again from before it with a lower learning rate, a warm-up, or gradients that are clipped."
            )


@contextmanager
def step_in_parts() -> Iterator[None]:
    """Context in which an optimizer's steps, in this thread, are parts of one that is announced when all are done."""
    before = getattr(_thread, "in_parts", False)
    _thread.in_parts = True
    try:
        yield
    finally:
        _thread.in_parts = before


@torch.no_grad()
def after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The hook. Only layers whose parameters are the optimizer's have anything to do.

    So gradient accumulation, evaluation and recomputation never trigger it, nor does a step that a gradient scaler
    skipped inside the optimizer.
    """
    found_inf = getattr(optimizer, "found_inf", None)  # set by torch.amp.GradScaler for fused optimizers
    if getattr(_thread, "in_parts", False) or (found_inf is not None and bool(found_inf)):
        return
    moved = {
        id(parameter): float(group.get("lr", 0.0)) for group in optimizer.param_groups for parameter in group["params"]
    }
    retracted = bool(getattr(optimizer, "retracts", False))
    for layer in _watched:
        layer.after_step(moved, retracted)
