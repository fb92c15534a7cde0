"""Memory techniques: what backward keeps of everything else. They work on any model and know no WASI.

A technique is an object with `check(model)`, `install(model)` and `remove(model)`. `memory_mode` of a configuration
installs those of a mode; here they are one by one, for a dense model or one with any adapter::

    from wasi_peft import memory

    memory.LowBitBlocks("int8").install(model)
    memory.SlicedBlocks().install(model)
"""

from .attention import low_bit_attention
from .few_tokens import ShortAttention, short_attention
from .gates import LeanGates
from .loss import ChunkedLoss, chunked_cross_entropy
from .modes import MEMORY_MODES, MODES, check_memory_mode, enter_memory_mode, leave_memory_mode
from .norms import LeanNorms
from .padding import UnpaddedBlocks
from .pieces import BatchSlices, ChunkedMLPs, NeedsWholeBatches, SlicedBlocks
from .recompute import BlockRecomputation, RecomputedBlocks
from .saved import LowBitBlocks, LowBitSavedTensors
from .wrapping import Technique

__all__ = [
    "MEMORY_MODES",
    "MODES",
    "BatchSlices",
    "BlockRecomputation",
    "ChunkedLoss",
    "ChunkedMLPs",
    "LeanGates",
    "LeanNorms",
    "LowBitBlocks",
    "LowBitSavedTensors",
    "NeedsWholeBatches",
    "RecomputedBlocks",
    "ShortAttention",
    "SlicedBlocks",
    "Technique",
    "UnpaddedBlocks",
    "check_memory_mode",
    "chunked_cross_entropy",
    "enter_memory_mode",
    "leave_memory_mode",
    "low_bit_attention",
    "short_attention",
]
