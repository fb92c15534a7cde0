"""Packed experts under an adapter: five families, every way that transformers runs them, and PEFT's verbs."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FAMILIES, IMPLEMENTATIONS, experts_model, packed_names, run_by, tokens
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from strategies import relative_error
from torch import Tensor, nn

import wasi_peft
from wasi_peft.cli.main import main
from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.tuner.experts import Experts
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates import UPDATES


def wasi_model(model: nn.Module, **options: Any) -> Any:
    return get_peft_model(model, wasi_peft.WasiConfig(**options)).eval()


WAYS = [(family, way) for family in FAMILIES for way in IMPLEMENTATIONS if way == "eager" or family != "llama4"]


def adapted(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    """The dense model and one with an adapter on its experts alone."""
    base = experts_model(family, dtype)
    run_by(base, "eager")
    return base, wasi_model(copy.deepcopy(base), target_modules=r".*experts\.(gate_up|down)_proj", **options)


def stacks(model: nn.Module) -> dict[str, Experts]:
    return {name: layer for name, layer in wasi_layers(model) if isinstance(layer, Experts)}


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


# ------------------------------------------------------------------ the same model


@pytest.mark.parametrize(("family", "way"), WAYS)
@pytest.mark.parametrize("residual", [None, "exact"])
def test_outputs_and_gradients_are_those_of_the_dense_experts(family: str, way: str, residual: str | None) -> None:
    """`dL = G R^T` and `dR = L^T G` with the gradient G of each expert's dense weight; the router's is the same."""
    form = {"residual": residual, "weight_rank": 4, "update": "factor" if residual is None else "addition"}
    dense, model = adapted(family, torch.float64, activation_threshold=None, init_weights=False, **form)
    layers = stacks(model)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer._stand_in(layer._multiply, layer.form.matrices).multiplied_out()
            dense.get_parameter(name.removeprefix("base_model.model.")).copy_(weight)
    router = [name for name, parameter in dense.named_parameters() if name.endswith(("router.weight", "gate.weight"))]
    for one in (dense, model.base_model.model):
        one.requires_grad_(True)
    run_by(model.base_model.model, way)
    x = tokens()
    for one in (dense, model):
        one.train()(input_ids=x, labels=x).loss.backward()
    torch.testing.assert_close(answers(model), answers(dense))
    assert layers and router
    for name, layer in layers.items():
        G, form_ = dense.get_parameter(name.removeprefix("base_model.model.")).grad, layer.form
        G = G.mT if layer.transposed else G
        torch.testing.assert_close(form_.L.grad, G @ form_.R.detach().mT)
        torch.testing.assert_close(form_.R.grad, form_.L.detach().mT @ G)
    for name in router:
        own = model.base_model.model.get_parameter(name).grad
        assert own.abs().sum() > 0
        torch.testing.assert_close(own, dense.get_parameter(name).grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_experts_are_targets_and_routers_are_not(family: str) -> None:
    options = {"exclude_modules": ".*router"} if family == "llama4" else {}
    base = experts_model(family, torch.float32)
    model = wasi_model(copy.deepcopy(base), weight_rank=4, residual_product="restored", **options)
    assert len(stacks(model)) == len(packed_names(base)) == 2
    assert not any("router" in name or name.endswith("gate") for name, _ in wasi_layers(model))
    assert not any(parameter.dim() == 3 and "wasi_" not in name for name, parameter in model.named_parameters())
    summary = {layer.name: layer for layer in model.wasi_summary().layers}
    for name in packed_names(base):
        weight = base.get_parameter(name)
        assert summary[name].dense_elements == weight.numel() and summary[name].experts == 4
        added = 4 * 4 * (summary[name].out_features + summary[name].in_features)
        scales = 4 * summary[name].out_features
        assert summary[name].stored_bytes == weight.numel() + 4 * (added + scales)
    assert "4 x " in str(model.wasi_summary())
    assert relative_error(answers(model), answers(base)) < 0.2


@pytest.mark.parametrize("update", UPDATES)
def test_updates_that_need_more_than_plain_gradients_leave_experts_dense(
    update: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, able = experts_model("mixtral", torch.float32), UPDATES[update].takes_stacks
    assert able == (update in ("addition", "frozen_basis", "factor"))
    with caplog.at_level(logging.INFO):
        model = wasi_model(copy.deepcopy(base), update=update, weight_rank=4)
    assert bool(stacks(model)) == able
    assert ("2 packed expert weights stay dense" in caplog.text) == (not able)
    if not able:
        with pytest.raises(ValueError, match=r"experts.gate_up_proj: packed experts train with update="):
            wasi_model(base, update=update, weight_rank=4, target_modules=["gate_up_proj"])
        assert packed_names(base) == packed_names(experts_model("mixtral"))


def test_factors_keep_the_share_that_is_asked_for() -> None:
    base, model = adapted("mixtral", residual=None, explained_variance_threshold=1.0)
    assert relative_error(answers(model), answers(base)) < 1e-5
    _, model = adapted("mixtral", residual=None, weight_share=0.5)
    assert 0.3 < model.wasi_summary().kept_share <= 0.5
    _, model = adapted("mixtral", residual=None, explained_variance_threshold=0.5)
    for name, layer in stacks(model).items():
        weight = base.get_parameter(name.removeprefix("base_model.model."))
        energies = torch.stack([torch.linalg.svdvals(one).square() for one in weight.detach()])
        kept = (energies / energies.sum(1, keepdim=True)).mean(0).cumsum(0)
        rank = layer.form.weight_rank
        assert kept[rank - 1] >= 0.5 > (kept[rank - 2] if rank > 1 else 0)


# ------------------------------------------------------------------ PEFT's verbs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("residual", ["int8", "int4", "exact", None])
def test_adapters_are_saved_loaded_switched_merged_and_deleted(
    family: str, residual: str | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"weight_rank": 4, "residual": residual, "residual_product": "restored"}
    options |= {"base_weight": "keep"} if residual is None else {}
    base, model = adapted(family, **options)
    names, disabled = list(base.state_dict()), copy.deepcopy(model)
    with torch.no_grad():
        for layer in stacks(model).values():
            layer.form.L.add_(torch.randn(layer.form.L.shape) * 0.1)
    expected = answers(model)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    prefix = f"base_model.model.{packed_names(base)[0]}.wasi_form.wasi_"
    assert f"{prefix}{'' if residual is None else 'added_'}L" in keys
    assert not any("default" in key for key in keys)
    for empty in (True, False):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=empty)
        torch.testing.assert_close(answers(loaded), expected, rtol=1e-4, atol=1e-5)

    with model.disable_adapter():
        original = answers(model)
    assert relative_error(original, answers(base)) < (1e-6 if residual in (None, "exact") else 1.0)
    model.add_adapter("other", copy.deepcopy(disabled.peft_config["default"]))
    model.set_adapter("other")
    assert relative_error(answers(model), answers(disabled)) < 1e-5
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(answers(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(answers(model), expected)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == names and packed_names(merged) == packed_names(base)
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(loaded.unload()), original, rtol=1e-4, atol=1e-4)


def test_an_adapter_loads_with_its_base(tmp_path: Path) -> None:
    base = experts_model("mixtral", torch.float32)
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    model = wasi_model(loaded, weight_rank=4, residual=None)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(answers(wasi_peft.load_adapter(tmp_path / "adapter")), answers(model))


@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_the_dense_weight_goes_where_it_is_asked_to(base_weight: str) -> None:
    base, model = adapted("mixtral", residual=None, weight_rank=4, base_weight=base_weight)
    dense = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.shape[:1] == (4,)]
    assert any(tuple(tensor.shape) == (4, 32, 16) for tensor in dense) == (base_weight == "keep")
    if base_weight == "release":
        with pytest.raises(ValueError, match="dense weights were released"):
            model.unload()
        return
    with model.disable_adapter():
        torch.testing.assert_close(answers(model), answers(base))
    torch.testing.assert_close(answers(model.unload()), answers(base))


def test_a_failed_injection_leaves_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    base = experts_model("mixtral", torch.float32)
    before = {name: value.data_ptr() for name, value in base.state_dict().items()}
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"mlp.experts.down_proj: its weight holds NaN"):
        wasi_model(base, weight_rank=4)
    assert {name: value.data_ptr() for name, value in base.state_dict().items()} == before
    assert packed_names(base) == packed_names(experts_model("mixtral"))


def test_what_experts_cannot_do_is_said(tmp_path: Path) -> None:
    base, model = adapted("mixtral", weight_rank=4)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: adapter_names cannot tell"):
        model(input_ids=tokens(2), adapter_names=["default", "__base__"])
    name = packed_names(base)[0]
    with pytest.raises(ValueError, match=f"{name}: packed experts keep the rank"):
        wasi_peft.resize_rank(model, name, 2)
    with pytest.raises(ValueError, match=f"{name}: adapters of packed experts have no weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match=f"{name}: packed experts have no place in a LoRA adapter"):
        wasi_peft.export(model, tmp_path / "lora", "lora")
    assert answers(model).isfinite().all()


def test_the_plain_form_has_experts_multiplied_out() -> None:
    model = wasi_model(experts_model("mixtral", torch.float32), weight_rank=4, residual_product="restored")
    plain = wasi_peft.to_plain(model, {"input_ids": tokens()})
    torch.testing.assert_close(answers(plain), answers(model), rtol=1e-3, atol=1e-3)
    assert packed_names(plain) == packed_names(experts_model("mixtral"))


# ------------------------------------------------------------------ training


def test_each_expert_meets_the_first_rows_that_reach_it() -> None:
    _, model = adapted("mixtral", weight_rank=4, residual_product="restored")
    layer = next(iter(stacks(model).values()))
    before, met = layer.form.R.detach().clone(), layer.form.R.detach().clone()
    model.train()
    with torch.no_grad():
        x = torch.randn(6, 16)
        y = layer[torch.tensor([1, 1, 3, 1, 3, 1])]
        torch.bmm(y, x[:, :, None])
    changed = [not torch.equal(layer.form.R[e], before[e]) for e in range(4)]
    assert changed == [False, True, False, True]
    image = x[[0, 1, 3, 5]] @ layer.form.R[1].detach().T
    size = image.T @ image / 4
    assert relative_error(size, size.diagonal().mean() * torch.eye(4)) < 0.35 < relative_error(met[1], layer.form.R[1])
    met = layer.form.R.detach().clone()
    with torch.no_grad():
        torch.bmm(layer[torch.tensor([1, 0])], x[:2, :, None])
    assert [not torch.equal(layer.form.R[e], met[e]) for e in range(4)] == [True, False, False, False]
    assert answers(model).isfinite().all()


@pytest.mark.parametrize("mode", ["fast", "small"])
@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_memory_modes_keep_the_gradients(mode: str, way: str) -> None:
    """The router's own loss too."""
    gradients = []
    for memory_mode in ("exact", mode):
        base = experts_model("mixtral", torch.float32)
        base.config.output_router_logits, base.config.router_aux_loss_coef = True, 1.0
        run_by(base, way)
        options = {"weight_rank": 4, "residual": "exact", "memory_mode": memory_mode, "update": "frozen_basis"}
        model = wasi_model(base, **options).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("added_L"):
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        router = model.base_model.model.model.layers[0].mlp.gate.weight.requires_grad_()
        x = tokens(4, 8)
        model(input_ids=x, labels=x, attention_mask=torch.ones_like(x)).loss.backward()
        gradients.append([router.grad] + [layer.form.L.grad for layer in stacks(model).values()])
    for exact, other in zip(*gradients, strict=True):
        assert relative_error(other, exact) < 0.03


