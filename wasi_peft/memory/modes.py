"""Memory modes: what a training step does, beyond compressing inputs, to need little memory.

Every part is a switch of the model, taken from the configuration when the adapter is injected: how blocks keep what
backward needs, blocks in slices of the batch, MLPs in chunks of tokens, a loss that never holds all logits.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..tuner.config import WasiConfig
from ..tuner.targets import vocabulary_head
from .chunked_mlp import chunk_mlps, position_wise_modules, unchunk_mlps
from .loss import remove_chunked_loss, use_chunked_loss
from .recompute import check_recomputable, recompute_blocks, stop_recomputation
from .saved import keep_saved_tensors_exact, store_saved_tensors
from .slices import SLICE_ROWS, slice_blocks, unslice_blocks

FAST_SLICE_ROWS = 2 * SLICE_ROWS  # of blocks, where MLPs have slices of their own: fewer small operations
CHUNK_ROWS = SLICE_ROWS  # tokens of an MLP at a time, where one sample alone is longer than a slice
BLOCK_INPUTS = "int8"  # how the input of a recomputed block is kept


def check_memory_mode(model: nn.Module, config: WasiConfig) -> None:
    """Refuse, before anything changes, a mode that the model cannot use.

    Raises:
        ValueError: If blocks are to be recomputed and the model cannot do that.
    """
    if config.resolved_saved_tensors == "recompute":
        check_recomputable(model)


def apply_memory_mode(model: nn.Module, config: WasiConfig) -> None:
    """Switch on what the configuration's `memory_mode` and `saved_tensors` ask for.

    Args:
        model: The base model, with the adapter in it.
        config: The adapter's configuration.
    """
    kind = config.resolved_saved_tensors
    if kind == "recompute":
        recompute_blocks(model, BLOCK_INPUTS, SLICE_ROWS if config.memory_mode == "small" else None)
    elif kind != "exact":
        store_saved_tensors(model, kind, low_bit_activations=config.memory_mode == "fast" and kind == "int8")
    if kind == "recompute" and config.memory_mode == "small" and position_wise_modules(model):
        chunk_mlps(model, chunk_rows=CHUNK_ROWS)
    if config.memory_mode == "fast" and kind != "recompute":
        slice_blocks(model, FAST_SLICE_ROWS, mlp_rows=SLICE_ROWS)
    if config.memory_mode != "exact" and vocabulary_head(model) is not None:
        use_chunked_loss(model)


def leave_memory_mode(model: nn.Module) -> None:
    """Undo :func:`apply_memory_mode`; nothing happens where it is not in use."""
    if stop_recomputation(model) and isinstance(model, PreTrainedModel):
        model.disable_input_require_grads()  # which PEFT enables for models that recompute
    keep_saved_tensors_exact(model)
    unslice_blocks(model)
    unchunk_mlps(model)
    remove_chunked_loss(model)
