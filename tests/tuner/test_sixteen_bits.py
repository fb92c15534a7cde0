"""Models of 16 bits: all that trains is held in float32, the vectors of the model too; it computes as before."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model

from wasi_peft import WasiConfig
from wasi_peft.memory.wrapping import runner_of
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
    assert not any(runner_of(module, Lowered) for module in plain.modules())


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


def test_a_pass_that_fails_leaves_the_float32_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("vit", torch.float16, OPTIONS["residual"])
    embeddings = model.base_model.model.vit.embeddings
    vector, forward, seen = embeddings.cls_token, type(embeddings).forward, []
    errors = [None, KeyboardInterrupt, TypeError, None]

    def noting(module: Any, *args: Any, **kwargs: Any) -> Any:
        error = errors[len(seen)]
        seen.append(module.cls_token.dtype)
        if error is not None:
            raise error
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(type(embeddings), "forward", noting)
    pixels = batch_of(ARCHITECTURES["vit"], torch.float16)["pixel_values"]
    for error in errors:
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            embeddings(pixels)
        assert embeddings.cls_token is vector and vector.dtype == torch.float32 and vector.is_leaf
    assert seen == 4 * [torch.float16]


@models
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_model_that_is_cast_computes_in_its_new_dtype(name: str, target: torch.dtype) -> None:
    model = adapted(name, torch.bfloat16, OPTIONS["residual"]).eval().to(target)
    batch = batch_of(ARCHITECTURES[name], target)
    with torch.no_grad():
        assert model(**batch).logits.dtype == target
    assert {parameter.dtype for parameter in copy.deepcopy(model).unload().parameters()} == {target}


@dtypes
@pytest.mark.parametrize("bias", ["none", "wasi_only", "all"])
@either
def test_a_second_adapter(dtype: torch.dtype, bias: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(ARCHITECTURES["vit"].model().to(dtype), WasiConfig(**options, bias=bias))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path)
    model.add_adapter("fresh", WasiConfig(**options, bias=bias))
    model.add_adapter("reference", model.peft_config["default"])
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    model.add_weighted_adapter(["default", "loaded"], [0.5, 0.5], "sum")
    loaded = ".loaded."  # which PEFT leaves training, active or not
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad and loaded not in name}
    assert now == trained
    for name in ("fresh", "reference", "loaded", "sum"):
        model.set_adapter(name)
        others = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert others == {key.replace(".default", f".{name}") for key in trained}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_vectors_of_a_file_are_held_as_the_model_holds_them(
    low_cpu_mem_usage: bool, autocast: bool, tmp_path: Path
) -> None:
    get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        ARCHITECTURES["vit"].model().bfloat16(),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=autocast,
    )
    norms = {parameter.dtype for name, parameter in loaded.named_parameters() if "layernorm" in name}
    assert norms == {torch.float32 if autocast else torch.bfloat16}
    with torch.no_grad():
        assert loaded(**batch_of(ARCHITECTURES["vit"], torch.bfloat16)).logits.isfinite().all()


def test_without_autocast_of_adapters_nothing_is_raised() -> None:
    base = ARCHITECTURES["llama"].model().half()
    model = get_peft_model(base, WasiConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}


@pytest.mark.parametrize("memory_mode", ["exact", "fast", "small"])
@pytest.mark.parametrize("second", ["added", "loaded", "summed"])
def test_a_model_trains_on_with_a_second_adapter(memory_mode: Any, second: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_rank": 4, "memory_mode": memory_mode, "residual_product": "restored"}
    model, batch = adapted("llama", torch.bfloat16, options).train(), batch_of(ARCHITECTURES["llama"], torch.bfloat16)
    expected = model(**batch).loss
    if second == "added":
        model.add_adapter("other", WasiConfig(**options))
    elif second == "loaded":
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "other")
        model.train()
    else:
        model.add_weighted_adapter(["default"], [1.0], "other", "cat")
    for name in ("default", "other"):
        model.set_adapter(name)
        loss = model(**batch).loss
        loss.backward()
        if name == "default":
            assert torch.equal(loss, expected)
    model.delete_adapter("other")
    model(**batch).loss.backward()


@pytest.mark.parametrize("memory_mode", ["exact", "small"])
def test_vectors_of_a_block_itself(memory_mode: Any) -> None:
    """BEiT's layer scales are parameters of its blocks, which run again in backward."""
    torch.manual_seed(0)
    config = tf.BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    options: dict[str, Any] = {"weight_rank": 4, "residual_product": "restored", "memory_mode": memory_mode}
    model = get_peft_model(tf.BeitForImageClassification(config).bfloat16(), WasiConfig(**options)).train()
    batch = batch_of(ARCHITECTURES["vit"], torch.bfloat16)
    batch["labels"] = batch["labels"] % 2
    model(**batch).loss.backward()
    scales = [parameter for name, parameter in model.named_parameters() if "lambda_" in name]
    assert len(scales) == 4 and all(scale.dtype == scale.grad.dtype == torch.float32 for scale in scales)


def test_one_layer_that_is_cast_leaves_the_norms() -> None:
    model, batch = (
        adapted("llama", torch.bfloat16, OPTIONS["residual"]).eval(),
        batch_of(ARCHITECTURES["llama"], torch.bfloat16),
    )
    expected = model(**batch).loss
    model.base_model.model.model.layers[0].mlp.down_proj.float()
    torch.testing.assert_close(model(**batch).loss, expected, rtol=0.02, atol=0.02)
    assert model.base_model.model.model.norm(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
