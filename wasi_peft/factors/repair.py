"""Repair: a short, label-free training of the factors so that the blocks answer as they did in the dense model.

Truncation errors add up from layer to layer, and each layer's factors were cut as if the layers before it were exact.
A few hundred steps against the dense model's own hidden states ("healing") correct both at once.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.structure import Structure
from ..tuner.config import WasiConfig
from ..tuner.layer import Linear
from ..updates.base import InitialFactors
from ..updates.factor import Factor
from .blocks import hooked
from .calibration import check_repeatable, evaluating, features_of, limited, model_output, real_rows, token_mask

logger = logging.getLogger(__name__)

REPAIR_STEPS = 400
ADAPTER = "repair"
_WARM_UP = 0.05


def repair_factors(
    model: nn.Module,
    factors: Mapping[str, InitialFactors],
    data: Iterable[Any],
    *,
    steps: int = REPAIR_STEPS,
    lr: float = 2e-4,
    every: int = 3,
    max_batches: int | None = None,
    progress_bar: bool = True,
) -> dict[str, InitialFactors]:
    """Train factors and biases until the compressed blocks answer like the dense ones.

    The loss is `sum_b mean((h_b - h*_b)^2) / var(h*_b)` over every third block's output h_b (and the last one's), h*_b
    being that of the dense model; padded tokens do not count. AdamW (on float32 copies of factors in low precision),
    warm-up, cosine decay. Both models share everything but the target layers; on top of the dense model there are the
    factors, their gradients and two optimizer moments, and one batch.

    **Shape**
        - factors: by module name, L (out, K), R (K, in), bias (out,) or None

    Args:
        model: The dense model; not changed.
        factors: Initial factors of its target layers.
        data: Batches without labels, gone through as often as the steps need.
        steps: Optimizer steps.
        lr: Peak learning rate.
        every: Compare every that many blocks, counted from the last.
        max_batches: Use only that many batches.
        progress_bar: Show a progress bar.

    Returns:
        New factors, L with orthonormal columns; the given ones, with a warning, if the loss did not fall.

    Raises:
        ValueError: If a number is out of range; or if the data are empty, a function, can be iterated only once, or
            make the dense model answer NaN or Inf.
    """
    check_arguments(data, steps=steps, lr=lr, every=every)
    with evaluating(model, gradients=True):
        student, layers = student_of(model, factors)
        blocks = compared_blocks(model, factors, every)
        losses = list(_train(model, student, layers, blocks, data, steps, lr, max_batches, progress_bar))
    span = max(1, min(10, len(losses) // 4))
    before, after = sum(losses[:span]) / span, sum(losses[-span:]) / span
    if not lowered(before, after, "the blocks' error"):
        return dict(factors)
    return {name: orthonormal_factors(layer) for name, layer in layers.items()}


def lowered(before: float, after: float, what: str) -> bool:
    """Whether a repair lowered something; the log says so."""
    if after < before:
        logger.info("repair: %s fell from %.4f to %.4f", what, before, after)
        return True
    logger.warning("repair did not lower %s (%.4f to %.4f); its result is dropped.", what, before, after)
    return False


def check_arguments(data: Iterable[Any], **positive: float) -> None:
    """Raise a ValueError for numbers that are not positive and finite, and for data that are no batches."""
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    if callable(data):
        raise ValueError("repair needs batches, got a function.")
    check_repeatable(data)


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


def student_of(model: nn.Module, factors: Mapping[str, InitialFactors]) -> tuple[nn.Module, dict[str, Linear]]:
    """A second model that shares every tensor with the first, but has factored target layers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    student = copy.deepcopy(model, shared)
    config = WasiConfig(update=Factor.name, activation_threshold=None)
    layers = {}
    for name, given in factors.items():
        initial = InitialFactors(given.L.clone(), given.R.clone(), given.bias)  # a layer trains what it is given
        layer = Linear(student.get_submodule(name), ADAPTER, config, name, initial.L.shape[1], initial)
        layer.release_base("release")
        student.set_submodule(name, layer)
        layers[name] = layer
    return student, layers


