"""Adapters that start from a saved LoRA adapter: exactly where K is enough, else as its best approximation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, logits, moved
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig, export, preprocess_wasi, start_from_lora
from wasi_peft.tuner.layer import wasi_layers

VIT = ARCHITECTURES["vit"]
HEADS = {"vit": ["classifier"], "bert": ["classifier"], "gpt2": None, "llama": None}


def lora(name: str, folder: Path, **options: Any) -> Any:
    """A saved LoRA adapter on the layers that WASI has by default, all that trains of it at random."""
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    settings: dict[str, Any] = {
        "r": 3, "lora_alpha": 6, "target_modules": sorted(architecture.targets(model)),
        "modules_to_save": HEADS[name], **options,
    }  # fmt: skip
    adapted = moved(get_peft_model(model, LoraConfig(**settings)), 0.2).eval()
    adapted.save_pretrained(folder)
    return adapted


def wasi(name: str, **options: Any) -> Any:
    settings = {"residual": "exact", "weight_rank": 5, "modules_to_save": HEADS[name], **options}
    return get_peft_model(ARCHITECTURES[name].model(), WasiConfig(**settings)).eval()


def products(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    return {name: L @ R for name, layer in wasi_layers(model) for L, R in [layer.form_of(adapter).factors()]}


def added(model: Any) -> dict[str, Tensor]:
    """What LoRA adds to weights, by the names that WASI's layers have, computed by PEFT."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 9}},
    {"lora_bias": True},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
