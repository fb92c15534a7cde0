"""Models of 16 bits: all that trains is held in float32, the vectors of the model too; it computes as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model

from wasi_peft import WasiConfig
from wasi_peft.tuner.vectors import Lowered

DTYPES = [torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, Any]] = {
    "residual": {"residual_product": "restored"},
    "factors": {"residual": None, "weight_rank": 6, "base_weight": "keep"},
}
either = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
models = pytest.mark.parametrize("name", ["llama", "vit", "dinov2"])


def batch_of(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in architecture.batch(4).items()
    }


def adapted(name: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    return get_peft_model(ARCHITECTURES[name].model().to(dtype), WasiConfig(**options))


@models
@dtypes
@either
def test_all_that_trains_is_float32_and_trains(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, batch = adapted(name, dtype, options).train(), batch_of(ARCHITECTURES[name], dtype)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    vectors = {key: value for key, value in trained.items() if "wasi_" not in key}
    assert vectors
    before = {key: value.detach().clone() for key, value in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [key for key, value in trained.items() if not torch.equal(value, before[key])]
    assert {*vectors} <= {*moved}
    assert not any(value.dtype == torch.float16 and value.requires_grad for value in model.parameters())


@models
@dtypes
def test_the_base_model_answers_in_its_own_vectors(name: str, dtype: torch.dtype) -> None:
    batch = batch_of(ARCHITECTURES[name], dtype)
    with torch.no_grad():
        expected = ARCHITECTURES[name].model().to(dtype).eval()(**batch).logits
    model = adapted(name, dtype, {"residual": "exact"}).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, expected)
    plain = model.unload()
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert not any(Lowered.of(module) for module in plain.modules())


@dtypes
@either
def test_copies_and_files(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    model, batch = adapted("llama", dtype, options).train(), batch_of(architecture, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model(**batch).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model().to(dtype), tmp_path).eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)


def test_a_pass_that_fails_leaves_the_float32_vectors() -> None:
    model = adapted("llama", torch.float16, OPTIONS["residual"])
    norm = model.base_model.model.model.norm
    vector = norm.weight
    with pytest.raises(TypeError):
        norm(None, None, None)
    assert norm.weight is vector and vector.dtype == torch.float32
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    norm(torch.ones(2, norm.weight.numel(), dtype=torch.float16))
    handle.remove()
    assert seen == [torch.float16] and norm.weight is vector


def test_without_autocast_of_adapters_nothing_is_raised() -> None:
    base = ARCHITECTURES["llama"].model().half()
    model = get_peft_model(base, WasiConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}
