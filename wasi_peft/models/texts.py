"""What a text of noise is made of."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


def ordinary_tokens(config: PretrainedConfig) -> Tensor:
    """Ids of the vocabulary that neither pad a text nor end it, where a configuration says which do, (tokens,).

    Args:
        config: Of a model that reads text, perhaps beside images. It may name several ids that end a text.

    Raises:
        ValueError: If there are none.

    Example:
        >>> from transformers import LlamaConfig
        >>> ordinary_tokens(LlamaConfig(vocab_size=6, pad_token_id=0, eos_token_id=[2, 5])).tolist()
        [1, 3, 4]
    """
    config = config.get_text_config()
    special = set[int]()
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        special.update(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
    ordinary = [token for token in range(config.vocab_size) if token not in special]
    if not ordinary:
        raise ValueError(
            f"a vocabulary must have a token that neither pads nor ends a text, got {config.vocab_size} tokens with "
            f"{sorted(special)} for these."
        )
    return torch.tensor(ordinary)
