"""The folder of a calibration: its index, its files, and what is wrong with them.

`index.json` names a safetensors file for every layer that is done; the file names its layer in turn. Both are replaced
as a whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files.whole import whole_file
from ..forms.dense import dense_weight, weight_shape
from ..models.experts import ExpertStack

logger = logging.getLogger(__name__)

FORMAT = 6
SUFFIX = ".safetensors"
_KEYS = {"format": int, "complete": bool, "settings": dict, "data": dict, "bytes_per_element": int, "layers": dict}
_LAYER_KEYS = {
    "file": str,
    "shape": list,
    "experts": int,
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
        ValueError: If it is damaged, has another format, or names a file outside the folder.
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
        if os.path.basename(entry["file"]) != entry["file"] or not entry["file"].endswith(SUFFIX):
            raise ValueError(f"{path} must name safetensors files in the folder, got {entry['file']!r} for {name}.")
    return index


def check_file(directory: str, name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a layer's file that is missing, damaged or another layer's; its header is read, not its tensors.

    Raises:
        FileNotFoundError: If there is none, or no regular one.
        DamagedFileError: If it is no complete safetensors file of a layer of this size.
        ValueError: If it is another layer's.
    """
    path = os.path.join(directory, entry["file"])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: the calibration's file of {name} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("layer")
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: the calibration's file of {name} is damaged: {error}.") from error
    if owner != name:
        raise ValueError(f"{path} must be the file of {name}, as the index says, got that of {owner!r}.")
    out_features, in_features = entry["shape"]
    mean = sizes.get("mean", [in_features])  # packed experts have none
    if sizes.get("energies") != [min(out_features, in_features)] or mean != [in_features]:
        raise DamagedFileError(f"{path}: the calibration's file of {name} must be of a {entry['shape']} weight.")


class DamagedFileError(ValueError):
    """A file of a calibration that is not what was written."""


def free_file_name(index: Mapping[str, Any]) -> str:
    """A name that no entry of an index has; files without one are nobody's."""
    taken = {entry["file"] for entry in index["layers"].values()}
    return next(name for name in (f"{number:05d}{SUFFIX}" for number in itertools.count()) if name not in taken)


def write_index(directory: str, index: dict[str, Any]) -> None:
    """Replace the index as a whole."""
    with whole_file(os.path.join(directory, "index.json")) as temporary:
        temporary.write_text(json.dumps(index), encoding="utf-8")


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
    modules = {**dict(model.named_modules()), **targets}
    for name, entry in list(index["layers"].items()):
        try:
            check_file(directory, name, entry)
        except (FileNotFoundError, DamagedFileError) as error:
            logger.warning("%s It is measured again.", error)
            del index["layers"][name]
            index["complete"] = False
            continue
        module = modules.get(name)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"{name}: {directory!r} holds the calibration of another model, which has this layer.")
        if list(weight_shape(module)) != entry["shape"] or weight_checksum(module) != entry["checksum"]:
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
    return checksum(module.weight if isinstance(module, ExpertStack) else dense_weight(module))


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
