"""A form in a dense layer's place without an adapter: what a compressed model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linalg.low_bit import RoundedRows
from .dense import FactoredWeight, is_transposed
from .factored import FactoredLinear, check_rank
from .products import Thin
from .residual import RESIDUALS, ExactResidual, Layout, Residual, ResidualLinear

FACTORS = "factors"
Form = FactoredLinear | Residual
STORABLE = {name: kind for name, kind in RESIDUALS.items() if name != ExactResidual.name}


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
        return FactoredWeight(shape, weight.dtype, weight.device, self.dense_weight, self.form.rescale)

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
        """Name of what is stored: 'factors', or that of a residual."""
        residual = self.frozen
        return FACTORS if residual is None else residual.name

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
            assert isinstance(form, FactoredLinear)
            names = {"weight": f"form.{form.prefix}R", "wasi_L": f"form.{form.prefix}L"}
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
        outer, inner = form.factors()
        if outer.shape[1] * sum(form.weight.shape) >= form.weight.numel():
            return None
        return _of_factors(outer, inner, form.bias, form.dense_class, dtype)
    base, outer, inner = form.residual, *form.factors()
    if isinstance(base, CompressedResidual):
        below = base.form
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


def _of_factors(
    outer: Tensor, inner: Tensor, bias: Tensor | None, dense_class: type[nn.Module], dtype: torch.dtype
) -> CompressedLinear:
    parts = {"L": outer.to(dtype, copy=True), "R": inner.to(dtype, copy=True)}
    return CompressedLinear(FactoredLinear.from_parts(parts, None if bias is None else bias.to(dtype), dense_class))


# ---------------------------------------------------------------- in files

# Under `weight` is a tensor of another shape than the dense one: who does not know the format stops there, instead of
# starting from random numbers.


def stored_layout(form_name: str, rank: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> Layout:
    """Names, shapes and dtypes of the tensors of a compressed layer in a file.

    Args:
        form_name: 'factors' or the name of a residual in few bits.
        rank: Directions of the factors; 0 for none, beside a residual.
        shape: (out, in).
        bias: Whether there is a bias.
        dtype: Of factors and bias; files may have another floating one.

    Raises:
        ValueError: If there is no such form, or no such rank.
    """
    out_features, in_features = shape
    if rank or form_name == FACTORS:
        check_rank("rank", rank, out_features, in_features)
    factors: Layout = {"L": ((out_features, rank), dtype), "R": ((rank, in_features), dtype)}
    layout: Layout
    if form_name == FACTORS:
        layout = {"weight": factors["R"], "wasi_L": factors["L"]}
    elif form_name in STORABLE:
        first, *others = STORABLE[form_name].layout(out_features, in_features).items()
        layout = {"weight": first[1], **{f"wasi_{name}": sizes for name, sizes in others}}
        if rank:
            layout |= {f"{ResidualLinear.prefix}{name}": sizes for name, sizes in factors.items()}
    else:
        raise ValueError(f"a form must be one of {[FACTORS, *STORABLE]}, got {form_name!r}.")
    return {**layout, "bias": ((out_features,), dtype)} if bias else layout


def from_stored(
    form_name: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dense_class: type[nn.Module],
    dtype: torch.dtype,
) -> CompressedLinear:
    """A layer from the tensors of a file.

    Args:
        form_name: As for :func:`stored_layout`.
        parts: The tensors, as that says; taken over.
        shape: (out, in).
        dense_class: Of the layer whose place it takes.
        dtype: In which the layer answers.
    """
    bias = parts.get("bias")
    if form_name == FACTORS:
        factors = {"L": parts["wasi_L"], "R": parts["weight"]}
        return CompressedLinear(FactoredLinear.from_parts(factors, bias, dense_class))
    kind, prefix = STORABLE[form_name], ResidualLinear.prefix
    first, *others = kind.layout(*shape)
    buffers = {first: parts["weight"], **{name: parts[f"wasi_{name}"] for name in others}}
    added = {name: parts[prefix + name] for name in ResidualLinear.parts if prefix + name in parts}
    frozen = kind.from_buffers(buffers, None if added else bias, shape, dense_class, dtype)
    return CompressedLinear(ResidualLinear.beside(frozen, added, bias) if added else frozen)
