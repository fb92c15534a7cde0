"""Packed experts as modules of their own, and back."""

from __future__ import annotations

import pytest
import torch
from expert_models import FAMILIES, experts_model, packed_names
from torch import nn

from wasi_peft.models.experts import ExpertStack, conceal_experts, expose_experts, packed_parameters
from wasi_peft.models.structure import Structure


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_are_exposed_and_put_back(family: str) -> None:
    model = experts_model(family)
    before, names = dict(model.state_dict()), packed_names(model)
    assert sorted(expose_experts(model)) == sorted(names)
    for name in names:
        stack = model.get_submodule(name)
        assert isinstance(stack, ExpertStack) and name in Structure(model).layers
        assert stack.transposed == (family in ("gpt_oss", "llama4"))
        hidden = stack.out_features if name.endswith("down_proj") else stack.in_features
        assert stack.experts == 4 and hidden == 16
    conceal_experts(model)
    assert list(model.state_dict()) == list(before)
    assert all(model.state_dict()[name].data_ptr() == value.data_ptr() for name, value in before.items())


class Experts(nn.Module):
    """Without transformers' word on how its weights lie."""

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...], name: str = "gate_up_proj") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(up)))
        self.down_proj = nn.Parameter(torch.zeros(down))


@pytest.mark.parametrize(
    ("up", "down", "name", "transposed"),
    [
        ((2, 8, 3), (2, 3, 4), "gate_up_proj", False),
        ((2, 3, 8), (2, 4, 3), "gate_up_proj", True),
        ((2, 8, 8), (2, 8, 4), "gate_up_proj", False),
        ((2, 8, 8), (2, 4, 8), "gate_up_proj", True),
        ((2, 4, 3), (2, 3, 4), "up_proj", None),
        ((2, 4, 3), (2, 4, 3), "gate_up_proj", None),
        ((8, 3), (3, 4), "gate_up_proj", None),
    ],
)
def test_shapes_say_how_weights_lie(
    up: tuple[int, ...], down: tuple[int, ...], name: str, transposed: bool | None
) -> None:
    packed = packed_parameters(Experts(up, down, name))
    assert packed == ({} if transposed is None else {name: transposed, "down_proj": transposed})


def test_weights_in_eight_bits_are_left_alone() -> None:
    module = Experts((2, 8, 3), (2, 3, 4))
    module.to(torch.float8_e4m3fn)
    assert packed_parameters(module) == {}
