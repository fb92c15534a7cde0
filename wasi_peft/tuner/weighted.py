"""Sums of adapters: what several have learnt, in one, for mixtures of tasks and for federated averaging.

Beside a frozen weight Q an adapter is the addition `L R`, and a weighted sum of additions is one: that of the stacked
factors, `[w_1 L_1, w_2 L_2, ...] [R_1; R_2; ...]`, exactly. Where all adapters share R, as those that trained L alone
from the same start do, it is `(w_1 L_1 + w_2 L_2 + ...) R`, of the same rank. The best approximation of a smaller rank
comes from the singular values of the product, which is never formed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from ..forms.residual import ResidualLinear
from ..linalg.sums import compressed_sum, stacked_sum
from ..updates.resizing import set_part
from .config import WasiConfig, check_positive_integer
from .layer import WasiLayer, wasi_layers
from .vectors import AdapterVectors

COMBINATIONS = ("cat", "svd")


def check_weighted(
    model: nn.Module,
    configs: dict[str, WasiConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Refuse adapters of which there is no sum.

    Raises:
        ValueError: If one does not exist, the new one does, weights are not numbers, one for each, adapters train
            other tokens than each other, have other factors than L and R, or replace weights and their weights do not
            add up to one.
    """
    unknown = [name for name in adapters if name not in configs]
    if not adapters or unknown:
        raise ValueError(f"adapters must name adapters of the model, {sorted(configs)}, got {list(adapters)}.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, one for each of {list(adapters)}, got {list(weights)}.")
    if adapter_name in configs:
        raise ValueError(f"adapter_name must be new, got {adapter_name!r}, which the model has.")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {COMBINATIONS}, got {combination_type!r}.")
    if svd_rank is not None:
        check_positive_integer("svd_rank", svd_rank)
        if combination_type != "svd":
            raise ValueError(
                f"svd_rank must be a positive integer and goes with combination_type='svd', got {svd_rank!r} with "
                f"{combination_type!r}."
            )
    tokens = [configs[adapter].trainable_token_indices for adapter in adapters]
    if any(other != tokens[0] for other in tokens):
        raise ValueError(f"adapters must have the same trainable_token_indices, got {tokens}.")
    for name, layer in wasi_layers(model):
        missing = [adapter for adapter in adapters if adapter not in layer.wasi_form]
        if missing:
            raise ValueError(f"{name}: all adapters must be on the same layers, {missing} are not on this one.")
        if layer.experts > 1:
            raise ValueError(f"{name}: adapters of packed experts have no weighted sum; leave experts out of it.")
        for adapter in adapters:
            form = layer.form_of(adapter)
            if set(form.parts) != {"L", "R"} or any(form.frozen(part) is not None for part in form.parts):
                raise ValueError(
                    f"{name}: there is a weighted sum of adapters whose factors are L and R, in floating point; "
                    f"{adapter!r} has update={layer.wasi_update[adapter].name!r}."
                )
            if not isinstance(form, ResidualLinear) and not math.isclose(sum(weights), 1, abs_tol=1e-6):
                raise ValueError(
                    f"factors replace the weight, so the weights of their adapters must add up to 1, got {weights}."
                )
        shared = {layer.form_of(adapter).shared_parts for adapter in adapters}
        if len(shared) > 1 or (shared != {()} and combination_type != "cat"):
            updates = sorted({layer.wasi_update[adapter].name for adapter in adapters})
            raise ValueError(
                f"{name}: adapters that share a factor of a compressed model have a sum that shares it too: all must, "
                f"with combination_type='cat'; got {combination_type!r} and update={' and '.join(updates)}."
            )


def add_up(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    compress: bool,
    rank: int | None = None,
) -> dict[str, int]:
    """Make an adapter that exists the weighted sum of others; all of them pass :func:`check_weighted`.

    Args:
        model: With the adapters.
        adapters: Of the sum.
        weights: One for each.
        adapter_name: The adapter that becomes the sum, a copy of one of them.
        compress: Whether to take the best approximation of a rank.
        rank: That rank; by default the largest of the adapters' own, layer by layer.

    Returns:
        Ranks of the layers.
    """
    ranks, vectors = {}, None
    for name, layer in wasi_layers(model):
        largest = max(map(layer.rank, adapters)) if rank is None else rank
        ranks[name] = _add_up_layer(layer, adapters, weights, adapter_name, largest if compress else None)
        vectors = layer.vectors
    if vectors is not None:
        _add_up_vectors(vectors, adapters, weights, adapter_name)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _add_up_modules(module, adapters, weights, adapter_name)
        if isinstance(module, TrainableTokensWrapper):
            _add_up_tokens(module, adapters, weights, adapter_name)
    return ranks


@torch.no_grad()
def _add_up_layer(
    layer: WasiLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, rank: int | None
) -> int:
    forms = [layer.form_of(adapter) for adapter in adapters]
    into = layer.form_of(adapter_name)
    pairs = [form.factors() for form in forms]
    L, R = stacked_sum(pairs, weights)
    limit = min(into.out_features, into.in_features, len(R) if rank is None else rank)
    if len(R) > limit:
        L, R = compressed_sum(L, R, limit)
    set_part(into.L, L)
    if not into.shares("R"):  # else it is that of all, and of the base model
        set_part(into.R, R)
    if into.bias is not None:
        base = forms[0].residual.bias if isinstance(forms[0], ResidualLinear) else None
        into.bias.copy_(_sum([form.bias for form in forms], weights, base))  # type: ignore[misc]
    return len(R)


@torch.no_grad()
def _add_up_vectors(
    vectors: AdapterVectors, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    values = [dict(vectors.items(adapter)) for adapter in adapters]
    base = dict(vectors.base_items())
    for name, vector in vectors.items(adapter_name):
        if vector.is_floating_point() and all(name in others for others in values):
            vector.copy_(_sum([others[name] for others in values], weights, base.get(name)))


@torch.no_grad()
def _add_up_modules(
    wrapper: ModulesToSaveWrapper, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """A module that trains whole, such as a head."""
    if not all(adapter in wrapper.modules_to_save for adapter in adapters):
        return
    if adapter_name not in wrapper.modules_to_save:
        wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.modules_to_save[adapters[0]])
        wrapper.modules_to_save[adapter_name].requires_grad_(False)
    states = [wrapper.modules_to_save[adapter].state_dict() for adapter in adapters]
    base = wrapper.original_module.state_dict()
    for name, value in wrapper.modules_to_save[adapter_name].state_dict().items():
        if value.is_floating_point():
            value.copy_(_sum([state[name] for state in states], weights, base.get(name)))


@torch.no_grad()
def _add_up_tokens(
    wrapper: TrainableTokensWrapper, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Rows of an embedding, which PEFT holds as they have become, and as they were; a tied head has the same ones."""
    layer = wrapper.token_adapter
    if not all(adapter in layer.token_indices for adapter in adapters):
        return
    if adapter_name not in wrapper._adapters:
        wrapper.update(adapter_name, token_indices=layer.token_indices[adapters[0]], tied_adapter=layer.tied_adapter)
    if layer.tied_adapter is None:
        rows = layer.trainable_tokens_delta
        rows[adapter_name].requires_grad_(False)
        base = layer.trainable_tokens_original[adapter_name]
        rows[adapter_name].copy_(_sum([rows[adapter] for adapter in adapters], weights, base))


def _sum(values: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Tensor:
    """What is added to a base, weighted and added up; the weighted sum where there is none."""
    total = sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
    assert isinstance(total, Tensor)
    return total if base is None else total + (1 - sum(weights)) * base.double()
