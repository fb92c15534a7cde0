"""Spectra, plans and their file, and rank allocation against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import FACTOR_UPDATES
from strategies import QUICK, descending, spectrum

from wasi_peft.ranks.allocate import allocate_ranks
from wasi_peft.ranks.plan import LayerPlan, WasiPlan, build_plan
from wasi_peft.ranks.spectrum import InputGroup, LayerSpectrum, input_groups, with_forms
from wasi_peft.updates import Core, FrozenBasis, LowRank, make_update
from wasi_peft.updates.costs import break_even_rank, rank_step

CHECKED = {"out_features": 4, "in_features": 6, "shared_input": "a", "weight_energies": (4.0, 2.0, 1.0, 0.0)}


@st.composite
def small_spectra(draw: st.DrawFn) -> list[LayerSpectrum]:
    """One to four layers of odd shapes with whole or fractional energies, ties and zeros among them."""
    spectra = []
    for index in range(draw(st.integers(1, 4))):
        out_features, in_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        size = min(out_features, in_features)
        energy = st.integers(0, 4) | st.floats(0, 10, allow_subnormal=False)
        energies = draw(st.lists(energy, min_size=size, max_size=size))
        spectra.append(LayerSpectrum(f"l{index}", out_features, in_features, f"l{index}", descending(energies)))
    update = draw(st.sampled_from([FrozenBasis(), Core()]))
    return [dataclasses.replace(layer, update=update) for layer in spectra]


@st.composite
def larger_spectra(draw: st.DrawFn) -> list[LayerSpectrum]:
    """One to four layers with steps from 1 to 16, whose energies fall fast or slowly, some down to zero."""
    update = draw(st.sampled_from([FrozenBasis(), Core()]) | st.builds(LowRank, st.integers(1, 40)))
    spectra = []
    for index in range(draw(st.integers(1, 4))):
        out_features, in_features = draw(st.integers(1, 500)), draw(st.integers(1, 500))
        size = min(out_features, in_features)
        first, rate, known = draw(st.floats(0.01, 100)), draw(st.floats(0.5, 1)), draw(st.integers(0, size))
        energies = tuple(first * rate**k if k < known else 0.0 for k in range(size))
        spectra.append(spectrum(f"l{index}", out_features, in_features, weight_energies=energies))
    return [dataclasses.replace(layer, update=update) for layer in spectra]


# -------------------------------------------------------------------- spectra


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"name": ""}, "name must be a string that is not empty, got ''"),
        ({"out_features": 0}, "a: out_features must be a positive integer, got 0"),
        ({"in_features": 6.0}, "a: in_features must be a positive integer, got 6.0"),
        ({"weight_energies": (1.0, 0.5)}, "a: weight_energies must have 4 values, got 2"),
        ({"weight_energies": (1.0, 2.0, 0.5, 0.1)}, "weight_energies energies must be finite, descending"),
        ({"weight_energies": (1.0, 0.5, 0.1, -0.1)}, "weight_energies energies must be finite, descending"),
        ({"weight_energies": (math.inf, 0.5, 0.1, 0.0)}, "weight_energies energies must be finite, descending"),
        ({"weight_energies": (math.nan, 0.5, 0.1, 0.0)}, "weight_energies energies must be finite, descending"),
        ({"gradient_energies": {"feature": (1.0,)}}, "a: feature must have 6 values, got 1"),
        ({"gradient_energies": {"token": ()}}, "a: token must have some values, got 0"),
        ({"gradient_energies": {"head": (1.0,)}}, "a: gradient_energies are of 'feature' and 'token', got 'head'"),
    ],
)
def test_a_spectrum_that_cannot_be(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LayerSpectrum(**{"name": "a", **CHECKED, **changed})


def test_the_largest_rank_is_break_even_or_1() -> None:
    assert spectrum("a", 64, 64).largest_rank == break_even_rank(64, 64) == 31
    assert break_even_rank(1, 5) == 0 and spectrum("a", 1, 5).largest_rank == 1


@QUICK
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 60))
def test_aligned_ranks_give_widths_that_are_multiples_of_the_step(out: int, in_features: int, side: int) -> None:
    layer, step = spectrum("a", out, in_features, update=LowRank(side)), rank_step(out, in_features)
    every = range(1, layer.largest_rank + 1)
    side = min(side, out, in_features)
    aligned = [rank for rank in every if (rank + side) % step == 0]
    assert list(layer.aligned_ranks) == (aligned or list(every))
    assert layer.rank_choices == tuple(sorted({1, *layer.aligned_ranks}))


def test_a_large_update_leaves_no_room_for_a_step() -> None:
    layer = spectrum("a", 384, 384, update=LowRank(180))
    assert layer.rank_choices == tuple(range(1, 12))


def test_groups_keep_the_order_and_sum_the_energies() -> None:
    feature, token = (4.0, 2.0, 1.0), (3.0, 1.0)
    q = spectrum("q", 3, 3, shared_input="q", gradient_energies={"feature": feature, "token": token})
    up = spectrum("up", 5, 3, gradient_energies={"feature": feature})
    k = spectrum("k", 2, 3, shared_input="q", gradient_energies={"feature": (2.0, 2.0, 0.0), "token": (1.0, 1.0)})
    groups = input_groups([q, up, k])
    assert groups == [InputGroup((q, k)), InputGroup((up,))]
    assert (groups[0].name, groups[0].in_features) == ("q", 3)
    assert groups[0].energies("feature") == (6.0, 4.0, 1.0)
    assert groups[0].energies("token") == (4.0, 2.0)
    assert groups[1].energies("token") == ()
    blind = dataclasses.replace(k, gradient_energies={})
    assert InputGroup((q, blind)).energies("feature") == ()


def test_groups_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="unique, got 'a' twice"):
        input_groups([spectrum("a", 2, 3), spectrum("a", 2, 3)])
    with pytest.raises(ValueError, match=r"b: layers that share an input .* got 4 and 3 \(a\)"):
        input_groups([spectrum("a", 2, 3, shared_input="a"), spectrum("b", 2, 4, shared_input="a")])


# -------------------------------------------------------------------- plans

PLAN = WasiPlan(
    (
        LayerPlan("blocks.0.q", 8, 8, 2, {"feature": 3, "token": 5}, 0.75),
        LayerPlan("blocks.0.up", 8, 4, 4, None, 1.0),
    ),
    {"peak_bytes": 2**21, "batch": [32, 197], "optimizer": "adamw"},
)


def changed_plan(**changed: Any) -> dict[str, Any]:
    """The plan's data with keys of its first layer replaced; None for a key takes it out."""
    data = PLAN.to_dict()
    layer = {**data["layers"]["blocks.0.q"], **changed}
    data["layers"]["blocks.0.q"] = {key: value for key, value in layer.items() if value != "absent"}
    return data


