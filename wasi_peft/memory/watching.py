"""Function modes of techniques, and how a layer gets out of their sight; what is tried gets out of that of accounts.

While a function mode is on, every call of torch goes through Python once more, for each mode. A layer of WASI makes
some forty small ones, and none that a technique looks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Watch(TorchFunctionMode):
    """A function mode that looks for calls of the model's own code, and for none inside of WASI's layers."""

    def skip(self, layer: nn.Module, x: Tensor) -> None:
        """Called in place of what a layer of WASI calls."""


class Account(TorchDispatchMode):
    """A dispatch mode that writes down what a step does.

    Attributes:
        paused: True while something is only tried.
    """

    paused = False


@contextmanager
def unaccounted() -> Iterator[None]:
    """Context in which every :class:`Account` that is on is paused."""
    accounts = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Account) and not mode.paused]
    try:
        for account in accounts:
            account.paused = True
        yield
    finally:
        for account in accounts:
            account.paused = False


class OutOfSight:
    """Context in which no :class:`Watch` is on, up to the innermost mode of another kind.

    Args:
        layer: The layer that is called.
        x: Its input.

    Example:
        >>> import torch
        >>> class Counts(Watch):
        ...     calls = skipped = 0
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         self.calls += 1
        ...         return func(*args, **(kwargs or {}))
        ...     def skip(self, layer, x):
        ...         self.skipped += 1
        >>> layer, x = nn.Linear(4, 2), torch.zeros(3, 4)
        >>> with Counts() as counts:
        ...     with OutOfSight(layer, x):
        ...         y = layer(x)
        ...     y = 2 * y
        >>> counts.calls, counts.skipped
        (1, 1)
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self._layer, self._x = layer, x
        self._asleep: list[Watch] = []

    def __enter__(self) -> None:
        try:
            while isinstance(mode := _get_current_function_mode(), Watch):
                mode.__exit__(None, None, None)
                self._asleep.append(mode)
            for mode in self._asleep:
                mode.skip(self._layer, self._x)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *args: object) -> None:
        while self._asleep:
            self._asleep.pop().__enter__()
