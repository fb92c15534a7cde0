"""Memory modes: what a training step does, beyond compressing inputs, to need little memory.

A mode is a list of techniques, each of which is put around those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from ..models.structure import vocabulary_head
from .few_tokens import ShortAttention
from .gates import LeanGates
from .loss import ChunkedLoss
from .norms import LeanNorms
from .padding import UnpaddedBlocks
from .pieces import SLICE_ROWS, ChunkedMLPs, SlicedBlocks
from .recompute import RecomputedBlocks
from .saved import LowBitBlocks
from .wrapping import Technique

MODES: Mapping[str, tuple[Technique, ...]] = MappingProxyType(
    {
        "exact": (
            ShortAttention(),
            LeanNorms(),
            LeanGates(),
            # rows with which it takes about as long as all logits at once, or less; nobody asked to do without them
            ChunkedLoss(rows=256, warns=False),
        ),
        # twice the rows where MLPs have slices of their own: fewer small operations
        "fast": (
            LeanNorms(),
            SlicedBlocks(2 * SLICE_ROWS, mlp_rows=SLICE_ROWS),
            LowBitBlocks("int8", low_bit_activations=True),
            ChunkedLoss(),
        ),
        "small": (
            ShortAttention(),
            LeanNorms(),
            RecomputedBlocks("int8"),
            SlicedBlocks(SLICE_ROWS // 2, drop_caches=True),
            ChunkedMLPs(SLICE_ROWS),  # where one sample alone is longer than a slice
            ChunkedLoss(),
        ),
    }
)
MEMORY_MODES = tuple(MODES)


def recomputes(mode: str) -> bool:
    """Whether blocks keep none of their layers' inputs in a mode, which leaves nothing there to be compressed."""
    return any(isinstance(technique, RecomputedBlocks) for technique in MODES[mode])


def _techniques(model: nn.Module, mode: str, skip_padding: bool, slice_tokens: int | None) -> list[Technique]:
    """The techniques of a mode, without those for parts that the model does not have; around them, for padding."""
    absent: list[type] = []
    if vocabulary_head(model) is None:
        absent.append(ChunkedLoss)
    if not ChunkedMLPs.find(model):
        absent.append(ChunkedMLPs)
    techniques = [technique for technique in MODES[mode] if type(technique) not in absent]
    if slice_tokens is not None:
        techniques = _in_slices(techniques, slice_tokens)
    return [*techniques, UnpaddedBlocks()] if skip_padding else techniques


def _in_slices(techniques: list[Technique], tokens: int) -> list[Technique]:
    """The same with blocks in slices of so many tokens, their MLPs, whose tensors are the largest, of half as many."""
    sliced = any(isinstance(technique, SlicedBlocks) for technique in techniques)
    found: list[Technique] = []
    for technique in techniques if sliced else (*techniques, SlicedBlocks()):
        if isinstance(technique, SlicedBlocks):  # a cache of keys and values would keep blocks whole
            technique = SlicedBlocks(tokens, mlp_rows=max(1, tokens // 2), drop_caches=True)
        elif isinstance(technique, ChunkedMLPs):
            technique = replace(technique, rows=tokens)  # for samples longer than that alone: it runs MLPs once more
        found.append(technique)
    return found


def check_memory_mode(
    model: nn.Module, mode: str, skip_padding: bool = False, slice_tokens: int | None = None
) -> None:
    """Refuse, before anything changes, a mode that the model cannot use.

    Raises:
        ValueError: If the model has no transformer blocks, and the mode is not "exact", padding is to be skipped or
            blocks are to be sliced.
    """
    for technique in _techniques(model, mode, skip_padding, slice_tokens):
        try:
            technique.check(model)
        except ValueError as error:
            setting = f"memory_mode={mode!r}"
            if isinstance(technique, UnpaddedBlocks):
                setting = "skip_padding=True"
            elif isinstance(technique, SlicedBlocks) and slice_tokens is not None:
                setting = f"slice_tokens={slice_tokens}"
            raise ValueError(f"{setting}: {error}") from error


def enter_memory_mode(
    model: nn.Module, mode: str, skip_padding: bool = False, slice_tokens: int | None = None
) -> None:
    """Install the techniques of a mode, for the parts that the model has.

    Args:
        model: A model that passes :func:`check_memory_mode`, with or without adapters in it.
        mode: One of :data:`MEMORY_MODES`.
        skip_padding: Whether blocks leave padding out on top (:class:`padding.UnpaddedBlocks`).
        slice_tokens: Tokens that blocks take at once (:class:`pieces.SlicedBlocks`), in place of the mode's choice.

    Raises:
        ValueError: As :func:`check_memory_mode`.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTModel(small)
        >>> enter_memory_mode(model, "small")
        >>> leave_memory_mode(model, "small")
    """
    check_memory_mode(model, mode, skip_padding, slice_tokens)
    for technique in _techniques(model, mode, skip_padding, slice_tokens):
        technique.install(model)


def leave_memory_mode(
    model: nn.Module, mode: str, skip_padding: bool = False, slice_tokens: int | None = None
) -> None:
    """Undo :func:`enter_memory_mode`, called with the same; nothing happens where it is not in use."""
    techniques: list[Technique] = list(MODES[mode])
    techniques += [] if slice_tokens is None else [SlicedBlocks()]
    techniques += [UnpaddedBlocks()] if skip_padding else []
    for technique in techniques:
        technique.remove(model)
