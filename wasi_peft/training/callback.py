"""While training: ranks, subspaces and energies in the Trainer's log, and ranks that change between epochs."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..linalg.tucker import Tucker
from ..tuner.layer import WasiLayer
from .resize import active_layers, ranks_in_use, resize_rank

Replan = Callable[[nn.Module], Mapping[str, int]]
Subspaces = tuple[Tensor | None, Tensor | None]  # of the weight's columns and of the input's features, if known

SLACK = 0.01  # of the energy: batches differ, and a warm basis is not quite the best one
USED_ENERGY = 0.99
MEASURE_STEPS = 50  # between two measurements of compressed inputs where the log goes by epochs


class WasiCallback(TrainerCallback):
    """Logs what becomes of the subspaces of a WASI model, and warns where a compressed input has lost too much.

    With every log of the training loss, and at the end of every epoch:

    * `wasi/rank_mean`, `_min`, `_max`: weight ranks, the directions that train beside the K included.
    * `wasi/weight_drift`: how far the column space of what trains has turned since the last log, from 0 (not at all)
      to 1 (orthogonal), mean of all layers, none where the update leaves that space as it is;
      `wasi/activation_drift`: the same for the bases of the inputs' features.
    * `wasi/activation_energy_mean`, `_min`: share of the inputs' energy that their compressed copies kept, in the last
      step in which it was measured (the one that is logged, or every 50th).
    * `wasi/weight_rank_used`, once for every epoch: share of each layer's K that 99 % of the energy of its weight
      takes (:func:`ranks_in_use`), mean of all layers.

    The values are in `trainer.state.log_history` whatever `report_to` says. Reporters that the Trainer creates itself
    run before callbacks handed to it; `trainer.callback_handler.callbacks.insert(0, callback)` puts this one first.

    Args:
        activation_threshold: Share of energy that inputs compressed at fixed ranks should keep, in (0, 1]; below it,
            a warning names the layer that lost most and counts the others, each layer once. None: only those whose
            ranks came from a threshold are checked, against that. One percent of the energy is allowed on top.
        replan: Called with the model at the end of every epoch but the last; the ranks that it returns, by layer name,
            are set by :func:`resize_rank`. For instance `lambda model: ranks_in_use(model, 0.999)`.
        drift: Measure drift, for which a copy of what trains is kept between logs.

    Raises:
        ValueError: If `activation_threshold` is outside (0, 1]; and when the training begins, if the model has no
            WASI layers.

    Example:
        >>> WasiCallback(activation_threshold=0.9).activation_threshold
        0.9
    """

    def __init__(
        self, activation_threshold: float | None = None, replan: Replan | None = None, drift: bool = True
    ) -> None:
        if activation_threshold is not None and not 0 < activation_threshold <= 1:
            raise ValueError(f"activation_threshold must be a number in (0, 1], got {activation_threshold!r}.")
        self.activation_threshold = activation_threshold
        self.replan = replan
        self.drift = drift
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._energies: dict[str, tuple[Any, Any]] = {}  # layer -> kept and total energy of its last inputs
        self._last: tuple[Tensor | None, Any, Any] = (None, 0.0, 0.0)
        self._handles: list[Any] = []
        self._subspaces: dict[str, Subspaces] = {}
        self._used: dict[str, float] = {}

    # ---------------------------------------------------------------- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not active_layers(model):
            raise ValueError(f"WasiCallback needs a model with an active WASI adapter, got {type(model).__name__}.")
        _stop_looking(model)
        self._forget()
        self._subspaces = self._current_subspaces(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        by_steps = args.logging_strategy == "steps"
        interval = state.logging_steps if by_steps and state.logging_steps > 0 else MEASURE_STEPS
        if not self._energies or (state.global_step + 1) % interval == 0:
            self._energies = {}
            for name, layer in active_layers(model).items():
                # recomputation stops inside the last layer of a block, once it has what it needs
                handle = layer.register_forward_hook(_Look(name, self), with_kwargs=True, always_call=True)
                self._handles.append(handle)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], (None, 0.0, 0.0)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        layers = active_layers(model)
        ranks = ranks_in_use(model, USED_ENERGY)
        shares = [rank / layers[name].form.weight_rank for name, rank in ranks.items()]
        self._used = {"wasi/weight_rank_used": _mean(shares)}
        control.should_log = True
        if self.replan is not None and state.global_step < state.max_steps:
            for name, rank in self.replan(model).items():
                resize_rank(model, name, rank, optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not {"loss", "train_runtime"} & set(logs):
            return  # an evaluation
        found = self._values(model) if "loss" in logs else self._used
        values = {key: round(value, 5) for key, value in found.items()}
        logs.update(values)
        state.log_history[-1].update(values)  # a copy of `logs`, made before

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)
        self._forget()

    # ---------------------------------------------------------------- values

    def _values(self, model: nn.Module) -> dict[str, float]:
        layers = active_layers(model)
        ranks = [_rank(layer) for layer in layers.values()]
        values = {"wasi/rank_mean": _mean(ranks), "wasi/rank_min": min(ranks), "wasi/rank_max": max(ranks)}
        subspaces = self._current_subspaces(model)
        drifts: tuple[list[float], list[float]] = [], []
        for name in self._subspaces.keys() & subspaces.keys():
            for found, old, new in zip(drifts, self._subspaces[name], subspaces[name], strict=True):
                if old is not None and new is not None:
                    found.append(chordal_distance(old, new))
        self._subspaces = subspaces
        kept = {name: float(part) / float(total) for name, (part, total) in self._energies.items() if float(total) > 0}
        self._check(layers, kept)
        for key, found in zip(("wasi/weight_drift", "wasi/activation_drift"), drifts, strict=True):
            if found:
                values[key] = _mean(found)
        if kept:
            values["wasi/activation_energy_mean"] = _mean(list(kept.values()))
            values["wasi/activation_energy_min"] = min(kept.values())
        values.update(self._used)
        self._used = {}
        return values

    def _current_subspaces(self, model: nn.Module) -> dict[str, Subspaces]:
        subspaces: dict[str, Subspaces] = {}
        for name, layer in active_layers(model).items() if self.drift else ():
            if layer.experts > 1:
                continue  # there are as many subspaces as experts
            feature = layer.wasi_input[layer.active_name].bases.feature  # replaced as a whole, never changed in place
            subspaces[name] = layer.update.column_space(layer.form), feature
        return subspaces

    @torch.no_grad()
    def look(self, name: str, layer: WasiLayer, x: Tensor) -> None:
        """Measure what a layer has just kept of its input."""
        compressed = _compressed_input(layer, x)
        if compressed is None:
            return
        if self._last[0] is not compressed.core:  # once for layers that share their input
            self._last = compressed.core, _energy(compressed.core), _energy(x)
        kept, total = self._energies.get(name, (0.0, 0.0))
        self._energies[name] = kept + self._last[1], total + self._last[2]

    def _check(self, layers: Mapping[str, WasiLayer], kept: Mapping[str, float]) -> None:
        """Warn of the layers whose inputs lost too much, of each once, of all that are found together at once."""
        asked = {name: self._asked_energy(layers[name]) for name in kept if name not in self._warned}
        lost = {name: kept[name] - energy for name, energy in asked.items() if kept[name] < energy - SLACK}
        if not lost:
            return
        self._warned |= set(lost)
        worst = min(lost, key=lost.__getitem__)
        others = f" So it is, less so, in {len(lost) - 1} other layers." if len(lost) > 1 else ""
        warnings.warn(
            f"{worst}: the compressed input keeps {kept[worst]:.1%} of the energy, less than the {asked[worst]:.1%} "
            f"asked for. Its gradients get coarser; give it a larger activation rank.{others}",
            stacklevel=2,
        )

    def _asked_energy(self, layer: WasiLayer) -> float:
        """Share of its input's energy that a layer should keep, 0 where nothing says how much."""
        assert layer.active_name is not None
        rule = layer.wasi_input[layer.active_name].rule
        if rule is None:
            return 0.0
        fixed = set(rule.modes) <= set(dict(rule.ranks))
        threshold = self.activation_threshold if fixed else rule.threshold
        # every mode may lose as much
        return 0.0 if threshold is None else 1 - len(rule.modes) * (1 - threshold)


