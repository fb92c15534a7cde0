"""Runs of several processes: parameters that FSDP2 keeps in shards, and those of which DeepSpeed's ZeRO steps copies.

torch can be built without what shards are made of, and DeepSpeed need not be there: what it adds to a parameter says
that it manages it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process belongs to a group of them."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds a part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of all of a parameter, of which ZeRO-3 may have left nothing where it was."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered where it is in shards, for which all processes must ask."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


@torch.no_grad()
def write_shard(tensor: Any, value: Tensor) -> None:
    """Write this process's part of a value, which all processes hold, where the tensor is in shards."""
    if not is_sharded(tensor):
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.to_local().copy_(everywhere.redistribute(placements=tensor.placements).to_local())


@torch.no_grad()
def write_through(parameter: Any, value: Tensor) -> bool:
    """Write a value to where DeepSpeed's ZeRO takes a parameter from, this process's part of it.

    ZeRO-1 and 2 step a copy in float32 and overwrite the parameter with it; ZeRO-3 drops the parameter itself after
    use, too, and gathers it from shards.

    Args:
        parameter: Holds the value already, as far as it is there.
        value: All of it, which all processes hold.

    Returns:
        Whether ZeRO manages the parameter.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None:
        start = shard.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        part = value.flatten()[start : start + shard.numel()]
        shard[: len(part)].copy_(part)  # the last one may be longer
        if parameter.requires_grad:
            parameter._z3_optimizer.set_local_hp_param(shard, parameter)
        return True
    if getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(value)
    return hasattr(parameter, "_hp_mapping")
