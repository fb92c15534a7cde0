"""A form in a dense layer's place without an adapter: what a compressed model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg.low_bit import RoundedRows
from .cored import CoredLinear
from .dense import FactoredWeight, is_transposed
from .factored import FactoredLinear
from .frozen import FROZEN
from .products import Thin
from .residual import RESIDUALS, ExactResidual, Layout, Residual, ResidualLinear
from .split import SplitLinear

FACTORS = "factors"
FACTORED: dict[str, type[FactoredLinear]] = {FACTORS: FactoredLinear, "split": SplitLinear, "core": CoredLinear}
Form = FactoredLinear | Residual
STORABLE = {name: kind for name, kind in RESIDUALS.items() if name != ExactResidual.name}


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


class CompressedLinear(nn.Linear):
    """A linear layer that is stored as a form: two factors, a weight in few bits, or one with factors added to it.

    A Linear for all who ask: adapters of other methods go on top of it. Its `weight` answers what is asked of a dense
    one, in the layout of a Linear, and is multiplied out on use; it cannot be assigned.

    **Shape**
        - input (..., in), output (..., out)

    Args:
        form: What is stored; taken over.

    Example:
        >>> layer = CompressedLinear(FactoredLinear(8, 6, rank=2))
        >>> isinstance(layer, nn.Linear), layer.weight.shape, sum(p.numel() for p in layer.parameters())
        (True, torch.Size([6, 8]), 34)
    """

    def __init__(self, form: Form) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = form.out_features, form.in_features
        self.form = form
        if isinstance(form, ResidualLinear):
            self.residual = form.residual  # a form refers to it and does not own it
        self.register_load_state_dict_pre_hook(_take_stored_names)

    @property
    def dense_class(self) -> type[nn.Module]:
        """The class of the dense layer whose place this one takes."""
        return self.form.dense_class

    @property
    def dtype(self) -> torch.dtype:
        """In which the layer answers."""
        weight = self.form.weight
        return weight.dtype

    @property
    def weight(self) -> FactoredWeight:  # type: ignore[override]
        """Stand-in for the dense weight, (out, in)."""
        weight = self.form.weight
        shape = (self.out_features, self.in_features)
        return FactoredWeight(shape, weight.dtype, weight.device, self.dense_weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """(out,) or None."""
        return self.form.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the {name} of a compressed layer cannot be assigned: it is kept as {self.form_name!r}. Restore the "
                "dense layers first, by model.dequantize()."
            )
        super().__setattr__(name, value)

    @property
    def form_name(self) -> str:
        """Name of what is stored (:class:`StoredForm`)."""
        return self.stored_form.form

    @property
    def stored_form(self) -> StoredForm:
        """What is stored."""
        residual, form = self.frozen, self.form
        if residual is not None:
            return StoredForm(residual.name, self.rank)
        assert isinstance(form, FactoredLinear)
        name = next(name for name, cls in FACTORED.items() if type(form) is cls)
        side_rank = len(form.A) if isinstance(form, SplitLinear) else 0
        return StoredForm(name, form.weight_rank, side_rank, _bits_of(form))

    @property
    def frozen(self) -> Residual | None:
        """The weight in few bits, None where there are factors alone."""
        form = self.form
        return form if isinstance(form, Residual) else form.residual if isinstance(form, ResidualLinear) else None

    @property
    def stored_names(self) -> dict[str, str]:
        """What the tensors are called in a file (:func:`stored_layout`), and in this layer's state dict."""
        form, residual = self.form, self.frozen
        if residual is None:
            tensors = _factor_tensors(self.stored_form, (self.out_features, self.in_features))
            names = {name: f"form.{FactoredLinear.prefix}{tensor.place}" for name, tensor in tensors.items()}
        else:
            first, *others = residual.layout(self.out_features, self.in_features)
            place = "residual" if isinstance(form, ResidualLinear) else "form"
            names = {"weight": f"{place}.{first}", **{f"wasi_{name}": f"{place}.{name}" for name in others}}
        if isinstance(form, ResidualLinear):
            names |= {form.prefix + name: f"form.{form.prefix}{name}" for name in form.parts}
        return names if self.bias is None else {**names, "bias": "form.bias"}

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are in a file (:func:`stored_layout`)."""
        state = self.state_dict()
        return {name: state[own] for name, own in self.stored_names.items()}

    @property
    def rank(self) -> int:
        """Directions of the factors, 0 where there are none."""
        return self.form.rank if isinstance(self.form, FactoredLinear) else 0

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight that this stands for, (out, in), a tensor of its own."""
        if isinstance(self.form, Residual):
            return self.form.dense_weight()
        weight = self.form.multiply_out()
        return weight.T if is_transposed(self.dense_class) else weight

    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same."""
        return self.form.to_dense().train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b` in the dtype of the layer, or in that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = self.form(x)
        return y

    def reset_parameters(self) -> None:
        """Nothing: what is stored has no values of its own to start from."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form_name}"


