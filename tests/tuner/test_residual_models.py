"""Whole models whose weights stay, frozen and in few bits, beside factors: the default configuration."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture, checkpoint_activations, logits, train
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from probes import shared_inputs
from slow import partly_slow
from strategies import relative_error
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from wasi_peft import WasiConfig, compress, wasi_summary
from wasi_peft.forms import products
from wasi_peft.forms.residual import RESIDUALS, ExactResidual, Int8Residual, Residual, ResidualLinear
from wasi_peft.linalg.low_bit import RoundedRows, quantize_rows
from wasi_peft.memory.modes import MEMORY_MODES
from wasi_peft.tuner import inputs
from wasi_peft.tuner.layer import WasiLayer, wasi_layers

VIT, LLAMA, GPT2 = ARCHITECTURES["vit"], ARCHITECTURES["llama"], ARCHITECTURES["gpt2"]
residuals = pytest.mark.parametrize("residual", RESIDUALS)
LARGEST_ERROR = {"exact": 1e-5, "int8": 0.05, "int4": 0.6}  # of the logits of these models, whose weights are large


def build(architecture: Architecture = VIT, **options: Any) -> Any:
    return get_peft_model(architecture.model(), WasiConfig(**{"weight_rank": 4, **options}))


def rounded(architecture: Architecture, residual: str) -> nn.Module:
    """The dense model with the weights that are below the adapters."""
    model = architecture.model()
    for name in architecture.targets(model) if residual != "exact" else ():
        model.set_submodule(name, RESIDUALS[residual](model.get_submodule(name)).to_dense())
    return model


# ---------------------------------------------------------------- nothing is lost


def test_the_default_keeps_what_a_model_knows_and_warns_of_nothing(architecture: Architecture) -> None:
    expected = logits(architecture.model(), architecture.batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(architecture.model(), WasiConfig())
    assert relative_error(logits(model, architecture.batch()), expected) < LARGEST_ERROR["int8"]
    assert {layer.residual.name for _, layer in wasi_layers(model)} == {"int8"}
    with model.disable_adapter():
        assert relative_error(logits(model, architecture.batch()), expected) < LARGEST_ERROR["int8"]


@residuals
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama_tied", "t5"])
def test_the_answers_at_the_start_are_those_of_the_base(name: str, residual: str) -> None:
    """And those of the base are those of the rounded weights; bit for bit where they are exact."""
    architecture = ARCHITECTURES[name]
    model = build(architecture, residual=residual, residual_product="restored")
    base, batch = rounded(architecture, residual), architecture.batch()
    torch.testing.assert_close(logits(model, batch), logits(base, batch), atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        disabled = logits(model, batch)
    if residual == "exact":
        assert torch.equal(disabled, logits(architecture.model(), batch))
    else:
        torch.testing.assert_close(disabled, logits(base, batch), atol=1e-4, rtol=1e-4)
        assert relative_error(disabled, logits(architecture.model(), batch)) > 1e-4
    assert torch.equal(logits(model.unload(), batch), logits(base, batch))


@residuals
def test_it_trains_and_leaves_the_base(residual: str) -> None:
    model = build(residual=residual, residual_product="restored", modules_to_save=["classifier"])
    base = logits(rounded(VIT, residual), VIT.batch())
    losses = train(model, VIT.batch(), steps=15)
    assert losses[-1] < 0.7 * losses[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _, layer in wasi_layers(model):
        assert not any(parameter.requires_grad for parameter in layer._modules["base_layer"].parameters())
    assert not any(".base_layer." in name for name in trained)
    for part in ("wasi_added_L", "wasi_added_R", "bias", "layernorm_before.weight", "cls_token"):
        assert any(part in name for name in trained), part
    moved = logits(model, VIT.batch())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, VIT.batch()), base, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, VIT.batch()), moved)
    merged = logits(copy.deepcopy(model).merge_and_unload(), VIT.batch())
    torch.testing.assert_close(merged, moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
def test_only_what_the_update_says_trains(update: str) -> None:
    model = build(update=update, bias="none", train_vectors=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, VIT.batch(), steps=3)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    parts = ("wasi_added_L", "wasi_added_R")
    # R of both gets its coordinates from the first batch
    assert {name.rpartition(".")[2] for name in moved} == set(parts)
    trains = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == set(parts if update == "addition" else parts[:1])


@residuals
def test_bytes_are_those_that_the_summary_says(residual: str) -> None:

    def held(model: nn.Module) -> int:
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
        return sum(tensors.values())

    model = VIT.model()
    dense = held(model)
    model = get_peft_model(model, WasiConfig(residual=residual, weight_rank=4, train_vectors=False))
    layers = wasi_summary(model).layers
    biases = 4 * sum(layer.out_features for layer in layers)  # the adapter's own
    expected = dense + biases + sum(layer.stored_bytes - layer.dense_bytes for layer in layers)
    assert held(model) == expected
    assert wasi_summary(model).kept_share == sum(x.stored_bytes for x in layers) / sum(x.dense_bytes for x in layers)


def test_no_second_copy_of_a_dense_weight_is_left() -> None:
    model = build()
    for _, layer in wasi_layers(model):
        assert type(layer._modules["base_layer"]) is Int8Residual
        assert layer.form.residual is layer._modules["base_layer"]
    assert {p.dtype for n, p in model.get_base_model().vit.layers.named_buffers()} == {torch.int8, torch.float32}


def test_layers_smaller_than_the_default_rank_train_all_that_they_have() -> None:
    model = get_peft_model(VIT.model(), WasiConfig())
    assert {layer.weight_rank for layer in wasi_summary(model).layers} == {16}


# ---------------------------------------------------------------- adapters


@residuals
def test_adapters_live_side_by_side_above_one_base(residual: str, tmp_path: Path) -> None:
    options = {"residual": residual, "residual_product": "restored"}
    model = build(**options)
    train(model, VIT.batch())
    first = logits(model, VIT.batch())
    model.add_adapter("second", WasiConfig(**options, weight_rank=3))
    model.set_adapter("second")
    torch.testing.assert_close(
        logits(model, VIT.batch()), logits(rounded(VIT, residual), VIT.batch()), atol=1e-4, rtol=1e-4
    )
    train(model, VIT.batch(), lr=2e-2)
    second = logits(model, VIT.batch())
    model.add_adapter("reference", model.peft_config["default"])
    for _, layer in wasi_layers(model):
        assert len({id(layer.form_of(name).residual) for name in layer.wasi_form}) == 1
    for name, expected in (("default", first), ("second", second), ("reference", first), ("default", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model, VIT.batch()), expected)
    model.save_pretrained(tmp_path)
    for name, expected in (("", first), ("second", second)):
        loaded = PeftModel.from_pretrained(VIT.model(), tmp_path / name)
        assert torch.equal(logits(loaded, VIT.batch()), expected)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, VIT.batch()), second)
    model.delete_adapter("reference")
    model.delete_adapter("second")
    assert all(not layer.wasi_form for _, layer in wasi_layers(model))


@residuals
@pytest.mark.parametrize("product", [None, "int8", "restored", "bfloat16"])
def test_what_is_loaded_answers_bit_for_bit(residual: str, product: str | None, tmp_path: Path) -> None:
    model = build(residual=residual, residual_product=product, modules_to_save=["classifier"])
    train(model, VIT.batch())
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(VIT.model(), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded, VIT.batch()), logits(model, VIT.batch()))
        names = {type(layer.residual).name for _, layer in wasi_layers(loaded)}
        assert names == {residual} and not any(parameter.requires_grad for parameter in loaded.parameters())
    resumed = PeftModel.from_pretrained(VIT.model(), tmp_path, is_trainable=True)
    assert train(resumed, VIT.batch(), 3) == train(model, VIT.batch(), 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [("int8", "int4"), ("int8", "exact"), ("exact", "int8"), ("int8", None), (None, "int8"), ("exact", None)],
)
def test_all_adapters_have_one_residual(first: str | None, second: str | None) -> None:
    kept: dict[str, Any] = {None: {"base_weight": "keep"}}
    model = build(residual=first, **kept.get(first, {}))
    expected = logits(model, VIT.batch())
    with pytest.raises(ValueError, match=r"All adapters of a model must have the same residual, .* got "):
        model.add_adapter("other", WasiConfig(residual=second, weight_rank=4, **kept.get(second, {})))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, VIT.batch()), expected)


@residuals
def test_a_state_dict_goes_from_model_to_model(residual: str) -> None:
    model, other = build(residual=residual), build(residual=residual)
    train(model, VIT.batch())
    state = get_peft_model_state_dict(model)
    assert not any(key.endswith((".codes", ".scale", ".smallest")) or "base_layer" in key for key in state)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other, VIT.batch()), logits(model, VIT.batch()))
    factors = build(residual=None)
    before = logits(factors, VIT.batch())
    with pytest.raises(ValueError, match="lacks wasi_L"):
        set_peft_model_state_dict(factors, state)
    with pytest.raises(ValueError, match="lacks wasi_added_L"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(factors))
    assert torch.equal(logits(factors, VIT.batch()), before)
    assert torch.equal(logits(other, VIT.batch()), logits(model, VIT.batch()))


@residuals
def test_a_load_that_fails_leaves_the_dense_model(residual: str, tmp_path: Path) -> None:
    build(residual=residual).save_pretrained(tmp_path)
    base = VIT.model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(Exception, match=r"(?i)header"):
        PeftModel.from_pretrained(base, tmp_path)
    dense = {name.replace(".base_layer.", "."): value for name, value in base.state_dict().items()}
    assert all(torch.equal(dense[name], value) for name, value in before.items())
    assert torch.equal(logits(base, VIT.batch()), logits(VIT.model(), VIT.batch()))


@residuals
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_apart(residual: str, copied: Any) -> None:
    model = build(residual=residual)
    train(model, VIT.batch())
    other = copied(model)
    expected = logits(model, VIT.batch())
    assert torch.equal(logits(other, VIT.batch()), expected)
    for _, layer in wasi_layers(other):
        assert layer.form.residual.module is layer._modules["base_layer"]
    ours = {value.data_ptr() for value in model.state_dict().values()}
    assert not ours & {value.data_ptr() for value in other.state_dict().values()}
    train(other, VIT.batch())
    assert torch.equal(logits(model, VIT.batch()), expected)


@residuals
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_of_a_model_keep_its_codes(residual: str, dtype: torch.dtype) -> None:
    model = build(residual=residual, residual_product="restored").eval()
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if "base_layer" in name}
    expected = logits(model, VIT.batch())
    model.to(dtype)
    batch = VIT.batch(dtype=dtype)
    assert relative_error(logits(model, batch), expected) < 0.1
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    torch.testing.assert_close(logits(model.float(), VIT.batch()), expected, atol=0.02, rtol=0.05)


# ---------------------------------------------------------------- what is shared, what is kept


@contextlib.contextmanager
def counted(owner: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The inputs of `quantize_rows` where a module calls it."""
    calls: list[Tensor] = []

    def counting(x: Tensor, outliers: int = 0, factor: Tensor | None = None) -> RoundedRows:
        calls.append(x)
        return quantize_rows(x, outliers, factor)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "quantize_rows", counting)
        yield calls


