"""The ways to repair factors, listed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import nn

from ..models.structure import vocabulary_head
from ..tuner.prepared import WasiFactors
from .block_repair import BLOCK_STEPS, repair_blocks
from .model_repair import REPAIR_STEPS, repair_factors
from .token_repair import TOKEN_STEPS, repair_tokens, require_head

RepairName = Literal["model", "blocks", "tokens"]


class Repair(NamedTuple):
    """A way to repair factors.

    Attributes:
        run: `run(model, factors, data, steps=, progress_bar=)` gives new factors.
        steps: How many by default.
        check: Raises a ValueError for a model that it does not suit.
    """

    run: Callable[..., WasiFactors]
    steps: int
    check: Callable[[nn.Module], object] = lambda model: None


REPAIRS: dict[RepairName, Repair] = {
    "model": Repair(repair_factors, REPAIR_STEPS),
    "blocks": Repair(repair_blocks, BLOCK_STEPS),
    "tokens": Repair(repair_tokens, TOKEN_STEPS, require_head),
}


def default_repair(model: nn.Module) -> RepairName:
    """The way that does best, as measured: by tokens for language models, else by what blocks answer."""
    return "model" if vocabulary_head(model) is None else "tokens"
