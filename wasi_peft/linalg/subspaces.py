"""Low-rank linear algebra on plain tensors: rank rule, factors of a weight, subspace iteration, retraction.

Symbols (docs/method.md): `W` dense weight, out x in; `L` out x K with orthonormal columns and `R` K x in with
`W ~ L R`; `C` second moment (or covariance) of the layer's input, in x in; `G` gradient of the loss with respect to
the product `L R`, always held as two thin factors `G = left @ right`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spectra import _symmetric_eigen

_OVERSAMPLING = 8  # directions that a range finder iterates beyond those it returns


def orthonormalize(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the columns of a tall matrix, by Cholesky QR twice, Householder QR where that fails.

    Two rounds of `Q = A chol(A^T A)^-T` reach the orthogonality of Householder QR while the condition number of `A`
    is below about 1/sqrt(machine epsilon), with matrix products only (Yamamoto et al. 2015, CholeskyQR2).

    **Shape**
        - matrix: (n, r), n >= r
        - returns (n, r) with orthonormal columns, in the dtype of `matrix` (computed in at least float32)

    Example:
        >>> basis = orthonormalize(torch.tensor([[3.0], [4.0]]))
        >>> [round(value, 4) for value in basis.flatten().tolist()]
        [0.6, 0.8]
    """
    if matrix.shape[0] < matrix.shape[1]:
        raise ValueError(f"orthonormalize needs at least as many rows as columns, got {tuple(matrix.shape)}.")
    work = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    basis = work
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(basis.T @ basis)
        if int(info) != 0:
            return torch.linalg.qr(work).Q.to(matrix.dtype)
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
    gram = basis.T @ basis
    gram.diagonal().sub_(1)
    tolerance = 100 * torch.finfo(work.dtype).eps * max(1, matrix.shape[1]) ** 0.5
    if not bool(gram.abs().max() <= tolerance):
        basis = torch.linalg.qr(work).Q
    return basis.to(matrix.dtype)


