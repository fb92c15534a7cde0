"""Seeded random tensors and Hypothesis strategies for shapes, ranks and spectra."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from wasi_peft.ranks.spectrum import LayerSpectrum

# the same examples on every run, and no limit on the time of one: a busy machine must not fail a test
QUICK = settings(max_examples=25, deadline=None, derandomize=True)

SEEDS = st.integers(0, 2**16)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal entries."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix with orthonormal columns, float64."""
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    """A random matrix with the given singular values, float64."""
    left = orthonormal(rows, len(values), seed)
    return (left * values.double()) @ orthonormal(columns, len(values), seed + 1).T


def factors(out_features: int, in_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """L with orthonormal columns and a well-conditioned R (singular values 0.5 to 2), float64."""
    spectrum = torch.linspace(2.0, 0.5, rank)
    return orthonormal(out_features, rank, seed), with_singular_values(rank, in_features, spectrum, seed + 1)


def decaying(batch: int, tokens: int, features: int, seed: int, rate: float = 0.6) -> Tensor:
    """A 3-way tensor whose energy decays geometrically along every mode, in random bases, float64."""
    x = normal(batch, tokens, features, seed=seed)
    for axis, size in enumerate((batch, tokens, features)):
        scaled = rate ** torch.arange(size, dtype=torch.float64)
        basis = orthonormal(size, size, seed + 1 + axis) * scaled
        x = torch.tensordot(x, basis, dims=([axis], [1])).movedim(-1, axis)
    return x


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected tensor."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def orthonormality_error(basis: Tensor) -> float:
    """Largest entry of `|Q^T Q - I|`."""
    basis = basis.detach().double()
    return float((basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max())


class FactorSizes(NamedTuple):
    """Sizes of one factored layer, 1 <= rank <= min(out, in)."""

    out_features: int
    in_features: int
    rank: int


@st.composite
def factor_sizes(draw: st.DrawFn, largest: int = 12) -> FactorSizes:
    """Sizes with any rank, the full one and both orders of out and in included."""
    out_features, in_features = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return FactorSizes(out_features, in_features, draw(st.integers(1, min(out_features, in_features))))


@st.composite
def spectra(draw: st.DrawFn) -> list[float]:
    """Descending energies over many orders of magnitude, zeros included."""
    exponents = draw(st.lists(st.one_of(st.floats(-12, 6), st.just(-400.0)), min_size=1, max_size=30))
    return sorted((10.0**exponent for exponent in exponents), reverse=True)


THRESHOLDS = st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.5, 0.95, 1 - 2**-24, 1 - 2**-53, 1.0]))


class TuckerSizes(NamedTuple):
    """Sizes of one input and the ranks of its compressed modes."""

    batch: int
    tokens: int
    features: int
    ranks: dict[str, int]


@st.composite
def tucker_sizes(draw: st.DrawFn, largest: int = 6) -> TuckerSizes:
    """Sizes with any set of modes and any ranks; the feature mode always takes part."""
    sizes = {mode: draw(st.integers(1, largest)) for mode in ("batch", "token", "feature")}
    further = draw(st.sets(st.sampled_from(["token", "batch"])))
    modes = ["feature", *(mode for mode in ("token", "batch") if mode in further)]  # in the order of compression
    ranks = {mode: draw(st.integers(1, sizes[mode])) for mode in modes}
    return TuckerSizes(sizes["batch"], sizes["token"], sizes["feature"], ranks)


def descending(values: Any) -> tuple[float, ...]:
    """As energies have to be."""
    return tuple(sorted(map(float, values), reverse=True))


def spectrum(name: str, out_features: int, in_features: int, rate: float = 0.5, **options: Any) -> LayerSpectrum:
    """A layer whose weight energies fall geometrically."""
    energies = tuple(rate**k for k in range(min(out_features, in_features)))
    return LayerSpectrum(
        name, out_features, in_features, **{"shared_input": name, "weight_energies": energies, **options}
    )
