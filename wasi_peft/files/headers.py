"""What safetensors files say of their tensors in their headers; no tensor is read."""

from __future__ import annotations

import os
from typing import NamedTuple

from safetensors import SafetensorError, safe_open


class Header(NamedTuple):
    """A tensor's shape, and its dtype as safetensors calls it: "BF16"."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: str | os.PathLike[str]) -> dict[str, Header]:
    """Shapes and dtypes of a file's tensors, by name.

    Raises:
        ValueError: If the file is damaged, or claims to hold more than it does.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> path = getfixture("tmp_path") / "a.safetensors"
        >>> save_file({"x": torch.zeros(2, 3)}, path)
        >>> read_header(path)
        {'x': Header(shape=(2, 3), dtype='F32')}
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: Header(tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged or no safetensors file: {error}.") from error
