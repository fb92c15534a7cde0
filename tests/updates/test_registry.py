"""An update that only this file knows works wherever one is named, and the registry refuses what is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import ARCHITECTURES, logits, train
from peft import PeftModel, get_peft_model
from torch import Tensor

import wasi_peft.updates as registry
from wasi_peft import (
    WasiConfig,
    WasiPlan,
    calibrate_wasi,
    create_wasi_optimizer,
    estimate_wasi,
    plan_wasi,
    preprocess_wasi,
    resize_rank,
    wasi_summary,
)
from wasi_peft.cli.main import main
from wasi_peft.cost.timing import LayerTimer
from wasi_peft.forms import FactoredLinear
from wasi_peft.linalg.tucker import Tucker
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates import UPDATES, Update, make_update, register_update
from wasi_peft.updates.base import ProductGradientSink
from wasi_peft.updates.factored import factored_linear
from wasi_peft.updates.resizing import Carry, grow_factors, shrink_factors

VIT = ARCHITECTURES["vit"]
LARGEST = 0.5
EXACT: dict[str, Any] = {"activation_ranks": None, "activation_threshold": None}


@dataclass(frozen=True)
class Rows(Update):
    """Only R trains, and never leaves [-LARGEST, LARGEST]."""

    name: ClassVar[str] = "rows"
    trained: ClassVar[tuple[str, ...]] = ("R",)
    reads_input: ClassVar[str | None] = "R"

    def forward(
        self, form: FactoredLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        return factored_linear(x, form.L, form.R, form.bias, compressed, tangent=False)

    @staticmethod
    @torch.no_grad()
    def after_step(form: FactoredLinear) -> None:
        form.R.clamp_(-LARGEST, LARGEST)

    def shrink(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        shrink_factors(form.L, form.R, rank, carry)

    def grow(self, form: FactoredLinear, rank: int, carry: Carry) -> None:
        grow_factors(form.L, form.R, rank, carry)

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * rank * in_features if exact else 0

    def compressed_gradient_flops(self, rows: int, out_features: int, in_features: int, input_rank: int) -> int:
        return 2 * rows * input_rank * out_features

    def product_flops(self, out_features: int, in_features: int, rank: int, input_rank: int) -> int:
        return 2 * input_rank * rank * (out_features + in_features)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Update]]:
    """Registered for one test."""
    monkeypatch.setitem(UPDATES, Rows.name, Rows)
    yield Rows


def config(**options: Any) -> WasiConfig:
    return WasiConfig(**{"update": "rows", "weight_rank": 5, "activation_ranks": 4, **options})


def injected(**options: Any) -> Any:
    return get_peft_model(VIT.model(), config(**options))


pytestmark = pytest.mark.usefixtures("rows")


# -------------------------------------------------------------------- an update of one's own


def test_it_is_not_known_without_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(UPDATES, "rows")
    with pytest.raises(ValueError, match=r"update must be one of 'addition', .* got 'rows'"):
        WasiConfig(update="rows")


def test_configuration() -> None:
    assert config().layer_update == Rows() and config().update_rank is None
    with pytest.raises(ValueError, match=r"update must be one of .*'rows', None, got 'columns'"):
        WasiConfig(update="columns")
    with pytest.raises(ValueError, match=r"choose update=.*'low_rank' or .*'rows', got"):
        WasiConfig(update="core", activation_ranks=4)  # keeps no input, and names those that do


def test_injection_and_training() -> None:
    model = injected()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {name for name in trainable if ".wasi_form." in name and not name.endswith(".bias")}
    assert len(factors) == 12 and all(name.endswith(".default.wasi_R") for name in factors)
    left = {name: layer.form.L.clone() for name, layer in wasi_layers(model)}
    losses = train(model, VIT.batch(), steps=12)
    assert losses[-1] < 0.9 * losses[0]
    for name, layer in wasi_layers(model):
        assert torch.equal(layer.form.L, left[name])
    assert sum(layer.wasi_input["default"].bases.feature is not None for _, layer in wasi_layers(model)) == 8


def test_what_it_does_after_a_step() -> None:
    model = injected(**EXACT)
    train(model, VIT.batch(), steps=1, lr=10.0)  # a step that goes far beyond the limits
    assert all(float(layer.form.R.detach().abs().max()) == LARGEST for _, layer in wasi_layers(model))


def test_prepared_factors() -> None:
    model = VIT.model()
    preprocess_wasi(model, config(), [VIT.batch()], repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match="prepared it for update rows, the configuration now asks for factor"):
        get_peft_model(model, config(update="factor"))
    train(get_peft_model(model, config()), VIT.batch())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = injected(**EXACT)
    train(model, VIT.batch())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["update"] == "rows"
    loaded = PeftModel.from_pretrained(VIT.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert torch.equal(logits(loaded, VIT.batch()), logits(model, VIT.batch()))
    assert {layer.update for _, layer in wasi_layers(loaded)} == {Rows()}
    assert train(loaded, VIT.batch(), 2) == pytest.approx(train(model, VIT.batch(), 2), rel=1e-4)


def test_estimate_counts_what_it_trains() -> None:
    with_rows = estimate_wasi(VIT.model(), config(**EXACT), batch=VIT.batch())
    both = estimate_wasi(VIT.model(), config(**EXACT, update="factor"), batch=VIT.batch())
    model = injected(**EXACT)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert with_rows.gradients_bytes == 4 * trained < both.gradients_bytes
    assert with_rows.weights_bytes == both.weights_bytes


def test_plan() -> None:
    model = VIT.model()
    calibration = calibrate_wasi(model, [VIT.batch()], progress_bar=False)
    plan = plan_wasi(model, calibration, weight_share=0.6, config=WasiConfig(residual=None, update="rows"))
    assert plan.update == "rows" and plan.layer_update == Rows() and 0.3 < plan.kept_share <= 0.6
    again = WasiPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    planned = get_peft_model(model, WasiConfig(plan=again))
    assert planned.peft_config["default"].update == "rows"
    assert {layer.update for _, layer in wasi_layers(planned)} == {Rows()}
    assert wasi_summary(planned).kept_share == pytest.approx(plan.kept_share)


def test_plan_for_a_number_of_flops() -> None:
    """Its own formula decides: a budget that is just met by its cheaper gradients asks for smaller ranks of factor."""
    model = VIT.model()
    calibration = calibrate_wasi(model, [VIT.batch()], progress_bar=False)
    ranks = {}
    for update in ("rows", "factor"):
        options = WasiConfig(residual=None, update=update, activation_threshold=None)
        plan = plan_wasi(model, calibration, training_flops=0.7, batch=VIT.batch(), config=options)
        ranks[update] = sum(layer.weight_rank for layer in plan.layers)
    assert ranks["rows"] > ranks["factor"]


def test_summary() -> None:
    summary = wasi_summary(injected())
    assert {layer.update for layer in summary.layers} == {Rows()} and {layer.rank for layer in summary.layers} == {5}
    expected = sum(5 * (layer.out_features + layer.in_features) for layer in summary.layers)
    assert sum(layer.stored_elements for layer in summary.layers) == expected


def test_optimizer() -> None:
    model = injected()
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2, basis_lr_ratio=0.1, weight_decay=0.1)
    rights = {id(layer.form.R) for _, layer in wasi_layers(model)}
    (group,) = (g for g in optimizer.param_groups if rights & {id(p) for p in g["params"]})
    assert rights == {id(p) for p in group["params"]} and group["lr"] == 1e-2 and group["weight_decay"] == 0.1
    lefts = {id(layer.form.L) for _, layer in wasi_layers(model)}
    assert not lefts & {id(p) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("rank", [3, 8])
def test_resizing(rank: int) -> None:
    model = injected(**EXACT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, VIT.batch())
    before = logits(model, VIT.batch())
    name, layer = next((n, layer) for n, layer in wasi_layers(model.get_base_model()) if n.endswith("fc1"))
    right = layer.form.R
    resize_rank(model, name, rank, optimizer)
    assert layer.form.R is right and layer.form.weight_rank == rank
    close = torch.allclose(logits(model, VIT.batch()), before, atol=1e-5)
    assert close == (rank == 8)
    train(model, VIT.batch())


def test_layer_timer() -> None:
    timer = LayerTimer(torch.float32, torch.device("cpu"), Rows())
    form = timer._form(6, 8, 3, timer._update)
    assert [name for name, parameter in form.named_parameters() if parameter.requires_grad] == ["wasi_R"]


def test_merging_and_unloading() -> None:
    model = injected(base_weight="keep")
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    with model.disable_adapter():
        assert torch.equal(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch()))
    torch.testing.assert_close(logits(model.merge_and_unload(), VIT.batch()), expected, atol=1e-4, rtol=1e-4)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VIT.model().save_pretrained(tmp_path / "vit")
    injected().save_pretrained(tmp_path / "adapter")
    arguments = ("--batch-size", "4", "--update", "rows", "--weight-rank", "5", "--json")
    assert main(["estimate", str(tmp_path / "vit"), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    with_head = config(**EXACT, modules_to_save=["classifier"])
    direct = estimate_wasi(VIT.model(), with_head, batch=VIT.batch()).to_dict()
    assert printed["estimates"]["WASI K=5"] == direct
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "update rows" in capsys.readouterr().out
    assert main(["estimate", str(tmp_path / "vit"), *arguments[:3], "columns"]) == 2
    assert "'rows'" in capsys.readouterr().err


# -------------------------------------------------------------------- the registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Update]]:
    """A copy, to be changed at will."""
    copied = {name: update for name, update in UPDATES.items() if name != "rows"}
    monkeypatch.setattr(registry, "UPDATES", copied)
    return copied


def test_registering(own_registry: dict[str, type[Update]]) -> None:
    assert register_update(Rows) is Rows and own_registry["rows"] is Rows
    assert make_update("rows") == Rows()
    register_update(Rows)  # again: it is the same
    assert list(own_registry)[-1] == "rows" and len(own_registry) == len(UPDATES)


def test_the_name_of_another_update(own_registry: dict[str, type[Update]]) -> None:
    class Impostor(Rows):
        name = "factor"

    before = dict(own_registry)
    with pytest.raises(ValueError, match="the name of an update must be its own, got 'factor', which is <class"):
        register_update(Impostor)
    assert own_registry == before


class Unfinished(Update):
    """Says nothing of what it computes."""

    name = "unfinished"
    trained = ("L",)


@pytest.mark.parametrize("value", [Unfinished, Update, object, Rows(), "rows", None], ids=str)
def test_what_is_no_update(own_registry: dict[str, type[Update]], value: Any) -> None:
    before = dict(own_registry)
    with pytest.raises(TypeError, match="register_update needs a concrete subclass of Update, got"):
        register_update(value)
    assert own_registry == before
