"""Parameters that FSDP2 keeps in shards; torch can be built without what they are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds a part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


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
