"""The short training of factors that every repair is: AdamW in full precision, warm-up, cosine decay."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..forms.factored import FactoredLinear
from .data import check_repeatable

logger = logging.getLogger(__name__)

_WARM_UP = 0.05  # of all steps


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
    def relative(cls, layers: Iterable[FactoredLinear], rate: float, steps: int) -> Descent:
        """Of everything in some layers that trains, for few steps, at rates relative to each part's size.

        The size is the root mean square, 1 for a bias of zeros. The second moment must follow few steps.
        """
        parts = trained_parts(layers)
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


def trained_parts(layers: Iterable[FactoredLinear]) -> list[nn.Parameter]:
    """What trains of some layers."""
    return [part for layer in layers for part in layer.parameters() if part.requires_grad]


def decayed(step: int, steps: int) -> float:
    """Learning rate of a step, relative to the peak: warm-up, then cosine decay."""
    return min((step + 1) / max(1.0, _WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def shuffled(batches: int, steps: int) -> list[int]:
    """Which batch each step takes: all of them in a new order, again and again, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    rounds = (torch.randperm(batches, generator=generator) for _ in range(math.ceil(steps / batches)))
    return torch.cat(list(rounds)).tolist()[:steps]
