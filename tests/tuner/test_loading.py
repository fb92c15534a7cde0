"""Loads that fail leave the model's answers as they were; what is loaded is what was saved, wherever it goes."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import ARCHITECTURES, FORMS, KEPT_BASES, form_options, logits, train, wasi_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from reference import tiny_net
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from wasi_peft import WasiConfig, preprocess_wasi, wasi_summary
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates import make_update

VIT, LLAMA, BERT = ARCHITECTURES["vit"], ARCHITECTURES["llama"], ARCHITECTURES["bert"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD: dict[str, Any] = {"weight_rank": 5, "modules_to_save": ["classifier"]}
forms = pytest.mark.parametrize("form", FORMS)


def vit(**changed: Any) -> nn.Module:
    """The tiny model, with other sizes where asked."""
    config = VIT.build().config
    for name, value in changed.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return type(VIT.build())(config).eval()


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with a head, trained."""
    return save(tmp_path / "adapter", **HEAD)


def save(folder: Path, **options: Any) -> Path:
    model = wasi_model(VIT.model(), **options)
    train(model, VIT.batch())
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    values = load_file(folder / FILE)
    change(values)
    save_file(values, folder / FILE, metadata={"format": "pt"})


def reconfigure(folder: Path, **changed: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changed}))


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model by its name in the base model, wrapped or not."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value.detach().clone()
        for name, value in model.state_dict().items()
    }


def refused(base: nn.Module, folder: Path, match: str, pixels: Tensor | None = None, **options: Any) -> None:
    """`from_pretrained` raises; the model answers as before, and takes a good adapter afterwards."""
    batch = {"pixel_values": images(8) if pixels is None else pixels}
    expected, before = logits(base, batch), values(base)
    with pytest.raises(Exception, match=match):
        PeftModel.from_pretrained(base, folder, **options)
    assert torch.equal(logits(base, batch), expected)
    after = values(base)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


low_memory = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])


# -------------------------------------------------------------------- files of another model


@low_memory
@pytest.mark.parametrize(
    ("changed", "size", "match"),
    [
        ({"num_labels": 7}, 8, r"classifier.*: must have shape \(7.*\), got \(3"),
        ({"image_size": 12}, 12, r"position_embeddings: must have shape \(1, 10, 16\), got \(1, 5, 16\)"),
        ({"hidden_size": 20}, 8, "must have shape"),
        (
            {"hidden_size": 4},
            8,
            "the saved adapter has rank 5, and this layer is 4 x 4. The adapter belongs to another",
        ),
        ({"intermediate_size": 30}, 8, r"fc1.*: must have shape \(30.*\), got \(24"),
        ({"num_hidden_layers": 3}, 8, r"layers\.2\.layernorm_before.weight: the adapter lacks this vector"),
        ({"num_hidden_layers": 1}, 8, r"layers\.1.*do not have the same targeted layers"),
    ],
    ids=str,
)
def test_of_other_sizes(saved: Path, changed: dict[str, Any], size: int, match: str, low_cpu_mem_usage: bool) -> None:
    refused(vit(**changed), saved, match, images(size), low_cpu_mem_usage=low_cpu_mem_usage)


@low_memory
@pytest.mark.parametrize("options", [{}, {"train_vectors": False}, {"bias": "all"}, {"base_weight": "keep"}], ids=str)
def test_with_another_head(tmp_path: Path, options: dict[str, Any], low_cpu_mem_usage: bool) -> None:
    folder = save(tmp_path, **HEAD, **options)
    refused(vit(num_labels=7), folder, r"classifier.*: must have shape", low_cpu_mem_usage=low_cpu_mem_usage)


def test_the_model_takes_a_good_adapter_after_a_bad_one(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop(a_key(tensors, "wasi_R")))
    good = save(tmp_path / "good", **{**HEAD, "weight_rank": 3})
    base = VIT.model()
    with pytest.raises(ValueError, match="incomplete, or belongs to another model"):
        PeftModel.from_pretrained(base, saved)
    reference = PeftModel.from_pretrained(VIT.model(), good)
    again = PeftModel.from_pretrained(base, good)
    assert torch.equal(logits(again, VIT.batch()), logits(reference, VIT.batch()))


# -------------------------------------------------------------------- damaged files


def truncated(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-200])


def garbage(folder: Path) -> None:
    (folder / FILE).write_bytes(b"x" * 100)


