"""What kind of value each field of the configuration takes, of those that choose modules and ranks, and of switches.

A string in the place of a list is the common slip: PEFT would take it for a list of its letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SWITCHES = ("train_vectors", "init_weights", "ensure_weight_tying", "skip_padding")
NAMES = ("modules_to_save",)
NAMES_OR_PATTERN = ("target_modules", "exclude_modules", "layers_pattern")
RANKS = ("rank_pattern", "ranks")


def check_kinds(config: Any) -> None:
    """Refuse values of another kind than the fields of a configuration are for.

    Raises:
        ValueError: With the name of the field, what it takes, and what was given.

    Example:
        >>> from types import SimpleNamespace
        >>> fields = dict.fromkeys((*SWITCHES, *NAMES, *NAMES_OR_PATTERN, *RANKS, "layers_to_transform"))
        >>> fields |= dict.fromkeys(SWITCHES, True)
        >>> check_kinds(SimpleNamespace(**{**fields, "modules_to_save": "classifier"}))
        Traceback (most recent call last):
            ...
        ValueError: modules_to_save must be a list of names, as ['classifier'], got 'classifier'.
    """
    for field in SWITCHES:
        if not isinstance(getattr(config, field), bool):
            raise ValueError(f"{field} must be True or False, got {getattr(config, field)!r}.")
    for field in NAMES:
        value = getattr(config, field)
        if value is not None and not _is_list_of(str, value):
            example = f", as [{value!r}]" if isinstance(value, str) else ""
            raise ValueError(f"{field} must be a list of names{example}, got {value!r}.")
    for field in NAMES_OR_PATTERN:
        value = getattr(config, field)
        if value is not None and not isinstance(value, str) and not _is_list_of(str, value):
            raise ValueError(f"{field} must be a list of names or one string, got {value!r}.")
    for field in RANKS:
        value = getattr(config, field)
        if value is not None and not (isinstance(value, Mapping) and _is_list_of(str, list(value))):
            raise ValueError(f"{field} must be a dict of ranks by name, got {value!r}.")
    blocks = config.layers_to_transform
    listed = blocks if _is_list_of(int, blocks) else [blocks]
    if blocks is not None and not all(_is_index(index) for index in listed):
        raise ValueError(
            f"layers_to_transform must be an index of a block, from 0, or a list of such, got {blocks!r}."
        )


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, kind) for item in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
