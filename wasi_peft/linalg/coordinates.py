"""Coordinates of the factors in which what trains, trains fast: the product `L R` stays as it is.

Where R does not train, its rows may be any basis of the row space that the weight is kept in. In one where the image
`h = R x` is white, plain Adam takes the steps that a Kronecker-factored preconditioner (K-FAC, arXiv 1503.05671) would
ask for on the side of the input (:func:`basis_form`, L trains); with the gradient of `L^T` times the output white too,
on both sides (:func:`core_form`, a core between L and R trains).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .subspaces import range_finder, symmetric_range_finder

DAMPING = 0.01
BASIS_SCALE = 0.2  # measured: L then trains best at the learning rates of everything else
ADDITION_RANK = 32  # measured, at the learning rates of LoRA: up to it an image of the input's size suits
NEGLIGIBLE = 1e-6  # of the largest energy: sums over data are in float32

Times = Callable[[Tensor], Tensor]  # a matrix times columns


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


def addition_scale(rank: int) -> float:
    """Size of an entry of the image `h = R x` of an addition, over that of x: `min(1, 32 / K)`.

    Adam moves every entry of L by about the learning rate, and so each output by up to that times the sum of K entries
    of h. With this scale no rank moves it by more than K = 32 does, so one learning rate suits all; without it, one
    that suits K = 32 diverges at wider ones. As LoRA's alpha / r with one alpha (arXiv 2106.09685).

    Example:
        >>> addition_scale(16), addition_scale(32), addition_scale(128)
        (1.0, 1.0, 0.25)
    """
    return min(1.0, ADDITION_RANK / rank)


def addition_basis(weight: Tensor, rank: int, times: Times | None = None, mean_square: float = 1.0) -> Tensor:
    """R of an addition `L R` to a weight of which L is zero at first and trains alone: directions, and coordinates.

    Those input directions through which the weight lets most pass: with C = E[x x^T], damped, `C = T T^T`, and V the
    leading right singular vectors of `W T`, `R = c V^T T^-1`. So the image `h = R x` is white, and c, the root
    mean square of x times :func:`addition_scale`, gives it a size at which L trains well at LoRA's learning rates.

    **Shape**
        - weight: (out, in); returns (rank, in)

    Args:
        weight: The dense weight.
        rank: K, at most min(out, in).
        times: Multiplies columns by C, as in :func:`correction`; None for white inputs of variance 1.
        mean_square: Of the entries of x.

    Example:
        >>> addition_basis(torch.diag(torch.tensor([1.0, 3.0])), 1).abs().round(decimals=3)
        tensor([[0., 1.]])
    """
    if times is None:
        return addition_scale(rank) * range_finder(weight.float(), rank, iterations=1).T.to(weight.dtype)
    return correction(weight.double(), rank, times, mean_square)[1].to(weight.dtype)


def correction(lost: Tensor, rank: int, times: Times, mean_square: float) -> tuple[Tensor, Tensor]:
    """The best L and R for what rounding a weight has lost: they minimise `E |(lost - L R) x|^2`.

    With C = E[x x^T], damped, and U the leading eigenvectors of `lost C lost^T`, of eigenvalues D^2: `L R` is
    `U U^T lost`, with R = c D^-1 U^T lost in the coordinates of :func:`addition_basis`, its image white. U comes from
    subspace iteration (:func:`subspaces.symmetric_range_finder`), so that C is met in products with few columns only:
    a root of it would take width^3. Source: CLoQ (arXiv 2501.18475), LQER (arXiv 2402.02446).

    **Shape**
        - lost: (out, in); returns L (out, K), R (K, in), in the dtype of `lost`

    Args:
        lost: What is to be made good for.
        rank: K, at most min(out, in).
        times: Multiplies columns, (in, k), by E[x x^T].
        mean_square: Of the entries of x.

    Example:
        >>> L, R = correction(torch.diag(torch.tensor([1.0, 3.0])), 1, lambda columns: columns, 1.0)
        >>> (L @ R).abs().round(decimals=2).tolist()
        [[0.0, 0.0], [0.0, 3.0]]
    """
    damping, scale = DAMPING * (mean_square or 1.0), addition_scale(rank) * (math.sqrt(mean_square) or 1.0)

    def damped(columns: Tensor) -> Tensor:
        return times(columns).to(columns) + damping * columns

    def weighed(columns: Tensor) -> Tensor:
        return lost @ damped(lost.T @ columns)

    energies, U = symmetric_range_finder(weighed, lost, rank)
    present = int((energies > NEGLIGIBLE * energies[:1]).sum())
    D, U = energies[:present].sqrt(), U[:, :present]
    L, R = U * D / scale, scale * (U / D).T @ lost
    if present < rank:  # where nothing was lost R may still train
        L = torch.cat([L, L.new_zeros(len(L), rank - present)], 1)
        R = torch.cat([R, _further_rows(R, rank - present, damped, scale)])
    return L, R


def _further_rows(R: Tensor, count: int, damped: Times, scale: float) -> Tensor:
    """Random rows beside others whose image is white, so that the image of all is."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, R.shape[1], generator=generator, dtype=torch.float64).to(R)
    for _ in range(2):  # the second time for what rounding left of the first
        rows = rows - (damped(rows.T).T @ R.T) @ R / scale**2
    values, vectors = torch.linalg.eigh(rows @ damped(rows.T))
    return scale * (vectors * values.rsqrt()).T @ rows


def whitened_rows(R: Tensor, image: Tensor, mean_square: float) -> Tensor:
    """Other rows with the same span, whose image is white: `R' = c S^(-1/2) R` with S = E[h h^T], h = R x, damped.

    **Shape**
        - R: (K, in); image: S, (K, K); returns (K, in)

    Args:
        R: Any rows.
        image: Second moment of their image.
        mean_square: Mean square of the entries of x; c is its root times :func:`addition_scale`.

    Example:
        >>> rows = whitened_rows(torch.eye(2), torch.diag(torch.tensor([4.0, 1.0])), mean_square=1.0)
        >>> rows.diagonal().round(decimals=1)
        tensor([0.5000, 1.0000])
    """
    _, inverse = _roots(image.double())
    return (addition_scale(len(R)) * (math.sqrt(mean_square) or 1.0) * (inverse @ R.double())).to(R.dtype)


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
