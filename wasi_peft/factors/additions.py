"""Additions to weights in few bits that start as what rounding loses, from one forward pass over a few batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..forms.dense import dense_bias, dense_weight
from ..forms.residual import RESIDUALS
from ..linalg.coordinates import addition_basis, correction
from ..tuner.config import WasiConfig
from ..tuner.prepared import PreparedLayer, WasiFactors
from ..tuner.targets import asked_rank
from ..updates.base import InitialFactors
from .collecting import log_unreached, passes, through_model
from .data import CalibrationData, check_repeatable
from .statistics import InputStatistics

ADDITION_BATCHES = 8


def prepare_additions(
    model: nn.Module,
    config: WasiConfig,
    targets: dict[str, nn.Module],
    data: CalibrationData,
    *,
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    progress_bar: bool = True,
) -> WasiFactors:
    """The additions of all targets, in closed form (:func:`linalg.coordinates.correction`).

    The batches run through the dense model, again for the layers whose sums exceed the memory bound. An exact residual
    loses nothing: its additions start at zero, in coordinates that suit the data.

    Args:
        model: The dense model; not changed.
        config: With a residual, its targets resolved.
        targets: By name.
        data: Batches without labels, see :func:`calibration.calibrate_wasi`.
        max_batches: Use the first so many, 8 by default.
        max_memory_bytes: Bound on the memory for sums, bytes.
        progress_bar: Show progress bars.

    Raises:
        ValueError: If the data are empty, reach no layer, or make one see NaN or Inf.
    """
    check_repeatable(data)
    count = ADDITION_BATCHES if max_batches is None else max_batches
    pending, layers = dict(targets), dict[str, PreparedLayer]()
    unreached: list[str] = []
    with tqdm(total=len(targets), desc="WASI additions", disable=not progress_bar) as bar:
        run = through_model(model, data, count)
        for collector in passes(model, run, pending, max_memory_bytes=max_memory_bytes):
            for statistics in collector.take():
                unreached += [] if statistics.rows else statistics.modules
                for name in statistics.modules:
                    layers[name] = prepared_addition(name, pending.pop(name), config, statistics)
                    bar.update()
    log_unreached(unreached)
    return WasiFactors({name: layers[name] for name in targets})


@torch.no_grad()
def prepared_addition(name: str, module: nn.Module, config: WasiConfig, statistics: InputStatistics) -> PreparedLayer:
    """The addition of one layer, of the sums over its input.

    Args:
        name: Of the layer.
        module: The dense layer.
        config: With a residual for it.
        statistics: Of the input that it reads.
    """
    weight, bias = dense_weight(module), dense_bias(module)
    asked = asked_rank(name, config)
    rank = min(int(asked), *weight.shape)
    update = config.update_of(name)
    assert update.residual is not None
    lost = weight.double() - RESIDUALS[update.residual](module).dense_weight().double()
    L: Tensor
    if bool(lost.any()):
        L, R = correction(lost, rank, statistics.times, statistics.mean_square)
        if bias is not None:  # and what the input's mean loses beside them
            mean = statistics.mean.to(lost.device)
            bias = (bias.double() + lost @ mean - L @ (R @ mean)).to(bias.dtype)
    else:
        L = weight.new_zeros(len(weight), rank)
        R = addition_basis(weight, rank, statistics.times, statistics.mean_square)
    initial = InitialFactors(L.to(weight.dtype), R.to(weight.dtype), bias, met_data=True)
    return PreparedLayer(initial, rank, asked, None, update.name, residual=update.residual)
