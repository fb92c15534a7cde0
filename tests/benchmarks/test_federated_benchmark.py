"""The federated benchmark, at a tiny size."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizing import save_byte_bert


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its module, for a tiny BERT and mails whose class is easily told."""
    folder = tmp_path / "bert"
    save_byte_bert(folder)
    module, spam = importlib.import_module("federated"), importlib.import_module("spam")
    mails = [(f"{'zzz' if index % 3 == 0 else 'aaa'} {index % 7}", int(index % 3 == 0)) for index in range(110)]
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spam, "load_mails", lambda count: mails[:count])
    for name, value in {"HELD_OUT": 10, "TEST": 20, "TOKENS": 8, "BATCH": 4}.items():
        monkeypatch.setattr(module, name, value)
    for script in (module, spam):
        monkeypatch.setattr(script, "minilm_folder", lambda: folder)
    module.items_of.cache_clear()
    return module


def test_every_method_learns_and_its_bytes_are_counted(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "LAST_BLOCKS", {"wasi budgets": [2, 2, 2, 1]})
    results = tmp_path / "federated.json"
    sizes = ("--train", "80", "--rounds", "3", "--steps", "4", "--dirichlet", "1", "--results", str(results))
    benchmark.main(["--lr", "1e-2", *sizes])
    entries = {entry["settings"]["method"]: entry for entry in benchmark.read_json(results).values()}
    assert list(benchmark.RANKS) == sorted(entries, key=list(benchmark.RANKS).index)
    for method, entry in entries.items():
        assert sum(entry["mails"]) == 80 and sum(entry["spam"]) == 27
        assert entry["test_accuracy"] > entry["majority"], method
    budgets, wasi = entries["wasi budgets"], entries["wasi"]
    assert wasi["mib_up_a_round"] == wasi["mib_down_a_round"] == pytest.approx(budgets["mib_down_a_round"])
    assert budgets["mib_up_a_round"] < wasi["mib_up_a_round"]
    frozen = entries["wasi frozen"]  # R goes down once
    assert frozen["mib_up_a_round"] < frozen["mib_down_a_round"] < 2 * frozen["mib_up_a_round"]
    capsys.readouterr()
    benchmark.main(["--summarise", *sizes])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" ranks=")[0] for row in rows[2:]] == [f"| {method}" for method in benchmark.RANKS]


def test_products_of_lora_are_averaged_and_b_alone_without_a_loss(benchmark: Any) -> None:
    left, right = "layer.lora_B.weight", "layer.lora_A.weight"
    states = [{left: torch.randn(6, 2), right: torch.randn(2, 5), "head": torch.randn(3)} for _ in range(2)]
    expected = 0.25 * states[0][left] @ states[0][right] + 0.75 * states[1][left] @ states[1][right]
    U, energies, Vh = torch.linalg.svd(expected)
    result = benchmark.averaged_lora("lora products", states, [0.25, 0.75])
    torch.testing.assert_close(result[left] @ result[right], U[:, :2] * energies[:2] @ Vh[:2])
    torch.testing.assert_close(result["head"], 0.25 * states[0]["head"] + 0.75 * states[1]["head"])
    states[1][right] = states[0][right]
    result = benchmark.averaged_lora("lora frozen", states, [0.5, 0.5])
    torch.testing.assert_close(result[left] @ result[right], 0.5 * (states[0][left] + states[1][left]) @ result[right])


def test_labels_are_uneven_and_every_client_has_enough(benchmark: Any) -> None:
    labels = [int(index % 3 == 0) for index in range(300)]
    parts = benchmark.split_by_label(labels, 4, 0.3, 0, 16)
    assert sorted(index for part in parts for index in part) == list(range(300))
    shares = [sum(labels[index] for index in part) / len(part) for part in parts]
    assert min(map(len, parts)) >= 16 and max(shares) - min(shares) > 0.2
    assert parts == benchmark.split_by_label(labels, 4, 0.3, 0, 16) != benchmark.split_by_label(labels, 4, 0.3, 1, 16)
    with pytest.raises(ValueError, match="4 clients of 80 mails at least cannot be drawn from 300"):
        benchmark.split_by_label(labels, 4, 0.3, 0, 80)
