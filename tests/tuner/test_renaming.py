"""Adapters in models whose modules have other names than where they were saved: `key_mapping` of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, FORMS, form_options, logits, moved
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from wasi_peft import WasiConfig
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.tuner.renaming import fitted_names

VIT = ARCHITECTURES["vit"]
MAPPING = {"^vit": "model.vision.vit", "^classifier": "model.classifier"}


class Moved(nn.Module):
    """The tiny ViT, its parts under other names."""

    def __init__(self) -> None:
        super().__init__()
        vit = VIT.model()
        self.model = nn.Module()
        self.model.vision = nn.Module()
        self.model.vision.vit, self.model.classifier = vit.vit, vit.classifier

    def forward(self, pixel_values: torch.Tensor) -> Any:
        answer = self.model.vision.vit(pixel_values=pixel_values)
        answer["logits"] = self.model.classifier(answer.last_hidden_state[:, 0])
        return answer


def saved(folder: Path, **options: Any) -> torch.Tensor:
    """What the model answers with an adapter that is saved."""
    settings = {"modules_to_save": ["classifier"], **options}
    model = moved(get_peft_model(VIT.model(), WasiConfig(**settings)), 0.2)
    model.save_pretrained(folder)
    return logits(model, VIT.inputs())


@pytest.mark.parametrize("form", FORMS)
def test_key_mapping(form: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, **form_options(form), weight_rank=4, update_rank=2)
    model = PeftModel.from_pretrained(Moved(), tmp_path, key_mapping=MAPPING)
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(Moved(), tmp_path / "again")
    torch.testing.assert_close(logits(again, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{"target_modules": ["fc1", "q_proj"]}, {"bias": "all"}], ids=str)
def test_key_mapping_of_some_layers(options: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, **options)
    model = PeftModel.from_pretrained(
        Moved(), tmp_path, key_mapping=MAPPING, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)


def test_key_mapping_of_a_plan(tmp_path: Path) -> None:
    names = [f"vit.layers.{block}.mlp.fc1" for block in range(2)]
    plan = WasiPlan((LayerPlan(names[0], 24, 16, 4, None, 0.9), LayerPlan(names[1], 24, 16, 4, None, 0.9, "int8")))
    expected = saved(tmp_path, plan=plan)
    model = PeftModel.from_pretrained(Moved(), tmp_path, key_mapping=MAPPING)
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)


def test_without_the_mapping_it_is_refused_and_can_be_loaded_with_it(tmp_path: Path) -> None:
    expected = saved(tmp_path, modules_to_save=None)
    base = Moved().eval()
    with pytest.raises(ValueError, match=r"lacks wasi_added_L: .* pass key_mapping to from_pretrained"):
        PeftModel.from_pretrained(base, tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path, key_mapping=MAPPING)
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)


def test_lora_takes_the_same_mapping(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["fc1"], init_lora_weights=False)
    get_peft_model(VIT.model(), lora).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Moved(), tmp_path, key_mapping=MAPPING)
    expected = logits(PeftModel.from_pretrained(VIT.model(), tmp_path), VIT.inputs())
    torch.testing.assert_close(logits(model, VIT.inputs()), expected, atol=1e-6, rtol=1e-6)


def blocks(place: str, *kinds: str) -> list[str]:
    return [f"{place}.{block}.{kind}" for block in range(2) for kind in kinds]


def test_names_are_fitted_in_one_way_or_not_at_all() -> None:
    image, text = blocks("visual.blocks", "qkv", "proj"), blocks("model.layers", "q", "proj")
    new = {**{name: f"model.{name}" for name in image}, **{n: n.replace("model", "model.text") for n in text}}
    assert fitted_names([*image, *text], set(new.values())) == new, "two parts that moved apart"
    assert fitted_names(text, {*text, "other"}) == {}, "nothing is missing"
    assert fitted_names(text, set(blocks("a.layers", "q", "proj") + blocks("b.layers", "q", "proj"))) == {}, "two ways"
    assert fitted_names(text, {"model.layers.0.q", "model.layers.0.proj"}) == {}, "a block keeps its number"
    assert fitted_names(["layers.0.q", "x.layers.0.q"], {"x.layers.0.q"}) == {}, "two names do not become one"
    assert fitted_names(["q"], {"x.q"}) == {"q": "x.q"}
    assert fitted_names([], {"a"}) == {} and fitted_names(["a.b"], set()) == {}