def a_key(values: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(values) if part in name)


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda values: values.pop(a_key(values, part)))


def with_extra(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda values: values.update({name: torch.zeros(3, 3)}))


def with_dtype(part: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(values: dict[str, Tensor]) -> None:
        name = a_key(values, part)
        values[name] = (values[name] * (1j if dtype.is_complex else 1)).to(dtype)

    return lambda folder: rewrite(folder, change)


def with_value(part: str, value: float) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda values: values[a_key(values, part)].view(-1)[:1].fill_(value))


def with_shape(part: str) -> Callable[[Path], None]:
    """One element too many along the first dimension."""

    def change(values: dict[str, Tensor]) -> None:
        name = a_key(values, part)
        values[name] = torch.cat([values[name], values[name][:1]])

    return lambda folder: rewrite(folder, change)


PREFIX = "base_model.model.vit.layers.0."
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, ""),
    "garbage": (garbage, ""),
    "no file": (lambda folder: (folder / FILE).unlink(), ""),
    "no L": (without("wasi_L"), "the adapter lacks wasi_L"),
    "no bias": (without("fc2.wasi_form.bias"), "fc2: the adapter lacks bias"),
    "no vector": (without("layernorm_after.weight"), "layernorm_after.weight: the adapter lacks this vector"),
    "no head": (without("classifier.weight"), "classifier"),
    "a core": (with_extra(f"{PREFIX}mlp.fc1.wasi_form.wasi_M"), "wasi_M: the adapter holds this tensor, which"),
    "a stranger": (with_extra(f"{PREFIX}mlp.fc9.weight"), "fc9.weight: the adapter holds this tensor, which"),
    "factors of another layer": (with_extra("base_model.model.classifier.wasi_form.wasi_L"), "the adapter holds this"),
    "dense weight": (with_extra(f"{PREFIX}mlp.fc1.weight"), "fc1.weight: "),
    "bool factor": (with_dtype("q_proj.wasi_form.wasi_R", torch.bool), "q_proj.*wasi_R: must be of a dtype like"),
    "int8 factor": (with_dtype("q_proj.wasi_form.wasi_R", torch.int8), "q_proj.*wasi_R: must be of a dtype like"),
    "int64 factor": (with_dtype("q_proj.wasi_form.wasi_L", torch.int64), "q_proj.*wasi_L: must be of a dtype like"),
    "complex factor": (with_dtype("q_proj.wasi_form.wasi_L", torch.complex64), "must be of a dtype like"),
    "int64 bias": (with_dtype("fc1.wasi_form.bias", torch.int64), "fc1.*bias: must be of a dtype like"),
    "int64 vector": (with_dtype("layernorm_after.bias", torch.int64), "layernorm_after.bias: must be of a dtype like"),
    "int64 head": (with_dtype("classifier.weight", torch.int64), "classifier.*: must be of a dtype like"),
    "NaN in a factor": (with_value("wasi_R", math.nan), "wasi_R: the adapter file holds NaN or Inf"),
    "Inf in a vector": (with_value("layernorm_after.bias", math.inf), "layernorm_after.bias: the adapter file holds"),
    "NaN in the head": (with_value("classifier.bias", math.nan), "classifier.*: the adapter file holds NaN or Inf"),
    "another shape of L": (with_shape("fc1.wasi_form.wasi_L"), r"must have shape \(24, 5\), got \(25, 5\)"),
    "another shape of a vector": (with_shape("layernorm_after.bias"), r"must have shape \(16,\), got \(17,\)"),
    "another shape of the head": (with_shape("classifier.weight"), r"must have shape \(3, 16\), got \(4, 16\)"),
    "other ranks": (lambda folder: reconfigure(folder, ranks=dict.fromkeys(target_names(), 4)), "must have shape"),
    "ranks that fit no layer": (
        lambda folder: reconfigure(folder, ranks=dict.fromkeys(target_names(), 999)),
        "the saved adapter has rank 999, and this layer is .* belongs to another model",
    ),
    "ranks of other layers": (lambda folder: reconfigure(folder, ranks={"vit.fc": 3}), "the same targeted layers"),
    "update core": (lambda folder: reconfigure(folder, update="core"), "lacks wasi_M"),
    "update low_rank": (lambda folder: reconfigure(folder, update="low_rank", update_rank=2), "lacks wasi_B"),
    "dense bias": (with_extra(f"{PREFIX}mlp.fc1.base_layer.bias"), "fc1.*bias: the adapter holds this tensor"),
    "no vectors in the configuration": (lambda folder: reconfigure(folder, train_vectors=False), "holds this tensor"),
    "biases in the configuration": (lambda folder: reconfigure(folder, bias="all"), "lacks this vector"),
    "no head in the configuration": (lambda folder: reconfigure(folder, modules_to_save=None), "classifier"),
}


