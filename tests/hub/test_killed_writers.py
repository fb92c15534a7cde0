"""Writers that are killed at any moment, or meet a full disk: a folder that was there is whole, the old or the new."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES

from wasi_peft import WasiConfig, compress, export, prepare_checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:.*fork.*"),
]
KILLS = 60
LLAMA = ARCHITECTURES["llama"]
Write = Callable[[int, Path], Any]


def models() -> list[Any]:
    """Two models that differ."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(compress(LLAMA.build(), WasiConfig(residual=None, weight_rank=3)))
    return made


@pytest.fixture(params=["export", "prepare"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Writes one of two versions of a folder."""
    if request.param == "export":
        versions, batch = models(), {"input_ids": torch.ones(2, 3, dtype=torch.long)}
        return lambda version, folder: export(versions[version], folder, batch=batch, overwrite=True)
    for version, model in enumerate(models()):
        model.dequantize().save_pretrained(tmp_path / f"dense {version}")
    options: dict[str, Any] = {"overwrite": True, "progress_bar": False}
    return lambda version, folder: prepare_checkpoint(tmp_path / f"dense {version}", folder, **options)


def digest(folder: Path) -> str:
    """Of all names and contents."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


def child(run: Callable[[], Any]) -> Any:
    """A process that does something and ends."""
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def written(write: Write, folder: Path) -> Iterator[str]:
    """Digests of both versions; the second is what stays in the folder."""
    for version in range(2):
        write(version, folder)
        yield digest(folder)


@pytest.mark.slow
def test_killed_at_any_moment(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    whole = set(written(write, folder))
    assert len(whole) == 2
    start = time.perf_counter()
    write(0, folder)
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    working = folder.with_name("folder.partial")

    def forever() -> None:
        for index in range(10**6):
            write(index % 2, folder)

    for _ in range(KILLS):
        process = child(forever)
        time.sleep(2 * seconds * moments.random())
        process.kill()
        process.join()
        former = sorted(tmp_path.glob(".folder.*.former"))
        there = folder if folder.exists() else former[-1]  # killed between two moves: it is whole beside its place
        assert digest(there) in whole
        if there is not folder:
            there.rename(folder)
        if working.exists():  # a preparation goes on with its own arguments
            for path in sorted(working.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            working.rmdir()
    write(0, folder)


def test_a_full_disk(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    *_, before = written(write, folder)
    largest = max(path.stat().st_size for path in folder.iterdir())
    for limit in (0, 100, largest // 2, largest - 1):

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                write(0, folder)
            except BaseException:
                os._exit(7)
            os._exit(0)

        process = child(limited)
        process.join()
        assert process.exitcode == 7, "the limit was met"
        assert digest(folder) == before
        names = {path.name for path in tmp_path.iterdir()} - {"dense 0", "dense 1", "folder.partial"}
        assert names == {"folder"}