class _Look:
    """A hook that has a callback look at a layer's input.

    Of an interrupted step nobody is told that it is over, so it stays until the next training begins. The model can be
    copied and saved meanwhile: a copy is a hook that does nothing.
    """

    def __init__(self, name: str, callback: WasiCallback | None = None) -> None:
        self.name = name
        self._callback = None if callback is None else weakref.ref(callback)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Look, (self.name,)

    def __call__(self, layer: WasiLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        callback = None if self._callback is None else self._callback()
        if callback is not None:
            callback.look(self.name, layer, args[0] if args else kwargs["x"])


def _stop_looking(model: nn.Module) -> None:
    """Remove what interrupted steps left behind, whoever's hooks they are."""
    for module in model.modules():
        hooks = module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Look)]:
            for table in hooks:
                table.pop(key, None)


def _rank(layer: WasiLayer) -> int:
    assert layer.active_name is not None
    return layer.rank(layer.active_name)


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _energy(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).square()


def _compressed_input(layer: WasiLayer, x: Tensor) -> Tucker | None:
    """What the layer has just kept of its input."""
    for (rule, _), compressed in layer.inputs.of(x).compressed.items():
        if layer.active_name is not None and rule == layer.wasi_input[layer.active_name].rule:
            return compressed
    return None


def chordal_distance(first: Tensor, second: Tensor) -> float:
    """Distance of two subspaces from 0 (one contains the other) to 1 (orthogonal).

    `sqrt((k - ||U^T V||_F^2) / k)` with k the smaller of both dimensions, computed without cancellation.

    **Shape**
        - first: (n, k1), second: (n, k2), orthonormal columns

    Example:
        >>> axes = torch.eye(3)
        >>> round(chordal_distance(axes[:, :2], axes[:, 1:]), 3)
        0.707
    """
    wide, narrow = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    if wide.shape[0] != narrow.shape[0]:
        return 1.0
    wide, narrow = wide.float(), narrow.float()
    outside = narrow - wide @ (wide.T @ narrow)
    return min(1.0, float(outside.norm()) / math.sqrt(narrow.shape[1]))