def target_names() -> set[str]:
    return VIT.targets(VIT.model())


@low_memory
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(saved: Path, damage: str, low_cpu_mem_usage: bool) -> None:
    change, match = DAMAGES[damage]
    change(saved)
    refused(VIT.model().eval(), saved, match, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_further_adapter(saved: Path, damage: str) -> None:
    """The first adapter answers, trains and is saved as before."""
    model = wasi_model(VIT.model(), **HEAD, base_weight="keep")
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    change, match = DAMAGES[damage]
    change(saved)
    with pytest.raises(Exception, match=match):
        model.load_adapter(saved, adapter_name="second")
    assert torch.equal(logits(model, VIT.batch()), expected)
    if "second" in model.peft_config:
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, VIT.batch()), expected)
    losses = train(model, VIT.batch(), 4)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch()))


@pytest.mark.parametrize("damage", ["truncated", "no L", "int64 factor", "another shape of L"])
def test_with_lora_the_base_is_left_alike(saved: Path, damage: str, tmp_path: Path) -> None:
    """As PEFT's own methods: what fails for a truncated file leaves a model that answers."""
    get_peft_model(VIT.model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    garbage(tmp_path / "lora")
    refused(VIT.model().eval(), tmp_path / "lora", "")
    DAMAGES[damage][0](saved)
    refused(VIT.model().eval(), saved, DAMAGES[damage][1])


@forms
@pytest.mark.parametrize("other", FORMS)
def test_the_configuration_of_another_form(tmp_path: Path, form: str, other: str) -> None:
    """Factors that it does not know are refused, never dropped; those that store the same may change places."""
    folder = save(tmp_path, weight_rank=5, **form_options(form), update_rank=2)
    factors = {"explained_variance_threshold": None, "base_weight": "release", "residual_product": None}
    reconfigure(folder, **factors, **FORMS[other], update_rank=2)
    stored = {make_update(FORMS[name]["update"], 2, FORMS[name]["residual"]).stored_cls for name in (form, other)}
    if len(stored) == 1:
        loaded = PeftModel.from_pretrained(VIT.model(), folder)
        assert {layer.update.name for _, layer in wasi_layers(loaded)} == {FORMS[other]["update"]}
    else:
        refused(VIT.model().eval(), folder, "holds this tensor|lacks wasi")


@pytest.mark.parametrize("update_rank", [3, 17, 10**7, 10**12])
def test_another_update_rank_allocates_nothing_of_its_size(tmp_path: Path, update_rank: int) -> None:
    folder = save(tmp_path, weight_rank=4, update="low_rank", update_rank=2)
    reconfigure(folder, update_rank=update_rank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    named = r"update_rank must be at most .* 16, got" if update_rank > 16 else r"wasi_[AB]: must have shape .*, got"
    refused(VIT.model().eval(), folder, named)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize("update_rank", [0, -1, 1.5, "2", True])
def test_an_update_rank_that_is_none(tmp_path: Path, update_rank: Any) -> None:
    folder = save(tmp_path, weight_rank=4, update="low_rank", update_rank=2)
    reconfigure(folder, update_rank=update_rank)
    refused(VIT.model().eval(), folder, "update_rank must be a positive integer, got")


def test_an_update_of_more_directions_than_any_layer_has_is_refused() -> None:
    net = tiny_net(0)
    with pytest.raises(ValueError, match=r"update_rank must be at most .* of the largest targeted layer, 8, got 40"):
        get_peft_model(net, WasiConfig(update="low_rank", weight_rank=3, update_rank=40))
    assert not list(wasi_layers(net))


@pytest.mark.parametrize("update_rank", [9, 16])
def test_an_update_of_more_directions_than_a_layer_has(tmp_path: Path, update_rank: int) -> None:
    """It trains as many as there are, counts those, and loads again."""
    net = tiny_net(0)
    x = torch.randn(4, 5, 8)
    model = get_peft_model(net, WasiConfig(update="low_rank", weight_rank=3, update_rank=update_rank))
    for layer, entry in zip((layer for _, layer in wasi_layers(net)), wasi_summary(net).layers, strict=True):
        side = min(update_rank, entry.out_features, entry.in_features)
        assert layer.form.B.shape == (entry.out_features, side) and entry.rank == 3 + side
        assert sum(part.numel() for name, part in layer.form.named_parameters() if name != "bias") == (
            entry.stored_elements
        )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_net(0), tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "bert"])
def test_embeddings_that_are_saved_on_request_are_loaded(architecture: str, tmp_path: Path) -> None:
    """As PEFT also does by itself where a vocabulary was resized."""
    text = ARCHITECTURES[architecture]
    model = wasi_model(text.model(), weight_rank=4)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(text.model(), tmp_path)
    assert torch.equal(logits(loaded, text.batch()), logits(model, text.batch()))


# -------------------------------------------------------------------- a state dict into a model that runs


def test_a_bad_state_dict_changes_nothing(saved: Path) -> None:
    model = PeftModel.from_pretrained(VIT.model(), saved)
    before = values(model)
    good = get_peft_model_state_dict(model)
    for name in (a_key(good, "wasi_L"), a_key(good, "layernorm_after"), a_key(good, "classifier")):
        for bad in (good[name][:-1], good[name].long(), good[name] * math.nan):
            with pytest.raises(ValueError, match=r"must have shape|must be of a dtype|NaN or Inf"):
                set_peft_model_state_dict(model, {**good, name: bad})
    with pytest.raises(ValueError, match="holds this tensor"):
        set_peft_model_state_dict(model, {**good, "base_model.model.nothing": torch.zeros(1)})
    after = values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_files_load_into_float32(saved: Path) -> None:
    """Another width of the same kind of numbers is no mistake."""
    model = PeftModel.from_pretrained(VIT.model(), saved)
    rewrite(saved, lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))
    loaded = PeftModel.from_pretrained(VIT.model(), saved)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded, VIT.batch()), logits(model, VIT.batch()), atol=0.1, rtol=0.1)


# -------------------------------------------------------------------- adapters that await their factors


def test_until_factors_come_the_base_answers_and_a_peft_model_refuses(saved: Path) -> None:
    base = VIT.model().eval()
    expected = logits(base, VIT.batch())
    model = get_peft_model(base, WasiConfig.from_pretrained(str(saved)))
    assert torch.equal(logits(base, VIT.batch()), expected)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the factors of the WASI adapter 'default' were never loaded"):
            model(**VIT.batch())
    text = get_peft_model(LLAMA.model(), WasiConfig(ranks=dict.fromkeys(LLAMA.targets(LLAMA.model()), 3)))
    with pytest.raises(RuntimeError, match="never loaded"):
        text.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    result = set_peft_model_state_dict(model, load_file(saved / FILE))
    assert not result.unexpected_keys
    reference = PeftModel.from_pretrained(VIT.model(), saved)
    assert torch.equal(logits(model, VIT.batch()), logits(reference, VIT.batch()))
    assert all(layer.base_is_released for _, layer in wasi_layers(model))


@pytest.mark.parametrize("complete", [True, False])
def test_a_loader_that_tells_nobody(saved: Path, complete: bool) -> None:
    """transformers' own puts parameters into their places one by one. All or none may be there, never some."""
    base = VIT.model().eval()
    model = get_peft_model(base, WasiConfig.from_pretrained(str(saved)))
    tensors = {key.removeprefix("base_model.model."): value for key, value in load_file(saved / FILE).items()}
    own = dict(base.named_parameters())
    keys = sorted(tensors) if complete else sorted(tensors)[:-3]
    for key in keys:
        name = next(n for n in own if n.replace(".default", "").replace(".modules_to_save", "") == key)
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, nn.Parameter(tensors[key]))
    for called in (base, model):
        if complete:
            reference = PeftModel.from_pretrained(VIT.model(), saved)
            assert torch.equal(logits(called, VIT.batch()), logits(reference, VIT.batch()))
        else:
            with pytest.raises(RuntimeError, match=r"never loaded, or hold NaN or Inf \(\d+ layers in all\)"):
                logits(called, VIT.batch())


