"""Parameter groups that suit WASI factors, for any torch optimizer, and what arguments of optimizers must be."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..forms.shards import is_distributed
from ..tuner.layer import WasiLayer


def check_positive(name: str, value: float) -> None:
    """Raise ValueError, which names the argument, unless the value is above zero."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")


def check_weight_decay(value: float) -> None:
    """Raise ValueError if the weight decay is below zero."""
    if not value >= 0:
        raise ValueError(f"weight_decay must not be negative, got {value!r}.")


def check_single_process(reason: str) -> None:
    """Raise RuntimeError in a run of several processes; the reason also says what to use there."""
    if is_distributed() and (processes := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(f"{reason} in a distributed run, got {processes} processes.")


def create_wasi_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    basis_lr_ratio: float = 1.0,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_basis: bool = False,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer with parameter groups that suit WASI factors.

    Groups: the orthonormal factors L (no weight decay unless asked: it would only rescale R), the factors R or what
    else trains of the weights, vectors and biases (no weight decay), and the head (everything else that trains).

    Args:
        model: A model with a WASI adapter.
        optimizer_cls: Any `torch.optim.Optimizer` class.
        lr: Learning rate of the factors and vectors.
        basis_lr_ratio: Learning rate of L relative to that of R, where both train.
        head_lr: Learning rate of the head; `lr` by default.
        weight_decay: Weight decay of R and of matrices in the head.
        decay_basis: Decay L too.
        **kwargs: Passed to the optimizer class, for instance `betas` or `momentum`.

    Returns:
        The optimizer; hand it to a `Trainer` as `optimizers=(optimizer, None)`.

    Raises:
        ValueError: If the model has no trainable WASI factor, or a rate is not positive.
    """
    head_lr = lr if head_lr is None else head_lr
    for name, value in (("lr", lr), ("basis_lr_ratio", basis_lr_ratio), ("head_lr", head_lr)):
        check_positive(name, value)
    check_weight_decay(weight_decay)
    basis, factors, vectors, head, head_vectors = _split_parameters(model)
    if not basis and not factors:
        raise ValueError("create_wasi_optimizer needs a model with trainable WASI factors, got none.")
    basis_decay = weight_decay if decay_basis else 0.0
    groups = [
        {"name": "basis", "params": basis, "lr": lr * basis_lr_ratio, "weight_decay": basis_decay},
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {"name": "vectors", "params": vectors, "lr": lr, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": head_lr, "weight_decay": weight_decay},
        {"name": "head_vectors", "params": head_vectors, "lr": head_lr, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]], **{"lr": lr, **kwargs})


def _split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Trainable parameters as (L, R, vectors, head matrices, head vectors)."""
    basis: list[nn.Parameter] = []
    factors: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    head_vectors: list[nn.Parameter] = []
    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, WasiLayer):
            for name, update in module.wasi_update.items():
                form = module.form_of(name)
                for part in form.parts:
                    if form.frozen(part) is None:
                        kinds[id(form.part(part))] = "basis" if part == update.basis else "factors"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kinds.update({id(parameter): "head" for parameter in module.parameters()})
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind, is_vector = kinds.get(id(parameter)), parameter.dim() < 2
        if kind == "basis":
            basis.append(parameter)
        elif kind == "factors":
            factors.append(parameter)
        elif kind == "head":
            (head_vectors if is_vector else head).append(parameter)
        elif is_vector or parameter.shape[0] == 1:
            vectors.append(parameter)
        else:
            head.append(parameter)
    return basis, factors, vectors, head, head_vectors
