"""A tokenizer without a vocabulary to download."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CHAT = (
    "{% for message in messages %}<{{ message['role'][0] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and a template for chats that tells what the assistant says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<unk>", "<u>", "<a>"]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(special + alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
    )  # fmt: skip
    fast.chat_template = CHAT
    return fast
