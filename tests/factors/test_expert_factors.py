"""Factors of packed experts from the inputs that are routed to each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from expert_models import experts_model, packed_names, tokens
from peft import get_peft_model
from torch import Tensor, nn

import wasi_peft
from wasi_peft.factors import expert_factors
from wasi_peft.factors.expert_factors import prepare_experts
from wasi_peft.models.experts import expose_experts
from wasi_peft.tuner.experts import Experts
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.tuner.prepared import attached_layers

BATCHES = [{"input_ids": tokens(4, 8)}, {"input_ids": tokens(4, 8).flip(1)}]


def routed_rows(model: nn.Module) -> dict[str, list[Tensor]]:
    """What each expert multiplies, from the module's own inputs, by name of the parameter."""
    experts = model.model.layers[0].mlp.experts
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    up: list[list[Tensor]] = [[] for _ in range(4)]
    for x, chosen, _ in calls:
        for row, picked in zip(x.double(), chosen, strict=True):
            for expert in picked.tolist():
                up[expert].append(row)
    rows = [torch.stack(one) if one else torch.zeros(0, 16).double() for one in up]
    inner = []
    for expert, x in enumerate(rows):
        gate, value = (x @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inner.append(experts.act_fn(gate) * value)
    prefix = "model.layers.0.mlp.experts"
    return {f"{prefix}.gate_up_proj": rows, f"{prefix}.down_proj": inner}


def best_error(weight: Tensor, moment: Tensor, rank: int) -> float:
    """Of the best approximation by the SVD of `W C^(1/2)`."""
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return float(torch.linalg.svdvals(weight @ root)[rank:].square().sum())


@pytest.mark.parametrize("bound", [2**30, 1], ids=["one pass", "a pass each"])
def test_each_expert_is_cut_for_its_own_rows(bound: int) -> None:
    base = experts_model("mixtral", torch.float32)
    base.set_experts_implementation("grouped_mm")
    config = wasi_peft.WasiConfig(weight_rank=5, residual=None, target_modules=["gate_up_proj", "down_proj"])
    rows, before = routed_rows(base), copy.deepcopy(base.state_dict())
    names = prepare_experts(base, config, BATCHES, max_memory_bytes=bound, progress_bar=False)
    assert sorted(names) == sorted(packed_names(base)) == sorted(rows)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    dense = {name: base.get_parameter(name).detach().double().clone() for name in names}
    model = get_peft_model(base, config)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in wasi_layers(model)}
    for name, layer in layers.items():
        pooled = torch.cat(rows[name])
        pooled = pooled.T @ pooled / len(pooled)
        for expert, x in enumerate(rows[name]):
            size = x.shape[1]
            moment = (x.T @ x + size * pooled) / (len(x) + size)
            lost = dense[name][expert] - layer.form.matrices()[expert].detach().double()
            error = float(torch.trace(lost @ moment @ lost.T))
            assert error == pytest.approx(best_error(dense[name][expert], moment, 5), rel=1e-3)
            U, S, Vh = torch.linalg.svd(dense[name][expert], full_matrices=False)
            plain = U[:, 5:] @ torch.diag(S[5:]) @ Vh[5:]
            assert error < 0.98 * float(torch.trace(plain @ moment @ plain.T))


def test_preparation_attaches_them_with_the_other_layers(caplog: pytest.LogCaptureFixture) -> None:
    base = experts_model("mixtral", torch.float32)
    for options in ({"weight_share": 0.6}, {"residual": None, "explained_variance_threshold": 0.9}):
        config, dense = wasi_peft.WasiConfig(**options), copy.deepcopy(base)
        factors = wasi_peft.preprocess_wasi(dense, config, BATCHES, repair_steps=2, progress_bar=False)
        assert not any("experts" in name for name in factors.layers)
        model = get_peft_model(dense, config)
        stacks = [layer for _, layer in wasi_layers(model) if isinstance(layer, Experts)]
        assert len(stacks) == 2 and "from their weights alone" not in caplog.text
        assert not any("_wasi_notes" in vars(module) and vars(module)["_wasi_notes"] for module in model.modules())
        if "weight_share" in options:
            assert 0.5 < model.wasi_summary().kept_share <= 0.6


@pytest.mark.parametrize("options", [{"weight_share": 0.6}, {"residual": None, "weight_rank": 4}, {}], ids=str)
def test_experts_as_the_only_targets(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Beside a residual there is nothing to prepare; factors are those for their rows."""
    base = experts_model("mixtral", torch.float32)
    config = wasi_peft.WasiConfig(target_modules=["gate_up_proj", "down_proj"], **options)
    with pytest.raises(ValueError, match="packed experts are prepared from data, and nothing else; got none"):
        wasi_peft.preprocess_wasi(copy.deepcopy(base), config, progress_bar=False)
    prepared, plain = copy.deepcopy(base), copy.deepcopy(base)
    assert not wasi_peft.preprocess_wasi(prepared, config, BATCHES, progress_bar=False).layers
    layers = [dict(wasi_layers(get_peft_model(model, config))) for model in (prepared, plain)]
    assert len(layers[0]) == 2
    for name, layer in layers[0].items():
        other = layers[1][name].form.multiply_out()
        assert torch.equal(layer.form.multiply_out(), other) == (not options)


@pytest.mark.parametrize("options", [{"update": "subspace"}, {"exclude_modules": ".*experts.*"}], ids=str)
def test_experts_that_stay_dense_are_not_prepared(options: dict[str, Any]) -> None:
    base = experts_model("mixtral", torch.float32)
    config = wasi_peft.WasiConfig(weight_rank=4, residual=None, **options)
    assert prepare_experts(base, config, BATCHES, progress_bar=False) == []


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    base = experts_model("mixtral", torch.float32)
    names = packed_names(base)

    def interrupted() -> None:
        raise KeyboardInterrupt

    config = wasi_peft.WasiConfig(weight_rank=4, residual=None)
    with pytest.raises(KeyboardInterrupt):
        prepare_experts(base, config, interrupted, progress_bar=False)
    assert packed_names(base) == names and not base.training


def test_an_interrupted_preparation_attaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prepared, calls = experts_model("mixtral", torch.float32), expert_factors.prepared_stack, list[str]()

    def interrupted(name: str, *arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepared(name, *arguments)

    monkeypatch.setattr(expert_factors, "prepared_stack", interrupted)
    config = wasi_peft.WasiConfig(weight_rank=4, residual=None)
    with pytest.raises(KeyboardInterrupt):
        wasi_peft.preprocess_wasi(base, config, BATCHES, repair_steps=0, progress_bar=False)
    expose_experts(base)
    assert not attached_layers(base)
