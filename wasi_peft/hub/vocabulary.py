"""Tokenizers in GGUF files: those of byte-level BPE, whose way to split a text llama.cpp knows by a name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers

# What precedes BPE, by the name that llama.cpp has for it
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_SIGNS}"), ("ByteLevel", False)],
    "qwen2": [("Split", rf"{_CONTRACTIONS}\p{{N}}{_SIGNS}"), ("ByteLevel", False)],
}


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer of a model.

    Args:
        model: Of transformers, or a PEFT model around one.
        tokenizer: One, or where to read it; by default where the model was read.

    Raises:
        ValueError: If there is none.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    place = tokenizer or model.config.name_or_path
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"tokenizer= is needed, one or where to read it: none can be read from {place!r}.") from error


def add_vocabulary(writer: Any, tokenizer: Any, config: Any) -> None:
    """Write a tokenizer into a GGUF file.

    Args:
        writer: Of the file.
        tokenizer: Of transformers.
        config: Of the model.

    Raises:
        ValueError: If llama.cpp has none of its kind, or it has more tokens than the model.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = None if backend is None else _split_name(json.loads(backend.to_str()))
    if kind is None:
        raise ValueError(
            f"format 'gguf' takes tokenizers of byte-level BPE that split texts as {', '.join(SPLITS)} do, got a "
            f"{type(tokenizer).__name__} of another kind."
        )
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    size = config.vocab_size
    if max(vocabulary) >= size:
        raise ValueError(f"the tokenizer has the tokens 0 to {max(vocabulary)}, and the model only {size}.")
    tokens, types = [], []
    for index in range(size):
        added = tokenizer.added_tokens_decoder.get(index)
        if index not in vocabulary:
            token, token_type = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif added is None:
            token, token_type = vocabulary[index], gguf.TokenType.NORMAL
        else:
            special = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
            token, token_type = added.content, special
        tokens.append(token)
        types.append(token_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:  # merges, special tokens and the template of chats are read from it
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _split_name(described: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a tokenizer splits a text; None for another kind of tokenizer."""
    model, before = described["model"], described["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model["byte_fallback"] or not model["merges"]:
        return None
    if (described["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # which llama.cpp leaves to its caller
        return None
    steps = [_step(step) for step in before.get("pretokenizers", [before])]
    return next((name for name, split in SPLITS.items() if split == steps), None)


def _step(step: dict[str, Any]) -> tuple[Any, Any]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None
