"""From forms of adapters, and from files, to compressed layers; and what adapters find in those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.experts import ExpertStack
from .compressed import CompressedLinear, CompressedResidual, parts_in_few_bits
from .compressed_stack import CompressedStack, CompressedStackResidual
from .cored import CoredLinear
from .factored import FactoredLinear
from .frozen import FROZEN
from .residual import ExactResidual, Residual, ResidualLinear
from .split import SplitLinear
from .stacked import ExactStack, FactoredStack, ResidualStack
from .stored import FACTORED, STORABLE, StoredForm, factor_tensors, residual_tensors


def own_factors(base: nn.Module | None) -> FactoredLinear | None:
    """The two factors that a layer of a compressed model is stored as; None where there is something else."""
    form = base.form if isinstance(base, (CompressedLinear, CompressedStack)) else None
    return form if isinstance(form, FactoredLinear) and type(form) in (FactoredLinear, FactoredStack) else None


def base_beside(base: nn.Module) -> Residual:
    """What factors of adapters are beside where a dense or compressed layer stays in place as it is."""
    if isinstance(base, CompressedStack):
        return CompressedStackResidual(base)
    if isinstance(base, ExpertStack):
        return ExactStack(base)
    return CompressedResidual(base) if isinstance(base, CompressedLinear) else ExactResidual(base)


# ---------------------------------------------------------------- what is compressed


@torch.no_grad()
def compressed(form: FactoredLinear, dtype: torch.dtype) -> CompressedLinear | CompressedStack | None:
    """A compressed layer that computes what an adapter's form computes; None where that would not be smaller.

    An addition to a compressed layer adds its directions to those that are there; one to a weight in few bits stays
    beside it, since rounding the sum again would lose it.

    Args:
        form: Of an adapter; not changed.
        dtype: Of factors.
    """
    if isinstance(form, (FactoredStack, ResidualStack)):
        return _compressed_stack(form, dtype)
    if not isinstance(form, ResidualLinear):
        if parts_in_few_bits(form):
            return _in_few_bits(form, dtype)
        outer, inner = form.factors()
        if not form.shared_parts and outer.shape[1] * sum(form.weight.shape) >= form.weight.numel():
            return None
        return _of_factors(outer, inner, form.bias, form.dense_class, dtype)
    base, outer, inner = form.residual, *form.factors()
    if isinstance(base, CompressedResidual):
        below = base.form
        if isinstance(below, FactoredLinear) and parts_in_few_bits(below):
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


# ---------------------------------------------------------------- packed experts


def _compressed_stack(form: FactoredStack | ResidualStack, dtype: torch.dtype) -> CompressedStack | None:
    frozen, (outer, inner) = None, form.factors()
    if isinstance(form, ResidualStack):
        base: Residual = form.residual
        if isinstance(base, CompressedStackResidual):
            below = base.layer
            if isinstance(below.form, FactoredLinear):
                lower = below.form.factors()
                outer, inner = (torch.cat([*pair], dim) for *pair, dim in ((lower[0], outer, 2), (lower[1], inner, 1)))
            frozen = below.frozen
        elif isinstance(base, ExactResidual):
            return None
        else:
            frozen = base
    rank, sizes = outer.shape[2], (form.out_features, form.in_features)
    if frozen is None and (rank > min(sizes) or rank * sum(sizes) >= sizes[0] * sizes[1]):
        return None
    parts = {"L": outer.to(dtype, copy=True), "R": inner.to(dtype, copy=True)}
    if frozen is None:
        return CompressedStack(FactoredStack.around(parts, form.transposed), form.experts, form.transposed)
    frozen = frozen.copy(None)
    whole = ResidualStack.around(frozen, parts, form.transposed) if bool(outer.any()) else frozen
    return CompressedStack(whole, form.experts, form.transposed)


# ---------------------------------------------------------------- from files


def from_stored(
    stored: StoredForm,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dense_class: type[nn.Module],
    dtype: torch.dtype,
) -> CompressedLinear:
    """A layer from the tensors of a file.

    Args:
        stored: As for :func:`stored.stored_layout`.
        parts: The tensors, as that says; taken over.
        shape: (out, in).
        dense_class: Of the layer whose place it takes.
        dtype: In which the layer answers.
    """
    bias = parts.get("bias")
    if stored.form in FACTORED:
        return CompressedLinear(_factors_from_stored(stored, parts, shape, dense_class, dtype))
    added = _added(parts)
    buffers = _buffers(stored.form, parts, shape)
    frozen = STORABLE[stored.form].from_buffers(buffers, None if added else bias, shape, dense_class, dtype)
    return CompressedLinear(ResidualLinear.beside(frozen, added, bias) if added else frozen)


def stack_from_stored(
    stored: StoredForm, parts: Mapping[str, Tensor], shape: tuple[int, ...], transposed: bool, dtype: torch.dtype
) -> CompressedStack:
    """Packed experts from the tensors of a file.

    Args:
        stored: As for :func:`stored.stored_layout`.
        parts: The tensors, as that says; taken over.
        shape: (E, out, in).
        transposed: Whether model code reads the weight as (E, in, out).
        dtype: In which they answer.
    """
    experts, out_features, in_features = shape
    if stored.form in FACTORED:
        places = {tensor.place: parts[name] for name, tensor in factor_tensors(stored, shape).items()}
        return CompressedStack(FactoredStack.around(places, transposed), experts, transposed)
    buffers, rows = _buffers(stored.form, parts, shape), (experts * out_features, in_features)
    frozen, added = STORABLE[stored.form].from_buffers(buffers, None, rows, nn.Linear, dtype), _added(parts)
    return CompressedStack(ResidualStack.around(frozen, added, transposed) if added else frozen, experts, transposed)


def _buffers(form: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {buffer: parts[name] for buffer, name in residual_tensors(form, shape).items()}


def _added(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = ResidualLinear.prefix
    return {name: parts[prefix + name] for name in ResidualLinear.parts if prefix + name in parts}


def _factors_from_stored(
    stored: StoredForm,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    dense_class: type[nn.Module],
    dtype: torch.dtype,
) -> FactoredLinear:
    cls = FACTORED[stored.form]
    sizes = cls.part_shapes(*shape, stored.rank, side_rank=stored.side_rank)
    places = {tensor.place: tensors[name] for name, tensor in factor_tensors(stored, shape).items()}
    parts: dict[str, Any] = {}
    for part, size in sizes.items():
        if part in stored.bits:
            kind = FROZEN[stored.bits[part]]
            buffers = {name: places[f"{part}.{name}"] for name in kind.layout(*size)}
            parts[part] = kind.from_buffers(buffers, None, size, nn.Linear, dtype)
        else:
            parts[part] = places[part]
    form, bias = cls.from_parts(parts, None, dense_class), tensors.get("bias")
    form.register_parameter("bias", None if bias is None else nn.Parameter(bias))  # taken over, not copied
    return form
