"""Measured memory: what the allocator really handed out while something ran."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_LEVEL = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class PeakMemory:
    """Tracked allocator memory of a call, relative to what existed when it started.

    `peak_bytes` is the most that was held on top at any moment, `left_bytes` what is still held afterwards. Tensors
    from before the call that it frees may go unnoticed on the CPU: let the function create what it measures.
    """

    peak_bytes: int
    left_bytes: int


@contextmanager
def profiler(**options: Any) -> Iterator[torch.profiler.profile]:
    """The profiler of the CPU, which else logs every start and stop; a level that the user has set stays."""
    quiet = _LEVEL not in os.environ
    if quiet:
        os.environ[_LEVEL] = "99"
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
            yield profile
    finally:
        if quiet:
            del os.environ[_LEVEL]


def measure_peak_memory(function: Callable[[], Any]) -> PeakMemory:
    """Run a function and follow every tensor allocation on the CPU (or the current CUDA device).

    The count is deterministic for the same work, unlike the size of the process. On the CPU it comes from the memory
    events of `torch.profiler`, on CUDA from the caching allocator.

    Example:
        >>> measured = measure_peak_memory(lambda: torch.ones(1000).sum())
        >>> 4000 <= measured.peak_bytes < 8000
        True
    """
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return PeakMemory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
    with profiler(profile_memory=True) as profile:
        function()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return PeakMemory(peak, held)
