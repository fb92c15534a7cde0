"""Coordinates of frozen factors: the product stays, images are white, and Adam needs fewer steps in them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES
from peft import get_peft_model
from reference import tiny_net
from strategies import normal, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, preprocess_wasi
from wasi_peft.factors.moments import image_moments
from wasi_peft.linalg.coordinates import BASIS_SCALE, ImageMoments, basis_form, core_form
from wasi_peft.memory.saved import LowBitSavedTensors
from wasi_peft.models.calls import features_of
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates.base import InitialFactors
from wasi_peft.updates.core import core_linear
from wasi_peft.updates.factored import factored_linear

VIT = ARCHITECTURES["vit"]


def data() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(4, 5, 8) * torch.linspace(0.1, 3, 8) for _ in range(3)]


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


def test_the_image_of_a_frozen_basis_is_white() -> None:
    L, R = normal(9, 4, seed=0), normal(4, 7, seed=1)
    x = normal(500, 7, seed=2) * torch.linspace(0.2, 3, 7).double()
    h = x @ R.T
    moments = ImageMoments(h.T @ h / 500, L.T @ L, float(x.square().mean()))
    left, right = basis_form(L, R, moments)
    assert relative_error(left @ right, L @ R) < 1e-12
    image = x @ right.T
    white = image.square().mean() * torch.eye(4).double()
    assert relative_error(image.T @ image / 500, white) < 0.1  # but for the damping
    assert float(image.square().mean() / x.square().mean()) == pytest.approx(BASIS_SCALE**2, rel=0.1)


def test_a_frozen_basis_has_white_images_in_the_model() -> None:
    """Not with factors of a plain decomposition, which know nothing of the data."""
    spread = {}
    for prepared in (True, False):
        net = VIT.model()
        config = WasiConfig(residual=None, update="frozen_basis", weight_rank=4)
        if prepared:
            preprocess_wasi(net, config, [VIT.batch()], repair_steps=0, progress_bar=False)
        model = get_peft_model(net, config).eval()
        found = []

        def look(layer: nn.Module, args: Any, found: list[float] = found) -> None:
            h = args[0].reshape(-1, args[0].shape[-1]) @ layer.wasi_form["default"].R.T
            values = torch.linalg.eigvalsh(h.T @ h)
            found.append(float(values[-1] / values[0]))

        for _, layer in wasi_layers(model):
            layer.register_forward_pre_hook(look)
        with torch.no_grad():
            model(**VIT.batch())
        spread[prepared] = max(found)
    assert spread[True] < 0.1 * spread[False]


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


@pytest.mark.parametrize("update", ["core", "frozen_basis"])
def test_moments_change_nothing_in_the_model(update: str) -> None:
    net = tiny_net(seed=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapted_net, batches = copy.deepcopy(net), data()
    state = torch.random.get_rng_state()
    config = WasiConfig(residual=None, update=update, weight_rank=3)
    factors = preprocess_wasi(adapted_net, config, batches, repair_steps=0, progress_bar=False)
    assert all(initial.moments is not None for initial in factors.initial.values())
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


def test_a_layer_that_no_data_reach_has_no_moments() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    factors = InitialFactors(torch.eye(4)[:, :2], torch.eye(4)[:2], torch.zeros(4))
    moments = image_moments(
        Spare(), dict.fromkeys(("used", "spare"), factors), [torch.randn(3, 4)], progress_bar=False
    )
    assert list(moments) == ["used"]


def best_loss(parts: Any, layer: Any, x: Tensor, wanted: Tensor, rates: tuple[float, ...]) -> float:
    """Of 100 steps of Adam on the first of the parts, at the best of several learning rates."""
    losses = []
    for lr in rates:
        trained, *frozen = parts()
        optimizer = torch.optim.Adam([trained.requires_grad_()], lr=lr)
        for _ in range(100):
            loss = F.mse_loss(layer(x, trained, *frozen), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return min(losses)


def test_white_coordinates_need_fewer_steps() -> None:
    """A regression with inputs whose directions differ 30-fold in size."""
    x = normal(400, 16, seed=0) * torch.logspace(-1, 0.5, 16).double() @ torch.linalg.qr(normal(16, 16, seed=1)).Q
    L, R = torch.linalg.qr(normal(12, 8, seed=2)).Q, normal(8, 16, seed=3)
    wanted = x @ (L @ (torch.eye(8).double() + 0.5 * normal(8, 8, seed=4)) @ R).T
    h = x @ R.T
    white = ImageMoments(h.T @ h / len(h), L.T @ L, float(x.square().mean()))

    def core(moments: ImageMoments | None) -> float:
        def parts() -> tuple[Tensor, Tensor, Tensor]:
            left, middle, right = core_form(L, R, moments)
            return middle, left, right

        return best_loss(parts, lambda x, M, L, R: core_linear(x, L, M, R), x, wanted, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))

    def basis(moments: ImageMoments | None) -> float:
        return best_loss(lambda: basis_form(L, R, moments), factored_linear, x, wanted, (1e-1, 3e-1, 1.0))

    assert core(white) < 0.1 * core(None)
    assert basis(white) < 0.1 * basis(None)


@pytest.mark.parametrize("update", ["core", "frozen_basis"])
def test_rounding_changes_only_the_gradient_of_what_trains(update: str) -> None:
    found = {}
    for rounded in (False, True):
        net = VIT.model()
        config = WasiConfig(residual=None, update=update, weight_rank=6, target_modules=["fc2"])
        preprocess_wasi(net, config, [VIT.batch()], repair_steps=0, progress_bar=False)
        layer = next(layer for _, layer in wasi_layers(get_peft_model(net, config).train()))
        x = normal(4, 10, 24, seed=0).float().requires_grad_()
        with LowBitSavedTensors("int8", 0) if rounded else nullcontext():
            y = layer(x)
        y.backward(normal(4, 10, y.shape[-1], seed=1).float())
        trained = layer.form.M if update == "core" else layer.form.L
        found[rounded] = x.grad, layer.wasi_form["default"].bias.grad, trained.grad
    assert torch.equal(found[True][0], found[False][0]) and torch.equal(found[True][1], found[False][1])
    assert 0 < relative_error(found[True][2], found[False][2]) < 0.02
