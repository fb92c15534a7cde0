"""Ranks of the weights alone under one budget of bytes.

Dropped energy is convex in the rank, so the best marginal energy per byte decides. :mod:`choosing` weighs
anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .spectrum import LayerSpectrum, input_groups

# -------------------------------------------------------------------- weights alone


def allocate_ranks(spectra: Sequence[LayerSpectrum], share: float) -> dict[str, int]:
    """Weight ranks of all layers under one budget, `sum stored_bytes(K) <= share * sum dense_bytes`.

    (:meth:`updates.base.Update.stored_bytes`, those of `(K + side_rank) (out + in)` elements without a core.) Every
    layer gets rank 1; then the direction with the most energy per byte is taken as long as it fits,
    never past break-even. Because energies descend, dropped energy is convex in the rank, and the result is optimal
    but for the first direction that did not fit: no other allocation keeps more than its energy on top. What it leaves
    over goes to cheaper directions further down.

    These ranks are cut to :attr:`LayerSpectrum.rank_choices`, whose widths multiply fast, and what that frees goes to
    whole steps between choices in the same way: no less energy is kept than after the cut, and what is left over is
    less than the next step of any layer. It goes to single directions of layers that stay below their first aligned
    rank. Nothing without energy is taken.

    Args:
        spectra: All layers, with comparable weight energies.
        share: Bytes of all factors over those of all dense weights, in (0, 1].

    Returns:
        Rank by layer name. The total is smaller than the share where all layers reach break-even first.

    Raises:
        ValueError: If the share is outside (0, 1], or not even rank 1 everywhere fits.

    Example:
        >>> one = LayerSpectrum("one", 8, 8, "one", (9.0, 8.0, 7.0, 0.1, 0.0, 0.0, 0.0, 0.0))
        >>> other = LayerSpectrum("other", 8, 8, "other", (9.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        >>> allocate_ranks([one, other], 0.5)
        {'one': 3, 'other': 1}
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"weight_share must be a number in (0, 1], got {share!r}.")
    input_groups(spectra)  # refuses repeated names
    dense = sum(spectrum.dense_bytes for spectrum in spectra)
    ranks = [1] * len(spectra)
    least = _stored_bytes(spectra, ranks)
    if share * dense < least:
        raise ValueError(
            f"weight_share must be at least {least / dense:.4g} (rank 1 in every layer, and what trains beside it), "
            f"got {share!r}."
        )
    choices = [spectrum.rank_choices for spectrum in spectra]
    ranks = _spend(spectra, ranks, [range(1, spectrum.largest_rank + 1) for spectrum in spectra], share * dense)
    ranks = [max(choice for choice in each if choice <= rank) for each, rank in zip(choices, ranks, strict=True)]
    ranks = _spend(spectra, ranks, choices, share * dense)
    # below the first aligned rank, no other is aligned either
    ranks = _spend(spectra, ranks, [range(1, spectrum.aligned_ranks.start) for spectrum in spectra], share * dense)
    return {spectrum.name: rank for spectrum, rank in zip(spectra, ranks, strict=True)}


def _stored_bytes(spectra: Sequence[LayerSpectrum], ranks: Sequence[int]) -> int:
    """Bytes of all factors, those of the update included."""
    return sum(spectrum.stored_bytes(rank) for spectrum, rank in zip(spectra, ranks, strict=True))


def _spend(
    spectra: Sequence[LayerSpectrum], ranks: Sequence[int], choices: Sequence[Sequence[int]], budget: float
) -> list[int]:
    """Larger ranks for a budget of bytes: steps from choice to choice, by energy per byte, as long as they fit.

    Args:
        spectra: All layers.
        ranks: Where to start.
        choices: Ascending ranks of each layer, no step shorter than the one before; a layer without its rank among
            them stays.
        budget: Bytes of all factors.
    """
    steps = [np.zeros((4, 0))]  # gain, layer, width and price of each
    for index, spectrum in enumerate(spectra):
        path = np.array([choice for choice in choices[index] if choice >= ranks[index]], np.int64)
        if len(path) < 2:
            continue
        energies = np.asarray(spectrum.rank_energies[path[0] : path[-1]], np.float64)
        width = np.diff(path)
        price = np.diff([spectrum.stored_bytes(int(rank)) for rank in path])
        gain = np.add.reduceat(energies, path[:-1] - path[0]) / price
        gain = np.minimum.accumulate(gain)  # means of what descends: only rounding can order them otherwise
        steps.append(np.stack([gain, np.full(len(gain), index), width, price])[:, gain > 0])
    every = np.concatenate(steps, axis=1)
    layers, widths, prices = every[1:, np.argsort(-every[0], kind="stable")].astype(np.int64).tolist()
    ranks, left = list(ranks), budget - _stored_bytes(spectra, ranks)
    for index, width, price in zip(layers, widths, prices, strict=True):
        # a layer whose next step did not fit gets no later one either: none costs less
        if price <= left:
            left -= price
            ranks[index] += width
    return ranks
