"""How long single layers take on this machine, dense and factored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms.factored import FactoredLinear
from ..forms.products import OUTLIERS, ProductChoice
from ..forms.residual import RESIDUALS, ResidualLinear
from ..linalg.low_bit import quantize_rows
from ..linalg.timing import timed
from ..linalg.tucker import Tucker
from ..updates import DEFAULT_UPDATE, Update, make_update

SMALLEST_SAMPLE_RUNS = 5
SMALLEST_SAMPLE_SECONDS = 0.05


class LayerTimer:
    """Seconds of single layers with random values on this machine: the best of several runs.

    Args:
        dtype: Of weights and inputs.
        device: Where to run.
        update: What trains; the default update for None.
        residual_product: How int8 products are computed, see `WasiConfig`; the fastest for None.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        update: Update | None = None,
        residual_product: str | None = None,
    ) -> None:
        self._products = ProductChoice(residual_product)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._update = make_update(DEFAULT_UPDATE) if update is None else update

    def dense(self, rows: int, out_features: int, in_features: int, training: bool) -> float:
        """Forward pass of a dense layer, with backward if `training`."""
        weight = self._random(out_features, in_features)
        return self._layer(
            lambda x, *weights: F.linear(x, *weights), (rows, out_features, in_features), (weight,), training
        )

    def factored(
        self,
        rows: int,
        out_features: int,
        in_features: int,
        rank: int,
        feature_rank: int | None,
        training: bool,
        update: Update | None = None,
    ) -> float:
        """The same for another form of a layer, whose input is compressed already, or exact for None.

        Beside a residual that rounds its input, the rounding counts.

        Args:
            rows: Of the input.
            out_features: Of the layer.
            in_features: Of the layer.
            rank: K; 0 for a dense layer that does not train.
            feature_rank: Of the compressed input.
            training: Forward and backward, else the forward pass alone.
            update: What trains; the timer's for None.
        """
        update = self._update if update is None else update
        if rank == 0:
            return self.frozen(rows, out_features, in_features, training)
        form = self._form(out_features, in_features, rank, update)
        compressed: Tucker | None = None
        if feature_rank is not None and update.reads_input is not None and update.residual is None:
            compressed = Tucker(self._random(1, rows, feature_rank), self._random(in_features, feature_rank))
        rounds = isinstance(form, ResidualLinear) and update.reads_input is not None and form.residual.rounds_inputs

        def layer(x: Tensor, *_: Tensor) -> Tensor:
            if not training:
                return form(x)
            kept = quantize_rows(x.detach().reshape(rows, -1), OUTLIERS) if rounds else compressed
            return update.forward(form, x, kept, None)

        trained = [form.part(part) for part in update.trained]
        return self._layer(layer, (rows, out_features, in_features), trained, training)

    def frozen(self, rows: int, out_features: int, in_features: int, training: bool) -> float:
        """The same for a dense layer that does not train, but lets its input."""
        weight = self._random(out_features, in_features)
        return self._layer(lambda x: F.linear(x, weight), (rows, out_features, in_features), (), training)

    def compression(self, rows: int, in_features: int, rank: int) -> float:
        """Compression of an input onto a basis that is there."""
        x, basis = self._random(rows, in_features), self._random(in_features, rank)
        return self._seconds(lambda: x @ basis)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(**self._options)

    def _form(self, out_features: int, in_features: int, rank: int, update: Update) -> FactoredLinear:
        """A form with random values, as a layer holds it, of which what trains asks for gradients."""
        form: FactoredLinear
        if update.residual is None:
            form = update.new_form(in_features, out_features, rank, bias=False, **self._options)
        else:
            dense = nn.Linear(in_features, out_features, bias=False, **self._options)
            form = ResidualLinear(RESIDUALS[update.residual](dense, self._products), rank, bias=False)
        for part in form.parts:
            form.part(part).requires_grad_(part in update.trained)
        update.store(form, self._products)
        return form

    def _layer(
        self,
        layer: Callable[..., Tensor],
        sizes: tuple[int, int, int],
        weights: Sequence[Tensor],
        training: bool,
    ) -> float:
        """Seconds of `layer(x, *weights)`; in training, with gradients for x and the weights."""
        rows, out_features, in_features = sizes
        inputs = [self._random(1, rows, in_features), *weights]
        if not training:
            with torch.no_grad():
                return self._seconds(lambda: layer(*inputs))
        inputs = [tensor.requires_grad_() for tensor in inputs]
        gradient = self._random(1, rows, out_features)
        return self._seconds(lambda: torch.autograd.grad(layer(*inputs), inputs, gradient))

    def _seconds(self, task: Callable[[], Any]) -> float:
        device = torch.device(self._options["device"])
        seconds: list[float] = []
        task()
        while len(seconds) < SMALLEST_SAMPLE_RUNS or sum(seconds) < SMALLEST_SAMPLE_SECONDS:
            seconds.append(timed(task, device))
        return min(seconds)
