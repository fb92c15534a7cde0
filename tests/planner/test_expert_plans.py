"""Packed experts in calibrations and plans: one rank for all experts of a weight, in the unit of the other layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expert_models import experts_model, packed_names, tokens
from peft import get_peft_model
from torch import Tensor, nn

import wasi_peft
from wasi_peft.cost.estimate import PlannedPeaks, estimate_peak, input_sizes
from wasi_peft.planner.planner import _run_for_sizes
from wasi_peft.ranks.plan import WasiPlan

BATCH = {"input_ids": tokens(4, 8), "labels": tokens(4, 8)}
BUDGETS: dict[str, Any] = {
    "weight_share": 0.5,
    "error": 0.02,
    "training_flops": 0.6,
    "inference_flops": 0.6,
}


@pytest.fixture(autouse=True)
def plain_svd_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain")
        yield


def calibrated(family: str = "mixtral", gradients: Any = "features") -> tuple[Any, wasi_peft.Calibration]:
    model = experts_model(family, torch.float32)
    return model, wasi_peft.calibrate_wasi(model, [BATCH], gradients=gradients, progress_bar=False)


def rows_and_gradients(model: nn.Module) -> tuple[list[Tensor], list[float]]:
    """Inputs of each expert's `gate_up_proj`, and the squared gradients of what its `down_proj` answers, summed."""
    module = model.model.layers[0].mlp.experts
    calls: list[Any] = []

    def look(_: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        calls.append((args, output))

    handle = module.register_forward_hook(look)
    model(**BATCH).loss.backward()
    handle.remove()
    model.zero_grad()
    ((x, chosen, shares), output), *_ = calls
    rows: list[list[Tensor]] = [[] for _ in range(4)]
    squares = [0.0] * 4
    for row, picked, share, gradient in zip(x, chosen, shares, output.grad, strict=True):
        for expert, part in zip(picked.tolist(), share, strict=True):
            rows[expert].append(row.detach().double())
            squares[expert] += float((part.detach() * gradient).double().square().sum())
    return [torch.stack(one) if one else torch.zeros(0, 16).double() for one in rows], squares


def test_energies_are_those_of_each_expert_by_its_own_rows_and_gradients() -> None:
    model, calibration = calibrated(gradients="loss")
    rows, squares = rows_and_gradients(model)
    up, down = packed_names(model)
    spectra = {spectrum.name: spectrum for spectrum in calibration.spectra()}
    assert list(spectra)[-2:] == [up, down] and spectra[up].experts == spectra[down].experts == 4
    experts = model.model.layers[0].mlp.experts
    pooled = torch.cat(rows)
    energies = []
    for weight, x in zip(experts.gate_up_proj.detach().double(), rows, strict=True):
        moment = (x.T @ x + 16 * pooled.T @ pooled / len(pooled)) / (len(x) + 16)
        values, vectors = torch.linalg.eigh(moment)
        energies.append(torch.linalg.svdvals(weight @ vectors @ values.clamp_min(0).sqrt().diag()).square())
    # what gradients weigh is one number an expert
    basis, found = torch.stack(energies), torch.tensor(spectra[up].weight_energies, dtype=torch.float64)
    weights = torch.linalg.lstsq(basis.T, found[:, None]).solution[:, 0]
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights @ basis, found, rtol=1e-4, atol=1e-6 * float(found.max()))
    # of what comes down: sums of squared gradients, a share of each output feature
    alone = wasi_peft.calibrate_wasi(model, [BATCH], gradients=None, progress_bar=False)
    assert sum(alone.energies(down)) > 0 and sum(squares) > 0
    ratio = float(calibration.energies(down).sum() / alone.energies(down).sum())
    assert min(squares) / 16 <= ratio <= max(squares) / 16
    assert 0 < spectra[up].rounding_errors["int8"] < spectra[up].rounding_errors["int4"]
    assert spectra[up].rounding_errors["int4"] < sum(spectra[up].weight_energies)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_rows_are_those_that_are_routed(family: str) -> None:
    model = experts_model(family, torch.float32)
    names = [*packed_names(model), "lm_head"]
    sizes = input_sizes(model, names, BATCH)
    assert sizes is not None
    rows = {"mixtral": 32 * 2, "gpt_oss": 32 * 2, "llama4": 32 * 4}[family]  # Llama 4 runs every expert on every token
    assert [sizes[name] for name in names] == [(rows, 16), (rows, 16 if family == "mixtral" else 12), (4, 8, 16)]
    assert _run_for_sizes(model, names, BATCH) == sizes


@pytest.mark.parametrize("field", BUDGETS)
def test_plans_choose_for_experts_and_models_train_under_them(field: str) -> None:
    model, calibration = calibrated()
    plan = wasi_peft.plan_wasi(model, calibration, **{field: BUDGETS[field]}, batch=BATCH)
    planned = {layer.name: layer for layer in plan.layers}
    assert set(packed_names(model)) <= set(planned)
    assert [planned[name].experts for name in packed_names(model)] == [4, 4]
    assert WasiPlan.from_dict(plan.to_dict()) == plan
    config = wasi_peft.WasiConfig(plan=plan)
    wasi_peft.preprocess_wasi(model, config, [BATCH], repair_steps=0, progress_bar=False)
    trained = get_peft_model(model, config)
    summary = {layer.name: layer for layer in trained.wasi_summary().layers}
    for layer in plan.layers:
        assert summary[layer.name].stored_bytes == plan.stored_bytes(layer) or layer.residual is not None
        assert summary[layer.name].dense_bytes == plan.dense_bytes(layer)
        assert summary[layer.name].weight_rank == layer.weight_rank
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = trained(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_a_peak_counts_every_expert() -> None:
    model, calibration = calibrated()
    dense = estimate_peak(model, batch=BATCH)
    plan = wasi_peft.plan_wasi(model, calibration, peak_bytes=int(0.6 * dense), batch=BATCH)
    peaks = PlannedPeaks(model, batch=BATCH)
    smaller = wasi_peft.plan_wasi(model, calibration, weight_share=0.3, batch=BATCH, forms=["factors"])
    larger = wasi_peft.plan_wasi(model, calibration, weight_share=0.6, batch=BATCH, forms=["factors"])
    for one in (plan, smaller, larger):  # the last two have the same forms, so ranks change in place
        config = wasi_peft.WasiConfig(plan=one)
        assert peaks(config) == estimate_peak(model, config, batch=BATCH)
    assert peaks(wasi_peft.WasiConfig(plan=plan)) <= 0.6 * dense


def test_under_an_update_that_takes_no_stacks_experts_stay_dense() -> None:
    model, calibration = calibrated()
    plan = wasi_peft.plan_wasi(
        model, calibration, weight_share=0.8, config=wasi_peft.WasiConfig(update="core"), batch=BATCH
    )
    assert not {layer.name for layer in plan.layers} & set(packed_names(model))


def test_a_plan_is_refused_for_another_number_of_experts() -> None:
    model, calibration = calibrated()
    data = wasi_peft.plan_wasi(model, calibration, weight_share=0.5).to_dict()
    data["layers"][packed_names(model)[0]]["experts"] = 8
    with pytest.raises(ValueError, match="the plan is for another model: it has 8 weights there, this model 4"):
        get_peft_model(model, wasi_peft.WasiConfig(plan=data))
