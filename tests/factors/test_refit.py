"""Refit: right factors that suit the inputs of the compressed model, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from calibrating import CountedData, assert_same_factors, batches, inputs_of, plain_factors, wasi_factors
from models import ARCHITECTURES, Architecture
from strategies import normal
from test_repair import (
    Factors,
    check_a_dtype,
    check_that_it_comes_nearer,
    check_that_padding_is_ignored,
    compressed,
)
from torch import Tensor, nn
from transformers import DynamicCache

from wasi_peft import repair_blocks
from wasi_peft.factors.block_states import segments
from wasi_peft.factors.model_repair import compared_blocks
from wasi_peft.factors.refit import RIDGE, input_map
from wasi_peft.updates.base import InitialFactors

VIT = ARCHITECTURES["vit"]


def run(model: nn.Module, factors: Factors, data: Any, steps: int = 0, **options: Any) -> Factors:
    """The first half of repair alone, without a progress bar."""
    return repair_blocks(model, wasi_factors(factors), data, steps=steps, progress_bar=False, **options).initial


def slow_refit(net: nn.Module, factors: Factors, data: list[Tensor], order: list[str], ridge: float) -> Factors:
    """The same from whole models: for every layer both run on all data from the start, and least squares by rows."""
    factors = dict(factors)
    for name in order:
        linear, given = net.get_submodule(name), factors[name]
        wanted = inputs_of(net, data, [name])[name]
        rows = inputs_of(compressed(net, factors), data, [name])[name]
        means = wanted.mean(0), rows.mean(0)
        x, y = (rows, wanted) if linear.bias is None else (rows - means[1], wanted - means[0])
        scale = (ridge * x.square().mean(0).mean() * len(x)) ** 0.5
        corner = scale * torch.eye(x.shape[1], dtype=torch.float64)
        M = torch.linalg.lstsq(torch.cat([x, corner]), torch.cat([y, corner])).solution.T
        R = given.R.double() @ M
        bias = given.bias
        if linear.bias is not None:
            weight = linear.weight.detach().double()
            bias = (linear.bias.detach() + weight @ means[0] - given.L.double() @ (R @ means[1])).float()
        factors[name] = InitialFactors(given.L, R.float(), bias)
    return factors


# -------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("rows", [4, 40])
def test_the_map_is_the_least_squares_one(rows: int) -> None:
    """Also where there are fewer rows than features: the ridge draws to the identity."""
    x, wanted = normal(rows, 6, seed=0).double(), normal(rows, 6, seed=1).double()
    shift = 0.3
    corner = shift**0.5 * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, corner]), torch.cat([wanted, corner])).solution.T
    torch.testing.assert_close(input_map(wanted.T @ x, x.T @ x, shift), expected)


def test_the_map_of_an_input_that_is_always_zero() -> None:
    assert torch.equal(input_map(torch.zeros(3, 3), torch.zeros(3, 3), 0.0), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_it_agrees_with_whole_models(bias: bool) -> None:
    net = reference.tiny_net(6)
    if not bias:
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
    factors, data = plain_factors(net), batches()
    order = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("q", "k", "v", "o", "fc1", "fc2")]
    expected = slow_refit(net, factors, data, order, RIDGE)
    found = run(net, factors, data)
    for name in order:
        torch.testing.assert_close(found[name].R, expected[name].R, rtol=2e-3, atol=2e-4)
        if bias:
            torch.testing.assert_close(found[name].bias, expected[name].bias, rtol=2e-3, atol=2e-4)
        assert torch.equal(found[name].L, factors[name].L)


def test_the_compressed_model_comes_nearer_to_the_dense_one(architecture: Architecture) -> None:
    check_that_it_comes_nearer(run, architecture, samples=32, count=8, at_most=0.9)


def test_first_layers_read_what_they_always_did() -> None:
    model = VIT.model()
    factors = plain_factors(model)
    refitted = run(model, factors, [VIT.batch(16)])
    first = [name for name in factors if name.startswith("vit.layers.0.attention") and "o_proj" not in name]
    assert first
    for name in first:
        torch.testing.assert_close(refitted[name].R, factors[name].R, rtol=1e-4, atol=1e-5)


def test_padding_is_ignored() -> None:
    check_that_padding_is_ignored(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check_a_dtype(run, dtype, count=4)


def test_it_looks_at_the_rows_it_was_asked_for() -> None:
    net = reference.tiny_net(1)
    few, data = batches(2), batches(5)
    factors = plain_factors(net)
    assert_same_factors(run(net, factors, data, rows=40), run(net, factors, few))  # 20 rows a batch
    assert_same_factors(run(net, factors, data, rows=21), run(net, factors, few))
    counted = CountedData(data)
    run(net, factors, counted)
    assert counted.passes == 2  # the first batch says how many rows there are


# -------------------------------------------------------------------------------- blocks


class Chain(nn.Module):
    """Blocks of one Linear each, called in a given order, some of them not on what the one before returned."""

    def __init__(self, order: list[int], breaks: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.order, self.breaks = order, breaks

    def forward(self, x: Tensor) -> Tensor:
        for position, index in enumerate(self.order):
            x = self.blocks[index](2 * x if position in self.breaks else x)
        return x


@pytest.mark.parametrize(
    ("order", "breaks", "expected"),
    [
        ([0, 1, 2], (), [["blocks.0", "blocks.1", "blocks.2"]]),
        ([2, 0, 1], (), [["blocks.2", "blocks.0", "blocks.1"]]),
        ([0, 1, 2], (1,), [["blocks.0"], ["blocks.1", "blocks.2"]]),
        ([0, 1, 1, 2], (), [["blocks.0"], ["blocks.2"]]),
        ([0, 2], (), [["blocks.0", "blocks.2"]]),
    ],
)
def test_blocks_in_the_order_they_run(order: list[int], breaks: tuple[int, ...], expected: list[list[str]]) -> None:
    """Whatever the order, the result is that of whole models; blocks that run twice stay as they are."""
    net, data = Chain(order, breaks), batches()
    factors = plain_factors(net)
    with torch.no_grad():
        chains, rows = segments(net, compared_blocks(net, factors, 1), data[0])
    assert (chains, rows) == (expected, 20)
    refitted = run(net, factors, data)
    flat = [f"{block}.0" for chain in chains for block in chain]
    slow = slow_refit(net, factors, data, flat, RIDGE)
    for name in factors:
        if name in flat:
            torch.testing.assert_close(refitted[name].R, slow[name].R, rtol=2e-3, atol=2e-4)
        else:
            assert torch.equal(refitted[name].R, factors[name].R)


class Routed(nn.Module):
    """A block with an expert that sees some of the tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert, self.fc = nn.Linear(8, 1), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.gate(rows)[:, 0] > 0
        rows = rows.index_add(0, chosen.nonzero()[:, 0], self.expert(rows[chosen]))
        return self.fc(rows.view_as(x))


