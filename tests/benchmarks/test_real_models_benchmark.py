"""The benchmark of real models, on a tiny one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizing import byte_tokenizer


@pytest.fixture
def module(tiny_llama: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, whose only model is tiny."""
    cases, real = importlib.import_module("real_cases"), importlib.import_module("real_models")

    def write(folder: Path) -> None:
        tiny_llama().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    tiny = cases.Real("Tiny", write, cases.WRITES, 2, 8, False, "model.layers.0.mlp.up_proj", 1e-2)
    monkeypatch.setitem(cases.MODELS, "tiny", tiny)
    monkeypatch.setattr(cases, "load_mails", lambda count: [("a b c d e f g h i j k l", 0)] * count)
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)
    return real


@pytest.mark.parametrize("tool", ["wasi-peft inspect", "residual, exact", "add_weighted_adapter", "skip_padding"])
def test_a_tool_works(tool: str, module: Any, tmp_path: Path) -> None:
    entry = module.run_cell("tiny", tool, tmp_path)
    assert entry["status"] == "works", entry["sentence"]
    assert entry["seconds"] >= 0 and entry["peak_mib"] >= 0 and entry["checks"]
    if tool == "residual, exact":
        again = module.run_cell("tiny", "a fresh process", tmp_path)  # it prepares factors, which are missing
        assert again["status"] == "works" and set(again["checks"]) == {"residual", "factors", "factors, base not read"}


def test_what_is_wrong_is_told_from_what_is_refused(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = importlib.import_module("real_tools")

    def wrong(place: Any) -> Any:
        return lambda: tools.falling([1.0, 2.0])

    for tool in (wrong, lambda place: tools.command(place, "inspect", "none.json")):
        monkeypatch.setitem(tools.TOOLS, "resize_rank", (tool, lambda model: True))
        entry = module.run_cell("tiny", "resize_rank", tmp_path)
        expected = "fails" if tool is wrong else "refused"
        assert entry["status"] == expected
        assert ("the loss goes from 1.000 to 2.000" if tool is wrong else "no such file") in entry["sentence"]


def test_the_page(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = {"status": "works", "seconds": 1.25, "peak_mib": 30.4, "checks": {}, "environment": {"threads": 1}}
    entries = {
        "tiny: wasi-peft inspect": works,
        "tiny: resize_rank": {"status": "refused", "sentence": "packed experts keep their rank."},
        "tiny: skip_padding": {"status": "fails", "sentence": "the loss goes up"},
    }
    results, page = tmp_path / "real.json", tmp_path / "real.md"
    results.write_text(json.dumps(entries))
    module.main(["--summarise", "--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert (
        "| wasi-peft inspect | 1.2 s, 30 |" in text
        and "| SubspaceSGD | not run |" in text
        and "| token_keep | - |" in text
    )
    assert "| resize_rank | refused (a) |" in text and "| skip_padding | **fails** (b) |" in text
    assert "a. Tiny, resize_rank: packed experts keep their rank." in text
    assert "Of 3 cells, 1 work, 1 are refused in a sentence, 1 fail." in text
