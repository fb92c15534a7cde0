"""OpenVINO answers as the model does, whatever the number of samples and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, logits

from wasi_peft import WasiConfig, compress, export
from wasi_peft.hub import cases

openvino = pytest.importorskip("openvino", reason="pip install 'wasi_peft[openvino]'")
pytest.importorskip("onnxscript", reason="pip install 'wasi_peft[openvino]'")
TINY = 1e-5


def compiled(folder: Path) -> Any:
    return openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def batch_of(name: str, samples: int, tokens: int) -> dict[str, torch.Tensor]:
    batch = ARCHITECTURES[name].inputs(samples)
    return {key: value if value.is_floating_point() else value[:, :tokens] for key, value in batch.items()}


def relative(model: Any, runtime: Any, name: str, samples: int, tokens: int) -> float:
    batch = batch_of(name, samples, tokens)
    found = torch.from_numpy(runtime({key: value.numpy() for key, value in batch.items()})["logits"])
    expected = logits(model, batch)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_any_number_of_samples_and_tokens(name: str, tmp_path: Path) -> None:
    model = compress(ARCHITECTURES[name].model(), WasiConfig(residual=None, weight_rank=3))
    assert export(model, tmp_path / "openvino", "openvino") < TINY
    assert sorted(path.name for path in (tmp_path / "openvino").iterdir()) == ["config.json", "model.bin", "model.xml"]
    runtime = compiled(tmp_path / "openvino")
    for samples, tokens in ((1, 7), (5, 4)):
        assert relative(model, runtime, name, samples, tokens) < TINY


@pytest.mark.slow
def test_codes_of_the_residual_stay(tmp_path: Path) -> None:
    model = compress(ARCHITECTURES["vit"].model(), WasiConfig(residual_product="restored"))
    difference = export(model, tmp_path / "openvino", "openvino", int8=True)
    assert TINY < difference < 0.05, "the head and the patch embedding were in float32"
    graph = openvino.Core().read_model(tmp_path / "openvino" / "model.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    codes = [torch.from_numpy(node.data.copy()) for node in constants if node.get_element_type().to_string() == "i8"]
    assert len(codes) == 12 + 1
    own = model.vit.layers[0].mlp.fc1.frozen.codes
    assert any(torch.equal(each, own) or torch.equal(each, own.t()) for each in codes)
    assert relative(model, compiled(tmp_path / "openvino"), "vit", 5, 0) < 0.05
    with pytest.raises(ValueError, match="must answer as the model does, to 1e-06"):
        export(model, tmp_path / "other", "openvino", int8=True, tolerance=1e-6)
    assert not (tmp_path / "other").exists()


def test_what_it_answers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "largest_difference", lambda answers, case: 0.01)
    with pytest.raises(ValueError, match=r"got a difference of 0\.01"):
        export(torch.nn.Linear(3, 2), tmp_path / "openvino", "openvino", batch=torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []
