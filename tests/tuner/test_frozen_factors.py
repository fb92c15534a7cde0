"""Whole models whose frozen factors are in few bits: bytes, files, casts, budgets, resizing, modes, bad input."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture, checkpoint_activations, logits, train
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from strategies import relative_error
from torch import Tensor, nn

from wasi_peft import (
    OptimizerInBackward,
    SubspaceSGD,
    WasiConfig,
    WasiFactors,
    calibrate_wasi,
    create_wasi_optimizer,
    estimate_wasi,
    fold_cores,
    measure_peak_memory,
    merge_slow_layers,
    plan_wasi,
    preprocess_wasi,
    resize_rank,
    wasi_summary,
)
from wasi_peft.forms import products
from wasi_peft.forms.frozen import FROZEN
from wasi_peft.memory.modes import MEMORY_MODES
from wasi_peft.ranks.plan import WasiPlan
from wasi_peft.ranks.spectrum import FACTORS
from wasi_peft.tuner.layer import WasiLayer, wasi_layers
from wasi_peft.updates import UPDATES

VIT, LLAMA = ARCHITECTURES["vit"], ARCHITECTURES["llama"]
ABLE = tuple(name for name, update in UPDATES.items() if update.frozen_factors())
updates = pytest.mark.parametrize("update", ABLE)
dtypes = pytest.mark.parametrize("stored", FROZEN)


def options(update: str = "frozen_basis", stored: str | None = "int8", **others: Any) -> dict[str, Any]:
    own = {"update_rank": 2, "activation_threshold": None} if update == "low_rank" else {}
    common = {"update": update, "frozen_dtype": stored, "residual": None, "weight_rank": 6}
    return {**common, "residual_product": "restored", **own, **others}


def build(architecture: Architecture = VIT, **others: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(architecture.model(), WasiConfig(**options(**others)))


def form_bytes(model: nn.Module) -> int:
    """Of all factors, biases left out."""
    forms = [layer.form for _, layer in wasi_layers(model)]
    return sum(tensor.nbytes for form in forms for name, tensor in form.tensors() if name != "bias")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- what they are


@updates
@pytest.mark.parametrize(("name", "stored"), [("vit", "bfloat16"), *((name, "int8") for name in ARCHITECTURES)])
def test_it_trains_and_the_frozen_factors_stay(name: str, update: str, stored: str) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture, update=update, stored=stored)
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers() if ".wasi_form." in name}
    count = len(UPDATES[update].frozen_factors()) * (2 if stored == "int8" else 1)
    assert len(frozen) == architecture.target_count * count
    losses = train(model, architecture.batch(), steps=6)
    assert losses[-1] < losses[0]
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers() if name in frozen)
    trains = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".wasi_" in name}
    assert trains - {"bias"} == {f"wasi_{part}" for part in UPDATES[update].trained}


@updates
@dtypes
def test_they_start_near_the_factors_that_are_not_rounded(update: str, stored: str) -> None:
    expected = logits(build(update=update, stored=None), VIT.batch())
    error = relative_error(logits(build(update=update, stored=stored), VIT.batch()), expected)
    assert 1e-5 < error < {"int8": 0.05, "bfloat16": 0.02}[stored]


def test_none_is_the_default_and_stores_parameters() -> None:
    model = get_peft_model(VIT.model(), WasiConfig(residual=None, weight_rank=6))
    assert WasiConfig().frozen_dtype is None and WasiConfig().residual == "int8"
    assert not [name for name, _ in model.named_buffers() if ".wasi_form." in name]


@updates
@dtypes
def test_bytes_are_those_that_the_summary_says(update: str, stored: str) -> None:
    model, plain = build(update=update, stored=stored), build(update=update, stored=None)
    summary = wasi_summary(model)
    assert sum(layer.stored_bytes for layer in summary.layers) == form_bytes(model) < form_bytes(plain)
    assert summary.kept_share < wasi_summary(plain).kept_share


@updates
def test_the_base_comes_back_where_it_was_kept(update: str) -> None:
    model = build(update=update, base_weight="keep")
    train(model, VIT.batch())
    with model.disable_adapter():
        assert torch.equal(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch()))
    moved = logits(model, VIT.batch())
    model.add_adapter("copy", model.peft_config["default"])
    model.set_adapter("copy")
    assert torch.equal(logits(model, VIT.batch()), moved)
    train(model, VIT.batch())
    model.set_adapter("default")
    assert torch.equal(logits(model, VIT.batch()), moved)
    model.add_adapter("other", WasiConfig(**options(update=update, stored=None, base_weight="keep")))
    merged = logits(copy.deepcopy(model).merge_and_unload(), VIT.batch())
    torch.testing.assert_close(merged, moved, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model.unload(), VIT.batch()), logits(VIT.model(), VIT.batch()))


@updates
@dtypes
def test_merging_for_inference(update: str, stored: str) -> None:
    model = build(update=update, stored=stored)
    expected = logits(model, VIT.batch())
    merge_slow_layers(model, VIT.batch(), least_gain=0)
    torch.testing.assert_close(logits(model, VIT.batch()), expected, atol=1e-4, rtol=1e-4)


def test_folded_cores_are_of_parameters(tmp_path: Path) -> None:
    model = build(update="core")
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    fold_cores(model)
    torch.testing.assert_close(logits(model, VIT.batch()), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["frozen_dtype"] is None
    loaded = PeftModel.from_pretrained(VIT.model(), tmp_path)
    torch.testing.assert_close(logits(loaded, VIT.batch()), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- files


@updates
@dtypes
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(update: str, stored: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = build(update=update, stored=stored)
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own = {key: value for key, value in tensors.items() if ".wasi_form.wasi_" in key}
    assert sum(value.nbytes for value in own.values()) == form_bytes(model)
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in own.items() if ".wasi_R." in key}
    bfloat16, int8 = {"values": torch.bfloat16}, {"codes": torch.int8, "scale": torch.float32}
    assert kinds == {"bfloat16": bfloat16, "int8": int8}[stored]
    loaded = PeftModel.from_pretrained(VIT.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, VIT.batch()), expected)
    native: Any = VIT.model()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, VIT.batch()), expected)
    trainable = PeftModel.from_pretrained(VIT.model(), tmp_path, is_trainable=True)
    train(trainable, VIT.batch(), 1)
    assert not torch.equal(logits(trainable, VIT.batch()), expected)


def test_the_file_is_smaller(tmp_path: Path) -> None:
    for stored in ("int8", None):
        build(stored=stored, weight_rank=14).save_pretrained(tmp_path / str(stored))
    int8, plain = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("int8", "None"))
    rows, columns = 14 * 12, 14 * (10 * 16 + 2 * 24)  # of R in all layers
    assert plain - int8 == pytest.approx(4 * columns - (columns + 4 * rows), rel=0.25)


def test_a_second_adapter_may_be_stored_otherwise(tmp_path: Path) -> None:
    expected = {}
    for stored in ("int8", "bfloat16", None):
        model = build(stored=stored)
        train(model, VIT.batch())
        expected[stored] = logits(model, VIT.batch())
        model.save_pretrained(tmp_path / str(stored))
    model = PeftModel.from_pretrained(VIT.model(), tmp_path / "int8", adapter_name="of int8")
    for stored in ("bfloat16", None):
        model.load_adapter(tmp_path / str(stored), adapter_name=f"of {stored}")
    for stored, answer in expected.items():
        model.set_adapter(f"of {stored}")
        assert torch.equal(logits(model, VIT.batch()), answer)


@pytest.mark.parametrize(
    ("own", "given", "match"),
    [
        (
            "int8",
            None,
            r"q_proj: .* wasi_R as wasi_R\.codes, by frozen_dtype='int8' .*, got wasi_R: it was saved with",
        ),
        (
            None,
            "int8",
            r"wasi_R as wasi_R, by frozen_dtype=None .*, got wasi_R\.codes and wasi_R\.scale: it was saved",
        ),
        ("int8", "bfloat16", r"wasi_R as wasi_R\.codes, by frozen_dtype='int8' .*, got wasi_R\.values: it was saved"),
        ("bfloat16", "int8", r"wasi_R as wasi_R\.values, .*, got wasi_R\.codes and wasi_R\.scale: it was saved with"),
    ],
    ids=str,
)
def test_a_file_of_the_other_storage(own: str | None, given: str | None, match: str, tmp_path: Path) -> None:
    """One error before anything changes: of a state dict, and of a folder whose configuration was edited."""
    model, other = build(stored=own), build(stored=given)
    train(other, VIT.batch())
    expected = logits(model, VIT.batch())
    with pytest.raises(ValueError, match=match):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(logits(model, VIT.batch()), expected)
    other.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "frozen_dtype": own}))
    base = VIT.model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, tmp_path)
    for name, value in before.items():
        owner, _, leaf = name.rpartition(".")
        module: Any = base.get_submodule(owner)
        module = module.base_layer if isinstance(module, WasiLayer) else module
        assert torch.equal(getattr(module, leaf), value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, key: t.pop(key.replace("codes", "scale")), r"the adapter lacks wasi_R\.scale"),
        (lambda t, key: t.update({key: t[key][:, :3]}), r"wasi_R\.codes: must have shape \(6, 16\), got \(6, 3\)"),
        (lambda t, key: t.update({key: t[key].int()}), r"must be of a dtype like torch\.int8, got torch\.int32"),
        (lambda t, key: t.update({key: t[key].float()}), r"must be of a dtype like torch\.int8, got torch\.float32"),
        (
            lambda t, key: t[key.replace("codes", "scale")].fill_(torch.nan),
            r"scale: the adapter file holds NaN or Inf",
        ),
    ],
    ids=["no scale", "shape", "int32", "float32", "NaN"],
)
def test_damaged_factors(change: Any, match: str) -> None:
    model = build()
    expected = logits(model, VIT.batch())
    state = {key: value.clone() for key, value in get_peft_model_state_dict(build()).items()}
    change(state, next(key for key in state if key.endswith("q_proj.wasi_form.wasi_R.codes")))
    with pytest.raises(ValueError, match=match):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, VIT.batch()), expected)


def test_factors_that_were_never_loaded_do_not_answer(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = get_peft_model(VIT.model(), WasiConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(RuntimeError, match="the factors of the WASI adapter 'default' were never loaded"):
        model(**VIT.batch())


# ---------------------------------------------------------------- copies and casts


@updates
@dtypes
def test_copies(update: str, stored: str) -> None:
    model = build(update=update, stored=stored)
    expected = logits(model, VIT.batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, VIT.batch()), expected)
        train(other, VIT.batch())
    assert torch.equal(logits(model, VIT.batch()), expected)


@updates
@dtypes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_of_a_model_keep_its_codes(update: str, stored: str, dtype: torch.dtype) -> None:
    model = build(update=update, stored=stored)
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers() if ".wasi_form." in name}
    expected = logits(model, VIT.batch())
    model.to(dtype)
    assert relative_error(logits(model, VIT.batch(dtype=dtype)), expected) < 0.1
    for name, buffer in model.named_buffers():
        if name in frozen:
            assert buffer.dtype == frozen[name].dtype and torch.equal(buffer, frozen[name])


@updates
@dtypes
def test_a_model_of_16_bits_trains_in_float32(update: str, stored: str) -> None:
    model = get_peft_model(VIT.model().to(torch.bfloat16), WasiConfig(**options(update=update, stored=stored)))
    train(model, VIT.batch(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = VIT.batch(dtype=torch.bfloat16)
    merged = logits(copy.deepcopy(model).merge_and_unload(), batch)
    assert relative_error(merged, logits(model, batch)) < 0.1


@updates
@dtypes
@pytest.mark.parametrize("product", [None, "int8"], ids=str)
def test_bfloat16_autocast(update: str, stored: str, product: str | None) -> None:
    model = build(update=update, stored=stored, residual_product=product)
    expected = gradients(build(update=update, stored=stored), VIT.batch())
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**VIT.batch())
        with torch.no_grad():
            assert model(**VIT.batch()).logits.dtype == torch.bfloat16
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    found = torch.cat([model.get_parameter(name).grad.flatten() for name in expected])
    assert relative_error(found, torch.cat([gradient.flatten() for gradient in expected.values()])) < 0.15


# ---------------------------------------------------------------- training as torch and transformers do it


@updates
@dtypes
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_memory_modes(update: str, stored: str, mode: str) -> None:
    plain, other = build(update=update, stored=stored), build(update=update, stored=stored, memory_mode=mode)
    expected, found = gradients(plain, VIT.batch(8)), gradients(other, VIT.batch(8))
    assert expected.keys() == found.keys()
    flat = [torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)]
    assert relative_error(flat[0], flat[1]) < 0.05
    assert torch.allclose(logits(other, VIT.batch()), logits(plain, VIT.batch()), atol=1e-4, rtol=1e-4)


@updates
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(update: str, reentrant: bool) -> None:
    plain, other = build(LLAMA, update=update), build(LLAMA, update=update)
    checkpoint_activations(other, {"use_reentrant": reentrant})
    other.enable_input_require_grads()
    expected, found = gradients(plain, LLAMA.batch()), gradients(other, LLAMA.batch())
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@updates
@dtypes
def test_compiled_training(update: str, stored: str) -> None:
    plain, other = build(update=update, stored=stored), build(update=update, stored=stored)
    expected = gradients(plain, VIT.batch())
    other.train()
    torch.compile(other, backend="aot_eager")(**VIT.batch()).loss.backward()
    for name, gradient in expected.items():
        assert relative_error(other.get_parameter(name).grad, gradient) < 1e-3, name
    torch._dynamo.reset()


@updates
def test_optimizers(update: str) -> None:
    plain, other = build(update=update), build(update=update)
    for model, wrap in ((plain, lambda o: o), (other, OptimizerInBackward)):
        optimizer = wrap(create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2))
        model.train()
        for _ in range(3):
            model(**VIT.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(logits(plain, VIT.batch()), logits(other, VIT.batch()))
    with pytest.raises(ValueError, match=f"SubspaceSGD needs update='subspace', got '{update}'"):
        SubspaceSGD(plain)


@updates
@dtypes
def test_resizing_restores_resizes_and_rounds_again(update: str, stored: str) -> None:
    model = build(update=update, stored=stored)
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
    train(model, VIT.batch())
    name, layer = "vit.layers.0.mlp.fc1", model.base_model.model.vit.layers[0].mlp.fc1
    trained = [layer.form.part(part) for part in layer.update.trained]
    expected = logits(model, VIT.batch())
    resize_rank(model, name, 9, optimizer)
    assert relative_error(logits(model, VIT.batch()), expected) < {"int8": 0.02, "bfloat16": 0.01}[stored]
    for rank in (9, 4):
        resize_rank(model, name, rank, optimizer)
        assert layer.form.weight_rank == rank
        assert all(layer.form.part(part) is old for part, old in zip(layer.update.trained, trained, strict=True))
        assert {type(layer.form.frozen(part)) for part in layer.update.frozen_factors()} == {FROZEN[stored]}
        assert form_bytes(model) == sum(each.stored_bytes for each in wasi_summary(model).layers)
        model.train()
        model(**VIT.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- budgets


def wide() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)))


def data() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(64, 64) * torch.linspace(0.1, 3, 64) for _ in range(2)]


@updates
@dtypes
@pytest.mark.parametrize("share", [0.4, 0.5])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_share_is_of_bytes_and_keeps_more_directions(update: str, stored: str, share: float, prepared: bool) -> None:
    ranks = {}
    for name in (None, stored):
        others = {"weight_rank": None, "weight_share": share, "target_modules": ["0.0", "0.2"]}
        config, model = WasiConfig(**options(update=update, stored=name, **others)), wide()
        if prepared:
            preprocess_wasi(model, config, data(), repair_steps=0, progress_bar=False)
        model = get_peft_model(model, config)
        ranks[name] = [layer.weight_rank for layer in wasi_summary(model).layers]
        held = form_bytes(model) / (4 * (64 * 64 + 64 * 48))
        assert held == pytest.approx(wasi_summary(model).kept_share)
        assert held <= share
    assert sum(ranks[stored]) > sum(ranks[None])
    assert all(more >= less for more, less in zip(ranks[stored], ranks[None], strict=True))


@pytest.mark.parametrize("budget", [{"weight_share": 0.5}, {"peak_bytes": 400_000}, {"error": 0.2}], ids=str)
def test_plans(budget: dict[str, float], tmp_path: Path) -> None:
    model, batch = wide(), data()[0]
    calibration = calibrate_wasi(model, data(), progress_bar=False)
    plans = {}
    for stored in (None, "int8"):
        config = WasiConfig(residual=None, frozen_dtype=stored, target_modules=["0.0", "0.2"])
        plans[stored] = plan_wasi(model, calibration, batch=batch, config=config, **budget)
        assert plans[stored].frozen_dtype == stored
    plan = plans["int8"]
    if "weight_share" in budget:
        assert plans[None].kept_share <= plan.kept_share + 0.1
        kept = {stored: sum(layer.weight_rank for layer in each.layers) for stored, each in plans.items()}
        assert kept["int8"] > kept[None] and plan.kept_share <= 0.5
    if "error" in budget:
        assert plan.kept_share < plans[None].kept_share
    assert "frozen_dtype='int8'" in plan.headline()
    plan.save(tmp_path / "plan.json")
    config = WasiConfig(plan=str(tmp_path / "plan.json"))
    assert config.frozen_dtype == "int8"
    adapted = get_peft_model(model, config)
    assert form_bytes(adapted) == sum(plan.stored_bytes(layer) for layer in plan.layers)
    assert WasiConfig(plan=plan, frozen_dtype="bfloat16").frozen_dtype == "bfloat16"
    assert WasiConfig(plan=plan, update="factor").frozen_dtype is None  # which has nothing to store in few bits


def test_a_plan_of_factors_and_residuals() -> None:
    model = wide()
    calibration = calibrate_wasi(model, data(), progress_bar=False)
    config = WasiConfig(frozen_dtype="int8", target_modules=["0.0", "0.2"])
    plan = plan_wasi(model, calibration, weight_share=0.3, config=config, forms=(FACTORS, "int8"))
    assert {layer.form for layer in plan.layers} == {FACTORS, "int8"}
    assert plan.frozen_dtype == "int8" and plan.kept_share <= 0.3
    adapted = get_peft_model(model, WasiConfig(plan=plan))
    adapted.train()(data()[0]).square().mean().backward()
    assert {layer.update.frozen_dtype for _, layer in wasi_layers(adapted) if layer.residual is None} == {"int8"}


def test_plans_that_do_not_name_it_store_parameters() -> None:
    model = wide()
    calibration = calibrate_wasi(model, data(), progress_bar=False)
    plan = plan_wasi(model, calibration, weight_share=0.5, config=WasiConfig(residual=None, target_modules=["0.0"]))
    saved = plan.to_dict()
    del saved["frozen_dtype"]
    assert WasiPlan.from_dict(saved) == plan and plan.frozen_dtype is None


@updates
@dtypes
def test_the_estimate_is_the_measured_peak(update: str, stored: str) -> None:
    """Of a step with everything that it needs, the model included."""
    config, batch = WasiConfig(**options(update=update, stored=stored)), VIT.batch(32)
    estimate = estimate_wasi(VIT.model(), config, batch=batch, optimizer="sgd_momentum")
    held: list[Any] = []

    def step() -> None:
        model = get_peft_model(VIT.model(), copy.deepcopy(config)).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        held.append(model)

    assert estimate.peak_bytes == pytest.approx(measure_peak_memory(step).peak_bytes, rel=0.03)
    tensors = (*held[0].parameters(), *held[0].buffers())
    assert estimate.weights_bytes == sum(tensor.nbytes for tensor in tensors)
    assert estimate.paper_inference_bytes == form_bytes(held[0])
    plain = estimate_wasi(VIT.model(), WasiConfig(**options(update=update, stored=None)), batch=batch)
    assert estimate.weights_bytes < plain.weights_bytes and estimate.inference_flops == plain.inference_flops


def test_the_estimate_multiplies_as_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the product that is measured to be the fastest, though its own tensors have no memory."""
    monkeypatch.setattr(products, "measured_seconds", lambda *_: {"restored": 1.0, "int8": 2.0})
    peaks = {}
    for product in (None, "restored", "int8"):
        config = WasiConfig(**options(residual_product=product))
        peaks[product] = estimate_wasi(VIT.model(), config, batch=VIT.batch(32)).peak_bytes
    assert peaks[None] == peaks["restored"] != peaks["int8"]