def test_plan_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert WasiPlan.load(path) == WasiPlan.load(str(path)) == WasiPlan.from_dict(PLAN.to_dict()) == PLAN
    assert json.loads(path.read_text()) == {
        "format": 2,
        "budget": {"peak_bytes": 2**21, "batch": [32, 197], "optimizer": "adamw"},
        "memory_mode": None,
        "update": None,
        "update_rank": None,
        "residual_update": None,
        "bytes_per_element": 4,
        "frozen_dtype": None,
        "layers": {
            "blocks.0.q": {
                "out_features": 8,
                "in_features": 8,
                "weight_rank": 2,
                "activation_ranks": {"feature": 3, "token": 5},
                "kept_energy": 0.75,
                "form": "factors",
                "experts": 1,
            },
            "blocks.0.up": {
                "out_features": 8,
                "in_features": 4,
                "weight_rank": 4,
                "activation_ranks": None,
                "kept_energy": 1.0,
                "form": "factors",
                "experts": 1,
            },
        },
    }
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_saving_replaces_a_plan_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    other = WasiPlan(PLAN.layers[:1])
    with mock.patch.object(os, "replace", side_effect=OSError), pytest.raises(OSError):
        other.save(path)
    assert WasiPlan.load(path) == PLAN
    other.save(path)
    assert WasiPlan.load(path) == other


