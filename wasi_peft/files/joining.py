"""Several safetensors files put into one, a piece at a time: no tensor is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from typing import Any, BinaryIO

from .headers import read_header
from .whole import whole_file

_PIECE = 2**20
_ALIGNMENT = 8


def join_files(paths: Iterable[str], target: str | os.PathLike[str]) -> None:
    """Write a file with the tensors of others; it appears whole or not at all, and those stay.

    Args:
        paths: Of the files, whose tensors have different names.
        target: Of the new file.

    Raises:
        ValueError: If a file is damaged, or a tensor is in two of them.
        OSError: If one cannot be read or written.

    Example:
        >>> import torch
        >>> from safetensors.torch import load_file, save_file
        >>> folder = getfixture("tmp_path")
        >>> for name in "ab":
        ...     save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
        >>> join_files([folder / "a.safetensors", folder / "b.safetensors"], folder / "both.safetensors")
        >>> sorted(load_file(folder / "both.safetensors"))
        ['a', 'b']
    """
    entries: dict[str, tuple[str, int, dict[str, Any]]] = {}
    for path in paths:
        read_header(path)  # which checks it
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in entries:
                raise ValueError(f"{name}: must be in one file, got it in {entries[name][0]} and {path}.")
            entries[name] = path, 8 + size, entry
    # wide elements first, so that each tensor lies at a multiple of its elements' size
    order = sorted(entries, key=lambda name: (-_width(entries[name][2]), name))
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        entry = entries[name][2]
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {**entry, "data_offsets": [place, place + length]}
        place += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with whole_file(target) as temporary, open(temporary, "wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            path, begins, entry = entries[name]
            with open(path, "rb") as file:
                file.seek(begins + entry["data_offsets"][0])
                _copy(file, written, entry["data_offsets"][1] - entry["data_offsets"][0])


def _width(entry: dict[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return (last - first) // max(1, math.prod(entry["shape"]))


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(length, _PIECE))
        if not piece:
            raise ValueError(f"{source.name}: the file ends before its tensors do.")
        target.write(piece)
        length -= len(piece)
