"""The core update: exact gradients of the core, whole models, folding, budgets that count it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model
from reference import tiny_net
from strategies import relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, calibrate_wasi, fold_cores, plan_wasi, preprocess_wasi, wasi_summary
from wasi_peft.forms import CoredLinear
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates.core import core_linear

VIT = ARCHITECTURES["vit"]


def data() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(4, 5, 8) * torch.linspace(0.1, 3, 8) for _ in range(3)]


def adapted(net: nn.Module, batches: Any = None, **options: Any) -> PeftModel:
    config = WasiConfig(**{"update": "core", "weight_rank": 3, **options})
    preprocess_wasi(net, config, data() if batches is None else batches, repair_steps=0, progress_bar=False)
    model: PeftModel = get_peft_model(net, config)
    return model


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 5, 7), "L": (6, 3), "M": (3, 3), "R": (3, 7), "bias": (6,)}
    return {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}


# -------------------------------------------------------------------- the function


@pytest.mark.parametrize("needed", [names for n in range(1, 4) for names in itertools.combinations("xMb", n)])
def test_gradients_are_autograds(needed: tuple[str, ...]) -> None:
    given = operands()
    names = [{"b": "bias"}.get(name, name) for name in needed]
    for name in names:
        given[name].requires_grad_()
    ours = core_linear(**given)
    plain = F.linear(given["x"], given["L"] @ given["M"] @ given["R"], given["bias"])
    assert relative_error(ours, plain) < 1e-13
    direction = torch.randn_like(plain)
    inputs = [given[name] for name in names]
    found, wanted = (torch.autograd.grad(y, inputs, direction, retain_graph=True) for y in (ours, plain))
    for name, gradient, reference in zip(names, found, wanted, strict=True):
        assert relative_error(gradient, reference) < 1e-12, name


def test_backward_keeps_k_numbers_a_row() -> None:
    sizes = {}
    for needed in ("x", "M", "bias"):
        given = operands()
        given[needed].requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            core_linear(**given)
        factors = {given[name].data_ptr() for name in ("L", "M", "R")}
        sizes[needed] = sum(t.numel() for t in kept if t.data_ptr() not in factors)
    assert sizes == {"x": 0, "M": 10 * 3, "bias": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_with_float32_factors(dtype: torch.dtype) -> None:
    given = operands(torch.float32)
    for name in ("M", "bias"):
        given[name].requires_grad_()
    x = given.pop("x").to(dtype)
    core_linear(x, **given).float().square().sum().backward()
    assert {given[name].grad.dtype for name in ("M", "bias")} == {torch.float32}


# -------------------------------------------------------------------- in a model


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_trains_and_is_loaded(name: str, tmp_path: Path) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    batch = architecture.batch()
    model = adapted(architecture.model(), [batch], weight_rank=5).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        merged = loaded.merge_and_unload()
        assert relative_error(merged(**batch).logits, model(**batch).logits) < 1e-4


def test_the_start_is_that_of_both_factors() -> None:
    models = [adapted(VIT.model(), [VIT.batch()], update=update).eval() for update in ("core", "factor")]
    with torch.no_grad():
        core, factor = (model(**VIT.batch()).logits for model in models)
    assert relative_error(core, factor) < 1e-5


def test_factors_prepared_without_a_core_are_refused() -> None:
    net = tiny_net(seed=0)
    preprocess_wasi(net, WasiConfig(update="factor", weight_rank=3), data(), repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match="prepared it for update factor, the configuration now asks for core"):
        get_peft_model(net, WasiConfig(update="core", weight_rank=3))


# -------------------------------------------------------------------- folded


def test_folded_cores_leave_two_factors(tmp_path: Path) -> None:
    batch = VIT.batch()
    model = adapted(VIT.model(), [batch], weight_rank=5)
    with torch.no_grad():
        for _, layer in wasi_layers(model):
            layer.form.M.add_(0.1 * torch.randn_like(layer.form.M))
        before, share = model.eval()(**batch).logits, wasi_summary(model).kept_share
        fold_cores(model)
        after = model(**batch).logits
    assert 0 < relative_error(after, before) < 1e-6 and wasi_summary(model).kept_share < share
    assert not any(name.endswith(".wasi_M") for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.model(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].update == "factor"
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, after)
    with pytest.raises(ValueError, match="WASI layers with an active adapter with cores, got none"):
        fold_cores(model)


@pytest.mark.parametrize("forms", [("factors", "int8"), ("int8", "factors")])
def test_folding_leaves_residuals_of_the_same_plan_alone(forms: tuple[str, str], tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    layers = tuple(LayerPlan(str(place), 8, 8, 3, None, 0.9, form) for place, form in enumerate(forms))
    model = get_peft_model(net(), WasiConfig(plan=WasiPlan(layers, update="core"))).eval()
    x = torch.randn(4, 8)
    before = model(x)
    fold_cores(model)
    assert model.peft_config["default"].update == "factor"
    torch.testing.assert_close(model(x), before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), str(tmp_path)).eval()(x), before)


def test_merged_cores_are_not_folded() -> None:
    model = adapted(tiny_net(seed=0))
    layers = dict(wasi_layers(model))
    list(layers.values())[-1].merge()
    with pytest.raises(ValueError, match="the adapter is merged; call unmerge_adapter"):
        fold_cores(model)
    assert all(isinstance(layer.form, CoredLinear) for layer in layers.values())


# -------------------------------------------------------------------- budgets


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_share_counts_the_cores(share: float, prepared: bool) -> None:
    config = WasiConfig(update="core", weight_share=share)
    model = VIT.model()
    dense = {name: model.get_submodule(name).weight.numel() for name in VIT.targets(model)}
    if prepared:
        preprocess_wasi(model, config, [VIT.batch()], repair_steps=0, progress_bar=False)
    model = get_peft_model(model, config)
    elements = 0
    for _, layer in wasi_layers(model):
        elements += sum(part.numel() for part in (layer.form.L, layer.form.M, layer.form.R))
    assert wasi_summary(model).kept_share == elements / sum(dense.values())
    assert 0.75 * share < wasi_summary(model).kept_share <= share
    assert not wasi_summary(model).past_break_even


def test_plans_count_the_cores() -> None:
    model = VIT.model()
    calibration = calibrate_wasi(model, [VIT.batch()], progress_bar=False)
    ranks = {}
    for update in ("factor", "core"):
        plan = plan_wasi(model, calibration, weight_share=0.5, config=WasiConfig(residual=None, update=update))
        ranks[update] = sum(layer.weight_rank for layer in plan.layers)
    assert ranks["core"] < ranks["factor"]
