"""What tests look for: what is alive, what is shared, what trains; and failures on purpose."""

from __future__ import annotations

import gc
import warnings
from typing import Any

from torch import Tensor, nn

from wasi_peft.tuner.inputs import SharedInputs
from wasi_peft.tuner.layer import wasi_layers


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def live_bytes() -> int:
    """Bytes of all storages that some tensor in the process still holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes of other libraries' objects
        tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def shared_inputs(model: nn.Module) -> SharedInputs:
    """The one object by which the layers of a model share their inputs."""
    first, *others = [layer.inputs for _, layer in wasi_layers(model)]
    assert all(other is first for other in others)
    return first


class Interrupted(RuntimeError):
    """Raised on purpose."""


def fail(*_: Any) -> None:
    raise Interrupted


def fail_in_backward(_: nn.Module, __: Any, output: Tensor) -> None:
    """Forward hook after which the backward pass breaks off at this layer."""
    output.register_hook(fail)
