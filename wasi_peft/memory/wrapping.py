"""Techniques around the forward of a module: how one is put there, and taken away again.

A technique is an object with `check`, `install` and `remove`, and no state: what it learns of a block lies with that
block. Most work by a *runner*, which calls the forward of a block in its own way: `run(forward, *args, **kwargs)`.
The runner stays inside of `module(...)`, so that hooks of the module see whole batches and what is returned in the
end, and around `forward`, so that it can put back whatever it changes, also when it is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

Runner = Callable[..., Any]
R = TypeVar("R")


class Technique(Protocol):
    """A way to need less memory in a training step, for any model that passes its check."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this technique cannot work on.

        Raises:
            ValueError: If the model lacks what the technique needs.
        """

    def install(self, model: nn.Module) -> None:
        """Put the technique to work, in the place of one of its kind if there is one.

        Raises:
            ValueError: As :meth:`check`. Nothing has changed then.
        """

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`; nothing happens where it is not in use."""


class Forward:
    """The forward of a module; like a bound method, it has a `__self__`.

    Args:
        module: The module.
        replaced: What somebody else put in the place of its class's forward, if anything.
    """

    def __init__(self, module: nn.Module, replaced: Callable[..., Any] | None = None) -> None:
        self.__self__, self.replaced = module, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        module = self.__self__
        return type(module).forward(module, *args, **kwargs)  # of the class that it has now: FSDP gives another


class Around:
    """A runner with the forward that it calls, in the place of that; it too has a `__self__`."""

    __self__: nn.Module

    def __init__(self, run: Runner, inner: Forward | Around) -> None:
        self.__self__, self.run, self.inner = inner.__self__, run, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.inner, *args, **kwargs)


OWN_COMPUTATION, OWN_PARAMETERS, WHOLE_CALLS = range(3)


def wrap(module: nn.Module, run: Runner) -> None:
    """Put a runner around the forward of a module, outside of those that are there; one of its class goes first.

    Whatever the order, a runner that computes in the place of the module is inside of one that changes the module's
    parameters for a call, and that inside of those that call it in parts, or again in backward: by its `level`,
    :data:`WHOLE_CALLS` where it has none.
    """
    unwrap(module, type(run))
    there = module.__dict__.get("forward")
    module.__dict__["forward"] = _around(run, there if isinstance(there, Around) else Forward(module, there))


def _around(run: Runner, forward: Forward | Around) -> Around:
    if isinstance(forward, Around) and _level(forward.run) > _level(run):
        return Around(forward.run, _around(run, forward.inner))
    return Around(run, forward)


def _level(run: Runner) -> int:
    return getattr(run, "level", WHOLE_CALLS)


def unwrap(module: nn.Module, kind: type) -> None:
    """Take away the runner of a class, wherever it is among those around the forward of a module."""
    there = module.__dict__.get("forward")
    if not isinstance(there, Around):
        return
    rest = _without(there, kind)
    if isinstance(rest, Around):
        module.__dict__["forward"] = rest
    elif rest.replaced is not None:
        module.__dict__["forward"] = rest.replaced
    else:
        del module.__dict__["forward"]


def runner_of(module: nn.Module, kind: type[R]) -> R | None:
    """The runner of a class around the forward of a module, None where there is none."""
    there = module.__dict__.get("forward")
    while isinstance(there, Around):
        if isinstance(there.run, kind):
            return there.run
        there = there.inner
    return None


def unwrap_all(model: nn.Module, kind: type) -> None:
    """Take away the runners of a class from all modules of a model, itself included."""
    for module in model.modules():
        unwrap(module, kind)


def _without(forward: Forward | Around, kind: type) -> Forward | Around:
    """What is left without the runner of a class; what was there stays as it is, for those who put it back."""
    if isinstance(forward, Forward):
        return forward
    if isinstance(forward.run, kind):
        return forward.inner
    inner = _without(forward.inner, kind)
    return forward if inner is forward.inner else Around(forward.run, inner)


def hooks_in_force() -> Any:
    """The innermost saved-tensor hooks, None for none; to be compared with what it was before.

    Under hooks that came since, as those of checkpointing inside of a module, operations have to save what they save
    without whatever is around the module: there they run again.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
