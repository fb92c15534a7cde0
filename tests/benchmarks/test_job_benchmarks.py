"""The benchmarks of whole jobs, of few bits, of spam and of a GPU, at a tiny size or on entries made up."""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers


def job_entries(whole_job: Any, args: Any) -> dict[str, Any]:
    """Every job of the rounds asked for, with figures that name their method."""
    base = {"idle": 0.0, "lora": 10.0, "lora, checkpointing": 20.0, "residual small": 5.0}
    entries = {}
    for job in whole_job.every_job(args):
        seconds = base[job["method"]] + job["seed"]
        parts = {f"{part}_seconds": seconds / 5 for part in whole_job.PARTS}
        size = {"idle": 100, "lora": 500, "lora, checkpointing": 300, "residual small": 200}[job["method"]]
        quality = {"wall_seconds": seconds, "quality": 0.5 + job["seed"]}
        entries[whole_job.key_of(job)] = {"peak_bytes": size * whole_job.MIB, **parts, **quality}
    return entries


def test_whole_jobs_are_compared_round_by_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_job = importlib.import_module("whole_job")
    methods = ["lora", "lora, checkpointing", "residual small"]
    command = ["--models", "dinov2", "--dtype", "float32", "--methods", *methods, "--rounds", "3"]
    args = whole_job.parse(command)
    jobs = whole_job.every_job(args)
    assert [job["method"] for job in jobs if job["seed"] == 1] == ["idle", *methods[1:], methods[0]]
    results = tmp_path / "jobs.json"
    results.write_text(json.dumps(job_entries(whole_job, args)))
    whole_job.main([*command, "--results", str(results)])  # nothing is missing
    assert capsys.readouterr().out.count("finished before") == len(jobs) == 12
    whole_job.main([*command, "--results", str(results), "--summarise"])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    # seconds 5, 6, 7 against 10, 11, 12; 200 - 100 MiB against 400 and 200 above idle
    assert row == [
        *("dinov2, residual small, float32", "3", "6.0", *["1.2"] * 5, "0.55", "100", "0.25", "0.50", "1.5000"),
    ]


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "lora, checkpointing, stepping",
        "residual small",
        "residual 16 exact",
        "residual small, 544 tokens, stepping",
        "factors",
    ],
)
def test_a_whole_job(
    method: str, tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_job = importlib.import_module("whole_job")
    ramps = (torch.arange(24)[None] + torch.arange(52)[:, None]) % 50
    monkeypatch.setattr(whole_job, "load", lambda job: (tiny_llama(), ramps[:40], ramps[40:]))
    sizes = {"images": 0, "steps": 5, "repair_steps": 2, "test": 12, "seed": 0}
    job = {"model": "smollm2", "method": method, "dtype": "bfloat16", "started": 0.0, **sizes}
    found = whole_job.run_job(job)
    spans = [found[f"{part}_seconds"] for part in whole_job.PARTS]
    assert min(spans) >= 0 and found["wall_seconds"] == pytest.approx(sum(spans))
    assert found["peak_bytes"] > 50 * whole_job.MIB and 1 < found["quality"] < 600
    assert "quality" not in whole_job.run_job({**job, "test": 0})


def test_idle_process_is_measured() -> None:
    whole_job = importlib.import_module("whole_job")
    found = whole_job.in_a_process({"method": "idle"})
    assert list(found) == ["peak_bytes"] and found["peak_bytes"] > 50 * whole_job.MIB


def test_a_lean_heap_is_a_setting_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_job = importlib.import_module("whole_job")
    (job, *_) = whole_job.every_job(whole_job.parse(["--models", "dinov2", "--lean-heap", "--rounds", "1"]))
    assert job["heap"] == "lean, kept" and whole_job.key_of(job).endswith(" heap=lean, kept")
    given = []

    def run(*_: Any, env: dict[str, str] | None, **__: Any) -> Any:
        given.append(env and "glibc.malloc.tcache_count=0" in env["GLIBC_TUNABLES"])
        return types.SimpleNamespace(stdout="{}")

    monkeypatch.setattr(importlib.import_module("common").subprocess, "run", run)
    whole_job.in_a_process(job)
    whole_job.in_a_process({**job, "heap": None})
    assert given == [True, None]


def test_low_bit_errors(
    tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, results = importlib.import_module("low_bit_error"), tmp_path / "errors.json"
    ramps = (torch.arange(24)[None] + torch.arange(16)[:, None]) % 50
    workloads = importlib.import_module("workloads")
    batch = {"input_ids": ramps, "labels": ramps}
    monkeypatch.setattr(
        module, "WORKLOADS", {"smollm2": workloads.Workload(tiny_llama, lambda: batch, None, None, 0.4, 8)}
    )
    monkeypatch.setitem(module.TASKS, "smollm2", lambda repeat: (tiny_llama().eval(), [], evaluate))

    @torch.inference_mode()
    def evaluate(model: Any) -> dict[str, float]:
        return {"perplexity": float(model(**batch).loss.exp())}

    content = module.main(["--models", "smollm2", "--results", str(results)])
    assert content == json.loads(results.read_text())
    layers, quality = content["smollm2"]["layers"], content["smollm2"]["quality"]
    assert len(layers) == 14 and list(quality) == ["dense", *module.WAYS]
    assert len(set(quality.values())) == 5
    for errors in layers.values():
        rounded, alone, int4 = (errors[way] for way in ("int8, rows rounded", "int8 weight alone", "int4"))
        assert alone["product"] < rounded["product"] < 0.05 < int4["product"] < 0.2
        assert alone["product, own error"] < 1e-5 < rounded["product, own error"]
        assert rounded["gradient of L"] < 1e-5 < rounded["gradient of R"] < 0.05
        rounding = errors[module.ROUNDING]
        assert rounding["nearest: one product"] < rounding["stochastic: one product"]
        assert rounding["stochastic: mean of 16"] < 0.5 * rounding["stochastic: one product"]
        assert rounding["nearest: mean of 16"] == rounding["nearest: one product"]
    text = capsys.readouterr().out
    assert "| mlp.down_proj (2) |" in text and "| worst: model.layers." in text


def test_spam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method learns which of two words a text is made of."""
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    module, results = importlib.import_module("spam"), tmp_path / "spam.json"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(module, "minilm_folder", lambda: tmp_path / "bert")

    def items(count: int) -> Any:
        labels = torch.arange(count) % 3 % 2
        made = [{"input_ids": torch.full((6,), 3 + int(label)), "labels": label} for label in labels]
        return [{**item, "attention_mask": torch.ones(6, dtype=torch.long)} for item in made]

    monkeypatch.setattr(module, "load_items", lambda count: (items(count), items(30), items(33)))
    monkeypatch.setattr(module, "in_a_process", module.run)  # where the functions above would not be known
    repaired = ("--repair-steps", "2")
    module.main(["--train", "64", "--steps", "80", "--lr", "3e-3", *repaired, "--results", str(results)])
    entries = json.loads(results.read_text())
    assert {key.split()[0] for key in entries} == {f"method={name}" for name in module.GRID}
    for entry in entries.values():
        assert entry["majority"] == pytest.approx(2 / 3) and entry["test_accuracy"] == 1
        assert entry["job_seconds"] > 0 and entry["peak_mib"] >= 0
    assert "| residual | 0.003 (1) | 1 | 1.0000 | 1.0000 | 0.6667 |" in capsys.readouterr().out


def test_the_gpu_benchmark(
    tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU it says so and writes nothing; what it would do there runs on the CPU too."""
    gpu, workloads, results = (
        importlib.import_module("gpu"),
        importlib.import_module("workloads"),
        tmp_path / "gpu.json",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(results)]) == {} and not results.exists()
    assert capsys.readouterr().out.strip() == gpu.NO_GPU
    tokens = torch.randint(0, 500, (4, 16))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    tiny = workloads.Workload(tiny_llama, lambda: batch, None, None, 0.6, 8)
    measured = gpu.measure(tiny, ["full", "lora", "residual exact", "wasi small"], 1, "cpu")
    assert len(measured) == 12 and measured["full"]["step_speedup"]["full"] == 1
    assert measured["residual exact"]["products"] and not measured["full"]["products"]
    assert measured["wasi small, base in bf16"]["peak_bytes"] < measured["full"]["peak_bytes"]
    assert gpu.table(measured).count("\n") == 1 + 12
