"""Budgets of FLOPs and of seconds, of a training step's layers or of inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..cost.timing import LayerTimer
from ..ranks.knapsack import InfeasibleError
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import InputGroup, LayerSpectrum, input_groups
from ..updates import Update
from ..updates.costs import dense_forward_flops
from .fit import Problem, fit_budget


class Work(Protocol):
    """What the planned layers cost, in FLOPs or seconds; K is the weight rank, r that of the feature mode."""

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        """Forward pass of one layer, of the dense one for None."""

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        """The part of forward and backward that depends on K alone; all of it for the dense layer or exact input."""

    def compression(self, group: InputGroup, rank: int) -> float:
        """The part that depends on r alone, of all layers that read one input."""

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        """The part that depends on K and r."""


def plan_work(problem: Problem, work: Work, value: float, training: bool) -> WasiPlan:
    """A plan under a budget of FLOPs or seconds.

    Args:
        problem: All layers.
        work: What they cost.
        value: Up to 1 a share of what the dense layers cost, above 1 the absolute number.
        training: Forward and backward; otherwise the forward pass alone.

    Raises:
        InfeasibleError: If the cheapest plan costs more; it carries the least feasible value.
    """
    spectra = problem.spectra
    if training:
        dense = math.fsum(work.weight(spectrum, None, True) for spectrum in spectra)
    else:
        dense = math.fsum(work.forward(spectrum, None) for spectrum in spectra)
    unit = dense if value <= 1 else 1.0
    try:
        if not training:
            return problem.weights_alone(work.forward, budget=value * unit)
        return _plan_training(problem, work, value * unit)
    except InfeasibleError as error:
        raise InfeasibleError("work", value, error.least / unit) from error


def _plan_training(problem: Problem, work: Work, budget: float) -> WasiPlan:
    """Features alone are compressed, wherever that is possible: exact inputs and tokens save memory, not work."""
    groups = {group.name: group for group in input_groups(problem.spectra)}
    compressed = {
        name
        for name, group in groups.items()
        if group.energies("feature") and problem.kept_elements(group, {"feature": 1}) < math.inf
    }

    def weight_cost(spectrum: LayerSpectrum, rank: int) -> float:
        exact = spectrum.shared_input not in compressed or spectrum.update.residual is not None
        return work.weight(spectrum, rank, exact)

    def activation_cost(group: InputGroup, ranks: dict[str, int] | None) -> float:
        if ranks is None:
            return math.inf if group.name in compressed else 0.0
        usable = set(ranks) == {"feature"} and problem.kept_elements(group, ranks) < math.inf
        return work.compression(group, ranks["feature"]) if usable else math.inf

    def true_cost(plan: WasiPlan) -> float:
        ranks = {layer.name: layer.activation_ranks for layer in plan.layers}
        costs = [activation_cost(group, ranks[group.spectra[0].name]) for group in groups.values()]
        for spectrum, layer in zip(problem.spectra, plan.layers, strict=True):
            costs.append(weight_cost(spectrum.as_planned(layer.form), layer.weight_rank))
            if layer.activation_ranks is not None:
                costs.append(work.product(spectrum, layer.weight_rank, layer.activation_ranks["feature"]))
        return math.fsum(costs)

    return fit_budget(problem, weight_cost, activation_cost, true_cost, budget)[0]


@dataclass(frozen=True)
class Flops:
    """FLOPs, counted from the matrix products of :mod:`autograd`, :mod:`tucker` and the retraction.

    A warm basis moves every `interval` steps. The K x K work of a retraction is bounded from above.
    """

    problem: Problem
    interval: int

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        rows, sizes = self.problem.rows(spectrum), (spectrum.out_features, spectrum.in_features)
        if rank is None:
            return dense_forward_flops(rows, *sizes)
        return spectrum.update.forward_flops(rows, *sizes, rank)

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        if rank is None:
            return 3 * self.forward(spectrum, None)
        rows, sizes = self.problem.rows(spectrum), (spectrum.out_features, spectrum.in_features)
        gradient_of_x = self.forward(spectrum, rank)
        return self.forward(spectrum, rank) + gradient_of_x + spectrum.update.gradient_flops(rows, *sizes, rank, exact)

    def compression(self, group: InputGroup, rank: int) -> float:
        rows = self.problem.rows(group.spectra[0])
        flops = 2 * rows * rank * group.in_features * (1 + 2 / self.interval)
        layers = group.spectra
        return flops + sum(
            x.update.compressed_gradient_flops(rows, x.out_features, x.in_features, rank) for x in layers
        )

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        return spectrum.update.product_flops(spectrum.out_features, spectrum.in_features, weight_rank, rank)


class Seconds:
    """Seconds of a few ranks of every shape, linear in between; at least as much for a larger rank.

    Forward and backward with the rank r are taken as a part of K, measured at r = 1, and a part of r, measured at a
    middle K, so that they add up. Packed experts are as many layers, among which rows are spread evenly.
    """

    def __init__(self, problem: Problem, timer: LayerTimer) -> None:
        self._problem, self._timer = problem, timer
        self._curves: dict[Any, tuple[list[int], Any]] = {}

    def forward(self, spectrum: LayerSpectrum, rank: int | None) -> float:
        return spectrum.experts * self._layer(spectrum, rank, None, training=False)

    def weight(self, spectrum: LayerSpectrum, rank: int | None, exact: bool) -> float:
        return spectrum.experts * self._layer(spectrum, rank, None if exact else 1, training=True)

    def _layer(self, spectrum: LayerSpectrum, rank: int | None, feature_rank: int | None, training: bool) -> float:
        sizes = self._sizes(spectrum)
        if rank is None:
            return self._curve(("dense", sizes, training), [0], lambda _: self._timer.dense(*sizes, training), 0)
        update = spectrum.update
        return self._curve(
            ("factored", sizes, feature_rank, training, update, None if update.residual is None else rank),
            _spread(spectrum.rank_choices, 5) if update.residual is None else [rank],
            lambda K: self._timer.factored(*sizes, K, feature_rank, training, update),
            rank,
        )

    def compression(self, group: InputGroup, rank: int) -> float:
        points = _spread(range(1, max(2, group.in_features)), 4)
        seconds = 0.0
        for spectrum in group.spectra:
            sizes, choices, update = self._sizes(spectrum), spectrum.rank_choices or (1,), spectrum.update
            middle = choices[len(choices) // 2]

            def layer(
                r: int, sizes: tuple[int, int, int] = sizes, middle: int = middle, update: Update = update
            ) -> float:
                return self._timer.factored(*sizes, middle, r, True, update)

            key = ("gradient", sizes)
            seconds += self._curve(key, points, layer, rank) - self._curve(key, points, layer, 1)
        rows, features = self._problem.rows(group.spectra[0]), group.in_features
        return seconds + self._curve(
            ("compression", rows, features), points, lambda r: self._timer.compression(rows, features, r), rank
        )

    def product(self, spectrum: LayerSpectrum, weight_rank: int, rank: int) -> float:
        return 0.0

    def _sizes(self, spectrum: LayerSpectrum) -> tuple[int, int, int]:
        rows = max(1, self._problem.rows(spectrum) // spectrum.experts)
        return rows, spectrum.out_features, spectrum.in_features

    def _curve(self, key: Any, points: list[int], measure: Callable[[int], float], rank: int) -> float:
        if key not in self._curves:
            self._curves[key] = points, np.maximum.accumulate([measure(point) for point in points])
        return float(np.interp(rank, *self._curves[key]))


def _spread(ranks: Sequence[int], count: int) -> list[int]:
    """About `count` of the ascending ranks, the first and the last among them."""
    return sorted({ranks[int(index)] for index in np.linspace(0, len(ranks) - 1, count)})
