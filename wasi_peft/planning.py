"""Chooses ranks under budgets from plain numbers: energies in, ranks out, no tensors.

Every layer offers a list of options (a weight rank, each with a cost and an error), every distinct input another one
(the ranks of its compressed copy). One option per list is a multiple-choice knapsack, solved by dynamic programming as
in WASI (arXiv 2510.09160, which chooses activation ranks that way). For weights alone, where a rank costs the same
number of parameters at any rank and dropped energy is convex in it, taking the best marginal energy per parameter is
as good and needs no grid.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .costs import break_even_rank, dense_elements, factored_elements

Floats = npt.NDArray[np.float64]

FORMAT = 1
CELLS = 2**14  # of the knapsack's grid
CANDIDATES = 32  # ranks offered per layer
TOKEN_CANDIDATES = 8
_ACTIVATION_MODES = ("feature", "token", "batch")


# -------------------------------------------------------------------- what is known of a layer


@dataclass(frozen=True)
class LayerSpectrum:
    """What calibration knows of one layer.

    Args:
        name: Full module name in the base model.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        shared_input: Name of the first layer that reads the same input tensor; the layer's own where it is alone.
        weight_energies: What is lost with each direction of the weight, descending and comparable between layers:
            rank K loses `sum(weight_energies[K:])`.
        gradient_energies: The same for the weight gradient and the ranks of the compressed input, by mode: "feature",
            and "token" where every batch had the same number of tokens. Empty where gradients were not collected.
        reserved_rank: Directions that training adds to those of the weight; they count in every budget.

    **Shape**
        - weight_energies: (min(out, in),); gradient_energies: (in,) for "feature", (N,) for "token"

    Raises:
        ValueError: If sizes do not fit, or energies are not finite, descending and non-negative.

    Example:
        >>> LayerSpectrum("fc", 2, 3, "fc", (4.0, 1.0), {"feature": (2.0, 1.0, 0.0)}).largest_rank
        1
    """

    name: str
    out_features: int
    in_features: int
    shared_input: str
    weight_energies: tuple[float, ...]
    gradient_energies: dict[str, tuple[float, ...]] = field(default_factory=dict)
    reserved_rank: int = 0

    def __post_init__(self) -> None:
        _check_layer(self.name, self.out_features, self.in_features)
        sizes = {"weight_energies": min(self.out_features, self.in_features), "feature": self.in_features}
        for mode, energies in {"weight_energies": self.weight_energies, **self.gradient_energies}.items():
            if mode not in (*sizes, "token"):
                raise ValueError(f"{self.name}: gradient_energies are of 'feature' and 'token', got {mode!r}.")
            values = np.asarray(energies, np.float64)
            if values.shape != (sizes.get(mode, len(energies)),) or not len(energies):
                raise ValueError(
                    f"{self.name}: {mode} must have {sizes.get(mode, 'some')} values, got {len(energies)}."
                )
            # directions are ordered by the input's energy: the gradient's need not descend
            ordered = mode != "weight_energies" or not (np.diff(values) > 0).any()
            if not np.isfinite(values).all() or (values < 0).any() or not ordered:
                raise ValueError(f"{self.name}: {mode} energies must be finite, descending and at least 0.")

    @property
    def largest_rank(self) -> int:
        """Largest rank worth considering: the last that saves anything, 1 where none does."""
        return max(1, break_even_rank(self.out_features, self.in_features) - self.reserved_rank)


@dataclass(frozen=True)
class InputGroup:
    """The layers that read one input tensor: they share ONE compressed copy of it, so one choice of its ranks."""

    spectra: tuple[LayerSpectrum, ...]

    @property
    def name(self) -> str:
        """`shared_input` of its layers."""
        return self.spectra[0].shared_input

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.spectra[0].in_features

    def energies(self, mode: str) -> tuple[float, ...]:
        """Gradient energies of a mode, summed over the layers; empty where one of them does not know its own."""
        each = [spectrum.gradient_energies.get(mode, ()) for spectrum in self.spectra]
        return tuple(map(sum, zip(*each, strict=True))) if len({len(one) for one in each}) == 1 else ()


def input_groups(spectra: Iterable[LayerSpectrum]) -> list[InputGroup]:
    """Group layers by the input they read, in order of first appearance.

    Raises:
        ValueError: If a name appears twice, or layers with one input differ in `in_features`.
    """
    names: set[str] = set()
    groups: dict[str, list[LayerSpectrum]] = {}
    for spectrum in spectra:
        if spectrum.name in names:
            raise ValueError(f"layer names must be unique, got {spectrum.name!r} twice.")
        names.add(spectrum.name)
        group = groups.setdefault(spectrum.shared_input, [])
        group.append(spectrum)
        if spectrum.in_features != group[0].in_features:
            raise ValueError(
                f"{spectrum.name}: layers that share an input must have the same in_features, got "
                f"{spectrum.in_features} and {group[0].in_features} ({group[0].name})."
            )
    return [InputGroup(tuple(group)) for group in groups.values()]


def _check_layer(name: Any, out_features: Any, in_features: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a layer's name must be a string that is not empty, got {name!r}.")
    _check_whole(f"{name}: out_features", out_features)
    _check_whole(f"{name}: in_features", in_features)


def _check_whole(what: str, value: Any, largest: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        bounds = "a positive integer" if largest == math.inf else f"an integer from 1 to {largest}"
        raise ValueError(f"{what} must be {bounds}, got {value!r}.")


# -------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: its weight rank and the ranks of its compressed input.

    Args:
        name: Full module name in the base model.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        weight_rank: K, from 1 to min(out_features, in_features).
        activation_ranks: Ranks by mode, for instance {"feature": 48}; None keeps the exact input.
        kept_energy: Share of the weight energy kept at that rank, in (0, 1].

    Raises:
        ValueError: If a value is outside its range.
    """

    name: str
    out_features: int
    in_features: int
    weight_rank: int
    activation_ranks: dict[str, int] | None
    kept_energy: float

    def __post_init__(self) -> None:
        _check_layer(self.name, self.out_features, self.in_features)
        _check_whole(f"{self.name}: weight_rank", self.weight_rank, min(self.out_features, self.in_features))
        ranks = self.activation_ranks
        if ranks is not None:
            if not isinstance(ranks, dict) or "feature" not in ranks or not set(ranks) <= set(_ACTIVATION_MODES):
                raise ValueError(
                    f"{self.name}: activation_ranks must name 'feature' and any of {list(_ACTIVATION_MODES[1:])}, or "
                    f"be null for the exact input, got {ranks!r}."
                )
            for mode, rank in ranks.items():
                largest = self.in_features if mode == "feature" else math.inf
                _check_whole(f"{self.name}: activation_ranks[{mode!r}]", rank, largest)
        kept = self.kept_energy
        if isinstance(kept, bool) or not isinstance(kept, (int, float)) or not 0 < kept <= 1:
            raise ValueError(f"{self.name}: kept_energy must be a number in (0, 1], got {kept!r}.")

    @property
    def past_break_even(self) -> bool:
        """Whether the factors cost more memory and compute than the dense weight."""
        return self.weight_rank > break_even_rank(self.out_features, self.in_features)


