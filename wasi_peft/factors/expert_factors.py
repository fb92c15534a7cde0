"""Packed experts, each by the inputs that the router gives it: what calibration measures of them, initial factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..forms.residual import Int4Residual, Int8Residual
from ..forms.stacked import PackedWeight, Segment, StackedWeight, residual_of
from ..linalg.spectra import truncate, weighed_error, weight_spectrum
from ..models.calls import differentiable, evaluating, model_output
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from ..tuner.config import WasiConfig
from ..tuner.experts import summed_shares
from ..tuner.model import rank_for, shared_ranks
from ..tuner.prepared import ATTACHED, PreparedLayer
from ..tuner.targets import asked_rank, check_targets, plain_name, resolve_targets, selected_modules
from ..updates.base import InitialFactors
from .collecting import Collector, Gradients, Run
from .data import CalibrationData, limited


class ExpertInputs(PackedWeight, nn.Module):
    """A packed weight that computes what it did, and where it records sums up `x x^T` of the rows of each expert.

    Args:
        stack: The weight.
        records: Whether it does.
    """

    def __init__(self, stack: ExpertStack, records: bool) -> None:
        super().__init__()
        self.stack, self.records = stack, records
        if not records:
            return
        weight = stack.weight
        sizes = stack.experts, stack.in_features, stack.in_features
        self.sums: Any = weight.new_zeros(sizes, dtype=torch.float32)
        self.rows = [0] * stack.experts
        self.gradients = torch.zeros(stack.experts, dtype=torch.float64)  # sums of their squares

    @property
    def weight(self) -> StackedWeight | Tensor:
        """What model code reads."""
        stack = self.stack
        if not self.records:
            return stack.weight
        return StackedWeight(
            stack.weight.shape, stack.transposed, stack.weight.detach()[:0], self._multiply, stack.matrices
        )

    def _multiply(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        matrices = self.stack.matrices()
        y = x.new_zeros(len(x), self.stack.out_features)
        for expert, start, stop in segments:
            rows = x[start:stop]
            y[start:stop] = rows @ matrices[expert].t().to(x.dtype)
            detached = rows.detach().float()
            self.sums[expert].addmm_(detached.t(), detached)
            self.rows[expert] += stop - start
        if torch.is_grad_enabled():
            y = differentiable(y)
            y.register_hook(lambda gradient: self._add_gradient(gradient, segments))
        return y

    def _add_gradient(self, gradient: Tensor, segments: Sequence[Segment]) -> None:
        for expert, start, stop in segments:
            self.gradients[expert] += float(gradient[start:stop].double().square().sum())

    def moments(self) -> Tensor:
        """E[x x^T] of each expert, (E, in, in); an expert that few rows reach is taken to see what all see, too.

        Those of all experts count as many rows as the input has features.
        """
        pooled = self.sums.sum(0) / max(1, sum(self.rows))
        prior = self.stack.in_features
        counts = torch.tensor(self.rows, dtype=torch.float32, device=pooled.device)[:, None, None]
        return (self.sums + prior * pooled) / (counts + prior)


@contextmanager
def recording(model: nn.Module, group: Container[str]) -> Iterator[dict[str, ExpertInputs]]:
    """Inside, all exposed weights can be read; those of a group record, and are what this gives, by name.

    Args:
        model: With its packed weights exposed.
        group: Names.
    """
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}
    recorders = {name: ExpertInputs(stack, plain_name(name) in group) for name, stack in stacks.items()}
    try:
        for name, recorder in recorders.items():
            model.set_submodule(name, recorder)
        yield {plain_name(name): recorder for name, recorder in recorders.items() if recorder.records}
    finally:
        for name, stack in stacks.items():
            model.set_submodule(name, stack)


def groups_within(stacks: Mapping[str, ExpertStack], max_memory_bytes: int) -> Iterator[dict[str, ExpertStack]]:
    """As many packed weights at a time as have sums within a bound, one at least.

    Args:
        stacks: By name.
        max_memory_bytes: The bound.
    """
    group: dict[str, ExpertStack] = {}
    left = max_memory_bytes
    for name, stack in stacks.items():
        size = 4 * stack.experts * stack.in_features**2
        if group and size > left:
            yield group
            group, left = {}, max_memory_bytes
        group[name] = stack
        left -= size
    if group:
        yield group


class StackSpectrum(NamedTuple):
    """What calibration knows of a packed weight, of all experts together: they get one rank.

    Attributes:
        energies: What dropping each direction costs, each expert's own directions, descending, (min(out, in),).
        rounding: What rounding to a residual costs, by its name.
        rows: That were seen by any expert.
        weighed: Whether gradients say what an error costs.
    """

    energies: Tensor
    rounding: dict[str, float]
    rows: int
    weighed: bool


def measure_experts(
    model: nn.Module,
    stacks: Mapping[str, ExpertStack],
    run: Run,
    *,
    gradients: Gradients | None = None,
    seed: int = 0,
    max_memory_bytes: int = 2**30,
) -> Iterator[tuple[str, StackSpectrum]]:
    """Spectra of packed weights, one after the other.

    An expert's error counts as much as gradients of its output are large, in all directions alike: second moments of
    these, out x out an expert, would take more memory than all else.

    Args:
        model: The dense model.
        stacks: Its packed weights, by name.
        run: A pass over the data, see :func:`collecting.through_model`.
        gradients: Where output gradients come from, None for no backward passes.
        seed: Of random projections.
        max_memory_bytes: Bound on the memory for sums: more passes run where it is too little for all.
    """
    for group in groups_within(stacks, max_memory_bytes):
        collector = Collector({}, max_memory_bytes, gradients, seed)
        expose_experts(model)
        try:
            with evaluating(model, bool(gradients)), recording(model, group) as recorders:
                with collector.attached(model):
                    run(collector)
        finally:
            conceal_experts(model)
        for name, recorder in recorders.items():
            yield name, _spectrum(recorder)
            recorder.sums = None


@torch.no_grad()
def _spectrum(recorder: ExpertInputs) -> StackSpectrum:
    stack, weights, moments = recorder.stack, recorder.stack.matrices(), recorder.moments()
    weighed = bool(recorder.gradients.sum() > 0)
    weights_of_errors = (recorder.gradients / stack.out_features if weighed else torch.ones(stack.experts)).tolist()
    energies = torch.zeros(min(weights.shape[1:]), dtype=torch.float64)
    for one, moment, counts in zip(weights, moments, weights_of_errors, strict=True):
        energies += counts * weight_spectrum(one, moment).energies.cpu()
    rounding = {}
    for name in (Int8Residual.name, Int4Residual.name):
        lost = weights - residual_of(stack, name, None).dense_weight().view_as(weights)
        errors = [weighed_error(one, moment) for one, moment in zip(lost, moments, strict=True)]
        error = sum(counts * one for counts, one in zip(weights_of_errors, errors, strict=True))
        if math.isfinite(error):
            rounding[name] = error
    return StackSpectrum(energies, rounding, sum(recorder.rows), weighed)


@torch.no_grad()
def prepare_experts(
    model: nn.Module,
    config: WasiConfig,
    data: CalibrationData,
    *,
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    progress_bar: bool = True,
) -> list[str]:
    """Attach factors to the packed experts that a configuration targets; the next injection takes them.

    Each expert's are the best for its own inputs: `W_e` is cut where `E |(W_e - L R) x|^2` grows least over the rows x
    that are routed to it. Under a share they keep it among themselves, under a plan the ranks of those that become
    factors. They are not repaired.

    Args:
        model: The dense model; its weights are not changed.
        config: With factors in place of the weights.
        data: Batches, or a function that runs them.
        max_batches: Of each pass.
        max_memory_bytes: Bound on the memory for sums: more passes run where it is too little for all.
        progress_bar: Show progress bars.

    Returns:
        Names of what was prepared, those of the parameters.
    """
    if not config.layer_update.takes_stacks:
        return []
    expose_experts(model)
    try:
        resolved = copy.copy(config)
        resolve_targets(model, resolved)
        selected = {plain_name(name): module for name, module in selected_modules(model, resolved)}
        stacks = {
            name: module
            for name, module in selected.items()
            if isinstance(module, ExpertStack) and resolved.residual_of(name) is None
        }
        if not stacks:
            return []
        check_targets(model, resolved)
        if resolved.weight_share is not None:
            resolved.resolved_ranks = shared_ranks(stacks, {}, resolved)
        for group in groups_within(stacks, max_memory_bytes):
            title = f"WASI inputs of {len(group)} expert weights" if progress_bar else None
            with evaluating(model, gradients=False), recording(model, group) as recorders:
                if callable(data):
                    data()
                else:
                    for batch in limited(data, max_batches, title):
                        model_output(model, batch)
            for name, recorder in recorders.items():
                group[name].__dict__[ATTACHED] = prepared_stack(name, recorder, resolved)
                recorder.sums = None
        return list(stacks)
    finally:
        conceal_experts(model)


def prepared_stack(name: str, recorder: ExpertInputs, config: WasiConfig) -> PreparedLayer:
    """The factors of one packed weight, at one rank for all experts.

    Args:
        name: Of the parameter.
        recorder: What has seen its inputs.
        config: With the ranks of a budget resolved.
    """
    weights, asked = recorder.stack.matrices(), asked_rank(name, config)
    spectra = [weight_spectrum(one, moment) for one, moment in zip(weights, recorder.moments(), strict=True)]
    rank = min(rank_for(asked, summed_shares([one.energies for one in spectra])), *weights.shape[1:])
    pairs = [truncate(one, spectrum, rank) for one, spectrum in zip(weights, spectra, strict=True)]
    initial = InitialFactors(torch.stack([L for L, _ in pairs]), torch.stack([R for _, R in pairs]), None)
    update = config.update_of(name).name
    return PreparedLayer(initial, rank, asked, config.weight_share, update, frozen_dtype=config.frozen_dtype)
