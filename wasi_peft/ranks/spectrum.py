"""What calibration knows of layers, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..forms.residual import RESIDUALS, ExactResidual
from ..updates import DEFAULT_UPDATE, RESIDUAL_UPDATE, Update, make_update
from ..updates.costs import break_even_rank, dense_elements, rank_step

DENSE, FACTORS = "dense", "factors"  # forms of a layer in a plan, beside the residuals


class Form(NamedTuple):
    """What can become of a layer's weight instead of factors: a residual with an addition of rank K, or nothing.

    Attributes:
        name: "dense", or that of a residual.
        rank: K of the addition; 0 for a dense layer, which stays as it is and does not train.
        error: What rounding loses, in the unit of the layer's energies, whatever K is.
        update: What trains, and so what it costs. A dense layer costs what an exact residual with an addition of rank
            0 does.
    """

    name: str
    rank: int
    error: float
    update: Update


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
            rank K loses `sum(weight_energies[K + side_rank:])`.
        gradient_energies: The same for the weight gradient and the ranks of the compressed input, by mode: "feature",
            and "token" where every batch had the same number of tokens. Empty where gradients were not collected.
        update: What is going to train, which says what a rank costs. Directions that train beside the K of the weight
            start from those after them.
        rounding_errors: What is lost when the weight is rounded to a residual, by its name, in the same unit.
        bytes_per_element: Of the dense weight, and of factors.
        forms: What the layer may become instead of factors.
        takes_factors: Whether factors may take its place.
        experts: How many weights of this size it has, which get one rank: packed experts have one each.

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
    update: Update = field(default_factory=lambda: make_update(DEFAULT_UPDATE))
    rounding_errors: dict[str, float] = field(default_factory=dict)
    bytes_per_element: int = 4
    forms: tuple[Form, ...] = ()
    takes_factors: bool = True
    experts: int = 1

    def __post_init__(self) -> None:
        check_layer(self.name, self.out_features, self.in_features)
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
        for residual, error in self.rounding_errors.items():
            if not math.isfinite(error) or error < 0:
                raise ValueError(f"{self.name}: the error of {residual} must be finite and at least 0, got {error!r}.")

    @property
    def side_rank(self) -> int:
        """Directions that train beside the K of this layer."""
        return self.update.side_rank_of(self.out_features, self.in_features)

    @property
    def rank_energies(self) -> tuple[float, ...]:
        """What each rank adds to what the trained directions alone would keep, then zeros, (min(out, in),)."""
        return self.weight_energies[self.side_rank :] + (0.0,) * self.side_rank

    @property
    def largest_rank(self) -> int:
        """Largest rank worth considering: the last that saves anything, 1 where none does."""
        return max(1, self.update.break_even_rank(self.out_features, self.in_features))

    def stored_bytes(self, rank: int) -> int:
        """Bytes that the layer stores at rank K."""
        each = self.update.stored_bytes(self.out_features, self.in_features, rank, self.bytes_per_element)
        return self.experts * each

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.experts * dense_elements(self.out_features, self.in_features) * self.bytes_per_element

    def as_form(self, form: Form) -> LayerSpectrum:
        """The same layer in another form, for what asks what a rank costs."""
        return replace(self, update=form.update)

    def as_planned(self, form: str) -> LayerSpectrum:
        """The same layer in one of its forms, by name."""
        return next((self.as_form(other) for other in self.forms if other.name == form), self)

    @property
    def aligned_ranks(self) -> range:
        """Ranks K up to the largest for which `K + side_rank` is a multiple of :func:`costs.rank_step`.

        Every rank where the update leaves no room for such a multiple.
        """
        step = rank_step(self.out_features, self.in_features)
        first = step - self.side_rank % step
        if first > self.largest_rank:
            first = step = 1
        return range(first, self.largest_rank + 1, step)

    @property
    def rank_choices(self) -> tuple[int, ...]:
        """Ranks to choose from: the aligned ones, and 1 where even the first of them may be too much."""
        return tuple(sorted({1, *self.aligned_ranks})) if self.takes_factors else ()


def addition_ranks(out_features: int, in_features: int) -> tuple[int, ...]:
    """K to choose from beside a residual: one, and one and a half, times powers of 2, up to break-even.

    From :func:`costs.rank_step` on, and multiples of it.

    Example:
        >>> addition_ranks(384, 1536), addition_ranks(8, 8)
        ((16, 32, 48, 64, 96, 128, 192, 256), (1, 2, 3))
    """
    step, largest = rank_step(out_features, in_features), break_even_rank(out_features, in_features)
    powers = [2**power for power in range(max(1, largest // step).bit_length())]
    multiples = sorted({1, *powers, *(3 * power // 2 for power in powers[1:])})
    return tuple(step * multiple for multiple in multiples if multiple == 1 or step * multiple <= largest)


def with_forms(
    spectra: Sequence[LayerSpectrum],
    forms: Sequence[str],
    rank: int | None,
    update: str,
    update_rank: int | None = None,
) -> list[LayerSpectrum]:
    """Spectra of layers that may take these forms.

    Args:
        spectra: All layers.
        forms: "factors", "dense", names of residuals. A residual of which a layer does not know the error is not
            offered to it.
        rank: K beside a residual, as far as a layer has it; None for any of :func:`addition_ranks`.
        update: What trains beside a residual.
        update_rank: Of that.
    """
    offered = []
    for spectrum in spectra:
        sizes = spectrum.out_features, spectrum.in_features
        ranks = addition_ranks(*sizes) if rank is None else (min(rank, *sizes),)
        errors = {**spectrum.rounding_errors, ExactResidual.name: 0.0}
        others = [
            Form(name, K, errors[name], make_update(update, update_rank, name))
            for name in forms
            if name in RESIDUALS and name in errors
            for K in ranks
        ]
        if DENSE in forms:
            others.append(Form(DENSE, 0, 0.0, make_update(RESIDUAL_UPDATE, None, ExactResidual.name)))
        takes_factors = FACTORS in forms or not others
        offered.append(replace(spectrum, forms=tuple(others), takes_factors=takes_factors))
    return offered


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


def check_layer(name: Any, out_features: Any, in_features: Any) -> None:
    """Raises a ValueError unless a layer has a name and sizes."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a layer's name must be a string that is not empty, got {name!r}.")
    check_whole(f"{name}: out_features", out_features)
    check_whole(f"{name}: in_features", in_features)


def check_whole(what: str, value: Any, largest: float = math.inf) -> None:
    """Raises a ValueError unless a value is an integer from 1 to the largest."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        bounds = "a positive integer" if largest == math.inf else f"an integer from 1 to {largest}"
        raise ValueError(f"{what} must be {bounds}, got {value!r}.")