def test_it_answers_as_lora_does(options: dict[str, Any], update: str, tmp_path: Path) -> None:
    expected = logits(lora("vit", tmp_path, **options), VIT.inputs())
    model = wasi("vit", update=update)
    assert (logits(model, VIT.inputs()) - expected).abs().max() > 0.1
    start_from_lora(model, tmp_path)
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "wasi")
    loaded = PeftModel.from_pretrained(VIT.model(), tmp_path / "wasi")
    torch.testing.assert_close(logits(loaded, VIT.inputs()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    batch = ARCHITECTURES[name].inputs()
    expected = logits(lora(name, tmp_path), batch)
    model = wasi(name)
    start_from_lora(model, tmp_path)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", ["int8", "int4"])
def test_beside_a_rounded_weight_the_product_is_that_of_lora(residual: str, tmp_path: Path) -> None:
    expected = added(lora("vit", tmp_path))
    model = wasi("vit", residual=residual)
    start_from_lora(model, tmp_path)
    for name, product in products(model).items():
        torch.testing.assert_close(product, expected[name], atol=1e-5, rtol=1e-4)


def best(matrix: Tensor, rank: int) -> Tensor:
    U, energies, Vh = torch.linalg.svd(matrix.double())
    return (U[:, :rank] * energies[:rank] @ Vh[:rank]).float()


def test_too_small_a_rank_takes_the_best_approximation_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = added(lora("vit", tmp_path))
    model = wasi("vit", weight_rank=2, rank_pattern={"fc2": 4})
    start_from_lora(model, tmp_path)
    for name, product in products(model).items():
        near = expected[name] if name.endswith("fc2") else best(expected[name], 2)
        torch.testing.assert_close(product, near, atol=1e-5, rtol=1e-4)
    assert "K is less than LoRA's rank in 10 of 12 layers" in caplog.text


def test_what_preparation_has_found_is_added_to(tmp_path: Path) -> None:
    lora_adds = added(lora("vit", tmp_path))
    base, config = VIT.model(), WasiConfig(residual="int4", weight_rank=4, modules_to_save=["classifier"])
    preprocess_wasi(base, config, [VIT.inputs()], progress_bar=False)
    model = get_peft_model(base, config)
    before = products(model)
    start_from_lora(model, tmp_path)
    for name, product in products(model).items():
        assert bool(before[name].any())
        torch.testing.assert_close(product, best(before[name] + lora_adds[name], 4), atol=1e-5, rtol=1e-4)


def test_rows_of_r_are_as_long_as_those_of_a_fresh_adapter(tmp_path: Path) -> None:
    """So that learning rates keep their meaning; directions beyond LoRA's wait as all of a fresh one do."""
    lora("vit", tmp_path, lora_alpha=300)
    model = wasi("vit")
    fresh = {name: layer.form.R.square().sum(1).mean() for name, layer in wasi_layers(model)}
    start_from_lora(model, tmp_path)
    for name, layer in wasi_layers(model):
        torch.testing.assert_close(layer.form.R.square().sum(1).mean(), fresh[name], atol=1e-4, rtol=1e-4)
        assert not bool(layer.form.L[:, 3:].any()) and layer.form.L.requires_grad
    model.train()(**VIT.batch()).loss.backward()
    assert all(bool(layer.form.R.grad[:3].any()) for _, layer in wasi_layers(model))


def test_a_further_adapter_and_some_of_the_layers(tmp_path: Path) -> None:
    folder = tmp_path / "parts" / "lora"
    expected = logits(lora("vit", folder, target_modules=["fc1", "q_proj"], modules_to_save=None), VIT.inputs())
    model = wasi("vit", modules_to_save=None)
    base = logits(model, VIT.inputs())
    model.add_adapter("other", WasiConfig(residual="exact", weight_rank=5))
    start_from_lora(model, tmp_path / "parts", "other", subfolder="lora")
    assert torch.equal(logits(model, VIT.inputs()), base)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-4, rtol=1e-4)


def test_what_was_exported_as_lora_comes_back(tmp_path: Path) -> None:
    model = moved(wasi("llama", train_vectors=False, bias="none"), 0.2)
    export(model, tmp_path / "lora", "lora")
    back = wasi("llama")
    start_from_lora(back, tmp_path / "lora")
    batch = ARCHITECTURES["llama"].inputs()
    torch.testing.assert_close(logits(back, batch), logits(model, batch), atol=1e-4, rtol=1e-4)


def test_convolutions(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()

    adapted = moved(get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "2"])), 0.2).eval()
    adapted.save_pretrained(tmp_path)
    model = get_peft_model(base(), WasiConfig(residual="exact", weight_rank=3, target_modules=["0", "2"])).eval()
    start_from_lora(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), adapted(x), atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, {}, r"lora_magnitude_vector.*no addition of low rank.*merge_and_unload"),
    "a changed base": ({"init_lora_weights": "olora"}, {}, "init_lora_weights='olora' changes the base"),
    "factors": ({}, {"residual": None}, "LoRA adds to a weight, so an adapter that starts from it must have a"),
    "a layer": ({}, {"target_modules": ["fc1"]}, r"LoRA has trained this layer, and 'default' is not on it"),
    "a head": ({}, {"modules_to_save": None}, r"classifier\.\w+: .* does not save whole; name it in modules_to_save"),
    "tokens": ({"bias": "all"}, {}, r"bias: .* does not save whole"),
}


@pytest.mark.parametrize(("given", "own", "rule"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_over_is_refused_and_nothing_changes(
    given: dict[str, Any], own: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    lora("vit", tmp_path, **given)
    model = wasi("vit", **own)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rule):
        start_from_lora(model, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_misuse(tmp_path: Path) -> None:
    model = wasi("vit")
    model.save_pretrained(tmp_path / "wasi")
    with pytest.raises(ValueError, match="must be a LoRA adapter, got"):
        start_from_lora(model, tmp_path / "wasi")
    lora("bert", tmp_path / "bert", target_modules=["query"], modules_to_save=None)
    with pytest.raises(ValueError, match="LoRA has trained this layer"):
        start_from_lora(wasi("vit", modules_to_save=None), tmp_path / "bert")
    lora("vit", tmp_path / "vit")
    with pytest.raises(ValueError, match=r"must name an adapter of the model, \['default'\], got 'other'"):
        start_from_lora(model, tmp_path / "vit", "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        start_from_lora(model, tmp_path / "vit")
    smaller = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(target_modules=["0"]))
    smaller.save_pretrained(tmp_path / "smaller")
    larger = get_peft_model(nn.Sequential(nn.Linear(8, 8)), WasiConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"must be \(8, r\) and \(r, 8\), got \[\(6, 8\), \(8, 6\)\]"):
        start_from_lora(larger, tmp_path / "smaller")
