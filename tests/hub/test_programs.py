"""Programs for other runtimes answer as the model does, whatever the number of samples and tokens."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, logits

from wasi_peft import WasiConfig, compress, export
from wasi_peft.hub import cases
from wasi_peft.hub import onnx as onnx_format
from wasi_peft.hub.export import FORMATS

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in onnx_format.OnnxFormat.packages),
    reason="pip install 'wasi_peft[onnx]'",
)
TINY = 1e-5


def factored(name: str) -> Any:
    return compress(ARCHITECTURES[name].model(), WasiConfig(residual=None, weight_rank=3))


def batch_of(name: str, samples: int, tokens: int = 7) -> dict[str, torch.Tensor]:
    batch = {key: value for key, value in ARCHITECTURES[name].batch(samples).items() if key != "labels"}
    batch = {key: value if value.is_floating_point() else value[:, :tokens] for key, value in batch.items()}
    return {**batch, "decoder_input_ids": batch["input_ids"][:, :3]} if name == "t5" else batch


@torch.no_grad()
def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def run_onnx(path: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})[0])


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "t5"])
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnx

    model = factored(name)
    assert export(model, tmp_path / "onnx", "onnx") < TINY
    path = tmp_path / "onnx" / "model.onnx"
    for samples, tokens in ((1, 7), (5, 4)):
        batch = batch_of(name, samples, tokens)
        assert relative(run_onnx(path, batch), logits(model, batch)) < TINY
    graph = onnx.load(path).graph
    sizes = [list(tensor.dims) for tensor in graph.initializer]
    assert [16, 3] in sizes and [3, 16] in sizes and [16, 24] not in sizes, "factors, none multiplied out"
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["config.json", "model.onnx"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "t5"])
def test_onnx_of_dense_models(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].model()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert export(model, tmp_path / "onnx", "onnx") < TINY


@needs_onnx
@pytest.mark.slow
def test_onnx_in_8_bits(tmp_path: Path) -> None:
    import onnx

    model = factored("vit")
    difference = export(model, tmp_path / "onnx", "onnx", int8=True)
    assert 1e-4 < difference < 0.3
    path = tmp_path / "onnx" / "model.onnx"
    batch = batch_of("vit", 4)
    assert relative(run_onnx(path, batch), logits(model, batch)) < 0.3
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") == 2 * 12 + 1
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["config.json", "model.onnx"]
    with pytest.raises(ValueError, match=r"must answer as the model does, to 0\.0001"):
        export(model, tmp_path / "other", "onnx", int8=True, tolerance=1e-4)
    assert not (tmp_path / "other").exists()


@needs_onnx
def test_what_onnxruntime_answers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "largest_difference", lambda answers, case: 0.01)
    with pytest.raises(ValueError, match=r"got a difference of 0\.01"):
        export(torch.nn.Linear(3, 2), tmp_path / "onnx", "onnx", batch=torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_a_model_that_cannot_be_converted_is_one_sentence(tmp_path: Path) -> None:
    class Uneven(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x[:, :2]

    with pytest.raises(ValueError, match=r"torch\.export cannot trace Uneven: "):
        export(Uneven(), tmp_path / "onnx", "onnx", batch=torch.ones(2, 3))


@pytest.mark.parametrize(
    "format,missing", [(name, package) for name, cls in FORMATS.items() for package in cls.packages]
)
def test_missing_packages_are_named_before_anything_is_written(
    format: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name) or True)
    with pytest.raises(ImportError, match=rf"format '{format}' needs {missing}: pip install 'wasi_peft\[{format}\]'"):
        export(torch.nn.Linear(1, 1), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


RUN = """
import sys
sys.modules["wasi_peft"] = sys.modules["peft"] = sys.modules["transformers"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(**torch.load(sys.argv[2]))["logits"], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama", "t5"])
def test_torch_programs_need_torch_alone(name: str, tmp_path: Path) -> None:
    model = factored(name)
    assert export(model, tmp_path / "program", "torch") < TINY
    batch = batch_of(name, 5, 4)
    torch.save(batch, tmp_path / "batch.pt")
    paths = [str(tmp_path / part) for part in ("program/model.pt2", "batch.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", RUN, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert relative(torch.load(paths[2]), logits(model, batch)) < TINY
