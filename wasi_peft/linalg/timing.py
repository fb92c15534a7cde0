"""How long an operation takes on a device that works ahead of the program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

# of what this thread computes; on Windows it moves in steps of 16 ms
_thread_clock = time.perf_counter if sys.platform == "win32" else time.thread_time


def timed_in_one_thread(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, on a CPU by one thread, without those in which other processes had its core.

    Several threads that share their cores with other processes wait for each other; then times say nothing.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return timed(task, device)
    torch.set_num_threads(1)
    try:
        start = _thread_clock()
        task()
        return _thread_clock() - start
    finally:
        torch.set_num_threads(threads)


def timed(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, from when the device has done all before it until it has done this."""
    _wait_for(device)
    start = time.perf_counter()
    task()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
