"""Measured memory: what the allocator really handed out while something ran."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PeakMemory:
    """Tracked allocator memory of a call, relative to what existed when it started.

    `peak_bytes` is the most that was held on top at any moment, `left_bytes` what is still held afterwards. Tensors
    from before the call that it frees may go unnoticed on the CPU: let the function create what it measures.
    """

    peak_bytes: int
    left_bytes: int


def profiler(**options: Any) -> torch.profiler.profile:
    """The profiler of the CPU, which else logs every start and stop; a level that the user has set stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options)


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
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return PeakMemory(peak, held)
