"""Which tokens a text of noise is made of."""

from __future__ import annotations

from typing import Any

import pytest
from models import ARCHITECTURES
from transformers import LlamaConfig

from wasi_peft.hub.cases import example_batch
from wasi_peft.models.texts import ordinary_tokens


@pytest.mark.parametrize(
    ("special", "ordinary"),
    [
        ({"pad_token_id": 0, "eos_token_id": 3}, [1, 2]),
        ({"pad_token_id": None, "eos_token_id": [0, 2]}, [1, 3]),
        ({"pad_token_id": None, "eos_token_id": None}, [0, 1, 2, 3]),
    ],
)
def test_what_pads_or_ends_a_text_is_left_out(special: dict[str, Any], ordinary: list[int]) -> None:
    assert ordinary_tokens(LlamaConfig(vocab_size=4, **special)).tolist() == ordinary


def test_there_must_be_one() -> None:
    with pytest.raises(ValueError, match="neither pads nor ends"):
        ordinary_tokens(LlamaConfig(vocab_size=2, pad_token_id=0, eos_token_id=[0, 1]))


def test_noise_does_not_end_a_text() -> None:
    model: Any = ARCHITECTURES["llama"].model()
    model.config.eos_token_id = ending = list(range(1, model.config.vocab_size - 2))
    assert not set(example_batch(model)["input_ids"].flatten().tolist()) & set(ending)
