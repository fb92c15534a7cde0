"""Files that appear as a whole: content, names, permissions, failures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wasi_peft.files.whole import whole_file


def test_it_takes_the_place_of_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("former")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "former" and temporary.parent == tmp_path
    assert path.read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_its_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "whole") as temporary:
        temporary.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nobody_can_foresee_the_other_name(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("")
            names.add(temporary.name)
    assert len(names) == 8 and all(len(name) > 16 for name in names)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_a_failure_leaves_the_former_one(kind: type[BaseException], written: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("former")
    with pytest.raises(kind), whole_file(path) as temporary:
        if written:
            temporary.write_text("half")
        raise kind
    assert path.read_text() == "former" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_move_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("former")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "former" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]
