"""Where in any model's forward pass its features come to be, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .calls import features_of
from .structure import Structure


@contextmanager
def watched_features(model: nn.Module, use: Callable[[Tensor], None]) -> Iterator[None]:
    """`use(features)` in every forward pass of a model, as soon as its features exist.

    They are what the base model answers. Where a head calls an inner module past it (OPT's and BART's language models
    call the decoder), they are what the outermost module around all blocks answers that runs, at the end of the pass.
    """
    base = getattr(model, "base_model", model)
    inner: list[Any] = []  # the last answer of an inner module in the running pass
    done: list[bool] = []

    def begin(*_: Any) -> None:
        inner.clear()
        done.clear()

    def answered(_: nn.Module, args: Any, output: Any) -> None:
        done.append(True)
        use(features_of(output))

    def answered_inside(_: nn.Module, args: Any, output: Any) -> None:
        inner[:] = [output]

    def end(_: nn.Module, args: Any, output: Any) -> None:
        if not done:
            use(features_of(inner[0] if inner else output))
        inner.clear()

    handles = [base.register_forward_hook(answered)]
    if base is not model:
        handles.append(model.register_forward_pre_hook(begin))
        handles += [module.register_forward_hook(answered_inside) for module in _around_blocks(base)]
        handles.append(model.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _around_blocks(base: nn.Module) -> Iterator[nn.Module]:
    """The modules around all blocks of a base model, itself left out, the outermost first."""
    names = [name.split(".") for name in Structure(base).blocks]
    module = base
    for depth in range(min(map(len, names), default=0)):
        if len({name[depth] for name in names}) > 1:
            return
        module = module.get_submodule(names[0][depth])
        yield module
