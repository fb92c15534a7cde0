"""Benchmarks are imported by their plain names, as their scripts import each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from scripts import BENCHMARKS


@pytest.fixture(autouse=True)
def importable_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python benchmarks/NAME.py` does for its own imports."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tiny_llama() -> Callable[[], transformers.LlamaForCausalLM]:
    """Makes a small language model, the same each time."""

    def make() -> transformers.LlamaForCausalLM:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=500,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return make
