"""Tensors without memory beside computed ones: what is known of values, and that no byte counts twice."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from wasi_peft.cost.simulation import Simulation

SIZE = 4000


def peak(simulation: Simulation) -> int:
    """Most bytes at any moment."""
    gc.collect()
    held = most = 0
    for _, size in simulation.memory.events:
        held += size
        most = max(most, held)
    return most


def held(simulation: Simulation) -> int:
    """Bytes that are still there."""
    gc.collect()
    return sum(size for _, size in simulation.memory.events)


def copied(buffer: Tensor, x: Tensor) -> None:
    buffer.copy_(x)


def copied_to_a_part(buffer: Tensor, x: Tensor) -> None:
    buffer[10:20] = x[10:20]


def added(buffer: Tensor, x: Tensor) -> None:
    buffer.view(10, -1).add_(x.view(10, -1))


def as_out(buffer: Tensor, x: Tensor) -> None:
    torch.mul(x, 2, out=buffer)


@pytest.mark.parametrize("write", [copied, copied_to_a_part, added, as_out])
@pytest.mark.parametrize("make", [torch.empty, torch.zeros], ids=lambda make: str(make.__name__))
def test_values_that_are_written_over_are_not_known(
    make: Callable[..., Tensor], write: Callable[[Tensor, Tensor], None]
) -> None:
    simulation = Simulation()
    x = simulation.like(torch.ones(SIZE))
    with simulation:
        buffer = make(SIZE)
        assert not isinstance(buffer, FakeTensor)  # it is small
        write(buffer, x)
        finite = torch.isfinite(buffer[:30]).all()
        assert isinstance(finite, FakeTensor) and bool(finite)
        del finite
    assert peak(simulation) <= 2 * x.nbytes + 1000
    del buffer
    assert held(simulation) == x.nbytes


def test_memory_lasts_as_long_as_either_that_stands_for_it() -> None:
    simulation = Simulation()
    x = simulation.like(torch.ones(SIZE))
    with simulation:
        whole = torch.zeros(SIZE)
        whole.add_(x)
        part = whole[10:20]
        del whole
    assert isinstance(part, FakeTensor) and held(simulation) == 2 * x.nbytes
    del part
    assert held(simulation) == x.nbytes


def test_computed_values_stay_known() -> None:
    simulation = Simulation()
    x = simulation.like(torch.ones(SIZE))
    with simulation:
        ids = torch.empty(3, dtype=torch.long)
        ids.copy_(torch.tensor([2, 0, 1]))
        assert x[ids].shape == (3,)
        assert ids.tolist() == [2, 0, 1]
