"""The benchmark of loading, at a tiny size."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("form", ["dense", "8 bits", "factors, 0.40"])
def test_what_is_loaded_answers_as_what_was_saved(
    form: str, tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = importlib.import_module("loading")
    monkeypatch.setattr(loading, "dense_model", lambda name: tiny_llama().eval())
    batch = loading.batch("SmolLM2-135M")["input_ids"] % 500
    monkeypatch.setattr(loading, "batch", lambda name: {"input_ids": batch})
    loading.write("SmolLM2-135M", form, tmp_path / "model")
    found = loading.load("SmolLM2-135M", tmp_path / "model")
    assert found["difference"] < 1e-5 and found["seconds"] > 0
    assert found["peak_with_answer_mib"] > 0  # of a model this small, loading is noise
    entries = {form: {"bytes": 2**20, "loads": {key: [value] for key, value in found.items()}}}
    assert f"| {form} | 1.0 | " in loading.table(entries)
