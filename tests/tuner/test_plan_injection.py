"""Budgets for all layers together in a model: a share of the weights, and a plan."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture, exact_config, logits, train, wasi_model
from peft import PeftModel, get_peft_model
from reference import tiny_net
from torch import nn

from wasi_peft import WasiConfig, preprocess_wasi, wasi_summary
from wasi_peft.forms.dense import dense_weight
from wasi_peft.forms.residual import ExactResidual, Int4Residual, Int8Residual
from wasi_peft.ranks.allocate import allocate_ranks
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.ranks.spectrum import LayerSpectrum
from wasi_peft.tuner.inputs import SharedInput
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.tuner.prepared import PreparedLayer, WasiFactors
from wasi_peft.tuner.targets import asked_rank, check_targets, resolve_targets
from wasi_peft.updates.base import InitialFactors
from wasi_peft.updates.costs import break_even_rank

VIT = ARCHITECTURES["vit"]


@pytest.fixture(autouse=True)
def plain_svd_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain")
        yield


def plan_for(architecture: Architecture, model: nn.Module, **changed: Any) -> WasiPlan:
    """Ranks that differ from layer to layer; feature rank 3 everywhere, the exact input for the first layer."""
    layers = []
    for index, name in enumerate(sorted(architecture.targets(model))):
        out_features, in_features = dense_weight(model.get_submodule(name)).shape
        ranks = None if index == 0 else {"feature": 3}
        layers.append(LayerPlan(name, out_features, in_features, 1 + index % 5, ranks, 0.5))
    return WasiPlan(tuple(dataclasses.replace(layer, **changed) for layer in layers), {"weight_share": 0.3})


def ranks(model: Any) -> dict[str, int]:
    return {layer.name: layer.rank for layer in wasi_summary(model).layers}


# -------------------------------------------------------------------- plan


def test_the_layers_of_a_plan_are_the_targets_at_its_ranks(architecture: Architecture) -> None:
    model = architecture.model()
    plan = plan_for(architecture, model)
    some = WasiPlan(plan.layers[::2])
    peft_model = get_peft_model(model, WasiConfig(plan=some, update="factor"))
    assert ranks(peft_model) == {layer.name: layer.weight_rank for layer in some.layers}
    assert peft_model.peft_config["default"].resolved_ranks == ranks(peft_model)
    planned = {layer.name: layer.activation_ranks for layer in some.layers}
    for name, layer in wasi_layers(peft_model.get_base_model()):
        rule = layer.wasi_input["default"].rule
        assert (None if rule is None else dict(rule.ranks)) == planned[name]
    losses = train(peft_model, architecture.batch(), steps=3)
    assert losses[-1] < losses[0]


def test_layers_with_one_input_still_share_one_compressed_copy() -> None:
    model = VIT.model()
    plan = plan_for(VIT, model, activation_ranks={"feature": 3, "token": 2})
    peft_model = get_peft_model(model, WasiConfig(plan=plan, update="factor"))
    shared: list[SharedInput] = []

    def remember(layer: Any, *_: Any) -> None:
        entries = layer.inputs._entries.values()
        shared.extend(entry for entry in entries if all(entry is not other for other in shared))

    for _, layer in wasi_layers(peft_model):
        layer.register_forward_hook(remember)  # type: ignore[operator]
    peft_model(**VIT.batch())
    assert all(len(entry.compressed) == 1 for entry in shared)
    assert len(shared) == 2 * 4  # two blocks; q, k and v read one input; attention output, fc1, fc2 their own
    forms = [form for entry in shared for form in entry.compressed.values()]
    assert all(form is not None and form.feature.shape[1] == 3 and form.token.shape[1] == 2 for form in forms)


def test_a_plan_is_saved_with_the_adapter_and_loads_in_another_process(tmp_path: Path) -> None:
    model = VIT.model()
    peft_model = get_peft_model(model, WasiConfig(plan=plan_for(VIT, model), update="factor"))
    train(peft_model, VIT.batch())
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(logits(peft_model, VIT.batch()), tmp_path / "logits.pt")
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from models import ARCHITECTURES, logits, train\n"
        "import wasi_peft\n"
        "from wasi_peft.tuner.layer import wasi_layers\n"
        "vit, folder = ARCHITECTURES['vit'], sys.argv[1]\n"
        "model = PeftModel.from_pretrained(vit.model(), folder + '/adapter', is_trainable=True)\n"
        "assert torch.allclose(logits(model, vit.batch()), torch.load(folder + '/logits.pt'), atol=1e-6)\n"
        "plan = wasi_peft.WasiPlan.from_dict(model.peft_config['default'].plan)\n"
        "rules = {name: layer.wasi_input['default'].rule for name, layer in wasi_layers(model.get_base_model())}\n"
        "for layer in plan.layers:\n"
        "    rule = rules.pop(layer.name)\n"
        "    assert (rule and dict(rule.ranks)) == layer.activation_ranks\n"
        "assert not rules\n"
        "train(model, vit.batch())\n"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_saved_plan_loads_where_peft_shortened_the_target_names(tmp_path: Path) -> None:
    """From 20 names on PEFT keeps only suffixes of them; the plan still names its layers in full."""
    architecture = ARCHITECTURES["t5"]
    model = architecture.model()
    plan = plan_for(architecture, model)
    assert len(plan.layers) >= 20
    peft_model = get_peft_model(model, WasiConfig(plan=plan, update="factor"))
    peft_model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(architecture.model(), str(tmp_path))
    assert ranks(again) == ranks(peft_model)
    assert torch.equal(logits(again, architecture.batch()), logits(peft_model, architecture.batch()))


def test_one_configuration_with_a_plan_serves_several_models() -> None:
    model = VIT.model()
    config = WasiConfig(plan=plan_for(VIT, model), update="factor")
    first = get_peft_model(model, config)
    second = get_peft_model(VIT.model(), config)
    assert ranks(first) == ranks(second)


def refused(model: nn.Module, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, WasiConfig(**{"update": "factor", **options}))
    assert not list(wasi_layers(model))


def test_a_plan_for_another_model() -> None:
    model = VIT.model()
    plan = plan_for(VIT, model)
    first = plan.layers[0]
    renamed = WasiPlan((dataclasses.replace(first, name="vit.layers.7.fc"), *plan.layers[1:]))
    refused(
        model, r"vit\.layers\.7\.fc: the plan is for another model: this layer is in the plan but not", plan=renamed
    )
    reshaped = WasiPlan((dataclasses.replace(first, out_features=99), *plan.layers[1:]))
    refused(
        model,
        rf"{first.name}: the plan is for another model: it has 99 x {first.in_features} there, this model",
        plan=reshaped,
    )
    other = ARCHITECTURES["bert"]
    refused(model, "the plan is for another model", plan=plan_for(other, other.model()))


def test_a_plan_does_not_reach_layers_whose_names_end_alike() -> None:
    """PEFT matches names from the end; a layer that the plan does not name is never replaced unasked."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6)])
            self.decoder = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)])})

    plan = WasiPlan((LayerPlan("blocks.0", 6, 6, 2, None, 0.5),))
    refused(
        Twice(), r"decoder\.blocks\.0: the plan is for another model: this layer is in this model but not", plan=plan
    )


