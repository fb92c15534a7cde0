"""The folder of a calibration: its index, its files, and what is wrong with them.

`index.json` names a safetensors file for every layer that is done. It is replaced as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..forms.dense import dense_weight

FORMAT = 4
_KEYS = {"format": int, "complete": bool, "settings": dict, "data": dict, "bytes_per_element": int, "layers": dict}
_LAYER_KEYS = {
    "file": str,
    "shape": list,
    "input": str,
    "rows": int,
    "energy": float,
    "rounding": dict,
    "weighed": bool,
    "checksum": int,
}


def read_index(directory: str) -> dict[str, Any] | None:
    """The index of a folder, None where there is none.

    Raises:
        ValueError: If it is damaged, has another format, or a file that it names is missing.
    """
    path = os.path.join(directory, "index.json")
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} must be the JSON index of a calibration, got {error}.") from error
    if isinstance(index, dict) and "format" in index and index["format"] != FORMAT:
        raise ValueError(f"{path}: the calibration must have format {FORMAT}, got {index['format']!r}.")
    _check_keys(path, "the index of a calibration", index, _KEYS)
    for name, entry in index["layers"].items():
        _check_keys(path, f"the entry of {name}", entry, _LAYER_KEYS)
        if not os.path.isfile(os.path.join(directory, entry["file"])):
            raise ValueError(f"{path} must name files that exist, got {entry['file']!r} for {name}.")
    return index


def write_index(directory: str, index: dict[str, Any]) -> None:
    """Replace the index as a whole."""
    temporary = os.path.join(directory, "index.json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(index, file)
    replace_file(temporary, os.path.join(directory, "index.json"))


def replace_file(temporary: str, path: str) -> None:
    """Move a finished file to its place, once its content is on the disk: a power cut leaves all of it or nothing."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_index(
    directory: str,
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    settings: dict[str, Any],
    data: dict[str, int | None],
) -> dict[str, Any]:
    """The index of a calibration to continue, or a new one.

    Args:
        directory: The folder; it is created if it does not exist.
        model: The model that is calibrated.
        targets: The layers that are asked for.
        settings: What must be the same in every run.
        data: What :func:`data.describe_data` says.

    Raises:
        ValueError: If the folder holds a calibration with other settings, on other data or of another model.
    """
    os.makedirs(directory, exist_ok=True)
    index = read_index(directory)
    if index is None:
        return new_index(targets, settings, data)
    if index["settings"] != settings:
        raise ValueError(
            f"{directory!r} holds a calibration with {index['settings']}, got {settings}. Use another folder."
        )
    for what, value in data.items():
        known = index["data"].get(what)
        if None not in (known, value) and known != value:
            raise ValueError(
                f"{directory!r} holds a calibration on other data: {what} {known}, got {value}. Use another folder."
            )
        index["data"][what] = known if value is None else value
    modules = dict(model.named_modules())
    for name, entry in index["layers"].items():
        module = modules.get(name)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"{name}: {directory!r} holds the calibration of another model, which has this layer.")
        if list(dense_weight(module).shape) != entry["shape"] or weight_checksum(module) != entry["checksum"]:
            raise ValueError(f"{name}: {directory!r} holds the calibration of another model. Use another folder.")
    return index


def new_index(
    targets: Mapping[str, nn.Module], settings: dict[str, Any], data: dict[str, int | None]
) -> dict[str, Any]:
    """The index of a calibration that begins; arguments as for :func:`open_index`."""
    return {
        "format": FORMAT,
        "complete": False,
        "settings": settings,
        "data": data,
        "bytes_per_element": dense_weight(next(iter(targets.values()))).element_size(),
        "layers": {},
    }


def weight_checksum(module: nn.Module) -> int:
    """CRC-32 of a weight's bytes: tells whether a spectrum belongs to this very layer."""
    return checksum(dense_weight(module))


def read_tensor(path: str, name: str) -> Tensor | None:
    """A tensor of a layer's file, None where the file does not hold it.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if name in file.keys() else None
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file of a calibration, got {error}.") from error


def _check_keys(path: str, what: str, value: Any, keys: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be a JSON object, got {type(value).__name__}.")
    for key, kind in keys.items():
        if key not in value:
            raise ValueError(f"{path}: {what} must have the keys {list(keys)}; it misses {key!r}.")
        if type(value[key]) is not kind:
            raise ValueError(f"{path}: {key!r} of {what} must be of type {kind.__name__}, got {value[key]!r}.")


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, going on from another one."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), start)
