"""A dense checkpoint: which tensor of a model is where in its files, checked by their headers alone."""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Mapping

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..factors.folder import checksum
from ..files.headers import read_header
from .conversion import FLOATS, Conversion, ConvertedTensor, StoredTensor

logger = logging.getLogger(__name__)

_OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}
# what lies in folders, all but what ends in "ja": templates of chats, in .jinja files
IN_FOLDERS = ("*/*[!a]", "*/*[!j]a")
_NOT_READ = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite", *IN_FOLDERS]
_SHOWN = 5  # names of tensors in a message
_CHECKSUM_BYTES = 2**20  # from either end of a file


def checkpoint_folder(model: str | os.PathLike[str], revision: str | None = None) -> str:
    """The folder of a checkpoint: a local one, or the snapshot of a hub id, in the cache of `huggingface_hub`.

    Raises:
        ValueError: If a path is meant and there is no such folder.
        OSError: If the hub does not have it, or cannot be reached.
    """
    source = os.fspath(model)
    if os.path.isdir(source):
        return source
    if os.path.exists(source) or source.startswith((".", os.sep)):
        raise ValueError(f"the model must be a folder or a hub id, got {source!r}.")
    try:
        return snapshot_download(source, revision=revision, ignore_patterns=_NOT_READ)
    except HFValidationError as error:
        raise ValueError(f"the model must be a folder or a hub id, got {source!r}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise OSError(f"{source!r} is no folder, and cannot be had from the hub: {error}") from error


def stored_tensors_of(folder: str) -> list[StoredTensor]:
    """All tensors of a checkpoint's safetensors files, one or several with an index.

    Raises:
        ValueError: If there are none, a file is damaged or claims to hold more than it does, or the index is wrong.
    """
    weight_map: dict[str, str] | None = None
    files = [SAFE_WEIGHTS_NAME]
    if not os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        weight_map = _read_weight_map(folder)
        files = sorted(set(weight_map.values()))
    stored: dict[str, StoredTensor] = {}
    for file in files:
        path = os.path.join(folder, file)
        for key, header in read_header(path).items():
            if key in stored:
                raise ValueError(f"{key}: a checkpoint must hold a tensor once, got it in {file} too.")
            stored[key] = StoredTensor(path, key, *header)
    for key, file in (weight_map or {}).items():
        if key not in stored or os.path.basename(stored[key].path) != file:
            raise ValueError(f"{key}: must be in {file} as {SAFE_WEIGHTS_INDEX_NAME} says; it is not there.")
    return list(stored.values())


def _read_weight_map(folder: str) -> dict[str, str]:
    path = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.isfile(path):
        found = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".gguf")))
        got = f"only {found[0]}" if found else "none"
        raise ValueError(f"{folder!r}: the weights must be in {SAFE_WEIGHTS_NAME} or indexed shards of it, got {got}.")
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object with a 'weight_map', got {error!r}.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: 'weight_map' must be an object with the file of every tensor.")
    for key, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: a shard must be a safetensors file of the same folder, got {file!r} for {key}.")
        if not os.path.isfile(os.path.join(folder, file)):
            raise ValueError(f"{path}: names {file!r}, which does not exist.")
    return weight_map


