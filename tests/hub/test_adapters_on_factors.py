"""Adapters that train on the factors that a compressed model is stored as: what is theirs, and what is the base's."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, FACTOR_UPDATES, Architecture, logits, train
from safetensors.torch import load_file
from torch import Tensor, nn

from wasi_peft import (
    WasiConfig,
    compress,
    estimate_wasi,
    fold_cores,
    load_adapter,
    preprocess_wasi,
    resize_rank,
)
from wasi_peft.forms.compressed import CompressedLinear
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates import UPDATES

pytestmark = pytest.mark.usefixtures("exact_products")

LLAMA, VIT = ARCHITECTURES["llama"], ARCHITECTURES["vit"]
BASES: dict[str, dict[str, Any]] = {
    "factors": {"weight_share": 0.6},
    "factors in 8 bits": {"weight_share": 0.5, "frozen_dtype": "int8"},
}


def compressed_base(architecture: Architecture, folder: Path, kind: str = "factors", **options: Any) -> Any:
    """A compressed model of factors, loaded from its folder."""
    compress(architecture.model(), WasiConfig(**BASES[kind])).save_pretrained(folder)
    return type(architecture.model()).from_pretrained(folder, **options).eval()


def on_factors(base: nn.Module, update: str, **options: Any) -> Any:
    return peft.get_peft_model(base, config_of(update, **options))


def config_of(update: str, **options: Any) -> WasiConfig:
    rank = {"update_rank": 2} if update == "low_rank" else {}
    return WasiConfig(**{"update": update, "residual": None, "activation_threshold": None, **rank, **options})


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "kind"), [("vit", "factors"), ("gpt2", "factors"), ("llama", "factors in 8 bits")])
@pytest.mark.parametrize("update", FACTOR_UPDATES)
def test_an_adapter_has_what_trains_and_shares_the_rest(update: str, name: str, kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    base, batch = compressed_base(architecture, tmp_path / "base", kind), architecture.batch()
    before, stored = logits(base, batch), copy.deepcopy(base.state_dict())
    model = on_factors(base, update)
    close(logits(model, batch), before)
    layers = dict(wasi_layers(model.get_base_model()))
    assert layers
    for layer in layers.values():
        own = {part for part, _ in layer.form.named_parameters()} - {"bias"}
        assert own == {f"wasi_{part}" for part in UPDATES[update].trained}
        for part in layer.form.shared_parts:
            factor = layer.base_layer.form.part(part)
            assert layer.form.frozen(part) or layer.form.part(part) is factor
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    below = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()
             if ".base_layer." in key}  # fmt: skip
    assert below and all(torch.equal(value, stored[key]) for key, value in below.items())
    after = logits(model, batch)
    with model.disable_adapter():
        close(logits(model, batch), before, 1e-6)

    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors")
    parts = {key.rpartition(".")[2] for key in keys if ".wasi_form." in key}
    assert parts - {"bias"} == {f"wasi_{part}" for part in UPDATES[update].trained}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    close(logits(loaded, batch), after)
    close(logits(load_adapter(tmp_path / "adapter"), batch), after)

    model.add_adapter("ref", config_of(update))
    model.set_adapter("ref")
    close(logits(model, batch), before)
    model.add_adapter("copy", model.peft_config["default"])  # as a reference is made that starts where this one is
    model.set_adapter("copy")
    close(logits(model, batch), after)
    model.delete_adapter("copy")
    model.set_adapter("default")
    close(logits(model, batch), after)

    merged = loaded.merge_and_unload()
    kinds = {key: layer.form_name for key, layer in merged.named_modules() if isinstance(layer, CompressedLinear)}
    split = {"low_rank": "split", "core": "core"}.get(update, "factors") if kind != "factors" else "factors"
    assert kinds == dict.fromkeys(layers, split)
    close(logits(merged, batch), after)
    merged.save_pretrained(tmp_path / "merged")
    close(logits(type(base).from_pretrained(tmp_path / "merged"), batch), after)
    close(logits(model.unload(), batch), before, 1e-6)


@pytest.mark.parametrize(("update", "lora_rank"), [("low_rank", 2), ("core", None)])
def test_it_is_saved_as_large_as_lora(update: str, lora_rank: int | None, tmp_path: Path) -> None:
    def saved_elements(model: Any) -> int:
        model.save_pretrained(tmp_path / "adapter")
        return sum(value.numel() for value in load_file(tmp_path / "adapter/adapter_model.safetensors").values())

    model = on_factors(compressed_base(LLAMA, tmp_path / "base"), update, bias="none", train_vectors=False)
    layers = dict(wasi_layers(model.get_base_model()))
    if lora_rank is None:
        assert saved_elements(model) == sum(layer.form.weight_rank**2 for layer in layers.values())
        return
    lora = peft.LoraConfig(r=lora_rank, target_modules=list(layers))
    assert saved_elements(model) == saved_elements(peft.get_peft_model(compressed_base(LLAMA, tmp_path / "b"), lora))


@pytest.mark.parametrize("update", FACTOR_UPDATES)
def test_in_bfloat16_what_trains_is_float32(update: str, tmp_path: Path) -> None:
    base = compressed_base(LLAMA, tmp_path / "base", dtype=torch.bfloat16)
    before, batch = logits(base, LLAMA.batch()), LLAMA.batch()
    model = on_factors(base, update)
    assert {p.dtype for key, p in model.named_parameters() if ".wasi_form." in key} == {torch.float32}
    assert {p.dtype for key, p in model.named_parameters() if ".base_layer." in key} == {torch.bfloat16}
    answered = logits(model, batch)
    assert answered.dtype == torch.bfloat16 and (answered - before).norm() < 0.05 * before.norm()
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    after = logits(model, batch)
    assert (logits(model.merge_and_unload(), batch) - after).norm() < 0.05 * after.norm()


@pytest.mark.parametrize("update", ["low_rank", "core"])
def test_copies_and_pickles_share_within_themselves(update: str, tmp_path: Path) -> None:
    model, batch = on_factors(compressed_base(VIT, tmp_path), update), VIT.batch()
    expected = logits(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(other, batch), expected, 1e-6)
        mine = next(layer for _, layer in wasi_layers(model))
        layer = next(layer for _, layer in wasi_layers(other))
        assert layer.form.L is layer.base_layer.form.L and layer.form.L is not mine.form.L


def test_folded_cores_are_factors_of_their_own(tmp_path: Path) -> None:
    base, batch = compressed_base(VIT, tmp_path / "base"), VIT.batch()
    model = on_factors(base, "core")
    train(model, batch, steps=2)
    expected = logits(model, batch)
    fold_cores(model)
    close(logits(model, batch), expected)
    layer = next(layer for _, layer in wasi_layers(model))
    assert not layer.form.shared_parts and layer.form.R.data_ptr() != layer.base_layer.form.R.data_ptr()
    model.save_pretrained(tmp_path / "adapter")
    close(logits(load_adapter(tmp_path / "adapter"), batch), expected)


def test_layers_that_stayed_dense_are_left_alone(tmp_path: Path) -> None:
    config = WasiConfig(weight_rank=4, target_modules=["q_proj", "up_proj"])
    config = WasiConfig(weight_rank=4, residual=None, target_modules=config.target_modules)
    base = compress(LLAMA.model(), config)
    model = on_factors(base, "low_rank")
    names = {name.rpartition(".")[2] for name, _ in wasi_layers(model)}
    assert names == {"q_proj", "up_proj"}


def test_the_base_is_checked(tmp_path: Path) -> None:
    model = on_factors(compressed_base(LLAMA, tmp_path / "base"), "low_rank")
    model.save_pretrained(tmp_path / "adapter")
    other = compress(LLAMA.model(), WasiConfig(weight_rank=2, residual=None))
    with pytest.raises(
        ValueError, match=r"trains on factors of rank \d+, got a base model with 2\. It belongs to ano"
    ):
        peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the adapter lacks wasi_L: it is incomplete, or belongs to another model"):
        peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"weight_rank": 1}, "a rank of 1"),
        ({"rank_pattern": {"q_proj": 1}}, "a rank of 1"),
        ({"weight_share": 0.4}, r"weight_share=0\.4"),
        ({"frozen_dtype": "int8"}, "frozen_dtype='int8'"),
    ],
    ids=str,
)
def test_what_would_change_the_factors(options: dict[str, Any], asked: str, tmp_path: Path) -> None:
    base, batch = compressed_base(LLAMA, tmp_path), LLAMA.batch()
    before = logits(base, batch)
    with pytest.raises(ValueError, match=rf"stored as factors of rank \d+, .* leave out what would .*; got {asked}\."):
        on_factors(base, "core", **options)
    assert torch.equal(logits(base, batch), before) and not list(wasi_layers(base))


def test_what_is_for_dense_models(tmp_path: Path) -> None:
    base = compressed_base(VIT, tmp_path)
    with pytest.raises(ValueError, match="a compressed model needs no preparation: adapters train on what it stores"):
        preprocess_wasi(base, config_of("core"), [VIT.batch()], progress_bar=False)
    model = on_factors(base, "core")
    name, layer = next(wasi_layers(model.get_base_model()))
    rank = layer.form.weight_rank
    with pytest.raises(ValueError, match=rf"trains on factors of a compressed model, whose rank {rank} stays; got 1"):
        resize_rank(model, name, 1)


@pytest.mark.parametrize("update", ["core", "low_rank"])
def test_what_a_step_takes_is_estimated(update: str, tmp_path: Path) -> None:
    """B A or M and their states come on top of the base, whose factors are there once."""
    base, batch = compressed_base(LLAMA, tmp_path), LLAMA.batch()
    estimate = estimate_wasi(base, config_of(update, bias="none", train_vectors=False), batch=batch)
    model = on_factors(base, update, bias="none", train_vectors=False)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    kept = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert estimate.gradients_bytes == trained
    assert abs(estimate.weights_bytes - kept) < 100


def test_weighted_sums_leave_the_base_as_it_is(tmp_path: Path) -> None:
    base, batch = compressed_base(LLAMA, tmp_path), LLAMA.batch()
    before, stored = logits(base, batch), copy.deepcopy(base.state_dict())
    model = on_factors(base, "frozen_basis", train_vectors=False)
    train(model, batch, steps=2)
    model.add_adapter("other", config_of("frozen_basis", train_vectors=False))
    model.add_adapter("both", config_of("factor", train_vectors=False))
    tuner = model.base_model
    tuner.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="cat")
    _, layer = next(wasi_layers(model))
    weights = [layer.form_of(name).multiply_out() for name in ("default", "other", "sum")]
    close(weights[2], (weights[0] + weights[1]) / 2, 1e-6)
    for names, how in ((["default", "other"], "svd"), (["default", "both"], "cat")):
        with pytest.raises(ValueError, match="share a factor of a compressed model have a sum that shares it too"):
            tuner.add_weighted_adapter(names, [0.5, 0.5], "more", combination_type=how)
    close(logits(model.unload(), batch), before, 1e-6)
    assert all(torch.equal(value, stored[key]) for key, value in base.state_dict().items() if key in stored)
