"""What a value is written to where DeepSpeed's ZeRO manages a parameter; with DeepSpeed itself: test_deepspeed.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from peft import get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
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


def test_a_weight_that_zero_3_has_taken_apart_is_refused() -> None:
    model = ARCHITECTURES["vit"].model()
    weight = model.get_submodule("vit.layers.0.mlp.fc1").weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"fc1: its weight is in shards of DeepSpeed's ZeRO-3. Load the model"):
        get_peft_model(model, WasiConfig())
    assert [id(module) for module in model.modules()] == before


def test_the_rank_is_known_while_factors_are_in_shards() -> None:
    model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(weight_rank=6))
    expected = str(model.wasi_summary())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert str(model.wasi_summary()) == expected
