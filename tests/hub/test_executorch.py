"""ExecuTorch answers as the model does, for batches up to the one that was exported with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, logits

from wasi_peft import WasiConfig, compress, export
from wasi_peft.hub import cases

runtime = pytest.importorskip("executorch.runtime", reason="pip install 'wasi_peft[executorch]'")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_smaller_batches(name: str, tmp_path: Path) -> None:
    model = compress(ARCHITECTURES[name].model(), WasiConfig(residual=None, weight_rank=3))
    largest = ARCHITECTURES[name].inputs(3)
    assert export(model, tmp_path / "executorch", "executorch", batch=largest) < 1e-5
    assert [path.name for path in (tmp_path / "executorch").iterdir()] == ["model.pte"]
    method = runtime.Runtime.get().load_program(tmp_path / "executorch" / "model.pte").load_method("forward")
    for samples, tokens in ((1, 7), (3, 4)):
        batch = {
            key: value[:samples] if value.is_floating_point() else value[:samples, :tokens]
            for key, value in largest.items()
        }
        (found,) = method.execute([value.contiguous() for value in batch.values()])
        expected = logits(model, batch)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.slow
def test_what_it_answers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "largest_difference", lambda answers, case: 0.01)
    with pytest.raises(ValueError, match=r"got a difference of 0\.01"):
        export(torch.nn.Linear(3, 2), tmp_path / "executorch", "executorch", batch=torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []
