"""The plain form: ordinary modules that answer the same, in memory and in a folder that needs no wasi_peft."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, moved, train
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, GenerationConfig, ViTForImageClassification

from wasi_peft import WasiConfig, compress, export, to_plain
from wasi_peft.forms.compressed import CompressedLinear
from wasi_peft.forms.factored import FactoredLinear
from wasi_peft.forms.products import ProductChoice
from wasi_peft.forms.residual import Int8Residual
from wasi_peft.hub.plain import LinearPair
from wasi_peft.tuner.layer import wasi_layers

NAMES = [name for name in ARCHITECTURES if name != "t5"]
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"residual": None},
    "core": {"residual": None, "update": "core"},
    "int8": {"residual": "int8", "residual_product": "restored"},
    "int4": {"residual": "int4"},
    "exact": {"residual": "exact"},
}


def adapted(name: str, form: str, **options: Any) -> Any:
    """A model with an adapter whose factors and vectors are not those of the start."""
    model = get_peft_model(ARCHITECTURES[name].model(), WasiConfig(weight_rank=3, **FORMS[form], **options)).eval()
    return moved(model, 0.1)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    batch = ARCHITECTURES[name].inputs(3)
    return {**batch, "decoder_input_ids": batch["input_ids"][:, :4]} if name == "t5" else batch


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model(**batch_of(name)).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_ordinary_modules_answer_the_same(name: str, form: str) -> None:
    model = adapted(name, form)
    before = logits(model, name)
    plain = to_plain(model, batch_of(name))
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch", "transformers"}
    assert_same(logits(plain, name), before)
    pairs = [module for module in plain.modules() if type(module) is nn.Sequential]
    expected = ARCHITECTURES[name].target_count if FORMS[form]["residual"] is None else 0
    assert len(pairs) == expected
    assert all([type(part) for part in pair] == [nn.Linear] * 2 and pair[0].bias is None for pair in pairs)
    assert not vars(plain).get("hf_quantizer") and not hasattr(plain.config, "quantization_config")
    assert any(True for _ in wasi_layers(model)) and torch.equal(logits(model, name), before), "it is a copy"


@pytest.mark.parametrize(
    "options",
    [{"memory_mode": "small"}, {"memory_mode": "fast", "residual": "int8"}, {"update": "low_rank", "update_rank": 2}],
    ids=str,
)
def test_whatever_trained_the_model(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"residual": None, "weight_rank": 3, "residual_product": "restored", **options}
    model = get_peft_model(ARCHITECTURES["llama"].model(), WasiConfig(**settings))
    train(model, ARCHITECTURES["llama"].batch())
    plain = to_plain(model)
    assert_same(logits(plain, "llama"), logits(model.eval(), "llama"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_nothing_is_shared() -> None:
    model = adapted("vit", "factors")
    before = logits(model, "vit")
    for parameter in to_plain(model).parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, "vit"), before)


def test_a_dense_model_is_its_own_plain_form() -> None:
    model = ARCHITECTURES["bert"].model()
    plain = to_plain(model)
    assert plain is not model and plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(plain, "bert"), logits(model, "bert"))


def test_another_adapter_than_the_active_one() -> None:
    model = adapted("vit", "int8")
    model.add_adapter("other", WasiConfig(weight_rank=2, residual_product="restored"))
    with torch.no_grad():
        for _, layer in wasi_layers(model):
            layer.form_of("other").L.normal_()
    model.set_adapter("other")
    expected = logits(model, "vit")
    model.set_adapter("default")
    found = logits(to_plain(model, adapter_name="other"), "vit")
    assert_same(found, expected)
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default', 'other'\], got 'none'"):
        to_plain(model, adapter_name="none")


def test_a_layer_that_is_in_a_model_twice_stays_one() -> None:
    layer = CompressedLinear(FactoredLinear(6, 6, rank=2))
    plain = to_plain(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 6))
    assert plain[0] is plain[2] and isinstance(plain[0], nn.Sequential)


def test_quantizers_of_torch_find_every_layer() -> None:
    plain = to_plain(adapted("vit", "factors"))
    small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    kinds = [type(module).__module__ for module in small.modules() if type(module).__name__ == "Linear"]
    assert len(kinds) == 2 * 12 + 1 and set(kinds) == {"torch.ao.nn.quantized.dynamic.modules.linear"}


# ------------------------------------------------------------------------------------- what model code asks


def test_two_layers_tell_what_code_asks_of_one() -> None:
    t5 = compress(ARCHITECTURES["t5"].model(), WasiConfig(residual=None, weight_rank=3))
    batch = ARCHITECTURES["t5"].batch()
    plain = to_plain(t5, batch)
    with torch.no_grad():
        assert_same(plain(**batch).logits, t5(**batch).logits)
    asked = plain.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(asked) is LinearPair and asked.weight.isnan().all() and "weight" not in asked.state_dict()
    assert (asked.weight.shape, asked.weight.dtype) == ((16, 24), torch.float32)
    assert (asked.in_features, asked.out_features, asked.bias) == (24, 16, None)
    assert plain.to(torch.bfloat16).encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    assert type(plain.encoder.block[0].layer[1].DenseReluDense.wi) is nn.Sequential, "nobody asks it"


class Computing(nn.Module):
    """Multiplies with a weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        form = FactoredLinear.from_parts({"L": torch.ones(4, 1), "R": torch.ones(1, 4)}, None, nn.Linear)
        self.fc = CompressedLinear(form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.fc.weight.t()


class Peeking(Computing):
    """Looks for a weight and does something else where there is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if getattr(self.fc, "weight", None) is not None else x


def test_they_have_what_code_looks_for() -> None:
    model, x = Peeking(), torch.randn(2, 4)
    assert_same(to_plain(model, x)(x), model(x))


# ------------------------------------------------------------------------------------------------ refusals


def test_code_that_computes_with_a_weight_is_named() -> None:
    with pytest.raises(ValueError, match=r"got a difference of inf\. The model's code asks fc for its weight"):
        to_plain(Computing(), torch.randn(2, 4))


def test_wrong_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactoredLinear, "factors", lambda self: (self.L, 1.01 * self.R))
    model = compress(ARCHITECTURES["vit"].model(), WasiConfig(residual=None, weight_rank=3))
    with pytest.raises(ValueError, match=r"must answer as the model does, to 0.00035"):
        monkeypatch.setattr(FactoredLinear, "forward", lambda self, x: (x @ self.R.T) @ self.L.T + self.bias)
        to_plain(model)
    to_plain(model, tolerance=0.5)


def test_other_adapters_are_refused() -> None:
    model = get_peft_model(ARCHITECTURES["vit"].model(), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(TypeError, match="must be a PEFT model with a WASI adapter, got LoraModel"):
        to_plain(model)
    native = ARCHITECTURES["vit"].model()
    native.add_adapter(LoraConfig(target_modules=["fc1"]))
    with pytest.raises(TypeError, match=r"vit.layers.0.mlp.fc1: Linear has no plain form; merge adapters"):
        to_plain(native)


def test_a_model_that_says_nothing_of_its_input_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="batch= is needed, what the model is called with: Sequential does not say"):
        to_plain(nn.Sequential(nn.Linear(2, 2)))


def test_products_that_round_do_not_count() -> None:
    model = compress(ARCHITECTURES["vit"].model(), WasiConfig(residual_product="int8"))
    to_plain(model, tolerance=1e-5)
    products = [module.products for module in model.modules() if isinstance(module, Int8Residual)]
    assert {choice.asked for choice in products} == {"int8"}, "those of the model stay"
    assert all(isinstance(choice, ProductChoice) for choice in products)


# ------------------------------------------------------------------------------------------------ the folder

READ = """
import sys
sys.modules["wasi_peft"] = sys.modules["peft"] = None  # any import of them fails
sys.path.insert(0, sys.argv[1])
import load, torch
model = load.load()
assert not model.training
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
assert sys.modules["wasi_peft"] is None and sys.modules["peft"] is None
"""


@pytest.mark.parametrize(
    "name,form", [("vit", "factors"), ("llama_tied", "factors"), ("gpt2", "int8"), ("t5", "factors")]
)
def test_the_folder_needs_no_wasi_peft(name: str, form: str, tmp_path: Path) -> None:
    model = adapted(name, form)
    assert export(model, tmp_path / "plain", batch=batch_of(name)) < 1e-5
    torch.save(batch_of(name), tmp_path / "batch.pt")
    paths = [str(tmp_path / part) for part in ("plain", "batch.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", READ, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(paths[2]), logits(model, name))
    assert len((tmp_path / "plain" / "load.py").read_text().splitlines()) < 50


def test_who_does_not_know_the_layers_stops(tmp_path: Path) -> None:
    export(adapted("vit", "factors"), tmp_path / "pairs")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "pairs")
    model = adapted("vit", "int8")
    export(model, tmp_path / "dense")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert_same(logits(loaded, "vit"), logits(model, "vit"))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    export(adapted("vit", "factors"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["factored_layers"].popitem()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    code = "import load; load.load()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "plain", capture_output=True, text=True)
    assert "factored.safetensors does not fit config.json" in done.stderr


@pytest.mark.parametrize("form", ["factors", "int8"])
def test_it_generates_as_the_model_does(form: str, tmp_path: Path) -> None:
    model: Any = adapted("llama", form)
    model.get_base_model().generation_config.update(max_new_tokens=5, do_sample=True, temperature=0.3)
    export(model, tmp_path / "plain")
    load = runpy.run_path(str(tmp_path / "plain" / "load.py"))["load"]
    loaded = load().generation_config
    assert (loaded.max_new_tokens, loaded.do_sample, loaded.temperature) == (5, True, 0.3)
    assert load(generation_config=GenerationConfig(max_new_tokens=7)).generation_config.max_new_tokens == 7


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = compress(ARCHITECTURES["llama"].model().to(torch.bfloat16), WasiConfig(residual=None, weight_rank=3))
    assert export(model, tmp_path / "plain") < 0.03
    assert {part.dtype for part in to_plain(model).parameters()} == {torch.bfloat16}


def test_own_classes_are_refused(tmp_path: Path) -> None:
    class Own(ViTForImageClassification):
        pass

    with pytest.raises(TypeError, match="for model classes of transformers, got Own; see to_plain"):
        export(Own(ARCHITECTURES["vit"].model().config), tmp_path / "own")
    assert list(tmp_path.iterdir()) == []
