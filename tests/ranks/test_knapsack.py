"""The knapsack against brute force, and what it refuses."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK

from wasi_peft.ranks import knapsack
from wasi_peft.ranks.knapsack import InfeasibleError, Option, least_cost, least_error

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
@given(ITEMS, st.floats(0, 1.2), st.sampled_from([4, 32, knapsack.CELLS]), st.booleans())
def test_knapsack_against_brute_force(items: list[list[Option]], position: float, cells: int, by_cost: bool) -> None:
    """The bound holds exactly; no choice that leaves `n` grid steps of it free is better."""
    solve, bounded, minimised = (least_error, "cost", "error") if by_cost else (least_cost, "error", "cost")
    least = math.fsum(min(getattr(option, bounded) for option in options) for options in items)
    most = math.fsum(max(getattr(option, bounded) for option in options) for options in items)
    bound = least + position * (most - least)
    with mock.patch.object(knapsack, "CELLS", cells):
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
