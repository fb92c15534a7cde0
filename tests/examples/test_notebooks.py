"""The notebooks run from top to bottom, at a tiny size; what they show as they are stored names no machine."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from scripts import ROOT
from tokenizing import byte_llama, byte_tokenizer

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = {path.stem: path for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path, data: Path) -> str:
    """Runs all cells but the installation in an empty folder; returns what they printed."""
    settings = {
        "WASI_MODEL": model, "WASI_DATASET": data, "WASI_STEPS": 3, "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1,
        "PYTHONPATH": ROOT, "HF_DATASETS_CACHE": folder / "cache", "ACCELERATE_USE_CPU": "true",
        "IPYTHONDIR": folder / "ipython", "JUPYTER_RUNTIME_DIR": folder / "runtime",
    }  # fmt: skip
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_vision_transformer(tmp_path: Path, split_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, num_labels=3
    )
    model = tmp_path / "model"
    transformers.Dinov2ForImageClassification(config).save_pretrained(model)
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    text = execute("vision_transformer", tmp_path, monkeypatch, model, split_images)
    assert "accuracy on 12 test images: " in text and "model of its own" in text


@pytest.mark.slow
def test_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    byte_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rows = [f"Subject: {word}\n\nyes, I do" for word in "abcdefghijklmnopqrst"]
    data.mkdir()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(data / "train.parquet")
    text = execute("language_model", tmp_path, monkeypatch, model, data)
    assert "perplexity of 2 other mails: " in text and "model of its own" in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs(name: str) -> None:
    """Those of one run from top to bottom, with plots and without a place, a warning or an error."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = [cell for cell in code if "skip-execution" not in cell.metadata.get("tags", ())]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    outputs = [output for cell in run for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    text = NOTEBOOKS[name].read_text()
    assert len(text) < 600_000 and "/tmp" not in text and str(Path.home()) not in text
