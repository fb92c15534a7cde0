"""Chooses forms, ranks of weights and of compressed inputs under a budget of any cost that adds up over them.

Every layer offers a list of options (a weight rank, each with a cost and an error), every distinct input another one
(the ranks of its compressed copy). One option per list is a multiple-choice knapsack (:mod:`knapsack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..forms.residual import ExactResidual
from .knapsack import InfeasibleError, Option, least_cost, least_error
from .plan import LayerPlan, WasiPlan, build_plan
from .spectrum import DENSE, FACTORS, Form, InputGroup, LayerSpectrum, input_groups

CANDIDATES = 32  # ranks offered per layer
TOKEN_CANDIDATES = 8
UNTRAINED_WEIGHT = 0.1  # measured: of energy in directions that stay and do not train, against energy that is lost
GRADIENT_WEIGHT = 0.1  # of a share of gradient energy, against the same share of weight energy


def candidate_ranks(energies: Sequence[float], ranks: Sequence[int], count: int = CANDIDATES) -> tuple[int, ...]:
    """About `count` of the ascending `ranks`: neighbours differ little in cost and in energy.

    Example:
        >>> candidate_ranks([2.0**-k for k in range(100)], range(1, 91), 8)
        (1, 2, 3, 4, 14, 40, 65, 90)
    """
    if len(ranks) <= count:
        return tuple(ranks)
    costs = np.asarray(ranks, np.float64)
    kept = np.cumsum(np.asarray(energies, np.float64))[np.asarray(ranks) - 1]
    gained = (kept - kept[0]) / (kept[-1] - kept[0]) if kept[-1] > kept[0] else np.zeros(len(ranks))
    # how far a rank is from the first, in energy and in cost
    position = gained + (costs - costs[0]) / (costs[-1] - costs[0])
    chosen = np.searchsorted(position, np.linspace(0, position[-1], count))
    return tuple(ranks[index] for index in np.unique(chosen).tolist())


def weight_options(
    spectrum: LayerSpectrum, ranks: Iterable[int], cost: Callable[[LayerSpectrum, int], float], scale: float = 1.0
) -> list[Option]:
    """Options of one weight: the cost, and `scale` times the error.

    First come factors, of which the choice is the rank and the error is the dropped energy; then other forms. Where
    there are such, energy in directions that do not train, dropped or not, counts a little too: else what is left of a
    budget would go into the last bits of a weight rather than into directions that learn. Not in a layer that stays
    dense, for who offers that form has no need to train it.
    """
    dropped, untrained = _tails(spectrum.rank_energies), _tails(spectrum.weight_energies)
    dropped_weight = 1 + UNTRAINED_WEIGHT if spectrum.forms else 1.0
    options = [Option(cost(spectrum, rank), scale * dropped_weight * dropped[rank], rank) for rank in ranks]
    for form in spectrum.forms:
        error = form.error + (UNTRAINED_WEIGHT * untrained[form.rank] if form.name != DENSE else 0.0)
        options.append(Option(cost(spectrum.as_form(form), form.rank), scale * error, form))
    return options


def activation_options(
    group: InputGroup, cost: Callable[[InputGroup, dict[str, int] | None], float], scale: float = 1.0
) -> list[Option]:
    """Options of one input: the exact copy (None), feature ranks, and feature with token ranks where they are known.

    The error is `scale` times the gradient energy outside the subspaces, summed over the layers that read the input;
    that of two modes is bounded by the sum over both. Options whose cost is infinite are left out.
    """
    feature, token = group.energies("feature"), group.energies("token")
    features = candidate_ranks(feature, range(1, group.in_features)) if feature else ()
    tokens = candidate_ranks(token, range(1, len(token)), TOKEN_CANDIDATES) if features and token else ()
    dropped, dropped_tokens = _tails(feature), _tails(token)
    options = [Option(cost(group, None), 0.0, None)]
    for r in features:
        options.append(Option(cost(group, {"feature": r}), scale * dropped[r], {"feature": r}))
        for t in tokens:
            ranks = {"feature": r, "token": t}
            options.append(Option(cost(group, ranks), scale * (dropped[r] + dropped_tokens[t]), ranks))
    return [option for option in options if option.cost != math.inf]


def _tails(energies: Sequence[float]) -> list[float]:
    """`tails[r] = sum(energies[r:])`."""
    ascending = np.cumsum(np.asarray(energies, np.float64)[::-1])
    return [*ascending[::-1].tolist(), 0.0]


def choose_activations(
    spectra: Sequence[LayerSpectrum],
    *,
    cost: Callable[[InputGroup, dict[str, int] | None], float],
    budget: float | None = None,
    error_bound: float | None = None,
) -> dict[str, dict[str, int] | None]:
    """Ranks of the compressed inputs alone, by `shared_input`; the error is the share of gradient energy lost.

    Args:
        spectra: All layers.
        cost: As `activation_cost` in :func:`choose_plan`.
        budget: Bound on the total cost, for the least error.
        error_bound: Bound on the error instead, for the least cost.
    """
    groups = input_groups(spectra)
    scale = _inverse(sum(sum(group.energies("feature")) for group in groups))
    chosen = _choose([activation_options(group, cost, scale) for group in groups], budget, error_bound)
    return {group.name: option.choice for group, option in zip(groups, chosen, strict=True)}


def cost_bounds(spectrum: LayerSpectrum, cost: Callable[[LayerSpectrum, int], float]) -> tuple[float, float]:
    """The least and the most that a layer can cost in any form."""
    ranks = (1, spectrum.rank_choices[-1]) if spectrum.takes_factors else ()
    costs = [option.cost for option in weight_options(spectrum, ranks, cost)]
    return min(costs), max(costs)


def choose_plan(
    spectra: Sequence[LayerSpectrum],
    *,
    weight_cost: Callable[[LayerSpectrum, int], float],
    activation_cost: Callable[[InputGroup, dict[str, int] | None], float] | None = None,
    budget: float | None = None,
    error_bound: float | None = None,
    gradient_weight: float = GRADIENT_WEIGHT,
    asked: dict[str, Any] | None = None,
) -> WasiPlan:
    """Weight and activation ranks together, under a budget of any cost that adds up over layers and inputs.

    The error is `dropped / total` weight energy, plus `UNTRAINED_WEIGHT * untrained / total` where layers have other
    forms to choose from, plus `gradient_weight * dropped / total` gradient energy. Solved twice: over ranks spread
    over :attr:`LayerSpectrum.rank_choices`, then over those around the first choice. An error bound that these cannot
    meet may take layers up to break-even.

    Args:
        spectra: All layers.
        weight_cost: Cost of a layer at a weight rank: bytes, FLOPs or seconds. For another form it is asked with that
            form's update, and with the rank of the addition, 0 for a layer that stays dense.
        activation_cost: Cost of an input at activation ranks (None: the exact copy), in the same unit; `math.inf` for
            ranks that cannot be used, such as a copy that is not smaller than the exact one
            (:func:`costs.input_elements`). None leaves every input exact.
        budget: Bound on the total cost, for the least error. What is spent whatever the ranks is not part of it.
        error_bound: Bound on the error instead, for the least cost.
        gradient_weight: What a share of gradient energy counts against the same share of weight energy, at least 0.
        asked: What the user asked, for `WasiPlan.budget`.

    Raises:
        InfeasibleError: If the bound cannot be met; it carries the least that can.
        ValueError: If not exactly one of `budget` and `error_bound` is given, there is no layer, or a cost is not
            finite.

    Example:
        >>> spectrum = LayerSpectrum("fc", 64, 64, "fc", tuple(2.0**-k for k in range(64)))
        >>> choose_plan([spectrum], weight_cost=lambda layer, rank: 4 * 128 * rank, budget=3000).layers[0].weight_rank
        4
    """
    groups = input_groups(spectra)
    weight_scale, gradient_scale = _error_scales(spectra, groups, gradient_weight)
    inputs = []
    if activation_cost is not None:
        inputs = [activation_options(group, activation_cost, gradient_scale) for group in groups]

    def solve(ranks: Iterable[Iterable[int]]) -> list[Option]:
        weights = [weight_options(s, r, weight_cost, weight_scale) for s, r in zip(spectra, ranks, strict=True)]
        return _choose([*weights, *inputs], budget, error_bound)

    def solve_twice(choices: Sequence[tuple[int, ...]]) -> tuple[list[Option], list[Option]]:
        spread = [candidate_ranks(s.rank_energies, ranks) for s, ranks in zip(spectra, choices, strict=True)]
        first = solve(spread)
        return first, solve(map(_around, spectra, choices, spread, (option.choice for option in first)))

    choices = [spectrum.rank_choices for spectrum in spectra]
    try:
        first, second = solve_twice(choices)
    except InfeasibleError:  # an error bound may need what lies between the last aligned rank and break-even
        last = [spectrum.largest_rank for spectrum in spectra]
        first, second = solve_twice([(*c, r) if c and r > c[-1] else c for c, r in zip(choices, last, strict=True)])
    goal = 1 if error_bound is None else 0  # Option.error, Option.cost
    chosen = min(second, first, key=lambda options: math.fsum(option[goal] for option in options))
    weights = {spectrum.name: option.choice for spectrum, option in zip(spectra, chosen, strict=False)}
    activation_ranks = {
        group.name: option.choice for group, option in zip(groups, chosen[len(spectra) :], strict=False)
    }
    return build_plan(spectra, weights, activation_ranks, asked or {})


def plan_error(spectra: Sequence[LayerSpectrum], plan: WasiPlan, gradient_weight: float = GRADIENT_WEIGHT) -> float:
    """The error that :func:`choose_plan` makes small, of a plan for all of these layers.

    Of spectra without other forms it is what is lost at the start, whatever the forms of the plan.
    """
    layers = {layer.name: layer for layer in plan.layers}
    weights = sum(_lost(spectrum, layers[spectrum.name]) for spectrum in spectra)
    groups, inputs = input_groups(spectra), 0.0
    for group in groups:
        for mode, rank in (layers[group.spectra[0].name].activation_ranks or {}).items():
            inputs += _tails(group.energies(mode))[rank]
    weight_scale, gradient_scale = _error_scales(spectra, groups, gradient_weight)
    return weight_scale * weights + gradient_scale * inputs


def least_error_of(spectra: Sequence[LayerSpectrum]) -> float:
    """The error of the best plan that no budget bounds."""
    least = 0.0
    for spectrum in spectra:
        ranks = spectrum.rank_choices[-1:]
        least += min(option.error for option in weight_options(spectrum, ranks, lambda *_: 0.0))
    return _error_scales(spectra, [], 0.0)[0] * least


def _lost(spectrum: LayerSpectrum, layer: LayerPlan) -> float:
    if layer.form == DENSE:
        return 0.0
    untrained_weight = UNTRAINED_WEIGHT if spectrum.forms else 0.0
    if layer.form == FACTORS:
        return (1 + untrained_weight) * _tails(spectrum.rank_energies)[layer.weight_rank]
    rounded = {**spectrum.rounding_errors, ExactResidual.name: 0.0}[layer.form]
    return rounded + untrained_weight * _tails(spectrum.weight_energies)[layer.weight_rank]


def _error_scales(
    spectra: Sequence[LayerSpectrum], groups: Sequence[InputGroup], gradient_weight: float
) -> tuple[float, float]:
    """What a unit of dropped weight energy, and one of dropped gradient energy, counts in the error of a plan."""
    weight_energy = sum(sum(spectrum.weight_energies) for spectrum in spectra)
    gradient_energy = sum(sum(group.energies("feature")) for group in groups)
    return _inverse(weight_energy), gradient_weight * _inverse(gradient_energy)


def _choose(items: list[list[Option]], budget: float | None, error_bound: float | None) -> list[Option]:
    if error_bound is None and budget is not None:
        return least_error(items, budget)
    if error_bound is not None and budget is None:
        return least_cost(items, error_bound)
    raise ValueError(f"give either budget or error_bound, got budget={budget!r} and error_bound={error_bound!r}.")


def _around(
    spectrum: LayerSpectrum, choices: tuple[int, ...], candidates: tuple[int, ...], chosen: int | Form
) -> Sequence[int]:
    """About :data:`CANDIDATES` of the choices between the candidates next to a rank, with itself.

    All candidates where another form was chosen.
    """
    if isinstance(chosen, Form):
        return candidates
    rank = chosen
    index = candidates.index(rank)
    low = choices.index(candidates[max(index - 1, 0)])
    high = choices.index(candidates[min(index + 1, len(candidates) - 1)])
    ranks = {rank, *choices[low : high + 1 : max(1, (high - low) // CANDIDATES)]}
    if rank == 1:  # below the first aligned rank, no other is aligned either
        ranks.update(range(1, spectrum.aligned_ranks.start))
    return sorted(ranks)


def _inverse(total: float) -> float:
    return 1 / total if total > 0 else 0.0
