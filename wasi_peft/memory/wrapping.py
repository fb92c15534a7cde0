"""Techniques around the forward of a module: how one is put there, and taken away again.

A technique is an object with `check`, `install` and `remove`, and no state: what it learns of a block lies with that
block. Most work by a *runner*, which calls the forward of a block in its own way: `run(forward, *args, **kwargs)`.
The runner stays inside of `module(...)`, so that hooks of the module see whole batches and what is returned in the
end, and around `forward`, so that it can put back whatever it changes, also when it is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from torch import nn

Runner = Callable[..., Any]


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


class Around:
    """Takes the place of a module's `forward`; like the bound method that it replaces, it has a `__self__`.

    Args:
        module: The module.
        run: Calls the forward.
        inner: What took the place of the forward before, if anything did.
    """

    def __init__(self, module: nn.Module, run: Runner, inner: Any = None) -> None:
        self.__self__, self.__name__ = module, "forward"
        self.run, self.inner = run, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.inner
        if inner is None:  # the class may have changed since, as FSDP does
            inner = MethodType(type(self.__self__).forward, self.__self__)
        return self.run(inner, *args, **kwargs)


def wrap(module: nn.Module, run: Runner) -> None:
    """Put a runner around the forward of a module, outside of those that are there; one of its class goes first."""
    unwrap(module, type(run))
    module.__dict__["forward"] = Around(module, run, module.__dict__.get("forward"))


def unwrap(module: nn.Module, kind: type) -> None:
    """Take away the runner of a class, wherever it is among those around the forward of a module."""
    outer, around = None, module.__dict__.get("forward")
    while isinstance(around, Around) and not isinstance(around.run, kind):
        outer, around = around, around.inner
    if not isinstance(around, Around):
        return
    if outer is not None:
        outer.inner = around.inner
    elif around.inner is not None:
        module.__dict__["forward"] = around.inner
    else:
        del module.__dict__["forward"]
