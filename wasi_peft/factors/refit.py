"""Refit: right factors that make up for what truncation did to the layers before them.

Each layer's factors were cut for the inputs of the dense model. In the compressed model a layer sees other inputs, and
a linear map of those tells much of what the dense model's would have been. Layer after layer, in the order in which
they run, R takes in the best such map: a closed form, no learning rate (the sequential calibration of GPTQ, arXiv
2210.17323, and SparseGPT, arXiv 2301.00774, for factors).

With x* the dense model's input of a layer and x that in the model compressed so far, the least squares fit of x* from
x is `M = E[x* x^T] E[x x^T]^-1`, and `R <- R M`. R is a projection P of the weight, as truncation gives it, so `L R M`
is the same projection of the weight `W M` that suits x best. Where there is a bias, both inputs are centered and the
bias becomes `b + W E[x*] - L R E[x]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forms.dense import dense_bias, dense_weight
from ..forms.factored import FactoredLinear
from ..linalg.spectra import lower_root
from ..models.calls import hooked, layer_input
from .block_states import BlockStates

RIDGE = 1e-2
_ROUNDING = 1e-6  # of the eigenvalues of a moment that was summed in float32, relative to its trace


def input_map(cross: Tensor, moment: Tensor, shift: float) -> Tensor:
    """The least squares map of one input to another, `M = (C* + t I) (C + t I)^-1`.

    It minimises `E|x* - M x|^2 + t |M - I|_F^2`.

    **Shape**
        - cross: (in, in), `C* = E[x* x^T]`; moment: (in, in), `C = E[x x^T]`; returns (in, in), float64

    Example:
        >>> x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> goal = x @ torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 0, 1]]).double()
        >>> input_map(goal.T @ x, x.T @ x, shift=1e-9).abs().round(decimals=4).tolist()
        [[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    """
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    if not shift > 0:
        return identity
    corner = lower_root(moment.double() + shift * identity)
    return torch.cholesky_solve((cross.double() + shift * identity).T, corner).T


@dataclass
class _Moments:
    """Sums over the rows of two inputs of a layer: x* in the dense model, x in the compressed one.

    **Shape**
        - cross: (in, in), sum of `x* x^T`; moment: (in, in), sum of `x x^T`; goal: (in,), sum of x*; total: (in,)
    """

    cross: Tensor
    moment: Tensor
    goal: Tensor
    total: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> _Moments:
        square, row = torch.zeros(size, size, device=device), torch.zeros(size, device=device)
        return cls(square, square.clone(), row, row.clone())

    def update(self, goal: Tensor, rows: Tensor) -> None:
        """Add rows, (n, in) both."""
        self.cross.addmm_(goal.T, rows)
        self.moment.addmm_(rows.T, rows)
        self.goal += goal.sum(0)
        self.total += rows.sum(0)
        self.rows += len(rows)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`E[x* x^T]`, `E[x x^T]`, `E[x*]`, `E[x]`, float64."""
        parts = (self.cross, self.moment, self.goal, self.total)
        cross, moment, goal, mean = (part.double() / self.rows for part in parts)
        return cross, moment, goal, mean


def refit_block(
    block: str, dense: BlockStates, compressed: BlockStates, layers: Mapping[str, FactoredLinear], ridge: float
) -> None:
    """Refit layers of a block in the order in which they run, those that read one input together.

    Layers that run more than once, or not on the block's own tokens, stay as they are.

    Args:
        block: Name of the block.
        dense: The dense model, before the block.
        compressed: The model with factored layers, before the block; its layers are changed.
        layers: Its layers in the block, by name.
        ridge: Shift of :func:`input_map` relative to the mean of the moment's diagonal.

    Raises:
        ValueError: If an input holds NaN or Inf.
    """
    for names in _readers(block, dense, layers):
        moments = None
        for index in range(len(dense.hidden)):
            goal = dense.rows_before(block, index, names[0])
            rows = compressed.rows_before(block, index, names[0])
            if goal is None or rows is None or goal.shape != rows.shape:
                moments = None
                break
            moments = moments or _Moments.zeros(rows.shape[1], rows.device)
            moments.update(goal, rows)
        if moments is None:
            continue
        if not bool(torch.isfinite(moments.cross).all() & torch.isfinite(moments.moment).all()):
            raise ValueError(f"{names[0]}: its input holds NaN or Inf on the calibration data.")
        for name in names:
            _refit(layers[name], dense.root.get_submodule(name), moments, ridge)


def _readers(block: str, dense: BlockStates, names: Iterable[str]) -> list[list[str]]:
    """Layers of a block, in the order in which they run, those together that read the same tensor."""
    calls: list[tuple[str, Tensor]] = []

    def on_call(name: str, args: Any, kwargs: Any) -> None:
        calls.append((name, layer_input(args, kwargs)))

    with hooked(dense.root, names, on_call):
        dense.run(block, 0)
    count = Counter(name for name, _ in calls)
    groups: list[tuple[list[str], Tensor]] = []
    for name, x in calls:
        if count[name] > 1:
            continue
        if groups and groups[-1][1] is x:
            groups[-1][0].append(name)
        else:
            groups.append(([name], x))
    return [group for group, _ in groups]


def _refit(layer: FactoredLinear, target: nn.Module, moments: _Moments, ridge: float) -> None:
    """Give a layer the right factor, and the bias, that suit its inputs in the compressed model."""
    cross, moment, goal, mean = moments.means()
    L, R = layer.L, layer.R
    bias = dense_bias(target)
    least = _ROUNDING * float(moment.diagonal().sum())
    if bias is not None:
        cross, moment = cross - torch.outer(goal, mean), moment - torch.outer(mean, mean)
    refitted = R.double() @ input_map(cross, moment, max(ridge * float(moment.diagonal().mean()), least))
    if bias is not None and layer.bias is not None:
        corrected = bias.double() + dense_weight(target).double() @ goal - L.double() @ (refitted @ mean)
        layer.bias.copy_(corrected)
    R.copy_(refitted)
