"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
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
        how = "pass overwrite=True to replace it, or --overwrite" if target.is_dir() else "it is a file"
        raise FileExistsError(f"{folder}: there is something already; name another folder ({how}).")
    return target


def check_apart(output: Location, sources: Mapping[str, Location]) -> None:
    """Refuse to write to where what is read lies: a folder that is replaced takes all that is in it along.

    Args:
        output: The folder that is to be written.
        sources: Folders and files that are read, by their names in the sentence, "the adapter's"; a hub id is neither
            and left out.

    Raises:
        ValueError: If the output is one of them or has it inside.
    """
    target = Path(output).resolve()
    for kind, source in sources.items():
        place = Path(source).resolve()
        if place.exists() and (place == target or target in place.parents):
            raise ValueError(f"{os.fspath(output)}: the output must be another folder than {kind}, and not around it.")


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
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        flush_all(scratch)
        check_target(folder, overwrite)  # somebody may have been quicker
        move_into_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Have a folder on the disk, with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def move_into_place(scratch: Path, target: Path, workplace: Path | None = None) -> None:
    """Give a folder a name beside it; a former folder of that name is deleted after, and put back if this fails.

    Args:
        scratch: The folder, on the disk.
        target: Its new name; what is there is the caller's to give up.
        workplace: A folder of no use without `scratch`, which is in it. It loses its name before anything is deleted.
    """
    former = target.with_name(f".{target.name}.{secrets.token_hex(8)}.former")
    spent = [former]
    try:
        if target.exists():
            target.rename(former)
        scratch.rename(target)
    except BaseException:
        if former.exists() and not target.exists():
            former.rename(target)
        raise
    if workplace is not None:
        spent.append(_out_of_use(workplace))
    flush(target.parent)
    for folder in spent:
        shutil.rmtree(folder, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder; what an interrupt leaves of it has another name."""
    shutil.rmtree(_out_of_use(folder), ignore_errors=True)


def _out_of_use(folder: Path) -> Path:
    return folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp"))
