"""What a value is written to where DeepSpeed's ZeRO manages a parameter; with DeepSpeed itself: test_deepspeed.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wasi_peft.forms.shards import write_through

VALUE = torch.arange(1.0, 11.0).view(2, 5)


def parameter(**added: Any) -> Any:
    made = nn.Parameter(torch.zeros(2, 5))
    for name, value in added.items():
        setattr(made, name, value)
    return made


def test_a_parameter_of_torch_is_left_alone() -> None:
    plain = parameter()
    assert not write_through(plain, VALUE)
    assert not plain.any()


def test_the_copy_that_zero_2_steps_gets_the_value() -> None:
    given: list[Tensor] = []
    assert write_through(parameter(_hp_mapping=object(), set_full_hp_param=given.append), VALUE)
    assert len(given) == 1 and torch.equal(given[0], VALUE)
    # another process has this one's copy
    assert write_through(parameter(_hp_mapping=None, set_full_hp_param=given.append), VALUE)
    assert len(given) == 1


@pytest.mark.parametrize("trains", [True, False])
def test_every_process_writes_its_shard_under_zero_3(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    shards = []
    for rank in range(4):  # of three numbers each, the last one padded
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        stepped: list[Tensor] = []
        optimizer = SimpleNamespace(set_local_hp_param=lambda value, _, stepped=stepped: stepped.append(value.clone()))
        shard = torch.full((3,), -1.0)
        managed = parameter(ds_tensor=shard, ds_process_group=None, _z3_optimizer=optimizer).requires_grad_(trains)
        assert write_through(managed, VALUE)
        assert [value.tolist() for value in stepped] == [shard.tolist()] * trains
        shards.append(shard)
    assert torch.cat(shards).tolist() == [*VALUE.flatten().tolist(), -1.0, -1.0]
