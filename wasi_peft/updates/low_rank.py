"""The low-rank update: a linear layer with weight `L R + B A` of which only B and A train.

Names as in :mod:`factored`; r is the rank of `B A`, which starts as the least important of all K + r directions of the
weight (:func:`split_off`). The products are those of one pair of factors, `[L B]` and `[R; A]`, so B A costs what r
more directions of L and R would, and no pass over the rows on top. Backward keeps r numbers a row for B, and the
(compressed) input for A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..forms.factored import FactoredLinear
from ..forms.split import SplitLinear, joined
from ..linalg.tucker import NOTHING, Tucker, expand_rows, roundable
from .base import InitialFactors, ProductGradientSink, Update
from .factored import linear_without_view, outside_autocast
from .resizing import Carry, grow_factors, shrink_factors

DEFAULT_RANK = 16


@dataclass(frozen=True)
class LowRank(Update):
    """The K most important directions, L R, stay as they are, and the next ones, B A, train, as in MiLoRA.

    MiLoRA: arXiv 2406.09044. B A trains at LoRA's learning rates.

    Args:
        rank: r, directions that train; in a layer with a smaller side, as many as that.
    """

    rank: int = DEFAULT_RANK

    name: ClassVar[str] = "low_rank"
    form_cls: ClassVar[type[FactoredLinear]] = SplitLinear
    reads_input: ClassVar[str | None] = "A"
    trained: ClassVar[tuple[str, ...]] = ("B", "A")

    @classmethod
    def from_options(cls, update_rank: int | None) -> LowRank:
        return cls(DEFAULT_RANK if update_rank is None else update_rank)

    @property
    def side_rank(self) -> int:
        return self.rank

    def start(self, initial: InitialFactors, rank: int) -> Mapping[str, Tensor]:
        side_rank = self.side_rank_of(len(initial.L), initial.R.shape[1])
        return dict(zip(SplitLinear.parts, split_off(initial.L, initial.R, rank, side_rank), strict=True))

    def parts_on(self, factors: FactoredLinear) -> Mapping[str, Tensor]:
        """No direction leaves the factors: B is zero and A is drawn."""
        side_rank = self.side_rank_of(factors.out_features, factors.in_features)
        L, R = factors.L.detach(), factors.R.detach()
        *_, B, A = split_off(L, R, factors.weight_rank, side_rank)
        return {"B": B, "A": A}

    def new_form(self, in_features: int, out_features: int, rank: int, bias: bool, **options: Any) -> FactoredLinear:
        side_rank = self.side_rank_of(out_features, in_features)
        return SplitLinear(in_features, out_features, rank, bias, side_rank=side_rank, **options)

    def forward(
        self, form: SplitLinear, x: Tensor, compressed: Tucker | None, sink: ProductGradientSink | None
    ) -> Tensor:
        if form.frozen("L") is None and form.frozen("R") is None:
            return low_rank_linear(x, form.L, form.R, form.B, form.A, form.bias, compressed)
        nothing = form.B.detach()[:, :0], form.A.detach()[:0]  # L and R multiply by themselves
        kept = form.multiply(form.multiply(x, "R"), "L")
        return kept + low_rank_linear(x, *nothing, form.B, form.A, form.bias, compressed)

    def image_width(self, form: SplitLinear) -> int:
        return form.B.shape[1] if form.B.requires_grad else 0

    def shrink(self, form: SplitLinear, rank: int, carry: Carry) -> None:
        """The best approximation of `L R`; B A stays."""
        shrink_factors(form.L, form.R, rank, carry)

    def grow(self, form: SplitLinear, rank: int, carry: Carry) -> None:
        """Random directions in L, zero rows in R; B A stays."""
        grow_factors(form.L, form.R, rank, carry)

    def trained_elements(self, out_features: int, in_features: int, rank: int) -> int:
        return self.side_rank_of(out_features, in_features) * (out_features + in_features)

    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        return 2 * rows * self.side_rank_of(out_features, in_features) * (out_features + (in_features if exact else 0))

    def compressed_gradient_flops(self, rows: int, out_features: int, in_features: int, input_rank: int) -> int:
        return 2 * rows * input_rank * self.side_rank_of(out_features, in_features)

    def product_flops(self, out_features: int, in_features: int, rank: int, input_rank: int) -> int:
        return 2 * input_rank * self.side_rank_of(out_features, in_features) * in_features


@torch.no_grad()
def split_off(L: Tensor, R: Tensor, kept: int, trained: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take factors apart into a part that stays and one that trains: `L R = L' R' + B A`.

    With `L R = sum_i s_i u_i v_i^T`, the `kept` largest terms stay, and those after them train, as in MiLoRA (arXiv
    2406.09044): `B = [s_i u_i / c]`, `A = [c v_i^T]`. So the rows of A have the norm c = 2 / sqrt(3) of rows that are
    drawn as in LoRA, at twice the size instead of LoRA's usual scaling alpha / r = 2; and LoRA's learning rates carry
    over. Rows for which there are no terms are drawn like that, with zeros in B.

    **Shape**
        - L: (out, n), orthonormal columns; R: (n, in); kept <= n <= kept + trained
        - returns L' (out, kept), R' (kept, in), B (out, trained), A (trained, in)

    Example:
        >>> L, R = torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> kept_L, kept_R, B, A = split_off(L, R, 2, 1)
        >>> (B @ A).round(decimals=4).diagonal().tolist()
        [0.0, 1.0, 0.0]
    """
    drawn = torch.empty(trained, R.shape[1], dtype=R.dtype, device=R.device).uniform_(-1, 1) * (2 / R.shape[1] ** 0.5)
    B = L.new_zeros(len(L), trained)
    terms = L.shape[1] - kept  # that there are for B A
    if not terms:
        return L, R, B, drawn
    right = R.double()
    turned = torch.linalg.eigh(right @ right.T).eigenvectors.flip(1)  # most important first
    left, right = L.double() @ turned, turned.T @ right
    size = right[kept:].norm(dim=1, keepdim=True) * 3**0.5 / 2
    rows = torch.where(size > 0, right[kept:] / size, drawn[:terms].double())
    B[:, :terms] = left[:, kept:] * size.T
    A = torch.cat([rows.to(R.dtype), drawn[terms:]])
    return left[:, :kept].to(L.dtype), right[:kept].to(R.dtype), B, A


