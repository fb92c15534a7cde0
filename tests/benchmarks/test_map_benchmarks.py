"""Benchmarks of padding, maps and convolutions, on small models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def test_padding(tmp_path: Path) -> None:
    module, results = importlib.import_module("padding"), tmp_path / "padding.json"
    content = module.main(["--layers", "1", "--rounds", "0", "--results", str(results)])
    assert content == json.loads(results.read_text())
    assert 0.4 < content["real_share"] < 0.6
    for mode in ("full", "exact", "fast", "small"):
        padded, skipped = content["rows"][mode], content["rows"][module.SKIPPING.format(mode)]
        assert skipped["peak_bytes"] < padded["peak_bytes"]
        assert skipped["training_flops"] < 0.8 * padded["training_flops"]


def test_swin(tmp_path: Path) -> None:
    module, results = importlib.import_module("swin"), tmp_path / "swin.json"
    small = ["--image-size", "64", "--depths", "1", "1", "1", "1", "--batch", "2"]
    content = module.main([*small, "--results", str(results)])
    assert content == json.loads(results.read_text())
    step = content["step"]
    assert step["features, height, width"]["saved_bytes"] < step["features"]["saved_bytes"]
    assert step["features"]["saved_bytes"] < step["inputs exact"]["saved_bytes"]
    assert step["features, height, width"]["state_bytes"] < step["features, tokens"]["state_bytes"]


def test_the_accounting_of_the_paper_on_swin_t() -> None:
    module = importlib.import_module("swin")
    rows = module.paper({})
    assert rows["dense"]["weight_bytes"] / module.MIB == pytest.approx(65.8, abs=0.1)
    assert rows["dense"]["input_bytes"] / module.MIB == pytest.approx(3491, abs=1)
    assert rows["smallest ranks, map"]["ratio"] == pytest.approx(62, abs=1)


def test_convolutions(tmp_path: Path) -> None:
    module, results = importlib.import_module("convolutions"), tmp_path / "convolutions.json"
    content = module.main(["--batch", "1", "--image-size", "64", "--results", str(results)])
    rows = content["rows"]
    assert content == json.loads(results.read_text())
    assert rows["factors"]["weights_bytes"] < 0.6 * rows["dense"]["weights_bytes"]
    assert rows["factors"]["training_flops"] < 0.5 * rows["dense"]["training_flops"]
