"""The benchmarks of time, memory and FLOPs at a tiny size."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from scripts import BENCHMARKS, ROOT, run_script
from tokenizing import byte_llama, byte_tokenizer


@pytest.mark.slow
def test_step_costs(tmp_path: Path) -> None:
    """Two images: the ratios of FLOPs, gradients and optimizer state do not need more."""
    results = tmp_path / "costs.json"
    run_script(BENCHMARKS / "step_costs.py", "--batch", "2", "--results", results, folder=tmp_path)
    counted = json.loads(results.read_text())["results"]
    for quantity, dense in counted["dense"].items():
        assert 0 < counted["wasi"][quantity] < dense, quantity
    state = ("gradient_bytes", "optimizer_bytes")
    assert sum(counted["wasi"][key] for key in state) < 0.3 * sum(counted["dense"][key] for key in state)


@pytest.mark.slow
def test_cost_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny sizes: all sweeps are run once, kept and drawn; the closed form counts what the estimate counts."""
    pytest.importorskip("matplotlib")
    cost_curves = importlib.import_module("cost_curves")
    results = tmp_path / "curves.json"
    arguments = ["--quick", "--rounds", "1", "--results", str(results)]
    cost_curves.main(arguments)
    entries = json.loads(results.read_text())
    assert sorted(entry["sweep"] for entry in entries.values()) == ["activations", "batch", "image", "rank", "tokens"]
    for entry in entries.values():
        assert "versions" in entry["environment"]
        for point in entry.get("points", ()):
            assert set(point["gains"]) == set(entry["crossovers"]) >= {"step", "inference", "peak_memory"}
            assert len(point["wasi"]["step_seconds"]) == len(point["dense"]["inference_seconds"]) == 1
    ranks = next(entry for entry in entries.values() if entry["sweep"] == "rank")
    # q, k, v, o: 2 K d for d^2; fc1, fc2: 5 K d for 4 d^2; in all as many as dense at K = 2/3 d, but for the rest
    assert ranks["crossovers"]["inference_flops"]["at"] == [pytest.approx(2 / 3, abs=0.01)]
    counted = next(entry for entry in entries.values() if entry["sweep"] == "activations")
    for form in counted["forms"]:
        for part in (form["inputs"], form["inputs_and_rows_for_B"]):
            assert counted["dense_bytes"] / part["bytes"] == pytest.approx(part["ratio"])
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cost_curves.main(arguments) == entries
    assert capsys.readouterr().out.count("finished before") == len(entries)


