"""How long single layers take on this machine, dense and factored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.subspaces import orthonormalize
from ..linalg.tucker import Tucker
from ..ranks.plan import DEFAULT_UPDATE
from ..updates.core import core_linear, three_linears
from ..updates.factored import factored_linear
from ..updates.low_rank import joined, lay_side_by_side, low_rank_linear

SMALLEST_SAMPLE_RUNS = 5
SMALLEST_SAMPLE_SECONDS = 0.05

Factors = tuple[nn.Parameter, nn.Parameter, nn.Parameter | None, nn.Parameter | None]


def timed(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, from when the device has done all before it until it has done this."""
    _wait_for(device)
    start = time.perf_counter()
    task()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LayerTimer:
    """Seconds of single layers with random values on this machine: the best of several runs.

    Args:
        dtype: Of weights and inputs.
        device: Where to run.
        update: What trains, as in `WasiConfig`.
        update_rank: With `update="low_rank"`, the rank of that.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        update: str = DEFAULT_UPDATE,
        update_rank: int = 0,
    ) -> None:
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._update = update
        self._update_rank = update_rank

    def dense(self, rows: int, out_features: int, in_features: int, training: bool) -> float:
        """Forward pass of a dense layer, with backward if `training`."""
        weight = self._random(out_features, in_features)
        return self._layer(
            lambda x, *weights: F.linear(x, *weights), (rows, out_features, in_features), (weight,), training
        )

    def factored(
        self, rows: int, out_features: int, in_features: int, rank: int, feature_rank: int | None, training: bool
    ) -> float:
        """The same for a factored layer whose input is compressed already, or exact for None."""
        if self._update == "core":
            return self._with_core(rows, out_features, in_features, rank, training)
        factors = self._factors(out_features, in_features, rank)
        compressed = None
        if feature_rank is not None:
            compressed = Tucker(self._random(1, rows, feature_rank), self._random(in_features, feature_rank))

        def layer(x: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
            if not training:
                outer, inner = joined(*factors)
                return F.linear(F.linear(x, inner), outer)
            if self._update == "low_rank":
                return low_rank_linear(x, factors[0], factors[1], outer, inner, None, compressed)
            return factored_linear(x, outer, inner, None, compressed, self._update == "subspace")

        outer, inner = [factor for factor in factors if factor is not None][-2:]
        frozen = (inner,) if self._update == "frozen_basis" else ()
        trained = (outer,) if frozen else (outer, inner)
        return self._layer(layer, (rows, out_features, in_features), trained, training, frozen)

    def _with_core(self, rows: int, out_features: int, in_features: int, rank: int, training: bool) -> float:
        L, R = self._random(out_features, rank), self._random(rank, in_features)

        def layer(x: Tensor, M: Tensor) -> Tensor:
            return core_linear(x, L, M, R) if training else three_linears(x, L, M, R, None)

        return self._layer(layer, (rows, out_features, in_features), (self._random(rank, rank),), training)

    def compression(self, rows: int, in_features: int, rank: int) -> float:
        """Compression of an input onto a basis that is there."""
        x, basis = self._random(rows, in_features), self._random(in_features, rank)
        return self._seconds(lambda: x @ basis)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(**self._options)

    def _factors(self, out_features: int, in_features: int, rank: int) -> Factors:
        """L, R and what trains beside them, as a layer holds them."""
        L = nn.Parameter(orthonormalize(self._random(out_features, rank)), requires_grad=False)
        R = nn.Parameter(self._random(rank, in_features), requires_grad=False)
        if self._update != "low_rank":
            return L, R, None, None
        B = nn.Parameter(self._random(out_features, self._update_rank), requires_grad=False)
        A = nn.Parameter(self._random(self._update_rank, in_features), requires_grad=False)
        lay_side_by_side(L, R, B, A)
        return L, R, B, A

    def _layer(
        self,
        layer: Callable[..., Tensor],
        sizes: tuple[int, int, int],
        weights: Sequence[Tensor],
        training: bool,
        frozen: Sequence[Tensor] = (),
    ) -> float:
        """Seconds of `layer(x, *weights, *frozen)`; in training, with gradients for x and the weights."""
        rows, out_features, in_features = sizes
        inputs = [self._random(1, rows, in_features), *weights]
        if not training:
            with torch.no_grad():
                return self._seconds(lambda: layer(*inputs, *frozen))
        inputs = [tensor.requires_grad_() for tensor in inputs]
        gradient = self._random(1, rows, out_features)
        return self._seconds(lambda: torch.autograd.grad(layer(*inputs, *frozen), inputs, gradient))

    def _seconds(self, task: Callable[[], Any]) -> float:
        device = torch.device(self._options["device"])
        seconds: list[float] = []
        task()
        while len(seconds) < SMALLEST_SAMPLE_RUNS or sum(seconds) < SMALLEST_SAMPLE_SECONDS:
            seconds.append(timed(task, device))
        return min(seconds)
