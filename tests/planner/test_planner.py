"""Plans for real models under each kind of budget."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, FACTOR_UPDATES, Architecture, train
from peft import get_peft_model
from slow import partly_slow
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wasi_peft import WasiConfig, compress
from wasi_peft.cost import timing
from wasi_peft.cost.estimate import PlannedPeaks, estimate_peak, estimate_wasi, input_sizes
from wasi_peft.cost.timing import LayerTimer
from wasi_peft.factors.calibration import Calibration, calibrate_wasi
from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.linalg.low_bit import quantize_rows
from wasi_peft.linalg.tucker import Tucker
from wasi_peft.planner.fit import AIM, GRADIENT_ERROR, Problem, next_bound
from wasi_peft.planner.peak import MODE_TOLERANCE, PEAK_MARGIN
from wasi_peft.planner.planner import (
    BUDGETS,
    DEFAULT_FORMS,
    _comparable,
    _fewer_tokens,
    _run_for_sizes,
    input_shapes,
    plan_wasi,
)
from wasi_peft.planner.work import Flops
from wasi_peft.ranks.choosing import plan_error
from wasi_peft.ranks.plan import MEMORY_MODES, WasiPlan
from wasi_peft.ranks.spectrum import LayerSpectrum, addition_ranks, input_groups, with_forms
from wasi_peft.updates import Update, make_update
from wasi_peft.updates.costs import break_even_rank, rank_step

NAMES = ["vit", "swin", "llama"]
BATCH = {name: ARCHITECTURES[name].batch(8) for name in ARCHITECTURES}
CACHE: dict[tuple[str, Any], tuple[nn.Module, Calibration]] = {}


def calibrated(name: str, gradients: Any = "features") -> tuple[Any, Calibration]:
    if (name, gradients) not in CACHE:
        model = ARCHITECTURES[name].model()
        data = [ARCHITECTURES[name].batch(8, seed) for seed in (3, 4)]
        CACHE[name, gradients] = model, calibrate_wasi(model, data, gradients=gradients, progress_bar=False)
    return CACHE[name, gradients]


@pytest.fixture(autouse=True)
def plain_svd_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain")
        yield


class CountingTimer(LayerTimer):
    """One second for every multiplication: a machine whose time is known."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def dense(self, rows: int, out_features: int, in_features: int, training: bool) -> float:
        self.calls += 1
        return rows * out_features * in_features * (3 if training else 1)

    def factored(
        self,
        rows: int,
        out_features: int,
        in_features: int,
        rank: int,
        feature_rank: int | None,
        training: bool,
        update: Update | None = None,
    ) -> float:
        self.calls += 1
        forward = rows * rank * (out_features + in_features)
        if update is not None and update.residual is not None:
            forward += rows * out_features * in_features // 2  # a machine that multiplies integers twice as fast
            return 3 * forward if training else forward
        gradient = rows * (out_features * feature_rank if feature_rank else rank * (out_features + in_features))
        return 2 * forward + gradient if training else forward

    def compression(self, rows: int, in_features: int, rank: int) -> float:
        self.calls += 1
        return rows * in_features * rank


def planned(model: nn.Module, calibration: Calibration, **options: Any) -> WasiPlan:
    """A plan for factors that train: the layers are too small for what the low-rank update reserves."""
    config = WasiConfig(update="subspace", target_modules=list(calibration.layers))
    return plan_wasi(model, calibration, **({"config": config} | options))


def forward_share(plan: WasiPlan, model: nn.Module, batch: Any) -> float:
    """Multiplications of the planned layers in a forward pass over those of the dense ones."""
    targets = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    factored = dense = 0
    for name, (samples, tokens) in input_shapes(model, targets, batch).items():
        layer = next(layer for layer in plan.layers if layer.name == name)
        factored += samples * tokens * layer.weight_rank * (layer.out_features + layer.in_features)
        dense += samples * tokens * layer.out_features * layer.in_features
    return factored / dense


# -------------------------------------------------------------------- every budget


ASKED: dict[str, Any] = {
    "weight_share": 0.4,
    "training_flops": 0.6,
    "inference_flops": 0.5,
    "step_seconds": 0.6,
    "inference_seconds": 0.5,
    "error": 0.05,
}


@pytest.mark.parametrize(
    ("name", "field"), [("vit", field) for field in ASKED] + [("swin", "error"), ("llama", "step_seconds")]
)
def test_a_plan_can_be_injected_and_trained(name: str, field: str) -> None:
    model, calibration = calibrated(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked: dict[str, Any] = {field: ASKED[field]}
    plan = planned(model, calibration, batch=BATCH[name], timer=CountingTimer(), **asked)
    assert plan.budget == asked
    assert {layer.name for layer in plan.layers} == ARCHITECTURES[name].targets(model)
    assert not any(map(plan.past_break_even, plan.layers))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    losses = train(
        get_peft_model(ARCHITECTURES[name].model(), WasiConfig(plan=plan, update="subspace")), BATCH[name], steps=3
    )
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("update", ["frozen_basis", "low_rank"])
@pytest.mark.parametrize(("field", "value"), [*ASKED.items(), ("peak_bytes", 10**12)])
def test_ranks_make_widths_that_are_multiples_of_a_step(field: str, value: Any, update: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(272, 272), nn.ReLU(), nn.Linear(272, 160)))
    x = torch.randn(64, 272, generator=torch.Generator().manual_seed(0))
    calibration = calibrate_wasi(model, [x], progress_bar=False)
    config = WasiConfig(residual=None, update=update, target_modules=list(calibration.layers))
    budget: Any = {field: value}
    plan = plan_wasi(model, calibration, batch=x, timer=CountingTimer(), config=config, **budget)
    assert (plan.update, plan.update_rank) == (update, 16 if update == "low_rank" else None)
    spectra = calibration.spectra(update=config.layer_update)
    assert [rank_step(x.out_features, x.in_features) for x in spectra] == [16, 8]
    for layer, spectrum in zip(plan.layers, spectra, strict=True):
        assert layer.weight_rank in spectrum.rank_choices[1:]