# -------------------------------------------------------------------- forms

SOME_FORMS = ("factors", "int8", "int4", "exact", "dense")


def mixed_plan(architecture: Architecture, model: nn.Module, **options: Any) -> WasiPlan:
    """All forms in turn, over layers that read one input too."""
    layers = []
    for index, layer in enumerate(plan_for(architecture, model).layers):
        form = SOME_FORMS[index % len(SOME_FORMS)]
        rank = 0 if form == "dense" else layer.weight_rank
        layers.append(dataclasses.replace(layer, form=form, weight_rank=rank, activation_ranks=None))
    return WasiPlan(tuple(layers), **options)


def test_every_layer_gets_the_form_of_the_plan(architecture: Architecture) -> None:
    model = architecture.model()
    plan = mixed_plan(architecture, model)
    peft_model = get_peft_model(model, WasiConfig(plan=plan))
    base = peft_model.get_base_model()
    layers = dict(wasi_layers(base))
    assert set(layers) == {layer.name for layer in plan.layers if layer.form != "dense"}
    for planned in plan.layers:
        module = base.get_submodule(planned.name)
        if planned.form == "dense":
            assert not any(parameter.requires_grad for parameter in module.parameters())
            continue
        layer = layers[planned.name]
        assert layer.update == plan.update_of(planned)
        assert layer.update.name == ("frozen_basis" if planned.form == "factors" else "addition")
        assert layer.base_is_released == (planned.form == "factors")
        assert layer.form.weight_rank == planned.weight_rank
        kinds = {"int8": Int8Residual, "int4": Int4Residual, "exact": ExactResidual}
        assert planned.residual is None or type(layer.residual) is kinds[planned.residual]
    summary = wasi_summary(peft_model)
    kept = [layer for layer in plan.layers if layer.form != "dense"]
    assert summary.kept_share == pytest.approx(WasiPlan(tuple(kept)).kept_share)
    losses = train(peft_model, architecture.batch(), steps=3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [{}, {"residual_update": "frozen_basis"}, {"update": "subspace"}])
def test_an_adapter_of_a_plan_with_forms_is_loaded_again(options: dict[str, Any], tmp_path: Path) -> None:
    plan = mixed_plan(VIT, VIT.model(), **options)
    peft_model = get_peft_model(VIT.model(), WasiConfig(plan=plan, residual_product="restored"))
    train(peft_model, VIT.batch())
    peft_model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(VIT.model(), str(tmp_path))
    expected = {name: layer.update for name, layer in wasi_layers(peft_model.get_base_model())}
    assert {name: layer.update for name, layer in wasi_layers(again.get_base_model())} == expected
    torch.testing.assert_close(logits(again, VIT.batch()), logits(peft_model, VIT.batch()))
    assert ranks(again) == ranks(peft_model)


def test_a_plan_of_residuals_keeps_the_base_model() -> None:
    model = VIT.model()
    layers = tuple(
        dataclasses.replace(layer, form="exact", activation_ranks=None) for layer in plan_for(VIT, model).layers
    )
    before = logits(model, VIT.batch())
    peft_model = get_peft_model(model, WasiConfig(plan=WasiPlan(layers)))
    train(peft_model, VIT.batch())
    assert not torch.allclose(logits(peft_model, VIT.batch()), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, VIT.batch()), before)
    mixed = get_peft_model(VIT.model(), WasiConfig(plan=mixed_plan(VIT, VIT.model())))
    with pytest.raises(ValueError, match="dense weights were released"), mixed.disable_adapter():
        pass


def test_adapters_of_one_model_have_the_same_forms() -> None:
    plan = mixed_plan(VIT, VIT.model())
    peft_model = get_peft_model(VIT.model(), WasiConfig(plan=plan, base_weight="keep"))
    peft_model.add_adapter("other", WasiConfig(plan=plan, base_weight="keep"))
    with pytest.raises(ValueError, match="must have the same residual"):
        peft_model.add_adapter("third", WasiConfig(weight_rank=2))


def test_a_plan_decides_the_residual() -> None:
    plan = mixed_plan(VIT, VIT.model())
    with pytest.raises(ValueError, match="plan decides the form of every layer; leave residual='int8' out"):
        WasiConfig(plan=plan, residual="int8")


