"""A dozen of the architectures through every check; `make test-models` runs all of them."""

from __future__ import annotations

import functools

import pytest
from checks import CHECKS, FORMS, Case, check
from families import FAMILIES
from torch import nn

# one of each kind that differs in what a block is, is given, or answers
DOZEN = (
    *("OPT", "Gemma2", "Mixtral", "Mamba", "Bart", "Whisper", "WavLM", "Swinv2", "Segformer", "Detr", "CLIP", "Llava"),
    "nn.TransformerEncoder",
)


GOOD = ("works", "absent")


@functools.cache
def dense(name: str) -> nn.Module:
    return FAMILIES[name].model()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DOZEN)
def test_architecture(name: str, form: str) -> None:
    case = Case(FAMILIES[name], form, dense(name))
    results = {key: check(case, key) for key in CHECKS}
    bad = {key: (result.status, result.text) for key, result in results.items() if result.status not in GOOD}
    assert not bad
    assert results["output"].status == results["step"].status == "works"