@pytest.mark.parametrize("field", ["weight_share", "training_flops", "inference_flops", "inference_seconds"])
def test_more_budget_keeps_more(field: str) -> None:
    model, calibration = calibrated("vit")
    plans = [
        planned(model, calibration, batch=BATCH["vit"], timer=CountingTimer(), **{field: value})  # type: ignore[arg-type]
        for value in (0.4, 0.5, 0.7)
    ]
    shares = [plan.kept_share for plan in plans]
    assert shares == sorted(shares) and shares[0] < shares[-1]


@pytest.mark.parametrize("name", NAMES)
def test_weight_share_is_kept(name: str) -> None:
    model, calibration = calibrated(name)
    assert 0.35 < planned(model, calibration, weight_share=0.4).kept_share <= 0.4


@pytest.mark.parametrize("name", NAMES)
def test_inference_budgets_count_every_layer_at_its_own_number_of_rows(name: str) -> None:
    model, calibration = calibrated(name)
    for asked in ({"inference_flops": 0.5}, {"inference_seconds": 0.5}):
        plan = planned(model, calibration, batch=BATCH[name], timer=CountingTimer(), **asked)  # type: ignore[arg-type]
        assert 0.4 < forward_share(plan, model, BATCH[name]) <= 0.5


def test_absolute_flops_are_those_of_the_batch() -> None:
    model, calibration = calibrated("vit")
    rows = 8 * 5
    dense = sum(
        2 * rows * module.weight.numel() for _, module in model.named_modules() if isinstance(module, nn.Linear)
    )
    dense -= 2 * rows * model.classifier.weight.numel()
    share = planned(model, calibration, inference_flops=0.5, batch=BATCH["vit"])
    absolute = planned(model, calibration, inference_flops=0.5 * dense, batch=BATCH["vit"])
    assert share.layers == absolute.layers


def test_a_tolerated_error_takes_the_least_weights() -> None:
    model, calibration = calibrated("vit")
    spectra = {spectrum.name: spectrum for spectrum in calibration.spectra()}
    plan = planned(model, calibration, error=0.05)
    total = sum(sum(spectrum.weight_energies) for spectrum in spectra.values())
    dropped = sum(sum(spectra[layer.name].weight_energies[layer.weight_rank :]) for layer in plan.layers)
    assert 0.02 < dropped / total <= 0.05
    assert planned(model, calibration, weight_share=0.9 * plan.kept_share).kept_share < plan.kept_share


# -------------------------------------------------------------------- compressed inputs


def test_inputs_keep_most_of_the_energy_of_every_gradient() -> None:
    model, calibration = calibrated("vit")
    plan = planned(model, calibration, weight_share=0.4)
    ranks = {layer.name: layer.activation_ranks for layer in plan.layers}
    compressed = 0
    for group in input_groups(calibration.spectra()):
        chosen = ranks[group.name]
        assert all(ranks[spectrum.name] == chosen for spectrum in group.spectra)
        if chosen is not None:
            compressed += 1
            lost = [sum(x.gradient_energies["feature"][chosen["feature"] :]) for x in group.spectra]
            shares = [part / sum(x.gradient_energies["feature"]) for part, x in zip(lost, group.spectra, strict=True)]
            assert sum(shares) <= GRADIENT_ERROR * len(shares) + 1e-9
    assert compressed


def test_without_gradients_inputs_stay_exact() -> None:
    model, calibration = calibrated("vit", None)
    for asked in ({"weight_share": 0.4}, {"training_flops": 0.6}, {"step_seconds": 0.6}):
        plan = planned(model, calibration, batch=BATCH["vit"], timer=CountingTimer(), **asked)  # type: ignore[arg-type]
        assert all(layer.activation_ranks is None for layer in plan.layers)


@pytest.mark.parametrize("options", [{"activation_threshold": None}, {"update": "frozen_basis"}, {"update": "core"}])
def test_inputs_stay_exact_where_the_configuration_says_so(options: dict[str, Any]) -> None:
    model, calibration = calibrated("vit")
    plan = planned(model, calibration, weight_share=0.4, config=WasiConfig(**({"update": "subspace"} | options)))
    assert all(layer.activation_ranks is None for layer in plan.layers)


