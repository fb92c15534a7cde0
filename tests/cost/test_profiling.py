"""The memory measurement on work whose size is known."""

from __future__ import annotations

import os

import pytest
import torch

from wasi_peft.cost.peak import PeakMemory, measure_peak_memory

KIB = 1024
LEVEL = "KINETO_LOG_LEVEL"


def test_peak_counts_what_lives_at_the_same_time() -> None:
    def work() -> None:
        first = torch.zeros(64 * KIB, dtype=torch.uint8)
        second = torch.zeros(16 * KIB, dtype=torch.uint8)
        del first
        third = torch.zeros(32 * KIB, dtype=torch.uint8)
        del second, third

    assert measure_peak_memory(work) == PeakMemory(peak_bytes=80 * KIB, left_bytes=0)


def test_peak_of_tensors_one_after_the_other() -> None:
    def work() -> None:
        for _ in range(5):
            torch.zeros(8 * KIB, dtype=torch.uint8)

    assert measure_peak_memory(work) == PeakMemory(peak_bytes=8 * KIB, left_bytes=0)


def test_left_bytes_of_a_kept_tensor() -> None:
    kept = [torch.zeros(24 * KIB, dtype=torch.uint8)]
    assert measure_peak_memory(lambda: kept.append(torch.zeros(4 * KIB, dtype=torch.uint8))).left_bytes == 4 * KIB


def test_the_same_work_gives_the_same_numbers() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    x = torch.ones(128, 32)

    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad()

    step()
    first, second = measure_peak_memory(step), measure_peak_memory(step)
    assert first == second
    # the input of GELU and its output are both alive when backward starts
    assert first.peak_bytes >= 2 * 128 * 64 * 4
    assert first.left_bytes == 0


def test_errors_of_the_function_come_through() -> None:
    def fail() -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        measure_peak_memory(fail)
    assert measure_peak_memory(lambda: torch.zeros(KIB, dtype=torch.uint8)).peak_bytes == KIB


@pytest.mark.parametrize("level", [None, "2"])
def test_the_profilers_level_is_the_callers(level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL, raising=False)
    if level is not None:
        monkeypatch.setenv(LEVEL, level)
    measure_peak_memory(lambda: torch.ones(3))
    assert os.environ.get(LEVEL) == level

    def fail() -> None:
        assert os.environ[LEVEL] == (level or "99")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        measure_peak_memory(fail)
    assert os.environ.get(LEVEL) == level