class LowRankLinear(torch.autograd.Function):
    """`y = (x [R; A]^T) [L B]^T + b` with gradients for x, B, A and b.

    What is saved of the input: `x A^T` for B (exact, r wide), the compressed form or the input itself for A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        L: Tensor,
        R: Tensor,
        B: Tensor,
        A: Tensor,
        bias: Tensor | None,
        *compressed: Tensor | None,
    ) -> Tensor:
        outer, inner = joined(*(part.to(x.dtype) for part in (L, R, B, A)))
        hidden = F.linear(x, inner)
        y = linear_without_view(hidden, outer, bias)

        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, _, _, needs_B, needs_A = ctx.needs_input_grad[:5]
        # a copy: a view would keep all columns alive
        trained = hidden[..., L.shape[1] :].clone(memory_format=torch.contiguous_format) if needs_B else None
        trained = None if trained is None else roundable(trained)
        kept: tuple[Tensor | None, ...] = (None,)
        ctx.compressed = compressed[0] is not None
        if needs_A:
            kept = compressed if ctx.compressed else (x,)
        factors = (L, R, B, A) if needs_x or needs_A else (None, None, B, A)
        ctx.save_for_backward(*factors, trained, *kept)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, R, B, A, trained, first, *others = ctx.saved_tensors
        needs_x, _, _, needs_B, needs_A, needs_bias = ctx.needs_input_grad[:6]
        dY = dY.reshape(-1, dY.shape[-1])
        grad_x = grad_B = grad_A = grad_bias = None
        if needs_bias:
            grad_bias = dY.sum(0, dtype=ctx.bias_dtype)
        if needs_B:
            grad_B = (dY.T @ trained.reshape(-1, trained.shape[-1])).to(B.dtype)
        hidden_grad = None
        if needs_x:
            outer, inner = joined(*(part.to(ctx.dtype) for part in (L, R, B, A)))
            hidden_grad = dY @ outer
            grad_x = (hidden_grad @ inner).reshape(ctx.shape)
            hidden_grad = hidden_grad[:, L.shape[1] :]
        if needs_A:
            if hidden_grad is None:
                hidden_grad = dY @ B.to(ctx.dtype)
            if ctx.compressed:
                form = Tucker(first, *others)
                grad_A = (hidden_grad.T @ expand_rows(form)) @ form.feature.T
            else:
                grad_A = hidden_grad.T @ first.reshape(-1, first.shape[-1])
            grad_A = grad_A.to(A.dtype)
        return grad_x, None, None, grad_B, grad_A, grad_bias, *NOTHING


def low_rank_linear(
    x: Tensor,
    L: Tensor,
    R: Tensor,
    B: Tensor,
    A: Tensor,
    bias: Tensor | None = None,
    compressed: Tucker | None = None,
) -> Tensor:
    """Linear layer with weight `L R + B A`, of which L and R do not train.

    **Shape**
        - x: (..., in); L: (out, K); R: (K, in); B: (out, r); A: (r, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        L: Frozen factor.
        R: The other one.
        B: Trained factor. Its gradient is exact.
        A: The other one.
        bias: Optional bias.
        compressed: Compressed form of `x`, kept instead of it. The gradient of A is then that of the reconstructed
            input.

    Returns:
        `(x [R; A]^T) [L B]^T + b`. Not differentiable twice.
    """
    parts = NOTHING if compressed is None else compressed
    return LowRankLinear.apply(x, L, R, B, A, bias, *parts)
