"""A form in a dense layer's place without an adapter: what a compressed model is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linalg.low_bit import RoundedRows
from .dense import FactoredWeight, StandIn, is_transposed
from .factored import FactoredLinear
from .products import Thin
from .residual import ExactResidual, Residual, ResidualLinear
from .split import SplitLinear
from .stored import FACTORED, WEIGHT, StoredForm, factor_tensors, residual_tensors

Form = FactoredLinear | Residual


class Compressed(ABC):
    """What a linear layer and packed experts (:mod:`compressed_stack`) have in common where a form is their weight.

    Attributes:
        form: What is stored.
        packed: Whether it takes the place of a parameter with the weights of all experts.
    """

    form: Form
    packed: ClassVar[bool]
    weight: StandIn

    @property
    @abstractmethod
    def stored_form(self) -> StoredForm:
        """What is stored."""

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """Shape as :func:`stored.stored_layout` takes it."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it answers."""
        return self.weight.dtype

    @property
    def form_name(self) -> str:
        """Name of what is stored (:class:`stored.StoredForm`)."""
        return self.stored_form.form

    @property
    def frozen(self) -> Residual | None:
        """The weight in few bits, None where there are factors alone."""
        form = self.form
        return form if isinstance(form, Residual) else form.residual if isinstance(form, ResidualLinear) else None

    @property
    def rank(self) -> int:
        """Directions of the factors, 0 where there are none."""
        return self.form.rank if isinstance(self.form, FactoredLinear) else 0

    @property
    def stored_names(self) -> dict[str, str]:
        """What the tensors are called in a file (:func:`stored.stored_layout`), and in this module's state dict."""
        form, stored = self.form, self.stored_form
        if self.frozen is None:
            tensors = factor_tensors(stored, self.stored_shape)
            names = {name: f"form.{FactoredLinear.prefix}{tensor.place}" for name, tensor in tensors.items()}
        else:
            place = "residual" if isinstance(form, ResidualLinear) else "form"
            parts = residual_tensors(stored.form, self.stored_shape)
            names = {name: f"{place}.{buffer}" for buffer, name in parts.items()}
        if isinstance(form, ResidualLinear):
            names |= {form.prefix + name: f"form.{form.prefix}{name}" for name in form.parts}
        return names if form.bias is None else {**names, "bias": "form.bias"}

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are in a file (:func:`stored.stored_layout`)."""
        state = self.state_dict()  # type: ignore[attr-defined]
        return {name: state[own] for name, own in self.stored_names.items()}


class CompressedLinear(Compressed, nn.Linear):
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

    packed: ClassVar[bool] = False

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
    def stored_form(self) -> StoredForm:
        residual, form = self.frozen, self.form
        if residual is not None:
            return StoredForm(residual.name, self.rank)
        assert isinstance(form, FactoredLinear)
        name = next(name for name, cls in FACTORED.items() if type(form) is cls)
        side_rank = len(form.A) if isinstance(form, SplitLinear) else 0
        return StoredForm(name, form.weight_rank, side_rank, parts_in_few_bits(form))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight that this stands for, (out, in), a tensor of its own."""
        if isinstance(self.form, Residual):
            return self.form.dense_weight()
        weight = self.form.multiply_out()
        return weight.T if is_transposed(self.dense_class) else weight

    @property
    def W_q(self) -> FactoredWeight:
        """The same as `weight`, by a name at which PEFT asks for :meth:`dequantize` where it needs values (DoRA)."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The same as :meth:`dense_weight`."""
        return self.dense_weight()

    def to_dense(self) -> nn.Module:
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
    if f"{prefix}{WEIGHT}" in state_dict:
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


def parts_in_few_bits(form: FactoredLinear) -> dict[str, str]:
    """What the parts in few bits are stored as, by name."""
    return {part: form.frozen(part).name for part in form.parts if form.frozen(part) is not None}
