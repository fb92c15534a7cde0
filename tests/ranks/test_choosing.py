"""Options of layers and inputs, and whole plans against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, descending, spectrum

from wasi_peft.ranks import choosing, knapsack
from wasi_peft.ranks.choosing import (
    CANDIDATES,
    UNTRAINED_WEIGHT,
    activation_options,
    candidate_ranks,
    choose_activations,
    choose_plan,
    weight_options,
)
from wasi_peft.ranks.knapsack import InfeasibleError, Option
from wasi_peft.ranks.plan import WasiPlan, build_plan
from wasi_peft.ranks.spectrum import InputGroup, LayerSpectrum, addition_ranks, input_groups, with_forms
from wasi_peft.updates import LowRank
from wasi_peft.updates.costs import input_elements


@QUICK
@given(st.integers(1, 3000), st.integers(4, 64), st.floats(0.3, 1.0))
def test_candidate_ranks_are_spread_evenly(largest: int, count: int, rate: float) -> None:
    energies = rate ** np.arange(largest + 5)
    ranks = candidate_ranks(energies.tolist(), range(1, largest + 1), count)
    assert ranks[0] == 1 and ranks[-1] == largest and len(ranks) <= max(count, 1)
    assert list(ranks) == sorted(set(ranks))
    kept = np.cumsum(energies[:largest])
    for low, high in itertools.pairwise(ranks):
        if high - low > 1:
            assert (high - low - 1) / (largest - 1) <= 2 / (count - 1) + 1e-9
            assert (kept[high - 2] - kept[low - 1]) / (kept[-1] - kept[0]) <= 2 / (count - 1) + 1e-9


@QUICK
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 200), st.floats(0.3, 1.0))
def test_candidate_ranks_are_some_of_those_offered(first: int, step: int, count: int, rate: float) -> None:
    offered = range(first, first + count * step, step)
    ranks = candidate_ranks([rate**k for k in range(offered[-1] + 3)], offered, 8)
    assert set(ranks) <= set(offered) and list(ranks) == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (offered[0], offered[-1]) and len(ranks) in range(min(count, 2), 9)


def test_weight_options() -> None:
    layer = spectrum("a", 4, 6, weight_energies=(4.0, 2.0, 1.0, 0.0))
    options = weight_options(layer, [1, 2], lambda layer, rank: rank * layer.in_features, scale=0.1)
    assert options == [Option(6, pytest.approx(0.3), 1), Option(12, pytest.approx(0.1), 2)]


def test_options_of_other_forms_count_what_does_not_train() -> None:
    """Rounding and, with little weight, energy outside the addition's directions; of factors what they drop."""
    energies = (4.0, 2.0, 1.0, 0.0)
    plain = spectrum("a", 4, 4, weight_energies=energies)
    layer = with_forms(
        [dataclasses.replace(plain, rounding_errors={"int8": 0.5})], ("factors", "int8"), 2, "addition"
    )[0]
    factors, other = weight_options(layer, [1], lambda layer, rank: rank, scale=0.1)
    assert factors == Option(1, pytest.approx(0.1 * (1 + UNTRAINED_WEIGHT) * 3.0), 1)
    assert other == Option(2, pytest.approx(0.1 * (0.5 + UNTRAINED_WEIGHT * 1.0)), layer.forms[0])
    dense = with_forms([plain], ("dense",), None, "addition")[0]
    assert weight_options(dense, [], lambda layer, rank: rank)[0].error == 0.0  # not asked to train


def test_what_is_left_of_a_budget_goes_into_directions_that_train() -> None:
    """And into the last bits of a weight after that."""
    known = spectrum("fc", 64, 64, weight_energies=descending(0.9**k for k in range(64)))
    known = dataclasses.replace(known, rounding_errors={"int8": 1e-3})
    layers = with_forms([known], ("factors", "int8", "exact"), None, "addition")
    ranks = {form.rank for form in layers[0].forms}
    assert ranks == set(addition_ranks(64, 64)) == {2, 4, 6, 8, 12, 16, 24}
    found = []
    for share in (0.3, 0.4, 0.6, 0.9, 1.5, 1.8):
        budget = share * known.dense_bytes
        layer = choose_plan(layers, weight_cost=LayerSpectrum.stored_bytes, budget=budget).layers[0]
        found.append((layer.form, layer.weight_rank))
    assert found == [("factors", 8), ("int8", 4), ("int8", 8), ("int8", 16), ("int8", 24), ("exact", 24)]


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


def test_the_error_of_a_plan() -> None:
    spectra = two_groups()
    for plan in every_plan(spectra)[::7]:
        assert choosing.plan_error(spectra, plan, 0.5) == pytest.approx(plan_error(spectra, plan, 0.5), abs=1e-12)


