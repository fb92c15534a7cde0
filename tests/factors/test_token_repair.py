"""Repair by tokens: the compressed model predicts more like the dense one, and the dense one stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from calibrating import Untouched, assert_same_factors, plain_factors, wasi_factors
from models import ARCHITECTURES, Architecture
from strategies import orthonormality_error, relative_error
from test_repair import Factors, compressed
from torch import Tensor, nn

from wasi_peft import repair_tokens
from wasi_peft.factors import token_repair
from wasi_peft.factors.token_repair import TokenDivergence
from wasi_peft.models.structure import vocabulary_head
from wasi_peft.updates.base import InitialFactors

LLAMA = ARCHITECTURES["llama"]
WRITERS = [each for each in ARCHITECTURES.values() if vocabulary_head(each.model()) is not None]


def run(model: nn.Module, factors: Factors, data: Any, **options: Any) -> Factors:
    """Repair without a progress bar, at a rate that suits a tiny model."""
    given = wasi_factors(factors)
    return repair_tokens(model, given, data, progress_bar=False, **{"steps": 40, "rate": 2e-2, **options}).initial


def training_data(architecture: Architecture) -> list[dict[str, Tensor]]:
    return [architecture.batch(samples=16, seed=seed) for seed in range(4)]


@torch.no_grad()
def divergence(dense: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """KL divergence of what two models predict, from all their logits."""
    p, q = (F.log_softmax(model.eval()(**batch).logits.double(), -1).flatten(0, -2) for model in (dense, other))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


# -------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_divergence_and_gradient_are_those_of_all_logits(chunk_rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, wanted = torch.randn(2, 10, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    bias = torch.randn(50, dtype=torch.float64, generator=generator) if with_bias else None
    hidden.requires_grad_()

    log_q, log_p = (F.log_softmax(F.linear(x, weight, bias), -1) for x in (hidden, wanted))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (expected_gradient,) = torch.autograd.grad(3 * expected, hidden)
    found = TokenDivergence.apply(hidden, wanted, weight, bias, chunk_rows)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    assert abs(float((found - expected).detach())) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-12
    assert torch.autograd.gradcheck(lambda x: TokenDivergence.apply(x, wanted, weight, bias, chunk_rows), hidden)


def test_equal_states_do_not_diverge() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = TokenDivergence.apply(hidden, hidden.detach().clone(), torch.randn(9, 4), None, 2)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6 and hidden.grad is not None and float(hidden.grad.abs().max()) < 1e-6


# -------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("architecture", WRITERS, ids=lambda each: each.name)
def test_the_compressed_model_predicts_more_like_the_dense_one(architecture: Architecture) -> None:
    """On data that repair has not seen; and nothing else changes."""
    model = architecture.model()
    factors, untouched = plain_factors(model), Untouched(model)
    given, unseen = copy.deepcopy(factors), architecture.batch(samples=32, seed=99)
    repaired = run(model, factors, training_data(architecture))
    untouched.check()
    assert_same_factors(factors, given)
    before, after = (divergence(model, compressed(model, each), unseen) for each in (factors, repaired))
    assert after < 0.7 * before
    assert repaired.keys() == factors.keys()
    for name, initial in repaired.items():
        assert (initial.L.shape, initial.R.shape) == (factors[name].L.shape, factors[name].R.shape)
        assert orthonormality_error(initial.L) < 1e-5
        assert (initial.bias is None) == (factors[name].bias is None)


def test_in_bfloat16() -> None:
    """Most steps are smaller than what rounding drops."""
    model = LLAMA.model().to(torch.bfloat16)
    factors, unseen = plain_factors(model), LLAMA.batch(samples=32, seed=99)
    repaired = run(model, factors, training_data(LLAMA), rate=2e-3)
    before, after = (divergence(model, compressed(model, each), unseen) for each in (factors, repaired))
    assert after < 0.9 * before
    assert all(initial.L.dtype == initial.R.dtype == torch.bfloat16 for initial in repaired.values())


def test_padding_is_ignored() -> None:
    """Whatever stands behind the mask changes nothing."""
    model, batch = LLAMA.model(), LLAMA.batch(samples=6)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:3, 4:] = 0
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    factors = plain_factors(model)
    first, second = (run(model, factors, [each], steps=5) for each in (batch, other))
    for name in factors:
        assert relative_error(first[name].L @ first[name].R, second[name].L @ second[name].R) < 1e-4
        assert relative_error(first[name].L @ first[name].R, factors[name].L @ factors[name].R) > 1e-3


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.model()
    factors, data = plain_factors(model), training_data(LLAMA)
    whole = run(model, factors, data, steps=3)
    monkeypatch.setattr(token_repair, "default_chunk_rows", lambda vocabulary: 5)
    chunked = run(model, factors, data, steps=3)
    for name in factors:
        assert relative_error(chunked[name].L @ chunked[name].R, whole[name].L @ whole[name].R) < 1e-4


def test_labels_are_not_read_and_the_global_generator_is_not_used() -> None:
    model, data = LLAMA.model(), training_data(LLAMA)
    first = run(model, plain_factors(model), data, steps=6)
    torch.manual_seed(5)
    other = [{**batch, "labels": torch.zeros_like(batch["input_ids"])} for batch in data]
    assert_same_factors(first, run(model, plain_factors(model), other, steps=6))


def test_only_as_many_batches_as_hold_the_rows() -> None:
    model, data = LLAMA.model(), training_data(LLAMA)
    rows = data[0]["input_ids"].numel()
    first = run(model, plain_factors(model), data[:2], steps=4)
    assert_same_factors(first, run(model, plain_factors(model), data, steps=4, rows=rows + 1))


def test_a_head_that_is_a_target_keeps_its_factors() -> None:
    model = LLAMA.model()
    factors = plain_factors(model)
    head = torch.linalg.qr(torch.randn(model.lm_head.weight.shape[0], 3))[0]
    factors["lm_head"] = reference_factors(head, model.lm_head.weight)
    repaired = run(model, factors, training_data(LLAMA), steps=3)
    assert_same_factors({"lm_head": repaired["lm_head"]}, {"lm_head": factors["lm_head"]})
    name = next(iter(factors))
    assert relative_error(repaired[name].L @ repaired[name].R, factors[name].L @ factors[name].R) > 1e-3


def reference_factors(L: Tensor, weight: Tensor) -> Any:
    """Factors with a given L."""
    return InitialFactors(L, L.T @ weight.detach(), None)


# -------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(("rate", "rank"), [(1e30, 5), (1e-2, 100)], ids=["infinite", "nothing to repair"])
def test_what_lowers_nothing_gives_the_factors_back(rate: float, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.model()
    factors, untouched = plain_factors(model, rank), Untouched(model)
    given = copy.deepcopy(factors)
    result = run(model, factors, training_data(LLAMA), rate=rate)
    untouched.check()
    assert_same_factors(result, given)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "repair did not lower the divergence" in record.message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps must be positive and finite, got 0"),
        ({"rows": 0}, "rows must be positive and finite, got 0"),
        ({"rate": float("nan")}, "rate must be positive and finite, got nan"),
    ],
)
def test_bad_arguments(option: dict[str, Any], message: str) -> None:
    model = LLAMA.model()
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=message):
        run(model, plain_factors(model), training_data(LLAMA), **option)
    untouched.check()


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: [], "at least one batch, got none"),
    "iterator": (lambda: iter(training_data(LLAMA)), "got an iterator"),
    "function": (lambda: lambda: None, "repair needs batches, got a function"),
    "labels only": (lambda: [{"labels": torch.zeros(4)}], "must hold model inputs"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str) -> None:
    make, message = BAD_DATA[case]
    model = LLAMA.model()
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=message):
        run(model, plain_factors(model), make())
    untouched.check()


def test_a_dense_model_that_answers_nan() -> None:
    model = LLAMA.model()
    factors = plain_factors(model)
    model.get_input_embeddings().weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="the dense model answers NaN or Inf on the calibration data"):
        run(model, factors, [{"input_ids": torch.full((2, 5), 3)}])


def test_a_model_without_a_vocabulary() -> None:
    net = reference.tiny_net(1)
    with pytest.raises(ValueError, match="needs a model that ends in a linear layer over a vocabulary, got"):
        run(net, plain_factors(net), [torch.randn(2, 8)])


def test_a_model_that_does_not_run_its_head() -> None:
    model = LLAMA.model()
    factors = plain_factors(model)
    model.forward = model.model.forward
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run its head on a calibration batch"):
        run(model, factors, training_data(LLAMA))