@pytest.mark.parametrize(
    ("architecture", "count"), [(VIT, 4), (LLAMA, 4), (GPT2, 4)], ids=lambda value: str(value)[:20]
)
def test_layers_that_read_one_input_share_its_rounded_copy(
    architecture: Architecture, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each input of a block once: of q, k and v; of the output projection; of the MLP's two ends."""
    model = build(architecture, residual_product="int8").train()
    layers = len(list(wasi_layers(model)))
    model(**architecture.batch())  # the first pass gives coordinates
    with counted(inputs, monkeypatch) as shared, counted(products, monkeypatch) as own:
        loss = model(**architecture.batch()).loss
        assert len(shared) == count * 2 and not own  # and their products take it as it is
        loss.backward()
        assert len(shared) == count * 2 and 0 < len(own) <= layers  # gradients are their own


@pytest.mark.parametrize(
    ("context", "count"), [(torch.no_grad, 4), (torch.inference_mode, 7)], ids=["no_grad", "inference"]
)
def test_they_share_it_without_gradients(context: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode tensors do not say whether they have changed, so all seven layers of a block round there."""
    model = build(LLAMA, residual_product="int8").eval()
    batch = LLAMA.batch()
    with context(), counted(inputs, monkeypatch) as shared, counted(products, monkeypatch) as own:
        answer = model(**batch).logits
    assert (len(shared), len(own)) == (2 * count, 0)
    assert len(shared_inputs(model)) == 0  # gone with the tensors that they describe
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(inputs.SharedInputs, "of", lambda self, x: inputs.SharedInput(x))
        assert torch.equal(model(**batch).logits, answer)


def test_without_gradients_an_input_changed_in_place_is_rounded_again() -> None:
    model = build(residual_product="int8").eval()
    layer = next(layer for _, layer in wasi_layers(model))
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        before = layer(x)
        x.mul_(2)
        torch.testing.assert_close(layer(x) - layer(0 * x), 2 * (before - layer(0 * x)))


def test_what_they_share_without_gradients_is_of_the_last_input_alone() -> None:
    """Whatever outlives the pass: hidden states that a caller keeps, those of an encoder."""
    model = build(residual_product="int8").eval()
    shared = shared_inputs(model)
    with torch.no_grad():
        states = model(**VIT.batch(), output_hidden_states=True).hidden_states
        assert len(shared) == 0 and shared._latest is None
        _, layer = next(wasi_layers(model))
        kept = [torch.randn(3, layer.in_features) for _ in range(2)]
        for x in kept:
            layer(x)
        assert shared._latest.x() is kept[1]
    del states, kept, x
    assert shared._latest is None


def test_the_next_pass_rounds_anew_whoever_changed_the_memory() -> None:
    """Such as numpy, unseen by torch, or a graph of CUDA that is recorded after a pass to warm up."""
    model = build(residual_product="int8").eval()
    _, layer = next(wasi_layers(model))
    values = torch.randn(3, layer.in_features).numpy()
    x = torch.from_numpy(values)
    with torch.no_grad():
        layer(x)
        values *= 3
        assert torch.equal(layer(x), layer(x.clone()))


def test_training_after_inference_mode_on_the_same_tensor() -> None:
    model = build(residual_product="int8").train()
    _, layer = next(wasi_layers(model))
    x = torch.randn(3, layer.in_features)
    with torch.inference_mode():
        expected = layer(x).clone()
    answer = layer(x)
    answer.sum().backward()
    assert torch.allclose(answer, expected, atol=1e-5)


def test_exported_programs_round_no_input_in_vain() -> None:
    model = build(residual_product="int8").eval()
    _, layer = next(wasi_layers(model))
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(3, layer.in_features),))
    assert sum(node.target is torch.ops.aten.topk.default for node in program.graph.nodes) == 1


def test_a_product_that_restores_the_weight_rounds_nothing_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(residual_product="restored").eval()
    with counted(inputs, monkeypatch) as shared, counted(products, monkeypatch) as own:
        logits(model, VIT.batch())
    assert not shared and not own


@pytest.mark.parametrize("product", ["restored", "int8"])
def test_the_exact_residual_and_float64_round_nothing(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (build(residual="exact", residual_product=product), build(residual_product=product).double()):
        dtype = next(model.parameters()).dtype
        with counted(inputs, monkeypatch) as shared, counted(products, monkeypatch) as own:
            model.train()(**VIT.batch(dtype=dtype)).loss.backward()
        assert not shared and not own


def test_nothing_is_rounded_for_backward_where_r_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(update="frozen_basis", residual_product="restored").train()
    with counted(inputs, monkeypatch) as shared:
        model(**VIT.batch()).loss.backward()
    assert not shared


@residuals
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_first_batch_gives_coordinates_and_changes_no_answer(name: str, residual: str) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture, residual=residual, residual_product="restored").eval()
    expected, rows = logits(model, architecture.batch()), {}
    for key, layer in wasi_layers(model):
        rows[key] = layer.form.R.detach().clone()
    model.train()(**architecture.batch())
    assert torch.equal(logits(model, architecture.batch()), expected)
    moved = {key: layer.form.R.detach().clone() for key, layer in wasi_layers(model)}
    assert not any(torch.equal(moved[key], rows[key]) for key in rows)
    model.train()(**architecture.batch(seed=9))
    assert all(torch.equal(layer.form.R, moved[key]) for key, layer in wasi_layers(model))  # once


# ---------------------------------------------------------------- training as torch and transformers do it


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ready(architecture: Architecture, **options: Any) -> Any:
    """After one step, so that L is not zero and R has its coordinates."""
    torch.manual_seed(0)
    model = build(architecture, residual_product="restored", **options)
    train(model, architecture.batch(), 1)
    return model.train()


@residuals
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(residual: str, reentrant: bool) -> None:
    plain, other = ready(LLAMA, residual=residual), ready(LLAMA, residual=residual)
    checkpoint_activations(other, {"use_reentrant": reentrant})
    other.enable_input_require_grads()
    expected, found = gradients(plain, LLAMA.batch()), gradients(other, LLAMA.batch())
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@residuals
@pytest.mark.parametrize("mode", ["fast", "small"])
@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_memory_modes(name: str, mode: str, residual: str) -> None:
    architecture = ARCHITECTURES[name]
    plain, other = ready(architecture, residual=residual), ready(architecture, residual=residual, memory_mode=mode)
    other.load_state_dict(plain.state_dict())
    batch = architecture.batch(8)
    expected, found = gradients(plain, batch), gradients(other, batch)
    assert expected.keys() == found.keys()
    flat = [torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)]
    assert relative_error(flat[0], flat[1]) < 0.05
    assert torch.allclose(logits(other, batch), logits(plain, batch), atol=1e-4, rtol=1e-4)


@residuals
def test_bfloat16_autocast(residual: str) -> None:
    model = ready(VIT, residual=residual)
    expected = gradients(model, VIT.batch())
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**VIT.batch())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    found = torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None])
    assert relative_error(found, torch.cat([gradient.flatten() for gradient in expected.values()])) < 0.1


@residuals
@pytest.mark.parametrize("backend", partly_slow(["eager", "aot_eager"], "eager"))
@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
def test_compiled_training(residual: str, backend: str, update: str) -> None:
    plain, other = ready(VIT, residual=residual, update=update), ready(VIT, residual=residual, update=update)
    expected = gradients(plain, VIT.batch())
    compiled = torch.compile(other, backend=backend)
    compiled(**VIT.batch()).loss.backward()
    for name, gradient in expected.items():
        assert relative_error(other.get_parameter(name).grad, gradient) < 1e-3, name
    other.eval()
    with torch.no_grad():
        answered = torch.compile(other, backend=backend)(**VIT.batch()).logits
    torch.testing.assert_close(answered, logits(plain, VIT.batch()), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@residuals
def test_one_layer_compiles_without_a_break(residual: str) -> None:
    layer = next(layer for _, layer in wasi_layers(ready(VIT, residual=residual)))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert relative_error(y, layer(x)) < 1e-5 and relative_error(found, expected) < 1e-5
    torch._dynamo.reset()


# ---------------------------------------------------------------- bad input


@residuals
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(residual: str, value: float) -> None:
    model = VIT.model()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc2: its weight holds NaN or Inf"):
        get_peft_model(model, WasiConfig(residual=residual))
    assert not any(isinstance(module, (WasiLayer, Residual)) for module in model.modules())


@residuals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_rank": 17}, r"the rank must be at most min\(out_features, in_features\) = 16, got 17"),
        ({"rank_pattern": {"fc1": 20}}, r"fc1: the rank must be at most .* = 16, got 20"),
    ],
    ids=str,
)
def test_ranks_that_layers_do_not_have_are_refused(residual: str, options: dict[str, Any], message: str) -> None:
    model = VIT.model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, WasiConfig(residual=residual, **options))
    assert not any(isinstance(module, (WasiLayer, Residual)) for module in model.modules())


@residuals
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs_and_rows_of_zeros(residual: str, value: float) -> None:
    model = VIT.model()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[:5] = 0
        model.vit.layers[1].attention.q_proj.weight.zero_()
    peft_model = get_peft_model(model, WasiConfig(residual=residual))
    batch = {**VIT.batch(), "pixel_values": torch.full((4, 3, 8, 8), value)}
    losses = train(peft_model, batch, 5)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(bool(parameter.isfinite().all()) for parameter in peft_model.parameters())


def test_the_forms_of_all_layers_are_beside_the_residual() -> None:
    for residual, cls in (("int8", Int8Residual), ("exact", ExactResidual)):
        for _, layer in wasi_layers(build(residual=residual)):
            assert type(layer.form) is ResidualLinear and type(layer.residual) is cls
            weight, bias = layer.original_weight()
            assert weight.shape == (layer.out_features, layer.in_features) and bias is not None


# ---------------------------------------------------------------- what else users of PEFT do


@residuals
def test_rounding_what_was_rounded_changes_nothing(residual: str) -> None:
    """An unloaded model can be adapted again and again."""
    model, expected = VIT.model(), logits(build(residual=residual, residual_product="restored"), VIT.batch())
    for _ in range(3):
        model = build_on(model, residual)
        torch.testing.assert_close(logits(model, VIT.batch()), expected, atol=1e-3, rtol=1e-3)
        train(model, VIT.batch(), 1)
        model = model.unload()
        assert not any(isinstance(module, (WasiLayer, Residual)) for module in model.modules())
        assert not hasattr(model, "peft_config")


def build_on(model: nn.Module, residual: str) -> Any:
    return get_peft_model(model, WasiConfig(residual=residual, residual_product="restored", weight_rank=4))


@residuals
def test_injection_on_the_meta_device_and_loading(residual: str) -> None:
    source = build(residual=residual)
    train(source, VIT.batch())
    saved = copy.copy(source.peft_config["default"])
    saved.ranks = saved.resolved_ranks
    model = inject_adapter_in_model(saved, VIT.model(), low_cpu_mem_usage=True)
    assert all(value.is_meta for name, value in model.named_parameters() if ".wasi_form." in name)
    assert {type(layer._modules["base_layer"]) for _, layer in wasi_layers(model)} == {nn.Linear}
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(logits(model, VIT.batch()), logits(source, VIT.batch()))
    assert {layer.residual.name for _, layer in wasi_layers(model)} == {residual}


@residuals
@pytest.mark.parametrize("bias", ["none", "wasi_only", "all"])
def test_what_trains_survives_disabling_switching_and_merging(residual: str, bias: str) -> None:
    model = build(residual=residual, bias=bias)
    only = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def trains() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    with model.disable_adapter():
        assert not trains()
    assert trains() == only
    model.add_adapter("other", WasiConfig(residual=residual, weight_rank=3, bias=bias))
    assert trains() == only
    model.set_adapter("other")
    assert {name for name in trains() if ".wasi_form." in name} == {
        name.replace(".default.", ".other.") for name in only if ".wasi_form." in name
    }
    model.set_adapter("default")
    model.merge_adapter()
    model.unmerge_adapter()
    assert trains() == only


def test_transformers_own_integration(tmp_path: Path) -> None:
    """`add_adapter` and `load_adapter` of the model itself."""
    model: Any = VIT.model()
    model.add_adapter(WasiConfig(weight_rank=4), "own")
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    assert {layer.residual.name for _, layer in wasi_layers(model)} == {"int8"}
    model.save_pretrained(tmp_path)
    loaded: Any = VIT.model()
    loaded.load_adapter(str(tmp_path), "own")
    assert torch.equal(logits(loaded, VIT.batch()), expected)
    assert {layer.residual.name for _, layer in wasi_layers(loaded)} == {"int8"}
    model.disable_adapters()
    assert relative_error(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch())) < LARGEST_ERROR["int8"]


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_a_batch_of_several_slices_meets_fresh_factors_once_and_before_backward(mode: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    base = ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, num_labels=3))
    model: Any = get_peft_model(base, WasiConfig(memory_mode=mode)).train()
    images, labels = torch.randn(200, 3, 32, 32), torch.randint(3, (200,))  # 3,400 tokens
    layers = [layer for _, layer in wasi_layers(model)]
    start = [layer.form.R.detach().clone() for layer in layers]
    loss = model(pixel_values=images, labels=labels).loss
    met = [layer.form.R.detach().clone() for layer in layers]
    assert not any(torch.equal(before, after) for before, after in zip(start, met, strict=True))
    loss.backward()
    model(pixel_values=images, labels=labels).loss.backward()
    assert all(torch.equal(before, layer.form.R) for before, layer in zip(met, layers, strict=True))
    assert all(bool(layer.form.L.grad.any()) for layer in layers)


def test_the_product_of_a_second_adapter_is_said_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(VIT.model(), WasiConfig(weight_rank=3, residual_product="int8"))
    with caplog.at_level("WARNING", logger="wasi_peft"):
        model.add_adapter("same", WasiConfig(weight_rank=3, residual_product="int8"))
        model.add_adapter("any", WasiConfig(weight_rank=3))
        assert "residual_product" not in caplog.text
        model.add_adapter("other", WasiConfig(weight_rank=3, residual_product="restored"))
    assert "residual_product='restored' has no effect" in caplog.text and "'int8'" in caplog.text


@pytest.mark.parametrize(
    "options", [{"weight_rank": 4}, {"residual": None, "weight_rank": 8, "frozen_dtype": "int8"}], ids=str
)
def test_beside_compressed_layers_products_are_those_asked_for(options: dict[str, Any]) -> None:
    model = get_peft_model(
        compress(VIT.model(), WasiConfig(**options)), WasiConfig(weight_rank=3, residual_product="restored")
    )
    asked = {module.products.asked for module in model.modules() if isinstance(module, Residual)}
    assert asked == {"restored"}