@QUICK
@given(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.3, 1.2))
def test_forms_are_chosen_with_the_ranks(int8: float, int4: float, share: float) -> None:
    """As by brute force over all forms and ranks of two layers."""
    plain = [dataclasses.replace(x, rounding_errors={"int8": int8, "int4": int4}) for x in two_groups()[:2]]
    spectra = with_forms(plain, ("factors", "int8", "int4", "exact"), 1, "addition")

    def cost(layer: LayerSpectrum, rank: int) -> int:
        return layer.stored_bytes(rank)

    budget = share * sum(layer.dense_bytes for layer in spectra)
    choices = [[*range(1, x.largest_rank + 1), *x.forms] for x in spectra]
    best = math.inf
    for pair in itertools.product(*choices):
        plan = build_plan(spectra, dict(zip(("q", "up"), pair, strict=True)), {}, {})
        if sum(map(plan.stored_bytes, plan.layers)) <= budget:
            best = min(best, choosing.plan_error(spectra, plan))
    if best == math.inf:
        with pytest.raises(InfeasibleError):
            choose_plan(spectra, weight_cost=cost, budget=budget)
        return
    plan = choose_plan(spectra, weight_cost=cost, budget=budget)
    assert sum(map(plan.stored_bytes, plan.layers)) <= budget
    assert choosing.plan_error(spectra, plan) <= best + 1e-2 * (1 + best)
    alone = choose_plan(plain, weight_cost=cost, budget=budget)
    assert choosing.plan_error(spectra, plan) <= choosing.plan_error(spectra, alone) + 1e-9


def test_the_error_of_a_plan_counts_tokens() -> None:
    layer = spectrum("q", 8, 8, 0.7, gradient_energies={"feature": (3.0, 1.0, *[0.0] * 6), "token": (2.0, 1.5, 0.5)})
    exact = choosing.plan_error([layer], build_plan([layer], {"q": 4}, {}, {}))
    both = choosing.plan_error([layer], build_plan([layer], {"q": 4}, {"q": {"feature": 1, "token": 2}}, {}))
    assert both - exact == pytest.approx(0.1 * (1.0 + 0.5) / 4.0)


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
    reachable = budget * (1 - 5 / knapsack.CELLS)
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
    reachable = bound * (1 - 5 / knapsack.CELLS)
    best = min(plan_cost(spectra, p) for p in every_plan(spectra) if plan_error(spectra, p, 0.5) <= reachable)
    assert plan_cost(spectra, plan) <= best


def test_without_activation_costs_every_input_stays_exact() -> None:
    plan = choose_plan(two_groups(), weight_cost=weight_cost, error_bound=0.5)
    assert all(layer.activation_ranks is None for layer in plan.layers)


def test_ranks_between_the_spread_candidates_are_found() -> None:
    """The aligned ones, and below the first of them every rank."""
    layer = spectrum("a", 4000, 4000, 0.999)
    assert len(layer.rank_choices) > 3 * CANDIDATES
    for rank, chosen in ((7, 7), (37, 32), (123, 112), (333, 320), (1001, 992)):
        budget = weight_cost(layer, rank) * 1.001
        assert choose_plan([layer], weight_cost=weight_cost, budget=budget).layers[0].weight_rank == chosen


def in_steps() -> list[LayerSpectrum]:
    """Steps of 16 and 8, and an update of rank 5."""
    return [spectrum("a", 300, 300, 0.97, update=LowRank(5)), spectrum("b", 200, 250, 0.99, update=LowRank(5))]


def ranks_of(plan: WasiPlan) -> tuple[int, ...]:
    return tuple(layer.weight_rank for layer in plan.layers)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35, 0.5, 0.8, 1.0])
def test_aligned_ranks_under_a_budget_against_brute_force(share: float) -> None:
    spectra = in_steps()
    assert [x.rank_choices[:3] for x in spectra] == [(1, 11, 27), (1, 3, 11)]
    budget = share * 16 * (300 * 300 + 200 * 250)
    plan = choose_plan(spectra, weight_cost=weight_cost, budget=budget)
    assert all(K in x.aligned_ranks or K < x.aligned_ranks.start for K, x in zip(ranks_of(plan), spectra, strict=True))
    assert sum(map(weight_cost, spectra, ranks_of(plan))) <= budget

    def dropped(ranks: tuple[int, ...]) -> float:
        return sum(sum(x.rank_energies[K:]) for x, K in zip(spectra, ranks, strict=True))

    reachable = budget * (1 - 2 / knapsack.CELLS)
    every = itertools.product(*(x.rank_choices for x in spectra))
    best = min(dropped(ranks) for ranks in every if sum(map(weight_cost, spectra, ranks)) <= reachable)
    assert dropped(ranks_of(plan)) <= best + 1e-12


def test_an_error_bound_that_only_break_even_meets() -> None:
    """What was feasible without steps still is, and the least feasible bound is that of the largest ranks."""
    spectra = in_steps()
    total = sum(sum(x.weight_energies) for x in spectra)
    largest, last = [x.largest_rank for x in spectra], [x.rank_choices[-1] for x in spectra]
    least, aligned = (
        sum(sum(x.rank_energies[K:]) for x, K in zip(spectra, ranks, strict=True)) / total for ranks in (largest, last)
    )
    assert least < aligned
    plan = choose_plan(spectra, weight_cost=weight_cost, error_bound=least * (1 + 1e-9))
    assert list(ranks_of(plan)) == largest
    plan = choose_plan(spectra, weight_cost=weight_cost, error_bound=aligned * (1 + 1e-9))
    assert list(ranks_of(plan)) == last
    with pytest.raises(InfeasibleError) as error:
        choose_plan(spectra, weight_cost=weight_cost, error_bound=least / 2)
    assert error.value.least == pytest.approx(least)


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