def test_training_lowers_the_loss_in_bfloat16_and_under_autocast() -> None:
    x = tokens(4, 8)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        base = experts_model("gpt_oss", dtype)
        model = wasi_model(base, weight_rank=4).train()
        optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [None, {}, {"residual": None, "activation_threshold": None}], ids=str)
def test_estimates_are_what_a_step_takes(dtype: torch.dtype, options: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    base = experts_model("mixtral", dtype).train()
    batch = {"input_ids": tokens(8, 32), "labels": tokens(8, 32)}
    config = None if options is None else wasi_peft.WasiConfig(weight_rank=4, residual_product="restored", **options)
    estimate = wasi_peft.estimate_wasi(base, copy.deepcopy(config), batch=batch, optimizer=None)
    model: Any = base if config is None else get_peft_model(base, config).train()
    if config is not None:
        stored = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        assert abs(estimate.weights_bytes - stored) < 0.02 * stored

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    measured = estimate.weights_bytes + measure_peak_memory(step).peak_bytes
    assert abs(estimate.peak_bytes - measured) < 0.1 * measured


def test_generation_goes_through_the_factors() -> None:
    base, model = adapted("mixtral", weight_rank=4, residual="exact")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = base.generate(input_ids=tokens(2, 5), **options)
    assert torch.equal(model.eval().generate(input_ids=tokens(2, 5), **options), expected)


@pytest.mark.parametrize("residual", [None, "int8"])
def test_copies_and_pickles_compute_the_same(residual: str | None, tmp_path: Path) -> None:
    _, model = adapted("mixtral", weight_rank=4, residual=residual, residual_product="restored")
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.testing.assert_close(answers(other), answers(model))


def test_inspect_reads_adapters_of_packed_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model = adapted("mixtral", weight_rank=4, residual=None)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kept_share"] == pytest.approx(model.wasi_summary().kept_share)
    assert {(layer["out_features"], layer["in_features"], layer["weight_rank"]) for layer in shown["layers"]} == {
        (32, 16, 4),
        (16, 16, 4),
    }
