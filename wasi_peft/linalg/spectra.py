"""Low-rank linear algebra on plain tensors: rank rule, factors of a weight, subspace iteration, retraction.

Symbols (docs/method.md): `W` dense weight, out x in; `L` out x K with orthonormal columns and `R` K x in with
`W ~ L R`; `C` second moment (or covariance) of the layer's input, in x in; `G` gradient of the loss with respect to
the product `L R`, always held as two thin factors `G = left @ right`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class WeightFactors(NamedTuple):
    """Factors of one weight and the spectrum they were cut from.

    **Shape**
        - L: (out, K), orthonormal columns
        - R: (K, in)
        - energies: (min(out, in),), squared singular values in descending order, float64
    """

    L: Tensor
    R: Tensor
    energies: Tensor


class WeightSpectrum(NamedTuple):
    """A weight taken apart in order of importance: its best rank-K approximation is `left[:, :K] @ right[:K]`.

    **Shape**
        - energies: (n,), n = min(out, in), descending, float64: what dropping each direction costs
        - left: (out, n), columns of unit norm, not orthogonal in general
        - right: (n, in)
    """

    energies: Tensor
    left: Tensor
    right: Tensor


def rank_for_threshold(energies: Tensor, threshold: float) -> int:
    """Smallest K whose leading energies sum to at least `threshold` of the total.

    `K = min{k : sum_{i<=k} s_i^2 >= eps * sum_i s_i^2}` (arXiv 2510.09160, section 3). A threshold of 1 keeps every
    direction, so that it always reproduces the dense layer.

    **Shape**
        - energies: (n,), non-negative, descending

    Args:
        energies: Squared singular values.
        threshold: Share to keep, in (0, 1].

    Returns:
        A rank in [1, n].

    Raises:
        ValueError: If the threshold is outside (0, 1] or there are no energies.

    Example:
        >>> rank_for_threshold(torch.tensor([8.0, 1.0, 1.0]), 0.8)
        1
        >>> rank_for_threshold(torch.tensor([8.0, 1.0, 1.0]), 0.81)
        2
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}.")
    if energies.numel() == 0:
        raise ValueError("energies must hold at least one value, got an empty tensor.")
    if threshold == 1:
        return energies.numel()
    cumulative = energies.double().clamp_min(0).cumsum(0)
    reached = cumulative >= threshold * cumulative[-1]
    # argmax of a boolean tensor: the first True; the last entry is always True, so the rank never exceeds n
    return int(reached.int().argmax()) + 1


