"""Packed experts: many linear layers with weights `Q_e + L_e R_e`, each for its own rows of one input.

Glossary as in :mod:`factored`, with an expert e for each segment of the rows; Q is a frozen weight, or there is none.
Every expert computes and keeps what its own layer would; what is saved is one tensor of each kind for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms.residual import Residual
from ..forms.stacked import Segment
from ..linalg.low_bit import RoundedRows
from ..linalg.tucker import roundable
from .factored import outside_autocast


def _rounded_rows(rounded: RoundedRows, part: slice) -> RoundedRows:
    values = None if rounded.values is None else rounded.values[part]
    return RoundedRows(rounded.codes[part], rounded.scale[part], rounded.columns, values)


class StackedLinear(torch.autograd.Function):
    """`y = x Q_e^T + (x R_e^T) L_e^T` with gradients for x, L and R.

    What is saved of the input: `h = x R_e^T` for L (exact, K wide); for R its rounded form where one is given, else
    the input itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Residual | None,
        L: Tensor | None,
        R: Tensor | None,
        out_features: int,
        segments: Sequence[Segment],
        rounded: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
    ) -> Tensor:
        y = _rows_for(segments, x, out_features)
        h = None if R is None else _rows_for(segments, x, R.shape[1])
        outer, inner = (None if part is None else part.to(x.dtype) for part in (L, R))
        for expert, start, stop in segments:
            rows, thin = slice(start, stop), None
            if h is not None and outer is not None and inner is not None:
                torch.mm(x[rows], inner[expert].t(), out=h[rows])
                thin = h[rows], outer[expert]
            if residual is not None:
                known = None if rounded is None else _rounded_rows(RoundedRows(*rounded), rows)
                y[rows] = _of_expert(residual, expert, out_features).product(x[rows], known, thin)
            elif thin is not None:
                torch.mm(thin[0], thin[1].t(), out=y[rows])

        ctx.residual, ctx.segments, ctx.dtype, ctx.width = residual, segments, x.dtype, x.shape[1]
        needs_x, _, needs_L, needs_R = ctx.needs_input_grad[:4]
        kept: tuple[Tensor | None, ...] = (None, None, None, None)
        ctx.kept = "nothing"
        if needs_R and rounded is not None:
            ctx.kept, kept = "rounded", rounded
        elif needs_R:
            ctx.kept, kept = "input", (x, None, None, None)
        saved = roundable(h) if needs_L and h is not None else None
        ctx.save_for_backward(L if needs_x or needs_R else None, R, saved, *kept)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, h, first, scale, columns, values = ctx.saved_tensors
        hidden_grad: Any
        inner: Any
        needs_x, _, needs_L, needs_R = ctx.needs_input_grad[:4]
        outer, inner = (None if part is None else part.to(ctx.dtype) for part in (L, R))
        grad_x = _rows_for(ctx.segments, dY, ctx.width) if needs_x else None
        grad_L = torch.zeros(len(R), dY.shape[1], R.shape[1], dtype=ctx.dtype, device=dY.device) if needs_L else None
        grad_R = torch.zeros_like(R, dtype=ctx.dtype) if needs_R else None
        for expert, start, stop in ctx.segments:
            rows = slice(start, stop)
            dY_e, hidden_grad = dY[rows], None
            if grad_L is not None:
                torch.mm(dY_e.t(), h[rows], out=grad_L[expert])
            if outer is not None:
                hidden_grad = dY_e @ outer[expert]
            if grad_x is not None and ctx.residual is not None:
                frozen = _of_expert(ctx.residual, expert, dY.shape[1]).transposed_product(dY_e)
                grad_x[rows] = frozen if hidden_grad is None else frozen.addmm_(hidden_grad, inner[expert])
            elif grad_x is not None:
                torch.mm(hidden_grad, inner[expert], out=grad_x[rows])
            if grad_R is not None and hidden_grad is not None:
                if ctx.kept == "input":
                    torch.mm(hidden_grad.t(), first[rows], out=grad_R[expert])
                    continue
                torch.mm((hidden_grad * scale[rows].to(ctx.dtype)).t(), first[rows].to(ctx.dtype), out=grad_R[expert])
                if columns is not None:  # those that are kept as they are
                    grad_R[expert].index_add_(1, columns, hidden_grad.t() @ values[rows])
        grad_L, grad_R = (None if part is None else part.to(R.dtype) for part in (grad_L, grad_R))
        return grad_x, None, grad_L, grad_R, None, None, None


def _rows_for(segments: Sequence[Segment], like: Tensor, width: int) -> Tensor:
    """A tensor (rows, width), zeros where a segment of the rows is not going to fill it."""
    filled = sum(stop - start for _, start, stop in segments) == len(like)
    return like.new_empty(len(like), width) if filled else like.new_zeros(len(like), width)


def _of_expert(residual: Residual, expert: int, out_features: int) -> Residual:
    return residual.rows(expert * out_features, (expert + 1) * out_features)


def stacked_linear(
    x: Tensor,
    residual: Residual | None,
    L: Tensor | None,
    R: Tensor | None,
    out_features: int,
    segments: Sequence[Segment],
    rounded: RoundedRows | None = None,
) -> Tensor:
    """Linear layers of experts, each applied to its own rows.

    **Shape**
        - x: (rows, in); L: (E, out, K); R: (E, K, in); returns (rows, out), a tensor of its own

    Args:
        x: Input, rows of one expert after those of another. Computation runs in its dtype; gradients come back in the
            dtypes of the parameters.
        residual: Q, all experts' rows in one matrix (E out, in); None for factors alone.
        L: Trained factor, exact gradient; None together with R for the frozen weight alone.
        R: The other one, trained or not.
        out_features: Of one expert.
        segments: Which rows are whose; rows of none give zeros.
        rounded: `x` in 8 bits, kept instead of it. The gradient of R is then that of the rounded input.

    Example:
        >>> L, R = torch.ones(2, 3, 1), torch.arange(2.0).view(2, 1, 1)
        >>> stacked_linear(torch.ones(3, 1), None, L, R, 3, [Segment(0, 0, 1), Segment(1, 1, 3)])
        tensor([[0., 0., 0.],
                [1., 1., 1.],
                [1., 1., 1.]])
    """
    parts = None if rounded is None else tuple(rounded)
    y: Tensor = StackedLinear.apply(x, residual, L, R, out_features, segments, parts)
    return y