def _train(
    teacher: nn.Module,
    student: nn.Module,
    layers: Mapping[str, Linear],
    blocks: Sequence[str],
    data: Iterable[Any],
    steps: int,
    lr: float,
    max_batches: int | None,
    progress_bar: bool,
) -> Iterator[float]:
    """Yields the loss of every step, up to the first that is not finite.

    Raises:
        ValueError: If it is the dense model that answers NaN or Inf.
    """
    parts = _trained_parts(layers.values())
    descent = Descent(parts, [lr] * len(parts), steps)
    with tqdm(total=steps, desc="WASI repair", disable=not progress_bar) as bar:
        for batch in _cycle(data, max_batches, steps):
            with torch.no_grad():
                wanted = _hidden_states(teacher, blocks, batch)
            hidden = _hidden_states(student, blocks, batch)
            mask = token_mask(batch)
            terms = [relative_error(ours, theirs, mask) for ours, theirs in zip(hidden, wanted, strict=True)]
            loss = torch.stack(terms).sum()
            value = float(loss.detach())
            yield value
            if not math.isfinite(value):
                if not all(bool(torch.isfinite(state).all()) for state in wanted):
                    raise ValueError("the dense model answers NaN or Inf on the calibration data.")
                return
            loss.backward()
            descent.step()
            bar.set_postfix(error=f"{value:.4f}")
            bar.update()


def _trained_parts(layers: Iterable[Linear]) -> list[nn.Parameter]:
    """What trains of some layers."""
    return [part for layer in layers for part in layer.parameters() if part.requires_grad]


class Descent:
    """AdamW without decay, on float32 copies of parameters in low precision; warm-up, then cosine decay.

    Args:
        parameters: What to train.
        rates: Peak learning rate of each.
        steps: Steps in all.
        betas: Those of AdamW.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rates: Sequence[float],
        steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parameters = parameters
        # steps of this size are lost when bfloat16 rounds; a float32 parameter is its own copy
        self.precise = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parameters]
        groups = [{"params": [part], "lr": rate} for part, rate in zip(self.precise, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: decayed(step, steps))

    @classmethod
    def relative(cls, layers: Iterable[Linear], rate: float, steps: int) -> Descent:
        """Of everything in some layers that trains, for few steps, at rates relative to each part's size.

        The size is the root mean square, 1 for a bias of zeros. The second moment must follow few steps.
        """
        parts = _trained_parts(layers)
        precise = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        sizes = [float(part.square().mean().sqrt()) or 1.0 for part in precise]
        return cls(parts, [rate * size for size in sizes], steps, betas=(0.9, 0.95))

    @torch.no_grad()
    def step(self) -> None:
        """One step along the parameters' gradients, which are then gone."""
        for parameter, copied in zip(self.parameters, self.precise, strict=True):
            copied.grad = None if parameter.grad is None else parameter.grad.to(copied.dtype)
            parameter.grad = None
        self.optimizer.step()
        for parameter, copied in zip(self.parameters, self.precise, strict=True):
            parameter.copy_(copied)
        self.schedule.step()


def decayed(step: int, steps: int) -> float:
    """Learning rate of a step, relative to the peak: warm-up, then cosine decay."""
    return min((step + 1) / max(1.0, _WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def shuffled(batches: int, steps: int) -> list[int]:
    """Which batch each step takes: all of them in a new order, again and again, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    rounds = (torch.randperm(batches, generator=generator) for _ in range(math.ceil(steps / batches)))
    return torch.cat(list(rounds)).tolist()[:steps]


def _cycle(data: Iterable[Any], max_batches: int | None, steps: int) -> Iterator[Any]:
    count = 0
    while True:
        for batch in limited(data, max_batches, None):
            yield batch
            count += 1
            if count == steps:
                return


def relative_error(hidden: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error relative to the variance of what is wanted; padded tokens do not count.

    **Shape**
        - hidden, wanted: (..., features); mask: (B, N) where these are (B, N, features), or None
    """
    hidden, wanted = real_rows(hidden, mask).float(), real_rows(wanted, mask).float()
    center = wanted.mean(0) if len(wanted) > 1 else 0  # one row alone has no variance
    scale = (wanted - center).square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
    return (hidden - wanted).square().mean() / scale


def _hidden_states(model: nn.Module, blocks: Sequence[str], batch: Any) -> list[Tensor]:
    """Outputs of the blocks, or the model's features where no layer lies in a block."""
    found: dict[str, Tensor] = {}

    def after(name: str, output: Any) -> None:
        found[name] = features_of(output)

    with hooked(model, blocks, after=after):
        output = model_output(model, batch)
    return [found[name] for name in blocks if name in found] or [features_of(output)]


@torch.no_grad()
def orthonormal_factors(layer: Linear) -> InitialFactors:
    """The factors of a trained layer in the form that training starts from: L with orthonormal columns."""
    form = layer.form_of(ADAPTER)
    L, R = form.L, form.R
    basis, corner = torch.linalg.qr(L.double())
    right = corner @ R.double()
    bias = None if form.bias is None else form.bias.detach()
    return InitialFactors(basis.to(L.dtype), right.to(R.dtype), bias)