def _symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped at 0) and eigenvectors of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def lower_root(moment: Tensor) -> Tensor:
    """Lower triangular T with `T T^T = C`, of a damped second moment C.

    Sums that are nothing but rounding noise (of inputs or gradients that hardly differ from zero, or from their mean)
    are not positive definite, damped or not; what they then lack is taken to be as small as float64 can tell.

    Example:
        >>> lower_root(torch.tensor([[4.0, 2.0], [2.0, 2.0]]).double()).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info) == 0 and bool(torch.isfinite(root).all()):
        return root
    values, vectors = torch.linalg.eigh(moment)
    largest = values.abs().max()
    values = values.clamp_min(torch.finfo(values.dtype).eps * torch.where(largest > 0, largest, 1.0))
    triangle = torch.linalg.qr((vectors * values.sqrt()).T).R
    return triangle.T * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def _root(moment: Tensor) -> Tensor:
    """Some T with `T T^T = C`: by Cholesky, or where C has directions without any data, by its eigenvectors."""
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info) == 0 and bool(torch.isfinite(root).all()):
        return root
    values, vectors = _symmetric_eigen(moment)
    return vectors * values.sqrt()


def weight_spectrum(
    weight: Tensor, second_moment: Tensor | None = None, output_moment: Tensor | None = None, damping: float = 0.01
) -> WeightSpectrum:
    """Take a weight apart, weighing errors by what the layer's input looks like and by what its output is used for.

    With `C = E[x x^T]` and `S = E[g g^T]`, g the gradient of a loss with respect to the layer's output, the error of a
    change D of the weight is `tr(S D C D^T)`: the mean squared output error for `S = I` (SVD-LLM, arXiv 2403.07378),
    the Kronecker-factored estimate of the loss increase otherwise (K-FAC, arXiv 1503.05671). The best rank-K
    approximations come from the SVD of `T_S^T W T_C` with `S = T_S T_S^T`, `C = T_C T_C^T`. Only the smaller side is
    decomposed: for `out <= in`, `T_S^T W C W^T T_S = U E U^T`, `left = T_S^-T U`; otherwise
    `T_C^T W^T S W T_C = V E V^T`, `left = W T_C V`. Either way `left^T S left` is diagonal, so that the best right
    factor for the leading K columns of `left` is the leading K rows of `right = (left^T S left)^-1 left^T S W`.

    **Shape**
        - weight: (out, in)
        - second_moment: (in, in), positive semi-definite, or None for the identity
        - output_moment: (out, out), positive semi-definite, or None for the identity

    Args:
        weight: Dense weight in `torch.nn.Linear` layout.
        second_moment: `E[x x^T]` of the input, or its covariance if the mean is corrected elsewhere.
        output_moment: `E[g g^T]` of the output's gradient.
        damping: Added to the diagonal of `output_moment`, relative to its mean: an estimate from few samples claims
            that many directions do not matter at all.

    Returns:
        Energies and directions, float64.
    """
    out_features, in_features = weight.shape
    work = weight.double()
    moment = None if second_moment is None else second_moment.double()
    output = None if output_moment is None else _damped(output_moment.double(), damping)
    if out_features <= in_features:
        gram = work @ work.T if moment is None else work @ moment @ work.T
        root = None if output is None else lower_root(output)
        energies, left = _symmetric_eigen(gram if root is None else root.T @ gram @ root)
        if root is not None:
            left = torch.linalg.solve_triangular(root.T, left, upper=True)
    else:
        # the in x in side is the smaller one
        scaled = work
        if moment is not None:
            scaled = work @ _root(moment)
        weighed = scaled if output is None else output @ scaled
        energies, vectors = _symmetric_eigen(scaled.T @ weighed)
        left = scaled @ vectors
    left = left / left.norm(dim=0).clamp_min(torch.finfo(left.dtype).tiny)
    weighed = left if output is None else output @ left
    scale = (left * weighed).sum(0)
    # directions that the data never show: nothing is known of their right side
    scale = torch.where(energies > 1e-14 * energies[:1], scale, torch.inf)
    return WeightSpectrum(energies, left, (weighed.T @ work) / scale[:, None])


def weighed_error(
    change: Tensor, second_moment: Tensor | None = None, output_moment: Tensor | None = None, damping: float = 0.01
) -> float:
    """What a change D of a weight costs, `tr(S D C D^T)`, in the unit of the energies of :func:`weight_spectrum`.

    **Shape**
        - change: (out, in); moments as in :func:`weight_spectrum`

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0]))
        >>> weighed_error(weight) == weight_spectrum(weight).energies.sum().item() == 13
        True
    """
    work = change.double()
    right = work if second_moment is None else work @ second_moment.double()
    left = work if output_moment is None else _damped(output_moment.double(), damping) @ work
    return float((left * right).sum().clamp_min(0))


def _damped(moment: Tensor, damping: float) -> Tensor:
    mean = moment.diagonal().mean()
    return moment + damping * torch.where(mean > 0, mean, 1.0) * torch.eye(len(moment)).to(moment)


def truncate(weight: Tensor, spectrum: WeightSpectrum, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank K from a spectrum of the weight, L with orthonormal columns; at full rank they are exact.

    **Shape**
        - weight: (out, in); returns L (out, K), R (K, in), float64

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> L, R = truncate(weight, weight_spectrum(weight), 2)
        >>> (L @ R).round(decimals=4).diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    work = weight.double()
    if rank == min(weight.shape):
        square = weight.shape[0] <= weight.shape[1]
        L = torch.linalg.qr(spectrum.left.double() if square else work).Q
        return L, L.T @ work
    L, corner = torch.linalg.qr(spectrum.left[:, :rank].double())
    return L, corner @ spectrum.right[:rank].double()


def factorize_weight(
    weight: Tensor,
    select_rank: Callable[[Tensor], int],
    second_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
) -> WeightFactors:
    """Best factors of a weight at the rank that its energies ask for (:func:`weight_spectrum`, :func:`truncate`).

    **Shape**
        - weight: (out, in)
        - second_moment: (in, in) or None; output_moment: (out, out) or None
        - returns L (out, K), R (K, in) in the dtype of `weight`

    Args:
        weight: Dense weight in `torch.nn.Linear` layout.
        select_rank: Called with the energies (descending, float64); returns K.
        second_moment: See :func:`weight_spectrum`.
        output_moment: See :func:`weight_spectrum`.

    Returns:
        The factors and the energies.

    Example:
        >>> weight = torch.eye(3)
        >>> factorize_weight(weight, lambda energies: 3).L.shape
        torch.Size([3, 3])
    """
    spectrum = weight_spectrum(weight, second_moment, output_moment)
    L, R = truncate(weight, spectrum, select_rank(spectrum.energies))
    return WeightFactors(L.to(weight.dtype), R.to(weight.dtype), spectrum.energies)
