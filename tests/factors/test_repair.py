"""Repair: the compressed model comes nearer to the dense one, and the dense one stays what it was."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from calibrating import CountedData, Untouched, assert_same_factors, batches, plain_factors, wasi_factors, with_nan
from models import ARCHITECTURES, Architecture
from strategies import orthonormality_error, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, repair_factors
from wasi_peft.factors.model_repair import _mean_of_finite, compared_blocks
from wasi_peft.factors.model_repair import relative_error as block_error
from wasi_peft.linalg.spectra import truncate, weight_spectrum
from wasi_peft.models.calls import features_of
from wasi_peft.tuner.targets import default_target_names
from wasi_peft.updates.base import InitialFactors

VIT = ARCHITECTURES["vit"]
Factors = dict[str, InitialFactors]


def run(model: nn.Module, factors: Factors, data: Any, **options: Any) -> Factors:
    """Repair without a progress bar, at a rate that suits a tiny model."""
    given = wasi_factors(factors)
    return repair_factors(model, given, data, progress_bar=False, **{"steps": 40, "lr": 3e-3, **options}).initial


def compressed(model: nn.Module, factors: Factors) -> nn.Module:
    """The model with its targets multiplied out, without the package's layers."""
    model = copy.deepcopy(model).eval()
    for name, initial in factors.items():
        module = model.get_submodule(name)
        weight = initial.L @ initial.R
        module.weight.data = weight if isinstance(module, nn.Linear) else weight.T
        if initial.bias is not None:
            module.bias.data = initial.bias
    return model


