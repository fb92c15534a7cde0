"""Preparations that are interrupted: they go on where they stopped, and what was there before stays whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from safetensors.torch import load_file, save_file

from wasi_peft import WasiConfig, prepare_checkpoint
from wasi_peft.files import folders
from wasi_peft.hub import working
from wasi_peft.hub.working import WorkingFolder

FORMS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4 with additions": {"residual": "int4", "weight_rank": 2},
    "factors": {"weight_share": 0.6},
    "factors without gradients": {"weight_share": 0.6},
}
STEPS = {"int8": 4, "int4 with additions": 4, "factors": 9, "factors without gradients": 6}


class Injected(BaseException):
    """Like a KeyboardInterrupt: nobody catches it as an error."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    ARCHITECTURES["llama"].model().save_pretrained(path)
    return path


def run(dense: Path, output: Path, form: str, **options: Any) -> Path:
    data = None if form == "int8" else [ARCHITECTURES["llama"].batch(2, seed) for seed in (1, 2)]
    given = {"gradients": None} if form == "factors without gradients" else {}
    options = {"config": WasiConfig(**FORMS[form]), "data": data, "progress_bar": False, **given, **options}
    return prepare_checkpoint(dense, output, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = tensors(path), tensors(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert sorted(os.listdir(path)) == sorted(os.listdir(other))
    assert (path / "config.json").read_text() == (other / "config.json").read_text()


def counted(monkeypatch: pytest.MonkeyPatch, limit: int | None = None, late: bool = False) -> list[str]:
    """Steps that are finished from now on; the one after the limit fails, before or just after it is noted."""
    finish, steps = WorkingFolder.finish, list[str]()

    def recorded(self: WorkingFolder, step: str, left: Any = None) -> None:
        fails = len(steps) == limit
        if fails and not late:
            raise Injected
        finish(self, step, left)
        steps.append(step)
        if fails:
            raise Injected

    monkeypatch.setattr(WorkingFolder, "finish", recorded)
    return steps


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_step_is_done_once(
    form: str, late: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = counted(patch)
        run(dense, tmp_path / "whole", form)
    assert len(whole) == STEPS[form]
    for limit in range(STEPS[form]):
        output = tmp_path / f"{limit}"
        with monkeypatch.context() as patch, pytest.raises(Injected):
            before = counted(patch, limit, late)
            run(dense, output, form)
        assert not output.exists() and Path(f"{output}.partial").is_dir()
        with monkeypatch.context() as patch:
            after = counted(patch)
            run(dense, output, form)
        assert before + after == whole
        assert_same(output, tmp_path / "whole")
        assert not Path(f"{output}.partial").exists()


def failing_moves(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[str]:
    """The files that are moved to their places from now on; the one after the limit fails."""
    move, moved = os.replace, list[str]()

    def recorded(temporary: str, path: str) -> None:
        if len(moved) == limit:
            raise Injected
        moved.append(str(path))
        move(temporary, path)

    monkeypatch.setattr(os, "replace", recorded)
    return moved


@pytest.mark.parametrize(("form", "stride"), [("int8", 1), ("int4 with additions", 3), ("factors", 9)])
def test_whatever_file_is_written_last_the_former_folder_is_whole(
    form: str, stride: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        moved = failing_moves(patch, -1)
        whole = run(dense, tmp_path / "whole", form)
    output = tmp_path / "output"
    for limit in range(0, len(moved), stride):
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        with monkeypatch.context() as patch, pytest.raises(Injected):
            failing_moves(patch, limit)
            run(dense, output, form, overwrite=True)
        assert contents(output) == {"mine.txt": b"mine"}
        run(dense, output, form, overwrite=True)
        assert_same(output, whole)
        assert sorted(os.listdir(tmp_path)) == ["output", "whole"]
        shutil.rmtree(output)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_move_puts_the_former_folder_back(
    failing: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    calls, rename = [], os.rename

    def once(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == failing + 1:
            raise Injected
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(working.os, "rename", once)
        run(dense, output, "int8", overwrite=True)
    assert contents(output) == {"mine.txt": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["output", "output.partial"]
    run(dense, output, "int8", overwrite=True)
    assert "mine.txt" not in os.listdir(output) and sorted(os.listdir(tmp_path)) == ["output"]


def interrupt(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, when: Callable[[Path], bool]) -> None:
    """A function of one path is interrupted when it is called with a certain one."""
    real = getattr(where, name)

    def interrupted(path: Path, *arguments: Any, **options: Any) -> Any:
        if when(path):
            raise Injected
        return real(path, *arguments, **options)

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.parametrize("place", ["the move is done", "flush", "the former folder", "the rest"])
def test_a_published_folder_is_not_published_again_without_its_weights(
    place: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(dense, tmp_path / "output", "int8")
    whole = contents(output)
    with monkeypatch.context() as patch, pytest.raises(Injected):
        if place == "the move is done":
            interrupt(patch, Path, "rename", lambda path: path.name == "output.partial")
        elif place == "flush":
            interrupt(patch, folders, "flush", lambda path: path == tmp_path)
        else:
            end = ".former" if place == "the former folder" else ".tmp"
            interrupt(patch, folders.shutil, "rmtree", lambda path: Path(path).suffix == end)
        run(dense, output, "int8", overwrite=True)
    assert contents(output) == whole
    assert Path(f"{output}.partial").exists() == (place == "the move is done")
    run(dense, output, "int8", overwrite=True)
    assert contents(output) == whole and not Path(f"{output}.partial").exists()


def test_a_file_that_is_lost_meanwhile_is_named(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Injected):
        counted(patch, STEPS["int8"] - 1, late=True)
        run(dense, tmp_path / "output", "int8")
    (tmp_path / "output.partial" / "result" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors must be there, .* Remove .*output.partial"):
        run(dense, tmp_path / "output", "int8")
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------- what must be the same


def interrupted(dense: Path, output: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Injected):
        counted(patch, 1)
        run(dense, output, form)


def other_weights(dense: Path, path: Path) -> None:
    path.mkdir()
    for file in dense.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = {key: value.clone() for key, value in load_file(path / "model.safetensors").items()}
    weights["model.norm.weight"] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "config": ({"config": WasiConfig(weight_share=0.5)}, "config"),
    "data": ({"data": [ARCHITECTURES["llama"].batch(2, seed) for seed in (1, 3)]}, "data"),
    "gradients": ({"gradients": None}, "gradients"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype"),
    "batches": ({"max_batches": 1}, "data"),
    "size of files": ({"max_shard_size": "1MB"}, "max_shard_size"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_arguments_are_refused(
    change: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(dense, tmp_path / "output", "factors", monkeypatch)
    before = contents(tmp_path / "output.partial")
    options, what = CHANGES[change]
    with pytest.raises(ValueError, match=f"an interrupted preparation with {what} .*, got .*Give the same arguments"):
        run(dense, tmp_path / "output", "factors", **options)
    assert contents(tmp_path / "output.partial") == before


def test_another_checkpoint_is_refused(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(dense, tmp_path / "output", "int8", monkeypatch)
    other_weights(dense, tmp_path / "other")
    with pytest.raises(ValueError, match="an interrupted preparation with checkpoint"):
        run(tmp_path / "other", tmp_path / "output", "int8")
    other_weights(dense, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    run(tmp_path / "copy", tmp_path / "output", "int8")  # only the content counts


DAMAGES: dict[str, Callable[[str], str]] = {
    "no JSON": lambda text: text[:-5],
    "no steps": lambda text: json.dumps({"format": 1, "arguments": {}}),
    "no object": lambda text: "[]",
    "steps of another kind": lambda text: json.dumps({**json.loads(text), "steps": []}),
    "another format": lambda text: json.dumps({**json.loads(text), "format": 2}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(dense, tmp_path / "output", "int8", monkeypatch)
    state = tmp_path / "output.partial" / "state.json"
    state.write_text(DAMAGES[damage](state.read_text()))
    with pytest.raises(ValueError, match=r"state.json.* must .* Remove .*output.partial"):
        run(dense, tmp_path / "output", "int8")


def test_a_folder_of_somebody_else_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "output.partial").mkdir()
    (tmp_path / "output.partial" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be of an interrupted preparation or not exist"):
        run(dense, tmp_path / "output", "int8")
    assert contents(tmp_path / "output.partial") == {"mine.txt": b"mine"}
    (tmp_path / "output.partial" / "mine.txt").unlink()
    run(dense, tmp_path / "output", "int8")


def test_damaged_hidden_states_are_named(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(dense, tmp_path / "output", "factors", monkeypatch)
    path = tmp_path / "output.partial" / "hidden" / "00001" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must hold hidden states"):
        run(dense, tmp_path / "output", "factors")
