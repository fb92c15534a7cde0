"""Files that appear as a whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file through another one, which takes its place when it is complete and on disk.

    The other one lies in the same folder under a name that nobody can foresee, and is gone after a failure.

    Args:
        path: Of the file; one that is there stays as it was until then.

    Yields:
        Where to write.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> path = getfixture("tmp_path") / "numbers.txt"
        >>> with whole_file(path) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('1 2 3', ['numbers.txt'])
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    flush(target.parent)


def flush(path: str | os.PathLike[str]) -> None:
    """Have a file's contents, or a folder's names, on disk before anything that comes after."""
    if os.path.isdir(path) and not hasattr(os, "O_DIRECTORY"):
        return  # where folders cannot be opened, the system keeps their names by itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
