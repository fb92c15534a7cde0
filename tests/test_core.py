"""The core update: exact gradients of the core, coordinates that whiten both of its sides, budgets that count it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model
from reference import tiny_net
from strategies import normal, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, calibrate_wasi, fold_cores, plan_wasi, preprocess_wasi, wasi_summary
from wasi_peft.calibration import features_of
from wasi_peft.core import ImageMoments, core_form, core_linear
from wasi_peft.image_moments import image_moments
from wasi_peft.layer import InitialFactors, wasi_layers
from wasi_peft.preprocessing import INITIAL_FACTORS

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


# -------------------------------------------------------------------- coordinates


def test_both_sides_of_the_core_are_white() -> None:
    L, R = normal(9, 4, seed=0), normal(4, 7, seed=1)
    x = normal(500, 7, seed=2) * torch.linspace(0.2, 3, 7).double()
    g = normal(500, 9, seed=3) @ normal(9, 9, seed=4)
    h, u = x @ R.T, g @ L
    moments = ImageMoments(h.T @ h / 500, u.T @ u / 500, float(x.square().mean()))
    left, core, right = core_form(L, R, moments)
    assert relative_error(left @ core @ right, L @ R) < 1e-12
    assert relative_error(torch.diag(core.diagonal()), core) < 1e-12 and bool((core.diagonal().diff() < 0).all())
    image, gradient = x @ right.T, g @ left
    for rows, tolerance in ((image, 0.3), (gradient, 0.3)):  # but for the damping
        moment = rows.T @ rows / len(rows)
        white = moment.diagonal().mean() * torch.eye(4).double()
        assert relative_error(moment, white) < tolerance
    # far from white before
    assert relative_error(h.T @ h, (h.T @ h).diagonal().mean() * torch.eye(4).double()) > 0.5
    assert float(left.square().sum(0).mean()) == pytest.approx(1)
    assert float(image.square().mean()) == pytest.approx(float(x.square().mean()), rel=0.1)


@pytest.mark.parametrize("L", [torch.eye(5)[:, :2], torch.zeros(5, 2)])
@pytest.mark.parametrize("R", [torch.eye(6)[:2], torch.zeros(2, 6), torch.tensor([[1.0] * 6, [2.0] * 6])])
def test_directions_without_data_or_size(L: Tensor, R: Tensor) -> None:
    for moments in (None, ImageMoments(torch.zeros(2, 2), torch.zeros(2, 2), 0.0)):
        parts = core_form(L, R, moments)
        assert all(bool(torch.isfinite(part).all()) for part in parts)
        left, core, right = parts
        assert torch.allclose(left @ core @ right, L @ R, atol=1e-5)


def test_moments_are_those_of_the_compressed_model() -> None:
    """Against a second model with the factors multiplied out, and gradients from autograd."""
    net = tiny_net(seed=0).double()
    batches = [x.double() for x in data()]
    names = ["blocks.0.q", "blocks.1.fc2"]
    factors = {}
    for seed, name in enumerate(names):
        weight = net.get_submodule(name).weight
        L = torch.linalg.qr(normal(len(weight), 3, seed=seed)).Q
        factors[name] = InitialFactors(L, L.T @ weight.detach(), None)
    found = image_moments(net, factors, batches, seed=5, progress_bar=False)

    dense, signs, seen = copy.deepcopy(net), torch.Generator().manual_seed(5), {}
    for name in names:
        layer = dense.get_submodule(name)
        layer.weight.data = factors[name].L @ factors[name].R
        layer.bias = None

        def keep(_: Any, args: Any, y: Tensor, name: str = name) -> None:
            y.retain_grad()
            seen.setdefault(name, []).append((args[0], y))

        layer.register_forward_hook(keep)
    for x in batches:
        features = features_of(dense(x))
        features.backward(torch.randint(0, 2, features.shape, generator=signs).to(features) * 2 - 1)
    for name, each in found.items():
        x = torch.cat([pair[0].reshape(-1, pair[0].shape[-1]) for pair in seen[name]])
        g = torch.cat([pair[1].grad.reshape(-1, pair[1].shape[-1]) for pair in seen[name]])
        h, u = x @ factors[name].R.T, g @ factors[name].L
        assert relative_error(each.image.double(), h.T @ h / len(h)) < 1e-5
        assert relative_error(each.gradient.double(), u.T @ u / len(u)) < 1e-5
        assert each.mean_square == pytest.approx(float(x.square().mean()))


def test_moments_change_nothing_in_the_model() -> None:
    net = tiny_net(seed=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapted_net, batches = copy.deepcopy(net), data()
    state = torch.random.get_rng_state()
    config = WasiConfig(update="core", weight_rank=3)
    preprocess_wasi(adapted_net, config, batches, repair_steps=0, progress_bar=False)
    prepared = [vars(m)[INITIAL_FACTORS] for m in adapted_net.modules() if INITIAL_FACTORS in vars(m)]
    assert prepared and all(each.initial.moments is not None for each in prepared)
    assert all(torch.equal(value, before[name]) for name, value in adapted_net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adapted_net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_data_that_are_not_finite_are_refused(value: float) -> None:
    net = tiny_net(seed=0)
    weight = net.get_submodule("blocks.0.q").weight.detach()
    L = torch.linalg.qr(weight[:, :3]).Q
    bad = [torch.full((2, 5, 8), value)]
    with pytest.raises(ValueError, match=r"blocks\.0\.q: its input, or the gradient of its output, holds NaN or Inf"):
        image_moments(net, {"blocks.0.q": InitialFactors(L, L.T @ weight, None)}, bad, progress_bar=False)


def test_a_layer_that_no_data_reach_is_refused() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    factors = InitialFactors(torch.eye(4)[:, :2], torch.eye(4)[:2], torch.zeros(4))
    with pytest.raises(ValueError, match="spare: the data never reached this layer"):
        image_moments(Spare(), dict.fromkeys(("used", "spare"), factors), [torch.randn(3, 4)], progress_bar=False)


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


def test_a_whitened_core_needs_fewer_steps() -> None:
    """A regression with inputs whose directions differ 30-fold in size, each at the best of several learning rates."""
    x = normal(400, 16, seed=0) * torch.logspace(-1, 0.5, 16).double() @ torch.linalg.qr(normal(16, 16, seed=1)).Q
    L, R = torch.linalg.qr(normal(12, 8, seed=2)).Q, normal(8, 16, seed=3)
    wanted = x @ (L @ (torch.eye(8).double() + 0.5 * normal(8, 8, seed=4)) @ R).T
    h = x @ R.T
    white = ImageMoments(h.T @ h / len(h), L.T @ L, float(x.square().mean()))
    best = {}
    for kind, moments in (("white", white), ("plain", None)):
        losses = []
        for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
            left, core, right = core_form(L, R, moments)
            optimizer = torch.optim.Adam([core.requires_grad_()], lr=lr)
            for _ in range(100):
                loss = F.mse_loss(core_linear(x, left, core, right), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        best[kind] = min(losses)
    assert best["white"] < 0.1 * best["plain"]


def test_factors_prepared_without_a_core_are_refused() -> None:
    net = tiny_net(seed=0)
    preprocess_wasi(net, WasiConfig(update="factor", weight_rank=3), data(), repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match="prepared it for a core False, the configuration now asks for True"):
        get_peft_model(net, WasiConfig(update="core", weight_rank=3))


# -------------------------------------------------------------------- folded


def test_folded_cores_leave_two_factors(tmp_path: Path) -> None:
    batch = VIT.batch()
    model = adapted(VIT.model(), [batch], weight_rank=5)
    with torch.no_grad():
        for _, layer in wasi_layers(model):
            layer.wasi_M["default"] += 0.1 * torch.randn_like(layer.wasi_M["default"])
        before, share = model.eval()(**batch).logits, wasi_summary(model).kept_share
        fold_cores(model)
        after = model(**batch).logits
    assert 0 < relative_error(after, before) < 1e-6 and wasi_summary(model).kept_share < share
    assert not any(".wasi_M." in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.model(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].update == "factor"
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, after)
    with pytest.raises(ValueError, match="WASI layers with an active adapter with cores, got none"):
        fold_cores(model)


def test_merged_cores_are_not_folded() -> None:
    model = adapted(tiny_net(seed=0))
    layers = dict(wasi_layers(model))
    list(layers.values())[-1].merge()
    with pytest.raises(ValueError, match="the adapter is merged; call unmerge_adapter"):
        fold_cores(model)
    assert all("default" in layer.wasi_M for layer in layers.values())


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
        for part in (layer.wasi_L, layer.wasi_M, layer.wasi_R):
            elements += part["default"].numel()
    assert wasi_summary(model).kept_share == elements / sum(dense.values())
    assert 0.75 * share < wasi_summary(model).kept_share <= share
    assert not wasi_summary(model).past_break_even


def test_plans_count_the_cores() -> None:
    model = VIT.model()
    calibration = calibrate_wasi(model, [VIT.batch()], progress_bar=False)
    ranks = {}
    for update in ("factor", "core"):
        plan = plan_wasi(model, calibration, weight_share=0.5, config=WasiConfig(update=update))
        ranks[update] = sum(layer.weight_rank for layer in plan.layers)
    assert ranks["core"] < ranks["factor"]
