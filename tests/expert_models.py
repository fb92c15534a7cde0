"""Tiny mixtures of experts of five families, built from their configurations, with weights of a trained one's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 23
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _mixtral() -> nn.Module:
    config = tf.MixtralConfig(**_SIZES, num_key_value_heads=2, intermediate_size=16, num_local_experts=4)
    return tf.MixtralForCausalLM(config)


def _olmoe() -> nn.Module:
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(**_SIZES, intermediate_size=12, num_experts=4, num_experts_per_tok=2))


def _qwen3_moe() -> nn.Module:
    experts = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    config = tf.Qwen3MoeConfig(**_SIZES, head_dim=8, num_key_value_heads=2, intermediate_size=12, **experts)
    return tf.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layers = {"layer_types": ["full_attention"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = tf.GptOssConfig(**_SIZES, head_dim=8, num_key_value_heads=2, intermediate_size=12, **experts, **layers)
    return tf.GptOssForCausalLM(config)


def _llama4() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [0], "attention_chunk_size": 16}
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 12, "intermediate_size_mlp": 12}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**_SIZES, **sizes, **experts))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}


def experts_model(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose router tells tokens apart: matrices have entries that keep the size of what they multiply."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif "bias" in name or "sinks" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def run_by(model: nn.Module, implementation: str) -> None:
    """Have transformers run experts in one of its ways; Llama 4 has but one."""
    if implementation != "eager":
        model.set_experts_implementation(implementation)
    elif "llama4" not in type(model).__module__:
        model.set_experts_implementation("eager")


def packed_names(model: nn.Module) -> list[str]:
    """Names of the 3-D parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def tokens(samples: int = 3, length: int = 7) -> Tensor:
    """Token ids without those that mean something."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))