@pytest.mark.parametrize(
    ("gains", "at", "pays"),
    [
        ([2, 2 / 3, 0.5], [0.5], "up to 0.5"),
        ([0.5, 2 / 3, 2], [1.0], "from 1"),
        ([0.5, 2, 0.5], [0.583, 0.917], "from 0.583, up to 0.917"),
        ([2, 3, 2], [], "everywhere from 0.25 to 1.25"),
        ([0.5, 0.9, 0.5], [], "nowhere from 0.25 to 1.25"),
    ],
)
def test_crossovers_of_cost_curves(
    gains: list[float], at: list[float], pays: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossover = importlib.import_module("cost_curves").crossover
    assert crossover([0.25, 0.75, 1.25], gains) == {"at": pytest.approx(at, abs=0.001), "pays": pays}


@pytest.mark.slow
def test_layer_overhead(tmp_path: Path) -> None:
    """This checkout against itself; a folder without the package is refused."""
    layer_overhead = importlib.import_module("layer_overhead")
    results = tmp_path / "overhead.json"
    sizes = ["--rounds", "1", "--repeats", "1", "--results", str(results)]
    content = layer_overhead.main(["--against", str(ROOT), *sizes])
    assert content == json.loads(results.read_text())
    assert content["commits"]["this"] == content["commits"]["other"]
    kinds = ["dense_forward_microseconds", "forward_microseconds", "step_seconds", "inference_seconds"]
    assert list(content["this_over_other"]) == kinds
    for kind, ratio in content["this_over_other"].items():
        (own,), (other,) = content["times"]["this"], content["times"]["other"]
        assert own[kind] > 0 and ratio == dict.fromkeys(("median", "min", "max"), own[kind] / other[kind])
    with pytest.raises(ValueError, match="must be a folder that holds wasi_peft"):
        layer_overhead.main(["--against", str(tmp_path), *sizes])


def test_ratios_are_taken_pair_by_pair() -> None:
    ratios = importlib.import_module("layer_overhead").ratios
    ours, others = [{"s": 2.0}, {"s": 3.0}, {"s": 9.0}], [{"s": 4.0}, {"s": 3.0}, {"s": 3.0}]
    assert ratios(ours, others) == {"s": {"median": 1.0, "min": 0.5, "max": 3.0}}


@pytest.mark.slow
def test_estimate_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module("estimate_accuracy")
    sizes = ["--batches", "2", "--width", "128", "--layers", "1", "--tokens", "16", "--rank", "8"]
    results = benchmark.main(["--architectures", "vit", *sizes, "--results", str(tmp_path / "results.json")])
    entries = [entry for batches in results.values() for methods in batches.values() for entry in methods.values()]
    assert len(entries) == len(benchmark.methods(8)) == 10
    assert all(abs(entry["relative_difference"]) < 0.02 for entry in entries)
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results
    assert "wasi_subspace" in capsys.readouterr().out


@pytest.fixture
def tiny_workload(tiny_llama: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a small language model among the workloads of the benchmarks."""
    workloads = importlib.import_module("workloads")

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "labels": tokens.clone()}

    tiny = {"tiny": workloads.Workload(tiny_llama, batch, None, None, 0.6, 8)}
    for name in ("steps", "step_bounds", "inference_time"):
        monkeypatch.setattr(importlib.import_module(name), "WORKLOADS", tiny)
    return "tiny"


@pytest.mark.parametrize("run", ["inference", "prefill"])
def test_what_runs_under_autocast_sees_it(run: str) -> None:
    module = importlib.import_module("inference_time")
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, **_: Any) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))

    batch = {"input_ids": torch.zeros(1, 1)}
    module.under_autocast(getattr(module, run), Probe(), batch)
    getattr(module, run)(Probe(), batch)
    assert seen == [True, False]


@pytest.mark.slow
def test_steps_and_bounds(tiny_workload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, results = importlib.import_module("steps"), tmp_path / "steps.json"
    content = module.main(["--workloads", "tiny", "--rounds", "1", "--results", str(results)])
    assert content == json.loads(results.read_text())
    entries = content[tiny_workload]["results"]
    assert list(entries) == [f"{name}{suffix}" for name in module.VARIANTS for suffix in ("", ", bf16")]
    for form in ("residual", "wasi"):
        peaks = [entries[name]["peak_bytes"] for name in ("full", f"{form} exact", f"{form} fast", f"{form} small")]
        assert peaks == sorted(peaks, reverse=True)
    assert entries["residual exact"]["kept_share"] < entries["residual dense exact"]["kept_share"]
    for row, entry in entries.items():
        assert list(entry["step_speedup"]) == list(module.BASELINES) and min(entry["step_speedup"].values()) > 0
        assert entry["step_speedup"].get(row, 1) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| full, bf16 | ")]
    assert row.count("|") == 3 + 3 + 4 + 1 and " 1.00x |" in row
    bounds = tmp_path / "bounds.json"
    importlib.import_module("step_bounds").main(["--workloads", "tiny", "--rounds", "1", "--results", str(bounds)])
    for row in ("residual fast", "wasi fast"):
        at_peak = json.loads(bounds.read_text())[tiny_workload]["results"][row]["at_peak"]
        assert sum(at_peak.values()) == pytest.approx(entries[row]["peak_bytes"], rel=0.15)


def test_only_known_variants_are_built(tiny_workload: str) -> None:
    workloads = importlib.import_module("workloads")
    for variant in ("wasi", "lora exact", "residual middle", "wasi core factor exact"):
        with pytest.raises(ValueError, match="a variant must be full, lora"):
            workloads.build(variant, workloads.WORKLOADS["smollm2"])


def test_inference_time(tiny_workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = importlib.import_module("inference_time"), tmp_path / "inference.json"
    cases = {
        "reading": (tiny_workload, None, module.inference, True, None),
        "prefill": (tiny_workload, None, module.prefill, False, None),
        "writing": (tiny_workload, 1, module.generate, False, 1),
    }
    monkeypatch.setattr(module, "CASES", cases)
    content = module.main(["--rounds", "1", "--no-compile", "--results", str(results)])
    assert content == json.loads(results.read_text())
    for case in cases:
        entries = content[case]["results"]
        half = [f"{name}, {precision}" for precision in ("autocast", "in bf16") for name in module.MODELS]
        assert list(entries) == [*module.MODELS, "wasi, slow layers dense", *half]
        assert all(len(entry["seconds"]) == 1 and entry["faster_than_dense"] > 0 for entry in entries.values())
        assert all(0 < ratio < 1 for ratio in entries["wasi, slow layers dense"]["merged"].values())


@pytest.mark.slow
def test_export_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    module, results = importlib.import_module("export_inference"), tmp_path / "export.json"
    workload = module.WORKLOADS[module.WORKLOAD]
    tiny = dataclasses.replace(workload, load=ARCHITECTURES["vit"].model)
    monkeypatch.setattr(module, "WORKLOADS", {module.WORKLOAD: tiny})
    command = ["--image-size", "8", "--images", "1", "3", "--rounds", "2", "--threads", "1", "--results", str(results)]
    content = module.main(command)
    assert content == json.loads(results.read_text()) and list(content) == [f"{n} x 8 px, 1 threads" for n in (1, 3)]
    for case in content.values():
        entries = case["results"]
        assert list(entries) == ["dense, fp32", "dense, int8", "factors, fp32", "factors, int8"]
        assert all(len(entry["seconds"]) == 2 and entry["faster_than_dense"] > 0 for entry in entries.values())
        assert entries["dense, int8"]["faster_than_dense_of_its_precision"] == 1
        exact, rounded = (entries[f"factors, {name}"]["difference"] for name in ("fp32", "int8"))
        assert exact < 1e-4 < rounded


def test_export_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp by pip install xllamacpp")
    module, results = importlib.import_module("export_llama_cpp"), tmp_path / "llama.json"
    byte_llama(merges=1).save_pretrained(tmp_path / "model")
    byte_tokenizer(merges=[("a", "b")]).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(module, "smollm2_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(module, "load_mails", lambda count: [(f"{number} mail " * 99, 0) for number in range(count)])
    monkeypatch.setattr(module, "PROMPT", 20)
    command = ["--mails", "2", "--tokens", "3", "--rounds", "2", "--threads", "1", "--results", str(results)]
    content = module.main(command)
    assert content == json.loads(results.read_text()) and list(content["results"]) == list(module.VARIANTS)
    assert all(entry["difference"] < 0.2 and len(entry["written"]) == 2 for entry in content["results"].values())
    sizes = [entry["bytes"]["model.gguf"] for entry in content["results"].values()]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[4] > sizes[3]
    assert "adapter.gguf" in content["results"]["adapter on codes of 8 bits"]["bytes"]


@pytest.mark.slow
def test_prepare_checkpoint(tmp_path: Path) -> None:
    """A tiny shape: every run is there once, in a process of its own, and what it wrote is smaller."""
    results, arguments = tmp_path / "prepare.json", ("--shape", "tiny", "--folder", tmp_path / "checkpoints")
    run_script(BENCHMARKS / "prepare_checkpoint.py", *arguments, "--results", results, folder=tmp_path)
    entries = json.loads(results.read_text())
    runs = ["prepare int8", "prepare int8 with data", "prepare factors with data", "train int8", "train dense LoRA"]
    assert list(entries) == [f"tiny {run}" for run in runs]
    for entry in entries.values():
        assert entry["peak_above_idle_mib"] > 0 and entry["seconds"] > 0 and "versions" in entry["environment"]
    dense = 2 * entries["tiny prepare int8"]["shape"]["parameters"] / 2**20
    assert 0 < entries["tiny prepare int8"]["written_mib"] < dense
    assert len(entries["tiny train int8"]["step_seconds"]) == len(entries["tiny train dense LoRA"]["losses"]) == 3


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    """A tiny width: packed experts are most of the weights, and both methods cover the same ones."""
    results = tmp_path / "experts.json"
    sizes = ["--hidden-size", "96", "--samples", "2", "--tokens", "16", "--rounds", "1"]
    run_script(BENCHMARKS / "experts.py", *sizes, "--results", results, folder=tmp_path)
    measured = json.loads(results.read_text())["results"]
    shares = {name: entry["covered_share"] for name, entry in measured.items()}
    assert shares["lora"] == pytest.approx(shares["residual"]) == pytest.approx(shares["factors"])
    assert shares["lora, linear layers"] == pytest.approx(shares["residual, linear layers"])
    assert shares["residual, linear layers"] < 0.1 * shares["residual"]
    assert all(entry["peak_bytes"] > entry["stored_bytes"] for entry in measured.values())
    assert measured["residual"]["stored_bytes"] < 0.6 * measured["full"]["stored_bytes"]
    assert set(measured["residual"]["step_speedup"]) == {"full", "lora"}
