"""Fitting a budget: what is known of the layers, and the search where costs do not simply add up over them.

A plan is then chosen under a bound on the costs that do (:mod:`ranks.choosing`), and the bound moves until the true
cost meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ranks.choosing import activation_options, choose_plan, cost_bounds
from ..ranks.knapsack import InfeasibleError
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import FACTORS, InputGroup, LayerSpectrum, input_groups
from ..updates.costs import input_elements

GRADIENT_ERROR = 0.08  # of a weight gradient's energy, where activation ranks are not part of the budget
AIM = 0.96  # of a budget that is met by trying
TRIES = 6

WeightCost = Callable[[LayerSpectrum, int], float]
ActivationCost = Callable[[InputGroup, "dict[str, int] | None"], float]


@dataclass(frozen=True)
class Problem:
    """Spectra of all layers, the shapes of their inputs (samples, tokens) and what was asked."""

    spectra: list[LayerSpectrum]
    shapes: Mapping[str, tuple[int, int]]
    asked: dict[str, Any]

    def rows(self, spectrum: LayerSpectrum) -> int:
        """Tokens of a layer's input, those of all samples."""
        return math.prod(self.shapes[spectrum.name])

    def kept_elements(self, group: InputGroup, ranks: dict[str, int] | None) -> float:
        """Elements kept of an input; infinite where the compressed form would not be smaller and so is not used."""
        shape = self.shapes[group.spectra[0].name]
        elements = input_elements(*shape, group.in_features, ranks)
        return elements if ranks is None or elements < input_elements(*shape, group.in_features, None) else math.inf

    def tolerable_inputs(self) -> dict[str, dict[str, int] | None]:
        """For each input the fewest features with which its layers' gradients keep enough of their energy."""
        chosen = {}
        for group in input_groups(self.spectra):
            bound = GRADIENT_ERROR * sum(group.energies("feature"))
            options = [x for x in activation_options(group, self.kept_elements) if "token" not in (x.choice or {})]
            chosen[group.name] = min((x for x in options if x.error <= bound), key=lambda x: x.cost).choice
        return chosen

    def with_tolerable_inputs(self, plan: WasiPlan) -> WasiPlan:
        """The plan with :meth:`tolerable_inputs` where factors take them."""
        inputs = self.tolerable_inputs()
        layers = [
            replace(layer, activation_ranks=inputs[spectrum.shared_input] if layer.form == FACTORS else None)
            for layer, spectrum in zip(plan.layers, self.spectra, strict=True)
        ]
        return replace(plan, layers=tuple(layers), budget=self.asked)

    def weights_alone(
        self, cost: WeightCost, budget: float | None = None, error_bound: float | None = None
    ) -> WasiPlan:
        """The plan where inputs are no part of the budget, or of the error that is tolerated."""
        plan = choose_plan(self.spectra, weight_cost=cost, budget=budget, error_bound=error_bound)
        return self.with_tolerable_inputs(plan)


def fit_budget(
    problem: Problem,
    weight_cost: WeightCost,
    activation_cost: ActivationCost,
    true_cost: Callable[[WasiPlan], float],
    budget: float,
    fixed: float | None = None,
) -> tuple[WasiPlan, float]:
    """A plan whose true cost is at most the budget, close to it unless more rank helps nothing, and that cost.

    Plans are chosen under a bound on the costs that add up, which moves a few times at most. `fixed` is a guess of
    what the true cost has on top of them; without one the bound starts in the middle.

    Raises:
        InfeasibleError: If the cheapest plan costs more than the budget; it carries that cost.
    """
    costs: list[Sequence[float]] = [cost_bounds(spectrum, weight_cost) for spectrum in problem.spectra]
    for group in input_groups(problem.spectra):
        costs.append([option.cost for option in activation_options(group, activation_cost)])
    least, most = math.fsum(map(min, costs)), math.fsum(map(max, costs))

    def plan_at(bound: float) -> tuple[WasiPlan, float]:
        plan = choose_plan(
            problem.spectra,
            weight_cost=weight_cost,
            activation_cost=activation_cost,
            budget=bound,
            asked=problem.asked,
        )
        return plan, true_cost(plan)

    goal = (1 + AIM) / 2 * budget
    best: tuple[WasiPlan, float] | None = None
    tried: list[tuple[float, float]] = []  # bounds and true costs
    bound = (least + most) / 2 if fixed is None else goal - fixed
    for _ in range(TRIES):
        bound = min(most, max(least, bound))
        plan, spent = plan_at(bound)
        if spent <= budget:
            if best is None or spent > best[1]:
                best = plan, spent
            if bound == most or spent >= AIM * budget:
                return best
        elif bound == least:
            raise InfeasibleError("cost", budget, spent)
        tried.append((bound, spent))
        bound = next_bound(tried, goal)
    if best is not None:
        return best
    plan, spent = plan_at(least)
    if spent > budget:
        raise InfeasibleError("cost", budget, spent)
    return plan, spent


def next_bound(tried: Sequence[tuple[float, float]], goal: float) -> float:
    """Where the true cost should meet the goal: along the secant through the points next to it.

    With one point, or where two do not tell, each unit of the bound counts as one of the true cost.
    """
    below = max((point for point in tried if point[1] <= goal), default=None)
    above = min((point for point in tried if point[1] > goal), default=None)
    first, last = (below, above) if below and above else (tried[max(0, len(tried) - 2)], tried[-1])
    rate = 1.0
    if last[1] != first[1]:
        rate = min(4.0, max(0.25, (last[0] - first[0]) / (last[1] - first[1])))
    return last[0] + rate * (goal - last[1])
