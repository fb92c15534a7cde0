"""PEFT's `hotswap_adapter`: a saved adapter in the place of one in use, also where the model was compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, FORMS, form_options, logits, moved
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch._dynamo.testing import CompileCounter

from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import wasi_layers

VIT = ARCHITECTURES["vit"]
BATCH = VIT.inputs()


def adapted(size: float, **options: Any) -> Any:
    settings = {"weight_rank": 4, "update_rank": 2, "modules_to_save": ["classifier"], **options}
    return moved(get_peft_model(VIT.model(), WasiConfig(**settings)), size).eval()


def saved(folder: Path, size: float, **options: Any) -> Path:
    adapted(size, **options).save_pretrained(folder)
    return folder


def swap(model: nn.Module, folder: Path, name: str = "default") -> None:
    hotswap_adapter(model, str(folder), name, torch_device="cpu")


@pytest.mark.parametrize("form", FORMS)
def test_it_answers_as_the_other_adapter_with_the_same_parameters(form: str, tmp_path: Path) -> None:
    """Factors in few bits, biases, norms and the head are exchanged; another adapter beside it is not."""
    options = form_options(form)
    folder = saved(tmp_path / "second", 0.3, **options)
    model = PeftModel.from_pretrained(VIT.model(), saved(tmp_path / "first", 0.1, **options))
    model.load_adapter(tmp_path / "first", adapter_name="beside")
    first = logits(model, BATCH)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    swap(model, folder)
    expected = logits(PeftModel.from_pretrained(VIT.model(), folder), BATCH)
    assert torch.equal(logits(model, BATCH), expected) and not torch.equal(expected, first)
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    model.set_adapter("beside")
    assert torch.equal(logits(model, BATCH), first)


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    folder = saved(tmp_path, 0.3)
    torch._dynamo.reset()
    counter = CompileCounter()
    model: Any = torch.compile(adapted(0.1), backend=counter)
    first, compiled = logits(model, BATCH), counter.frame_count
    swap(model, folder)
    second = logits(model, BATCH)
    assert compiled and counter.frame_count == compiled
    expected = logits(PeftModel.from_pretrained(VIT.model(), folder), BATCH)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)
    torch._dynamo.reset()


def test_a_base_that_was_compiled_first_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 0.3)
    model = get_peft_model(torch.compile(VIT.model(), backend="eager"), adapted(0).peft_config["default"])
    with pytest.raises(ValueError, match="Compile what get_peft_model answers"):
        swap(model, folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"weight_rank": 3}, r"must have its ranks, 4 here, got 3 \(12 layers differ\).*load_adapter"),
    "rank of one layer": ({"rank_pattern": {"0.mlp.fc1": 2}}, r"0\.mlp\.fc1: .* 4 here, got 2 \(1 layers differ\)"),
    "layers": ({"target_modules": ["fc1"]}, "an adapter can take another's place on the same layers, 10 are of"),
    "residual": ({"residual": "exact"}, "Configs are incompatible: for residual, int8 != exact"),
    "vectors": ({"train_vectors": False}, "Configs are incompatible: for train_vectors, True != False"),
    "head": ({"modules_to_save": None}, "Configs are incompatible: for modules_to_save"),
}


@pytest.mark.parametrize(("options", "rule"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_changes(options: dict[str, Any], rule: str, tmp_path: Path) -> None:
    model = adapted(0.1)
    before = logits(model, BATCH)
    with pytest.raises(ValueError, match=rule):
        swap(model, saved(tmp_path, 0.3, **options))
    assert torch.equal(logits(model, BATCH), before)


def test_misuse(tmp_path: Path) -> None:
    model, folder = adapted(0.1), saved(tmp_path / "wasi", 0.3)
    with pytest.raises(ValueError, match=r"must name an adapter of the model, \['default'\], got 'other'"):
        swap(model, folder, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter that is merged cannot be swapped"):
        swap(model, folder)
    lora = get_peft_model(VIT.model(), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="Incompatible PEFT types found"):
        swap(lora, folder)


def test_lora_is_swapped_as_ever(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(VIT.model(), lora).save_pretrained(tmp_path)
    model = get_peft_model(VIT.model(), LoraConfig(target_modules=["fc1"]))
    swap(model, tmp_path)
    assert torch.equal(logits(model, BATCH), logits(PeftModel.from_pretrained(VIT.model(), tmp_path), BATCH))


def test_training_goes_on_from_what_was_swapped_in(tmp_path: Path) -> None:
    model = adapted(0.1)
    swap(model, saved(tmp_path, 0.3))
    before = {name: layer.form.L.clone() for name, layer in wasi_layers(model)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**VIT.batch()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(layer.form.L, before[name]) for name, layer in wasi_layers(model))
