"""The core update: a linear layer with weight `L M R` of which only the K x K core M trains.

Names as in :mod:`wasi_peft.autograd`. L and R span the subspaces that the weight is kept in, as LoRA-XS (arXiv
2405.17604) trains a small matrix between the factors of a weight. What makes it train fast is the coordinates
(:func:`core_form`): both sides of M are whitened, so that plain Adam takes the steps that a Kronecker-factored
preconditioner (K-FAC, arXiv 1503.05671) would ask for. Backward keeps `h = x R^T`, K numbers a row, and all gradients
are exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import outside_autocast
from .tucker import roundable

DAMPING = 0.01


class ImageMoments(NamedTuple):
    """What a layer's data look like in the coordinates of its factors.

    **Shape**
        - image: (K, K), `E[h h^T]` with `h = R x`; gradient: (K, K), `E[u u^T]` with `u = L^T g`, g the gradient of a
          loss with respect to the layer's output; mean_square: mean square of the entries of x
    """

    image: Tensor
    gradient: Tensor
    mean_square: float


def core_form(L: Tensor, R: Tensor, moments: ImageMoments | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same product with a core: `L R = L' M R'`, in coordinates where Adam's steps suit the data.

    With `Q = E[h h^T]` and `S = E[u u^T]`, both damped by 0.01 of their mean diagonal, and the singular value
    decomposition `S^(1/2) Q^(1/2) = U D V^T`: `L' = L S^(-1/2) U / c`, `M = c D / d`, `R' = d V^T Q^(-1/2) R`. So the
    image `h' = R' x` and the gradient of M's output have covariances that are multiples of I, and M starts out
    diagonal. The scale d gives h' the mean square of x, and c gives the columns of L' norm 1 on average, so that a
    step of one size in every entry of M moves layers of all widths alike.

    **Shape**
        - L: (out, K), of full column rank; R: (K, in)
        - returns L' (out, K), M (K, K) diagonal, R' (K, in)

    Args:
        L: Left factor.
        R: The other one.
        moments: What the data look like; None takes white inputs and output gradients.

    Example:
        >>> L, R = torch.eye(3)[:, :2], torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
        >>> left, core, right = core_form(L, R)
        >>> (left @ core @ right).round(decimals=4).tolist()
        [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    left, right = L.double(), R.double()
    if moments is None:
        moments = ImageMoments(right @ right.T, left.T @ left, 1.0)
    image, image_inverse = _roots(moments.image.double())
    gradient, gradient_inverse = _roots(moments.gradient.double())
    turned_left, core, turned_right = torch.linalg.svd(gradient @ image)
    left = left @ gradient_inverse @ turned_left
    right = turned_right @ image_inverse @ right
    c = _positive((left.square().sum() / left.shape[1]).sqrt())
    d = math.sqrt(moments.mean_square) or 1.0
    return (left / c).to(L.dtype), torch.diag(core * c / d).to(L.dtype), (right * d).to(R.dtype)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a damped second moment, and the root's inverse."""
    damped = moment + DAMPING * _positive(moment.diagonal().mean()) * torch.eye(len(moment)).to(moment)
    values, vectors = torch.linalg.eigh(damped)
    values = values.clamp_min(torch.finfo(values.dtype).eps * values[-1])
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _positive(number: Tensor) -> Tensor:
    return torch.where(number > 0, number, torch.ones_like(number))


class CoreLinear(torch.autograd.Function):
    """`y = ((x R^T) M^T) L^T + b` with gradients for x, M and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
        h = F.linear(x, R.to(x.dtype))
        y = _from_image(h, L, M, bias)

        ctx.dtype, ctx.core_dtype = x.dtype, M.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, _, needs_M = ctx.needs_input_grad[:3]
        factors = (L, M if needs_x else None, R if needs_x else None) if needs_x or needs_M else (None, None, None)
        ctx.save_for_backward(*factors, roundable(h) if needs_M else None)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        L, M, R, h = ctx.saved_tensors
        needs_x, _, needs_M, _, needs_bias = ctx.needs_input_grad
        grad_x = grad_M = grad_bias = None
        if needs_bias:
            grad_bias = dY.reshape(-1, dY.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        if needs_x or needs_M:
            u = dY @ L.to(ctx.dtype)
            if needs_M:
                grad_M = (u.reshape(-1, u.shape[-1]).T @ h.reshape(-1, h.shape[-1])).to(ctx.core_dtype)
            if needs_x:
                grad_x = (u @ M.to(ctx.dtype)) @ R.to(ctx.dtype)
        return grad_x, None, grad_M, None, grad_bias


def three_linears(x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None) -> Tensor:
    """`((x R^T) M^T) L^T + b` in the dtype of x."""
    return _from_image(F.linear(x, R.to(x.dtype)), L, M, bias)


def _from_image(h: Tensor, L: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(h, M.to(h.dtype)), L.to(h.dtype), None if bias is None else bias.to(h.dtype))


def core_linear(x: Tensor, L: Tensor, M: Tensor, R: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with weight `L M R`, of which L and R do not train.

    **Shape**
        - x: (..., in); L: (out, K); M: (K, K); R: (K, in); bias: (out,); returns (..., out)

    Args:
        x: Input. Computation runs in its dtype; gradients come back in the dtypes of the parameters.
        L: Frozen factor.
        M: Trained core.
        R: The other frozen factor.
        bias: Optional bias.

    Returns:
        `((x R^T) M^T) L^T + b`. Not differentiable twice.
    """
    return CoreLinear.apply(x, L, M, R, bias)
