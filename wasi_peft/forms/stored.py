"""What a file holds of a compressed layer: names, shapes and dtypes of its tensors.

Under the name of the dense weight is a tensor of another shape: who does not know the format stops there, instead of
starting from random numbers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .cored import CoredLinear
from .factored import FactoredLinear
from .frozen import FROZEN
from .residual import RESIDUALS, ExactResidual, Layout, Residual, ResidualLinear
from .split import SplitLinear

FACTORS = "factors"
FACTORED: dict[str, type[FactoredLinear]] = {FACTORS: FactoredLinear, "split": SplitLinear, "core": CoredLinear}
STORABLE: dict[str, type[Residual]] = {name: kind for name, kind in RESIDUALS.items() if name != ExactResidual.name}
WEIGHT = "weight"  # name of the tensor that lies where the dense weight would
_OWN = "wasi_"  # begins the names of the others


class StoredForm(NamedTuple):
    """What a compressed layer stores, as configurations name it.

    Attributes:
        form: 'factors', the name of a residual in few bits, or, where factors are in few bits, 'split' for two pairs
            of them and 'core' for two with a small matrix between them.
        rank: Directions of the factors K, 0 for none beside a residual.
        side_rank: Directions of the other pair of 'split'.
        bits: What the factors L and R are stored as (:data:`frozen.FROZEN`), by name; others are parameters.
    """

    form: str
    rank: int
    side_rank: int = 0
    bits: Mapping[str, str] = MappingProxyType({})

    def entry(self) -> dict[str, Any]:
        """The same for JSON: what is as usual is left out."""
        further = {"side_rank": self.side_rank, "bits": dict(self.bits)}
        return {"form": self.form, "rank": self.rank, **{key: value for key, value in further.items() if value}}


class FactorTensor(NamedTuple):
    """A tensor of factors in a file: the part of the form that it is, or `part.buffer`; None for the model's dtype."""

    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def factor_tensors(stored: StoredForm, shape: tuple[int, ...]) -> dict[str, FactorTensor]:
    """The tensors of factors by their names in a file; arguments as of :func:`stored_layout`."""
    *experts, out_features, in_features = shape
    sizes = FACTORED[stored.form].part_shapes(out_features, in_features, stored.rank, side_rank=stored.side_rank)
    tensors = {}
    for part, size in sizes.items():
        if part in stored.bits:
            for buffer, (inner, dtype) in FROZEN[stored.bits[part]].layout(*size).items():
                tensors[f"{_OWN}{part}_{buffer}"] = FactorTensor(f"{part}.{buffer}", inner, dtype)
        else:
            tensors[f"{_OWN}{part}"] = FactorTensor(part, (*experts, *size), None)
    first = next(name for name, tensor in tensors.items() if tensor.place.startswith("R"))
    return {WEIGHT if name == first else name: tensor for name, tensor in tensors.items()}


def residual_tensors(form: str, shape: tuple[int, ...]) -> dict[str, str]:
    """Names in a file of the buffers of a weight in few bits, by their own names."""
    first, *others = STORABLE[form].layout(*_flat(shape))
    return {first: WEIGHT, **{name: f"{_OWN}{name}" for name in others}}


def stored_layout(stored: StoredForm, shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> Layout:
    """Names, shapes and dtypes of the tensors of a compressed layer in a file.

    Args:
        stored: What it stores.
        shape: (out, in), or (E, out, in) of packed experts.
        bias: Whether there is a bias.
        dtype: Of factors and bias; files may have another floating one.

    Raises:
        ValueError: If there is no such form, no such rank, or the form has no such parts.
    """
    form, rank, side_rank, bits = stored
    *experts, out_features, in_features = shape
    forms = [*([FACTORS] if experts else FACTORED), *STORABLE]
    if form not in forms:
        raise ValueError(f"a form {'of packed experts ' if experts else ''}must be one of {forms}, got {form!r}.")
    if not (set(bits) <= set(FactoredLinear.parts) and set(bits.values()) <= set(FROZEN)):
        raise ValueError(f"bits must say of L and R which of {[*FROZEN]} they are stored as, got {dict(bits)!r}.")
    if (side_rank and FACTORED.get(form) is not SplitLinear) or (bits and (experts or form not in FACTORED)):
        raise ValueError(f"form {form!r} has no side_rank and bits like these, got {side_rank} and {dict(bits)!r}.")
    layout: Layout
    if form in FACTORED:
        tensors = factor_tensors(stored, shape)
        layout = {name: (tensor.shape, tensor.dtype or dtype) for name, tensor in tensors.items()}
    else:
        sizes = STORABLE[form].layout(*_flat(shape))
        layout = {name: sizes[buffer] for buffer, name in residual_tensors(form, shape).items()}
        if rank:
            added = FactoredLinear.part_shapes(out_features, in_features, rank)
            layout |= {f"{ResidualLinear.prefix}{name}": ((*experts, *size), dtype) for name, size in added.items()}
    return {**layout, "bias": ((out_features,), dtype)} if bias else layout


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the matrix whose rows are those of all experts, or of the only one."""
    *experts, out_features, in_features = shape
    return out_features * (experts[0] if experts else 1), in_features


# ---------------------------------------------------------------- keys

# Of a linear layer: `q_proj.weight`, `q_proj.wasi_L`. Packed experts are no layer in a dense model but a parameter:
# `experts.down_proj`, and beside it `experts.down_proj_wasi_L`.


def key_of(name: str, part: str, packed: bool) -> str:
    """The key of a tensor of a compressed layer in a file.

    Args:
        name: Of the layer, or of the packed parameter.
        part: As :func:`stored_layout` has it.
        packed: Whether it is one of packed experts.

    Example:
        >>> key_of("q_proj", "wasi_L", packed=False), key_of("experts.down_proj", "wasi_L", packed=True)
        ('q_proj.wasi_L', 'experts.down_proj_wasi_L')
    """
    if not packed:
        return f"{name}.{part}"
    return name if part == WEIGHT else f"{name}_{part}"


def layer_of(key: str, names: Container[str]) -> tuple[str, str] | None:
    """The compressed layer that a key is of and what it holds of it; None for a tensor of another module.

    Args:
        key: In a file.
        names: Of compressed layers.

    Example:
        >>> layers = {"q_proj", "experts.down_proj"}
        >>> layer_of("q_proj.bias", layers), layer_of("experts.down_proj", layers), layer_of("norm.weight", layers)
        (('q_proj', 'bias'), ('experts.down_proj', 'weight'), None)
        >>> layer_of("experts.down_proj_wasi_L", layers), layer_of("experts.down_proj_bias", layers)
        (('experts.down_proj', 'wasi_L'), None)
    """
    owner, _, part = key.rpartition(".")
    if owner in names:
        return owner, part
    stack, marked, part = key.partition(f"_{_OWN}")
    if stack in names:
        return stack, f"{_OWN}{part}" if marked else WEIGHT
    return None


def is_part(key: str) -> bool:
    """Whether a key can be nothing else than that of a compressed layer's tensor."""
    return key.rpartition(".")[2].startswith(_OWN) or f"_{_OWN}" in key
