"""Repair of one block after the other, without labels.

Truncation errors add up from layer to layer, and each layer's factors were cut as if the layers before it were exact.
Block after block, first each layer is refitted to its present inputs (:mod:`refit`), then all factors of the
block are trained for a short while so that its output, of the compressed model's hidden states, is that of the dense
model's. Blockwise reconstruction is known from quantisation (BRECQ, arXiv 2102.05426). Of all repairs it holds the
least in memory, and restores less than the others do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..forms.attention import with_projections
from ..forms.factored import FactoredLinear
from ..models.calls import evaluating, real_rows
from ..tuner.prepared import WasiFactors
from ..updates.base import InitialFactors
from .block_states import BlockStates, Hidden, segments
from .data import limited
from .descent import Descent, check_arguments, shuffled
from .model_repair import compared_blocks
from .moments import with_initial
from .refit import RIDGE, refit_block
from .student import orthonormal_factors, student_of

logger = logging.getLogger(__name__)

BLOCK_ROWS = 2**15
BLOCK_STEPS = 64


@with_projections
def repair_blocks(
    model: nn.Module,
    factors: WasiFactors,
    data: Iterable[Any],
    *,
    rows: int = BLOCK_ROWS,
    steps: int = BLOCK_STEPS,
    rate: float = 5e-3,
    ridge: float = RIDGE,
    progress_bar: bool = True,
) -> WasiFactors:
    """Repair the factors of the layers in the transformer blocks, one block after the other.

    The training minimises :func:`token_error` of the block's output, by AdamW (on float32 copies of factors in low
    precision), warm-up, cosine decay. Each block runs alone, on hidden states of both models that are kept: on top of
    the dense model there are the factors, twice these states, and gradients and optimizer state of one block. Layers
    outside of blocks, and those of blocks that run more than once or not at all, stay as they are.

    Args:
        model: The dense model; not changed.
        factors: What :func:`preprocess_wasi` made for it, not repaired yet.
        data: Batches without labels.
        rows: Samples times tokens to look at, about: as many whole batches as hold them.
        steps: Optimizer steps of each block, each on one batch; 0 only refits.
        rate: Peak learning rate, relative to the root mean square of each factor.
        ridge: How far the refit draws to the identity: the shift of :func:`refit.input_map`, relative to the mean of
            the moment's diagonal.
        progress_bar: Show a progress bar.

    Returns:
        New factors, L with orthonormal columns, to be attached. A block whose error the training does not lower is
        only refitted, with a warning.

    Raises:
        ValueError: If a number is out of range; or if the data are empty, a function, can be iterated only once, or
            make a layer's input NaN or Inf.
    """
    if not 0 <= steps < math.inf:
        raise ValueError(f"steps must be at least 0 and finite, got {steps!r}.")
    factors.require_factors("repair_blocks")
    check_arguments(data, rows=rows, rate=rate, ridge=ridge)
    with evaluating(model, gradients=False):
        student, layers = student_of(model, factors.initial)
        (first,) = limited(data, 1, None)
        chains, first_rows = segments(model, compared_blocks(model, factors.layers, every=1), first)
        batches = list(limited(data, math.ceil(rows / max(1, first_rows)), None))
        with tqdm(total=sum(map(len, chains)), desc="WASI blocks", disable=not progress_bar) as bar:
            for chain in chains:
                dense, compressed = (BlockStates.before(chain, each, batches) for each in (model, student))
                for block in chain:
                    inside = {name: layers[name] for name in layers if f"{name}.".startswith(f"{block}.")}
                    refit_block(block, dense, compressed, inside, ridge)
                    dense.advance(block)
                    if steps:
                        error = _train_block(block, dense.hidden, compressed, inside, steps, rate)
                        bar.set_postfix(error=f"{error:.4f}")
                    compressed.advance(block)
                    bar.update()
    repaired = {name: _repaired(layer, factors.initial[name]) for name, layer in layers.items()}
    return with_initial(model, factors, repaired, data, progress_bar=progress_bar)


def token_error(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `|h - h*|^2 / |h*|^2`; padded tokens do not count.

    Relative to each token's own size, because that is how the norm of the next block sees it: the few tokens whose
    hidden states are a hundred times as large as the others' would decide everything otherwise.

    **Shape**
        - hidden, target: (..., features); mask: (B, N) where these are (B, N, features), or None
    """
    hidden, target = real_rows(hidden, mask).float(), real_rows(target, mask).float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((hidden - target).square().sum(-1) / size).mean()


def _train_block(
    block: str,
    targets: Hidden,
    states: BlockStates,
    layers: Mapping[str, FactoredLinear],
    steps: int,
    rate: float,
) -> float:
    """Train the factors of a block; returns its error, which is never larger than before."""
    descent = Descent.relative(layers.values(), rate, steps)
    before, given = _error(block, targets, states), [part.detach().clone() for part in descent.parameters]
    for index in shuffled(len(targets), steps):
        with torch.enable_grad():
            loss = token_error(states.run(block, index), targets[index], states.masks[index])
        if not loss.requires_grad:  # the block runs its layers without gradients
            break
        loss.backward()
        descent.step()
    after = _error(block, targets, states)
    if after < before:
        return after
    logger.warning("%s: training did not lower its error (%.4f to %.4f); it is only refitted.", block, before, after)
    for part, old in zip(descent.parameters, given, strict=True):
        part.data.copy_(old)
    return before


def _error(block: str, targets: Hidden, states: BlockStates) -> float:
    errors = [token_error(states.run(block, i), targets[i], states.masks[i]) for i in range(len(targets))]
    return float(torch.stack(errors).mean())


def _repaired(layer: FactoredLinear, given: InitialFactors) -> InitialFactors:
    """The factors of a layer; L stays the given one, bit for bit, where only R was refitted."""
    repaired = orthonormal_factors(layer)
    if not torch.equal(layer.L, given.L):
        return repaired
    return InitialFactors(given.L, layer.R.detach(), repaired.bias)