def test_layers_are_prepared_in_the_way_of_their_form() -> None:
    model = VIT.model()
    plan = mixed_plan(VIT, model)
    config = WasiConfig(plan=plan, residual_product="restored")
    data = [VIT.batch(8, seed) for seed in (3, 4)]
    factors = preprocess_wasi(model, config, data, repair_steps=1, progress_bar=False)
    assert {name: layer.residual for name, layer in factors.layers.items()} == {
        layer.name: layer.residual for layer in plan.layers if layer.form != "dense"
    }
    dense = logits(VIT.model(), VIT.batch())
    apart = (logits(get_peft_model(model, config), VIT.batch()) - dense).norm()
    plain = (logits(get_peft_model(VIT.model(), config), VIT.batch()) - dense).norm()
    assert apart < plain


# -------------------------------------------------------------------- weight_share


def test_weight_share_allocates_over_all_layers(architecture: Architecture) -> None:
    """From the energies of the weights, each relative to its layer's total."""
    model = architecture.model()
    spectra = []
    for name in architecture.targets(model):
        weight = dense_weight(model.get_submodule(name)).double()
        energies = torch.linalg.svdvals(weight) ** 2
        spectra.append(LayerSpectrum(name, *weight.shape, name, tuple((energies / energies.sum()).tolist())))
    share = 0.6
    with pytest.warns(UserWarning, match="plain truncated SVD"):
        peft_model = wasi_model(model, weight_share=share)
    summary = wasi_summary(peft_model)
    assert ranks(peft_model) == peft_model.peft_config["default"].resolved_ranks
    assert summary.kept_share <= share
    assert all(layer.rank <= break_even_rank(layer.out_features, layer.in_features) for layer in summary.layers)
    expected = allocate_ranks(spectra, share)
    assert sum(abs(ranks(peft_model)[name] - rank) for name, rank in expected.items()) <= 2  # ties in floating point


def test_a_larger_share_keeps_more_and_a_tiny_one_is_refused() -> None:
    shares = [wasi_summary(wasi_model(VIT.model(), weight_share=share)).kept_share for share in (0.3, 0.5, 0.8)]
    assert shares == sorted(shares) and len(set(shares)) == 3
    assert all(kept > share - 0.02 for kept, share in zip(shares, (0.3, 0.5, 0.8), strict=True))
    refused(
        VIT.model(), r"share must be at least 0\.\d+ \(rank 1 in every layer, .*\), got 0\.001", weight_share=0.001
    )


def test_a_zero_weight_does_no_harm() -> None:
    model = VIT.model()
    name = sorted(VIT.targets(model))[0]
    with torch.no_grad():
        model.get_submodule(name).weight.zero_()  # type: ignore[operator,union-attr]
    assert ranks(wasi_model(model, weight_share=0.5))[name] == 1


def test_weight_share_is_saved_and_loads_without_decomposing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_model = wasi_model(VIT.model(), weight_share=0.4)
    peft_model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("decomposed"))
    again = PeftModel.from_pretrained(VIT.model(), str(tmp_path))
    assert again.peft_config["default"].weight_share == 0.4
    assert ranks(again) == ranks(peft_model)
    assert torch.equal(logits(again, VIT.batch()), logits(peft_model, VIT.batch()))


def test_a_second_adapter_with_another_share() -> None:
    peft_model = wasi_model(VIT.model(), weight_share=0.6, base_weight="keep", train_vectors=False)
    first = ranks(peft_model)
    peft_model.add_adapter("other", exact_config(weight_share=0.3, train_vectors=False))
    assert ranks(peft_model) == first
    other = wasi_summary(peft_model, "other")
    assert other.kept_share <= 0.3 < wasi_summary(peft_model).kept_share


def test_ranks_of_an_earlier_model_are_forgotten() -> None:
    config = exact_config(weight_share=0.5)
    get_peft_model(ARCHITECTURES["bert"].model(), config)
    config.target_modules = None
    found = ranks(get_peft_model(VIT.model(), config))
    assert found == ranks(wasi_model(VIT.model(), weight_share=0.5))


