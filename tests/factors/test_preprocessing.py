"""Preprocessing: from a configuration and data to factors that the injection uses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from calibrating import (
    TARGETS,
    Interrupted,
    Untouched,
    assert_same_factors,
    batches,
    crash_at,
    inputs_of,
    output_error,
    prepared,
    with_nan,
)
from models import ARCHITECTURES, Architecture
from peft import get_peft_model
from strategies import orthonormality_error, relative_error
from torch import nn

from wasi_peft import (
    Calibration,
    WasiConfig,
    WasiLayer,
    calibrate_wasi,
    preprocess_wasi,
    repair_blocks,
    repair_factors,
    repair_tokens,
)
from wasi_peft.factors.repairs import REPAIRS
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.tuner.prepared import ATTACHED, WasiFactors


def run(
    net: nn.Module, config: WasiConfig, data: Any = None, *, repair_steps: int | None = 0, **options: Any
) -> WasiFactors:
    """`preprocess_wasi` without progress bars, and without repair unless asked for."""
    return preprocess_wasi(net, config, data, repair_steps=repair_steps, progress_bar=False, **options)


def calibrate(net: nn.Module, **options: Any) -> Calibration:
    return calibrate_wasi(net, batches(), progress_bar=False, **options)


def ranks(net: nn.Module) -> dict[str, int]:
    """Ranks of the prepared factors, without the directions that train beside them."""
    modules = {name: net.get_submodule(name) for name in prepared(net)}
    return {name: vars(module)[ATTACHED].rank for name, module in modules.items()}


def spent(ranks: dict[str, int], net: nn.Module) -> float:
    """Elements of factors over elements of dense weights."""
    shapes = {name: net.get_submodule(name).weight.shape for name in ranks}
    factored = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    return factored / sum(shape.numel() for shape in shapes.values())


# -------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_injection_uses_and_consumes_the_factors(bias: bool) -> None:
    net, data = reference.tiny_net(2, bias=bias), batches()
    dense = copy.deepcopy(net)
    run(net, WasiConfig(weight_rank=3, update="factor"), data)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), dense.parameters(), strict=True))
    expected = prepared(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the advice to calibrate first would be wrong here
        model = get_peft_model(net, WasiConfig(weight_rank=3, update="factor"))
    layers = dict(wasi_layers(model.base_model.model))
    assert set(layers) == set(TARGETS)
    for name, layer in layers.items():
        initial = expected[name]
        assert torch.equal(layer.form.L, initial.L) and torch.equal(layer.form.R, initial.R)
        assert (layer.form.bias is not None) == bias
        if initial.bias is not None:
            assert torch.equal(layer.form.bias, initial.bias)
    assert prepared(model) == {}
    plain = get_peft_model(copy.deepcopy(dense), WasiConfig(weight_rank=3, update="factor"))
    with torch.no_grad():
        x = torch.cat(data)
        errors = [float((other(x) - dense(x)).square().mean()) for other in (model, plain)]
    assert errors[0] < errors[1]


def test_what_trains_starts_from_the_directions_after_those_of_the_rank() -> None:
    """The layer computes what all its directions together do; the larger ones stay."""
    net = reference.tiny_net(2)
    config = WasiConfig(weight_rank=3, update="low_rank", update_rank=2)
    run(net, config, batches())
    assert ranks(net) == dict.fromkeys(TARGETS, 3)
    expected = prepared(net)
    model = get_peft_model(net, config)
    for name, layer in wasi_layers(model.base_model.model):
        weight, kept = expected[name].L @ expected[name].R, layer.form.L @ layer.form.R
        assert expected[name].L.shape[1] == 5 and layer.rank("default") == 5
        assert relative_error(torch.matmul(*layer.form.factors()), weight) < 1e-6
        left, values, right = torch.linalg.svd(weight)
        assert relative_error(kept, left[:, :3] * values[:3] @ right[:3]) < 1e-5
        assert orthonormality_error(layer.form.L) < 1e-6


def test_no_more_directions_train_than_the_weight_has() -> None:
    net = reference.tiny_net(2)
    dense = copy.deepcopy(net)
    config = WasiConfig(weight_rank=3, update="low_rank", update_rank=8)
    run(net, config, batches())
    assert {initial.L.shape[1] for initial in prepared(net).values()} == {8}
    model = get_peft_model(net, config)
    for _, layer in wasi_layers(model.base_model.model):
        assert layer.form.A.shape[0] == 8
        assert not layer.form.B[:, 5:].any() and layer.form.A[5:].any(1).all()
    x = batches()[0]
    assert relative_error(model(x), dense(x)) < 1e-5


def test_every_architecture(architecture: Architecture) -> None:
    """With the default configuration, repair and a budget, the model is nearer to the dense one than without."""
    model = architecture.model()
    dense, data = copy.deepcopy(model), [architecture.batch(8, seed) for seed in range(2)]
    run(model, WasiConfig(weight_share=0.6, update="factor"), data, repair_steps=4)
    assert set(prepared(model)) == architecture.targets(model)
    adapted = get_peft_model(model, WasiConfig(weight_share=0.6, update="factor")).eval()
    plain = get_peft_model(copy.deepcopy(dense), WasiConfig(weight_share=0.6, update="factor")).eval()
    batch = architecture.batch(16, 99)
    with torch.no_grad():
        wanted = dense(**batch).logits
        errors = [float((other(**batch).logits - wanted).square().mean()) for other in (adapted, plain)]
    assert errors[0] < errors[1]


def test_a_calibration_made_before_gives_the_same_at_any_rank(tmp_path: Path) -> None:
    net, data = reference.tiny_net(8), batches()
    calibrate(net, directory=tmp_path)
    loaded = Calibration.load(tmp_path)
    for config in (
        WasiConfig(residual=None, weight_rank=3),
        WasiConfig(explained_variance_threshold=0.9),
        WasiConfig(weight_share=0.7, update="factor"),
    ):
        first, second = copy.deepcopy(net), copy.deepcopy(net)
        run(first, config, data)
        run(second, config, calibration=loaded)
        assert_same_factors(prepared(first), prepared(second))


def test_a_calibration_serves_a_part_of_the_targets() -> None:
    net = reference.tiny_net(9)
    other, calibrated = copy.deepcopy(net), calibrate(net)
    run(net, WasiConfig(residual=None, weight_rank=3), calibration=calibrated)
    run(other, WasiConfig(residual=None, weight_rank=3, target_modules=["k", "fc2"]), calibration=calibrated)
    expected = {name: initial for name, initial in prepared(net).items() if name.endswith((".k", ".fc2"))}
    assert_same_factors(expected, prepared(other))


@pytest.mark.parametrize("options", [{"max_batches": 2}, {"max_memory_bytes": 1}])
def test_options_reach_the_calibration(options: dict[str, int]) -> None:
    net, other = reference.tiny_net(9), reference.tiny_net(9)
    run(net, WasiConfig(residual=None, weight_rank=3), batches(2), repair_steps=2)
    run(
        other,
        WasiConfig(residual=None, weight_rank=3),
        batches(3 if "max_batches" in options else 2),
        repair_steps=2,
        **options,
    )
    assert_same_factors(prepared(net), prepared(other))


# -------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("threshold", [0.8, 0.99])
@pytest.mark.parametrize("gradients", ["features", None])
def test_the_threshold_is_the_kept_share_of_the_energies(threshold: float, gradients: Any) -> None:
    net = reference.tiny_net(3)
    calibrated, recorded = calibrate(net, gradients=gradients), inputs_of(net, batches())
    run(net, WasiConfig(explained_variance_threshold=threshold, update="factor"), calibration=calibrated)
    assert len(set(ranks(net).values())) > 1
    for name, initial in prepared(net).items():
        rank, energies = initial.L.shape[1], calibrated.energies(name)
        assert float(energies[:rank].sum()) >= threshold * float(energies.sum())
        assert rank == 1 or float(energies[: rank - 1].sum()) < threshold * float(energies.sum())
        if gradients is None:  # then the energy is that of the layer's output
            linear = net.get_submodule(name)
            x = recorded[name] - recorded[name].mean(0)
            total = float((x @ linear.weight.detach().double().T).square().sum() / len(x))
            error = output_error(recorded[name], linear, initial.L, initial.R, initial.bias)
            assert error <= (1 - threshold) * total * (1 + 1e-3)


@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize("gradients", ["features", None])
def test_a_share_is_kept_to_and_spent_where_it_matters(share: float, gradients: Any) -> None:
    net = reference.tiny_net(4)
    with torch.no_grad():
        net.blocks[1].fc2.weight.mul_(4)  # the residual stream now hangs on it
        net.blocks[1].fc1.weight[1:] = 0  # and one direction of this one is all there is
    calibrated = calibrate(net, gradients=gradients)
    run(net, WasiConfig(weight_share=share, update="factor"), calibration=calibrated)
    found = ranks(net)
    assert share - 0.08 < spent(found, net) <= share
    assert len(set(found.values())) > 1 and found["blocks.1.fc1"] == 1
    shapes = {name: net.get_submodule(name).weight.shape for name in TARGETS}
    uniform = {name: max(1, int(share * shape.numel() / sum(shape))) for name, shape in shapes.items()}
    spectra = {spectrum.name: spectrum.weight_energies for spectrum in calibrated.spectra()}
    lost = [sum(sum(spectra[name][rank:]) for name, rank in each.items()) for each in (found, uniform)]
    assert lost[0] < lost[1]
    config = WasiConfig(weight_share=share, update="factor")
    model = get_peft_model(net, config)
    assert {name: layer.form.L.shape[1] for name, layer in wasi_layers(model.base_model.model)} == found
    assert model.wasi_summary().kept_share <= share


def plan(layers: dict[str, int]) -> WasiPlan:
    shapes = {"fc1": (12, 8), "fc2": (8, 12)}
    return WasiPlan(
        tuple(
            LayerPlan(name, *shapes.get(name.rpartition(".")[2], (8, 8)), rank, {"feature": 4}, 0.9)
            for name, rank in layers.items()
        )
    )


def test_the_ranks_of_a_plan() -> None:
    net = reference.tiny_net(5)
    wanted = {"blocks.0.fc1": 2, "blocks.1.fc2": 5, "blocks.1.q": 3}
    run(net, WasiConfig(plan=plan(wanted), update="factor"), batches())
    assert ranks(net) == wanted
    expected = prepared(net)
    model = get_peft_model(net, WasiConfig(plan=plan(wanted), update="factor"))
    for name, layer in wasi_layers(model.base_model.model):
        assert torch.equal(layer.form.R, expected[name].R)


def test_a_rank_pattern() -> None:
    net = reference.tiny_net(5)
    run(net, WasiConfig(residual=None, weight_rank=3, rank_pattern={"fc2": 2}), batches())
    assert ranks(net) == {name: 2 if name.endswith("fc2") else 3 for name in TARGETS}


def test_the_given_configuration_is_not_changed() -> None:
    net, config = reference.tiny_net(5), WasiConfig(weight_share=0.5, update="factor")
    run(net, config, batches())
    assert config == WasiConfig(weight_share=0.5, update="factor")


# -------------------------------------------------------------------------------- repair


def test_repair_is_on_with_batches_and_off_with_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def recorded(model: nn.Module, factors: Any, data: Any, **options: Any) -> Any:
        steps.append(options["steps"])
        return factors

    monkeypatch.setitem(REPAIRS, "model", REPAIRS["model"]._replace(run=recorded))
    net, data, config = reference.tiny_net(6), batches(), WasiConfig(residual=None, weight_rank=3)
    calibrated = calibrate(net)
    run(net, config, data, repair_steps=None)
    run(net, config, data, calibration=calibrated, repair_steps=None)
    run(net, config, data, repair_steps=7)
    assert steps == [400, 400, 7]
    run(net, config, lambda: [net(x) for x in data], repair_steps=None)
    run(net, config, calibration=calibrated, repair_steps=None)
    run(net, config, data, repair_steps=0)
    assert len(steps) == 3


@pytest.mark.parametrize("update", ["factor", "frozen_basis", "core", "low_rank"])
@pytest.mark.parametrize("repair", ["model", "blocks"])
def test_the_repair_of_preprocessing_is_the_public_one(repair: Any, update: str) -> None:
    """Moments too, which are those of the repaired factors."""
    net, data = reference.tiny_net(6), batches()
    config = WasiConfig(residual=None, weight_rank=3, update=update, update_rank=2)
    function = {"model": repair_factors, "blocks": repair_blocks}[repair]
    factors = function(net, run(net, config, data), data, steps=3, progress_bar=False)
    run(net, config, data, repair=repair, repair_steps=3)
    assert_same_factors(prepared(net), factors.initial)
    for name, initial in prepared(net).items():
        moments = factors.initial[name].moments
        assert (initial.moments is None) == (moments is None) == (update in ("factor", "low_rank"))
        assert moments is None or initial.moments is None or torch.equal(initial.moments.image, moments.image)


def test_repair_by_tokens() -> None:
    """One that only a model with a vocabulary can have; the others are told before anything is done."""
    model, data = ARCHITECTURES["llama"].model(), [ARCHITECTURES["llama"].batch(seed=seed) for seed in range(3)]
    factors = run(model, WasiConfig(residual=None, weight_rank=3), data)
    expected = repair_tokens(model, factors, data, steps=3, progress_bar=False)
    run(model, WasiConfig(residual=None, weight_rank=3), data, repair="tokens", repair_steps=3)
    assert_same_factors(prepared(model), expected.initial)
    net = reference.tiny_net(6)
    untouched = Untouched(net)
    with pytest.raises(ValueError, match="repair='tokens' needs a model that ends in a linear layer over"):
        run(net, WasiConfig(residual=None, weight_rank=3), batches(), repair="tokens", repair_steps=3)
    untouched.check()


def test_language_models_are_repaired_by_tokens(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, repair in REPAIRS.items():

        def recorded(model: nn.Module, factors: Any, data: Any, name: str = name, **options: Any) -> Any:
            called.append((name, options["steps"]))
            return factors

        monkeypatch.setitem(REPAIRS, name, repair._replace(run=recorded))
    model = architecture.model()
    run(model, WasiConfig(residual=None, weight_rank=2), [architecture.batch()], repair_steps=None)
    writes = type(model).__name__.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration"))
    assert called == [("tokens", 128) if writes else ("model", 400)]


def test_repaired_factors_are_attached() -> None:
    net, data = reference.tiny_net(6), batches()
    other = copy.deepcopy(net)
    run(net, WasiConfig(residual=None, weight_rank=3), data)
    run(other, WasiConfig(residual=None, weight_rank=3), data, repair_steps=30)
    first, second = prepared(net), prepared(other)
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name].R, second[name].R) for name in first)
    get_peft_model(other, WasiConfig(residual=None, weight_rank=3))


# -------------------------------------------------------------------------------- what may go wrong


def test_success_leaves_the_model_as_it_was() -> None:
    net = reference.tiny_net(13)
    untouched = Untouched(net)
    run(net, WasiConfig(residual=None, weight_rank=3), batches(), repair_steps=2)
    untouched.check()
    assert set(prepared(net)) == set(TARGETS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "preprocess_wasi needs data, a calibration, or both; got neither"),
        ({"repair_steps": 3}, "repair needs batches in `data`, got NoneType and repair_steps=3"),
        ({"data": print, "repair_steps": 3}, "repair needs batches in `data`, got .* and repair_steps=3"),
        ({"data": batches(), "repair_steps": -1}, "repair_steps must be at least 0, got -1"),
        (
            {"data": batches(), "repair": "layers"},
            "repair must be one of 'model', 'blocks', 'tokens', None, got 'layers'",
        ),
        ({"data": []}, "at least one batch, got none"),
        ({"data": iter(batches())}, "got an iterator"),
        ({"data": with_nan(batches())}, "NaN or Inf on the calibration data"),
        ({"data": batches(), "max_batches": 0}, "max_batches must be at least 1, got 0"),
        ({"data": [{"labels": torch.zeros(4)}]}, "must hold model inputs"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    net = reference.tiny_net(18)
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=message):
        run(net, WasiConfig(residual=None, weight_rank=3), **given)
    untouched.check()
    assert prepared(net) == {}


@pytest.mark.parametrize("data", [iter(batches()), with_nan(batches())], ids=["iterator", "nan"])
def test_data_that_only_repair_sees(data: Any) -> None:
    net = reference.tiny_net(18)
    calibrated, untouched = calibrate(net), Untouched(net)
    with pytest.raises(ValueError, match=r"got an iterator|the dense model answers NaN or Inf"):
        run(net, WasiConfig(residual=None, weight_rank=3), data, calibration=calibrated, repair_steps=3)
    untouched.check()
    assert prepared(net) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WasiConfig(residual=None, target_modules=["nothing"]), "target_modules must match at least one module"),
        (WasiConfig(residual=None, weight_rank=9), "the rank must be at most .* = 8, got 9"),
        (WasiConfig(weight_share=0.01), r"share must be at least .* \(rank 1 in every layer, .*\), got 0.01"),
        (WasiConfig(plan=plan({"blocks.7.q": 2})), "the plan is for another model"),
        (WasiConfig(residual=None, target_modules=["norm1"]), "target modules must be torch.nn.Linear"),
    ],
)
def test_bad_configurations(config: WasiConfig, message: str) -> None:
    net = reference.tiny_net(18)
    untouched = Untouched(net)
    with pytest.raises((ValueError, TypeError), match=message):
        run(net, config, batches())
    untouched.check()
    assert prepared(net) == {}


@pytest.mark.parametrize("step", ["calibrate_layers", "Calibration.factors", "repair", "with_moments"])
def test_nothing_is_attached_after_a_crash(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = reference.tiny_net(18)
    run(net, WasiConfig(residual=None, weight_rank=2), batches())
    kept, untouched = prepared(net), Untouched(net)
    call = 3 if step == "Calibration.factors" else 1
    crash = crash_at(call, lambda *_: None)
    if step == "repair":
        monkeypatch.setitem(REPAIRS, "model", REPAIRS["model"]._replace(run=crash))
    else:
        monkeypatch.setattr(f"wasi_peft.factors.prepare.{step}", crash)
    with pytest.raises(Interrupted):
        run(net, WasiConfig(residual=None, weight_rank=3), batches(), repair_steps=2)
    untouched.check()
    assert_same_factors(prepared(net), kept)


def test_a_failed_run_keeps_the_factors_of_an_earlier_one() -> None:
    net = reference.tiny_net(26)
    run(net, WasiConfig(residual=None, weight_rank=3), batches())
    kept = prepared(net)
    with pytest.raises(ValueError, match="NaN or Inf"):
        run(net, WasiConfig(residual=None, weight_rank=4), with_nan(batches()))
    assert_same_factors(prepared(net), kept)


def test_a_calibration_of_another_model() -> None:
    calibrated = calibrate(reference.tiny_net(20))
    other = reference.tiny_net(21)
    with pytest.raises(ValueError, match="the calibration belongs to another model"):
        run(other, WasiConfig(residual=None, weight_rank=3), calibration=calibrated)
    assert prepared(other) == {}


def test_a_calibration_that_does_not_cover_a_layer() -> None:
    net = reference.tiny_net(22)
    calibrated = calibrate(net, config=WasiConfig(residual=None, target_modules=["q", "k"]))
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1: the calibration .* \(or does not cover this layer\)"):
        run(net, WasiConfig(residual=None, weight_rank=3, target_modules=["q", "fc1"]), calibration=calibrated)
    assert prepared(net) == {}


def test_an_adapted_model_is_refused() -> None:
    net = reference.tiny_net(25)
    model = get_peft_model(net, WasiConfig(residual=None, weight_rank=3, base_weight="keep"))
    with pytest.raises(ValueError, match="already a WASI layer; calibration needs the dense model"):
        run(model.base_model.model, WasiConfig(residual=None, weight_rank=3), batches())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weight_rank": 3}, {"weight_rank": 4}),
        ({"weight_rank": 3}, {"explained_variance_threshold": 0.9}),
        ({"weight_rank": 3}, {"weight_rank": 3, "rank_pattern": {"fc2": 2}}),
        ({"weight_rank": 3}, {"weight_share": 0.5}),
        ({"explained_variance_threshold": 0.9}, {"explained_variance_threshold": 0.95}),
        ({"weight_share": 0.5}, {"weight_share": 0.6}),
        ({"weight_share": 0.5}, {"explained_variance_threshold": 0.9}),
        ({"weight_share": 0.5}, {"plan": plan(dict.fromkeys(TARGETS, 8))}),
    ],
)
def test_a_rank_that_changed_before_the_injection(before: dict[str, Any], after: dict[str, Any]) -> None:
    net = reference.tiny_net(24)
    calibrated = calibrate(net)
    run(net, WasiConfig(**before, update="factor"), calibration=calibrated)
    kept, untouched = prepared(net), Untouched(net)
    with pytest.raises(ValueError, match="Run preprocess_wasi again with this configuration"):
        get_peft_model(net, WasiConfig(**after, update="factor"))
    untouched.check()
    assert not any(isinstance(module, WasiLayer) for module in net.modules())
    assert_same_factors(prepared(net), kept)
    run(net, WasiConfig(**after, update="factor"), calibration=calibrated)
    model = get_peft_model(net, WasiConfig(**after, update="factor"))
    assert len(list(wasi_layers(model))) == len(TARGETS)


@pytest.mark.parametrize("config", [None, {"weight_rank": 4}], ids=str)
def test_without_a_configuration(config: Any) -> None:
    with pytest.raises(TypeError, match=f"config must be a WasiConfig, got {type(config).__name__}"):
        preprocess_wasi(ARCHITECTURES["vit"].model(), config, [ARCHITECTURES["vit"].batch()])
