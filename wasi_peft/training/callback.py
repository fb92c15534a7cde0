"""While training: ranks, subspaces and energies in the Trainer's log, and ranks that change between epochs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..linalg.spectra import rank_for_threshold
from ..linalg.subspaces import orthonormalize
from ..linalg.tucker import Tucker
from ..tuner.layer import WasiLayer, _shared, wasi_layers

Replan = Callable[[nn.Module], Mapping[str, int]]
Subspaces = tuple[Tensor | None, Tensor | None]  # of the weight's columns and of the input's features, if known

SLACK = 0.01  # of the energy: batches differ, and a warm basis is not quite the best one
USED_ENERGY = 0.99
MEASURE_STEPS = 50  # between two measurements of compressed inputs where the log goes by epochs
_LINEAR_STATES = {"exp_avg", "momentum_buffer", "grad_avg"}  # averages of gradients
_SQUARED_STATES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"}  # of squared gradients


class WasiCallback(TrainerCallback):
    """Logs what becomes of the subspaces of a WASI model, and warns where a compressed input has lost too much.

    With every log of the training loss, and at the end of every epoch:

    * `wasi/rank_mean`, `_min`, `_max`: weight ranks, that of a low-rank update included.
    * `wasi/weight_drift`: how far the column space of what trains (L, or B with `update="low_rank"`) has turned since
      the last log, from 0 (not at all) to 1 (orthogonal), mean of all layers, none with `update="core"`, which turns
      none; `wasi/activation_drift`: the same for the bases of the inputs' features.
    * `wasi/activation_energy_mean`, `_min`: share of the inputs' energy that their compressed copies kept, in the last
      step in which it was measured (the one that is logged, or every 50th).
    * `wasi/weight_rank_used`, once for every epoch: share of each layer's rank that holds 99 % of the energy of
      `L R`, mean of all layers.

    The values are in `trainer.state.log_history` whatever `report_to` says. Reporters that the Trainer creates itself
    run before callbacks handed to it; `trainer.callback_handler.callbacks.insert(0, callback)` puts this one first.

    Args:
        activation_threshold: Share of energy that inputs compressed at fixed ranks should keep, in (0, 1]; below it,
            a warning names the layer that lost most and counts the others, each layer once. None: only those whose
            ranks came from a threshold are checked, against that. One percent of the energy is allowed on top.
        replan: Called with the model at the end of every epoch but the last; the ranks that it returns, by layer name,
            are set by :func:`resize_rank`. For instance `lambda model: ranks_in_use(model, 0.999)`.
        drift: Measure drift, for which a copy of every L (or B) is kept between logs.

    Raises:
        ValueError: If `activation_threshold` is outside (0, 1].

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
        self._forget()
        self._subspaces = self._current_subspaces(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        by_steps = args.logging_strategy == "steps"
        interval = state.logging_steps if by_steps and state.logging_steps > 0 else MEASURE_STEPS
        if not self._energies or (state.global_step + 1) % interval == 0:
            self._energies = {}
            for name, layer in _layers(model).items():
                # recomputation stops inside the last layer of a block, once it has what it needs
                handle = layer.register_forward_hook(self._look(name), with_kwargs=True, always_call=True)
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
        layers = _layers(model)
        ranks = ranks_in_use(model, USED_ENERGY)
        shares = [rank / len(layers[name].wasi_R[layers[name].active_name]) for name, rank in ranks.items()]
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
        layers = _layers(model)
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
        for name, layer in _layers(model).items() if self.drift else ():
            adapter = layer.active_name
            outer = (layer.wasi_B if adapter in layer.wasi_B else layer.wasi_L)[adapter].detach()
            columns: Tensor | None = outer.clone()
            if adapter in layer.wasi_M:  # between frozen subspaces
                columns = None
            elif layer.wasi_update[adapter] != "subspace":  # which keeps L orthonormal
                columns = orthonormalize(outer) if bool(outer.any()) else None
            subspaces[name] = columns, layer.wasi_bases[adapter].feature  # replaced as a whole, never changed in place
        return subspaces

    def _look(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["x"]
            compressed = _compressed_input(layer, x)
            if compressed is None:
                return
            if self._last[0] is not compressed.core:  # once for layers that share their input
                self._last = compressed.core, _energy(compressed.core), _energy(x)
            kept, total = self._energies.get(name, (0.0, 0.0))
            self._energies[name] = kept + self._last[1], total + self._last[2]

        return hook

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
        rule = layer.wasi_rule[layer.active_name]
        if rule is None:
            return 0.0
        fixed = set(rule.modes) <= set(dict(rule.ranks))
        threshold = self.activation_threshold if fixed else rule.threshold
        # every mode may lose as much
        return 0.0 if threshold is None else 1 - len(rule.modes) * (1 - threshold)


def _layers(model: Any) -> dict[str, Any]:
    """WASI layers that have an active adapter, by the name that configurations know them by."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: layer for name, layer in wasi_layers(base) if layer.active_name is not None}


def _rank(layer: WasiLayer) -> int:
    assert layer.active_name is not None
    return layer.rank(layer.active_name)


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _energy(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).square()


def _compressed_input(layer: WasiLayer, x: Tensor) -> Tucker | None:
    """What the layer has just kept of its input."""
    for (rule, _), compressed in _shared(x).compressed.items():
        if layer.active_name is not None and rule == layer.wasi_rule[layer.active_name]:
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


@torch.no_grad()
def ranks_in_use(model: nn.Module, threshold: float) -> dict[str, int]:
    """Ranks K at which each layer would keep a share of the energy of its trained `L R`, by layer name.

    Layers whose factors are not finite keep their rank.

    Args:
        model: A model with a WASI adapter.
        threshold: Share of the energy, in (0, 1].
    """
    ranks = {}
    for name, layer in _layers(model).items():
        L, R = (part[layer.active_name].detach().double() for part in (layer.wasi_L, layer.wasi_R))
        if layer.active_name in layer.wasi_M:
            L = L @ layer.wasi_M[layer.active_name].detach().double()
        if not bool(torch.isfinite(L).all() and torch.isfinite(R).all()):
            ranks[name] = len(R)
            continue
        inner = torch.linalg.qr(L).R @ R  # the singular values of L R
        energies = torch.linalg.eigvalsh(inner @ inner.T).flip(0).clamp_min(0)
        ranks[name] = rank_for_threshold(energies, threshold) if float(energies[0]) > 0 else 1
    return ranks


# -------------------------------------------------------------------- ranks that change


@torch.no_grad()
def resize_rank(model: Any, name: str, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give a layer's active adapter another weight rank between two optimizer steps.

    A smaller rank keeps the best approximation of `L R`, from an SVD of size K; a larger one adds random directions to
    L, orthonormal to the others, and zero rows to R, so that the layer computes the same. Parameters stay the same
    objects, so they keep their places in the optimizer. Its state follows: averages of gradients are rotated into the
    new basis, those of squares by the squared rotation, new directions start at zero. State of other shapes
    (Adafactor's) or of unknown meaning (in 8 bits) is dropped for this layer and starts afresh. Gradients are cleared.

    Where R does not train, a smaller rank keeps what matters most in white coordinates: the largest singular values of
    the core, or of L with `update="frozen_basis"`; a larger one adds random directions to R (and to L, if there is a
    core), and zeros to what trains.

    Not for models wrapped for distributed training, which remember the sizes of parameters.

    Args:
        model: A PEFT model with a WASI adapter.
        name: Name of the layer in the base model.
        rank: The new rank K of `L R`; a low-rank update beside it stays as it is.
        optimizer: The optimizer that trains the factors.

    Raises:
        ValueError: If there is no such WASI layer, it is merged, or the rank is not in 1 to
            min(out_features, in_features).
    """
    layer = _layers(model).get(name)
    if layer is None:
        raise ValueError(f"name must be that of a WASI layer with an active adapter, got {name!r}.")
    if layer.merged:
        raise ValueError(f"{name}: the adapter is merged; unmerge it before its rank changes.")
    largest = min(layer.out_features, layer.in_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"{name}: rank must be an integer from 1 to {largest}, got {rank!r}.")
    adapter = layer.active_name
    layer._require_loaded(adapter)
    L, R = layer.wasi_L[adapter], layer.wasi_R[adapter]
    shrinks = rank < L.shape[1]
    if rank == L.shape[1]:
        pass
    elif adapter in layer.wasi_M:
        (_shrink_core if shrinks else _grow_core)(L, layer.wasi_M[adapter], R, rank, optimizer)
    elif layer.wasi_update[adapter] == "frozen_basis":
        (_shrink_trained if shrinks else _grow_trained)(L, R, rank, optimizer)
    else:
        (_shrink if shrinks else _grow)(L, R, rank, optimizer)
    layer._lay_out(adapter)
    config = model.peft_config[adapter]
    if config.ranks is not None:
        config.ranks[name] = rank
    if isinstance(config.plan, dict):
        config.plan["layers"][name]["weight_rank"] = rank


def _shrink(L: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    """`L = Q S`, `S R = U E V^T`: the new factors are `Q U_k` and `U_k^T S R`.

    So `L' = L B` and `R' = A^T R` with `A = S^T U_k` and `B = S^-1 U_k`; gradients follow as `gL' = gL A` and
    `gR' = B^T gR`.
    """
    Q, S = torch.linalg.qr(L.double())
    inner = S @ R.double()
    directions = torch.linalg.eigh(inner @ inner.T).eigenvectors.flip(1)[:, :rank]  # (K, k)
    forth = S.T @ directions
    back = (torch.linalg.pinv(S) @ directions).T
    _carry(L, optimizer, lambda state: state @ forth, lambda state: state @ forth.square())
    _carry(R, optimizer, lambda state: back @ state, lambda state: back.square() @ state)
    _set(L, Q @ directions)
    _set(R, directions.T @ inner)


def _shrink_trained(L: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    """`L = U D V^T`: the new factors are `L V_k` and `V_k^T R`, so rows of R stay as orthogonal as they were."""
    V = torch.linalg.svd(L.double(), full_matrices=False).Vh[:rank].T
    _carry(L, optimizer, lambda state: state @ V, lambda state: state @ V.square())
    _set(L, L.double() @ V)
    _set(R, V.T @ R.double())


def _grow_trained(L: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    added = rank - L.shape[1]

    def padded(state: Tensor) -> Tensor:
        return torch.nn.functional.pad(state, (0, added))

    _carry(L, optimizer, padded, padded)
    _set(L, padded(L.double()))
    _set(R, torch.cat([R.double(), _random_rows(R, added)], 0))


def _shrink_core(
    L: nn.Parameter, M: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None
) -> None:
    """`M = U D V^T`: the new parts are `L U_k`, `D_k` and `V_k^T R`; gradients of M follow as `U_k^T g V_k`."""
    U, D, Vt = torch.linalg.svd(M.double())
    left, right = U[:, :rank], Vt[:rank].T
    _carry(M, optimizer, lambda x: left.T @ x @ right, lambda x: left.square().T @ x @ right.square())
    _set(L, L.double() @ left)
    _set(M, torch.diag(D[:rank]))
    _set(R, right.T @ R.double())


def _grow_core(
    L: nn.Parameter, M: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None
) -> None:
    added = rank - L.shape[1]

    def padded(state: Tensor) -> Tensor:
        return torch.nn.functional.pad(state, (0, added, 0, added))

    _carry(M, optimizer, padded, padded)
    _set(L, torch.cat([L.double(), _orthonormal_to(L.double(), added)], 1))
    _set(M, padded(M.double()))
    _set(R, torch.cat([R.double(), _random_rows(R, added)], 0))


def _random_rows(R: Tensor, added: int) -> Tensor:
    """Random rows, orthogonal to those of R and to each other, as large as those are on average."""
    return _orthonormal_to(R.double().T, added).T * R.double().square().sum(1).mean().sqrt()


def _orthonormal_to(columns: Tensor, added: int) -> Tensor:
    """Random orthonormal columns that are orthogonal to the given ones."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(len(columns), added, generator=generator, dtype=torch.float64).to(columns.device)
    return torch.linalg.qr(torch.cat([columns, random], 1)).Q[:, columns.shape[1] :]


def _grow(L: nn.Parameter, R: nn.Parameter, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    added = rank - L.shape[1]
    old = L.double()
    Q = _orthonormal_to(old, added)

    def columns(state: Tensor) -> Tensor:
        return torch.cat([state, state.new_zeros(len(state), added)], 1)

    def rows(state: Tensor) -> Tensor:
        return torch.cat([state, state.new_zeros(added, state.shape[1])], 0)

    _carry(L, optimizer, columns, columns)
    _carry(R, optimizer, rows, rows)
    _set(L, torch.cat([old, Q], 1))
    _set(R, rows(R.double()))


def _carry(
    parameter: nn.Parameter,
    optimizer: torch.optim.Optimizer | None,
    linear: Callable[[Tensor], Tensor],
    squared: Callable[[Tensor], Tensor],
) -> None:
    """Transform the optimizer's state of a parameter, which still has its old shape."""
    state = optimizer.state.get(parameter) if optimizer is not None else None
    if optimizer is None or not state:
        return
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    known = tensors.keys() <= _LINEAR_STATES | _SQUARED_STATES
    # a subclass of Tensor (torchao's) holds codes, which cannot be written to like values
    if not known or any(type(value) is not Tensor or value.shape != parameter.shape for value in tensors.values()):
        del optimizer.state[parameter]
        return
    for key, value in tensors.items():
        transform = squared if key in _SQUARED_STATES else linear
        state[key] = transform(value.double()).to(value.dtype).contiguous()


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.grad = None
    parameter.data = value.to(parameter.dtype).contiguous()
