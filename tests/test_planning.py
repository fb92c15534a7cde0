"""Planning against brute force: spectra, plans and their file, rank allocation, the knapsack, whole plans."""

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
from strategies import QUICK

from wasi_peft import planning
from wasi_peft.costs import break_even_rank, input_elements
from wasi_peft.planning import (
    InfeasibleError,
    InputGroup,
    LayerPlan,
    LayerSpectrum,
    Option,
    WasiPlan,
    activation_options,
    allocate_ranks,
    build_plan,
    candidate_ranks,
    choose_activations,
    choose_plan,
    input_groups,
    least_cost,
    least_error,
    weight_options,
)

CHECKED = {"out_features": 4, "in_features": 6, "shared_input": "a", "weight_energies": (4.0, 2.0, 1.0, 0.0)}


def descending(values: Any) -> tuple[float, ...]:
    return tuple(sorted(map(float, values), reverse=True))


def spectrum(name: str, out_features: int, in_features: int, rate: float = 0.5, **options: Any) -> LayerSpectrum:
    """A layer whose weight energies fall geometrically."""
    energies = tuple(rate**k for k in range(min(out_features, in_features)))
    return LayerSpectrum(
        name, out_features, in_features, **{"shared_input": name, "weight_energies": energies, **options}
    )


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
    return spectra


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
    {"peak_bytes": 1000, "batch": [32, 197], "optimizer": "adamw"},
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
        "format": 1,
        "budget": {"peak_bytes": 1000, "batch": [32, 197], "optimizer": "adamw"},
        "layers": {
            "blocks.0.q": {
                "out_features": 8,
                "in_features": 8,
                "weight_rank": 2,
                "activation_ranks": {"feature": 3, "token": 5},
                "kept_energy": 0.75,
            },
            "blocks.0.up": {
                "out_features": 8,
                "in_features": 4,
                "weight_rank": 4,
                "activation_ranks": None,
                "kept_energy": 1.0,
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
    assert [layer.past_break_even for layer in PLAN.layers] == [False, True]
    lines = str(PLAN).splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "rank", "energy", "input"]
    assert lines[1] == "blocks.0.q           8 x 8      2   75.0%  feature 3, token 5"
    assert lines[2] == "blocks.0.up          8 x 4      4  100.0%  exact  costs more than dense"
    assert lines[3:] == [PLAN.headline()]
    assert PLAN.headline() == (
        "WASI plan for peak_bytes=1000, batch=[32, 197], optimizer=adamw: 2 layers, rank 2 to 4 (median 4), "
        "83.3% of their weights kept, 1 with the exact input"
    )
    assert WasiPlan(PLAN.layers[:1]).headline() == (
        "WASI plan: 1 layers, rank 2 to 2 (median 2), 50.0% of their weights kept"
    )


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], r"a plan must be a dict with the dict 'layers', got \[\]"),
        ({"format": 1, "budget": {}}, "a plan must be a dict with the dict 'layers', got {'format'"),
        ({**PLAN.to_dict(), "format": 2}, "a plan must have format 1, got 2"),
        ({**PLAN.to_dict(), "format": True}, "a plan must have format 1, got True"),
        ({"budget": {}, "layers": {}}, "a plan must have format 1, got None"),
        ({**PLAN.to_dict(), "author": "me"}, r"a plan must have the keys \[.*it has the unknown key 'author'"),
        ({"format": 1, "layers": {}}, r"a plan must have the keys \[.*it misses 'budget'"),
        ({**PLAN.to_dict(), "layers": {}}, "a plan must have at least one layer, got none"),
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
        (changed_plan(kept_energy=0), r"blocks.0.q: kept_energy must be a number in \(0, 1\], got 0"),
        (changed_plan(kept_energy=1.01), r"kept_energy must be a number in \(0, 1\], got 1.01"),
        (changed_plan(kept_energy=math.nan), r"kept_energy must be a number in \(0, 1\], got nan"),
        (changed_plan(kept_energy="1"), r"kept_energy must be a number in \(0, 1\], got '1'"),
    ],
)
def test_what_is_no_plan(data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WasiPlan.from_dict(data)


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


def kept_energy(spectra: list[LayerSpectrum], ranks: dict[str, int]) -> float:
    return math.fsum(math.fsum(layer.weight_energies[: ranks[layer.name]]) for layer in spectra)


def parameters(spectra: list[LayerSpectrum], ranks: dict[str, int]) -> int:
    return sum(ranks[layer.name] * (layer.out_features + layer.in_features) for layer in spectra)


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
    next_energies = {layer.name: layer.weight_energies[ranks[layer.name]] for layer in beyond}
    assert all(next_energies[x.name] == 0 or x.out_features + x.in_features > left for x in beyond)
    assert kept_energy(spectra, ranks) >= best - max(next_energies.values(), default=0.0) - 1e-9


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


# -------------------------------------------------------------------- knapsack

NUMBERS = st.integers(0, 9) | st.floats(0, 10, allow_subnormal=False)
ITEMS = st.lists(
    st.lists(st.builds(Option, NUMBERS, NUMBERS, st.none()), min_size=1, max_size=4), min_size=1, max_size=4
)


def total(options: list[Option], field: str) -> float:
    return math.fsum(getattr(option, field) for option in options)


def optimum(items: list[list[Option]], minimised: str, bounded: str, bound: float) -> float:
    """Least total of one field with the total of the other at most `bound`, over all choices."""
    feasible = [c for c in itertools.product(*items) if total(list(c), bounded) <= bound]
    return min((total(list(choice), minimised) for choice in feasible), default=math.inf)


@QUICK
@given(ITEMS, st.floats(0, 1.2), st.sampled_from([4, 32, planning.CELLS]), st.booleans())
def test_knapsack_against_brute_force(items: list[list[Option]], position: float, cells: int, by_cost: bool) -> None:
    """The bound holds exactly; no choice that leaves `n` grid steps of it free is better."""
    solve, bounded, minimised = (least_error, "cost", "error") if by_cost else (least_cost, "error", "cost")
    least = math.fsum(min(getattr(option, bounded) for option in options) for options in items)
    most = math.fsum(max(getattr(option, bounded) for option in options) for options in items)
    bound = least + position * (most - least)
    with mock.patch.object(planning, "CELLS", cells):
        chosen = solve(items, bound)
    assert all(option in options for option, options in zip(chosen, items, strict=True))
    assert total(chosen, bounded) <= bound
    reachable = bound - len(items) * (bound - least) / cells
    assert total(chosen, minimised) <= optimum(items, minimised, bounded, reachable) + 1e-9
    assert total(chosen, minimised) >= optimum(items, minimised, bounded, bound) - 1e-9


@QUICK
@given(ITEMS)
def test_the_extremes_are_exact(items: list[list[Option]]) -> None:
    """At the least feasible budget everything is cheapest, with the least error at that; with enough, all is best."""
    cheapest = [min(options) for options in items]
    assert total(least_error(items, total(cheapest, "cost")), "cost") == total(cheapest, "cost")
    everything = math.fsum(max(option.cost for option in options) for options in items)
    best = math.fsum(min(option.error for option in options) for options in items)
    assert total(least_error(items, everything * 1.001 + 1e-3), "error") == best


def test_an_infeasible_bound_states_the_least() -> None:
    items = [[Option(2, 5.0), Option(3, 1.0)], [Option(1, 9.0), Option(2, 2.0)]]
    with pytest.raises(InfeasibleError, match=r"total cost cannot be below 3, got the bound 2\.5") as error:
        least_error(items, 2.5)
    assert error.value.least == 3
    with pytest.raises(InfeasibleError, match=r"total error cannot be below 3, got the bound 0") as error:
        least_cost(items, 0)
    assert error.value.least == 3
    with pytest.raises(InfeasibleError):
        least_error(items, math.nan)


@pytest.mark.parametrize("options", [[], [Option(math.nan, 1.0)], [Option(1.0, math.inf)]], ids=repr)
def test_items_that_cannot_be(options: list[Option]) -> None:
    with pytest.raises(ValueError, match="every item must have options with finite cost and error"):
        least_error([[Option(1, 1.0)], options], 10.0)


def test_a_large_problem_comes_close_to_the_relaxed_optimum() -> None:
    """200 layers with 40 options: within 1 % of the Lagrangian lower bound, which no choice beats."""
    rng = np.random.default_rng(0)
    items = []
    for _ in range(200):
        costs, errors = np.sort(rng.random(40)), np.sort(rng.random(40))[::-1]
        items.append([Option(*pair) for pair in zip(costs.tolist(), errors.tolist(), strict=True)])
    chosen = least_error(items, 40.0)
    assert total(chosen, "cost") <= 40.0
    table = np.array([[option[:2] for option in options] for options in items])
    bounds = [(table[..., 1] + price * table[..., 0]).min(1).sum() - 40 * price for price in np.linspace(0, 10, 400)]
    assert max(bounds) - 1e-9 <= total(chosen, "error") <= 1.01 * max(bounds)


# -------------------------------------------------------------------- options


@QUICK
@given(st.integers(1, 3000), st.integers(4, 64), st.floats(0.3, 1.0))
def test_candidate_ranks_are_spread_evenly(largest: int, count: int, rate: float) -> None:
    energies = rate ** np.arange(largest + 5)
    ranks = candidate_ranks(energies.tolist(), largest, count)
    assert ranks[0] == 1 and ranks[-1] == largest and len(ranks) <= max(count, 1)
    assert list(ranks) == sorted(set(ranks))
    kept = np.cumsum(energies[:largest])
    for low, high in itertools.pairwise(ranks):
        if high - low > 1:
            assert (high - low - 1) / (largest - 1) <= 2 / (count - 1) + 1e-9
            assert (kept[high - 2] - kept[low - 1]) / (kept[-1] - kept[0]) <= 2 / (count - 1) + 1e-9


def test_weight_options() -> None:
    layer = spectrum("a", 4, 6, weight_energies=(4.0, 2.0, 1.0, 0.0))
    options = weight_options(layer, [1, 2], lambda layer, rank: rank * layer.in_features, scale=0.1)
    assert options == [Option(6, pytest.approx(0.3), 1), Option(12, pytest.approx(0.1), 2)]


def test_activation_options() -> None:
    """Exact, feature, feature with token; errors are sums of tails; what is not smaller is left out."""
    feature, token = (4.0, 2.0, 1.0, 0.5), (3.0, 1.0, 0.0)
    known = {"feature": feature, "token": token}
    group = InputGroup((spectrum("q", 4, 4, gradient_energies=known), spectrum("k", 4, 4, gradient_energies=known)))

    def cost(group: InputGroup, ranks: dict[str, int] | None) -> float:
        elements = input_elements(5, 3, group.in_features, ranks)
        return elements if ranks is None or elements < 5 * 3 * 4 else math.inf

    options = activation_options(group, cost, scale=0.5)
    assert options[0] == Option(60, 0.0, None)
    errors = {tuple(option.choice.values()): option.error for option in options[1:]}
    assert errors == {
        (r, *t): sum(feature[r:]) + (sum(token[t[0] :]) if t else 0.0)
        for r in (1, 2, 3)
        for t in ((), (1,), (2,))
        if cost(group, {"feature": r, "token": t[0]} if t else {"feature": r}) < 60
    }
    assert (3, 1) in errors and (3,) in errors
    without_tokens = InputGroup((group.spectra[0], spectrum("v", 4, 4, gradient_energies={"feature": feature})))
    assert {tuple(option.choice or {}) for option in activation_options(without_tokens, cost)} == {(), ("feature",)}
    blind = InputGroup((spectrum("v", 4, 4),))
    assert activation_options(blind, cost) == [Option(60, 0.0, None)]


# -------------------------------------------------------------------- whole plans


def two_groups() -> list[LayerSpectrum]:
    """q and k read one input, up another; two shapes."""
    return [
        spectrum("q", 8, 8, 0.7, gradient_energies={"feature": descending(0.5**k for k in range(8))}),
        spectrum("up", 12, 8, 0.5, gradient_energies={"feature": descending(0.8**k for k in range(8))}),
        spectrum(
            "k", 8, 8, 0.4, shared_input="q", gradient_energies={"feature": descending(0.6**k for k in range(8))}
        ),
    ]


def weight_cost(layer: LayerSpectrum, rank: int) -> int:
    return 16 * rank * (layer.out_features + layer.in_features)


def activation_cost(group: InputGroup, ranks: dict[str, int] | None) -> int:
    return 4 * input_elements(4, 10, group.in_features, ranks)


def plan_cost(spectra: list[LayerSpectrum], plan: WasiPlan) -> int:
    layers = {layer.name: layer for layer in plan.layers}
    weights = sum(weight_cost(x, layers[x.name].weight_rank) for x in spectra)
    inputs = sum(activation_cost(g, layers[g.spectra[0].name].activation_ranks) for g in input_groups(spectra))
    return weights + inputs


def plan_error(spectra: list[LayerSpectrum], plan: WasiPlan, gradient_weight: float) -> float:
    weight = gradient = 0.0
    for layer, planned in zip(spectra, plan.layers, strict=True):
        weight += sum(layer.weight_energies[planned.weight_rank :])
        if planned.activation_ranks is not None:
            gradient += sum(layer.gradient_energies["feature"][planned.activation_ranks["feature"] :])
    weight /= sum(sum(layer.weight_energies) for layer in spectra)
    return weight + gradient_weight * gradient / sum(sum(x.gradient_energies["feature"]) for x in spectra)


def every_plan(spectra: list[LayerSpectrum]) -> list[WasiPlan]:
    plans = []
    names = [layer.name for layer in spectra]
    inputs: list[dict[str, int] | None] = [None, *({"feature": r} for r in range(1, 8))]
    for ranks in itertools.product(*(range(1, layer.largest_rank + 1) for layer in spectra)):
        for q, up in itertools.product(inputs, inputs):
            plans.append(build_plan(spectra, dict(zip(names, ranks, strict=True)), {"q": q, "up": up}, {}))
    return plans


@pytest.mark.parametrize("budget", [3000, 3500, 4200, 6000])
@pytest.mark.parametrize("gradient_weight", [0.0, 0.1, 1.0])
def test_a_plan_under_a_budget_against_brute_force(budget: int, gradient_weight: float) -> None:
    spectra = two_groups()
    plan = choose_plan(
        spectra,
        weight_cost=weight_cost,
        activation_cost=activation_cost,
        budget=budget,
        gradient_weight=gradient_weight,
        asked={"peak_bytes": budget},
    )
    assert plan.budget == {"peak_bytes": budget}
    assert plan_cost(spectra, plan) <= budget
    reachable = budget * (1 - 5 / planning.CELLS)
    best = min(
        plan_error(spectra, p, gradient_weight) for p in every_plan(spectra) if plan_cost(spectra, p) <= reachable
    )
    assert plan_error(spectra, plan, gradient_weight) <= best + 1e-12
    q, _, k = plan.layers
    assert q.activation_ranks == k.activation_ranks


@pytest.mark.parametrize("bound", [0.2, 0.3, 0.6])
def test_a_plan_under_an_error_bound_against_brute_force(bound: float) -> None:
    spectra = two_groups()
    plan = choose_plan(
        spectra, weight_cost=weight_cost, activation_cost=activation_cost, error_bound=bound, gradient_weight=0.5
    )
    assert plan_error(spectra, plan, 0.5) <= bound + 1e-12
    reachable = bound * (1 - 5 / planning.CELLS)
    best = min(plan_cost(spectra, p) for p in every_plan(spectra) if plan_error(spectra, p, 0.5) <= reachable)
    assert plan_cost(spectra, plan) <= best


def test_without_activation_costs_every_input_stays_exact() -> None:
    plan = choose_plan(two_groups(), weight_cost=weight_cost, error_bound=0.5)
    assert all(layer.activation_ranks is None for layer in plan.layers)


def test_ranks_between_the_spread_candidates_are_found() -> None:
    layer = spectrum("a", 1000, 1000, 0.999)
    for rank in (37, 123, 333):
        budget = weight_cost(layer, rank) * 1.001
        assert choose_plan([layer], weight_cost=weight_cost, budget=budget).layers[0].weight_rank == rank


def test_activations_alone() -> None:
    spectra = two_groups()
    energies = {group.name: group.energies("feature") for group in input_groups(spectra)}
    everything = sum(map(sum, energies.values()))
    ranks = choose_activations(spectra, cost=activation_cost, error_bound=0.1)
    assert set(ranks) == {"q", "up"}
    lost = sum(sum(energies[name][chosen["feature"] :]) for name, chosen in ranks.items() if chosen is not None)
    assert lost <= 0.1 * everything
    assert all(chosen is None for chosen in choose_activations(spectra, cost=activation_cost, budget=1e9).values())


def test_plans_that_cannot_be_made() -> None:
    spectra = two_groups()
    with pytest.raises(ValueError, match="give either budget or error_bound, got budget=None and error_bound=None"):
        choose_plan(spectra, weight_cost=weight_cost)
    with pytest.raises(ValueError, match="give either budget or error_bound, got budget=1 and error_bound=1"):
        choose_plan(spectra, weight_cost=weight_cost, budget=1, error_bound=1)
    with pytest.raises(InfeasibleError) as error:
        choose_plan(spectra, weight_cost=weight_cost, activation_cost=activation_cost, budget=10)
    least = min(plan_cost(spectra, plan) for plan in every_plan(spectra))
    assert error.value.least == least