def test_tokens_that_vary_in_number() -> None:
    architecture = ARCHITECTURES["llama"]
    model = architecture.model()
    data = [architecture.batch(8, seed) for seed in (3, 4)]
    data[1] = {key: value[:, :5] for key, value in data[1].items()}
    calibration = calibrate_wasi(model, data, progress_bar=False)
    plan = planned(model, calibration, training_flops=0.6, batch=data[1])
    assert plan != planned(model, calibration, training_flops=0.6, batch=data[0])
    assert all("token" not in spectrum.gradient_energies for spectrum in calibration.spectra())
    assert train(get_peft_model(model, WasiConfig(plan=plan, update="subspace")), data[1])


# -------------------------------------------------------------------- shapes of inputs


def test_shapes_are_those_of_a_real_run(architecture: Architecture) -> None:
    model, batch = architecture.model(), architecture.batch(3)
    targets = {name: model.get_submodule(name) for name in architecture.targets(model)}
    mode, sizes = model.training, _run_for_sizes(model, targets, batch)
    assert input_sizes(model, targets, batch) == sizes
    assert set(input_shapes(model, targets, batch)) == set(targets)
    assert model.training == mode and not any(module._forward_pre_hooks for module in model.modules())


class Picks(nn.Module):
    """Goes on with the rows that are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x[x[:, 0] > 0])


def test_shapes_that_depend_on_values_are_found_by_running() -> None:
    model, x = Picks(), torch.tensor([[1.0] * 4, [-1.0] * 4, [2.0] * 4])
    assert input_sizes(model, ["fc"], x) is None
    assert input_shapes(model, {"fc": model.fc}, x) == {"fc": (1, 2)}
    with pytest.raises(
        ValueError, match="must reach a planned layer with at least one row, got one that reaches none of 1"
    ):
        input_shapes(model, {"fc": model.fc}, -x.abs())
    both = {"fc": model.fc, "unused": model.unused}
    assert input_shapes(model, both, x) == {"fc": (1, 2), "unused": (1, 2)}  # as if it met what others do


# -------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize(
    ("update", "feature_rank"),
    [
        *itertools.product(("factor", "subspace", "low_rank"), (2, 7, None)),
        *itertools.product(("frozen_basis", "core"), (None,)),
    ],
)
def test_flops_are_those_that_torch_counts(rank: int, update: str, feature_rank: int | None) -> None:
    rows, out_features, in_features = 60, 24, 20
    layer_update = make_update(update, 4)
    spectrum = LayerSpectrum("fc", out_features, in_features, "fc", (1.0,) * 20, update=layer_update)
    timer = LayerTimer(update=layer_update)
    form, x = (
        timer._form(out_features, in_features, rank, layer_update),
        timer._random(1, rows, in_features).requires_grad_(),
    )
    compressed = None
    if feature_rank is not None:
        compressed = Tucker(timer._random(1, rows, feature_rank), timer._random(in_features, feature_rank))
    work = Flops(Problem([spectrum], {"fc": (1, rows)}, {}), interval=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        form(x)
    assert work.forward(spectrum, rank) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        layer_update.forward(form, x, compressed, None).sum().backward()
    flops = work.weight(spectrum, rank, feature_rank is None)
    if feature_rank is not None:
        flops += work.product(spectrum, rank, feature_rank)
        group = input_groups([spectrum])[0]
        flops += work.compression(group, feature_rank) - 2 * rows * in_features * feature_rank * (1 + 2 / 8)
    counted = counter.get_total_flops()
    if update == "subspace":
        assert counted <= flops <= counted + 2 * rank**2 * (4 * out_features + 3 * in_features)
    else:
        assert flops == counted


@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
@pytest.mark.parametrize("rank", [0, 3])
def test_flops_beside_a_residual_are_those_that_torch_counts(rank: int, update: str) -> None:
    """Of an exact one; others restore weights, or multiply a few columns twice. Rank 0 is a dense layer."""
    rows, out_features, in_features = 60, 24, 20
    layer_update = make_update(update, None, "exact")
    spectrum = LayerSpectrum("fc", out_features, in_features, "fc", (1.0,) * 20, update=layer_update)
    work = Flops(Problem([spectrum], {"fc": (1, rows)}, {}), interval=8)
    x = torch.randn(1, rows, in_features, requires_grad=True)
    if rank:
        form = LayerTimer()._form(out_features, in_features, rank, layer_update)
        run = lambda: layer_update.forward(form, x, None, None)  # noqa: E731
    else:
        weight = torch.randn(out_features, in_features)
        run = lambda: x @ weight.T  # noqa: E731
    in_place = lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]  # noqa: E731
    options: Any = {"display": False, "custom_mapping": {torch.ops.aten.addmm_: in_place}}
    with FlopCounterMode(**options) as counter, torch.no_grad():
        run()
    assert work.forward(spectrum, rank) == counter.get_total_flops()
    with FlopCounterMode(**options) as counter:
        run().sum().backward()
    assert work.weight(spectrum, rank, True) == counter.get_total_flops()


# -------------------------------------------------------------------- time


@pytest.mark.parametrize("update", ["core", "frozen_basis"])
def test_the_timer_measures_updates_that_keep_no_input(update: str) -> None:
    timer = LayerTimer(update=make_update(update))
    assert all(timer.factored(8, 6, 5, 2, None, training) > 0 for training in (False, True))


def test_the_timer_measures_something() -> None:
    for update in ("factor", "subspace", "low_rank"):
        timer = LayerTimer(update=make_update(update, 2))
        for training in (False, True):
            assert timer.dense(8, 6, 5, training) > 0
            assert timer.factored(8, 6, 5, 2, 3 if training else None, training) > 0
        assert timer.factored(8, 6, 5, 2, None, True) > 0
        assert timer.compression(8, 5, 2) > 0


def test_every_shape_is_timed_once() -> None:
    model, calibration = calibrated("vit")
    timer = CountingTimer()
    planned(model, calibration, inference_seconds=0.5, batch=BATCH["vit"], timer=timer)
    assert timer.calls == 3 * (1 + 5)  # three shapes: dense, and five ranks


@pytest.mark.parametrize("residual", [*RESIDUALS])
@pytest.mark.parametrize("update", ["addition", "frozen_basis"])
def test_the_timer_measures_residuals(update: str, residual: str) -> None:
    timer = LayerTimer()
    for training in (False, True):
        assert timer.factored(8, 6, 5, 2, None, training, make_update(update, None, residual)) > 0


def test_the_timer_rounds_inputs_and_leaves_dense_layers_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = LayerTimer(residual_product="restored")
    rounded: list[tuple[int, ...]] = []

    def quantize(x: torch.Tensor, outliers: int) -> Any:
        rounded.append(tuple(x.shape))
        return quantize_rows(x, outliers)

    monkeypatch.setattr(timing, "quantize_rows", quantize)
    monkeypatch.setattr(LayerTimer, "_seconds", lambda self, task: task() and 1.0)
    for update in ("addition", "frozen_basis"):
        timer.factored(8, 6, 5, 2, None, True, make_update(update, None, "int8"))
    assert rounded == [(8, 5)]
    made: list[Any] = []
    monkeypatch.setattr(LayerTimer, "_seconds", lambda self, task: made.append(task()) or 1.0)
    timer.factored(8, 6, 5, 0, None, True, make_update("addition", None, "exact"))
    assert [gradient.shape for gradient in made[0]] == [(1, 8, 5)]  # of the input alone


# -------------------------------------------------------------------- peak memory


def peak(model: nn.Module, plan: WasiPlan, batch: Any, **options: Any) -> int:
    return estimate_wasi(model, WasiConfig(plan=plan, **({"update": "subspace"} | options)), batch=batch).peak_bytes


@pytest.mark.parametrize("name", ["vit", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_step_fits_and_uses_what_it_may(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, calibration = calibrated(name)
    batch = ARCHITECTURES[name].batch(64)
    options = {"modules_to_save": ["classifier"]} if name == "vit" else {}
    config = WasiConfig(update="subspace", **options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"peak_bytes must be at least [\d.]+ KiB \([\d,]+ bytes\) for this model, got 0\.1 KiB \(10 bytes\)",
    ):
        planned(model, calibration, peak_bytes=10, batch=batch, config=config)
    with caplog.at_level("WARNING", logger="wasi_peft.planner.peak"):
        most = planned(model, calibration, peak_bytes=10**12, batch=batch, config=config)
    dense = estimate_wasi(model, batch=batch).peak_bytes
    assert ("the plan saves no memory" in caplog.text) == (peak(model, most, batch, **options) >= dense)
    assert all(layer.weight_rank == break_even_rank(layer.out_features, layer.in_features) for layer in most.layers)
    assert all(layer.activation_ranks is None for layer in most.layers)
    budget = int(0.9 * peak(model, most, batch, **options))
    caplog.clear()
    plan = planned(model, calibration, peak_bytes=budget, batch=batch, config=config)
    assert peak(model, plan, batch, **options) < dense or caplog.text
    assert plan.budget == {"peak_bytes": budget}
    assert 0.85 * budget <= peak(model, plan, batch, **options) <= (1 - PEAK_MARGIN) * budget


@pytest.mark.parametrize("memory_mode", MEMORY_MODES)
def test_a_plan_is_for_the_step_that_will_run(memory_mode: Any) -> None:
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(64)
    config = WasiConfig(update="subspace", memory_mode=memory_mode)
    least = peak(model, planned(model, calibration, weight_share=0.3), batch, memory_mode=memory_mode)
    budget = int(1.1 * least)
    plan = planned(model, calibration, peak_bytes=budget, batch=batch, config=config)
    assert 0.85 * budget <= peak(model, plan, batch, memory_mode=memory_mode) <= budget


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"vocabulary": "int8"}),
        ("llama", {"trainable_token_indices": [1, 2]}),
        pytest.param("llama", {"slice_tokens": 8}, marks=pytest.mark.slow),
        ("vit", {"task_type": "SEQ_CLS"}),  # its head trains
        pytest.param("vit", {"bias": "all", "train_vectors": True}, marks=pytest.mark.slow),
    ],
)
def test_what_a_plan_does_not_decide_counts_in_its_peak(name: str, options: Any) -> None:
    model, calibration = calibrated(name)
    batch = ARCHITECTURES[name].batch(64)
    plain = peak(model, planned(model, calibration, weight_share=0.3), batch)
    config = WasiConfig(update="frozen_basis", **options)
    least = peak(model, planned(model, calibration, weight_share=0.3), batch, **options)
    assert least != plain
    budget = int(1.1 * least)
    plan = planned(model, calibration, peak_bytes=budget, batch=batch, config=config)
    assert 0.85 * budget <= peak(model, plan, batch, **options) <= budget


def test_a_configuration_with_a_plan_keeps_everything_else() -> None:
    model, calibration = calibrated("vit")
    plan = planned(model, calibration, weight_share=0.3)
    config = WasiConfig(
        update="subspace", bias="all", skip_padding=True, memory_mode="small", inference_mode=True, weight_rank=3
    )
    kept = config.with_plan(plan)
    assert kept.plan == plan.to_dict() and not kept.inference_mode and kept.weight_rank is None
    assert (kept.update, kept.bias, kept.skip_padding, kept.memory_mode) == ("subspace", "all", True, "small")


@pytest.mark.slow
def test_the_memory_mode_is_chosen_with_the_ranks() -> None:
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(64)
    config = WasiConfig(update="subspace")
    least = {}
    for mode in MEMORY_MODES:
        with pytest.raises(ValueError, match="peak_bytes must be at least") as failure:
            planned(model, calibration, peak_bytes=10, batch=batch, config=replace(config, memory_mode=mode))
        found = re.search(r"\(([\d,]+) bytes\)", str(failure.value))
        assert found is not None
        least[mode] = int(found[1].replace(",", ""))
    leanest = min(least, key=least.__getitem__)
    assert leanest != "exact"

    def chosen(budget: int, modes: tuple[str, ...] = MEMORY_MODES) -> WasiPlan:
        plan = planned(model, calibration, peak_bytes=budget, batch=batch, config=config, memory_modes=modes)
        assert WasiConfig(plan=plan).memory_mode == plan.memory_mode
        assert peak(model, plan, batch) <= budget
        return plan

    assert chosen(10**12).memory_mode == "exact"
    assert chosen(10**12, ("small", "exact")).memory_mode == "small"
    assert chosen(int(1.01 * least[leanest])).memory_mode == leanest
    tight = int(1.05 * least["exact"])
    targets = {name: model.get_submodule(name) for name in calibration.layers}
    spectra = _comparable(calibration.spectra(targets), input_shapes(model, targets, batch), exact=False)
    errors = {}
    for mode in [mode for mode in MEMORY_MODES if least[mode] <= tight]:
        errors[mode] = plan_error(spectra, chosen(tight, (mode,)))
    plan = chosen(tight)
    assert len(errors) > 1
    assert plan.memory_mode == next(m for m in errors if errors[m] <= (1 + MODE_TOLERANCE) * min(errors.values()))
    with pytest.raises(ValueError, match=r"peak_bytes must be at least .* for this model, got 0\.1 KiB"):
        chosen(10)
    for modes in ((), "small", ("tiny",)):
        with pytest.raises(
            ValueError, match=r"memory_modes must be a list of any of \['exact', 'fast', 'small'\], got"
        ):
            planned(model, calibration, peak_bytes=10**12, batch=batch, memory_modes=modes)
    with pytest.raises(ValueError, match="memory_modes is for peak_bytes alone, got it with weight_share"):
        planned(model, calibration, weight_share=0.5, memory_modes=("small",))


@pytest.mark.parametrize(
    ("update", "memory_mode", "optimizer"),
    partly_slow(
        [(update, "exact", "adamw") for update in FACTOR_UPDATES]
        + [("subspace", "exact", "cyclic"), ("low_rank", "fast", "adamw"), ("low_rank", "small", "adamw")],
        ("frozen_basis", "exact", "adamw"),
        ("subspace", "exact", "cyclic"),
        ("low_rank", "fast", "adamw"),
    ),
)
def test_peaks_of_several_plans_are_those_of_fresh_estimates(update: Any, memory_mode: Any, optimizer: str) -> None:
    class Cyclic(torch.optim.AdamW):
        def __init__(self, model: nn.Module) -> None:
            super().__init__([p for p in model.parameters() if p.requires_grad], fused=True)
            self.own = self  # so that it does not go with its last reference

    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(16)
    options = {"batch": batch, "optimizer": Cyclic if optimizer == "cyclic" else optimizer}
    peaks = PlannedPeaks(model, **options)
    compressed = planned(model, calibration, training_flops=0.6, batch=batch, timer=CountingTimer())
    exact = planned(
        model, calibration, weight_share=0.9, config=WasiConfig(update="subspace", activation_threshold=None)
    )
    small = planned(model, calibration, weight_share=0.3)
    found = []
    for plan in (compressed, exact, small, compressed):
        config = WasiConfig(
            plan=plan, update=update, update_rank=2, memory_mode=memory_mode, modules_to_save=["classifier"]
        )
        found.append(peaks(config))
        assert found[-1] == estimate_peak(model, config, **options)
    assert found[0] == found[3] != found[1]


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([(10.0, 40.0)], 70.0),
        ([(10.0, 120.0)], -10.0),
        ([(10.0, 40.0), (70.0, 70.0)], 130.0),
        ([(10.0, 40.0), (70.0, 160.0)], 40.0),
        ([(70.0, 160.0), (0.0, 0.0), (50.0, 80.0)], 55.0),
        ([(10.0, 40.0), (70.0, 41.0)], 70 + 4 * 59),
        ([(10.0, 40.0), (70.0, 40.0)], 130.0),
    ],
)
def test_the_next_bound_follows_the_secant(tried: list[tuple[float, float]], expected: float) -> None:
    assert next_bound(tried, 100.0) == pytest.approx(expected)


def test_the_least_feasible_peak_is_feasible() -> None:
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(64)
    with pytest.raises(ValueError) as refused:
        planned(model, calibration, peak_bytes=10, batch=batch)
    kibibytes, exact = re.findall(r"at least ([\d.,]+) KiB \(([\d,]+) bytes\)", str(refused.value))[0]
    least = int(exact.replace(",", ""))
    assert 0 <= float(kibibytes.replace(",", "")) * 2**10 - least < 0.1 * 2**10
    plan = planned(model, calibration, peak_bytes=least, batch=batch)
    assert peak(model, plan, batch) <= least


# -------------------------------------------------------------------- forms


def spectra_for(model: nn.Module, calibration: Calibration, batch: Any) -> list[LayerSpectrum]:
    targets = {name: model.get_submodule(name) for name in calibration.layers}
    return _comparable(calibration.spectra(targets), input_shapes(model, targets, batch), exact=True)


WITH_FORMS: dict[str, Any] = {**ASKED, "weight_share": 0.6, "training_flops": 0.8, "peak_bytes": None}


@pytest.mark.parametrize("field", WITH_FORMS)
def test_plans_with_forms_lose_no_more_than_factors_alone(field: str) -> None:
    """And under a tolerated error they store no more."""
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(64)
    value = WITH_FORMS[field] or estimate_peak(model, batch=batch)
    options: dict[str, Any] = {field: value, "batch": batch, "timer": CountingTimer()}
    config = WasiConfig()
    plan = plan_wasi(model, calibration, config=config, **options)
    alone = plan_wasi(model, calibration, config=config, forms=("factors",), **options)
    assert {layer.form for layer in alone.layers} == {"factors"}
    spectra = with_forms(spectra_for(model, calibration, batch), DEFAULT_FORMS, None, "addition")
    errors = [plan_error(spectra, each) for each in (plan, alone)]
    if field == "error":
        assert errors[0] <= value and plan.kept_share <= alone.kept_share
    else:
        assert errors[0] <= errors[1]
    if field != "inference_flops":  # a frozen weight takes the FLOPs of a dense one
        assert plan != alone and {layer.form for layer in plan.layers} - {"factors"}
    if field == "weight_share":
        assert plan.kept_share <= value
    if field == "peak_bytes":
        assert estimate_peak(model, WasiConfig(plan=plan), batch=batch) <= value


def test_a_plan_with_forms_is_chosen_by_what_rounding_loses() -> None:
    """And by what does not train: K is chosen too, unless it is given."""
    model, calibration = calibrated("vit")
    config = WasiConfig()
    tight = plan_wasi(model, calibration, weight_share=0.5, config=config)
    loose = plan_wasi(model, calibration, weight_share=0.9, config=config)
    assert tight.kept_share <= 0.5 < loose.kept_share <= 0.9
    for plan in (tight, loose):
        assert plan.update == "frozen_basis" and plan.residual_update == "addition"
        for layer in plan.layers:
            choices = addition_ranks(layer.out_features, layer.in_features)
            assert layer.residual is None or layer.weight_rank in choices
    assert len({layer.form for layer in tight.layers}) > 1 and len({layer.weight_rank for layer in loose.layers}) > 2
    narrow = WasiConfig(weight_rank=1)
    only = plan_wasi(model, calibration, weight_share=0.8, config=narrow, forms=("int8", "int4"))
    assert {layer.form for layer in only.layers} <= {"int8", "int4"}
    assert {layer.weight_rank for layer in only.layers} == {1}
    trains_less = WasiConfig(update="frozen_basis")
    assert plan_wasi(model, calibration, weight_share=0.65, config=trains_less).residual_update == "frozen_basis"


def test_layers_may_stay_dense() -> None:
    model, calibration = calibrated("vit")
    plan = plan_wasi(
        model, calibration, weight_share=0.7, config=WasiConfig(weight_rank=2), forms=("factors", "dense")
    )
    dense = {layer.name for layer in plan.layers if layer.form == "dense"}
    assert dense and len(dense) < len(plan.layers) and plan.kept_share <= 0.7
    peft_model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(plan=plan))
    base = peft_model.get_base_model()
    assert all(type(base.get_submodule(name)) is nn.Linear for name in dense)
    with pytest.raises(ValueError, match="a plan must have a layer that trains, got 12 dense ones"):
        plan_wasi(model, calibration, weight_share=1.0, config=WasiConfig(), forms=("factors", "dense"))


def test_peaks_of_plans_with_other_forms_are_those_of_fresh_estimates() -> None:
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch(16)
    peaks = PlannedPeaks(model, batch=batch)
    config = WasiConfig(weight_rank=2)
    found = []
    for forms, share in ((("int8",), 1.0), (("factors", "int4"), 0.7), (("factors",), 0.4), (("int8",), 1.0)):
        plan = plan_wasi(model, calibration, weight_share=share, config=config, forms=forms)
        found.append(peaks(WasiConfig(plan=plan)))
        assert found[-1] == estimate_peak(model, WasiConfig(plan=plan), batch=batch)
    assert found[0] == found[3] and len(set(found)) == 3


def test_the_least_share_of_residuals_is_named_and_can_be_had() -> None:
    model, calibration = calibrated("vit")
    options: dict[str, Any] = {"config": WasiConfig(weight_rank=2), "forms": ("int8", "int4")}
    with pytest.raises(
        ValueError, match=r"weight_share must be at least 0\.\d+ for this model, got 0\.1\."
    ) as failure:
        plan_wasi(model, calibration, weight_share=0.1, **options)
    least = float(re.findall(r"0\.\d+", str(failure.value))[0])
    assert least - 1e-3 < plan_wasi(model, calibration, weight_share=least, **options).kept_share <= least


def test_forms_must_be_known() -> None:
    model, calibration = calibrated("vit")
    for forms in ((), "int8", ("int8", "int2")):
        with pytest.raises(ValueError, match=r"forms must be a list of any of \['factors', 'int8', .*\], got"):
            plan_wasi(model, calibration, weight_share=0.5, forms=forms)


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"weight_share": 0.5, "error": 0.1}, "exactly one budget"),
        ({"peak_bytes": 10**9}, "depends on the batch"),
        ({"step_seconds": 0.5}, "depends on the batch"),
        ({"training_flops": 10**9}, "depends on the batch"),
        ({"weight_share": 1e-6}, "share must be at least"),
        ({"error": 1e-9}, r"error must be at least 0\.0\d+ for this model, got 1e-09\."),
        (
            {"inference_flops": 1e-6},
            r"inference_flops must be at least 0\.\d+ of the dense layers' for this model, got",
        ),
        ({"training_flops": 1e-6}, r"training_flops must be at least 0\.\d+ of the dense layers' for this model, got"),
        (
            {"inference_flops": 1001.5, "batch": BATCH["vit"]},
            r"at least [\d.e-]+ GFLOP \([\d,]+ FLOPs\) for this model, got 1e-06 GFLOP \(1,001\.5 FLOPs\)",
        ),
    ],
)
def test_what_is_asked_must_be_one_feasible_budget(options: dict[str, Any], message: str) -> None:
    model, calibration = calibrated("vit")
    with pytest.raises(ValueError, match=message):
        planned(model, calibration, **options)


@pytest.mark.parametrize("field", BUDGETS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1"])
def test_a_budget_must_be_a_positive_number(field: str, value: Any) -> None:
    model, calibration = calibrated("vit")
    with pytest.raises(ValueError, match=f"{field} must be a number"):
        planned(model, calibration, batch=BATCH["vit"], **{field: value})


@pytest.mark.parametrize("field", ["inference_flops", "training_flops", "inference_seconds", "step_seconds", "error"])
def test_the_least_feasible_budget_is_feasible(field: str) -> None:
    model, calibration = calibrated("vit")
    options = {"batch": BATCH["vit"], "timer": CountingTimer()}
    with pytest.raises(ValueError) as refused:
        planned(model, calibration, **{field: 1e-9}, **options)  # type: ignore[arg-type]
    least = float(str(refused.value).split()[5])
    assert planned(model, calibration, **{field: least}, **options)  # type: ignore[arg-type]


def test_the_calibration_must_be_of_this_model() -> None:
    _, calibration = calibrated("vit")
    with pytest.raises(ValueError, match="another model"):
        plan_wasi(ARCHITECTURES["vit"].model(seed=5), calibration, weight_share=0.5)
    with pytest.raises(ValueError, match="another model"):
        plan_wasi(ARCHITECTURES["bert"].model(), calibration, weight_share=0.5)


@pytest.mark.parametrize("config", [WasiConfig(residual=None, weight_rank=4), peft.LoraConfig(target_modules=["fc1"])])
def test_the_model_must_be_dense(config: peft.PeftConfig) -> None:
    _, calibration = calibrated("vit")
    with pytest.raises(ValueError, match="needs the dense model"):
        plan_wasi(get_peft_model(ARCHITECTURES["vit"].model(), config), calibration, weight_share=0.5)


def test_the_model_must_not_be_compressed() -> None:
    _, calibration = calibrated("vit")
    with pytest.raises(ValueError, match="needs the dense model, got a compressed one"):
        plan_wasi(compress(ARCHITECTURES["vit"].model()), calibration, weight_share=0.5)


def test_an_infeasible_peak_names_the_modes() -> None:
    model, calibration = calibrated("vit")
    batch = ARCHITECTURES["vit"].batch()
    for modes, expected in (
        (None, "with memory_mode='exact'; memory_modes=('exact', 'fast', 'small') tries all."),
        (("fast", "exact"), "with memory_modes=('fast', 'exact'); memory_modes=('exact', 'fast', 'small') tries all."),
        (MEMORY_MODES, "with memory_modes=('exact', 'fast', 'small')."),
    ):
        with pytest.raises(ValueError, match=re.escape(expected) + "$"):
            planned(model, calibration, peak_bytes=10, batch=batch, memory_modes=modes)
    config = WasiConfig(update="subspace", memory_mode="small")
    with pytest.raises(ValueError, match="with memory_mode='small'; memory_modes="):
        planned(model, calibration, peak_bytes=10, batch=batch, config=config)


def test_some_layer_must_be_worth_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    config = WasiConfig(target_modules=["0.0"], residual=None)
    calibration = calibrate_wasi(model, [torch.randn(8, 2)], config, progress_bar=False)
    with pytest.raises(
        ValueError, match="with update='frozen_basis' no rank of any target saves anything, got 1 targets of at most 2"
    ):
        plan_wasi(model, calibration, weight_share=0.5)


@pytest.mark.parametrize("options", [{"weight_rank": 4}, {"weight_share": 0.5}, {"activation_ranks": 3}])
def test_the_configuration_must_not_decide_ranks(options: dict[str, Any]) -> None:
    model, calibration = calibrated("vit")
    with pytest.raises(ValueError, match=f"leave {next(iter(options))} out"):
        planned(model, calibration, weight_share=0.5, config=WasiConfig(update="factor", **options))


def test_the_batch_must_have_rows() -> None:
    model, calibration = calibrated("vit")
    batch = {"pixel_values": torch.zeros(0, 3, 8, 8)}
    with pytest.raises(ValueError, match="at least one tensor and no empty one, got shapes"):
        planned(model, calibration, training_flops=0.5, batch=batch)


def test_some_targets_only() -> None:
    model, calibration = calibrated("vit")
    plan = planned(
        model, calibration, weight_share=0.5, config=WasiConfig(target_modules=["fc1", "v_proj"], update="subspace")
    )
    assert {layer.name.rpartition(".")[2] for layer in plan.layers} == {"fc1", "v_proj"}


def test_layers_where_no_rank_saves_anything_are_left_dense() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 1)))
    data = [torch.randn(20, 12, generator=torch.Generator().manual_seed(0))]
    calibration = calibrate_wasi(
        model, data, WasiConfig(residual=None, target_modules=["0.0", "0.1"]), progress_bar=False
    )
    assert [layer.name for layer in planned(model, calibration, weight_share=0.5).layers] == ["0.0"]


@pytest.mark.parametrize("update", FACTOR_UPDATES)
def test_no_layer_of_a_plan_is_past_the_break_even_of_its_update(update: Any) -> None:
    """Directions that train beside the rank may be all that a small layer could save."""
    model = nn.Sequential(nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 12)))
    data = [torch.randn(60, 48, generator=torch.Generator().manual_seed(0))]
    calibration = calibrate_wasi(
        model, data, WasiConfig(residual=None, target_modules=["0.0", "0.1"]), progress_bar=False
    )
    config = WasiConfig(residual=None, target_modules=["0.0", "0.1"], update=update, update_rank=10)
    plan = plan_wasi(model, calibration, weight_share=0.9, config=config)
    assert [layer.name for layer in plan.layers] == (["0.0"] if update == "low_rank" else ["0.0", "0.1"])
    assert not any(map(plan.past_break_even, plan.layers))


def test_the_aim_of_the_search_leaves_room_for_the_margin() -> None:
    assert AIM * (1 - PEAK_MARGIN) > 0.85


def test_patches_that_are_dropped_do_not_count() -> None:
    model, batch = ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch(8)
    config = WasiConfig(token_keep=0.5, modules_to_save=["classifier"])
    shapes: dict[str, tuple[int, int]] = {}

    def look(name: str) -> Any:
        return lambda layer, args, kwargs, output: shapes.__setitem__(name, tuple(args[0].shape[:2]))

    trained = get_peft_model(ARCHITECTURES["vit"].model(), config).train()
    layers = {name: layer for name, layer in trained.base_model.model.named_modules() if hasattr(layer, "wasi_form")}
    for name, layer in layers.items():
        layer.register_forward_hook(look(name), with_kwargs=True)
    trained(**batch)
    targets = {name: model.get_submodule(name) for name in layers}
    before = input_shapes(model, targets, batch)
    assert _fewer_tokens(before, model, batch, 0.5) == shapes != before
    products = {name: 6 * before[name][0] * before[name][1] * layer.weight.numel() for name, layer in targets.items()}
    flops = 0.4 * sum(products.values())
    whole, half = (
        plan_wasi(
            *calibrated("vit"), training_flops=flops, batch=batch, config=replace(WasiConfig(update="factor"), **given)
        )
        for given in ({}, {"token_keep": 0.5})
    )
    assert half.kept_share > whole.kept_share


def test_rows_of_padding_do_not_count_where_it_is_skipped() -> None:
    from wasi_peft.planner.planner import _real_shapes

    shapes = {"encoder": (2, 4), "head": (1, 2), "patches": (2, 9)}
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert _real_shapes(shapes, mask) == {"encoder": (1, 4), "head": (1, 2), "patches": (2, 9)}
    assert _real_shapes(shapes, None) == shapes
