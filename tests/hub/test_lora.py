"""Factors beside a weight as a LoRA adapter that PEFT alone loads on the dense base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, frozen_model, logits, moved, train
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from wasi_peft import WasiConfig, compress, export


def trained(name: str, **options: Any) -> Any:
    """A model with an adapter, all that trains of which has moved."""
    settings = {"weight_rank": 3, "train_vectors": False, "residual": "exact", **options}
    model = get_peft_model(ARCHITECTURES[name].model(), WasiConfig(**settings)).eval()
    return moved(model, 0.3)


def batch_of(name: str) -> Any:
    return ARCHITECTURES[name].inputs(3)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("options", [{}, {"update": "frozen_basis"}, {"bias": "none"}], ids=str)
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_beside_an_exact_weight_answers_are_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, **options)
    assert export(model, tmp_path / "lora", "lora") < 1e-5
    lora = PeftModel.from_pretrained(ARCHITECTURES[name].model(), tmp_path / "lora")
    expected = logits(model, batch_of(name))
    assert relative(logits(lora, batch_of(name)), expected) < 1e-5
    assert relative(logits(ARCHITECTURES[name].model(), batch_of(name)), expected) > 0.1, "it does something"
    assert relative(logits(lora.merge_and_unload(), batch_of(name)), expected) < 1e-5


@pytest.mark.parametrize("residual", ["int8", "int4"])
def test_beside_a_rounded_weight_they_differ_by_what_rounding_loses(residual: str, tmp_path: Path) -> None:
    model = trained("llama", residual=residual, residual_product="restored")
    assert export(model, tmp_path / "lora", "lora") < 1e-5
    expected, base = logits(model, batch_of("llama")), ARCHITECTURES["llama"]
    rounded = frozen_model(base.model(), f"addition {residual}", base.targets(base.model()))
    lora = PeftModel.from_pretrained(rounded, tmp_path / "lora")
    assert relative(logits(lora, batch_of("llama")), expected) < 1e-5, "nothing but the base differs"
    lora = PeftModel.from_pretrained(base.model(), tmp_path / "lora")
    assert relative(logits(lora, batch_of("llama")), expected) > 1e-3


@pytest.mark.parametrize("options", [{}, {"weight_share": 0.6}], ids=str)
def test_on_a_compressed_model_it_is_for_that(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compress(ARCHITECTURES["llama"].model(), WasiConfig(**options)).save_pretrained(tmp_path / "small")
    kind = type(ARCHITECTURES["llama"].model())
    base = kind.from_pretrained(tmp_path / "small")
    config = WasiConfig(weight_rank=3, train_vectors=False, bias="none", residual_product="restored")
    model = moved(get_peft_model(base, config).eval(), 0.3)
    export(model, tmp_path / "lora", "lora")
    assert f"is for the compressed model '{tmp_path / 'small'}'" in caplog.text
    expected, batch = logits(model, batch_of("llama")), batch_of("llama")
    lora = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "small"), tmp_path / "lora")
    assert relative(logits(lora, batch), expected) < 0.05  # products are chosen anew
    model.unload().dequantize().save_pretrained(tmp_path / "dense")  # as the log says
    lora = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "dense"), tmp_path / "lora")
    assert relative(logits(lora, batch), expected) < 1e-4


def test_in_16_bits_factors_stay_in_float32(tmp_path: Path) -> None:
    dense = ARCHITECTURES["llama"].model().to(torch.bfloat16)
    model = get_peft_model(dense, WasiConfig(weight_rank=3, train_vectors=False, residual="exact"))
    train(model, ARCHITECTURES["llama"].batch())
    assert export(model, tmp_path / "lora", "lora") < 0.05
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_what_peft_reads(tmp_path: Path) -> None:
    model = trained("bert", rank_pattern={"layer.1.attention.self.query": 2}, modules_to_save=["classifier"])
    export(model, tmp_path / "lora", "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    query = "bert.encoder.layer.1.attention.self.query"
    assert settings["peft_type"] == "LORA" and settings["r"] == settings["lora_alpha"] == 3
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {query: 2}
    assert settings["lora_bias"] is True and settings["modules_to_save"] == ["classifier"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{query}.lora_A.weight"].shape == (2, 16)
    assert tensors[f"base_model.model.{query}.lora_B.weight"].shape == (16, 2)
    assert torch.equal(tensors["base_model.model.classifier.weight"], model.classifier.weight)
    code = (
        "import sys; sys.modules['wasi_peft'] = None\n"
        "from peft import PeftConfig\nprint(PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lora")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "LORA"


def test_biases_that_did_not_train_are_left_out(tmp_path: Path) -> None:
    export(trained("bert", bias="none"), tmp_path / "lora", "lora")
    assert not json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_bias"]
    assert not [key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors") if key.endswith("bias")]


def test_the_head_that_trained_is_in_it(tmp_path: Path) -> None:
    model = trained("vit", modules_to_save=["classifier"])
    assert export(model, tmp_path / "lora", "lora") < 1e-5
    lora = PeftModel.from_pretrained(ARCHITECTURES["vit"].model(), tmp_path / "lora")
    assert relative(logits(lora, batch_of("vit")), logits(model, batch_of("vit"))) < 1e-5


def test_vectors_that_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vit\..*: it trained with the adapter \(\d+ norms"):
        export(trained("vit", train_vectors=True), tmp_path / "lora", "lora")
    untouched = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(weight_rank=3)).eval()
    assert export(untouched, tmp_path / "lora", "lora") < 1e-5, "vectors that could train, and did not"


def test_factors_in_place_of_the_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj: its factors replace the weight; LoRA adds to one"):
        export(trained("vit", residual=None), tmp_path / "lora", "lora")
    with pytest.raises(TypeError, match="must be a PEFT model with a WASI adapter, got ViTForImageClassification"):
        export(ARCHITECTURES["vit"].model(), tmp_path / "lora", "lora")
    assert list(tmp_path.iterdir()) == []
