"""Tables and plots: what they show is what the plan, the calibration and the estimates say."""

from __future__ import annotations

import builtins
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import ARCHITECTURES, FACTOR_UPDATES, Architecture, wasi_model

from wasi_peft import Calibration, WasiPlan, calibrate_wasi, wasi_summary
from wasi_peft.cost.estimate import CATEGORIES, Estimate
from wasi_peft.hub.headers import StoredLayer
from wasi_peft.linalg.spectra import rank_for_threshold
from wasi_peft.ranks.allocate import allocate_ranks
from wasi_peft.ranks.plan import LayerPlan, build_plan
from wasi_peft.report import plot_training, print_table
from wasi_peft.report.kinds import kinds_table, stored_rows
from wasi_peft.report.places import layer_places
from wasi_peft.report.plots import plot_calibration, plot_estimates, plot_plan
from wasi_peft.report.tables import (
    byte_unit,
    calibration_rows,
    coloured,
    estimates_table,
    markdown_table,
    plan_table,
    table,
    target_rows,
)
from wasi_peft.updates import make_update

BLOCKS = 29
KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "self_attn.v_proj": (16, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    architecture = ARCHITECTURES["vit"]
    return calibrate_wasi(architecture.model(), [architecture.batch()], progress_bar=False)


@pytest.fixture(scope="module")
def plan(calibration: Calibration) -> WasiPlan:
    spectra = calibration.spectra()
    inputs: dict[str, dict[str, int] | None] = {"vit.layers.1.mlp.fc1": {"feature": 5}}
    return build_plan(spectra, allocate_ranks(spectra, 0.6), inputs, {"weight_share": 0.6})


def large_plan() -> WasiPlan:
    """203 layers, ranks growing with depth, as a Llama-like model would have."""
    layers = [
        LayerPlan(f"model.layers.{block}.{kind}", *size, block // 4 + 1, {"feature": 8 + block}, 0.5 + block / 100)
        for block in range(BLOCKS)
        for kind, size in KINDS.items()
    ]
    return WasiPlan(tuple(layers), {"weight_share": 0.3})


def estimate(mebibytes: int) -> Estimate:
    """Every category takes that much at the peak; other numbers are told apart by their size."""
    size = mebibytes * 2**20
    parts = dict.fromkeys(CATEGORIES, size)
    return Estimate(
        size, 2 * size, 3 * size, 4 * size, 5 * size, 6 * size, 6 * size, parts, 1, 4 * 10**12, 10**12, 1, 1
    )


# ------------------------------------------------------------------------------------------------ tables


def test_table_is_aligned() -> None:
    text = table([{"layer": "a", "rank": 1}, {"layer": "longer", "rank": 123456}, {"layer": "b", "rank": None}])
    assert text.splitlines() == ["layer      rank", "a             1", "longer  123,456", "b             -"]


def test_rows_are_printed_for_whoever_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markdown where standard output is no terminal, else a table in colour, of the same cells."""
    rows = [{"method": "WASI", "kept share": 0.5, "layers": 1200}, {"method": "LoRA", "kept share": None, "layers": 3}]
    print_table(rows)
    assert capsys.readouterr().out == markdown_table(rows) + "\n"
    assert markdown_table(rows).splitlines()[2:] == ["| WASI | 50.0% | 1,200 |", "| LoRA | - | 3 |"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_table(rows)
    shown = capsys.readouterr().out
    assert "\x1b[" in shown and all(cell in shown for cell in ("method", "WASI", "50.0%", "1,200"))


def test_colours_leave_a_table_as_it_is(plan: WasiPlan) -> None:
    text = plan_table(plan)
    shown = coloured(text)
    assert shown.plain == text
    styled = {text[span.start : span.end].strip(): span.style for span in shown.spans}
    header, *_, total, _ = text.splitlines()
    assert styled[header] == styled[total] == "bold" and styled["factors"] == "green"


@pytest.mark.parametrize(
    ("size", "unit"), [(0, "B"), (10_239, "B"), (10_240, "KiB"), (10 * 2**30, "GiB"), (10**20, "TiB")]
)
def test_byte_unit(size: int, unit: str) -> None:
    assert byte_unit(size)[0] == unit


def test_plan_table_says_what_the_plan_says(plan: WasiPlan) -> None:
    lines = plan_table(plan).splitlines()
    assert lines[-1] == plan.headline()
    assert len(lines) == len(plan.layers) + 3
    for layer, line in zip(plan.layers, lines[1:], strict=False):
        name, out, in_features, form, rank, _, energy, *inputs, _, _ = line.split()
        assert (name, int(out), int(in_features)) == (layer.name, layer.out_features, layer.in_features)
        assert form == "factors"
        assert int(rank) == layer.weight_rank and energy == f"{layer.kept_energy:.1%}"
        assert inputs == (["exact"] if layer.activation_ranks is None else ["feature", "5"])
    dense, factored = map(float, lines[-2].split()[1:])
    assert factored / dense == pytest.approx(plan.kept_share, abs=0.01)
    half = plan_table(replace(plan, bytes_per_element=2)).splitlines()  # 7 KiB, shown in bytes
    assert half[-2].split() == ["all", f"{dense * 512:,.2f}", f"{plan.kept_share * dense * 512:,.2f}"]


@pytest.mark.parametrize("update", FACTOR_UPDATES)
def test_tables_count_what_the_update_stores(update: str) -> None:
    """A table's totals are the share in the headline under it; past break-even is what the layers say of it."""
    layers = tuple(LayerPlan(f"layers.{rank}.fc", 32, 48, rank, None, 1.0) for rank in (1, 15, 16, 17, 19, 20))
    plan = WasiPlan(
        layers, update=update, update_rank=make_update(update, 3).side_rank or None, bytes_per_element=1024
    )
    summary = wasi_summary(
        wasi_model(ARCHITECTURES["vit"].model(), residual=None, weight_rank=5, update=update, update_rank=3)
    )
    for shown, past in (
        (plan, [plan.past_break_even(layer) for layer in plan.layers]),
        (summary, [layer.past_break_even for layer in summary.layers]),
    ):
        header, *rows, total, headline = plan_table(shown).splitlines()
        assert header.split()[:6] == ["layer", "out", "in", "form", "rank", "break-even"]
        dense, factored = (float(size.replace(",", "")) for size in total.split()[1:])
        assert factored / dense == pytest.approx(shown.kept_share, abs=0.02)
        assert f"{shown.kept_share:.1%} of their bytes kept" in headline
        assert [int(row.split()[4]) > int(row.split()[5]) for row in rows] == past
    assert {True, False} == {plan.past_break_even(layer) for layer in plan.layers}


def test_tables_and_plots_of_a_plan_with_forms(tmp_path: Path) -> None:
    layers = (
        LayerPlan("layers.0.fc", 64, 64, 8, None, 0.9),
        LayerPlan("layers.1.fc", 64, 64, 4, None, 0.999, "int8"),
        LayerPlan("layers.2.fc", 64, 64, 0, None, 1.0, "dense"),
    )
    plan = WasiPlan(layers, update="frozen_basis")
    lines = plan_table(plan).splitlines()
    assert [line.split()[3] for line in lines[1:4]] == ["factors", "int8", "dense"]
    assert [line.split()[5] for line in lines[1:4]] == ["31", "-", "-"]
    stored = [float(line.split()[-1].replace(",", "")) for line in lines[1:4]]
    assert stored == [4 * 8 * 128 / 1024, pytest.approx((64 * 68 + 4 * 4 * 128) / 1024, abs=0.01), 16.0]
    plot_plan(plan, path=tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_plan_table_of_an_adapter() -> None:
    summary = wasi_summary(wasi_model(ARCHITECTURES["vit"].model(), weight_rank=2))
    lines = plan_table(summary).splitlines()
    assert lines[-1] == summary.headline()
    assert "energy" not in lines[0] and "input" not in lines[0]


def test_calibration_rows(calibration: Calibration) -> None:
    rows = calibration_rows(calibration)
    assert [row["layer"] for row in rows] == list(calibration.layers)
    assert sum(row["energy share"] for row in rows) == pytest.approx(1)
    for row in rows:
        assert row["rank at 90%"] <= row["rank at 95%"] <= row["rank at 99%"]
        assert row["rank at 95%"] == rank_for_threshold(calibration.energies(row["layer"]), 0.95)


def test_target_rows_count_every_layer(architecture: Architecture) -> None:
    model = architecture.model()
    sizes = dict.fromkeys(sorted(architecture.targets(model)), (4, 6))
    rows = target_rows(sizes)
    assert sum(row["count"] for row in rows) == architecture.target_count
    assert sum(row["parameters"] for row in rows) == 24 * architecture.target_count
    shapes = target_rows({"block.0.fc": (4, 6), "block.1.fc": (4, 6), "block.2.fc": (6, 4)})
    assert [row["count"] for row in shapes] == [2, 1]  # a kind that changes its shape, as in Swin


def test_estimates_table() -> None:
    lines = estimates_table({"dense": estimate(100), "WASI": estimate(25)}).splitlines()
    assert lines[0].split() == ["dense", "WASI"]
    values = {line.rsplit(None, 2)[0].strip(): line.split()[-2:] for line in lines[1:]}
    assert values["weights, MiB"] == ["100.00", "25.00"]
    assert values["peak, MiB"] == ["600.00", "150.00"]
    assert values["peak, of dense"] == ["100.0%", "25.0%"]
    assert values["training step, GFLOP"] == ["4,000.00", "4,000.00"]


# ------------------------------------------------------------------------------------------------ kinds


def test_layers_of_one_kind_differ_in_depth_only(architecture: Architecture) -> None:
    names = architecture.targets(architecture.model())
    places = layer_places(names)
    assert set(places) == names
    assert len(set(places.values())) == len(names)
    for name, place in places.items():
        assert name.endswith(place.kind.split("…")[-1])


def test_places_follow_the_numbers_not_the_order() -> None:
    places = layer_places([f"model.layers.{block}.fc1" for block in (10, 2, 0)] + ["model.layers.2.fc2", "head"])
    assert places["model.layers.10.fc1"] == ("fc1", 2)
    assert places["model.layers.2.fc1"].depth == places["model.layers.2.fc2"].depth == 1
    assert places["head"].kind == "head"


def test_kinds_that_end_alike_keep_more_of_their_names() -> None:
    names = ["enc.layer.0.att.out.dense", "enc.layer.0.out.dense", "enc.layer.0.mid.dense"]
    assert [place.kind for place in layer_places(names).values()] == ["att.out.dense", "out.dense", "mid.dense"]
    nested = ["encoder.block.0.layer.0.att.q", "decoder.block.0.layer.0.att.q"]
    assert [place.kind for place in layer_places(nested).values()] == ["encoder.block…att.q", "decoder.block…att.q"]
    same_ends = ["a.0.x.0.q", "a.0.y.0.q", "b.0.x.0.q", "b.0.y.0.q"]
    kinds = [place.kind for place in layer_places(same_ends).values()]
    assert len(set(kinds)) == 4


# ------------------------------------------------------------------------------------------------ plots


def lines_of(ax: Any) -> list[Any]:
    return [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]


def test_plot_of_a_plan_with_spectra(plan: WasiPlan, calibration: Calibration, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_plan(plan, calibration, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    ranks, energies, inputs, weights, *spectra = (ax for ax in figure.get_axes() if ax.get_label() != "<colorbar>")
    shown = sorted(rank for line in lines_of(ranks) for rank in line.get_ydata())
    assert shown == sorted(layer.weight_rank for layer in plan.layers)
    kept = sorted(energy for line in lines_of(energies) for energy in line.get_ydata())
    assert kept == pytest.approx(sorted(100 * layer.kept_energy for layer in plan.layers))
    assert "11 layers: not compressed" in inputs.get_title()
    assert "dense" in weights.get_title()
    assert {ax.get_title() for ax in spectra} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    marked = [line.get_xdata()[0] for ax in spectra for line in ax.get_lines() if line.get_marker() == "o"]
    assert sorted(marked) == sorted(layer.weight_rank for layer in plan.layers)


def test_plot_of_two_hundred_layers_has_a_line_for_each_kind() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_plan(large_plan())
    ranks, *_, weights = figure.get_axes()
    assert len(lines_of(ranks)) == len(KINDS)
    assert all(len(line.get_xdata()) == BLOCKS for line in lines_of(ranks))
    grey, *stacks, outline = weights.containers  # the outline of the dense weights once more, above the stacks
    elements = sum(out * in_features for out, in_features in KINDS.values())
    for dense in (grey, outline):
        assert [bar.get_height() for bar in dense] == pytest.approx([elements * 4 / 1024] * BLOCKS)
    assert not any(bar.get_fill() for bar in outline)
    tops = [max(stack[block].get_y() + stack[block].get_height() for stack in stacks) for block in (0, 28)]
    assert tops[0] == pytest.approx(sum(out + in_features for out, in_features in KINDS.values()) * 4 / 1024)
    assert tops[1] == pytest.approx(8 * tops[0])


def test_a_plot_has_panels_for_what_a_plan_has() -> None:
    """No panel without a point; blocks have whole numbers; where forms differ, a row for each."""
    pytest.importorskip("matplotlib")
    plan = large_plan()
    exact = tuple(dataclasses.replace(layer, activation_ranks=None) for layer in plan.layers)
    plan = dataclasses.replace(plan, layers=exact)
    assert [ax.get_title().split(" (")[0] for ax in plot_plan(plan).get_axes()] == [
        "Weight rank", "Kept energy, %", "Weights of each block, KiB",
    ]  # fmt: skip
    first, *others = plan.layers
    mixed = dataclasses.replace(
        plan, layers=(dataclasses.replace(first, form="dense", weight_rank=0), *others), residual_update=None
    )
    forms = next(ax for ax in plot_plan(mixed).get_axes() if ax.get_title() == "Form of each layer")
    assert [label.get_text() for label in forms.get_yticklabels()] == ["factors", "dense"]
    marks = [line.get_ydata()[0] for line in forms.get_lines()]
    assert marks.count(1) == 1 and len(marks) == len(plan.layers)
    ticks = list(forms.get_xticks())
    assert ticks[0] == 0 and len(ticks) <= 16 and all(tick == int(tick) for tick in ticks)


def test_plot_of_an_adapter_shows_ranks_and_bytes_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary = wasi_summary(wasi_model(ARCHITECTURES["bert"].model(), weight_rank=2))
    figure = plot_plan(summary, path=tmp_path / "adapter.svg")
    assert len(figure.get_axes()) == 2
    assert b"<svg" in (tmp_path / "adapter.svg").read_bytes()


def test_plot_of_a_calibration(calibration: Calibration) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_calibration(calibration)
    spectra = [ax for ax in figure.get_axes() if ax.get_title() in ("q_proj", "fc1")]
    assert [len(lines_of(ax)) for ax in spectra] == [2, 2]


def test_plot_of_a_training_run(tmp_path: Path) -> None:
    """Panels for what changes; what stays as it is, as ranks do by default, takes none."""
    pytest.importorskip("matplotlib")
    log = [
        {"step": step, "loss": 3 / step, "wasi/rank_mean": 8.0, "wasi/rank_min": 8, "wasi/weight_drift": 0.1 * step}
        for step in (1, 2, 3)
    ]
    log.append({"step": 3, "eval_loss": 1.5})
    figure = plot_training(log, tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    loss, drift = figure.get_axes()
    assert [label.get_text() for label in loss.get_legend().get_texts()] == ["training", "evaluation"]
    assert list(loss.get_lines()[0].get_ydata()) == [3, 1.5, 1]
    assert list(drift.get_lines()[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    log[2]["wasi/rank_mean"] = 6.0
    assert len(plot_training(log).get_axes()) == 3
    with pytest.raises(ValueError, match="must hold a loss"):
        plot_training([{"step": 1, "train_runtime": 3.0}])


def test_plot_of_estimates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_estimates({"dense": estimate(100), "LoRA": estimate(50), "WASI": estimate(25)}, tmp_path / "e.png")
    memory, flops = figure.get_axes()
    for bar, size in zip(memory.patches[-3:], (100, 50, 25), strict=True):
        assert bar.get_y() + bar.get_height() == pytest.approx(len(CATEGORIES) * size)
    assert [bar.get_height() for bar in flops.patches] == pytest.approx([4000] * 3 + [1000] * 3)


def test_plots_need_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of pyplot, which would pick a backend and keep every figure alive."""
    pytest.importorskip("matplotlib")
    original = builtins.__import__

    def no_pyplot(name: str, *args: Any, **kwargs: Any) -> Any:
        assert "pyplot" not in name
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyplot)
    plot_plan(large_plan())


def test_missing_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, plan: WasiPlan, calibration: Calibration
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for plot, subject in ((plot_plan, plan), (plot_calibration, calibration), (plot_estimates, {"a": estimate(1)})):
        with pytest.raises(ImportError, match=r"pip install 'wasi_peft\[plot\]'"):
            plot(subject)  # type: ignore[operator]


def test_calibration_of_another_model(calibration: Calibration) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: the calibration must cover .*203 missing"):
        plot_plan(large_plan(), calibration)


# ------------------------------------------------------------------------------------------------ kinds


def test_layers_of_a_kind_and_form_are_one_line() -> None:
    sizes = {"attn": (64, 64), "fc": (128, 64)}
    layers = [
        LayerPlan(f"blocks.{block}.{kind}", *size, 16, {"feature": 8 + block}, 0.9 + block / 100)
        for block in range(4)
        for kind, size in sizes.items()
    ]
    layers[2] = replace(layers[2], form="int8", activation_ranks=None, kept_energy=1.0)
    layers[7] = replace(layers[7], weight_rank=24)
    plan = WasiPlan(tuple(layers))
    header, attn, int8, fc, total, headline = kinds_table(plan).splitlines()
    assert header.split()[:6] == ["layers", "count", "blocks", "out", "in", "form"]
    assert attn.split()[:10] == ["attn", "3", "0,", "2-3", "64", "64", "factors", "16", "90.0%", "feature"]
    assert int8.split()[:9] == ["attn", "1", "1", "64", "64", "int8", "16", "100.0%", "8"]
    assert fc.split()[:9] == ["fc", "4", "0-3", "128", "64", "factors", "16-24", "90.0%", "feature"]
    assert headline == plan.headline()
    assert total.split()[-2:] == plan_table(plan).splitlines()[-2].split()[-2:]
    packed = WasiPlan((*layers, LayerPlan("blocks.0.experts.up", 64, 64, 8, None, 0.5, experts=4)))
    assert "experts" in kinds_table(packed).splitlines()[0] and "experts" in plan_table(packed).splitlines()[0]


def test_stored_layers_by_kind() -> None:
    layers = [StoredLayer(f"blocks.{block}.fc", "int8", block, 1024 * (block + 1)) for block in range(3)]
    assert stored_rows(layers, "KiB", 1024, every=False) == [
        {"layers": "fc", "count": 3, "blocks": "0-2", "form": "int8", "rank": "0-2", "stored, KiB": 6.0}
    ]
    assert [row["stored, KiB"] for row in stored_rows(layers, "KiB", 1024, every=True)] == [1.0, 2.0, 3.0]
