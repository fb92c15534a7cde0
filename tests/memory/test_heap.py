"""Settings of malloc for processes that train."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from wasi_peft.memory.heap import SETTINGS, VARIABLE, with_lean_heap

# blocks at aligned addresses that come and go, and small ones that stay, as a step makes them
PROGRAM = """
import ctypes, random
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def aligned(size):
    block = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(block), 64, size) == 0
    ctypes.memset(block, 1, size)
    return block.value
random.seed(0)
libc.free(libc.malloc(2**25 - 2**16))  # from here on blocks up to this size are not mapped
small, peak = [], 0
for step in range(40):
    blocks = [aligned(random.choice([2**20, 3 * 2**20, 2**21])) for _ in range(8)]
    small += [aligned(96) for _ in range(8)]
    for block in blocks:
        libc.free(block)
    small += [libc.malloc(random.randrange(16, 112)) for _ in range(16)]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_what_is_set_already_stays() -> None:
    found = with_lean_heap({"HOME": "/", VARIABLE: "glibc.malloc.mxfast=64:glibc.rtld.nns=4"})
    parts = found.pop(VARIABLE).split(":")
    assert found == {"HOME": "/"}
    assert parts[:2] == ["glibc.malloc.mxfast=64", "glibc.rtld.nns=4"]
    assert {part.partition("=")[0] for part in parts[2:]} == set(SETTINGS) - {"glibc.malloc.mxfast"}
    assert with_lean_heap(with_lean_heap({})) == with_lean_heap({})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_blocks_are_used_again() -> None:
    """At most 24 MiB are in use at a time."""

    def peak(environment: dict[str, str]) -> float:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout) / 1024

    plain = {name: value for name, value in os.environ.items() if name != VARIABLE}
    lean = peak(with_lean_heap(plain))
    assert lean < 60
    version = tuple(map(int, platform.libc_ver()[1].split(".")[:2]))
    if version < (2, 38):
        assert peak(plain) > 3 * lean
