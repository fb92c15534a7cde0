"""The benchmark of token dropping, at a tiny size."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest


def test_a_run_with_half_of_the_patches_takes_less(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module("token_dropping")
    monkeypatch.setattr(benchmark, "load_vit", functools.partial(benchmark.load_vit, str(model_folder)))
    monkeypatch.setattr(benchmark, "SIZE", 16)
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "tokens.json"
    entries: dict[float, dict[str, Any]] = {}
    for keep in (1.0, 0.5):
        settings = {
            "keep": keep, "memory_mode": "exact", "lr": 1e-3, "train": 64, "test": 32, "epochs": 1, "threads": 1,
            "seed": 0,
        }  # fmt: skip
        entries[keep] = benchmark.run(settings)
        assert 0 <= entries[keep]["test_accuracy"] <= 1 and entries[keep]["training_processor_seconds"] > 0
    assert entries[0.5]["step_gflop"] < 0.8 * entries[1.0]["step_gflop"]
    assert entries[0.5]["step_peak_mib"] < entries[1.0]["step_peak_mib"]
    results.write_text(json.dumps({str(keep): entry for keep, entry in entries.items()}))
    rows = benchmark.summary(results).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 1", "| 0.5"]
