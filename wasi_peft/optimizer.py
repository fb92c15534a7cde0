"""Helpers for the optimizer: parameter groups for any torch optimizer, and the paper's own update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import WasiLayer, wasi_layers
from .linalg import paper_step


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")


def _check_weight_decay(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"weight_decay must not be negative, got {value!r}.")


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

    Groups: the orthonormal factors L (no weight decay unless asked: it would only rescale R), the factors R, vectors
    and biases (no weight decay), and the head (everything else that trains).

    Args:
        model: A model with a WASI adapter.
        optimizer_cls: Any `torch.optim.Optimizer` class.
        lr: Learning rate of the factors and vectors.
        basis_lr_ratio: Learning rate of L relative to that of R.
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
        _check_positive(name, value)
    _check_weight_decay(weight_decay)
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
            kinds.update({id(parameter): "L" for parameter in module.wasi_L.values()})
            kinds.update({id(parameter): "R" for parameter in module.wasi_R.values()})
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kinds.update({id(parameter): "head" for parameter in module.parameters()})
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind, is_vector = kinds.get(id(parameter)), parameter.dim() < 2
        if kind == "L":
            basis.append(parameter)
        elif kind == "R":
            factors.append(parameter)
        elif kind == "head":
            (head_vectors if is_vector else head).append(parameter)
        elif is_vector or parameter.shape[0] == 1:
            vectors.append(parameter)
        else:
            head.append(parameter)
    return basis, factors, vectors, head, head_vectors


class _ProductGradient:
    """Collects the factors of one layer's product gradient over the backward passes of a step."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def __call__(self, left: Tensor, right: Tensor) -> None:
        self.left.append(left)
        self.right.append(right)

    def clear(self) -> None:
        self.left.clear()
        self.right.clear()

    def squared_norm(self) -> Tensor:
        """`||G||_F^2` from the factors: `sum (left^T left) * (right right^T)`."""
        left, right = torch.cat(self.left, 1).float(), torch.cat(self.right, 0).float()
        return ((left.T @ left) * (right @ right.T)).sum()


class SubspaceSGD(torch.optim.Optimizer):
    """The paper's update exactly: SGD on the product `L R`, then one subspace iteration (arXiv 2510.09160).

    Low-rank throughout: the gradient of the product stays in two factors. Parameters that are not WASI factors take a
    plain SGD step. The layers must use `update="subspace"`. No momentum, as in the paper's recipe (lr 0.05, weight
    decay 1e-4, clip 2.0).

    Args:
        model: A model with a WASI adapter.
        lr: Learning rate.
        weight_decay: `W <- (1 - lr * weight_decay) W` before the step.
        max_grad_norm: Clip the norm of all gradients together, those of the products included. The gradients that
            `clip_grad_norm_` sees are those of the factors, so clip here instead.
    """

    retracts = True  # the step itself returns orthonormal factors

    def __init__(
        self, model: nn.Module, lr: float = 0.05, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        _check_positive("lr", lr)
        _check_weight_decay(weight_decay)
        if max_grad_norm is not None:
            _check_positive("max_grad_norm", max_grad_norm)
        self._layers: list[tuple[nn.Parameter, nn.Parameter, _ProductGradient]] = []
        for name, layer in wasi_layers(model):
            active = layer.active_name
            if active is None or not layer.wasi_L[active].requires_grad:
                continue
            if layer.wasi_update[active] != "subspace":
                raise ValueError(f"{name}: SubspaceSGD needs update='subspace', got {layer.wasi_update[active]!r}.")
            gradient = _ProductGradient()
            layer._product_sink = gradient
            self._layers.append((layer.wasi_L[active], layer.wasi_R[active], gradient))
        if not self._layers:
            raise ValueError("SubspaceSGD needs a model with trainable WASI factors, got none.")
        self.max_grad_norm = max_grad_norm
        parameters: Iterable[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = {id(p): (g["lr"], g["weight_decay"]) for g in self.param_groups for p in g["params"]}
        factors = {id(p) for L, R, _ in self._layers for p in (L, R)}
        others = [p for g in self.param_groups for p in g["params"] if id(p) not in factors and p.grad is not None]
        active = [(L, R, gradient) for L, R, gradient in self._layers if gradient.left]
        scale = self._clip_scale(others, active)
        for parameter in others:
            lr, decay = rates[id(parameter)]
            parameter.mul_(1 - lr * decay).add_(parameter.grad, alpha=-lr * scale)
        for L, R, gradient in active:
            lr, decay = rates[id(L)]
            left, right = torch.cat(gradient.left, 1).to(L.dtype), torch.cat(gradient.right, 0).to(R.dtype)
            new_L, new_R = paper_step(L, R * (1 - lr * decay), left, right, lr * scale)
            L.copy_(new_L)
            R.copy_(new_R)
            gradient.clear()
        return loss

    def _clip_scale(self, others: list[Tensor], active: list[Any]) -> float:
        if self.max_grad_norm is None:
            return 1.0
        squares = [p.grad.float().square().sum() for p in others if p.grad is not None]
        squares += [gradient.squared_norm() for _, _, gradient in active]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of the products included."""
        super().zero_grad(set_to_none)
        for _, _, gradient in self._layers:
            gradient.clear()
