"""Repair: a short, label-free training of the factors so that the blocks answer as they did in the dense model.

Truncation errors add up from layer to layer, and each layer's factors were cut as if the layers before it were exact.
A few hundred steps against the dense model's own hidden states ("healing") correct both at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..forms.attention import with_projections
from ..forms.factored import FactoredLinear
from ..models.calls import evaluating, features_of, hooked, model_output, real_rows, token_mask
from ..models.structure import Structure
from ..tuner.prepared import WasiFactors
from .data import limited
from .descent import Descent, check_arguments, lowered, trained_parts
from .moments import with_initial
from .student import orthonormal_factors, student_of

REPAIR_STEPS = 400
COMPARED_BATCHES = 4  # on which the loss before and after is compared


@with_projections
def repair_factors(
    model: nn.Module,
    factors: WasiFactors,
    data: Iterable[Any],
    *,
    steps: int = REPAIR_STEPS,
    lr: float = 2e-4,
    every: int = 3,
    max_batches: int | None = None,
    progress_bar: bool = True,
) -> WasiFactors:
    """Train factors and biases until the compressed blocks answer like the dense ones.

    The loss is `sum_b mean((h_b - h*_b)^2) / var(h*_b)` over every third block's output h_b (and the last one's), h*_b
    being that of the dense model; padded tokens do not count. AdamW (on float32 copies of factors in low precision),
    warm-up, cosine decay. Both models share everything but the target layers; on top of the dense model there are the
    factors, their gradients and two optimizer moments, and one batch.

    Args:
        model: The dense model; not changed.
        factors: What :func:`preprocess_wasi` made for it.
        data: Batches without labels, gone through as often as the steps need.
        steps: Optimizer steps.
        lr: Peak learning rate.
        every: Compare every that many blocks, counted from the last.
        max_batches: Use only that many batches.
        progress_bar: Show a progress bar.

    Returns:
        New factors, L with orthonormal columns, to be attached; the given ones, with a warning, if the loss of the
        first batches did not fall.

    Raises:
        ValueError: If a number is out of range; or if the data are empty, a function, can be iterated only once, or
            make the dense model answer NaN or Inf.
    """
    factors.require_factors("repair_factors")
    check_arguments(data, steps=steps, lr=lr, every=every)
    with evaluating(model, gradients=True):
        student, layers = student_of(model, factors.initial)
        blocks = compared_blocks(model, factors.layers, every)
        compared = min(COMPARED_BATCHES, steps, COMPARED_BATCHES if max_batches is None else max_batches)
        some = list(limited(data, compared, None))
        before = _losses(model, student, blocks, some)
        _train(model, student, layers, blocks, data, steps, lr, max_batches, progress_bar)
        after = _losses(model, student, blocks, some)
    if not lowered(_mean_of_finite(before), float(after.mean()), "the blocks' error"):
        return factors
    repaired = {name: orthonormal_factors(layer) for name, layer in layers.items()}
    return with_initial(model, factors, repaired, data, progress_bar=progress_bar)


def compared_blocks(model: nn.Module, names: Iterable[str], every: int) -> list[str]:
    """Names of every few blocks that some layers are in, counted from the last of each list of blocks.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=32)
        >>> compared_blocks(ViTModel(small), [f"layers.{i}.mlp.fc1" for i in range(5)], every=3)
        ['layers.1', 'layers.4']
    """
    structure = Structure(model)
    stacks: dict[str, list[str]] = {}
    for name in names:
        block = structure.block_of(name)
        if block is not None:
            stack = stacks.setdefault(block.rpartition(".")[0], [])
            if block not in stack:
                stack.append(block)
    return [block for stack in stacks.values() for block in reversed(stack[::-1][::every])]


def _train(
    teacher: nn.Module,
    student: nn.Module,
    layers: Mapping[str, FactoredLinear],
    blocks: Sequence[str],
    data: Iterable[Any],
    steps: int,
    lr: float,
    max_batches: int | None,
    progress_bar: bool,
) -> None:
    """Up to the first loss that is not finite; not at all where gradients do not reach the factors."""
    parts = trained_parts(layers.values())
    descent = Descent(parts, [lr] * len(parts), steps)
    with tqdm(total=steps, desc="WASI repair", disable=not progress_bar) as bar:
        for batch in _cycle(data, max_batches, steps):
            loss = _loss(teacher, student, blocks, batch)
            if not (bool(torch.isfinite(loss)) and loss.requires_grad):
                return
            loss.backward()
            descent.step()
            bar.set_postfix(error=f"{float(loss.detach()):.4f}")
            bar.update()


def _loss(teacher: nn.Module, student: nn.Module, blocks: Sequence[str], batch: Any) -> Tensor:
    """The loss of one batch.

    Raises:
        ValueError: If the dense model answers NaN or Inf.
    """
    with torch.no_grad():
        targets = _hidden_states(teacher, blocks, batch)
    mask = token_mask(batch)
    hidden = _hidden_states(student, blocks, batch)
    terms = [relative_error(ours, theirs, mask) for ours, theirs in zip(hidden, targets, strict=True)]
    loss = torch.stack(terms).sum()
    if not bool(torch.isfinite(loss)) and not all(bool(torch.isfinite(state).all()) for state in targets):
        raise ValueError("the dense model answers NaN or Inf on the calibration data.")
    return loss


@torch.no_grad()
def _losses(teacher: nn.Module, student: nn.Module, blocks: Sequence[str], batches: Sequence[Any]) -> Tensor:
    return torch.stack([_loss(teacher, student, blocks, batch) for batch in batches])


def _mean_of_finite(losses: Tensor) -> float:
    """Infinite where none is finite: whatever is finite afterwards is less."""
    finite = losses[losses.isfinite()]
    return float(finite.mean()) if len(finite) else math.inf


def _cycle(data: Iterable[Any], max_batches: int | None, steps: int) -> Iterator[Any]:
    count = 0
    while True:
        for batch in limited(data, max_batches, None):
            yield batch
            count += 1
            if count == steps:
                return


def relative_error(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error relative to the variance of the target; padded tokens do not count.

    **Shape**
        - hidden, target: (..., features); mask: (B, N) where these are (B, N, features), or None
    """
    hidden, target = real_rows(hidden, mask).float(), real_rows(target, mask).float()
    center = target.mean(0) if len(target) > 1 else 0  # one row alone has no variance
    scale = (target - center).square().mean().clamp_min(torch.finfo(target.dtype).tiny)
    return (hidden - target).square().mean() / scale


def _hidden_states(model: nn.Module, blocks: Sequence[str], batch: Any) -> list[Tensor]:
    """Outputs of the blocks, or the model's features where no layer lies in a block."""
    answers: dict[str, Tensor] = {}

    def after(name: str, output: Any) -> None:
        answers[name] = features_of(output)

    with hooked(model, blocks, after=after):
        output = model_output(model, batch)
    return [answers[name] for name in blocks if name in answers] or [features_of(output)]