@dataclass(frozen=True)
class WasiPlan:
    """Ranks of every layer, and what was asked. `str()` gives a table; the JSON may be edited by hand.

    Args:
        layers: One entry per layer to replace.
        budget: What was asked, plain data for the reader; nothing is computed from it.

    Raises:
        ValueError: If there is no layer, a name appears twice, or `budget` is not a dict of JSON values.

    Example:
        >>> plan = WasiPlan((LayerPlan("fc1", 8, 8, 2, {"feature": 3}, 0.9),), {"weight_share": 0.5})
        >>> plan.kept_share
        0.5
        >>> WasiPlan.from_dict(plan.to_dict()) == plan
        True
    """

    layers: tuple[LayerPlan, ...]
    budget: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names:
            raise ValueError("a plan must have at least one layer, got none.")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"a plan must name every layer once, got {repeated!r} twice.")
        try:
            plain = isinstance(self.budget, dict) and json.loads(json.dumps(self.budget)) == self.budget
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise ValueError(f"a plan's budget must be a dict of JSON values, got {self.budget!r}.")

    @property
    def kept_share(self) -> float:
        """Elements of all factors over elements of all dense weights they replace."""
        kept = sum(factored_elements(x.out_features, x.in_features, x.weight_rank) for x in self.layers)
        return kept / sum(dense_elements(x.out_features, x.in_features) for x in self.layers)

    def headline(self) -> str:
        """One line for a log."""
        ranks = sorted(layer.weight_rank for layer in self.layers)
        exact = sum(layer.activation_ranks is None for layer in self.layers)
        asked = ", ".join(f"{key}={value}" for key, value in self.budget.items())
        text = f"WASI plan for {asked}" if asked else "WASI plan"
        return (
            f"{text}: {len(ranks)} layers, rank {ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]}), "
            f"{self.kept_share:.1%} of their weights kept" + (f", {exact} with the exact input" if exact else "")
        )

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'out x in':>13}  {'rank':>5}  {'energy':>6}  input"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            ranks = "exact"
            if layer.activation_ranks is not None:
                ranks = ", ".join(f"{mode} {rank}" for mode, rank in layer.activation_ranks.items())
            note = "  costs more than dense" if layer.past_break_even else ""
            energy = f"{layer.kept_energy:>6.1%}"
            lines.append(f"{layer.name:<{width}}  {shape:>13}  {layer.weight_rank:>5}  {energy}  {ranks}{note}")
        return "\n".join([*lines, self.headline()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON file."""
        entries = [asdict(layer) for layer in self.layers]
        return {
            "format": FORMAT,
            "budget": dict(self.budget),
            "layers": {entry.pop("name"): entry for entry in entries},
        }

    @classmethod
    def from_dict(cls, data: Any) -> WasiPlan:
        """The plan that :meth:`to_dict` gave.

        Raises:
            ValueError: If the format is another, a key is missing or unknown, or a value is outside its range.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise ValueError(f"a plan must be a dict with the dict 'layers', got {_shortened(data)}.")
        if type(data.get("format")) is not int or data["format"] != FORMAT:
            raise ValueError(f"a plan must have format {FORMAT}, got {data.get('format')!r}.")
        _check_keys("a plan", data, ("format", "budget", "layers"))
        return cls(tuple(layer_plan(name, entry) for name, entry in data["layers"].items()), data["budget"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file; a previous one is replaced as a whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        temporary = f"{os.fspath(path)}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WasiPlan:
        """Read a JSON file.

        Raises:
            ValueError: If it is not JSON, names a key twice, or is not what :meth:`from_dict` takes.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict(json.load(file, object_pairs_hook=_unique_keys))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def layer_plan(name: str, entry: Any) -> LayerPlan:
    """One layer from its entry in a plan's "layers".

    Raises:
        ValueError: If a key is missing or unknown, or a value is outside its range.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: a layer of a plan must be a dict, got {_shortened(entry)}.")
    _check_keys(name, entry, ("out_features", "in_features", "weight_rank", "activation_ranks", "kept_energy"))
    return LayerPlan(name, **entry)


def _check_keys(where: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
    wrong = sorted(set(known).symmetric_difference(map(str, data)))
    if wrong:
        problem = "misses" if wrong[0] in known else "has the unknown key"
        raise ValueError(f"{where} must have the keys {list(known)}; it {problem} {wrong[0]!r}.")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = next((key for key in keys if keys.count(key) > 1), None)
    if repeated is not None:
        raise ValueError(f"every key must appear once, got {repeated!r} twice.")
    return dict(pairs)


def build_plan(
    spectra: Sequence[LayerSpectrum],
    weight_ranks: Mapping[str, int],
    activation_ranks: Mapping[str, dict[str, int] | None],
    budget: dict[str, Any],
) -> WasiPlan:
    """A plan from ranks chosen before.

    Args:
        spectra: All layers.
        weight_ranks: K by layer name.
        activation_ranks: Ranks of the compressed input by `shared_input`; inputs that are not named stay exact.
        budget: What was asked.
    """
    layers = []
    for spectrum in spectra:
        rank, ranks = weight_ranks[spectrum.name], activation_ranks.get(spectrum.shared_input)
        total = sum(spectrum.weight_energies)
        kept = min(1.0, sum(spectrum.weight_energies[:rank]) / total) if total else 1.0
        sizes = spectrum.out_features, spectrum.in_features
        layers.append(LayerPlan(spectrum.name, *sizes, rank, None if ranks is None else dict(ranks), kept))
    return WasiPlan(tuple(layers), budget)


# -------------------------------------------------------------------- weights alone


def allocate_ranks(spectra: Sequence[LayerSpectrum], share: float) -> dict[str, int]:
    """Weight ranks of all layers under one budget of parameters, `sum K (out + in) <= share * sum out * in`.

    Every layer gets rank 1; then the direction with the most energy per parameter, `e_k / (out + in)`, is taken as
    long as it fits, never past break-even. Because energies descend, dropped energy is convex in the rank, and the
    result is optimal but for the first direction that did not fit: no other allocation keeps more than its energy on
    top. What it leaves over goes to cheaper directions further down. Directions without energy are never taken.

    Args:
        spectra: All layers, with comparable weight energies.
        share: Parameters of all factors over those of all dense weights, in (0, 1].

    Returns:
        Rank by layer name. The total is smaller than the share where all layers reach break-even first.

    Raises:
        ValueError: If the share is outside (0, 1], or not even rank 1 everywhere fits.

    Example:
        >>> one = LayerSpectrum("one", 8, 8, "one", (9.0, 8.0, 7.0, 0.1, 0.0, 0.0, 0.0, 0.0))
        >>> other = LayerSpectrum("other", 8, 8, "other", (9.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        >>> allocate_ranks([one, other], 0.5)
        {'one': 3, 'other': 1}
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"share must be a number in (0, 1], got {share!r}.")
    input_groups(spectra)  # refuses repeated names
    dense = sum(dense_elements(spectrum.out_features, spectrum.in_features) for spectrum in spectra)
    prices = [factored_elements(spectrum.out_features, spectrum.in_features, 1) for spectrum in spectra]
    least = sum(price * (1 + spectrum.reserved_rank) for price, spectrum in zip(prices, spectra, strict=True))
    left = share * dense - least
    if left < 0:
        raise ValueError(
            f"share must be at least {least / dense:.4g} (rank 1 in every layer, and what a low-rank update takes), "
            f"got {share!r}."
        )
    gains, layers = [np.zeros(0)], [np.zeros(0, np.int64)]
    for index, spectrum in enumerate(spectra):
        energies = np.asarray(spectrum.weight_energies[1 : spectrum.largest_rank], np.float64)
        gains.append(energies[energies > 0] / prices[index])
        layers.append(np.full(len(gains[-1]), index))
    order = np.argsort(-np.concatenate(gains), kind="stable")
    ranks = [1] * len(spectra)
    for index in np.concatenate(layers)[order].tolist():
        # a layer whose next direction did not fit gets no later one either: they cost the same
        if prices[index] <= left:
            left -= prices[index]
            ranks[index] += 1
    return {spectrum.name: rank for spectrum, rank in zip(spectra, ranks, strict=True)}


# -------------------------------------------------------------------- multiple-choice knapsack


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
        raise ValueError(f"every item must have options with finite cost and error, got {_shortened(pairs)}.")
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


# -------------------------------------------------------------------- weights and activations together


def candidate_ranks(energies: Sequence[float], largest: int, count: int = CANDIDATES) -> tuple[int, ...]:
    """About `count` ranks from 1 to `largest`: neighbours differ little in cost and in energy.

    Example:
        >>> candidate_ranks([2.0**-k for k in range(100)], 90, 8)
        (1, 2, 3, 4, 14, 40, 65, 90)
    """
    if largest <= count:
        return tuple(range(1, largest + 1))
    kept = np.cumsum(np.asarray(energies[:largest], np.float64))
    gained = (kept - kept[0]) / (kept[-1] - kept[0]) if kept[-1] > kept[0] else np.zeros(largest)
    position = gained + np.linspace(0, 1, largest)  # how far a rank is from 1, in energy and in cost
    chosen = np.searchsorted(position, np.linspace(0, position[-1], count))
    return tuple(int(index) + 1 for index in np.unique(chosen))


def weight_options(
    spectrum: LayerSpectrum, ranks: Iterable[int], cost: Callable[[LayerSpectrum, int], float], scale: float = 1.0
) -> list[Option]:
    """Options of one weight: cost and `scale` times the dropped energy at each rank; the choice is the rank."""
    dropped = _tails(spectrum.weight_energies)
    return [Option(cost(spectrum, rank), scale * dropped[rank], rank) for rank in ranks]


def activation_options(
    group: InputGroup, cost: Callable[[InputGroup, dict[str, int] | None], float], scale: float = 1.0
) -> list[Option]:
    """Options of one input: the exact copy (None), feature ranks, and feature with token ranks where they are known.

    The error is `scale` times the gradient energy outside the subspaces, summed over the layers that read the input;
    that of two modes is bounded by the sum over both. Options whose cost is infinite are left out.
    """
    feature, token = group.energies("feature"), group.energies("token")
    features = candidate_ranks(feature, group.in_features - 1) if feature else ()
    tokens = candidate_ranks(token, len(token) - 1, TOKEN_CANDIDATES) if features and token else ()
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


def choose_plan(
    spectra: Sequence[LayerSpectrum],
    *,
    weight_cost: Callable[[LayerSpectrum, int], float],
    activation_cost: Callable[[InputGroup, dict[str, int] | None], float] | None = None,
    budget: float | None = None,
    error_bound: float | None = None,
    gradient_weight: float = 0.1,
    asked: dict[str, Any] | None = None,
) -> WasiPlan:
    """Weight and activation ranks together, under a budget of any cost that adds up over layers and inputs.

    The error is `dropped / total` weight energy plus `gradient_weight * dropped / total` gradient energy. Solved
    twice: over ranks spread from 1 to break-even, then over those around the first choice.

    Args:
        spectra: All layers.
        weight_cost: Cost of a layer at a weight rank: bytes, FLOPs or seconds.
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
        5
    """
    groups = input_groups(spectra)
    weight_scale = _inverse(sum(sum(spectrum.weight_energies) for spectrum in spectra))
    gradient_scale = gradient_weight * _inverse(sum(sum(group.energies("feature")) for group in groups))
    inputs = []
    if activation_cost is not None:
        inputs = [activation_options(group, activation_cost, gradient_scale) for group in groups]

    def solve(ranks: list[Iterable[int]]) -> list[Option]:
        weights = [weight_options(s, r, weight_cost, weight_scale) for s, r in zip(spectra, ranks, strict=True)]
        return _choose([*weights, *inputs], budget, error_bound)

    spread = [candidate_ranks(spectrum.weight_energies, spectrum.largest_rank) for spectrum in spectra]
    first = solve(list(spread))
    second = solve([_around(ranks, option.choice) for ranks, option in zip(spread, first, strict=False)])
    goal = 1 if error_bound is None else 0  # Option.error, Option.cost
    chosen = min(second, first, key=lambda options: math.fsum(option[goal] for option in options))
    weight_ranks = {spectrum.name: option.choice for spectrum, option in zip(spectra, chosen, strict=False)}
    activation_ranks = {
        group.name: option.choice for group, option in zip(groups, chosen[len(spectra) :], strict=False)
    }
    return build_plan(spectra, weight_ranks, activation_ranks, asked or {})


def _choose(items: list[list[Option]], budget: float | None, error_bound: float | None) -> list[Option]:
    if error_bound is None and budget is not None:
        return least_error(items, budget)
    if error_bound is not None and budget is None:
        return least_cost(items, error_bound)
    raise ValueError(f"give either budget or error_bound, got budget={budget!r} and error_bound={error_bound!r}.")


def _around(candidates: tuple[int, ...], rank: int) -> list[int]:
    """About :data:`CANDIDATES` ranks between the candidates next to `rank`, with itself."""
    index = candidates.index(rank)
    low, high = candidates[max(index - 1, 0)], candidates[min(index + 1, len(candidates) - 1)]
    stride = max(1, (high - low) // CANDIDATES)
    return sorted({rank, *range(low, high + 1, stride)})


def _inverse(total: float) -> float:
    return 1 / total if total > 0 else 0.0
