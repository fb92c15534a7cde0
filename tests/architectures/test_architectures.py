"""A dozen of the architectures through every check; `make test-models` runs all of them."""

from __future__ import annotations

import functools

import pytest
from checks import CHECKS, Case, check
from families import FAMILIES
from torch import nn

# one of each kind that differs in what a block is, is given, or answers
DOZEN = (
    *("OPT", "Gemma2", "Mixtral", "RecurrentGemma", "Bart", "Wav2Vec2", "LayoutLMv3", "Swinv2", "Segformer", "CLIP"),
    *("Llava", "nn.TransformerEncoder"),
)
CASES = [(name, form) for name in DOZEN for form in ("int8", "factors")] + [("Bart", "exact"), ("Swinv2", "exact")]
WITHOUT_DATA = {"Mixtral": "estimate"}  # torch knows no shape of a grouped product in float32


@functools.cache
def dense(name: str) -> nn.Module:
    return FAMILIES[name].model()


@pytest.mark.parametrize(("name", "form"), CASES)
def test_architecture(name: str, form: str) -> None:
    """Everything works, or is refused in a sentence."""
    case = Case(FAMILIES[name], form, dense(name))
    results = {key: check(case, key) for key in CHECKS if key != WITHOUT_DATA.get(name)}
    assert not {key: (result.text, result.trace) for key, result in results.items() if result.status == "fails"}
    refused = {key for key, result in results.items() if result.status == "refused"}
    assert refused <= {"prepare", "estimate"}
