"""A folder is there whole or not at all, and a former one stays until then."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from wasi_peft import export
from wasi_peft.files import folders
from wasi_peft.files.folders import check_apart, new_folder


def write(folder: Path, text: str, **options: Any) -> None:
    with new_folder(folder, **options) as scratch:
        (scratch / "in").mkdir()
        (scratch / "in" / "a.txt").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "new") as scratch:
        (scratch / "a.txt").write_text("a")
        assert scratch.parent == tmp_path / "deep" and not (tmp_path / "deep" / "new").exists()
    assert content(tmp_path) == {"deep/new/a.txt": "a"}
    mode = stat.S_IMODE((tmp_path / "deep" / "new").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "deep").stat().st_mode), "not private"


def test_names_before_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for index in range(3):
        with new_folder(tmp_path / str(index)) as scratch:
            names.add(scratch.name.removeprefix(f".{index}."))
    assert len(names) == 3


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_refused(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir() if kind == "folder" else there.write_text("mine")
    with pytest.raises(FileExistsError, match="there is something already"):
        write(there, "new")
    if kind == "file":
        with pytest.raises(FileExistsError, match="it is a file"):
            write(there, "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_overwriting_replaces_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "left.txt").write_text("over")
    write(tmp_path / "model", "new", overwrite=True)
    assert content(tmp_path) == {"model/in/a.txt": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_former_folder_survives_what_goes_wrong_while_writing(error: type[BaseException], tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    with pytest.raises(error), new_folder(tmp_path / "model", overwrite=True) as scratch:
        (scratch / "half.txt").write_text("half")
        raise error
    assert content(tmp_path) == {"model/in/a.txt": "old"}


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_former_folder_survives_what_goes_wrong_between_the_moves(
    failing: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", "old")
    moves, rename = [], Path.rename

    def broken(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(error):
        write(tmp_path / "model", "new", overwrite=True)
    assert content(tmp_path) == {"model/in/a.txt": "old"}


def test_a_folder_that_came_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), new_folder(tmp_path / "model"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").write_text("theirs")
    assert content(tmp_path) == {"model/theirs": "theirs"}


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    flush = folders.flush

    def note(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "model").exists()))
        flush(path)

    monkeypatch.setattr(folders, "flush", note)
    write(tmp_path / "model", "new")
    before, after = [[name for name, there in flushed if there is last] for last in (False, True)]
    assert {"in", "a.txt"} < set(before) and len(before) == 3 and after == [tmp_path.name]


def test_files_are_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    write(tmp_path / "model", "new")
    assert len(synchronised) == 4


def test_mistakes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format must be one of 'plain', 'onnx', .*, 'gguf', got 'tflite'"):
        export(nn.Linear(1, 1), tmp_path / "x", "tflite")
    with pytest.raises(ValueError, match=r"format 'plain' has the options \[\], got \['int8'\]"):
        export(nn.Linear(1, 1), tmp_path / "x", int8=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="pass overwrite=True to replace it"):
        export(nn.Linear(1, 1), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    source = tmp_path / "models/base"
    source.mkdir(parents=True)
    message = r"the output must be another folder than the base's, and not around it\.$"
    for output in (source, tmp_path / "models", tmp_path / "models/../models/base"):
        with pytest.raises(ValueError, match=message):
            check_apart(output, {"the adapter's": tmp_path / "other", "the base's": source})
    check_apart(source / "small", {"the base's": source})
    check_apart(tmp_path / "small", {"the base's": "org/name"})
    (source / "texts.txt").write_text("a")
    with pytest.raises(ValueError, match="another folder than the data's"):
        check_apart(source, {"the data's": source / "texts.txt"})