def test_plan_numbers_and_text() -> None:
    assert PLAN.kept_share == (2 * 16 + 4 * 12) / (64 + 32)
    assert [PLAN.past_break_even(layer) for layer in PLAN.layers] == [False, True]
    lines = str(PLAN).splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "form", "rank", "energy", "input"]
    assert lines[1] == "blocks.0.q           8 x 8  factors      2   75.0%  feature 3, token 5"
    assert lines[2] == "blocks.0.up          8 x 4  factors      4  100.0%  exact  costs more than dense"
    assert lines[3:] == [PLAN.headline()]
    assert PLAN.headline() == (
        "WASI plan for a peak of 2.0 MiB, batch=[32, 197], optimizer=adamw: 2 layers, rank 2 to 4 (median 4), "
        "83.3% of their bytes kept, 1 with the exact input"
    )
    named = WasiPlan(PLAN.layers, memory_mode="small", update="low_rank", update_rank=1)
    assert named.headline().startswith("WASI plan, memory_mode='small', update='low_rank', update_rank=1: 2 layers")
    assert named.kept_share == (3 * 16 + 5 * 12) / (64 + 32)
    assert WasiPlan(PLAN.layers, update="core").kept_share == (2 * 18 + 4 * 16) / (64 + 32)
    assert WasiPlan.from_dict(named.to_dict()) == named
    image = WasiPlan(PLAN.layers, update="frozen_basis")
    assert [image.input_kept(layer) for layer in image.layers] == ["image", "image"]
    assert "exact" not in str(image)
    assert WasiPlan(PLAN.layers[:1]).headline() == ("WASI plan: 1 layers, rank 2, 50.0% of their bytes kept")


