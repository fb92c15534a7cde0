"""The tuner layer of packed experts: one form for all weights of a 3-D parameter, under the parameter's name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..forms.factored import FactoredLinear
from ..forms.products import OUTLIERS, ProductChoice
from ..forms.residual import Residual
from ..forms.shards import is_distributed
from ..forms.stacked import (
    FactoredStack,
    PackedWeight,
    ParkedStack,
    ResidualStack,
    Segment,
    StackedWeight,
    residual_of,
)
from ..linalg.coordinates import addition_basis
from ..linalg.low_bit import quantize_rows
from ..linalg.spectra import factorize_weight, rank_for_threshold
from ..models.experts import ExpertStack
from ..updates.addition import image_sums, whiten
from ..updates.base import InitialFactors, Update
from ..updates.stacked import stacked_linear
from .config import WasiConfig
from .layer import Linear, compute_dtype_of


class Experts(PackedWeight, Linear):
    """Factors in place of a packed weight, `W_e = L_e R_e` or `Q_e + L_e R_e` for every expert e.

    Model code never calls it: it reads what used to be a parameter, and what it multiplies by that goes through the
    factors (:class:`forms.stacked.StackedWeight`), in whichever implementation transformers runs experts.

    An addition meets data expert by expert: each puts R into white coordinates when the first rows reach it in
    training, but in distributed runs, where processes route differently.
    """

    base_layer: Any

    def __init__(self, base_layer: ExpertStack, *args: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.experts, self.transposed = base_layer.experts, base_layer.transposed
        self._unmet: dict[str, set[int]] = {}  # experts without data so far, by adapter
        super().__init__(base_layer, *args, **kwargs)

    # ---------------------------------------------------------------- forms

    def update_layer(self, adapter_name: str, config: WasiConfig, name: str, rank: int, initial: Any) -> None:
        super().update_layer(adapter_name, config, name, rank, initial)
        self.wasi_update[adapter_name] = replace(self.wasi_update[adapter_name], frozen_dtype=None)
        self._unmet[adapter_name] = set(range(self.experts))

    def meet_again(self, adapter_name: str) -> None:
        super().meet_again(adapter_name)
        self._unmet[adapter_name] = set(range(self.experts))

    def forget_adapter(self, adapter_name: str) -> None:
        super().forget_adapter(adapter_name)
        self._unmet.pop(adapter_name, None)

    def _form_of(self, update: Update, initial: InitialFactors, rank: int, products: ProductChoice) -> FactoredLinear:
        stack = {name: part.to(self._like.device, self._like.dtype) for name, part in _start(update, initial, rank)}
        if initial.residual is not None:
            return ResidualStack.around(initial.residual, stack, self.transposed)
        return FactoredStack.around(stack, self.transposed)

    def _new_form(self, update: Update, rank: int, like: Tensor, products: ProductChoice) -> FactoredLinear:
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if update.residual is not None:
            return ResidualStack(self.beside(), self.experts, rank, self.transposed, **options)
        return FactoredStack(self.experts, self.in_features, self.out_features, rank, self.transposed, **options)

    # ---------------------------------------------------------------- the dense weight

    def _parked(self, dense: nn.Module) -> ParkedStack:
        assert isinstance(dense, ExpertStack)
        return ParkedStack(dense)

    def _rounded(self, dense: nn.Module, name: str, products: ProductChoice | None) -> Residual:
        assert isinstance(dense, ExpertStack)
        return residual_of(dense, name, products)

    def _unrounded(self, residual: Residual) -> ExpertStack:
        weight = residual.dense_weight().view(self.experts, self.out_features, self.in_features)
        weight = weight.mT.contiguous() if self.transposed else weight
        return ExpertStack(nn.Parameter(weight, requires_grad=False), self.transposed)

    def original_weight(self) -> tuple[Tensor, None]:
        """Weights, (E, out, in), of before the injection, where they are still there; rounded, if they were."""
        original = self.original
        if isinstance(original, Residual):
            original = self._unrounded(original)
        elif isinstance(original, ParkedStack):
            original = original.restore(self._like.device, self._like.dtype)
        return original.matrices(), None

    # ---------------------------------------------------------------- what model code reads

    @property
    def weight(self) -> Any:
        """What stands for the packed weight: the parameter itself where the base is in use and has one."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if not self._uses_base:
            assert self.active_name is not None
            self._require_loaded(self.active_name)
            form: Any = self.form
            return self._stand_in(self._multiply, form.matrices)
        base = self.base_layer
        if isinstance(base, Residual):
            return self._stand_in(self._multiply_base, lambda: self._unrounded(base).matrices())
        if isinstance(base, ParkedStack):
            return base.restore(self._like.device, self._like.dtype).weight
        return base.weight

    def _stand_in(
        self, multiply: Callable[[Tensor, Sequence[Segment]], Tensor], dense: Callable[[], Tensor]
    ) -> StackedWeight:
        sizes = self.out_features, self.in_features
        shape = (self.experts, *(sizes[::-1] if self.transposed else sizes))
        return StackedWeight(shape, self.transposed, self._like, multiply, dense)

    # ---------------------------------------------------------------- computation

    @torch.compiler.disable
    def _multiply_base(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        rows = x.to(compute_dtype_of(x, self._like.dtype))
        return stacked_linear(rows, self.base_layer, None, None, self.out_features, segments)

    @torch.compiler.disable
    def _multiply(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each segment of rows, (rows, in), by its expert's factors."""
        name = self.active_name
        assert name is not None
        form: Any = self._forms[name]
        update = self.wasi_update[name]
        rows = x.to(compute_dtype_of(x, form.dtype))
        trains = any(form.part(part).requires_grad for part in update.trained)
        if name in self._fresh and trains and self.training:
            # without gradients too: a block that runs again in backward meets its input before
            self._meet_experts(name, rows, segments)
        residual, rounded = (form.residual if isinstance(form, ResidualStack) else None), None
        reads = trains and update.reads_input is not None and form.part(update.reads_input).requires_grad
        exact = rows.dtype == torch.float64 or residual is None or not residual.rounds_inputs
        if reads and not exact and torch.is_grad_enabled():
            rounded = quantize_rows(rows.detach(), OUTLIERS)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return stacked_linear(rows, residual, form.L, form.R, self.out_features, segments, rounded)

    def _meet_experts(self, name: str, rows: Tensor, segments: Sequence[Segment]) -> None:
        form, unmet = self.form_of(name), self._unmet[name]
        if is_distributed():
            unmet.clear()
        seen = self._seen.get(name, {}) if self.meeting is None else {}
        for expert, start, stop in segments:
            if expert not in unmet:
                continue
            L, R = form.L.data[expert], form.R.data[expert]
            sums = seen.pop(expert) if expert in seen else image_sums(R, rows[start:stop].detach())
            if self.meeting is None:
                unmet.discard(expert)
                # no new version of R: where experts are called one by one, backward of another may have kept it
                whiten(L, R, sums)
            else:
                self.meeting.add((self, name, expert), sums, functools.partial(self._see, name, expert))
        if not unmet:
            self._fresh.discard(name)

    def _see(self, name: str, expert: int, sums: Tensor) -> None:
        self._seen.setdefault(name, {})[expert] = sums

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("a packed weight is read by the module that holds it, and not called.")


def _start(update: Update, initial: InitialFactors, rank: int) -> list[tuple[str, Tensor]]:
    """Values of a form's parts, expert by expert."""
    every = [update.start(replace(initial, L=L, R=R), rank) for L, R in zip(initial.L, initial.R, strict=True)]
    return [(name, torch.stack([parts[name] for parts in every])) for name in every[0]]


# ---------------------------------------------------------------- where factors start


def stored_factors(factors: FactoredStack) -> InitialFactors:
    """Those that a compressed model stores, to start from, L with orthonormal columns; the adapter gets its own."""
    L, corner = torch.linalg.qr(factors.L.detach().double())
    return InitialFactors(L, corner @ factors.R.detach().double(), None)


def stack_energies(weight: Tensor) -> Tensor:
    """Energies by direction, each expert's as a share of its own total, summed over the experts.

    **Shape**
        - weight: (E, out, in); returns (min(out, in),), float64, descending
    """
    return summed_shares([torch.linalg.svdvals(one.double()).square() for one in weight])


def summed_shares(energies: Sequence[Tensor]) -> Tensor:
    """Energies of all experts by direction, each expert's as a share of its own total; one vector each, float64."""
    every = torch.stack(list(energies))
    return (every / every.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).sum(0)


def stack_factors(
    weight: Tensor, asked: int | float, residual: Residual | None, init_weights: bool
) -> tuple[InitialFactors, int]:
    """Factors of packed weights to start from, and K: what each expert's own layer would start from without data.

    **Shape**
        - weight: (E, out, in); L (E, out, n), R (E, n, in)

    Args:
        weight: The packed weight.
        asked: K, cut to what the weights have, or the share of their energy to keep, the mean over the experts.
        residual: What the factors are added to; None where they replace the weight.
        init_weights: Whether the values matter.
    """
    largest = min(weight.shape[1:])
    if isinstance(asked, int):
        rank = min(asked, largest)
    else:
        rank = rank_for_threshold(stack_energies(weight), asked)
    if residual is not None:
        rows = [addition_basis(one, rank) if init_weights else one[:rank] for one in weight]
        L = weight.new_zeros(*weight.shape[:2], rank)
        return InitialFactors(L, torch.stack(rows), None, None, residual), rank
    pairs = [factorize_weight(one, lambda _: rank)[:2] for one in weight]
    return InitialFactors(torch.stack([L for L, _ in pairs]), torch.stack([R for _, R in pairs]), None), rank