@torch.no_grad()
def final_hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the last block of the model answers."""
    found: list[Tensor] = []
    block = compared_blocks(model, sorted(default_target_names(model, WasiConfig(residual=None))), 1)[-1]
    handle = model.get_submodule(block).register_forward_hook(lambda *args: found.append(features_of(args[-1])))
    model.eval()(**batch)
    handle.remove()
    return found[0].double()


# -------------------------------------------------------------------------------- what every repair does


def check_that_it_comes_nearer(
    repair: Callable[..., Factors], architecture: Architecture, samples: int, count: int, at_most: float
) -> None:
    """On data that repair has not seen; and nothing else changes."""
    model = architecture.model()
    factors = plain_factors(model)
    given = copy.deepcopy(factors)
    data = [architecture.batch(samples=samples, seed=seed) for seed in range(count)]
    unseen = architecture.batch(samples=32, seed=99)
    untouched = Untouched(model)
    repaired = repair(model, factors, data)
    untouched.check()
    assert_same_factors(factors, given)

    dense = final_hidden(model, unseen)
    before, after = (
        relative_error(final_hidden(compressed(model, each), unseen), dense) for each in (factors, repaired)
    )
    assert after < at_most * before
    assert repaired.keys() == factors.keys()
    for name, initial in repaired.items():
        old = factors[name]
        assert (initial.L.shape, initial.R.shape) == (old.L.shape, old.R.shape)
        assert orthonormality_error(initial.L) < 1e-5
        assert (initial.bias is None) == (old.bias is None)
        parts = (initial.L, initial.R, initial.bias)
        assert not any(part.requires_grad for part in parts if part is not None)


def check_that_padding_is_ignored(repair: Callable[..., Factors], **options: Any) -> None:
    """Whatever stands behind the mask changes nothing."""
    architecture = ARCHITECTURES["bert"]
    model, batch = architecture.model(), architecture.batch(samples=6)
    batch["attention_mask"][:3, 4:] = 0
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    factors = plain_factors(model)
    first, second = (repair(model, factors, [each], **options) for each in (batch, other))
    for name in factors:
        assert relative_error(first[name].L @ first[name].R, second[name].L @ second[name].R) < 1e-4


def check_a_dtype(repair: Callable[..., Factors], dtype: torch.dtype, count: int, **options: Any) -> None:
    """In bfloat16 most steps are smaller than what rounding drops."""
    model = VIT.model().to(dtype)
    factors = plain_factors(model, 8)
    data = [VIT.batch(16, seed, dtype) for seed in range(count)]
    repaired = repair(model, factors, data, **options)
    unseen = VIT.batch(32, 99, dtype)
    dense = final_hidden(model, unseen)
    errors = [relative_error(final_hidden(compressed(model, each), unseen), dense) for each in (factors, repaired)]
    assert errors[1] < 0.9 * errors[0]
    assert all(initial.L.dtype == initial.R.dtype == dtype for initial in repaired.values())


# -------------------------------------------------------------------------------- what it does


def test_the_compressed_model_comes_nearer_to_the_dense_one(architecture: Architecture) -> None:
    check_that_it_comes_nearer(run, architecture, samples=16, count=4, at_most=0.85)


def test_the_loss_falls_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = VIT.model()
    with caplog.at_level(logging.INFO, "wasi_peft.factors.descent"):
        run(model, plain_factors(model), [VIT.batch(16)])
    numbers = re.findall(r"\d+\.\d+", caplog.messages[0])
    assert len(numbers) == 2 and float(numbers[1]) < 0.7 * float(numbers[0])


def test_a_model_without_blocks_is_compared_by_its_features() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    weight = net[0].weight.detach()
    L, R = truncate(weight, weight_spectrum(weight), 3)
    factors = {"0": InitialFactors(L.float(), R.float(), net[0].bias.detach())}
    data = [x.flatten(0, 1) for x in batches()]
    repaired = run(net, factors, data)
    errors = [relative_error(compressed(net, each)(data[0]), net(data[0])) for each in (factors, repaired)]
    assert errors[1] < 0.7 * errors[0]


def test_one_row_alone_is_compared_too() -> None:
    """It has no variance to be measured by."""
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    weight = net[0].weight.detach()
    L, R = truncate(weight, weight_spectrum(weight), 3)
    factors = {"0": InitialFactors(L.float(), R.float(), net[0].bias.detach())}
    data = [batches()[0][0, :1]]
    repaired = run(net, factors, data)
    errors = [relative_error(compressed(net, each)(data[0]), net(data[0])) for each in (factors, repaired)]
    assert errors[1] < 0.5 * errors[0]


def test_padding_is_ignored() -> None:
    check_that_padding_is_ignored(run, steps=5)


def test_relative_error() -> None:
    wanted = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [100.0, -100.0]]])
    hidden = wanted + torch.tensor([[[1.0, 1.0], [1.0, 1.0], [50.0, 50.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert float(block_error(hidden, wanted, mask)) == pytest.approx(1.0)  # error 1, variance 1
    assert float(block_error(hidden[:, :2], wanted[:, :2], mask)) == pytest.approx(1.0)
    assert float(block_error(hidden, wanted, None)) == pytest.approx(
        float((hidden - wanted).square().mean() / (wanted - wanted.mean(1)).square().mean())
    )
    assert float(block_error(wanted.bfloat16(), wanted, mask)) == 0


@pytest.mark.parametrize(
    ("name", "every", "expected"),
    [
        ("gpt2", 1, ["transformer.h.0", "transformer.h.1"]),
        ("gpt2", 2, ["transformer.h.1"]),
        ("t5", 3, ["encoder.block.1", "decoder.block.0"]),
        ("swin", 1, ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0"]),
    ],
)
def test_compared_blocks(name: str, every: int, expected: list[str]) -> None:
    model = ARCHITECTURES[name].model()
    layers = [
        each
        for each, module in model.named_modules()
        if each in default_target_names(model, WasiConfig(residual=None))
    ]
    assert compared_blocks(model, layers, every) == expected
    assert compared_blocks(model, ["classifier"], every) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check_a_dtype(run, dtype, count=2, lr=2e-4)


def test_data_are_gone_through_as_often_as_the_steps_need() -> None:
    net = reference.tiny_net(1)
    data = CountedData(batches(3))
    run(net, plain_factors(net), data, steps=7)
    assert data.passes == 1 + 3  # one for the batches on which repair is judged
    data.passes = 0
    run(net, plain_factors(net), data, steps=4, max_batches=1)
    assert data.passes == 1 + 4


def test_the_same_data_give_the_same_factors() -> None:
    net, data = reference.tiny_net(2), batches()
    first = run(net, plain_factors(net), data, steps=6)
    torch.manual_seed(5)
    assert_same_factors(first, run(net, plain_factors(net), data, steps=6))


def test_labels_are_not_read_and_tuples_will_do() -> None:
    net, data = reference.tiny_net(2), batches()
    first = run(net, plain_factors(net), data, steps=3)
    assert_same_factors(first, run(net, plain_factors(net), [(x, None) for x in data], steps=3))
    assert_same_factors(first, run(net, plain_factors(net), [{"x": x, "labels": 1} for x in data], steps=3))


# -------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_rate_that_diverges_gives_the_factors_back(lr: float, caplog: pytest.LogCaptureFixture) -> None:
    net = reference.tiny_net(3)
    factors, untouched = plain_factors(net), Untouched(net)
    given = copy.deepcopy(factors)
    result = run(net, factors, batches(), lr=lr)
    untouched.check()
    assert_same_factors(result, given)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "repair did not lower" in caplog.messages[0]


def test_factors_that_lost_nothing_are_not_made_worse(caplog: pytest.LogCaptureFixture) -> None:
    """The first step does the harm and later ones make good for most of it, so a mean over the first ones misleads."""
    net = reference.tiny_net(3)
    factors = plain_factors(net, 8)
    result = run(net, factors, batches(), steps=16)
    assert_same_factors(result, factors)
    assert "repair did not lower" in caplog.messages[0]


def test_what_the_dense_model_answers_behind_the_mask_does_not_matter() -> None:
    """It may be NaN, as where a row has nothing to attend to."""
    model, batch = ARCHITECTURES["bert"].model(), ARCHITECTURES["bert"].batch(samples=6)
    batch["attention_mask"][:3, 4:] = 0
    padded = ~batch["attention_mask"].bool()
    block = model.get_submodule(compared_blocks(model, plain_factors(model), 3)[-1])
    block.register_forward_hook(lambda _, args, out: _with_padding(out, padded))
    factors = plain_factors(model)
    repaired = run(model, factors, [batch])
    assert any(not torch.equal(repaired[name].L, factors[name].L) for name in factors)


def _with_padding(out: Any, padded: Tensor) -> Any:
    hidden = out[0] if isinstance(out, tuple) else out
    hidden = hidden.masked_fill(padded[..., None], torch.nan)
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def test_losses_that_were_not_finite_do_not_count() -> None:
    assert _mean_of_finite(torch.tensor([1.0, torch.nan, 3.0, torch.inf])) == 2
    assert _mean_of_finite(torch.tensor([torch.nan])) == float("inf")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps must be positive and finite, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"every": -1}, "every must be positive and finite, got -1"),
        ({"max_batches": 0}, "max_batches must be at least 1, got 0"),
    ],
)
def test_bad_arguments(option: dict[str, Any], message: str) -> None:
    net = reference.tiny_net(4)
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=message):
        run(net, plain_factors(net), batches(), **option)
    untouched.check()


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: [], "at least one batch, got none"),
    "iterator": (lambda: iter(batches()), "got an iterator"),
    "function": (lambda: lambda: None, "repair needs batches, got a function"),
    "nan": (lambda: with_nan(batches()), "the dense model answers NaN or Inf on the calibration data"),
    "labels only": (lambda: [{"labels": torch.zeros(4)}], "must hold model inputs"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str) -> None:
    make, message = BAD_DATA[case]
    net = reference.tiny_net(5)
    factors, untouched = plain_factors(net), Untouched(net)
    given = copy.deepcopy(factors)
    with pytest.raises(ValueError, match=message):
        run(net, factors, make())
    untouched.check()
    assert_same_factors(factors, given)
