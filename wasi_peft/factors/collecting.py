"""One pass of calibration over the data: hooks that feed the statistics of as many layers as fit into memory."""

from __future__ import annotations

import logging
import math
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..forms.dense import dense_weight
from ..models.calls import differentiable, evaluating, layer_input, loss_of, model_output, token_mask
from ..models.features import watched_features
from .data import CalibrationData, limited
from .statistics import InputStatistics, add_gradient_energies, backpropagate_signs

logger = logging.getLogger(__name__)

Gradients = Literal["features", "loss"]

COMPARED_CALLS = 2  # first calls of a layer whose compressed gradients are compared with exact ones


class NoGradientsError(ValueError):
    """No gradient reaches a layer: the model runs them without, or its features do not depend on them."""


class Collector:
    """Hooks of one pass over the data; decides at a module's first call whether its sums fit the bound."""

    def __init__(
        self,
        pending: dict[str, nn.Module],
        max_memory_bytes: int,
        gradients: Gradients | None,
        seed: int,
        compared_calls: int = COMPARED_CALLS,
    ) -> None:
        self.pending = pending
        self.max_memory_bytes = max_memory_bytes
        self.gradients = gradients
        self.seed = seed
        self.compared_calls = compared_calls
        self.signs = torch.Generator().manual_seed(seed)
        self.collected: list[InputStatistics] = []
        self.leaders: dict[str, InputStatistics] = {}  # module that feeds an accumulator
        self.owners: dict[str, InputStatistics] = {}  # module of an accumulator
        self.seen: set[str] = set()
        self.reached = False  # by a gradient, any of the layers
        self.mask: Tensor | None = None  # of the tokens that are no padding, in the running batch
        self.calls: Counter[str] = Counter()
        self.bytes_held = 0
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._last_version = 0
        self._last_statistics: InputStatistics | None = None

    @property
    def count(self) -> int:
        """How many layers the pass is done with."""
        return len(self.owners) + len(set(self.pending) - self.seen)

    def see(self, name: str, x: Tensor) -> None:
        """One call of a module with its input."""
        if name in self.leaders:
            self.leaders[name].update(x, self.mask)
        elif name not in self.seen:
            self.seen.add(name)
            version = -1 if x.is_inference() else x._version  # inference tensors do not say whether they changed
            if not (self._last_input() is x and self._last_version == version >= 0):
                self._last_input, self._last_version = weakref.ref(x), version
                self._last_statistics = self._start(name, x)
            elif self._last_statistics is not None:
                self._last_statistics.modules.append(name)
                self.bytes_held += self._output_bytes(name)
            if self._last_statistics is not None:
                self.owners[name] = self._last_statistics

    def _start(self, name: str, x: Tensor) -> InputStatistics | None:
        size = x.shape[-1]
        needed = 4 * size * (size + 1) + self._output_bytes(name)
        if self.collected and self.bytes_held + needed > self.max_memory_bytes:
            return None  # left for the next pass
        self.bytes_held += needed
        statistics = InputStatistics.of_width(name, size, x.device)
        statistics.update(x, self.mask)
        self.collected.append(statistics)
        self.leaders[name] = statistics
        return statistics

    def _output_bytes(self, name: str) -> int:
        return 0 if self.gradients is None else 4 * dense_weight(self.pending[name]).shape[0] ** 2

    def _watch_output(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Have the gradient of an output collected; returns the output to go on with."""
        if not torch.is_grad_enabled():
            return y
        y = differentiable(y)
        call, version = self.calls[name], x._version
        self.calls[name] += 1
        compare = x.detach() if call < self.compared_calls and name in self.owners else None

        def on_gradient(gradient: Tensor) -> None:
            self.reached = True
            statistics = self.owners.get(name)
            if statistics is None:
                return
            statistics.update_output(name, gradient)
            if compare is not None and compare._version == version:
                # a sketch of its own for every module and call: the same one whatever else this pass collects
                sketch_seed = zlib.crc32(f"{self.seed}/{call}/{name}".encode())
                add_gradient_energies(statistics, name, compare, gradient, sketch_seed)

        y.register_hook(on_gradient)
        return y

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in self.pending.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, y: Tensor, name: str = name) -> Tensor:
                x = layer_input(args, kwargs)
                self.see(name, x)
                return y if self.gradients is None else self._watch_output(name, x, y)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with watched_features(model, self._project) if self.gradients == "features" else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _project(self, features: Tensor) -> None:
        backpropagate_signs(features, self.mask, self.signs)

    def check(self, fresh: bool) -> None:
        """Raise if the pass reached nothing, or left a layer with statistics that are not numbers.

        The first pass of a fresh calibration must have reached a layer, and seen a gradient; what is left for later
        passes may well be layers without either.
        """
        if fresh and not any(statistics.rows for statistics in self.collected):
            raise ValueError(
                f"{next(iter(self.pending))}: the calibration data never reached this layer, nor any other target "
                f"({len(self.pending)} in all). Give batches that run them, or start without data."
            )
        if self.gradients is not None and fresh and not self.reached:
            raise NoGradientsError(
                "gradients need a model that runs with gradients enabled and whose features (or loss) depend on the "
                f"target layers; got none for {next(iter(self.pending))}. Use gradients=None."
            )
        for statistics in self.collected:
            if not math.isfinite(statistics.sums.trace):  # which no entry of the sum exceeds
                raise ValueError(f"{statistics.modules[0]}: its input holds NaN or Inf on the calibration data.")
            for name, moment in statistics.output_moments.items():
                if not bool(torch.isfinite(moment).all()):
                    raise ValueError(f"{name}: the gradient of its output holds NaN or Inf on the calibration data.")

    def take(self) -> Iterator[InputStatistics]:
        """Hand out the statistics one by one, keeping none; at last those of layers that no data reached."""
        missed = {name: module for name, module in self.pending.items() if name not in self.seen}
        self.leaders.clear()
        self.owners.clear()
        self._last_statistics = None
        while self.collected:
            yield self.collected.pop(0)
        for name, module in missed.items():
            yield InputStatistics.empty(name, module)


def log_unreached(names: Sequence[str]) -> None:
    """One line for all layers of a job that no data reached."""
    if names:
        logger.warning(
            "%s: the calibration data never reached this layer (%d in all), so it is prepared from its weight alone. "
            "It is not used on these data, or its weight is read and the layer not called.",
            names[0],
            len(names),
        )


Run = Callable[[Collector], None]  # has the layers called as often as there are batches


def passes(
    model: nn.Module,
    run: Run,
    pending: dict[str, nn.Module],
    *,
    gradients: Gradients | None = None,
    seed: int = 0,
    max_memory_bytes: int = 2**30,
    fresh: bool = True,
    compared_calls: int = COMPARED_CALLS,
) -> Iterator[Collector]:
    """Run the data through the model as often as the memory for sums calls for; each pass hands out what it collected.

    Args:
        model: The dense model.
        run: What a pass is, see :func:`through_model`.
        pending: The layers to collect; the caller takes out those that it has got, and when none is left it ends.
        gradients: Where output gradients come from, None for no backward passes.
        seed: Of random projections.
        max_memory_bytes: Bound on the memory for sums.
        fresh: Whether the first pass is the first of all, see :meth:`Collector.check`.
        compared_calls: First calls of a layer whose compressed gradients are compared with exact ones.
    """
    while pending:
        collector = Collector(pending, max_memory_bytes, gradients, seed, compared_calls)
        with evaluating(model, bool(gradients)), collector.attached(model):
            run(collector)
        collector.check(fresh)
        fresh = False
        yield collector


def through_model(
    model: nn.Module, data: CalibrationData, max_batches: int | None = None, description: str | None = None
) -> Run:
    """A pass of the data through the whole model, back from the loss where labels are used.

    Args:
        model: The dense model.
        data: See :func:`calibration.calibrate_wasi`.
        max_batches: Stop after that many batches.
        description: Of a progress bar, with `{}` for the number of layers; None for no bar.
    """

    def run(collector: Collector) -> None:
        if callable(data):
            data()
            return
        with_labels = collector.gradients == "loss"
        title = None if description is None else description.format(len(collector.pending))
        for batch in limited(data, max_batches, title):
            collector.mask = token_mask(batch)
            output = model_output(model, batch, with_labels)
            if with_labels:
                loss = loss_of(output)
                if loss is None:
                    raise ValueError("gradients='loss' needs batches with labels, for which the model returns a loss.")
                if loss.requires_grad:
                    loss.backward()

    return run