def prepare(model: nn.Module, names: set[str], rank: int, share: float | None) -> None:
    """What preprocess_wasi leaves on its targets."""
    layers = {}
    for name in names:
        module = model.get_submodule(name)
        weight = dense_weight(module)
        initial = InitialFactors(weight[:, :rank], weight[:rank], module.bias.detach())  # type: ignore[union-attr,operator]
        layers[name] = PreparedLayer(initial, rank, rank, share, "factor")
    WasiFactors(layers).attach(model)


def test_prepared_factors_decide_the_ranks_of_their_share() -> None:
    model = VIT.model()
    prepare(model, VIT.targets(model), 3, 0.5)
    peft_model = wasi_model(model, weight_share=0.5, update="factor")
    assert set(ranks(peft_model).values()) == {3}
    assert peft_model.peft_config["default"].resolved_ranks == ranks(peft_model)


@pytest.mark.parametrize("share", [None, 0.4])
def test_factors_prepared_for_another_share_are_refused(share: float | None) -> None:
    model = VIT.model()
    prepare(model, VIT.targets(model), 3, share)
    refused(model, f"prepared it for weight_share {share}, the configuration now asks for 0.5", weight_share=0.5)


def test_a_share_needs_all_layers_prepared_or_none() -> None:
    model = VIT.model()
    targets = sorted(VIT.targets(model))
    prepare(model, set(targets[1:]), 3, 0.5)
    refused(model, rf"{targets[0]}: preprocess_wasi did not prepare this layer \(1 in all\)", weight_share=0.5)


def test_factors_prepared_under_a_share_do_for_the_same_rank_only() -> None:
    model = VIT.model()
    prepare(model, VIT.targets(model), 3, 0.5)
    refused(model, "prepared it for rank or threshold 3, the configuration now asks for 4", weight_rank=4)
    refused(model, "prepared it for rank or threshold 3, the configuration now asks for ", plan=plan_for(VIT, model))
    assert set(ranks(wasi_model(model, weight_rank=3, update="factor")).values()) == {3}


def test_factors_prepared_for_another_update_are_refused() -> None:
    """They hold other directions than the layer would start from."""
    model = VIT.model()
    prepare(model, VIT.targets(model), 3, 0.5)
    for options in ({"weight_share": 0.5}, {"weight_rank": 3}):
        message = "prepared it for update factor, the configuration now asks for "
        for update in ("low_rank", "core", "frozen_basis"):
            refused(model, message + update, update=update, **options)


def test_factors_prepared_for_another_update_rank_are_refused() -> None:
    net, options = tiny_net(0), {"update": "low_rank", "weight_rank": 3}
    data = [torch.randn(4, 5, 8)]
    preprocess_wasi(net, WasiConfig(update_rank=2, **options), data, repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match="prepared it for update_rank 2, the configuration now asks for 1"):
        get_peft_model(net, WasiConfig(update_rank=1, **options))


def test_a_share_asks_nothing_of_one_layer_before_ranks_are_allocated() -> None:
    model, config = VIT.model(), WasiConfig(weight_share=0.5, update="factor")
    resolve_targets(model, config)
    check_targets(model, config)
    name = sorted(VIT.targets(model))[0]
    with pytest.raises(ValueError, match=f"{name}: weight_share must be allocated over all layers first"):
        asked_rank(name, config)
    config.resolved_ranks = {name: 7}
    assert asked_rank(name, config) == 7


def test_random_factors_have_the_ranks_of_their_share() -> None:
    drawn = wasi_model(VIT.model(), weight_share=0.5, init_weights=False)
    made = wasi_model(VIT.model(), weight_share=0.5)
    assert ranks(drawn) == ranks(made)
    assert not torch.allclose(logits(drawn, VIT.batch()), logits(made, VIT.batch()), atol=1e-3)
