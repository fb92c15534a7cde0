"""Benchmarks of padding, maps and convolutions, on small models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def test_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = importlib.import_module("padding"), tmp_path / "padding.json"
    monkeypatch.setattr(module, "MINILM", {**module.MINILM, "hidden_size": 96, "intermediate_size": 384})
    monkeypatch.setattr(module, "VOCABULARY", 100)
    monkeypatch.setattr(module, "MEMORY_MODES", [])
    content = module.main(["--layers", "1", "--results", str(results)])
    assert content == json.loads(results.read_text())
    assert 0.4 < content["real_share"] < 0.6
    padded, skipped = content["rows"]["full"], content["rows"][module.SKIPPING.format("full")]
    assert skipped["peak_bytes"] < padded["peak_bytes"]
    assert skipped["training_flops"] < 0.8 * padded["training_flops"]


def test_swin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = importlib.import_module("swin"), tmp_path / "swin.json"
    monkeypatch.setattr(module, "BASELINES", ())
    monkeypatch.delitem(module.COMPRESSED, "inputs exact")
    small = ["--depths", "1", "1", "1", "1", "--batch", "2"]
    content = module.main([*small, "--results", str(results)])
    assert content == json.loads(results.read_text())
    step = content["step"]
    assert step["features, height, width"]["saved_bytes"] < step["features"]["saved_bytes"]
    assert step["features, height, width"]["state_bytes"] < step["features, tokens"]["state_bytes"]


def test_the_accounting_of_the_paper_on_swin_t() -> None:
    module = importlib.import_module("swin")
    rows = module.paper({})
    assert rows["dense"]["weight_bytes"] / module.MIB == pytest.approx(65.8, abs=0.1)
    assert rows["dense"]["input_bytes"] / module.MIB == pytest.approx(3491, abs=1)
    assert rows["smallest ranks, map"]["ratio"] == pytest.approx(62, abs=1)


def test_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = importlib.import_module("convolutions"), tmp_path / "convolutions.json"
    monkeypatch.setattr(module, "RESNET18", {**module.RESNET18, "depths": [1, 1, 1, 1]})
    monkeypatch.setattr(module, "OPTIONS", {name: module.OPTIONS[name] for name in ("dense", "factors")})
    content = module.main(["--batch", "1", "--image-size", "64", "--results", str(results)])
    rows = content["rows"]
    assert content == json.loads(results.read_text())
    assert rows["factors"]["weights_bytes"] < 0.6 * rows["dense"]["weights_bytes"]
    assert rows["factors"]["training_flops"] < 0.5 * rows["dense"]["training_flops"]
