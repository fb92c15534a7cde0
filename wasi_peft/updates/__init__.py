"""Updates: which part of a form trains, and how. One file an update, one registry.

Configurations, plans and the command line read :data:`UPDATES`; a class that is added to it by
:func:`register_update` works everywhere.
"""

from __future__ import annotations

from dataclasses import replace

from ..forms.frozen import FROZEN
from ..forms.residual import RESIDUALS
from .addition import Addition
from .base import InitialFactors, Update
from .core import Core
from .factor import Factor
from .frozen_basis import FrozenBasis
from .low_rank import LowRank
from .subspace import Subspace

DEFAULT_UPDATE = FrozenBasis.name  # of factors that replace a weight
RESIDUAL_UPDATE = Addition.name  # of those beside a frozen one

UPDATES: dict[str, type[Update]] = {
    update.name: update for update in (Addition, FrozenBasis, LowRank, Core, Subspace, Factor)
}


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


def make_update(
    name: str, update_rank: int | None = None, residual: str | None = None, frozen_dtype: str | None = None
) -> Update:
    """The update that a configuration or plan asks for.

    Args:
        name: Of the update.
        update_rank: Directions that train beside the K of the weight, for updates that have such.
        residual: The frozen weight beside the factors, None for none.
        frozen_dtype: In what factors that do not train are stored, None for parameters.

    Raises:
        ValueError: If no update has this name, no residual or frozen factor has that one, the update cannot train
            beside a residual, or `frozen_dtype` is given where there is one or where all factors train.

    Example:
        >>> make_update("low_rank", 4).side_rank, make_update("core").trained
        (4, ('M',))
    """
    if name not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(map(repr, UPDATES))}, got {name!r}.")
    update = UPDATES[name].from_options(update_rank)
    if frozen_dtype is not None:
        _check_frozen_dtype(update, residual, frozen_dtype)
        update = replace(update, frozen_dtype=frozen_dtype)
    if residual is None:
        if update.needs_residual:
            raise ValueError(f"update={name!r} adds to a frozen weight, so it needs a residual, got residual=None.")
        return update
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(repr, RESIDUALS))}, None, got {residual!r}.")
    if not update.takes_residual:
        able = " or ".join(repr(other) for other, cls in UPDATES.items() if cls.takes_residual)
        raise ValueError(f"a residual needs update={able}, got update={name!r} with residual={residual!r}.")
    return replace(update, residual=residual)


def _check_frozen_dtype(update: Update, residual: str | None, frozen_dtype: str) -> None:
    if frozen_dtype not in FROZEN:
        raise ValueError(f"frozen_dtype must be one of {', '.join(map(repr, FROZEN))}, None, got {frozen_dtype!r}.")
    if residual is not None:
        raise ValueError(
            f"frozen_dtype is for factors that replace the weight, so it needs residual=None, got "
            f"frozen_dtype={frozen_dtype!r} with residual={residual!r}."
        )
    if not update.frozen_factors():
        able = " or ".join(repr(other) for other, cls in UPDATES.items() if cls.frozen_factors())
        raise ValueError(
            f"frozen_dtype stores factors that do not train, so it needs update={able}; all of them train with "
            f"update={update.name!r}, got frozen_dtype={frozen_dtype!r}."
        )


__all__ = [
    "DEFAULT_UPDATE",
    "RESIDUAL_UPDATE",
    "UPDATES",
    "Addition",
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
