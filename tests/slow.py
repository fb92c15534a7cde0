"""Matrices of tests of which `make test` runs a part, and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def partly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Values of a parameter, or tuples of several, marked as slow but for some."""
    return [value if value in fast else _slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)
