"""What the data look like in the coordinates of each layer's factors, for :mod:`wasi_peft.linalg.coordinates`.

They are measured behind the factors, repaired or not, of all other layers, in one pass over a few batches; K x K sums
for each layer are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.coordinates import ImageMoments
from ..models.calls import (
    differentiable,
    evaluating,
    layer_input,
    model_output,
    real_rows,
    token_mask,
)
from ..models.features import watched_features
from ..tuner.prepared import WasiFactors
from ..updates.base import InitialFactors
from .data import check_repeatable, limited
from .statistics import backpropagate_signs
from .student import student_of

MOMENT_BATCHES = 16


class _Sums:
    """Sums over the rows that one layer saw."""

    def __init__(self, factors: InitialFactors) -> None:
        self.L, self.R = factors.L.float(), factors.R.float()
        self.image = torch.zeros_like(self.L.T @ self.L)
        self.gradient = torch.zeros_like(self.image)
        self.square, self.rows = 0.0, 0

    def see_input(self, rows: Tensor) -> None:
        """Add rows of the input, (rows, in)."""
        h = rows.to(self.R) @ self.R.T
        self.image.addmm_(h.T, h)
        self.square += float(rows.float().square().mean(1).sum())
        self.rows += len(rows)

    def see_gradient(self, rows: Tensor) -> None:
        """Add rows of the output's gradient, (rows, out)."""
        u = rows.to(self.L) @ self.L
        self.gradient.addmm_(u.T, u)

    def moments(self) -> ImageMoments:
        """Their means; a layer on which the features do not depend has output gradients as good as white."""
        reached = bool(self.gradient.any())
        gradient = self.gradient / self.rows if reached else self.L.T @ self.L
        return ImageMoments(self.image / self.rows, gradient, self.square / self.rows)


def image_moments(
    model: nn.Module,
    factors: Mapping[str, InitialFactors],
    data: Iterable[Any],
    *,
    max_batches: int = MOMENT_BATCHES,
    seed: int = 0,
    progress_bar: bool = True,
) -> dict[str, ImageMoments]:
    """Moments of `h = R x` and of `u = L^T g` in the layers of a model that has the factors for weights.

    g comes from a random +-1 projection of the features, as in :func:`calibration.calibrate_wasi`: no labels.

    Args:
        model: The dense model; not changed.
        factors: Factors of its target layers.
        data: Batches without labels; padded tokens do not count.
        max_batches: Use only the first so many.
        seed: Seed of the projections; torch's global generator is not touched.
        progress_bar: Show a progress bar.

    Returns:
        By name, of the layers that the data reach.

    Raises:
        ValueError: If the data are empty, or make a layer see NaN or Inf.
    """
    check_repeatable(data)
    sums = {name: _Sums(initial) for name, initial in factors.items()}
    signs = torch.Generator().manual_seed(seed)
    mask: Tensor | None = None

    def watch(name: str, x: Tensor, y: Tensor) -> Tensor:
        sums[name].see_input(real_rows(x.detach(), mask))
        if not torch.is_grad_enabled():
            return y
        y = differentiable(y)
        y.register_hook(lambda gradient: sums[name].see_gradient(gradient.reshape(-1, gradient.shape[-1])))
        return y

    def project(features: Tensor) -> None:
        backpropagate_signs(features, mask, signs)

    with evaluating(model, gradients=True):
        student, layers = student_of(model, factors)
        student.requires_grad_(False)
        for name, layer in layers.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, y: Tensor, name: str = name) -> Tensor:
                return watch(name, layer_input(args, kwargs), y)

            layer.register_forward_hook(hook, with_kwargs=True)
        with watched_features(student, project):
            for batch in limited(data, max_batches, "WASI moments" if progress_bar else None):
                mask = token_mask(batch)
                model_output(student, batch)
    moments = {}
    for name, each in sums.items():
        if not each.rows:
            continue
        moments[name] = each.moments()
        if not all(bool(torch.isfinite(part).all()) for part in moments[name][:2]):
            raise ValueError(f"{name}: its input, or the gradient of its output, holds NaN or Inf.")
    return moments


def with_moments(
    model: nn.Module,
    factors: WasiFactors,
    data: Iterable[Any],
    *,
    max_batches: int = MOMENT_BATCHES,
    progress_bar: bool = True,
) -> WasiFactors:
    """The same factors with their moments measured, see :func:`image_moments`."""
    initial = factors.initial
    moments = image_moments(model, initial, data, max_batches=max_batches, progress_bar=progress_bar)
    return factors.with_initial({name: replace(each, moments=moments.get(name)) for name, each in initial.items()})


def with_initial(
    model: nn.Module,
    factors: WasiFactors,
    initial: Mapping[str, InitialFactors],
    data: Iterable[Any],
    *,
    progress_bar: bool = True,
) -> WasiFactors:
    """Other values for some factors; moments that those had are measured again, being of their coordinates."""
    changed = factors.with_initial(initial)
    if all(each.moments is None for each in factors.initial.values()):
        return changed
    return with_moments(model, changed, data, progress_bar=progress_bar)
