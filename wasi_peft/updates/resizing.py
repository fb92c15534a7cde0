"""What ranks that change have in common: new directions, and an optimizer's state that follows its parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LINEAR_STATES = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})  # averages of gradients
_SQUARED_STATES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})  # of squared gradients


@dataclass(frozen=True)
class Carry:
    """Takes an optimizer's state of a parameter, which still has its old shape, into new coordinates.

    Averages of gradients are transformed as gradients are, those of squared gradients by the squared transformation.
    State of other shapes (Adafactor's) or of unknown meaning (in 8 bits) is dropped and starts afresh.

    Args:
        optimizer: Whose state; None for none.
    """

    optimizer: torch.optim.Optimizer | None = None

    def __call__(
        self, parameter: nn.Parameter, linear: Callable[[Tensor], Tensor], squared: Callable[[Tensor], Tensor]
    ) -> None:
        """Transform the state of one parameter.

        Args:
            parameter: With its old shape.
            linear: New coordinates of a gradient, float64.
            squared: The same for squares.
        """
        optimizer = self.optimizer
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


def set_part(parameter: nn.Parameter, value: Tensor) -> None:
    """Another value, of another shape, for a parameter that stays the same object; its gradient is dropped."""
    parameter.grad = None
    parameter.data = value.to(parameter.dtype).contiguous()


def orthonormal_to(columns: Tensor, added: int) -> Tensor:
    """Random orthonormal columns that are orthogonal to the given ones.

    **Shape**
        - columns: (n, K), float64; returns (n, added)
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(len(columns), added, generator=generator, dtype=torch.float64).to(columns.device)
    return torch.linalg.qr(torch.cat([columns, random], 1)).Q[:, columns.shape[1] :]


def random_rows(R: Tensor, added: int) -> Tensor:
    """Random rows, orthogonal to those of R and to each other, as large as those are on average.

    **Shape**
        - R: (K, in); returns (added, in), float64
    """
    return orthonormal_to(R.double().T, added).T * R.double().square().sum(1).mean().sqrt()


def shrink_factors(L: nn.Parameter, R: nn.Parameter, rank: int, carry: Carry) -> None:
    """The best approximation of `L R`: with `L = Q S`, `S R = U E V^T`, the factors become `Q U_k` and `U_k^T S R`.

    So `L' = L B` and `R' = A^T R` with `A = S^T U_k` and `B = S^-1 U_k`; gradients follow as `gL' = gL A` and
    `gR' = B^T gR`.
    """
    Q, S = torch.linalg.qr(L.double())
    inner = S @ R.double()
    directions = torch.linalg.eigh(inner @ inner.T).eigenvectors.flip(1)[:, :rank]  # (K, k)
    forth = S.T @ directions
    back = (torch.linalg.pinv(S) @ directions).T
    carry(L, lambda state: state @ forth, lambda state: state @ forth.square())
    carry(R, lambda state: back @ state, lambda state: back.square() @ state)
    set_part(L, Q @ directions)
    set_part(R, directions.T @ inner)


def grow_factors(L: nn.Parameter, R: nn.Parameter, rank: int, carry: Carry) -> None:
    """Random directions in L, orthonormal to the others, and zero rows in R."""
    added = rank - L.shape[1]
    old = L.double()

    def columns(state: Tensor) -> Tensor:
        return torch.cat([state, state.new_zeros(len(state), added)], 1)

    def rows(state: Tensor) -> Tensor:
        return torch.cat([state, state.new_zeros(added, state.shape[1])], 0)

    carry(L, columns, columns)
    carry(R, rows, rows)
    set_part(L, torch.cat([old, orthonormal_to(old, added)], 1))
    set_part(R, rows(R.double()))
