"""One option from each of several lists, under a bound: the multiple-choice knapsack, by dynamic programming.

WASI (arXiv 2510.09160) chooses activation ranks that way. Plain numbers, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CELLS = 2**14  # of the grid


class Option(NamedTuple):
    """One way to treat an item: its cost, its error, and what it stands for."""

    cost: float
    error: float
    choice: Any = None


class InfeasibleError(ValueError):
    """No choice meets the bound; `least` is the least value that one can."""

    def __init__(self, quantity: str, bound: float, least: float) -> None:
        super().__init__(f"the total {quantity} cannot be below {least:.6g}, got the bound {bound!r}.")
        self.least = least


def least_error(items: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option per item with the least total error among those whose total cost is at most `budget`.

    Dynamic programming over a grid of :data:`CELLS` equal steps of what the budget leaves above the cheapest choice.
    Costs are rounded up to it, so the real total never exceeds the budget. Gap: with `n` items, no choice whose cost
    is at most `budget - n * step` has a smaller error.

    Args:
        items: Options of each item; costs and errors are finite, in any unit.
        budget: Bound on the total cost.

    Returns:
        The chosen option of each item.

    Raises:
        InfeasibleError: If the cheapest choice costs more than the budget.
        ValueError: If an item has no option, or a number is not finite.

    References:
        arXiv 2510.09160 chooses activation ranks this way, from perplexities and bytes.

    Example:
        >>> items = [[Option(1, 5.0), Option(3, 1.0)], [Option(1, 9.0), Option(2, 2.0)]]
        >>> sum(option.error for option in least_error(items, 4))
        7.0
    """
    chosen = _solve([[option[:2] for option in options] for options in items], budget, "cost")
    return [options[index] for options, index in zip(items, chosen, strict=True)]


def least_cost(items: Sequence[Sequence[Option]], error_bound: float) -> list[Option]:
    """One option per item with the least total cost among those whose total error is at most `error_bound`.

    :func:`least_error` with cost and error exchanged: the same bound on the gap, in steps of error.

    Raises:
        InfeasibleError: If the best choice has a larger error.
        ValueError: If an item has no option, or a number is not finite.
    """
    chosen = _solve([[(option.error, option.cost) for option in options] for options in items], error_bound, "error")
    return [options[index] for options, index in zip(items, chosen, strict=True)]


def _solve(items: list[list[Any]], bound: float, quantity: str) -> list[int]:
    """Index of one (price, loss) pair per item: least total loss, total price at most `bound`."""
    fronts = [_undominated(pairs) for pairs in items]
    prices = [np.array([items[i][k][0] for k in front], np.float64) for i, front in enumerate(fronts)]
    losses = [np.array([items[i][k][1] for k in front], np.float64) for i, front in enumerate(fronts)]
    least = math.fsum(price[0] for price in prices)
    if not least <= bound:
        raise InfeasibleError(quantity, bound, least)
    step = (bound - least) / CELLS
    chosen = _on_grid(prices, losses, step) if step > 0 else [0] * len(items)
    _spend(prices, losses, chosen, bound)
    return [int(front[k]) for front, k in zip(fronts, chosen, strict=True)]


def _undominated(pairs: list[Any]) -> list[int]:
    """Indices of the options that no other beats in both price and loss, by ascending price."""
    if not pairs or not all(math.isfinite(number) for pair in pairs for number in pair):
        raise ValueError(f"every item must have options with finite cost and error, got {pairs[:3]!r}.")
    front: list[int] = []
    for index in sorted(range(len(pairs)), key=pairs.__getitem__):
        if not front or pairs[index][1] < pairs[front[-1]][1]:
            front.append(index)
    return front


def _on_grid(prices: list[Floats], losses: list[Floats], step: float) -> list[int]:
    """The dynamic programme; `best[t]` is the least loss so far at `t` steps above the cheapest choice."""
    best = np.zeros(CELLS + 1)
    taken = np.zeros((len(prices), CELLS + 1), np.int32)
    shifts = []
    for i, (price, loss) in enumerate(zip(prices, losses, strict=True)):
        # a little more than the quotient: its own rounding must not lose a step
        steps = np.ceil((price - price[0]) / step * (1 + 1e-9))
        shifts.append(np.minimum(steps, CELLS + 1).astype(np.int64))
        updated = best + loss[0]
        for k in range(1, len(price)):
            shift = int(shifts[-1][k])
            if shift > CELLS:
                break
            candidate = best[: CELLS + 1 - shift] + loss[k]
            better = candidate < updated[shift:]
            np.copyto(updated[shift:], candidate, where=better)
            np.copyto(taken[i, shift:], k, where=better)
        best = updated
    chosen, t = [0] * len(prices), CELLS
    for i in reversed(range(len(prices))):
        chosen[i] = int(taken[i, t])
        t -= int(shifts[i][chosen[i]])
    return chosen


def _spend(prices: list[Floats], losses: list[Floats], chosen: list[int], bound: float) -> None:
    """Use what rounding left over: switch single items, the largest gain first, while the real total allows it."""
    while True:
        total = math.fsum(price[k] for price, k in zip(prices, chosen, strict=True))
        switches = []
        for i, k in enumerate(chosen):
            # prices ascend and losses descend along a front: the last that fits is the best
            last = int(np.searchsorted(prices[i], prices[i][k] + (bound - total), side="right")) - 1
            if last > k:
                switches.append((losses[i][k] - losses[i][last], i, last))
        if not switches:
            return
        _, i, last = max(switches)
        previous, chosen[i] = chosen[i], last
        if math.fsum(price[k] for price, k in zip(prices, chosen, strict=True)) > bound:
            chosen[i] = previous
            return
