"""The benchmark of supervised fine-tuning and preferences, at a tiny size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizing import byte_llama, byte_tokenizer


@pytest.mark.parametrize("method", ["lora checkpointing", "residual vocabulary small"])
def test_preferences_start_where_fine_tuning_has_ended(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    benchmark: Any = importlib.import_module("sft_then_dpo")
    folder = tmp_path / "llama"
    byte_llama(initializer_range=0.2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    mails = [(f"mail {index} " + chr(97 + index) * 60, 0) for index in range(24)]
    monkeypatch.setattr(benchmark, "smollm2_folder", lambda: folder)
    monkeypatch.setattr(benchmark, "load_mails", lambda count: mails)
    monkeypatch.setattr(benchmark, "PROMPT", 12)
    monkeypatch.setattr(benchmark, "ANSWER", 10)
    settings = {
        "method": method, "sft_lr": 3e-3, "dpo_lr": 5e-3, "sft_steps": 10, "dpo_steps": 6, "batch_size": 4,
        "samples": 8, "held_out": 4, "seed": 0, "threads": 1,
    }  # fmt: skip
    entry = benchmark.run(settings)
    assert entry["held_out_loss"] < entry["held_out_loss_before"]
    assert entry["margin_at_step_0"] == 0 and len(entry["margins"]) == 6
    assert entry["margins"][-1] > 0 and 0 <= entry["held_out_dpo_accuracies"] <= 1
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"run": entry}))
    assert benchmark.summary(results).splitlines()[-1].startswith(f"| {method} | ")
    with pytest.raises(ValueError, match="32 mails of 32 tokens are needed, got 24"):
        benchmark.texts(byte_tokenizer(), 8, 8)
