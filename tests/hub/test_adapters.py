"""Adapters loaded with their base models: what is read, what is not, and what remains of the loading."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, logits, train
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from wasi_peft import WasiConfig, load_adapter, start_from_lora
from wasi_peft.tuner.layer import wasi_layers

pytestmark = pytest.mark.usefixtures("exact_products")

VIT, LLAMA = ARCHITECTURES["vit"], ARCHITECTURES["llama"]


def takes_new_heads() -> bool:
    """Whether transformers leaves heads of other sizes out where there is a quantizer."""
    return "param_needs_quantization" in inspect.getsource(core_model_loading.set_param_for_module)


def saved(name: str, folder: Path, **options: Any) -> Any:
    """A trained adapter, saved in `folder / "adapter"`, of a base in `folder / "base"`."""
    architecture = ARCHITECTURES[name]
    architecture.model().save_pretrained(folder / "base")
    base = type(architecture.model()).from_pretrained(folder / "base")
    model = get_peft_model(base, WasiConfig(**options))
    train(model, architecture.batch(), steps=2)
    model.save_pretrained(folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "gpt2", "llama", "llama_tied"])
def test_the_dense_weights_of_factors_are_not_read(name: str, tmp_path: Path) -> None:
    """They need not even be in the file."""
    model, batch = saved(name, tmp_path, weight_share=0.6), ARCHITECTURES[name].batch()
    names = {key for key, _ in wasi_layers(model.get_base_model())}
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    targeted = [key for key in tensors if any(other.endswith(key.rpartition(".")[0]) for other in names)]
    rest = {key: value for key, value in tensors.items() if key not in targeted}
    save_file(rest, path, metadata={"format": "pt"})
    loaded = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training and loaded.active_adapter == "default"


def test_nothing_remains_of_the_loading(tmp_path: Path) -> None:
    saved("vit", tmp_path, weight_share=0.6)
    base = load_adapter(tmp_path / "adapter", adapter_name="mine").get_base_model()
    plain = type(base).from_pretrained(tmp_path / "base")
    assert not hasattr(base, "hf_quantizer") and not getattr(base, "is_quantized", False)
    assert base.config.to_dict() == plain.config.to_dict()
    assert base._keys_to_ignore_on_load_unexpected == plain._keys_to_ignore_on_load_unexpected


def test_it_goes_on_training(tmp_path: Path) -> None:
    model, batch = saved("llama", tmp_path, weight_share=0.6), LLAMA.batch()
    loaded = load_adapter(tmp_path / "adapter", is_trainable=True)
    usual = PeftModel.from_pretrained(
        type(LLAMA.model()).from_pretrained(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    )
    assert train(loaded, batch, steps=3) == pytest.approx(train(usual, batch, steps=3), rel=1e-5)
    assert {key for key, p in loaded.named_parameters() if p.requires_grad} == {
        key for key, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("head", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_all_has_the_dtype_that_peft_gives_it(head: dict[str, Any], is_trainable: bool, tmp_path: Path) -> None:
    saved("llama", tmp_path, weight_share=0.6, **head)
    loaded = load_adapter(tmp_path / "adapter", dtype=torch.bfloat16, is_trainable=is_trainable)
    base = type(LLAMA.model()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    usual = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=is_trainable)
    kinds, expected = [{key: p.dtype for key, p in model.named_parameters()} for model in (loaded, usual)]
    assert kinds == expected
    torch.testing.assert_close(logits(loaded, LLAMA.batch()), logits(usual, LLAMA.batch()))


@pytest.mark.parametrize("options", [{}, {"weight_share": 0.6, "base_weight": "keep"}])
def test_weights_that_are_needed_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = saved("vit", tmp_path, **options), VIT.batch()
    loaded = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-4, rtol=1e-4)
    with loaded.disable_adapter():
        assert torch.isfinite(logits(loaded, batch)).all()


def test_with_a_task_and_with_a_new_head(tmp_path: Path) -> None:
    model = saved("llama", tmp_path, weight_share=0.6, task_type=TaskType.CAUSAL_LM)
    loaded = load_adapter(tmp_path / "adapter")
    assert type(loaded) is type(model) is peft.PeftModelForCausalLM
    VIT.model().save_pretrained(tmp_path / "vit")
    kind = type(VIT.model())
    base = kind.from_pretrained(tmp_path / "vit", num_labels=7, ignore_mismatched_sizes=True)
    headed = get_peft_model(base, WasiConfig(weight_share=0.6, modules_to_save=["classifier"])).eval()
    headed.save_pretrained(tmp_path / "headed")
    if not takes_new_heads():
        with pytest.raises(ValueError, match=r"classifier\.weight: must have shape \(7, 16\), got \(3, 16\)"):
            load_adapter(tmp_path / "headed", num_labels=7, ignore_mismatched_sizes=True)
        return
    again = load_adapter(tmp_path / "headed", num_labels=7, ignore_mismatched_sizes=True)
    batch = {key: value for key, value in VIT.batch().items() if key != "labels"}
    torch.testing.assert_close(logits(again, batch), logits(headed, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"r": 1', "must be a JSON file: Expecting"),
        (b"\xff", "must be a JSON file: 'utf-8' codec"),
        (b"[]", "must hold a JSON object, got list"),
    ],
)
def test_a_broken_configuration_is_named(text: bytes, match: str, tmp_path: Path) -> None:
    model = saved("vit", tmp_path, weight_share=0.6)
    for name in ("base/config.json", "adapter/adapter_config.json"):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + f": {match}"):
            load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter_config.json: {match}"):
        start_from_lora(model, tmp_path / "adapter")


def test_a_configuration_of_no_known_adapter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "OTHER"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: must be the configuration of an adapter: .*OTHER"):
        load_adapter(tmp_path)


def test_misuse(tmp_path: Path) -> None:
    saved("vit", tmp_path, weight_share=0.6)
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())

    def changed(**values: Any) -> None:
        path.write_text(json.dumps({**config, **values}))

    changed(base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base model"):
        load_adapter(tmp_path / "adapter")
    changed(auto_mapping=None)
    with pytest.raises(ValueError, match="does not say which class its base model has; pass model_class"):
        load_adapter(tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter", model_class=type(VIT.model()))
    changed(auto_mapping={"parent_library": "os", "base_model_class": "system"})
    with pytest.raises(ValueError, match="pass model_class"):
        load_adapter(tmp_path / "adapter")
    changed(ranks={"vit.layers.9.q": 3})
    with pytest.raises(ValueError, match=r"vit\.layers\.9\.q: the adapter belongs to another model"):
        load_adapter(tmp_path / "adapter")
    changed(ranks={"vit.layernorm": 3})
    with pytest.raises(ValueError, match=r"vit\.layernorm: must be a Linear, got LayerNorm"):
        load_adapter(tmp_path / "adapter")
    get_peft_model(LLAMA.model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="must be an adapter of type WASI, got"):
        load_adapter(tmp_path / "lora")
