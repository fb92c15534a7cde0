"""Makes PEFT know the type `WASI`; the only module that touches PEFT's private tables.

PEFT has no public way in for out-of-tree methods: `register_peft_method` accepts only members of the closed `PeftType`
enum. So a real member is added to the enum first, then the official registration does the rest.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "WASI"


def _enum_member() -> PeftType:
    """The member `PeftType.WASI`, created on the first call (a `str` enum, so members are strings)."""
    existing = PeftType.__members__.get(NAME)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    return member


PEFT_TYPE = _enum_member()


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register the tuner with PEFT; calling it again, also after a module reload, replaces the classes."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        table.pop(PEFT_TYPE, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
