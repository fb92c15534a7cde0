"""Packed experts of a compressed model: a form in place of the parameter with the weights of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.low_bit import RoundedRows
from ..models.experts import ExpertStack
from .compressed import Compressed, Form
from .factored import FactoredLinear
from .products import Thin
from .residual import Residual, ResidualLinear
from .stacked import ExactStack, FactoredStack, PackedWeight, ResidualStack, Segment, StackedWeight
from .stored import FACTORS, WEIGHT, StoredForm, key_of

StackForm = FactoredStack | ResidualStack | Residual


class CompressedStack(PackedWeight, Compressed, ExpertStack):
    """The weights of all experts, stored as a pair of factors each, in few bits, or as both.

    Model code reads it as the parameter that it replaces (:class:`stacked.StackedWeight`).

    Args:
        form: What is stored, a weight in few bits as the rows of all experts in one matrix; taken over.
        experts: E.
        transposed: Whether model code reads the weight as (E, in, out).

    Example:
        >>> stack = CompressedStack(FactoredStack(4, 8, 6, rank=2), experts=4, transposed=False)
        >>> stack.shape, stack[1].shape, sum(part.numel() for part in stack.parameters())
        (torch.Size([4, 6, 8]), torch.Size([6, 8]), 112)
    """

    packed: ClassVar[bool] = True

    def __init__(self, form: StackForm, experts: int, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.experts, self.transposed = experts, transposed
        rows = form.out_features
        self.out_features, self.in_features = rows // experts if isinstance(form, Residual) else rows, form.in_features
        self.form: Any = form
        if isinstance(form, ResidualStack):
            self.residual = form.residual  # a form refers to it and does not own it

    @property
    def stored_form(self) -> StoredForm:
        residual = self.frozen
        return StoredForm(FACTORS if residual is None else residual.name, self.rank)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.experts, self.out_features, self.in_features

    @property
    def weight(self) -> StackedWeight:  # type: ignore[override]
        """What model code reads."""
        sizes = self.out_features, self.in_features
        shape = (self.experts, *(sizes[::-1] if self.transposed else sizes))
        like = torch.empty(0, dtype=self.form.dtype, device=self.form.device)
        return StackedWeight(shape, self.transposed, like, self._multiply, self._matrices)

    def _matrices(self) -> Tensor:
        if isinstance(self.form, Residual):
            return self.form.dense_weight().view(self.experts, self.out_features, self.in_features)
        matrices: Tensor = self.form.matrices()
        return matrices

    @torch.no_grad()
    def matrices(self) -> Tensor:
        """All weights as linear layers hold them, (E, out, in), a tensor of its own."""
        return self._matrices()

    def to_dense(self) -> ExpertStack:
        weight = self.matrices()
        weight = (weight.mT if self.transposed else weight).contiguous()
        return ExpertStack(nn.Parameter(weight, requires_grad=False), self.transposed).train(self.training)

    def expert(self, index: int) -> Form:
        """The frozen form of one expert, in the memory of all."""
        frozen = self._frozen_of(index)
        if not isinstance(self.form, FactoredLinear):
            assert frozen is not None
            return frozen
        parts = {"L": self.form.L[index], "R": self.form.R[index]}
        if frozen is None:
            return FactoredLinear.from_parts(parts, None)
        return ResidualLinear.beside(frozen, parts, None)

    def _frozen_of(self, index: int) -> Residual | None:
        frozen = self.frozen
        return None if frozen is None else frozen.rows(index * self.out_features, (index + 1) * self.out_features)

    @torch.compiler.disable
    def _multiply(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each segment of rows, (rows, in), by its expert, with gradients for the rows and for factors that train."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        pieces: list[Tensor] = []
        filled = 0
        for expert, start, stop in segments:
            pieces += [x.new_zeros(start - filled, self.out_features), self._of_expert(expert, x[start:stop])]
            filled = stop
        return torch.cat([*pieces, x.new_zeros(len(x) - filled, self.out_features)])

    def _of_expert(self, index: int, rows: Tensor) -> Tensor:
        frozen, y = self._frozen_of(index), None
        if frozen is not None:
            y = frozen.multiply(rows)
        if isinstance(self.form, FactoredLinear):
            thin = F.linear(rows, self.form.R[index].to(rows.dtype))
            thin = F.linear(thin, self.form.L[index].to(rows.dtype))
            y = thin if y is None else y + thin
        assert y is not None
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form_name}"


def accept_stored_names(model: nn.Module) -> None:
    """Have modules with compressed experts load what a file holds, as well as what their own state dicts do."""
    for module in model.modules():
        hooks: Any = module._load_state_dict_pre_hooks.values()
        known = any(hook.hook is _take_stored_names for hook in hooks)
        if not known and any(isinstance(child, CompressedStack) for child in module._modules.values()):
            module.register_load_state_dict_pre_hook(_take_stored_names)


def _take_stored_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, stack in module._modules.items():
        if isinstance(stack, CompressedStack) and key_of(prefix + name, WEIGHT, packed=True) in state_dict:
            for stored, own in stack.stored_names.items():
                key = key_of(prefix + name, stored, packed=True)
                if key in state_dict:
                    state_dict[f"{prefix}{name}.{own}"] = state_dict.pop(key)


class CompressedStackResidual(ExactStack):
    """Compressed experts as the frozen weights beside the factors of adapters; they stay in place as they are."""

    rounds_inputs: ClassVar[bool] = True

    @property
    def layer(self) -> CompressedStack:
        """The compressed experts."""
        assert isinstance(self._stack, CompressedStack)
        return self._stack

    def _of_one(self) -> Form:
        assert self._expert is not None
        return self.layer.expert(self._expert)

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        return self._of_one().product(x, rounded, thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        return self._of_one().transposed_product(dY)
