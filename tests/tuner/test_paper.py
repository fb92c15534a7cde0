"""The paper's method as one call: what it sets, and whole training steps against a dense implementation."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from models import ARCHITECTURES
from peft import get_peft_model
from strategies import orthonormality_error, relative_error
from torch import nn

from wasi_peft import SubspaceSGD, WasiConfig
from wasi_peft.tuner.layer import wasi_layers

VIT = ARCHITECTURES["vit"]
RECIPE = {"lr": 0.05, "weight_decay": 1e-4, "max_grad_norm": 2.0}


def plain(name: str) -> str:
    """A parameter's name in the model without adapter."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def pair(epsilon: float, **options: Any) -> tuple[Any, nn.Module]:
    """The adapted model, and the dense one whose layers do as the paper says, with the same parameters training."""
    base = VIT.model().double()
    model = get_peft_model(VIT.model().double(), WasiConfig.paper(epsilon, modules_to_save=["classifier"], **options))
    trained = {plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in VIT.targets(base):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, reference.PaperLinear(base.get_submodule(name), epsilon))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(
            name in trained or isinstance(base.get_submodule(name.rpartition(".")[0]), reference.PaperLinear)
        )
    return model.train(), base.train()


@pytest.mark.parametrize("epsilon", [0.6, 0.9])
def test_steps_are_those_of_the_paper(epsilon: float) -> None:
    model, dense = pair(epsilon)
    optimizer, norms = SubspaceSGD(model, **RECIPE), []
    for step in range(5):
        batch = VIT.batch(16, seed=step, dtype=torch.float64)
        losses = [net(**batch).loss for net in (model, dense)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(reference.paper_step(dense, **RECIPE))
    assert max(norms) > RECIPE["max_grad_norm"]  # steps were clipped

    layers = {plain(name): layer for name, layer in wasi_layers(model)}
    warm = 0
    for name, layer in layers.items():
        twin, form = dense.get_submodule(name), layer.form
        assert isinstance(twin, reference.PaperLinear)
        assert form.weight_rank == twin.L.shape[1] and orthonormality_error(form.L) < 1e-9
        assert relative_error(form.L @ form.R, twin.weight) < 1e-6
        assert relative_error(form.L @ form.L.T, twin.L @ twin.L.T) < 1e-6
        assert form.bias is not None and relative_error(form.bias, twin.bias) < 1e-6
        warm += bool(twin.bases)
    assert warm  # inputs were compressed from bases that went on
    others = {plain(name): parameter for name, parameter in model.named_parameters() if "wasi_" not in name}
    start = dict(VIT.model().double().named_parameters())
    compared = [name for name, parameter in dense.named_parameters() if name in others and parameter.requires_grad]
    assert len(compared) > 10
    for name in compared:
        assert relative_error(others[name], dense.get_parameter(name)) < 1e-6, name
        assert not torch.equal(others[name], start[name]), name


def test_a_tiny_vit_trains() -> None:
    model = get_peft_model(VIT.model(), WasiConfig.paper(0.8, modules_to_save=["classifier"])).train()
    optimizer, batch, losses = SubspaceSGD(model, **RECIPE), VIT.batch(16), []
    for _ in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_it_sets_and_what_may_be_set() -> None:
    config = WasiConfig.paper(0.8)
    default = WasiConfig(residual=None)
    changed = {key: value for key, value in config.to_dict().items() if value != default.to_dict()[key]}
    assert changed == {
        "explained_variance_threshold": 0.8,
        "update": "subspace",
        "activation_threshold": 0.8,
        "activation_modes": ["feature", "token", "batch", "height", "width"],
        "activation_interval": 1,
        "bias": "all",
    }
    other = WasiConfig.paper(0.8, activation_threshold=None, memory_mode="small", target_modules=["fc1"])
    assert (other.activation_threshold, other.memory_mode, other.target_modules) == (None, "small", {"fc1"})


@pytest.mark.parametrize("epsilon", [0, 1.1, float("nan"), "0.9", True, None])
def test_epsilon_is_a_share(epsilon: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be a number in \(0, 1\], got"):
        WasiConfig.paper(epsilon)
