"""GELU and SiLU that keep 4 bits of their input: outputs, gradients, what is kept, and where they stay torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import normal, relative_error
from torch import Tensor, nn

from wasi_peft.memory import LowBitSavedTensors
from wasi_peft.memory.activation import LIMIT, low_bit_activation

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "gelu": (F.gelu, {}),
    "gelu, tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}


def gradient(function: Callable[..., Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, direction)[0]


def is_low_bit(y: Tensor) -> bool:
    return "LowBitActivation" in type(y.grad_fn).__name__


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_outputs_are_exact_and_gradients_near(name: str, dtype: torch.dtype) -> None:
    function, options = FUNCTIONS[name]
    x, direction = (2 * normal(50, 96, seed=seed).to(dtype) for seed in (0, 1))
    wanted, exact = gradient(lambda x: function(x, **options), x, direction)
    y, found = gradient(lambda x: low_bit_activation(function, x, **options), x, direction)
    assert torch.equal(y, wanted)
    assert found.dtype == dtype
    assert 0 < relative_error(found.double(), exact.double()) < 0.12


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_that_at_a_point_nearby(name: str) -> None:
    function, options = FUNCTIONS[name]
    x = normal(40, 64, seed=2).double()
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
    ones = torch.ones_like(x)
    _, found = gradient(lambda x: low_bit_activation(function, x, **options), x, ones)
    points = x + torch.linspace(-0.51, 0.51, 41).double()[:, None, None] * step  # scales are float16
    _, around = gradient(lambda x: function(x, **options), points, torch.ones_like(points))
    assert bool((found >= around.amin(0) - 1e-3).all() and (found <= around.amax(0) + 1e-3).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_large_value_does_not_spoil_its_neighbours(name: str) -> None:
    function, options = FUNCTIONS[name]
    x = normal(64, seed=3).float()
    x[7] = 1e6
    _, exact = gradient(lambda x: function(x, **options), x, torch.ones_like(x))
    _, found = gradient(lambda x: low_bit_activation(function, x, **options), x, torch.ones_like(x))
    assert abs(float(found[7]) - 1) < 3e-3  # SiLU's derivative at the limit is 1.002
    largest_slope = 0.8  # of either derivative
    assert float((found - exact).abs().max()) < largest_slope * (LIMIT - float(x.min())) / 15 / 2 + 1e-3


@pytest.mark.parametrize("shape", [(), (3,), (64,), (65,), (5, 63), (2, 3, 64)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.5)
    y, found = gradient(lambda x: low_bit_activation(F.gelu, x), x, torch.ones(shape))
    _, exact = gradient(F.gelu, x, torch.ones(shape))
    assert y.shape == shape and torch.allclose(found, exact, atol=1e-3)


def test_inputs_that_are_not_contiguous() -> None:
    x, direction = normal(32, 96, seed=4).float(), normal(96, 32, seed=5).float()
    for view in (x.T, torch.stack([x.T, x.T], -1)[..., 0]):
        _, exact = gradient(F.silu, view, direction)
        _, found = gradient(lambda x: low_bit_activation(F.silu, x), view, direction)
        assert relative_error(found, exact) < 0.12


def test_four_and_a_half_bits_are_kept() -> None:
    x = normal(100, 64, seed=6).float().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_bit_activation(F.gelu, x)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == x.numel() * 4.5 / 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_missing_and_infinite_numbers_take_torchs_way(value: float) -> None:
    x = normal(3, 64, seed=7).float()
    x[1, 1] = value
    y = low_bit_activation(F.gelu, x.requires_grad_())
    assert not is_low_bit(y)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    x = normal(3, 64, seed=8).float()
    assert low_bit_activation(F.gelu, x).grad_fn is None
    with torch.no_grad():
        assert low_bit_activation(F.gelu, x.requires_grad_()).grad_fn is None


def test_other_functions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"function must be torch\.nn\.functional\.gelu or silu"):
        low_bit_activation(F.relu, torch.zeros(3))


def test_no_second_derivative() -> None:
    x = normal(64, seed=9).float().requires_grad_()
    (found,) = torch.autograd.grad(low_bit_activation(F.gelu, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        found.sum().backward()


@pytest.mark.parametrize("module", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_modules_inside_the_context(module: nn.Module) -> None:
    x = normal(100, 64, seed=10).float().requires_grad_()
    with LowBitSavedTensors("int8", low_bit_activations=True):
        inside, small = module(2 * x), module(2 * x[:2])
    with LowBitSavedTensors("int8"):
        rounded = module(2 * x)
    assert is_low_bit(inside) and not is_low_bit(small) and not is_low_bit(rounded)
    assert torch.equal(inside, rounded)
    for y in (inside, rounded):
        y.sum().backward()


def test_in_place_activations_stay_torchs() -> None:
    x = normal(100, 64, seed=11).float().requires_grad_()
    with LowBitSavedTensors("int8", low_bit_activations=True):
        y = nn.SiLU(inplace=True)(2 * x)
    assert not is_low_bit(y)
    y.sum().backward()
    exact = torch.autograd.grad(F.silu(2 * x).sum(), x)[0]
    assert x.grad is not None and relative_error(x.grad, exact) < 0.02
