"""Updates: which part of a form trains, and how. One file an update, one registry.

Configurations, plans and the command line read :data:`UPDATES`; a class that is added to it by
:func:`register_update` works everywhere.
"""

from __future__ import annotations

from .base import InitialFactors, Update
from .core import Core
from .factor import Factor
from .frozen_basis import FrozenBasis
from .low_rank import LowRank
from .subspace import Subspace

DEFAULT_UPDATE = FrozenBasis.name

UPDATES: dict[str, type[Update]] = {update.name: update for update in (FrozenBasis, LowRank, Core, Subspace, Factor)}


def register_update(update_cls: type[Update]) -> type[Update]:
    """Add an update to the registry, so that configurations can name it; also usable as a decorator.

    Args:
        update_cls: A subclass of :class:`base.Update` with a name of its own.

    Raises:
        TypeError: If it is no concrete subclass.
        ValueError: If its name is that of another update.
    """
    if not (isinstance(update_cls, type) and issubclass(update_cls, Update)) or update_cls.__abstractmethods__:
        raise TypeError(f"register_update needs a concrete subclass of Update, got {update_cls!r}.")
    registered = UPDATES.setdefault(update_cls.name, update_cls)
    if registered is not update_cls:
        raise ValueError(f"the name of an update must be its own, got {update_cls.name!r}, which is {registered!r}.")
    return update_cls


def make_update(name: str, update_rank: int | None = None) -> Update:
    """The update that a configuration or plan asks for.

    Args:
        name: Of the update.
        update_rank: Directions that train beside the K of the weight, for updates that have such.

    Raises:
        ValueError: If no update has this name.

    Example:
        >>> make_update("low_rank", 4).side_rank, make_update("core").trained
        (4, ('M',))
    """
    if name not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(map(repr, UPDATES))}, got {name!r}.")
    return UPDATES[name].from_options(update_rank)


__all__ = [
    "DEFAULT_UPDATE",
    "UPDATES",
    "Core",
    "Factor",
    "FrozenBasis",
    "InitialFactors",
    "LowRank",
    "Subspace",
    "Update",
    "make_update",
    "register_update",
]
