"""Where features come to be: at the base model, or at an inner module that a head calls past it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, Architecture
from torch import Tensor, nn

from wasi_peft.models.calls import evaluating, features_of, model_output
from wasi_peft.models.features import watched_features

SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def features_in(model: nn.Module, batch: Any, runs: int = 1) -> list[Tensor]:
    features: list[Tensor] = []
    with evaluating(model, gradients=True), watched_features(model, features.append):
        for _ in range(runs):
            model_output(model, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return features


def test_those_of_the_base_model(architecture: Architecture) -> None:
    model, batch = architecture.model().eval(), architecture.batch()
    (features,) = features_in(model, batch)
    base = getattr(model, "base_model", model)
    torch.testing.assert_close(features, features_of(model_output(base, batch)))


def test_those_of_a_decoder_that_is_called_past_the_base_model() -> None:
    config = tf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16)
    model = tf.OPTForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(23, (2, 5))}
    features = features_in(model, batch, runs=2)
    expected = model.model.decoder(**batch).last_hidden_state
    assert len(features) == 2 and all(torch.equal(each, expected) for each in features)


class Inner(nn.Module):
    """A base model that its head does not call as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("never called")


class Past(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model, self.head = Inner(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.base_model.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def test_the_models_own_answer_where_no_module_around_the_blocks_runs() -> None:
    model, x = Past(), torch.randn(3, 8)
    (features,) = features_in(model, x)
    assert torch.equal(features, model(x))


def test_hooks_go_with_an_error() -> None:
    model = ARCHITECTURES["vit"].model()
    with pytest.raises(ZeroDivisionError), watched_features(model, lambda features: None):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
