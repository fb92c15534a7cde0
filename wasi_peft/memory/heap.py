"""glibc's malloc in processes that train on a CPU: settings under which a freed block is used again.

torch asks for blocks at aligned addresses. In glibc 2.36 what is cut off at their ends goes to caches of small
blocks, and as long as it is there or in use, a freed block of megabytes cannot be joined with its neighbours: it is
too short for the next one of its size, which then comes from new memory. Without those caches it is joined, at no cost
that was measured.

What is freed stays with the process, whatever its size, instead of being given back and asked for again step by step:
where it is used again at once, that costs no memory, and saves the system from handing out zeroed pages.

The settings are read when a process starts.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
SETTINGS: Mapping[str, str] = {
    "glibc.malloc.tcache_count": "0",
    "glibc.malloc.mxfast": "0",
    "glibc.malloc.mmap_threshold": str(2**33),
    "glibc.malloc.trim_threshold": str(2**34),
}


def with_lean_heap(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process with these settings; other C libraries ignore them.

    Args:
        environment: Of this process. What it sets itself stays as it is.

    Example:
        >>> with_lean_heap({"GLIBC_TUNABLES": "glibc.malloc.mxfast=64"})["GLIBC_TUNABLES"].split(":")[:2]
        ['glibc.malloc.mxfast=64', 'glibc.malloc.tcache_count=0']
    """
    given = [part for part in environment.get(VARIABLE, "").split(":") if part]
    known = {part.partition("=")[0] for part in given}
    added = [f"{name}={value}" for name, value in SETTINGS.items() if name not in known]
    return {**environment, VARIABLE: ":".join([*given, *added])}
