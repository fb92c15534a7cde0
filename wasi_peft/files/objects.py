"""JSON files that hold an object."""

from __future__ import annotations

import json
import os
from typing import Any


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: If it holds something else, or is no JSON in UTF-8.
        OSError: If it cannot be read.

    Example:
        >>> path = getfixture("tmp_path") / "config.json"
        >>> _ = path.write_text('{"rank": 4}')
        >>> read_object(path)
        {'rank': 4}
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: must be a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)}: must hold a JSON object, got {type(found).__name__}.")
    return found
