"""What a format of exported models offers; each is a class, listed once in :mod:`export`."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import nn


class Source(NamedTuple):
    """What is exported.

    Attributes:
        model: Not changed.
        batch: What it is called with; None for one that its configuration tells.
        adapter_name: Of a PEFT model; None for the active one.
        tolerance: Largest difference, relative to the largest element of an answer; None for that of the dtype.
    """

    model: nn.Module
    batch: Any
    adapter_name: str | None
    tolerance: float | None


class Format(ABC):
    """One way to write a model. The fields of a format, a dataclass, are its options."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # that it needs and this package does not
    extra: ClassVar[str] = ""  # which installs them

    def require_packages(self) -> None:
        """Refuse at once what could not be written.

        Raises:
            ImportError: If a package is missing.
        """
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ImportError(
                f"format {self.name!r} needs {', '.join(missing)}: pip install 'wasi_peft[{self.extra}]'."
            )

    @abstractmethod
    def write(self, source: Source, folder: Path) -> float:
        """Write the files, and run what was written.

        Args:
            source: What is exported.
            folder: An empty one.

        Returns:
            How far its answers are from those of the model: largest difference over largest element.

        Raises:
            ValueError: If that is further than the tolerance, or the model cannot be written so.
            TypeError: If it is of a kind that cannot.
        """
