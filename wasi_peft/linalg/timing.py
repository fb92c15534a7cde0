"""How long an operation takes on a device that works ahead of the program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


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