def test_layers_that_see_other_tokens_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Routed(), nn.GELU()), nn.Sequential(Routed(), nn.GELU()))
    factors = {name: given for name, given in plain_factors(net).items() if "gate" not in name}
    refitted = run(net, factors, batches())
    changed = {name for name in factors if not torch.allclose(refitted[name].R, factors[name].R, atol=1e-5)}
    assert changed == {"0.0.fc", "1.0.fc"}


class Caching(nn.Module):
    """A block that attends to all tokens that a cache has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None) -> Tensor:
        k = self.k(hidden_states)
        if past_key_values is not None:
            k, _ = past_key_values.update(k[:, None], k[:, None], 0)
            k = k[:, 0]
        return hidden_states + self.o((hidden_states @ k.mT).softmax(-1) @ k)


class Decoder(nn.Module):
    """Blocks that share a new cache in every call, or have none."""

    def __init__(self, caches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.caches = caches
        self.layers = nn.ModuleList(Caching() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x, past_key_values=DynamicCache() if self.caches else None)
        return x


def test_caches_do_not_grow() -> None:
    """A block runs again and again: keys and values of an earlier run must not be there."""
    data = batches()
    plain, cached = Decoder(False), Decoder(True)
    factors = plain_factors(plain)
    for steps in (0, 4):
        first, second = (run(net, factors, data, steps) for net in (plain, cached))
        assert_same_factors(first, second)


def test_layers_outside_of_blocks_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8))
    factors = {
        name: plain_factors(nn.ModuleList([nn.Sequential(net.get_submodule(name))]))["0.0"]
        for name in ("0", "1.0", "2")
    }
    data = batches()
    refitted = run(net, factors, data)
    for name in ("0", "2"):
        assert torch.equal(refitted[name].R, factors[name].R) and torch.equal(refitted[name].bias, factors[name].bias)
    assert not torch.allclose(refitted["1.0"].R, factors["1.0"].R, atol=1e-5)
    assert_same_factors(run(net, {"0": factors["0"]}, data), {"0": factors["0"]})  # no block at all


@pytest.mark.parametrize("mean", [1.0, 30.0, 1000.0])
def test_inputs_that_hardly_vary_around_a_large_mean(mean: float) -> None:
    """What rounding leaves of the centered moment of a wide layer is not positive definite."""
    block = nn.Sequential(nn.Linear(256, 256))
    net = nn.Sequential(block, nn.Sequential(nn.Linear(256, 4)))
    x = 0.01 * normal(2000, 4, seed=0) @ normal(4, 256, seed=1) + mean * normal(256, seed=2)
    refitted = run(net, {"0.0": plain(block[0], 8), "1.0": plain(net[1][0], 3)}, [x.float()])
    assert all(bool(initial.R.isfinite().all()) for initial in refitted.values())


def plain(layer: nn.Linear, rank: int) -> InitialFactors:
    """Truncated SVD."""
    U, S, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    return InitialFactors(U[:, :rank].contiguous(), S[:rank, None] * V[:rank], layer.bias.detach())
