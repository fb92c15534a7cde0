"""Any configuration of transformers made tiny, models built from it, and batches for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Batch = Any  # a mapping of arguments, or a tensor
MakeBatch = Callable[[int, torch.Generator], Batch]

LABELS = 3
VOCABULARY = 99
LENGTH = 12
IMAGE = 32
PATCH = 8
IMAGE_TOKEN = 98

# sizes by the names that configurations have for them
_SIZES: list[tuple[int, str]] = [
    (32, "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim embed_dim n_inner_dim width"),
    (
        48,
        "intermediate_size ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim mlp_dim "
        "dim_feedforward intermediate_size_mlp feed_forward_hidden_size encoder_feedforward_dim",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads num_attn_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads encoder_num_attention_heads decoder_num_attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts num_experts_per_layer",
    ),
    (
        2,
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers layers depth "
        "num_key_value_heads encoder_num_hidden_layers decoder_num_hidden_layers num_encoder_layers "
        "num_experts_per_tok num_experts_per_token moe_top_k moe_k top_k_experts",
    ),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers type_vocab_size_min"),
    (
        8,
        "head_dim d_kv attention_head_size sliding_window attention_window local_attention_window qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim rope_dim",
    ),
    (
        16,
        "moe_intermediate_size projection_dim proj_dim kv_lora_rank q_lora_rank state_size mamba_d_state "
        "num_conv_pos_embeddings num_mel_bins classifier_proj_size",
    ),
    (24, "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (
        64,
        "max_position_embeddings n_positions max_source_positions max_target_positions max_seq_len context_length "
        "seq_length n_ctx",
    ),
    (PATCH, "patch_size"),
    (IMAGE, "image_size"),
    (VOCABULARY, "vocab_size"),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}
_ZERO = re.compile(r"drop|jitter|^mask_(time|feature)_prob$|^spec_aug")
_GATE = re.compile(r"layer_?scale|lambda|_gate$|gamma_\d")
_TOKEN = re.compile(r"(token_id|token_index|_token_idx|_tok_id)$")


def tiny(kind: type[Any], **overrides: Any) -> Any:
    """A configuration with every size that is known by its name small, nothing dropped at random.

    Args:
        kind: Class of the configuration.
        **overrides: Fields that get other values; those of a part, as a dict, are those of its own configuration.
    """
    default = kind()
    fields: dict[str, Any] = {}
    parts = {name for name in getattr(kind, "sub_configs", {}) if getattr(default, name, None) is not None}
    for name, value in default.to_dict().items():
        if name in parts or name.startswith("_"):
            continue
        if isinstance(value, bool):
            continue
        if name in SIZES and isinstance(value, int):
            fields[name] = SIZES[name]
        elif isinstance(value, float) and _ZERO.search(name):
            fields[name] = 0.0
        elif _TOKEN.search(name) and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = IMAGE_TOKEN if "image" in name else VOCABULARY - 2
    for name in parts:
        own = dict(overrides.pop(name, {}))
        part = getattr(default, name)
        part_kind = getattr(tf, own.pop("kind")) if "kind" in own else type(part)
        fields[name] = tiny(part_kind, **own).to_dict()
    for name in list(overrides):
        if isinstance(overrides[name], dict) and "kind" in overrides[name]:
            own = dict(overrides.pop(name))
            fields[name] = tiny(getattr(tf, own.pop("kind")), **own)
    return kind(**{**fields, **overrides})


def build(class_name: str, **overrides: Any) -> nn.Module:
    """A model of transformers from its tiny configuration."""
    kind = getattr(tf, class_name)
    options = {"num_labels": LABELS} if "Classification" in class_name else {}
    if "Classification" in class_name and getattr(kind.config_class(), "pad_token_id", 0) is None:
        options["pad_token_id"] = 0
    return kind(tiny(kind.config_class, **{**options, **overrides}))


def with_lively_weights(model: nn.Module) -> nn.Module:
    """The model in eval mode with weights that keep the size of what they multiply, and gates half open.

    At the usual initial values blocks hardly change what passes through, and a broken one would not show.
    """
    with torch.no_grad():
        matrices = [
            layer.weight for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D, nn.MultiheadAttention))
            and isinstance(getattr(layer, "weight", None), nn.Parameter)
        ]  # fmt: skip
        matrices += [p for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
        matrices += [layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)]
        matrices += [p for p in model.parameters() if p.dim() > 1 and not bool(p.any())]
        for weight in matrices:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last == "bias" and parameter.dim() == 1:
                parameter.normal_(0.0, 0.05)
            elif parameter.dim() < 2 and (_GATE.search(last) or not bool(parameter.any())):
                parameter.fill_(0.5)
    return model.eval()


# ---------------------------------------------------------------- batches


def integers(generator: torch.Generator, *shape: int, low: int = 5, high: int = 90) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def text(labels: str | None = "class", length: int = LENGTH, **more: Any) -> MakeBatch:
    """Tokens, with labels for every sample ("class") or token ("same"), for a decoder ("decoder"), or none."""

    def batch(samples: int, generator: torch.Generator) -> Batch:
        tokens = integers(generator, samples, length)
        result: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if labels == "class":
            result["labels"] = torch.randint(LABELS, (samples,), generator=generator)
        elif labels == "same":
            result["labels"] = tokens.clone()
        elif labels == "decoder":
            result["labels"] = integers(generator, samples, 6)
        return result | _more(more, samples, generator)

    return batch


def image(size: int = IMAGE, labels: str | None = "class", key: str = "pixel_values", **more: Any) -> MakeBatch:
    """Images, with labels for every sample, for every pixel ("map"), or none."""

    def batch(samples: int, generator: torch.Generator) -> Batch:
        result: dict[str, Any] = {key: torch.randn(samples, 3, size, size, generator=generator)}
        if labels == "class":
            result["labels"] = torch.randint(LABELS, (samples,), generator=generator)
        elif labels == "map":
            result["labels"] = torch.randint(LABELS, (samples, size, size), generator=generator)
        return result | _more(more, samples, generator)

    return batch


def video(
    frames: int = 2, size: int = IMAGE, key: str = "pixel_values", labels: bool = True, **more: Any
) -> MakeBatch:
    """Frames of images."""

    def batch(samples: int, generator: torch.Generator) -> Batch:
        result: dict[str, Any] = {key: torch.randn(samples, frames, 3, IMAGE, IMAGE, generator=generator)}
        if labels:
            result["labels"] = torch.randint(LABELS, (samples,), generator=generator)
        return result | _more(more, samples, generator)

    return batch


def values(*shape: int, key: str, labels: str | None = None, **more: Any) -> MakeBatch:
    """Random numbers of a shape (without the samples), such as waves or spectrograms."""

    def batch(samples: int, generator: torch.Generator) -> Batch:
        result: dict[str, Any] = {key: torch.randn(samples, *shape, generator=generator)}
        if labels == "class":
            result["labels"] = torch.randint(LABELS, (samples,), generator=generator)
        elif labels == "decoder":
            result["labels"] = integers(generator, samples, 6)
        return result | _more(more, samples, generator)

    return batch


def image_and_text(
    tokens: int = 0, size: int = IMAGE, labels: bool = True, length: int = LENGTH, **more: Any
) -> MakeBatch:
    """An image and a text that begins with a number of image tokens; labels are the text."""

    def batch(samples: int, generator: torch.Generator) -> Batch:
        words = integers(generator, samples, length)
        words = torch.cat([torch.full((samples, tokens), IMAGE_TOKEN), words], 1)
        result: dict[str, Any] = {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "pixel_values": torch.randn(samples, 3, size, size, generator=generator),
        }
        if labels:
            result["labels"] = words.masked_fill(words == IMAGE_TOKEN, -100)
        return result | _more(more, samples, generator)

    return batch


def plain(*shape: int) -> MakeBatch:
    """One tensor, for models that are called with nothing else."""
    return lambda samples, generator: torch.randn(samples, *shape, generator=generator)


def _more(more: dict[str, Any], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """Further arguments: functions of the batch's size and the generator are called, all else is handed through."""
    return {key: value(samples, generator) if callable(value) else value for key, value in more.items()}
