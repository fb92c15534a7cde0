"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .whole import flush

Location = str | os.PathLike[str]


def check_target(folder: Location, overwrite: bool = False) -> Path:
    """The place of a folder that is to be written.

    Raises:
        FileExistsError: If something is there, unless it is a folder and may be overwritten.
    """
    target = Path(folder).resolve()
    if target.exists() and not (overwrite and target.is_dir()):
        how = "pass overwrite=True to replace it" if target.is_dir() else "it is a file"
        raise FileExistsError(f"{folder}: there is something already; name another folder ({how}).")
    return target


@contextmanager
def new_folder(folder: Location, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that takes a name once everything in it is on the disk, if nothing goes wrong before.

    What goes wrong or interrupts leaves the place as it was. A former folder is moved aside, and deleted once the new
    one is in its place; a process that is killed between these two moves leaves it whole, as `.NAME.*.former`.

    Args:
        folder: The name; folders above it are made.
        overwrite: Whether it may replace a folder, with all that is in there.

    Raises:
        FileExistsError: If something is there that it may not replace.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as above:
        ...     with new_folder(f"{above}/model") as scratch:
        ...         _ = (scratch / "a.txt").write_text("a")
        ...     sorted(path.name for path in Path(above).rglob("*"))
        ['a.txt', 'model']
    """
    target = check_target(folder, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name}.{secrets.token_hex(8)}"
    scratch, former = target.with_name(f"{name}.tmp"), target.with_name(f"{name}.former")
    scratch.mkdir()
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            flush(path)
        check_target(folder, overwrite)  # somebody may have been quicker
        try:
            if target.exists():
                target.rename(former)
            scratch.rename(target)
        except BaseException:
            if former.exists() and not target.exists():
                former.rename(target)
            raise
        flush(target.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
