"""Code blocks of the README and the docs run as they stand; what they name exists, and no public name is missing."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wasi_peft.report import markdown_table
from wasi_peft.updates import UPDATES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
EXECUTED = [page for page in PAGES if BLOCK.search(page.read_text())]
NAMESPACES = ("wasi_peft", "wasi_peft.memory", "wasi_peft.report")


@pytest.fixture
def own_updates() -> Iterator[None]:
    """What a page registers is gone after it."""
    registered = dict(UPDATES)
    yield
    UPDATES.clear()
    UPDATES.update(registered)


@pytest.mark.usefixtures("own_updates")
@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)


def test_pages_with_code_are_among_those_that_run() -> None:
    assert {page.name for page in EXECUTED} >= {"README.md", "extending.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text()):
        if target.startswith("http"):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_in_the_docs(namespace: str) -> None:
    names = getattr(importlib.import_module(namespace), "__all__", [])
    words = {word for page in PAGES for word in re.findall(r"\w+", page.read_text())}
    assert sorted(set(names) - words) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\bwasi_peft(?:\.\w+)+", text):
        pkgutil.resolve_name(path)  # raises ImportError or AttributeError
    for room, rest in re.findall(r"`(\w+)\.(\w+\.\w+)`", text):
        if (ROOT / "wasi_peft" / room).is_dir():
            pkgutil.resolve_name(f"wasi_peft.{room}.{rest}")
    for path in re.findall(r"\b(?:tests|benchmarks|examples)/[\w/]*\.py\b", text):
        assert (ROOT / path).is_file(), path


def test_the_demo_s_table_is_that_of_its_record() -> None:
    record = json.loads((ROOT / "docs" / "benchmarks" / "demo.json").read_text())
    assert markdown_table(record["rows"]) in (ROOT / "README.md").read_text()
    assert record["settings"] == {"steps": 150, "default model and images": True}


def test_every_room_is_in_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "wasi_peft").glob("*/__init__.py")]
    assert [room for room in rooms if f"| `{room}/` |" not in text] == []
