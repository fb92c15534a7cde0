"""A tokenizer without a vocabulary to download, and models that read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CHAT = (
    "{% for message in messages %}<{{ message['role'][0] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, some of merged ones, and a template for chats that tells what the assistant says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<unk>", "<u>", "<a>"]
    tokens = [*special, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
    )  # fmt: skip
    fast.chat_template = CHAT
    return fast


def save_byte_bert(folder: Path) -> None:
    """A tiny BERT without a head and its tokenizer, the same each time."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_llama(merges: int = 0, **options: Any) -> transformers.LlamaForCausalLM:
    """A tiny model of that tokenizer's tokens, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(byte_tokenizer()) + merges, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1,
        pad_token_id=0, bos_token_id=1, **sizes, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
