"""Settings for the tests of checkpoints."""

from __future__ import annotations

import pytest

from wasi_peft.forms import products


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which product is the fastest depends on the machine, and rows are rounded by some."""
    monkeypatch.setattr(products, "measured_seconds", lambda *_: {"restored": 0.0})
