"""Coordinates of the factors in which what trains, trains fast: the product `L R` stays as it is.

Where R does not train, its rows may be any basis of the row space that the weight is kept in. In one where the image
`h = R x` is white, plain Adam takes the steps that a Kronecker-factored preconditioner (K-FAC, arXiv 1503.05671) would
ask for on the side of the input (:func:`basis_form`, L trains); with the gradient of `L^T` times the output white too,
on both sides (:func:`core_form`, a core between L and R trains).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .spectra import lower_root
from .subspaces import range_finder

DAMPING = 0.01
BASIS_SCALE = 0.2  # measured: L then trains best at the learning rates of everything else
ADDITION_SCALE = 1.0  # measured, at the learning rates of LoRA


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


def basis_form(L: Tensor, R: Tensor, moments: ImageMoments | None = None) -> tuple[Tensor, Tensor]:
    """The same product in the coordinates of :func:`core_form` with the core in L: the image `R' x` is white.

    For training L alone. Adam moves every entry of L by about the learning rate, and so the weight by that times the
    size of R'; R' is 0.2 times that of :func:`core_form`, so that learning rates of 5e-4 suit.

    **Shape**
        - L: (out, K), of full column rank; R: (K, in); returns L' (out, K), R' (K, in)

    Args:
        L: Left factor.
        R: The other one.
        moments: What the data look like; None takes white inputs and output gradients.

    Example:
        >>> L, R = torch.eye(3)[:, :2], torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
        >>> left, right = basis_form(L, R)
        >>> (left @ right).round(decimals=4).tolist()
        [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    left, core, right = core_form(L.double(), R.double(), moments)
    return (left @ core / BASIS_SCALE).to(L.dtype), (BASIS_SCALE * right).to(R.dtype)


def addition_basis(weight: Tensor, rank: int, second_moment: Tensor | None = None) -> Tensor:
    """R of an addition `L R` to a weight of which L is zero at first and trains alone: directions, and coordinates.

    Those input directions through which the weight lets most pass: with C = E[x x^T], damped, `C = T T^T`, and V the
    leading right singular vectors of `W T`, `R = c V^T T^-1`. So the image `h = R x` is white, and c, the root
    mean square of x, gives it a size at which L trains well at LoRA's learning rates.

    **Shape**
        - weight: (out, in); returns (rank, in)

    Args:
        weight: The dense weight.
        rank: K, at most min(out, in).
        second_moment: C, (in, in); None for white inputs of variance 1.

    Example:
        >>> addition_basis(torch.diag(torch.tensor([1.0, 3.0])), 1).abs().round(decimals=3)
        tensor([[0., 1.]])
    """
    if second_moment is None:
        return ADDITION_SCALE * range_finder(weight.float(), rank, iterations=1).T.to(weight.dtype)
    return correction(weight.double(), rank, second_moment)[1].to(weight.dtype)


def correction(lost: Tensor, rank: int, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The best L and R for what rounding a weight has lost: they minimise `E |(lost - L R) x|^2`.

    With C = E[x x^T], damped, `C = T T^T`, and the singular value decomposition of `lost T`, cut to K directions. R is
    in the coordinates of :func:`addition_basis`, its image white. Source: CLoQ (arXiv 2501.18475), LQER (arXiv
    2402.02446).

    **Shape**
        - lost: (out, in); second_moment: C, (in, in); returns L (out, K), R (K, in), in the dtype of `lost`

    Example:
        >>> L, R = correction(torch.diag(torch.tensor([1.0, 3.0])), 1, torch.eye(2))
        >>> (L @ R).abs().round(decimals=2).tolist()
        [[0.0, 0.0], [0.0, 3.0]]
    """
    C = _damped(second_moment.to(lost))
    T = lower_root(C)
    weighed = lost @ T
    V = range_finder(weighed, rank)
    scale = ADDITION_SCALE * (math.sqrt(float(second_moment.diagonal().mean())) or 1.0)
    return weighed @ V / scale, scale * torch.linalg.solve_triangular(T, V.T, upper=False, left=False)


def whitened_rows(R: Tensor, image: Tensor, mean_square: float) -> Tensor:
    """Other rows with the same span, whose image is white: `R' = c S^(-1/2) R` with S = E[h h^T], h = R x, damped.

    **Shape**
        - R: (K, in); image: S, (K, K); returns (K, in)

    Args:
        R: Any rows.
        image: Second moment of their image.
        mean_square: Mean square of the entries of x; c is its root times the scale of :func:`addition_basis`.

    Example:
        >>> rows = whitened_rows(torch.eye(2), torch.diag(torch.tensor([4.0, 1.0])), mean_square=1.0)
        >>> (rows.diagonal() / ADDITION_SCALE).round(decimals=1)
        tensor([0.5000, 1.0000])
    """
    _, inverse = _roots(image.double())
    return (ADDITION_SCALE * (math.sqrt(mean_square) or 1.0) * (inverse @ R.double())).to(R.dtype)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a damped second moment, and the root's inverse."""
    values, vectors = torch.linalg.eigh(_damped(moment))
    # no smaller than the damping, where the moment is what it should be; sums in few bits may have smaller ones
    values = values.clamp_min(DAMPING * _positive(moment.diagonal().mean()))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _damped(moment: Tensor) -> Tensor:
    return moment + DAMPING * _positive(moment.diagonal().mean()) * torch.eye(len(moment)).to(moment)


def _positive(number: Tensor) -> Tensor:
    return torch.where(number > 0, number, torch.ones_like(number))
