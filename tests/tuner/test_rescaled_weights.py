"""Weights that model code multiplies in place: RWKV halves its layers for inference, and doubles them for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from models import LABELS, exact_config, logits, train
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import wasi_layers

FORMS: dict[str, dict[str, Any]] = {
    "factors": {},
    "int8": {"residual": "int8", "update": "addition", "residual_product": "restored"},
    "exact": {"residual": "exact", "update": "addition"},
}


@pytest.fixture
def rwkv() -> nn.Module:
    config = tf.RwkvConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=3, attention_hidden_size=16, intermediate_size=24,
        context_length=16, rescale_every=1,
    )  # fmt: skip
    model = tf.RwkvForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("form", FORMS)
def test_inference_is_that_of_the_dense_model(rwkv: nn.Module, form: str) -> None:
    dense = copy.deepcopy(rwkv)
    model = get_peft_model(rwkv, exact_config(**FORMS[form]))
    assert torch.allclose(logits(model, batch()), logits(dense, batch()), atol=0.1 if form == "int8" else 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_training_after_inference_and_merging(rwkv: nn.Module, form: str, tmp_path: Any) -> None:
    base = copy.deepcopy(rwkv)
    model = get_peft_model(rwkv, exact_config(**FORMS[form]))
    logits(model, batch())
    assert any(layer.weight_scale != 1 for _, layer in wasi_layers(model))
    train(model, batch())
    assert all(layer.weight_scale == 1 for _, layer in wasi_layers(model))
    expected = logits(model, batch())
    model.save_pretrained(tmp_path)  # while it is rescaled: files know nothing of it
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path), batch()), expected, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload(), batch()), expected, atol=1e-4)


def test_other_changes_in_place_are_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, LABELS)), WasiConfig(target_modules=["0"], weight_rank=2))
    weight = model.base_model.model[0].weight
    for change in (lambda: weight.add_(1.0), lambda: weight.mul_(torch.ones(3, 8)), lambda: nn.init.zeros_(weight)):
        with pytest.raises(AttributeError, match="would be lost"):
            change()