@pytest.mark.parametrize("update", FACTOR_UPDATES)
def test_break_even_is_that_of_the_update(update: str) -> None:
    """Past it are the ranks, and only those, at which a layer stores as much as the dense weight or more."""
    update_rank = make_update(update, 3).side_rank or None
    plans = [
        WasiPlan((LayerPlan("a", 20, 20, rank, None, 1.0),), update=update, update_rank=update_rank)
        for rank in range(1, 21)
    ]
    past = [plan.past_break_even(plan.layers[0]) for plan in plans]
    assert past == [plan.kept_share >= 1 for plan in plans]
    assert past == ["costs more than dense" in str(plan) for plan in plans]
    assert past.index(True) + 1 == {"low_rank": 7, "core": 9}.get(update, 10)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], r"a plan must be a dict with the dict 'layers', got \[\]"),
        ({"format": 1, "budget": {}}, "a plan must be a dict with the dict 'layers', got {'format'"),
        ({**PLAN.to_dict(), "format": 1}, "a plan must have format 2, got 1"),
        ({**PLAN.to_dict(), "format": True}, "a plan must have format 2, got True"),
        ({"budget": {}, "layers": {}}, "a plan must have format 2, got None"),
        ({**PLAN.to_dict(), "author": "me"}, r"a plan must have the keys \[.*it has the unknown key 'author'"),
        ({"format": 2, "layers": {}}, r"a plan must have the keys \[.*it misses 'budget'"),
        ({**PLAN.to_dict(), "layers": {}}, "a plan must have at least one layer, got none"),
        (
            {**PLAN.to_dict(), "memory_mode": "tiny"},
            r"memory_mode must be one of \['exact', 'fast', 'small'\], got 'tiny'",
        ),
        (
            {**PLAN.to_dict(), "update": "all"},
            r"a plan's update must be one of \['addition', 'frozen_basis', .*\], got 'all'",
        ),
        (
            {**PLAN.to_dict(), "update": "low_rank"},
            "a plan's update_rank must be the number of directions that its update trains.*, got None with 'low_rank'",
        ),
        (
            {**PLAN.to_dict(), "update": "core", "update_rank": 4},
            "a plan's update_rank must be the number .*, or None where it trains none, got 4 with 'core'",
        ),
        ({**PLAN.to_dict(), "budget": None}, "a plan's budget must be a dict of JSON values, got None"),
        ({**PLAN.to_dict(), "layers": {"a": 3}}, "a: a layer of a plan must be a dict, got 3"),
        (changed_plan(rank=2), r"blocks.0.q must have the keys \[.*it has the unknown key 'rank'"),
        (changed_plan(kept_energy="absent"), r"blocks.0.q must have the keys \[.*it misses 'kept_energy'"),
        (changed_plan(weight_rank=0), "blocks.0.q: weight_rank must be an integer from 1 to 8, got 0"),
        (changed_plan(weight_rank=9), "blocks.0.q: weight_rank must be an integer from 1 to 8, got 9"),
        (changed_plan(weight_rank=2.0), "blocks.0.q: weight_rank must be an integer from 1 to 8, got 2.0"),
        (changed_plan(weight_rank=True), "blocks.0.q: weight_rank must be an integer from 1 to 8, got True"),
        (changed_plan(out_features="8"), "blocks.0.q: out_features must be a positive integer, got '8'"),
        (changed_plan(activation_ranks=3), "blocks.0.q: activation_ranks must name 'feature' .* got 3"),
        (changed_plan(activation_ranks={"token": 3}), "activation_ranks must name 'feature' .* got {'token': 3}"),
        (changed_plan(activation_ranks={"feature": 3, "head": 1}), "activation_ranks must name 'feature' .*'head'"),
        (
            changed_plan(activation_ranks={"feature": 9}),
            r"activation_ranks\['feature'\] must be an integer from 1 to 8",
        ),
        (changed_plan(activation_ranks={"feature": 2, "token": 0}), r"\['token'\] must be a positive integer, got 0"),
        (changed_plan(form="int3"), r"blocks.0.q: form must be one of \['factors', 'int8', .*'dense'\], got 'int3'"),
        (changed_plan(form="absent"), r"blocks.0.q must have the keys \[.*it misses 'form'"),
        (changed_plan(form="int8"), "activation_ranks are of factors only, got {'feature': 3.* with 'int8'"),
        (changed_plan(form="dense", activation_ranks=None), "weight_rank of a dense layer must be 0, got 2"),
        (
            {**PLAN.to_dict(), "residual_update": "core"},
            "a plan's residual_update must train beside a residual, or be None, got 'core'",
        ),
        ({**PLAN.to_dict(), "bytes_per_element": 0}, "a plan's bytes_per_element must be a positive integer, got 0"),
        (changed_plan(kept_energy=0), r"blocks.0.q: kept_energy must be a number in \(0, 1\], got 0"),
        (changed_plan(kept_energy=1.01), r"kept_energy must be a number in \(0, 1\], got 1.01"),
        (changed_plan(kept_energy=math.nan), r"kept_energy must be a number in \(0, 1\], got nan"),
        (changed_plan(kept_energy="1"), r"kept_energy must be a number in \(0, 1\], got '1'"),
    ],
)
def test_what_is_no_plan(data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WasiPlan.from_dict(data)


MIXED = WasiPlan(
    (
        LayerPlan("a", 8, 8, 2, None, 0.75),
        LayerPlan("b", 8, 8, 3, None, 0.99, "int8"),
        LayerPlan("c", 8, 8, 0, None, 1.0, "dense"),
    ),
    update="low_rank",
    update_rank=1,
    residual_update="frozen_basis",
)


def test_a_plan_with_forms(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    MIXED.save(path)
    assert WasiPlan.load(path) == MIXED
    assert [MIXED.update_of(layer).name for layer in MIXED.layers[:2]] == ["low_rank", "frozen_basis"]
    assert [layer.residual for layer in MIXED.layers] == [None, "int8", None]
    stored = [4 * 3 * 16, 8 * (8 + 4) + 4 * 3 * 16, 4 * 64]
    assert list(map(MIXED.stored_bytes, MIXED.layers)) == stored
    assert MIXED.kept_share == sum(stored) / (3 * 4 * 64)
    halves = dataclasses.replace(MIXED, bytes_per_element=2)
    assert halves.kept_share == (2 * 3 * 16 + 8 * 12 + 2 * 3 * 16 + 2 * 64) / (3 * 2 * 64)
    lines = str(MIXED).splitlines()
    assert [line.split()[4] for line in lines[1:4]] == ["factors", "int8", "dense"]
    assert [MIXED.input_kept(layer) for layer in MIXED.layers] == ["exact", "image", "nothing"]
    assert dataclasses.replace(MIXED, residual_update=None).input_kept(MIXED.layers[1]) == "8 bits"
    assert "3 layers (1 factors, 1 int8, 1 dense), rank 2 to 3" in MIXED.headline()
    with pytest.raises(ValueError, match="a plan must have a layer that trains, got 1 dense ones"):
        WasiPlan(MIXED.layers[2:])


def test_build_plan_with_forms() -> None:
    q = spectrum("q", 4, 4, weight_energies=(5.0, 3.0, 2.0, 0.0))
    up = dataclasses.replace(spectrum("up", 4, 4), rounding_errors={"int8": 0.5, "int4": 100.0}, bytes_per_element=2)
    offered = with_forms([q, up], ("factors", "int8", "int4", "dense"), 9, "addition")
    assert [form.name for form in offered[0].forms] == ["dense"]
    assert [(form.name, form.rank, form.error) for form in offered[1].forms] == [
        ("int8", 4, 0.5), ("int4", 4, 100.0), ("dense", 0, 0.0),
    ]  # fmt: skip
    total = sum(up.weight_energies)
    plan = build_plan(offered, {"q": 2, "up": offered[1].forms[0]}, {"up": {"feature": 2}}, {})
    assert plan.layers[1] == LayerPlan("up", 4, 4, 4, None, 1 - 0.5 / total, "int8")
    assert plan.residual_update == "addition"
    lossy = build_plan(offered, {"q": 2, "up": offered[1].forms[1]}, {}, {})
    assert 0 < lossy.layers[1].kept_energy < 1e-6
    assert not with_forms([up], ("int8",), 2, "addition")[0].takes_factors
    with pytest.raises(ValueError, match="up: the error of int8 must be finite and at least 0, got -1"):
        dataclasses.replace(up, rounding_errors={"int8": -1.0})


def test_plans_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"must name every layer once, got 'blocks.0.q' twice"):
        WasiPlan((PLAN.layers[0], PLAN.layers[0]))
    with pytest.raises(ValueError, match="budget must be a dict of JSON values"):
        WasiPlan(PLAN.layers, {"batch": np.zeros(2)})
    with pytest.raises(ValueError, match="budget must be a dict of JSON values"):
        WasiPlan(PLAN.layers, {"batch": (32, 197)})


def test_what_is_no_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json: "):
        WasiPlan.load(path)
    text = json.dumps(PLAN.to_dict())
    path.write_text(text.replace('"blocks.0.up"', '"blocks.0.q"'))
    with pytest.raises(ValueError, match=r"plan\.json: every key must appear once, got 'blocks.0.q' twice"):
        WasiPlan.load(path)
    with pytest.raises(FileNotFoundError):
        WasiPlan.load(tmp_path / "none.json")


def test_build_plan() -> None:
    q = spectrum("q", 4, 4, weight_energies=(5.0, 3.0, 2.0, 0.0))
    k = spectrum("k", 4, 4, shared_input="q", weight_energies=(0.0, 0.0, 0.0, 0.0))
    up = spectrum("up", 4, 4)
    plan = build_plan([q, k, up], {"q": 2, "k": 1, "up": 4}, {"q": {"feature": 3}, "up": None}, {"error": 0.1})
    assert [layer.name for layer in plan.layers] == ["q", "k", "up"]
    assert [layer.kept_energy for layer in plan.layers] == [0.8, 1.0, 1.0]
    assert [layer.activation_ranks for layer in plan.layers] == [{"feature": 3}, {"feature": 3}, None]
    assert plan.budget == {"error": 0.1}


# -------------------------------------------------------------------- weights alone


def side_rank(layer: LayerSpectrum) -> int:
    """What trains beside the rank, in a narrow layer no more than it has."""
    return min(getattr(layer.update, "rank", 0), layer.out_features, layer.in_features)


def kept_energy(spectra: list[LayerSpectrum], ranks: dict[str, int]) -> float:
    return math.fsum(math.fsum(layer.weight_energies[: ranks[layer.name] + side_rank(layer)]) for layer in spectra)


def parameters(spectra: list[LayerSpectrum], ranks: dict[str, int]) -> int:
    total = 0
    for layer in spectra:
        width = ranks[layer.name] + side_rank(layer)
        core = width**2 if isinstance(layer.update, Core) else 0
        total += width * (layer.out_features + layer.in_features) + core
    return total


def price(layer: LayerSpectrum, rank: int, wanted: int) -> int:
    """What a layer takes at one rank more than at another."""
    return parameters([layer], {layer.name: wanted}) - parameters([layer], {layer.name: rank})


def single_directions(spectra: list[LayerSpectrum], budget: float) -> dict[str, int]:
    """Ranks without steps: the best direction that fits, again and again."""
    ranks = {layer.name: 1 for layer in spectra}
    while True:
        affordable = []
        for layer in spectra:
            rank = ranks[layer.name]
            more = price(layer, rank, rank + 1)
            fits = parameters(spectra, ranks) + more <= budget and rank < layer.largest_rank
            if fits and layer.rank_energies[rank] > 0:
                affordable.append((layer.rank_energies[rank] / more, layer.name))
        if not affordable:
            return ranks
        ranks[max(affordable)[1]] += 1


@QUICK
@given(small_spectra(), st.floats(0.05, 1))
def test_allocation_against_brute_force(spectra: list[LayerSpectrum], share: float) -> None:
    """Within the share and the caps, and short of the optimum by at most one direction that did not fit."""
    budget = share * sum(layer.out_features * layer.in_features for layer in spectra)
    least = parameters(spectra, {layer.name: 1 for layer in spectra})
    if least > budget:
        with pytest.raises(ValueError, match="share must be at least"):
            allocate_ranks(spectra, share)
        return
    ranks = allocate_ranks(spectra, share)
    assert list(ranks) == [layer.name for layer in spectra]
    assert all(1 <= ranks[layer.name] <= layer.largest_rank for layer in spectra)
    assert parameters(spectra, ranks) <= budget
    best = 0.0
    for choice in itertools.product(*(range(1, layer.largest_rank + 1) for layer in spectra)):
        candidate = dict(zip(ranks, choice, strict=True))
        if parameters(spectra, candidate) <= budget:
            best = max(best, kept_energy(spectra, candidate))
    left = budget - parameters(spectra, ranks)
    # directions beyond the chosen ranks: none with energy fits any more, and the gap is at most the largest of them
    beyond = [layer for layer in spectra if ranks[layer.name] < layer.largest_rank]
    next_energies = {layer.name: layer.rank_energies[ranks[layer.name]] for layer in beyond}
    assert all(next_energies[x.name] == 0 or price(x, ranks[x.name], ranks[x.name] + 1) > left for x in beyond)
    assert kept_energy(spectra, ranks) >= best - max(next_energies.values(), default=0.0) - 1e-9


@QUICK
@given(larger_spectra(), st.floats(0.01, 1))
def test_allocation_in_steps(spectra: list[LayerSpectrum], share: float) -> None:
    """As feasible as single directions, and no worse than these cut to the steps."""
    budget = share * sum(layer.out_features * layer.in_features for layer in spectra)
    if parameters(spectra, {layer.name: 1 for layer in spectra}) > budget:
        with pytest.raises(ValueError, match="share must be at least"):
            allocate_ranks(spectra, share)
        return
    ranks = allocate_ranks(spectra, share)
    assert parameters(spectra, ranks) <= budget
    left = budget - parameters(spectra, ranks)
    for layer in spectra:
        rank = ranks[layer.name]
        assert 1 <= rank <= layer.largest_rank
        assert rank in layer.aligned_ranks or rank < layer.aligned_ranks.start
        step = next((choice for choice in layer.rank_choices if choice > rank), rank)
        assert not any(layer.rank_energies[rank:step]) or price(layer, rank, step) > left
    single = single_directions(spectra, budget)
    cut = {layer.name: max(x for x in layer.rank_choices if x <= single[layer.name]) for layer in spectra}
    assert kept_energy(spectra, ranks) >= kept_energy(spectra, cut) * (1 - 1e-9)


def test_steps_go_where_they_keep_the_most() -> None:
    """Widths of 16 and 32 for ranks of 12 and 28 beside an update of rank 4."""
    strong, weak = (spectrum(name, 400, 400, rate, update=LowRank(4)) for name, rate in (("a", 0.95), ("b", 0.9)))
    assert rank_step(400, 400) == 16
    assert allocate_ranks([strong, weak], (32 + 16) / 400) == {"a": 28, "b": 12}
    assert allocate_ranks([strong, weak], (48 + 31) / 400) == {"a": 44, "b": 12}
    # not even the first step fits: what is there is spent all the same
    assert allocate_ranks([strong], 15 / 200) == {"a": 11}


@pytest.mark.parametrize("side", [0, 1, 3, 4, 9])
def test_directions_that_train_start_after_those_of_the_rank(side: int) -> None:
    energies = (4.0, 2.0, 1.0, 0.5)
    layer = spectrum("a", 4, 6, weight_energies=energies, update=LowRank(side))
    assert len(layer.rank_energies) == 4
    for rank in range(5):
        assert sum(layer.rank_energies[rank:]) == sum(energies[rank + side :])


def test_allocation_is_the_optimum_for_equal_shapes_and_prefers_energy_per_parameter() -> None:
    strong, weak = spectrum("strong", 40, 40, 0.9), spectrum("weak", 40, 40, 0.3)
    ranks = allocate_ranks([strong, weak], 0.5)
    assert ranks["strong"] > 3 * ranks["weak"] and parameters([strong, weak], ranks) == 0.5 * 2 * 1600
    wide = spectrum("wide", 400, 40, 0.9)
    assert allocate_ranks([strong, wide], 0.1)["strong"] > allocate_ranks([strong, wide], 0.1)["wide"]


def test_allocation_stops_at_break_even_and_takes_nothing_without_energy() -> None:
    layers = [spectrum("a", 8, 8, 0.9), spectrum("b", 1, 7)]
    assert allocate_ranks(layers, 1.0) == {"a": 3, "b": 1}
    empty = spectrum("c", 8, 8, weight_energies=(2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert allocate_ranks([empty], 1.0) == {"c": 2}


class HalvedBasis(FrozenBasis):
    """Stores R in 8 bits with one scale a row."""

    def stored_bytes(self, out_features: int, in_features: int, rank: int, bytes_per_element: int) -> int:
        return rank * (out_features * bytes_per_element + in_features + 4)


def test_a_share_counts_bytes() -> None:
    """What is stored in fewer bits leaves room for more directions."""
    layer = spectrum("a", 64, 64, 0.95)
    rounded = dataclasses.replace(layer, update=HalvedBasis())
    assert allocate_ranks([layer], 0.5) == {"a": 16}
    assert allocate_ranks([rounded], 0.5) == {"a": 24}  # a multiple of 2
    assert 24 * (4 * 64 + 64 + 4) <= 0.5 * 4 * 64 * 64 < 26 * (4 * 64 + 64 + 4)


def test_what_is_left_over_goes_to_cheaper_directions() -> None:
    large = spectrum("large", 100, 100, weight_energies=(100.0,) * 100)
    small = spectrum("small", 10, 10, weight_energies=(1.0,) * 10)
    share = (3 * 200 - 40) / 10100  # a third direction of `large` does not fit; two more of `small` do
    assert allocate_ranks([large, small], share) == {"large": 2, "small": 4}
    assert 200 * 2 + 20 * 4 <= share * 10100


@pytest.mark.parametrize("share", [0, -1, 1.5, math.nan, True, "0.5"], ids=repr)
def test_share_out_of_range(share: Any) -> None:
    with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\], got"):
        allocate_ranks([spectrum("a", 8, 8)], share)


def test_share_too_small() -> None:
    with pytest.raises(ValueError, match=r"share must be at least 0\.25 \(rank 1 in every layer, .*\), got 0\.2"):
        allocate_ranks([spectrum("a", 8, 8)], 0.2)
