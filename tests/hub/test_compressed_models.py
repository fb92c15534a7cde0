"""Compressed models: made, saved, loaded, restored, adapted; and files that claim what is not so."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import transformers.core_model_loading
from models import ARCHITECTURES, Architecture, logits, train, wasi_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wasi_peft import WasiConfig, compress
from wasi_peft.forms.compressed import CompressedLinear
from wasi_peft.hub import compressed as hub_compressed
from wasi_peft.hub.compressed import WasiQuantizationConfig, mark_compressed
from wasi_peft.hub.headers import is_compressed, read_headers
from wasi_peft.tuner.layer import WasiLayer
from wasi_peft.tuner.model import WasiModel
from wasi_peft.tuner.prepared import attached_layers

pytestmark = pytest.mark.usefixtures("exact_products")

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"residual": "int4"},
    "factors": {"weight_share": 0.6},
    "factors in 8 bits": {"weight_share": 0.4, "frozen_dtype": "int8"},
}
IN_FEW_BITS: dict[str, dict[str, Any]] = {  # other parts of factors, and other bits
    f"{update} {bits}": {"update": update, "weight_share": 0.5, "update_rank": rank, "frozen_dtype": bits}
    for update, rank in (("frozen_basis", None), ("low_rank", 2), ("core", None))
    for bits in ("int8", "bfloat16")
}
LLAMA, VIT = ARCHITECTURES["llama"], ARCHITECTURES["vit"]


def made(architecture: Architecture, **options: Any) -> Any:
    return compress(architecture.model(), WasiConfig(**options)).eval()


def layers(model: nn.Module) -> dict[str, CompressedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}


def load(model: nn.Module, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options).eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_line_reads_it_again(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    model, batch = made(architecture, **CONFIGS[kind]), architecture.batch()
    assert layers(model) and len(layers(model)) <= architecture.target_count
    model.save_pretrained(tmp_path / "a")
    loaded = load(model, tmp_path / "a")
    assert {name: layer.form_name for name, layer in layers(loaded).items()} == {
        name: layer.form_name for name, layer in layers(model).items()
    }
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("kind", IN_FEW_BITS)
def test_factors_in_few_bits_are_stored_in_few_bits(kind: str, tmp_path: Path) -> None:
    """They take the bytes of their codes, and answer exactly as they did before they were saved."""
    adapter, batch = peft.get_peft_model(LLAMA.model(), WasiConfig(**IN_FEW_BITS[kind])), LLAMA.batch()
    train(adapter, batch, steps=2)
    expected, codes = logits(adapter, batch), {torch.int8, torch.bfloat16}
    model = compress(adapter)
    assert torch.equal(logits(model, batch), expected)
    rounded = [value for value in model.state_dict().values() if value.dtype in codes]
    parts = 1 if "basis" in kind else 2
    assert len(rounded) == parts * len(layers(model)) == parts * LLAMA.target_count
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = [file.get_tensor(key) for key in file.keys()]
    assert sum(value.nbytes for value in stored) == sum(value.nbytes for value in model.state_dict().values())
    loaded = load(model, tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    added = wasi_model(loaded, weight_rank=2, residual="int8", update="addition")
    train(added, batch, steps=2)
    after = logits(added, batch)
    merged = added.merge_and_unload()
    assert {layer.form_name for layer in layers(merged).values()} == {"split"}
    close(logits(merged, batch), after, 1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_dense_weight_is_made_while_it_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(LLAMA, **CONFIGS[kind])
    model.save_pretrained(tmp_path)
    shapes = {(layer.out_features, layer.in_features) for layer in layers(model).values()}
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result.is_meta and result.is_floating_point():
                seen.append(tuple(result.shape))
            return result

    with Watch():
        loaded = load(model, tmp_path)
    assert seen and not shapes.intersection(seen)
    assert layers(loaded)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_file_is_smaller_and_its_names_stop_who_does_not_know_it(kind: str, tmp_path: Path) -> None:
    dense = VIT.model()
    dense.save_pretrained(tmp_path / "dense")
    model = made(VIT, **CONFIGS[kind])
    model.save_pretrained(tmp_path / "small")
    sizes = {name: os.path.getsize(tmp_path / name / "model.safetensors") for name in ("dense", "small")}
    assert sizes["small"] < 0.9 * sizes["dense"]
    code = f"import transformers, sys\ntransformers.{type(dense).__name__}.from_pretrained(sys.argv[1])\n"
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "small")], capture_output=True, text=True)
    assert ran.returncode != 0 and "size mismatch" in ran.stderr + ran.stdout


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_with_another_head_and_without_one(name: str, kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = made(architecture, **CONFIGS[kind])
    model.save_pretrained(tmp_path)
    bare = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert len(layers(bare)) == len(layers(model))
    batch = {key: value for key, value in architecture.batch().items() if key != "labels"}
    expected = model.base_model(**batch)[0]
    close(bare(**batch)[0], expected)
    bare.save_pretrained(tmp_path / "bare")
    headed = load(model, tmp_path / "bare")
    close(headed.base_model(**batch)[0], expected)


def test_a_head_of_another_size(tmp_path: Path) -> None:
    """A new one, or a refusal by versions of transformers that would take that of the checkpoint."""
    model = made(VIT)
    model.save_pretrained(tmp_path)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    source = inspect.getsource(transformers.core_model_loading.set_param_for_module)
    if "param_needs_quantization" not in source:
        with pytest.raises(ValueError, match=r"classifier\.weight: must have shape \(7, 16\), got \(3, 16\)"):
            load(model, tmp_path, **options)
        return
    headed = load(model, tmp_path, **options)
    assert headed.classifier.weight.shape == (7, 16) and len(layers(headed)) == len(layers(model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_bfloat16(kind: str, tmp_path: Path) -> None:
    model, batch = made(LLAMA, **CONFIGS[kind]), LLAMA.batch()
    model.save_pretrained(tmp_path)
    half = load(model, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    scales = [value for key, value in half.state_dict().items() if key.endswith(".scale")]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in half.state_dict().items()
               if key.endswith(".scale")) and bool(scales) == (kind != "factors")  # fmt: skip
    whole = logits(model, batch)
    assert (logits(half, batch).float() - whole).norm() < 0.15 * whole.norm()
    half.save_pretrained(tmp_path / "half")
    again = load(model, tmp_path / "half")
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again, batch), logits(half, batch))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama_tied"])
def test_dequantize_is_the_dense_model(name: str, kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = made(architecture, **CONFIGS[kind]), architecture.batch()
    kinds = {key: type(module) for key, module in architecture.model().named_modules()}
    model.save_pretrained(tmp_path / "small")
    dense = load(model, tmp_path / "small").dequantize().eval()
    assert {key: type(module) for key, module in dense.named_modules()} == kinds
    close(logits(dense, batch), logits(model, batch), 1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(load(model, tmp_path / "dense"), batch), logits(dense, batch))


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_is_the_same(kind: str, tmp_path: Path) -> None:
    model = made(LLAMA, **CONFIGS[kind])
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = LLAMA.batch(2)["input_ids"][:, :3]
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


def test_sharded(tmp_path: Path) -> None:
    model, batch = made(LLAMA), LLAMA.batch()
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(model, tmp_path), batch), logits(model, batch))


def test_copies(tmp_path: Path) -> None:
    model, batch = made(VIT), VIT.batch()
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(load(model, tmp_path))
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load(model, tmp_path / "copy"), batch), logits(model, batch))


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_an_adapter_trains_on_it(name: str, update: str, kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    base, batch = made(architecture, **CONFIGS[kind]), architecture.batch()
    base.save_pretrained(tmp_path / "base")
    before = logits(base, batch)
    options = {"weight_rank": 2, "residual": "int8", "update": update, "residual_product": "restored"}
    model = wasi_model(load(base, tmp_path / "base"), **options)
    close(logits(model.eval(), batch), before)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if ".base_layer." in key}
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    assert frozen and all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    after = logits(model.eval(), batch)
    with model.disable_adapter():
        close(logits(model, batch), before)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not any("base_layer" in key for key in saved)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(load(base, tmp_path / "base"), tmp_path / "adapter").eval()
    close(logits(loaded, batch), after, 1e-4)
    model.add_adapter("ref", WasiConfig(**options))
    model.set_adapter("ref")
    close(logits(model.eval(), batch), before)
    model.set_adapter("default")
    model.delete_adapter("ref")
    merged = loaded.merge_and_unload()
    assert {key: layer.form_name for key, layer in layers(merged).items()} == {
        key: "split" if layer.stored_form.bits else layer.form_name for key, layer in layers(base).items()
    }
    close(logits(merged, batch), after, 1e-4)
    mark_compressed(merged).save_pretrained(tmp_path / "merged")
    close(logits(load(base, tmp_path / "merged"), batch), after, 1e-4)
    dense = model.merge_and_unload(dense=True)
    assert not layers(dense)
    close(logits(dense, batch), after, 1e-3)


@pytest.mark.parametrize("base", ["dense", "int8", "factors"])
@pytest.mark.parametrize("dense", [None, True, False])
def test_what_is_merged_is_saved_as_what_it_is(base: str, dense: bool | None, tmp_path: Path) -> None:
    model, batch = LLAMA.model() if base == "dense" else made(LLAMA, **CONFIGS[base]), LLAMA.batch()
    adapted = peft.get_peft_model(model, WasiConfig(weight_rank=2))
    train(adapted, batch, steps=2)
    expected = logits(adapted.eval(), batch)
    merged = adapted.merge_and_unload(dense=dense)
    close(logits(merged, batch), expected, 1e-4)
    merged.save_pretrained(tmp_path)
    loaded = load(merged, tmp_path)
    close(logits(loaded, batch), expected, 1e-4)
    assert bool(layers(loaded)) == (dense is False or (dense is None and base != "dense"))
    assert hasattr(merged.config, "quantization_config") == bool(layers(merged))


def test_other_adapters_inside_are_not_saved_as_if_there_were_none(tmp_path: Path) -> None:
    model = peft.get_peft_model(made(LLAMA), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"q_proj: there is an adapter on this layer\. Save the PEFT model"):
        model.get_base_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_head_that_was_compressed_too(tmp_path: Path) -> None:
    model = made(LLAMA, target_modules=["lm_head", "q_proj"], weight_rank=2)
    model.save_pretrained(tmp_path)
    assert len(layers(load(model, tmp_path))) == len(layers(model)) == 3
    other = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(layers(other)) == len(layers(transformers.AutoModel.from_pretrained(tmp_path))) == 2


def test_its_adapter_is_as_large_as_that_of_lora(tmp_path: Path) -> None:
    def size(config: Any) -> int:
        model = peft.get_peft_model(made(LLAMA, weight_share=0.6), config)
        model.save_pretrained(tmp_path)
        return sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values())

    names = sorted({name.rpartition(".")[2] for name in layers(made(LLAMA, weight_share=0.6))})
    wasi = size(WasiConfig(weight_rank=2, bias="none", train_vectors=False, target_modules=names))
    assert wasi == size(peft.LoraConfig(r=2, target_modules=names))


@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_trains_on_it(kind: str) -> None:
    base, batch = made(LLAMA, **CONFIGS[kind]), LLAMA.batch()
    before = logits(base, batch)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    assert torch.equal(logits(model.eval(), batch), before)
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    weights = {name: layer.dense_weight() for name, layer in layers(model).items()}
    with pytest.raises(AttributeError, match=r"this weight is multiplied out .*model\.dequantize\(\)"):
        model.merge_and_unload()
    assert all(torch.equal(layer.dense_weight(), weights[name]) for name, layer in layers(model).items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_becomes_a_compressed_model(kind: str, tmp_path: Path) -> None:
    config, batch = WasiConfig(**CONFIGS[kind], modules_to_save=["classifier"]), VIT.batch()
    model = peft.get_peft_model(VIT.model(), config)
    train(model, batch, steps=2)
    expected = logits(model.eval(), batch)
    small = compress(model)
    assert type(small) is type(VIT.model())
    close(logits(small, batch), expected, 1e-4)
    small.save_pretrained(tmp_path)
    close(logits(load(small, tmp_path), batch), expected, 1e-4)


def test_the_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """A compressed model trains its factors itself, and is saved and loaded under the names of the files."""
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 20, (4, 6))]

    def trainer(steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        torch.manual_seed(0)
        return transformers.Trainer(made(LLAMA, weight_share=0.6), arguments, train_dataset=data)

    whole = trainer(2)
    whole.train()
    again = trainer(2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for key, value in whole.model.state_dict().items():
        close(again.model.state_dict()[key], value)


# ---------------------------------------------------------------- misuse


def test_what_cannot_be_compressed() -> None:
    with pytest.raises(ValueError, match="residual='exact' keeps the dense weights"):
        made(VIT, residual="exact")
    with pytest.raises(ValueError, match="no layer became smaller"):
        made(VIT, explained_variance_threshold=1.0)
    with pytest.raises(TypeError, match="must be a WASI adapter, got LoraModel"):
        compress(peft.get_peft_model(VIT.model(), peft.LoraConfig(target_modules=["fc1"])))
    adapter = wasi_model(VIT.model())
    with pytest.raises(ValueError, match="an adapter has its forms already"):
        compress(adapter, WasiConfig())
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'other'"):
        compress(adapter, adapter_name="other")
    with pytest.raises(ValueError, match="no layer became smaller"):
        mark_compressed(VIT.model())
    with pytest.raises(ValueError, match=r"compressed already; restore its dense layers first, by model\.dequantize"):
        compress(made(VIT), WasiConfig(residual="int4"))
    with pytest.raises(ValueError, match="adapter_name is for a PEFT model"):
        compress(VIT.model(), adapter_name="default")
    for model, config in ((VIT.model(), "int8"), (VIT.model(), peft.LoraConfig()), ("folder", None)):
        with pytest.raises(TypeError, match="compress takes a model and a WasiConfig, got"):
            compress(model, config)


def test_a_head_is_not_said_to_be_untrained(caplog: pytest.LogCaptureFixture) -> None:
    compress(VIT.build())
    assert "newly initialised" not in caplog.text
    peft.get_peft_model(VIT.build(), WasiConfig())
    assert "newly initialised" in caplog.text


def test_a_failed_injection_leaves_the_dense_model() -> None:
    model, batch = VIT.model(), VIT.batch()
    before = logits(model, batch)
    with pytest.raises(ValueError, match="rank must be at most"):
        compress(model, WasiConfig(weight_rank=1000))
    assert torch.equal(logits(model, batch), before) and not layers(model)


@pytest.mark.parametrize("kind", ["int8", "factors", "factors in 8 bits"])
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (CompressedLinear, "__init__", 1),
        (CompressedLinear, "__init__", 12),
        (WasiLayer, "unload_and_optionally_merge_module", 5),
        (hub_compressed, "quantization_config", 1),
    ],
)
def test_an_interrupt_leaves_the_dense_model(
    owner: Any, name: str, count: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When layers become compressed their weights are gone already: it has those of the forms."""
    model, calls, real = LLAMA.model(), [0], getattr(owner, name)
    model.get_input_embeddings().requires_grad_(False)
    keys, trains = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    expected = logits(made(LLAMA, **CONFIGS[kind]), LLAMA.batch())

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        compress(model, WasiConfig(**CONFIGS[kind]))
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert not any(hasattr(model, name) for name in ("peft_config", "hf_quantizer", "quantization_method"))
    close(logits(model.eval(), LLAMA.batch()), expected)
    assert layers(compress(model, WasiConfig(**CONFIGS[kind])))


