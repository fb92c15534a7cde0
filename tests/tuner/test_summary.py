"""The summary of an injected adapter."""

from __future__ import annotations

import logging

import pytest
from models import ARCHITECTURES, Architecture, wasi_model
from peft import get_peft_model

from wasi_peft import WasiConfig, wasi_summary
from wasi_peft.forms.dense import dense_weight
from wasi_peft.tuner.model import WasiModel


def test_counts_equal_the_tensors(architecture: Architecture) -> None:
    model = architecture.model()
    dense = {name: dense_weight(model.get_submodule(name)).shape for name in architecture.targets(model)}
    peft_model = wasi_model(model, weight_rank=3)
    summary = wasi_summary(peft_model)
    assert {layer.name: (layer.out_features, layer.in_features) for layer in summary.layers} == dense
    factors = [p for n, p in peft_model.named_parameters() if n.endswith((".wasi_L", ".wasi_R"))]
    assert sum(layer.stored_elements for layer in summary.layers) == sum(p.numel() for p in factors)
    dense_total = sum(shape.numel() for shape in dense.values())
    assert summary.kept_share == pytest.approx(sum(p.numel() for p in factors) / dense_total)


def test_break_even_is_told_by_the_real_sizes(architecture: Architecture) -> None:
    full = wasi_summary(wasi_model(architecture.model()))
    assert full.past_break_even == full.layers  # factors of full rank are always larger
    small = wasi_summary(wasi_model(architecture.model(), weight_rank=2))
    assert small.past_break_even == ()
    for layer in (*full.layers, *small.layers):
        assert layer.past_break_even == (layer.stored_elements >= layer.dense_elements)


@pytest.mark.parametrize(("residual", "words"), [("exact", "exact weights,"), ("int4", "weights in int4,")])
def test_the_frozen_weights_are_named(residual: str, words: str) -> None:
    model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(residual=residual))
    assert f"beside {words}" in wasi_summary(model).headline()


def test_text() -> None:
    peft_model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=2, rank_pattern={"fc1": 12})
    summary = wasi_summary(peft_model)
    assert "12 layers, rank 2 to 12 (median 2)" in summary.headline()
    assert "2 layers are past break-even" in summary.headline()
    lines = str(summary).splitlines()
    assert lines[-1] == summary.headline()
    assert [("costs more than dense" in line) for line in lines[1:-1]] == [
        layer.name.endswith("fc1") for layer in summary.layers
    ]
    assert len(lines) == 2 + len(summary.layers)


@pytest.mark.parametrize("name", ["bert", "llama"])  # names of the latter begin with "model." themselves
def test_reachable_from_the_peft_model_and_from_a_native_one(name: str) -> None:
    architecture = ARCHITECTURES[name]
    peft_model = wasi_model(architecture.model(), weight_rank=4)
    assert isinstance(peft_model.base_model, WasiModel)
    assert peft_model.wasi_summary() == wasi_summary(peft_model) == wasi_summary(peft_model.get_base_model())


def test_unknown_adapter() -> None:
    peft_model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=4)
    with pytest.raises(ValueError, match="no WASI adapter named 'other'"):
        wasi_summary(peft_model, "other")
    with pytest.raises(ValueError, match="no WASI adapter named 'default'"):
        wasi_summary(ARCHITECTURES["vit"].model())


@pytest.mark.parametrize(("rank", "level"), [(2, logging.INFO), (16, logging.WARNING)])
def test_log_lines_at_injection(caplog: pytest.LogCaptureFixture, rank: int, level: int) -> None:
    with caplog.at_level(logging.INFO, logger="wasi_peft"):
        wasi_model(ARCHITECTURES["vit"].model(), weight_rank=rank)
    record, dense = [r for r in caplog.records if r.name.startswith("wasi_peft")]
    assert record.levelno == level
    assert "12 layers" in record.getMessage()
    assert "of the model's weights stay dense" in dense.getMessage()
