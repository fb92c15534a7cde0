"""Files that appear as a whole: content, names, permissions, failures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wasi_peft.files import whole
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


WRITER = """
import importlib.util, itertools, sys
spec = importlib.util.spec_from_file_location("whole", sys.argv[1])
whole = importlib.util.module_from_spec(spec)
spec.loader.exec_module(whole)
for number in itertools.count():
    with whole.whole_file(sys.argv[2]) as temporary:
        temporary.write_bytes(bytes([65 + number % 26]) * 200_000)
    print(number, flush=True)
"""


def test_a_process_that_is_killed_leaves_one_whole_version(tmp_path: Path) -> None:
    path, moments = tmp_path / "a", random.Random(0)
    path.write_bytes(b"A" * 200_000)
    command = [sys.executable, "-S", "-c", WRITER, whole.__file__, str(path)]
    for _ in range(12):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it is writing now
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 200_000 and len(set(content)) == 1
        assert all(each.name == "a" or each.name.startswith(".a.") for each in tmp_path.iterdir())
