"""Repair of blocks: the compressed model comes nearer to the dense one, and the dense one stays what it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from calibrating import Untouched, assert_same_factors, batches, plain_factors, wasi_factors, with_nan
from models import ARCHITECTURES, Architecture
from strategies import relative_error
from test_repair import (
    Factors,
    check_a_dtype,
    check_that_it_comes_nearer,
    check_that_padding_is_ignored,
    compressed,
    final_hidden,
)
from torch import nn

from wasi_peft import repair_blocks
from wasi_peft.factors.block_repair import token_error

VIT = ARCHITECTURES["vit"]


def run(model: nn.Module, factors: Factors, data: Any, **options: Any) -> Factors:
    """Repair without a progress bar, at a rate that suits a tiny model."""
    given = wasi_factors(factors)
    return repair_blocks(model, given, data, progress_bar=False, **{"steps": 40, **options}).initial


# -------------------------------------------------------------------------------- what it does


def test_the_compressed_model_comes_nearer_to_the_dense_one(architecture: Architecture) -> None:
    check_that_it_comes_nearer(run, architecture, samples=16, count=4, at_most=0.85)


def test_training_does_better_than_refitting_alone(architecture: Architecture) -> None:
    """On the data that it has seen, block after block."""
    model = architecture.model()
    factors, data = plain_factors(model), [architecture.batch(samples=16, seed=seed) for seed in range(4)]
    dense = torch.cat([final_hidden(model, batch).flatten(0, -2) for batch in data])
    errors = []
    for steps in (0, 80):
        repaired = compressed(model, run(model, factors, data, steps=steps))
        found = torch.cat([final_hidden(repaired, batch).flatten(0, -2) for batch in data])
        errors.append(float(token_error(found, dense, None)))
    assert errors[1] < 0.9 * errors[0]


def test_one_row_alone_will_do() -> None:
    net, data = reference.tiny_net(1), [batches()[0][:1, :1]]
    repaired = run(net, plain_factors(net), data)
    errors = [relative_error(compressed(net, each)(data[0]), net(data[0])) for each in (plain_factors(net), repaired)]
    assert errors[1] < 0.5 * errors[0]


def test_padding_is_ignored() -> None:
    check_that_padding_is_ignored(run, steps=5)


def test_token_error() -> None:
    wanted = torch.tensor([[[1.0, 3.0], [30.0, 10.0], [100.0, -100.0]]])
    hidden = wanted + torch.tensor([[[1.0, 1.0], [10.0, 20.0], [50.0, 50.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert float(token_error(hidden, wanted, mask)) == pytest.approx((2 / 10 + 500 / 1000) / 2)
    assert float(token_error(hidden[:, :2], wanted[:, :2], mask)) == pytest.approx(0.35)  # no mask of these
    assert float(token_error(hidden, wanted, None)) == pytest.approx((2 / 10 + 500 / 1000 + 1 / 4) / 3)
    assert float(token_error(wanted.bfloat16(), wanted, mask)) == 0
    assert float(token_error(torch.zeros(1, 2), torch.zeros(1, 2), None)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check_a_dtype(run, dtype, count=2)


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


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_rate_that_diverges_leaves_refitted_factors(rate: float, caplog: pytest.LogCaptureFixture) -> None:
    net, data = reference.tiny_net(3), batches()
    untouched = Untouched(net)
    result = run(net, plain_factors(net), data, rate=rate)
    untouched.check()
    assert_same_factors(result, run(net, plain_factors(net), data, steps=0))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "blocks.1: training did not lower its error" in caplog.messages[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": -1}, "steps must be at least 0 and finite, got -1"),
        ({"steps": float("inf")}, "steps must be at least 0 and finite, got inf"),
        *(
            ({name: value}, f"{name} must be positive and finite, got {value}")
            for name in ("rows", "rate", "ridge")
            for value in (0, -1, float("nan"), float("inf"))
        ),
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
    "nan": (lambda: with_nan(batches()), r"blocks\.0\.\w+: its input holds NaN or Inf on the calibration data"),
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


def test_a_dense_layer_that_answers_nan_is_named_by_the_one_that_reads_it() -> None:
    net = reference.tiny_net(5)
    factors = plain_factors(net)
    names = list(factors)
    with torch.no_grad():
        net.get_submodule(names[0]).weight[0, 0] = torch.nan
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=f"{re.escape(names[1])}: its input holds NaN or Inf"):
        run(net, factors, batches())
    untouched.check()