def test_where_no_layer_becomes_smaller_all_trains_as_before() -> None:
    model = VIT.model()
    with pytest.raises(ValueError, match="no layer became smaller"):
        compress(model, WasiConfig(explained_variance_threshold=1.0))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_prepared_for_a_failed_injection_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VIT.model()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WasiModel, "_release", interrupt)
        compress(model, WasiConfig(**CONFIGS["factors"]), [VIT.batch()], progress_bar=False)
    assert not attached_layers(model)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]
Q = "vit.layers.0.attention.q_proj"


def entry(**values: Any) -> Edit:
    return lambda config, _: config["layers"][Q].update(values)


def tensor(part: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.{part}"] = change(tensors[f"{Q}.{part}"]).contiguous()

    return edit


def without(part: str) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q}.{part}"]

    return edit


def renamed(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["layers"]["vit.layers.7.q_proj"] = config["layers"].pop(Q)


def not_linear(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["layers"]["vit.layernorm"] = config["layers"].pop(Q)


DAMAGES: dict[str, tuple[str, Edit, str]] = {
    "another version": ("int8", lambda config, _: config.update(format_version=2), "of format_version 1, got 2"),
    "no layers": ("int8", lambda config, _: config.update(layers={}), "must be a dict by module name, got {}"),
    "layers as a list": (
        "int8",
        lambda config, _: config.update(layers=[1]),
        r"must be a dict by module name, got \[",
    ),
    "no rank": ("int8", lambda config, _: config["layers"][Q].pop("rank"), "must have the keys form"),
    "rank as text": ("factors", entry(rank="5"), "must have the keys form .* got .*'5'"),
    "rank as a truth value": ("int8", entry(rank=True), "must have the keys form"),
    "negative rank": ("int8", entry(rank=-1), "must have the keys form"),
    "no such form": ("int8", entry(form="int3"), rf"{Q}: a form must be one of"),
    "huge rank": ("factors", entry(rank=10**9), rf"{Q}: rank must be from 1 to min.* = 16, got 1000000000"),
    "no rank of factors": ("factors", entry(rank=0), rf"{Q}: rank must be from 1"),
    "another rank": (
        "factors",
        lambda c, _: c["layers"][Q].update(rank=c["layers"][Q]["rank"] - 1),
        "must be of shape",
    ),
    "another form": ("int8", entry(form="int4"), rf"{Q}: the checkpoint lacks 'wasi_smallest'"),
    "factors that are not there": ("int8", entry(rank=2), rf"{Q}: the checkpoint lacks 'wasi_added_L'"),
    "no such layer": ("int8", renamed, r"vit\.layers\.7\.q_proj: .* of another model; .* got no such module"),
    "no linear layer": ("int8", not_linear, r"vit\.layernorm: .* must be a Linear or packed experts, got LayerNorm"),
    "missing codes": (
        "int8",
        without("wasi_codes"),
        rf"{Q}: the checkpoint lacks 'wasi_codes'",
    ),
    "missing bias": ("int8", without("bias"), rf"{Q}: the checkpoint lacks 'bias'"),
    "no dense tensor": (
        "int8",
        lambda _, tensors: tensors.pop("vit.layers.0.layernorm_before.weight").zero_(),
        r"vit\.layers\.0\.layernorm_before\.weight: the checkpoint lacks this tensor",
    ),
    "part of a layer that is not named": (
        "int8",
        lambda _, tensors: tensors.update({"vit.layers.7.wasi_codes": torch.zeros(2)}),
        r"vit\.layers\.7\.wasi_codes: the checkpoint holds a part of a layer that its configuration does not name",
    ),
    "no layers at all": ("int8", lambda config, _: config.pop("layers"), "must be a dict by module name, got None"),
    "a tensor too many": (
        "int8",
        lambda _, tensors: tensors.update({f"{Q}.wasi_L": torch.zeros(2)}),
        rf"{Q}: the checkpoint has, besides what its form stores, 'wasi_L'",
    ),
    "codes as float": (
        "int8",
        tensor("wasi_codes", Tensor.float),
        r"wasi_codes: must be of shape \(16, 16\) and dtype I8",
    ),
    "scale as int": ("int8", tensor("weight", Tensor.int), r"weight: must be of shape \(16, 1\) and dtype F64 or F32"),
    "fewer rows": (
        "int8",
        tensor("wasi_codes", lambda codes: codes[1:]),
        r"must be of shape \(16, 16\) .* got \(15, 16\)",
    ),
    "more columns": ("factors", tensor("weight", lambda R: torch.cat([R, R], 1)), "must be of shape"),
}


@pytest.mark.parametrize(("kind", "edit", "match"), DAMAGES.values(), ids=DAMAGES.keys())
def test_files_that_claim_what_is_not_so(kind: str, edit: Edit, match: str, tmp_path: Path) -> None:
    model = made(VIT, **CONFIGS[kind])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    edit(config["quantization_config"], tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        load(model, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    model = made(VIT)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    changed = {"cut": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage]
    path.write_bytes(changed)
    with pytest.raises(Exception, match=r"damaged|[Hh]eader|safetensors"):
        load(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "must be a JSON file: Expecting"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "layers of a compressed checkpoint must be a dict"),
    ],
)
def test_a_configuration_that_headers_cannot_be_read_by_is_named(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {match}")):
        read_headers(tmp_path)
    if text != "{}":
        with pytest.raises(ValueError, match=re.escape(f"{path}: {match}")):
            is_compressed(tmp_path)


def test_a_dense_model_is_not_compressed_by_loading_it(tmp_path: Path) -> None:
    model = VIT.model()
    model.save_pretrained(tmp_path)
    layers_of = {Q: {"form": "int8", "rank": 0}}
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        load(model, tmp_path, quantization_config=WasiQuantizationConfig(layers_of))


def test_it_is_never_left_on_disk(tmp_path: Path) -> None:
    model = made(VIT)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(model, tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off")


def test_names_in_files(tmp_path: Path) -> None:
    made(VIT, weight_share=0.6).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if ".form." in key or ".residual." in key]
