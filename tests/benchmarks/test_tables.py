"""The tables of README and docs/benchmarks are those that the JSON files give."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture
def tables() -> Any:
    return importlib.import_module("tables")


def test_pages_hold_what_was_measured(tables: Any) -> None:
    for page in tables.PAGES:
        assert page.read_text() == tables.with_tables(page.read_text()), f"python benchmarks/tables.py: {page.name}"


def test_every_table_has_a_page(tables: Any) -> None:
    named = [name for page in tables.PAGES for name, *_ in tables.MARKED.findall(page.read_text())]
    assert sorted(named) == sorted(tables.TABLES)
    assert len(named) == sum(page.read_text().count("<!-- table") for page in tables.PAGES)


def test_a_table_takes_the_place_of_the_one_before(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "of two", lambda: "| new |\n| --- |\n| 2 |\n")
    before = "Text\n\n<!-- table: of two -->\n\n| old |\n| --- |\n| 1 |\n| 1 |\n\nMore | text\n"
    after = tables.with_tables(before)
    assert after == "Text\n\n<!-- table: of two -->\n\n| new |\n| --- |\n| 2 |\n\nMore | text\n"
    assert tables.with_tables(before.replace("\n| old |\n| --- |\n| 1 |\n| 1 |\n", "")) == after  # there was none yet
    assert tables.with_tables(after) == after