class DenseCheckpoint:
    """The tensors of a model by the names that they have in it.

    Where transformers has renamed modules since the checkpoint was written, or puts tensors together (experts), its
    own table is used. As it does there, the prefix of the base model is added or taken away, and tensors that the
    model lacks are left out.

    Args:
        model: Without weights; says what there must be, and in which dtype it is read.
        stored: What the files hold.

    Attributes:
        names: Of all tensors, a tied one under its first name.
        aliases: All names of each parameter, by any of them.

    Raises:
        ValueError: If a tensor is missing, has another shape or no floating dtype, or those that it is to be put
            together from do not fit; or if weights that are tied differ.
    """

    def __init__(self, model: PreTrainedModel, stored: list[StoredTensor]) -> None:
        self.expected: Mapping[str, Tensor] = model.state_dict()
        self._stored = self._matched(model, stored)
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        self.aliases = {name: names for names in tied.values() for name in names}
        self.names: list[str] = []
        for name in self.expected:
            names = self.aliases.get(name, [name])
            there = [other for other in names if other in self._stored]
            if not there:
                raise ValueError(f"{name}: the checkpoint must hold every tensor of the model; it lacks this one.")
            if name == names[0]:
                self.names.append(name)
                for other in there:
                    self._check(other)
                    self._check_tied(there[0], other)
                self._stored[name] = self._stored[there[0]]

    @staticmethod
    def _matched(model: PreTrainedModel, stored: list[StoredTensor]) -> dict[str, StoredTensor | ConvertedTensor]:
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        expected, prefix = model.state_dict(), model.base_model_prefix
        made = {name for name, _ in model.named_buffers()} - set(expected)  # by the model itself; old files hold them
        ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
        matched: dict[str, StoredTensor | ConvertedTensor] = {}
        conversions: dict[str, Conversion] = {}
        left_out: list[str] = []
        for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.key)):  # experts by their numbers
            name, converted = rename_source_key(tensor.key, renamings, converters, prefix, expected)
            if name not in expected and tensor.key in expected:
                name, converted = tensor.key, None
            if name not in expected:
                if name in made or any(re.search(pattern, tensor.key) for pattern in ignored):
                    continue
                left_out.append(tensor.key)
                continue
            if converted is not None:
                conversion = conversions.setdefault(name, Conversion(model, by_pattern[converted], name))
                conversion.add(converted, tensor)
                continue
            _enter(matched, name, tensor)
        for conversion in conversions.values():
            for name, converted_tensor in conversion.made().items():
                _enter(matched, name, converted_tensor)
        if left_out:
            shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
            logger.warning(
                "%d tensors of the checkpoint are of no part of a %s, and are left out: %s",
                len(left_out),
                type(model).__name__,
                shown,
            )
        return matched

    def _check(self, name: str) -> None:
        tensor, expected = self._stored[name], self.expected[name]
        kinds = tuple(FLOATS) if expected.is_floating_point() else (_OTHERS.get(expected.dtype, "?"),)
        if tensor.shape != tuple(expected.shape) or tensor.dtype not in kinds:
            raise ValueError(
                f"{tensor.key}: must be of shape {tuple(expected.shape)} and dtype {' or '.join(kinds)} as the "
                f"configuration says, got {tensor.shape} and {tensor.dtype}."
            )

    def _check_tied(self, name: str, other: str) -> None:
        """One dense tensor at a time where both are stored."""
        if name != other and checksum(self.read(name)) != checksum(self.read(other)):
            raise ValueError(f"{other}: is tied to {name}, so they must be equal; the checkpoint holds others.")

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor once it is read."""
        return self.expected[name].nbytes

    def total_bytes(self, names: Iterable[str]) -> int:
        """The same of several."""
        return sum(map(self.nbytes, names))

    def read(self, name: str) -> Tensor:
        """A tensor of its own, in the model's dtype."""
        return self._stored[name].read(self.expected[name].dtype)

    @property
    def identity(self) -> dict[str, list[int]]:
        """Size and a checksum of the ends of every file, by name."""
        found = {}
        for path in sorted(set().union(*(tensor.paths for tensor in self._stored.values()))):
            with open(path, "rb") as file:
                size, start = os.path.getsize(path), file.read(_CHECKSUM_BYTES)
                file.seek(max(0, size - _CHECKSUM_BYTES))
                found[os.path.basename(path)] = [size, zlib.crc32(file.read(), zlib.crc32(start))]
        return found


def _enter(
    matched: dict[str, StoredTensor | ConvertedTensor], name: str, tensor: StoredTensor | ConvertedTensor
) -> None:
    if name in matched:
        raise ValueError(f"{name}: a checkpoint must hold a tensor once, got {matched[name].key} and {tensor.key}.")
    matched[name] = tensor


def checkpoint_dtype(stored: list[StoredTensor]) -> torch.dtype:
    """Of the first floating point tensor, as transformers takes it where a configuration says nothing.

    Raises:
        ValueError: If there is none.
    """
    for tensor in stored:
        if tensor.dtype in FLOATS:
            return FLOATS[tensor.dtype]
    raise ValueError(f"a checkpoint must hold tensors of dtype {' or '.join(FLOATS)}, got none.")
