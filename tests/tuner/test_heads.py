"""A head that was just made and does not train is named, and nothing else is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES
from peft import TaskType, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from wasi_peft import WasiConfig
from wasi_peft.tuner.heads import fresh_heads

VIT, LLAMA = ARCHITECTURES["vit"], ARCHITECTURES["llama"]


def named(model: nn.Module, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """Heads in the log of an injection."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="wasi_peft"):
        get_peft_model(model, WasiConfig(**options))
    return [record.getMessage().split()[0] for record in caplog.records if "newly initialised" in record.getMessage()]


def vit_with_head(bias: float) -> nn.Module:
    model: Any = VIT.model()
    nn.init.constant_(model.classifier.bias, bias)
    return model  # type: ignore[no-any-return]


def test_a_fresh_head_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert named(vit_with_head(0.0), caplog) == ["'classifier'"]
    assert named(vit_with_head(0.0), caplog, weight_share=0.9) == ["'classifier'"]


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["classifier"]}, {"inference_mode": True}], ids=["saved whole", "inference"]
)
def test_one_that_trains_or_need_not_is_not(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert named(vit_with_head(0.0), caplog, **options) == []


def test_one_of_a_checkpoint_is_not(caplog: pytest.LogCaptureFixture) -> None:
    assert named(vit_with_head(0.1), caplog) == []


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [
        (tf.BertForSequenceClassification, TaskType.SEQ_CLS),
        (tf.BertForTokenClassification, "TOKEN_CLS"),
        (tf.BertForQuestionAnswering, TaskType.QUESTION_ANS),
    ],
)
def test_a_task_type_trains_the_head(kind: Any, task_type: Any, caplog: pytest.LogCaptureFixture) -> None:
    bert = kind(ARCHITECTURES["bert"].model().config)
    assert named(bert, caplog, task_type=task_type) == []
    assert len(named(kind(bert.config), caplog)) == 1


def test_a_language_model_has_none(caplog: pytest.LogCaptureFixture) -> None:
    assert named(LLAMA.model(), caplog) == []


@pytest.mark.parametrize(
    ("read", "heads"),
    [(["LlamaForCausalLM"], ["'score'"]), (["LlamaForSequenceClassification"], []), (None, [])],
    ids=["language model", "classifier", "from a configuration"],
)
def test_a_classifier_without_a_bias(read: Any, heads: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForSequenceClassification(LLAMA.model().config)
    model.config.architectures = read
    assert named(model, caplog) == heads
    model = LlamaForSequenceClassification(LLAMA.model().config)
    model.config.architectures = read
    assert named(model, caplog, task_type=TaskType.SEQ_CLS) == []


def test_a_name_that_no_module_has_is_named(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any]
    for options, names in (
        ({"modules_to_save": ["classifer", "classifier"]}, ["'classifer'"]),
        ({"modules_to_save": ["vit.layernorm"]}, []),
        ({"modules_to_save": ["classifer"], "inference_mode": True}, []),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="wasi_peft"):
            get_peft_model(VIT.model(), WasiConfig(**options))
        lines = [record.getMessage() for record in caplog.records if "has that name" in record.getMessage()]
        assert [line.split()[2].rstrip(",") for line in lines] == names


def test_names_that_a_task_type_adds_need_not_be_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wasi_peft"):
        get_peft_model(ARCHITECTURES["bert"].model(), WasiConfig(task_type=TaskType.SEQ_CLS))
    assert not [record for record in caplog.records if "has that name" in record.getMessage()]


def test_a_head_without_memory_is_none() -> None:
    model: Any = vit_with_head(0.0)
    assert list(fresh_heads(model, WasiConfig())) == ["classifier"]
    model.classifier = nn.Linear(16, 3, device=torch.device("meta"))
    assert list(fresh_heads(model, WasiConfig())) == []
