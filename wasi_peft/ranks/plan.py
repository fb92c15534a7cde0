"""Plans: a form and a rank for every layer, as plain data that people may edit."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..files.whole import whole_file
from ..forms.residual import RESIDUALS
from ..memory.modes import MEMORY_MODES
from ..updates import DEFAULT_UPDATE, RESIDUAL_UPDATE, UPDATES, Update, make_update
from ..updates.costs import dense_elements
from .spectrum import DENSE, FACTORS, Form, LayerSpectrum, check_layer, check_whole

FORMAT = 2
FORMS = (FACTORS, *RESIDUALS, DENSE)
LEAST_KEPT = 1e-9  # of a layer's energy, as plans say it: what is kept is above 0
_ACTIVATION_MODES = ("feature", "token", "batch")


# -------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: its form, its weight rank and the ranks of its compressed input.

    Args:
        name: Full module name in the base model.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        weight_rank: K of the factors, or of the addition to a residual, from 1 to min(out_features, in_features), or
            0 for a dense layer.
        activation_ranks: Ranks by mode, for instance {"feature": 48}; None keeps the exact input, or what the form
            keeps of it. Of factors only.
        kept_energy: Share of the weight energy kept, in (0, 1].
        form: "factors", which replace the weight; the name of a residual, "int8", "int4" or "exact", beside which an
            addition trains; or "dense", for a layer that stays as it is and does not train.
        experts: How many weights of this size it has, all in one form and of one rank: packed experts.

    Raises:
        ValueError: If a value is outside its range.
    """

    name: str
    out_features: int
    in_features: int
    weight_rank: int
    activation_ranks: dict[str, int] | None
    kept_energy: float
    form: str = FACTORS
    experts: int = 1

    def __post_init__(self) -> None:
        check_layer(self.name, self.out_features, self.in_features)
        check_whole(f"{self.name}: experts", self.experts)
        if self.form not in FORMS:
            raise ValueError(f"{self.name}: form must be one of {list(FORMS)}, got {self.form!r}.")
        if self.form != DENSE:
            check_whole(f"{self.name}: weight_rank", self.weight_rank, min(self.out_features, self.in_features))
        elif type(self.weight_rank) is not int or self.weight_rank != 0:
            raise ValueError(f"{self.name}: weight_rank of a dense layer must be 0, got {self.weight_rank!r}.")
        ranks = self.activation_ranks
        if ranks is not None and self.form != FACTORS:
            raise ValueError(f"{self.name}: activation_ranks are of factors only, got {ranks!r} with {self.form!r}.")
        if ranks is not None:
            if not isinstance(ranks, dict) or "feature" not in ranks or not set(ranks) <= set(_ACTIVATION_MODES):
                raise ValueError(
                    f"{self.name}: activation_ranks must name 'feature' and any of {list(_ACTIVATION_MODES[1:])}, or "
                    f"be null for the exact input, got {ranks!r}."
                )
            for mode, rank in ranks.items():
                largest = self.in_features if mode == "feature" else math.inf
                check_whole(f"{self.name}: activation_ranks[{mode!r}]", rank, largest)
        kept = self.kept_energy
        if isinstance(kept, bool) or not isinstance(kept, (int, float)) or not 0 < kept <= 1:
            raise ValueError(f"{self.name}: kept_energy must be a number in (0, 1], got {kept!r}.")

    @property
    def residual(self) -> str | None:
        """Name of the frozen weight beside the factors, None for none."""
        return self.form if self.form in RESIDUALS else None


