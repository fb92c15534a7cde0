"""What a compressed checkpoint holds, from its configuration and the headers of its files: nothing is loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import CONFIG_NAME

from ..files.headers import read_header
from ..files.objects import read_object
from ..forms.stored import layer_of
from .compressed import METHOD, WasiQuantizationConfig


class StoredLayer(NamedTuple):
    """A compressed layer: its name, what is stored, directions of its factors, bytes of its tensors."""

    name: str
    form: str
    rank: int
    stored_bytes: int


class Checkpoint(NamedTuple):
    """A compressed checkpoint: its layers, and bytes of all tensors, those of other modules too."""

    layers: tuple[StoredLayer, ...]
    stored_bytes: int


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed checkpoint, by its configuration.

    Raises:
        ValueError: If that is no JSON object.
    """
    return _settings(folder).get("quant_method") == METHOD


def read_headers(folder: Path) -> Checkpoint:
    """What a compressed checkpoint holds.

    Raises:
        ValueError: If the configuration is not that of one, a file is damaged, or a layer is not in the files.
    """
    settings = {key: value for key, value in _settings(folder).items() if key != "quant_method"}
    try:
        config = WasiQuantizationConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        sizes |= {key: math.prod(header.shape) * _width(header.dtype) for key, header in read_header(path).items()}
    layers = []
    own: dict[str, list[int]] = {name: [] for name in config.layers}
    for key, size in sizes.items():
        owner = layer_of(key, config.layers)
        if owner is not None:
            own[owner[0]].append(size)
    for name, entry in config.layers.items():
        if not own[name]:
            raise ValueError(f"{folder}: {name} is in config.json and in no file; the checkpoint is not complete.")
        layers.append(StoredLayer(name, entry["form"], entry["rank"] + entry.get("side_rank", 0), sum(own[name])))
    return Checkpoint(tuple(layers), sum(sizes.values()))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    settings = read_object(path).get("quantization_config") if path.is_file() else None
    return settings if isinstance(settings, dict) else {}


def _width(dtype: str) -> int:
    """Bytes of an element of a dtype as safetensors names it.

    Example:
        >>> [_width(name) for name in ("F32", "BF16", "I8", "F8_E4M3", "BOOL")]
        [4, 2, 1, 1, 1]
    """
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits[0]) // 8)