def _take_stored_names(layer: CompressedLinear, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Have a layer load what a file holds, as well as what its own state dict does."""
    if f"{prefix}weight" in state_dict:
        for stored, own in layer.stored_names.items():
            if prefix + stored in state_dict:
                state_dict[prefix + own] = state_dict.pop(prefix + stored)


class CompressedResidual(ExactResidual):
    """A compressed layer as the frozen weight beside the factors of adapters; it stays in place as it is."""

    rounds_inputs: ClassVar[bool] = True  # it is no exact weight either

    def __init__(self, layer: CompressedLinear) -> None:
        nn.Module.__init__(self)
        self._dense = (layer,)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.dense_class = layer.dense_class
        self._dtype = layer.dtype

    @property
    def layer(self) -> CompressedLinear:
        """The compressed layer."""
        layer = self.module
        assert isinstance(layer, CompressedLinear)
        return layer

    @property
    def form(self) -> Form:
        """What it stores."""
        return self.layer.form

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.layer.dense_weight().to(dtype or self.dtype)

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        return self.form.product(x, rounded, thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        return self.form.transposed_product(dY)


def _bits_of(form: FactoredLinear) -> dict[str, str]:
    """What the parts in few bits are stored as, by name."""
    return {part: form.frozen(part).name for part in form.parts if form.frozen(part) is not None}


def own_factors(base: nn.Module | None) -> FactoredLinear | None:
    """The two factors that a layer of a compressed model is stored as; None where there is something else."""
    form = base.form if isinstance(base, CompressedLinear) else None
    return form if type(form) is FactoredLinear else None


def base_beside(base: nn.Module) -> Residual:
    """What factors of adapters are beside where a dense or compressed layer stays in place as it is."""
    return CompressedResidual(base) if isinstance(base, CompressedLinear) else ExactResidual(base)


# ---------------------------------------------------------------- what is compressed


@torch.no_grad()
def compressed(form: FactoredLinear, dtype: torch.dtype) -> CompressedLinear | None:
    """A compressed layer that computes what an adapter's form computes; None where that would not be smaller.

    An addition to a compressed layer adds its directions to those that are there; one to a weight in few bits stays
    beside it, since rounding the sum again would lose it.

    Args:
        form: Of an adapter; not changed.
        dtype: Of factors.
    """
    if not isinstance(form, ResidualLinear):
        if _bits_of(form):
            return _in_few_bits(form, dtype)
        outer, inner = form.factors()
        if not form.shared_parts and outer.shape[1] * sum(form.weight.shape) >= form.weight.numel():
            return None
        return _of_factors(outer, inner, form.bias, form.dense_class, dtype)
    base, outer, inner = form.residual, *form.factors()
    if isinstance(base, CompressedResidual):
        below = base.form
        if isinstance(below, FactoredLinear) and _bits_of(below):
            return CompressedLinear(_joined(below, outer, inner, form.bias, dtype))
        if isinstance(below, FactoredLinear):
            lower = below.factors()
            outer, inner = (torch.cat([*pair], dim) for *pair, dim in ((lower[0], outer, 1), (lower[1], inner, 0)))
            if not isinstance(below, ResidualLinear):
                return _of_factors(outer, inner, form.bias, form.dense_class, dtype)
            base = below.residual
        else:
            base = below
    if isinstance(base, ExactResidual):
        return None
    frozen = base.copy(form.bias)
    if not bool(outer.any()):
        return CompressedLinear(frozen)
    parts = {"L": outer.to(dtype, copy=True), "R": inner.to(dtype, copy=True)}
    bias = None if form.bias is None else form.bias.to(dtype)
    frozen.register_parameter("bias", None)
    return CompressedLinear(ResidualLinear.beside(frozen, parts, bias))


def _in_few_bits(form: FactoredLinear, dtype: torch.dtype) -> CompressedLinear | None:
    """All parts as they are; those in few bits share their codes."""
    parts = {name: _part(form, name, dtype) for name in form.parts}
    bias = None if form.bias is None else form.bias.to(dtype)
    layer = CompressedLinear(type(form).from_parts(parts, bias, form.dense_class))
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    dense = form.out_features * form.in_features + (0 if bias is None else len(bias))
    return None if stored >= dense * dtype.itemsize and not form.shared_parts else layer


def _part(form: FactoredLinear, name: str, dtype: torch.dtype) -> Tensor | Residual:
    frozen: Residual | None = form.frozen(name)
    return form.part(name).to(dtype, copy=True) if frozen is None else frozen.copy(None)


def _joined(
    below: FactoredLinear, outer: Tensor, inner: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> SplitLinear:
    """Factors in few bits, and those of an addition beside them."""
    B, A = outer.to(dtype, copy=True), inner.to(dtype, copy=True)
    if isinstance(below, SplitLinear):
        B, A = torch.cat([below.B.to(dtype), B], 1), torch.cat([below.A.to(dtype), A])
    L = (below.L @ below.M).to(dtype) if isinstance(below, CoredLinear) else _part(below, "L", dtype)
    parts = {"L": L, "R": _part(below, "R", dtype), "B": B, "A": A}
    return SplitLinear.from_parts(parts, None if bias is None else bias.to(dtype), below.dense_class)


def _of_factors(
    outer: Tensor, inner: Tensor, bias: Tensor | None, dense_class: type[nn.Module], dtype: torch.dtype
) -> CompressedLinear | None:
    if outer.shape[1] > min(len(outer), inner.shape[1]):
        return None  # more directions than a weight can have
    parts = {"L": outer.to(dtype, copy=True), "R": inner.to(dtype, copy=True)}
    return CompressedLinear(FactoredLinear.from_parts(parts, None if bias is None else bias.to(dtype), dense_class))


# ---------------------------------------------------------------- in files

# Under `weight` is a tensor of another shape than the dense one: who does not know the format stops there, instead of
# starting from random numbers.


class _FactorTensor(NamedTuple):
    """A tensor of factors in a file: the part of the form that it is, or `part.buffer`; None for the model's dtype."""

    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def _factor_tensors(stored: StoredForm, shape: tuple[int, int]) -> dict[str, _FactorTensor]:
    sizes = FACTORED[stored.form].part_shapes(*shape, stored.rank, side_rank=stored.side_rank)
    tensors = {}
    for part, size in sizes.items():
        if part in stored.bits:
            for buffer, (inner, dtype) in FROZEN[stored.bits[part]].layout(*size).items():
                tensors[f"wasi_{part}_{buffer}"] = _FactorTensor(f"{part}.{buffer}", inner, dtype)
        else:
            tensors[f"wasi_{part}"] = _FactorTensor(part, size, None)
    first = next(name for name, tensor in tensors.items() if tensor.place.startswith("R"))
    return {"weight" if name == first else name: tensor for name, tensor in tensors.items()}


def stored_layout(stored: StoredForm, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> Layout:
    """Names, shapes and dtypes of the tensors of a compressed layer in a file.

    Args:
        stored: What it stores.
        shape: (out, in).
        bias: Whether there is a bias.
        dtype: Of factors and bias; files may have another floating one.

    Raises:
        ValueError: If there is no such form, no such rank, or the form has no such parts.
    """
    form, rank, side_rank, bits = stored
    if form not in FACTORED and form not in STORABLE:
        raise ValueError(f"a form must be one of {[*FACTORED, *STORABLE]}, got {form!r}.")
    if not (set(bits) <= set(FactoredLinear.parts) and set(bits.values()) <= set(FROZEN)):
        raise ValueError(f"bits must say of L and R which of {[*FROZEN]} they are stored as, got {dict(bits)!r}.")
    if (side_rank and FACTORED.get(form) is not SplitLinear) or (bits and form not in FACTORED):
        raise ValueError(f"form {form!r} has no side_rank and bits like these, got {side_rank} and {dict(bits)!r}.")
    layout: Layout
    if form in FACTORED:
        tensors = _factor_tensors(stored, shape)
        layout = {name: (tensor.shape, tensor.dtype or dtype) for name, tensor in tensors.items()}
    else:
        first, *others = STORABLE[form].layout(*shape).items()
        layout = {"weight": first[1], **{f"wasi_{name}": sizes for name, sizes in others}}
        if rank:
            added = FactoredLinear.part_shapes(*shape, rank)
            layout |= {f"{ResidualLinear.prefix}{name}": (size, dtype) for name, size in added.items()}
    return {**layout, "bias": ((shape[0],), dtype)} if bias else layout


def from_stored(
    stored: StoredForm,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dense_class: type[nn.Module],
    dtype: torch.dtype,
) -> CompressedLinear:
    """A layer from the tensors of a file.

    Args:
        stored: As for :func:`stored_layout`.
        parts: The tensors, as that says; taken over.
        shape: (out, in).
        dense_class: Of the layer whose place it takes.
        dtype: In which the layer answers.
    """
    bias = parts.get("bias")
    if stored.form in FACTORED:
        return CompressedLinear(_factors_from_stored(stored, parts, shape, dense_class, dtype))
    kind, prefix = STORABLE[stored.form], ResidualLinear.prefix
    first, *others = kind.layout(*shape)
    buffers = {first: parts["weight"], **{name: parts[f"wasi_{name}"] for name in others}}
    added = {name: parts[prefix + name] for name in ResidualLinear.parts if prefix + name in parts}
    frozen = kind.from_buffers(buffers, None if added else bias, shape, dense_class, dtype)
    return CompressedLinear(ResidualLinear.beside(frozen, added, bias) if added else frozen)


def _factors_from_stored(
    stored: StoredForm,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    dense_class: type[nn.Module],
    dtype: torch.dtype,
) -> FactoredLinear:
    cls = FACTORED[stored.form]
    sizes = cls.part_shapes(*shape, stored.rank, side_rank=stored.side_rank)
    places = {tensor.place: tensors[name] for name, tensor in _factor_tensors(stored, shape).items()}
    parts: dict[str, Any] = {}
    for part, size in sizes.items():
        if part in stored.bits:
            kind = FROZEN[stored.bits[part]]
            buffers = {name: places[f"{part}.{name}"] for name in kind.layout(*size)}
            parts[part] = kind.from_buffers(buffers, None, size, nn.Linear, dtype)
        else:
            parts[part] = places[part]
    return cls.from_parts(parts, tensors.get("bias"), dense_class)
