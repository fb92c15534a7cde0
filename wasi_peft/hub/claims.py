"""What the files of a compressed checkpoint claim, compared by their headers with what its configuration says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..files.headers import Header, read_header
from ..forms.residual import Layout
from ..forms.stored import is_part, layer_of

_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {torch.int8: "I8", torch.uint8: "U8"}


def check_files(model: PreTrainedModel, layouts: Mapping[str, Layout], files: Iterable[str] | None) -> None:
    """Refuse, by their headers alone, files that do not hold what the config says.

    Raises:
        ValueError: If a tensor of a compressed layer is missing, there is one that its form does not have, or one has
            another shape or kind of dtype; if another tensor of the architecture that was saved is missing; or if a
            file is damaged or no safetensors file.
    """
    if files is None:
        return
    present: dict[str, Header] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"compressed checkpoints are safetensors files only, got {os.path.basename(path)}.")
        present |= read_header(path)
    keys: dict[str, dict[str, str]] = {name: {} for name in layouts}
    for key in present:
        layer = layer_of(key, layouts)
        if layer is not None:
            keys[layer[0]][layer[1]] = key
    for name, layout in layouts.items():
        for part in sorted(set(keys[name]).symmetric_difference(layout)):
            lacks = "lacks" if part in layout else "has, besides what its form stores,"
            raise ValueError(f"{name}: the checkpoint {lacks} {part!r}; it is damaged or was put together wrongly.")
        for part, (shape, dtype) in layout.items():
            there = present[keys[name][part]]
            kinds = _FLOATS if dtype.is_floating_point else (_INTEGERS[dtype],)
            if there.shape != shape or there.dtype not in kinds:
                raise ValueError(
                    f"{keys[name][part]}: must be of shape {shape} and dtype {' or '.join(kinds)} as its form says, "
                    f"got {there.shape} and {there.dtype}."
                )
    _check_rest(model, layouts, present)


def _check_rest(model: PreTrainedModel, layouts: Mapping[str, Layout], present: Iterable[str]) -> None:
    """Refuse tensors of forms without a layer, and an architecture that was saved and is not complete."""
    others = [key for key in present if layer_of(key, layouts) is None]
    stray = next(filter(is_part, others), None)
    if type(model).__name__ not in (model.config.architectures or ()):
        return  # with another head or none; transformers says what is missing and what is left
    if stray is not None:
        raise ValueError(f"{stray}: the checkpoint holds a part of a layer that its configuration does not name.")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    known = set(others)
    for key in model.state_dict():
        skipped = key in tied or layer_of(key, layouts) is not None or any(each.search(key) for each in optional)
        if not skipped and key not in known:
            raise ValueError(f"{key}: the checkpoint lacks this tensor; it is damaged or was put together wrongly.")