@dataclass(frozen=True)
class WasiPlan:
    """Form and ranks of every layer, and what was asked. `str()` gives a table; the JSON may be edited by hand.

    Args:
        layers: One entry per layer, those that stay dense included.
        budget: What was asked, plain data for the reader; nothing is computed from it.
        memory_mode: The mode that the plan was made for, if its budget depends on that. A configuration with the plan
            takes it, unless it names another one.
        update: The update of factors that the plan was made for; a configuration with the plan takes it in the same
            way.
        update_rank: Directions that the update trains beside the factors, None for an update without any.
        residual_update: The update of additions to residuals; "addition" for None.
        bytes_per_element: Of dense weights, and of factors.
        frozen_dtype: In what factors that do not train are stored, None for parameters; of the update.

    Raises:
        ValueError: If no layer is to be replaced, a name appears twice, `budget` is not a dict of JSON values, the
            mode or an update is unknown, or its rank is not the update's.

    Example:
        >>> plan = WasiPlan((LayerPlan("fc1", 8, 8, 2, {"feature": 3}, 0.9),), {"weight_share": 0.5})
        >>> plan.kept_share
        0.5
        >>> WasiPlan.from_dict(plan.to_dict()) == plan
        True
    """

    layers: tuple[LayerPlan, ...]
    budget: dict[str, Any] = field(default_factory=dict)
    memory_mode: str | None = None
    update: str | None = None
    update_rank: int | None = None
    residual_update: str | None = None
    bytes_per_element: int = 4
    frozen_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.memory_mode not in (None, *MEMORY_MODES):
            raise ValueError(f"a plan's memory_mode must be one of {list(MEMORY_MODES)}, got {self.memory_mode!r}.")
        if self.update not in (None, *UPDATES):
            raise ValueError(f"a plan's update must be one of {list(UPDATES)}, got {self.update!r}.")
        if self.update_rank is not None:
            check_whole("a plan's update_rank", self.update_rank)
        update = self.layer_update  # raises where it does not go together with frozen_dtype
        if (self.update_rank or 0) != (0 if self.update is None else update.side_rank):
            raise ValueError(
                f"a plan's update_rank must be the number of directions that its update trains beside the factors, or "
                f"None where it trains none, got {self.update_rank!r} with {self.update!r}."
            )
        if self.residual_update not in (None, *(name for name, update in UPDATES.items() if update.takes_residual)):
            raise ValueError(
                f"a plan's residual_update must train beside a residual, or be None, got {self.residual_update!r}."
            )
        check_whole("a plan's bytes_per_element", self.bytes_per_element)
        names = [layer.name for layer in self.layers]
        if not names:
            raise ValueError("a plan must have at least one layer, got none.")
        if all(layer.form == DENSE for layer in self.layers):
            raise ValueError(f"a plan must have a layer that trains, got {len(names)} dense ones.")
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
        """Bytes of all that is stored over those of the dense weights in whose place it is."""
        return sum(map(self.stored_bytes, self.layers)) / sum(map(self.dense_bytes, self.layers))

    @property
    def layer_update(self) -> Update:
        """The update of factors that the plan was made for; the default one where it names none."""
        return make_update(self.update or DEFAULT_UPDATE, self.update_rank, None, self.frozen_dtype)

    def update_of(self, layer: LayerPlan) -> Update:
        """What of a layer trains, and how."""
        if layer.residual is None:
            return self.layer_update
        return make_update(self.residual_update or RESIDUAL_UPDATE, None, layer.residual)

    def dense_bytes(self, layer: LayerPlan) -> int:
        """Bytes of a layer's dense weight."""
        return layer.experts * dense_elements(layer.out_features, layer.in_features) * self.bytes_per_element

    def stored_bytes(self, layer: LayerPlan) -> int:
        """Bytes that a layer stores under the plan."""
        if layer.form == DENSE:
            return self.dense_bytes(layer)
        sizes = layer.out_features, layer.in_features, layer.weight_rank
        return layer.experts * self.update_of(layer).stored_bytes(*sizes, self.bytes_per_element)

    def past_break_even(self, layer: LayerPlan) -> bool:
        """Whether factors cost more memory and compute than the dense weight."""
        if layer.form != FACTORS:
            return False
        return layer.weight_rank > self.layer_update.break_even_rank(layer.out_features, layer.in_features)

    def headline(self) -> str:
        """One line for a log."""
        forms = Counter(layer.form for layer in self.layers)
        ranks = sorted(layer.weight_rank for layer in self.layers if layer.form != DENSE)
        exact = [self.input_kept(layer) for layer in self.layers].count("exact")
        asked = ", ".join(_asked(key, value) for key, value in self.budget.items())
        text = f"WASI plan for {asked}" if asked else "WASI plan"
        names = ["memory_mode"]
        names += ["update", "update_rank", "frozen_dtype"] if forms[FACTORS] else []
        names += ["residual_update"] if self.residual_update is not None else []
        for name in names:
            text += f", {name}={value!r}" if (value := getattr(self, name)) is not None else ""
        mixed = ", ".join(f"{forms[form]} {form}" for form in FORMS if forms[form])
        return (
            f"{text}: {len(self.layers)} layers{f' ({mixed})' if set(forms) != {FACTORS} else ''}, "
            f"rank {rank_range(ranks)}, {self.kept_share:.1%} of their bytes kept"
            + (f", {exact} with the exact input" if exact else "")
        )

    def input_kept(self, layer: LayerPlan) -> str:
        """What a layer keeps of its input for backward.

        Ranks by mode, "exact", "image" (K numbers a row), "8 bits", or "nothing" where the layer stays dense.
        """
        if layer.form == DENSE:
            return "nothing"
        update = self.update_of(layer)
        if (self.update is not None or layer.residual is not None) and update.keeps_image:
            return "image"
        if layer.residual is not None and RESIDUALS[layer.residual].rounds_inputs:
            return "8 bits"
        ranks = layer.activation_ranks
        return "exact" if ranks is None else ", ".join(f"{mode} {rank}" for mode, rank in ranks.items())

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'out x in':>13}  {'form':>7}  {'rank':>5}  {'energy':>6}  input"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            shape = shape if layer.experts == 1 else f"{layer.experts} x {shape}"
            note = "  costs more than dense" if self.past_break_even(layer) else ""
            energy = f"{layer.kept_energy:>6.1%}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>13}  {layer.form:>7}  {layer.weight_rank:>5}  {energy}  "
                f"{self.input_kept(layer)}{note}"
            )
        return "\n".join([*lines, self.headline()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON file."""
        entries = [asdict(layer) for layer in self.layers]
        return {
            "format": FORMAT,
            "budget": dict(self.budget),
            "memory_mode": self.memory_mode,
            "update": self.update,
            "update_rank": self.update_rank,
            "residual_update": self.residual_update,
            "bytes_per_element": self.bytes_per_element,
            "frozen_dtype": self.frozen_dtype,
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
        names = [each.name for each in fields(cls)]
        data = {"frozen_dtype": None, **data}  # which a file may leave out
        _check_keys("a plan", data, ("format", *names))
        layers = tuple(layer_plan(name, entry) for name, entry in data["layers"].items())
        return cls(layers, **{name: data[name] for name in names if name != "layers"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file; a previous one is replaced as a whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

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
    entry = {"experts": 1, **entry}  # which a file may leave out
    _check_keys(name, entry, tuple(each.name for each in fields(LayerPlan) if each.name != "name"))
    return LayerPlan(name, **entry)


def rank_range(ranks: Sequence[int]) -> str:
    """Ascending ranks in a few words.

    Example:
        >>> rank_range([32, 32]), rank_range([4, 8, 32])
        ('32', '4 to 32 (median 8)')
    """
    return f"{ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]})" if ranks[0] < ranks[-1] else f"{ranks[0]}"


def _asked(name: str, value: Any) -> str:
    """A budget as a person reads it."""
    if name == "peak_bytes" and isinstance(value, (int, float)):
        return f"a peak of {readable_bytes(value)}"
    return f"{name}={value}"


def readable_bytes(size: float, whole: Callable[[float], int] = round) -> str:
    """Bytes as a person reads them, with one decimal.

    Args:
        size: Bytes.
        whole: How the last digit is rounded.

    Example:
        >>> readable_bytes(1.5 * 2**20), readable_bytes(1000), readable_bytes(1000, math.floor)
        ('1.5 MiB', '1.0 KiB', '0.9 KiB')
    """
    unit, divisor = ("MiB", 2**20) if size >= 2**20 else ("KiB", 2**10)
    return f"{whole(10 * size / divisor) / 10:,.1f} {unit}"


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
    weights: Mapping[str, int | Form],
    activation_ranks: Mapping[str, dict[str, int] | None],
    budget: dict[str, Any],
) -> WasiPlan:
    """A plan from what was chosen before.

    Args:
        spectra: All layers.
        weights: K of factors, or another form, by layer name.
        activation_ranks: Ranks of the compressed input by `shared_input`; inputs that are not named stay exact.
        budget: What was asked.
    """
    layers, updates = [], set()
    for spectrum in spectra:
        chosen, ranks = weights[spectrum.name], activation_ranks.get(spectrum.shared_input)
        total = sum(spectrum.weight_energies)
        sizes = spectrum.out_features, spectrum.in_features
        if isinstance(chosen, Form):
            kept = min(1.0, max(LEAST_KEPT, 1 - chosen.error / total)) if total else 1.0
            layers.append(LayerPlan(spectrum.name, *sizes, chosen.rank, None, kept, chosen.name, spectrum.experts))
            updates |= {chosen.update.name} if chosen.name != DENSE else set()
            continue
        directions = chosen + spectrum.side_rank
        kept = min(1.0, sum(spectrum.weight_energies[:directions]) / total) if total else 1.0
        ranks = None if ranks is None else dict(ranks)
        layers.append(LayerPlan(spectrum.name, *sizes, chosen, ranks, kept, experts=spectrum.experts))
    return WasiPlan(
        tuple(layers),
        budget,
        residual_update=next(iter(updates), None),
        bytes_per_element=spectra[0].bytes_per_element if spectra else 4,
    )
