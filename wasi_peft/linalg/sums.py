"""Weighted sums of products of thin factors, `w_1 L_1 R_1 + w_2 L_2 R_2 + ...`, as one such product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def stacked_sum(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The sum, exactly: of the rank of one product where all have the same R, else of the sum of their ranks.

    **Shape**
        - pairs: L (out, K_i) and R (K_i, in) each; returns L (out, K) and R (K, in), float64

    Example:
        >>> pairs = [(torch.randn(6, 2), torch.randn(2, 5)), (torch.randn(6, 1), torch.randn(1, 5))]
        >>> L, R = stacked_sum(pairs, [0.5, 2.0])
        >>> torch.allclose((L @ R).float(), 0.5 * pairs[0][0] @ pairs[0][1] + 2 * pairs[1][0] @ pairs[1][1], atol=1e-5)
        True
    """
    scaled = [weight * L.double() for weight, (L, _) in zip(weights, pairs, strict=True)]
    first = pairs[0][1]
    if all(R.shape == first.shape and bool(torch.equal(R, first)) for _, R in pairs):
        return torch.stack(scaled).sum(0), first.double()
    return torch.cat(scaled, 1), torch.cat([R.double() for _, R in pairs])


def compressed_sum(L: Tensor, R: Tensor, rank: int) -> Pair:
    """The best approximation of a product at a smaller rank (Eckart-Young), without forming it.

    Rows of R come out orthogonal, and as long as those that go in are on average, so that learning rates keep their
    meaning.

    **Shape**
        - L: (out, K); R: (K, in); returns (out, rank) and (rank, in), float64

    Args:
        L: One factor.
        R: The other one.
        rank: At most K.
    """
    outer, left = torch.linalg.qr(L.double())
    inner, right = torch.linalg.qr(R.double().T)
    U, energies, Vh = torch.linalg.svd(left @ right.T)
    length = R.double().square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return outer @ U[:, :rank] * (energies[:rank] / length), Vh[:rank] @ inner.T * length
