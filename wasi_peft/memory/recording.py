"""Whether something inside a block records tensors that outlive the block's call, such as router logits.

What is recorded must be of the whole batch and have its gradient, so such a block can neither run in slices nor be run
without a graph at first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils import output_capturing

# hooks of these packages move parameters and look at shapes
_NOT_RECORDING = ("accelerate", "deepspeed", "peft", "torch", __name__.partition(".")[0])


def records(block: nn.Module) -> bool:
    """Whether a forward hook on a part of a block may record what the part is given or returns.

    transformers' own hooks count while the model collects what they are for (`output_router_logits`,
    `output_attentions`); hooks of anybody else always. Hooks on the block itself see whole batches in any case.
    """
    collected = output_capturing._active_collector.get()
    for module in block.modules():
        if module is not block and (module._forward_hooks or module._forward_pre_hooks):
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(_may_record(hook, collected) for hook in hooks):
                return True
    return False


def _may_record(hook: Callable[..., Any], collected: dict[str, Any] | None) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    package = getattr(hook, "__module__", None) or ""
    if package == output_capturing.__name__:
        return collected is not None and _key_of(hook) in collected
    return package.partition(".")[0] not in _NOT_RECORDING


def _key_of(hook: Any) -> str:
    """What one of transformers' hooks collects."""
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    key: str = cells["key"].cell_contents
    return key