@pytest.mark.parametrize("init_weights", [True, False])
def test_random_factors_are_no_factors_to_be_loaded(init_weights: bool) -> None:
    model = wasi_model(VIT.model(), weight_rank=16, init_weights=init_weights)
    assert torch.isfinite(logits(model, VIT.batch())).all()
    same = torch.allclose(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch()), atol=1e-4)
    assert same == init_weights
    losses = train(model, VIT.batch(), 4)
    assert losses[-1] < losses[0]


# -------------------------------------------------------------------- what clients do


@forms
def test_merging_with_a_head_that_is_a_container(form: str) -> None:
    """RoBERTa's head has layers of its own and no weight."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=40, num_labels=3))
    config = WasiConfig(weight_rank=5, **form_options(form), update_rank=2, task_type="SEQ_CLS")
    model = get_peft_model(base, config).eval()
    x = torch.randint(5, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=x).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=x).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("form", "base_weight"), [case for case in KEPT_BASES if case[1] != "cpu"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_reference_adapter(form: str, base_weight: str, loaded: bool, tmp_path: Path) -> None:
    """The configuration object once more, as trainers with a frozen reference do; then training and saving go on."""
    options = {"weight_rank": 5, "update_rank": 2, "base_weight": base_weight}
    model: Any = wasi_model(VIT.model(), **FORMS[form], **options)
    train(model, VIT.batch())
    if loaded:
        model.save_pretrained(tmp_path / "first")
        model = PeftModel.from_pretrained(VIT.model(), tmp_path / "first", is_trainable=True)
    expected = logits(model, VIT.batch())
    model.add_adapter("reference", model.peft_config["default"])
    for name, value in list(model.named_parameters()):  # as they also copy, parameter by parameter
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".reference.")).data.copy_(value)
    assert torch.equal(logits(model, VIT.batch()), expected)
    model.set_adapter("reference")
    assert torch.equal(logits(model, VIT.batch()), expected)
    model.set_adapter("default")
    train(model, VIT.batch(), 3)
    moved = logits(model, VIT.batch())
    assert not torch.allclose(moved, expected, atol=1e-3)
    model.save_pretrained(tmp_path / "second", selected_adapters=["default"])
    again = PeftModel.from_pretrained(VIT.model(), tmp_path / "second")
    assert torch.equal(logits(again, VIT.batch()), moved)
    model.set_adapter("reference")
    assert torch.equal(logits(model, VIT.batch()), expected)


def test_a_reference_adapter_of_prepared_ranks(tmp_path: Path) -> None:
    """The ranks of the first adapter stay those of its factors."""
    model, config = VIT.model(), WasiConfig(weight_share=0.6, base_weight="keep")
    preprocess_wasi(model, config, [VIT.batch()], repair_steps=0, progress_bar=False)
    peft_model: Any = get_peft_model(model, config)
    ranks = dict(config.resolved_ranks or {})
    peft_model.add_adapter("reference", peft_model.peft_config["default"])
    assert config.resolved_ranks == ranks
    for name in ("default", "reference"):
        assert {layer.name: layer.weight_rank for layer in wasi_summary(model, name).layers} == ranks
    peft_model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(VIT.model(), tmp_path)
    PeftModel.from_pretrained(VIT.model(), tmp_path / "reference")


@pytest.mark.parametrize(("form", "base_weight"), KEPT_BASES)
def test_the_whole_state_dict_is_storable(form: str, base_weight: str, tmp_path: Path) -> None:
    options = {"weight_rank": 4, "update_rank": 2, "base_weight": base_weight}
    model = wasi_model(LLAMA.model(), **FORMS[form], **options)
    train(model, LLAMA.batch())
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_model(model, path)
    other = wasi_model(LLAMA.model(seed=5), **FORMS[form], **options)
    safetensors.torch.load_model(other, path)
    assert torch.equal(logits(other, LLAMA.batch()), logits(model, LLAMA.batch()))


@forms
@pytest.mark.parametrize("trained_steps", [0, 2])
def test_export_of_a_model_in_evaluation_mode(form: str, trained_steps: int) -> None:
    model = wasi_model(VIT.model(), **form_options(form), weight_rank=5, update_rank=2, modules_to_save=["classifier"])
    if trained_steps:
        train(model, VIT.batch(), trained_steps)
    model.eval()
    program = torch.export.export(model, (), {"pixel_values": images(8)})
    expected = logits(model, {"pixel_values": images(8)})
    torch.testing.assert_close(program.module()(pixel_values=images(8)).logits, expected, atol=1e-5, rtol=1e-5)


COMPILED = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("train_compiled", "load_compiled"), COMPILED, ids=str)
@pytest.mark.parametrize(
    "options", [{"weight_rank": 5, "residual_product": "int8"}, {"weight_share": 0.5, "bias": "all"}], ids=str
)
def test_compiled_bases(train_compiled: bool, load_compiled: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """Files and configurations hold plain names, so an adapter goes from a compiled base to a plain one and back."""

    def base(compiled: bool) -> Any:
        model = BERT.model().eval()
        return torch.compile(model, backend="eager") if compiled else model

    model = get_peft_model(base(train_compiled), WasiConfig(**options))
    layer = next(layer for _, layer in wasi_layers(model))
    with torch.no_grad():
        layer.form.L.add_(0.1)
        for _, vector in layer.vectors.items("default"):
            vector.data.add_(0.1)
    model.save_pretrained(tmp_path)
    names = [*load_file(tmp_path / FILE), *json.loads((tmp_path / CONFIG).read_text())["ranks"]]
    assert names and not any("_orig_mod" in name for name in names)
    loaded = PeftModel.from_pretrained(base(load_compiled), tmp_path)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    plain = PeftModel.from_pretrained(BERT.model(), tmp_path)
    torch.testing.assert_close(logits(loaded, BERT.batch()), logits(plain, BERT.batch()), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_files_are_not_left_open_or_changed_by_a_load_that_fails(saved: Path) -> None:
    reconfigure(saved, update="core")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="lacks wasi_M"):
        PeftModel.from_pretrained(VIT.model(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not [name for name in os.listdir(saved) if name.endswith(".tmp")]


def test_mixed_batches_of_loaded_adapters(tmp_path: Path) -> None:
    """In evaluation mode, where no named adapter trains vectors."""
    paths, expected = [], {}
    for number, name in enumerate(("one", "two")):
        model = wasi_model(VIT.model(), weight_rank=3 + number, train_vectors=False)
        train(model, VIT.batch())
        model.save_pretrained(tmp_path / name)
        paths.append(tmp_path / name)
        expected[name] = logits(model, VIT.batch())
    model = PeftModel.from_pretrained(VIT.model(), paths[0], adapter_name="one")
    model.load_adapter(paths[1], adapter_name="two")
    batch = {key: value for key, value in VIT.batch().items() if key != "labels"}
    names = ["one", "two", "two", "one"]
    model.eval()
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for index, name in enumerate(names):
        torch.testing.assert_close(mixed[index], expected[name][index], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"released .* so '__base__' in adapter_names is not possible"):
        model(**batch, adapter_names=["__base__", *names[1:]])


# ---------------------------------------------------------------- the model inside


def test_the_model_inside_is_not_saved_as_if_it_were_dense(tmp_path: Path) -> None:
    base = vit()
    model = get_peft_model(base, WasiConfig(weight_share=0.6))
    for each in (base, copy.deepcopy(model).get_base_model()):
        with pytest.raises(ValueError, match=r"this model has WASI layers, .* wasi_peft\.compress\(peft_model\)"):
            each.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").exists()


def test_adapters_of_transformers_itself_are_saved_by_it(tmp_path: Path) -> None:
    base = vit()
    base.add_adapter(WasiConfig(weight_share=0.6))
    base.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_base_on_the_meta_device_takes_further_adapters(tmp_path: Path) -> None:
    model = wasi_model(VIT.model(), weight_rank=3)
    model.save_pretrained(tmp_path)
    base = VIT.model()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other")
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, VIT.batch()), logits(model, VIT.batch()))


@pytest.mark.parametrize("options", [{"explained_variance_threshold": 0.7}, {"weight_share": 0.6}], ids=str)
def test_one_configuration_for_two_models(options: dict[str, Any], tmp_path: Path) -> None:
    """What each model's layers got is in its own file."""
    config, models = WasiConfig(**options), []
    for scale in (1.0, 0.0):
        base = VIT.model()
        for parameter in base.parameters():
            if parameter.dim() == 2:  # of rank one, or nearly
                parameter.data.mul_(scale).add_(0.01 * torch.randn_like(parameter)).add_(1 - scale)
        models.append(get_peft_model(base, config).eval())
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(VIT.model(), tmp_path / str(number))
        state, expected = loaded.state_dict(), model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in state if "wasi_" in name)