def leading_subspace(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and right singular vectors of a matrix, from the eigen-decomposition of its smaller Gram matrix.

    That of a tall matrix is summed in float64 over square blocks, so that no float64 copy of the whole exists.

    **Shape**
        - matrix: (m, n)
        - returns energies (min(m, n),) descending and basis (n, min(m, n)), orthonormal columns

    Example:
        >>> energies, basis = leading_subspace(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> energies.tolist(), basis.abs().tolist()
        ([4.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    exact = torch.float64 if matrix.device.type != "mps" else torch.float32
    rows, columns = matrix.shape
    if rows < columns:
        work = matrix.to(exact)
        energies, vectors = _symmetric_eigen(work @ work.T)
        images = work.T @ vectors
        del work  # QR takes as much again
        return energies, torch.linalg.qr(images).Q.to(matrix.dtype)
    gram = matrix.new_zeros(columns, columns, dtype=exact)
    for rows_of_block in matrix.split(columns):
        block = rows_of_block.to(exact)
        gram.addmm_(block.T, block)
    energies, basis = _symmetric_eigen(gram)
    return energies, basis.to(matrix.dtype)


def range_finder(matrix: Tensor, rank: int, iterations: int = 3) -> Tensor:
    """Nearly the leading right singular vectors of a matrix, by block power iterations from random directions.

    A few directions more than asked for are iterated, and the best of their span are taken (Rayleigh-Ritz). Matrix
    products only, in a fraction of the memory of :func:`leading_subspace`; the same result for the same input.
    Source: Halko, Martinsson and Tropp 2011, algorithm 4.4.

    **Shape**
        - matrix: (m, n)
        - returns (n, rank), orthonormal columns, rank <= min(m, n)

    Example:
        >>> basis = range_finder(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
        >>> [round(value, 3) for value in basis.abs().flatten().tolist()]
        [1.0, 0.0, 0.0]
    """
    block = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64)
    basis = orthonormalize(start.to(matrix))
    for _ in range(iterations):
        basis = subspace_iteration(matrix, basis)
    image = matrix @ basis
    _, vectors = _symmetric_eigen(image.T @ image)
    return basis @ vectors[:, :rank]


def symmetric_range_finder(
    times: Callable[[Tensor], Tensor], like: Tensor, rank: int, iterations: int = 3
) -> tuple[Tensor, Tensor]:
    """The same for a positive semi-definite matrix that is known by its products, with Rayleigh's values.

    **Shape**
        - returns values (rank,), descending, and vectors (m, rank), orthonormal columns

    Args:
        times: Multiplies columns, (m, k), by the matrix.
        like: Of m rows, in the dtype and on the device of the vectors; no more directions than it has sides are
            iterated.
        rank: At most min(like.shape).
        iterations: Block power iterations.

    Example:
        >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> values, vectors = symmetric_range_finder(lambda columns: matrix @ columns, matrix, 2)
        >>> [round(value, 3) for value in values.tolist()]
        [4.0, 2.0]
    """
    block = min(rank + _OVERSAMPLING, *like.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(like), block, generator=generator, dtype=torch.float64).to(like)
    basis = orthonormalize(times(start))
    for _ in range(iterations):
        basis = orthonormalize(times(basis))
    values, vectors = _symmetric_eigen(basis.T @ times(basis))
    return values[:rank], basis @ vectors[:, :rank]


def subspace_iteration(matrix: Tensor, basis: Tensor) -> Tensor:
    """One warm-started power iteration on the right singular subspace: `U <- orth(A^T (A U))`.

    Source: PowerSGD (Vogels et al. 2019), WASI algorithm 1.

    **Shape**
        - matrix: (m, n)
        - basis: (n, r), r <= n
        - returns (n, r), orthonormal columns
    """
    return orthonormalize(matrix.T @ (matrix @ basis))


def retract(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Restore the orthonormal columns of L without changing the product `L R`.

    Polar decomposition `L = L' H` with `H = (L^T L)^(1/2)`, then `R' = H R`. Unlike QR it has no sign ambiguity and
    `L'` is the orthonormal matrix nearest to `L`, so optimizer moments of the old factors stay aligned with the new
    ones.

    **Shape**
        - L: (out, K), R: (K, in)
        - returns the same shapes and dtypes

    Example:
        >>> L, R = retract(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 1.0]]))
        >>> L.tolist(), R.tolist()
        ([[1.0], [0.0]], [[2.0, 2.0]])
    """
    change_L, change_R = retraction(L, R)
    return (L + change_L).to(L.dtype), (R + change_R).to(R.dtype)


def retraction(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`retract` adds to both factors, in at least float32.

    While `E = L^T L - I` is small, as after any sensible step, H and its inverse are a few terms of their power series
    (matrix products only); otherwise they come from an SVD of L, which also completes a lost column.

    **Shape**
        - L: (out, K), R: (K, in); returns the same shapes
    """
    work = L if L.dtype in (torch.float32, torch.float64) else L.float()
    right = R.to(work.dtype)
    error = work.T @ work
    error.diagonal().sub_(1)
    size = float(torch.linalg.matrix_norm(error))
    if not size < float("inf"):
        return torch.zeros_like(L), torch.zeros_like(R)  # diverged: leave the NaN or Inf where the user can see it
    if size <= 0.02:  # the first dropped term is below 35/128 * 0.02**4 ~ 4e-8
        change, inverse_change = _root_series(error, size)
        return work @ inverse_change, change @ right
    U, S, Vh = torch.linalg.svd(work.double() if work.device.type != "mps" else work, full_matrices=False)
    root = (Vh.T * S) @ Vh
    return (U @ Vh - work).to(work.dtype), (root @ right.to(root.dtype) - right).to(work.dtype)


def _root_series(error: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """`(I + E)^(1/2) - I` and `(I + E)^(-1/2) - I` by Horner's rule on fused multiply-adds.

    Up to E^3; up to E^2 where the next term, at most 5/16 * 0.01**3 ~ 3e-7, is what float32 rounds to anyway.
    """
    if size <= 0.01 and error.dtype == torch.float32:
        change = torch.addmm(error, error, error, beta=1 / 2, alpha=-1 / 8)
        return change, torch.addmm(error, error, error, beta=-1 / 2, alpha=3 / 8)
    inner = torch.addmm(error, error, error, beta=-1 / 8, alpha=1 / 16)  # E (-1/8 + E/16)
    inverse_inner = torch.addmm(error, error, error, beta=3 / 8, alpha=-5 / 16)
    change = torch.addmm(error, error, inner, beta=1 / 2)
    return change, torch.addmm(error, error, inverse_inner, beta=-1 / 2)


def factor_gradients(
    L: Tensor, R: Tensor, left: Tensor, right: Tensor, tangent: bool, left_in_basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors from the gradient of their product, `G = left @ right`, never forming G.

    Euclidean: `gL = G R^T`, `gR = L^T G`. Tangent: the same gR and `gL = (I - L L^T) G R^T (R R^T)^-1`, the gradient
    along the manifold of rank-K matrices for orthonormal L; a gradient step on both followed by :func:`retract` moves
    the product like `W - lr G` followed by one subspace iteration, up to O(lr^2) (docs/method.md). It is contracted on
    the thinner side: q columns of `left`, or K columns after `L^T left = gR R^T`-type products.

    **Shape**
        - L: (out, K); R: (K, in); left: (out, q); right: (q, in)
        - returns gL (out, K), gR (K, in)

    Args:
        L: Factor with orthonormal columns (required for `tangent`).
        R: The other factor.
        left: Gradient factor on the output side.
        right: Gradient factor on the input side.
        tangent: Return the tangent gradient for L.
        left_in_basis: `L^T left`, (K, q), where it is known already.
    """
    if left_in_basis is None:
        left_in_basis = L.T @ left
    grad_R = left_in_basis @ right
    projected = right @ R.T  # (q, K)
    if not tangent:
        return left @ projected, grad_R
    if left.shape[1] > L.shape[1] or L.shape[0] == L.shape[1]:
        return tangent_gradient(L, R, left @ projected, grad_R), grad_R
    normal = torch.addmm(left, L, left_in_basis, alpha=-1)
    return normal @ _divide_by_gram(projected, R), grad_R


def tangent_gradient(L: Tensor, R: Tensor, grad_L: Tensor, grad_R: Tensor) -> Tensor:
    """Tangent gradient of L from the Euclidean gradients of both factors.

    `(gL - L (gR R^T)) (R R^T)^-1`, because `L^T gL = L^T G R^T = gR R^T`. See :func:`factor_gradients`.

    **Shape**
        - L, grad_L: (out, K); R, grad_R: (K, in); returns (out, K)
    """
    if L.shape[0] == L.shape[1]:
        return torch.zeros_like(L)  # L spans everything: what is left of the complement is rounding
    return _divide_by_gram(torch.addmm(grad_L, L, grad_R @ R.T, alpha=-1), R)


def _divide_by_gram(rows: Tensor, R: Tensor) -> Tensor:
    """`rows (R R^T)^-1`, (n, K); with the pseudo-inverse where rows of R depend on each other."""
    gram = R @ R.T
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return rows @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-6)
    half = torch.linalg.solve_triangular(factor.T, rows, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def paper_step(L: Tensor, R: Tensor, left: Tensor, right: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """The paper's weight update, without an out x in matrix: SGD on the product, then one subspace iteration.

    Dense form (arXiv 2510.09160, algorithm 1): `W' = L R - lr G`, `L' = orth(W' (W'^T L))`, `R' = L'^T W'`. With
    `G = left @ right` of rank q it costs O((out + in) K (K + q)).

    **Shape**
        - L: (out, K), R: (K, in), left: (out, q), right: (q, in)
        - returns L' (out, K), R' (K, in)

    Args:
        L: Factor with orthonormal columns.
        R: The other factor.
        left: `dY^T Z`, gradient factor on the output side.
        right: `U_f^T`, gradient factor on the input side.
        lr: Learning rate.
    """
    Q = R.T - lr * (right.T @ (left.T @ L))  # W'^T L
    moved = L @ (R @ Q) - lr * (left @ (right @ Q))  # W' Q
    new_L = orthonormalize(moved)
    new_R = (new_L.T @ L) @ R - lr * ((new_L.T @ left) @ right)
    return new_L, new_R