def test_factors_that_were_prepared_for_the_other_storage(tmp_path: Path) -> None:
    """Under a share it decided their ranks; at fixed ranks either will do."""
    others = {"weight_rank": None, "weight_share": 0.4, "target_modules": ["0.0", "0.2"]}
    model = wide()
    config = WasiConfig(**options(stored=None, **others))
    factors = preprocess_wasi(model, config, data(), repair_steps=0, progress_bar=False)
    factors.save(tmp_path / "factors.safetensors")
    assert WasiFactors.load(tmp_path / "factors.safetensors").layers["0.0"].frozen_dtype is None
    match = "prepared it for frozen_dtype None, the configuration now asks for int8"
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, WasiConfig(**options(stored="int8", **others)))
    assert not any(isinstance(module, WasiLayer) for module in model.modules())
    fixed = {"weight_rank": 8, "target_modules": ["0.0", "0.2"]}
    preprocess_wasi(model, WasiConfig(**options(stored=None, **fixed)), data(), repair_steps=0, progress_bar=False)
    assert form_bytes(get_peft_model(model, WasiConfig(**options(stored="int8", **fixed)))) > 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"frozen_dtype": "int4"}, "frozen_dtype must be one of 'bfloat16', 'int8', None, got 'int4'"),
        ({"frozen_dtype": torch.int8}, r"frozen_dtype must be one of .*, got torch\.int8"),
        ({"frozen_dtype": "int8", "update": "factor"}, "needs update='frozen_basis' or .* got frozen_dtype='int8'"),
        ({"frozen_dtype": "int8", "update": "subspace"}, "all of them train with update='subspace'"),
        ({"frozen_dtype": "int8", "residual": "int8"}, "needs residual=None, got frozen_dtype='int8' with residual="),
        ({"frozen_dtype": "int8", "update": "addition"}, "all of them train with update='addition'"),
    ],
    ids=str,
)
def test_bad_values(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WasiConfig(**given)


def test_it_asks_for_factors() -> None:
    config = WasiConfig(frozen_dtype="int8")
    assert (config.residual, config.update) == (None, "frozen_basis")
