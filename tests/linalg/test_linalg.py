"""Rank rule, weight factors, orthonormal bases, retraction and the paper's step, against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    QUICK,
    SEEDS,
    THRESHOLDS,
    FactorSizes,
    factor_sizes,
    factors,
    normal,
    orthonormal,
    orthonormality_error,
    relative_error,
    spectra,
    with_singular_values,
)
from torch import Tensor

from wasi_peft import measure_peak_memory
from wasi_peft.linalg.spectra import factorize_weight, rank_for_threshold
from wasi_peft.linalg.subspaces import (
    factor_gradients,
    leading_subspace,
    orthonormalize,
    paper_step,
    range_finder,
    retract,
    subspace_iteration,
)

# -------------------------------------------------------------------------------- rank rule


@QUICK
@given(spectra(), THRESHOLDS, st.sampled_from([torch.float32, torch.float64]))
def test_rank_is_in_range_sufficient_and_minimal(spectrum: list[float], threshold: float, dtype: torch.dtype) -> None:
    energies = torch.tensor(spectrum, dtype=dtype)
    rank = rank_for_threshold(energies, threshold)
    exact = energies.double().tolist()
    total, slack = math.fsum(exact), 1e-12
    assert 1 <= rank <= len(exact)
    assert math.fsum(exact[:rank]) >= threshold * total * (1 - slack)
    if threshold < 1:
        assert rank == 1 or math.fsum(exact[: rank - 1]) <= threshold * total * (1 + slack)
    else:
        assert rank == len(exact)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.77, 0.9, 0.999])
def test_rank_equals_trying_every_rank(threshold: float) -> None:
    energies = normal(17, seed=3).square().sort(descending=True).values
    assert rank_for_threshold(energies, threshold) == reference.smallest_rank(energies.tolist(), threshold)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rank_sees_energies_below_the_rounding_of_float32(share: float) -> None:
    """A long tail that a running sum in float32 would not add up."""
    energies = torch.full((1001,), 1e-8)
    energies[0] = 1
    threshold = 1 - share * 1e-5 / (1 + 1e-5)  # leaves out this share of the tail
    assert rank_for_threshold(energies, threshold) == pytest.approx(1001 - 1000 * share, abs=1)


@pytest.mark.parametrize("threshold", [0.9, 1 - 2**-24, 1 - 2**-53])
def test_rank_of_many_equal_energies(threshold: float) -> None:
    rank = rank_for_threshold(torch.full((5000,), 0.1), threshold)
    assert rank <= 5000
    assert rank == pytest.approx(math.ceil(threshold * 5000), abs=1)


def test_threshold_one_keeps_all_directions() -> None:
    assert rank_for_threshold(torch.tensor([1.0, 1e-30, 0.0, 0.0]), 1) == 4


def test_zero_energies_give_rank_one() -> None:
    assert rank_for_threshold(torch.zeros(5), 0.9) == 1


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_rank_rule_rejects_thresholds_outside_the_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        rank_for_threshold(torch.ones(3), threshold)


def test_rank_rule_rejects_an_empty_spectrum() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        rank_for_threshold(torch.ones(0), 0.5)


# -------------------------------------------------------------------------------- factors

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)]


def inputs(rows: int, features: int, seed: int) -> Tensor:
    """Inputs with very different energy along the features."""
    return normal(rows, features, seed=seed) @ torch.diag(torch.logspace(0, -1.5, features).double())


def moment(x: Tensor) -> Tensor:
    """`E[x x^T]` over rows."""
    return x.T @ x / x.shape[0]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_plain_factors_are_the_truncated_svd(out_features: int, in_features: int) -> None:
    weight = normal(out_features, in_features, seed=1)
    singular = torch.linalg.svdvals(weight)
    for rank in range(1, min(weight.shape) + 1):
        L, R, energies = factorize_weight(weight, lambda _, rank=rank: rank)
        expected_L, expected_R = reference.truncated_svd(weight, rank)
        assert L.shape == (out_features, rank) and R.shape == (rank, in_features)
        assert relative_error(L @ R, expected_L @ expected_R) < 1e-10
        assert relative_error(energies, singular.square()) < 1e-10
        assert orthonormality_error(L) < 1e-12


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_whitened_factors_are_those_of_the_cholesky_form(out_features: int, in_features: int) -> None:
    weight = normal(out_features, in_features, seed=2)
    second_moment = moment(inputs(40, in_features, seed=3))
    for rank in range(1, min(weight.shape) + 1):
        L, R, energies = factorize_weight(weight, lambda _, rank=rank: rank, second_moment)
        expected_L, expected_R, expected_energies = reference.whitened_svd(weight, second_moment, rank)
        assert L.shape == (out_features, rank) and R.shape == (rank, in_features)
        assert relative_error(L @ R, expected_L @ expected_R) < 1e-9
        assert relative_error(energies, expected_energies) < 1e-10
        assert orthonormality_error(L) < 1e-12
        assert relative_error(R, L.T @ weight) < 1e-12


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 9), (9, 6), (7, 7)])
def test_whitened_factors_with_fewer_samples_than_features(out_features: int, in_features: int) -> None:
    """The second moment is singular; the reference needs a jitter for its Cholesky factor."""
    weight = normal(out_features, in_features, seed=4)
    second_moment = moment(inputs(4, in_features, seed=5))
    for rank in (1, 2, 4):
        L, R, _ = factorize_weight(weight, lambda _, rank=rank: rank, second_moment)
        expected_L, expected_R, _ = reference.whitened_svd(weight, second_moment, rank, jitter=1e-11)
        assert relative_error(L @ R, expected_L @ expected_R) < 1e-5
        assert orthonormality_error(L) < 1e-12


@pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES, (12, 7), (7, 12)])
@pytest.mark.parametrize("rows", [3, 50])
def test_dropped_energies_are_the_output_error(out_features: int, in_features: int, rows: int) -> None:
    weight, x = normal(out_features, in_features, seed=6), inputs(rows, in_features, seed=7)
    for rank in range(1, min(weight.shape) + 1):
        L, R, energies = factorize_weight(weight, lambda _, rank=rank: rank, moment(x))
        error = float((x @ (weight - L @ R).T).square().sum() / rows)
        total = float((x @ weight.T).square().sum() / rows)
        assert float(energies.sum()) == pytest.approx(total, rel=1e-10)
        assert error == pytest.approx(float(energies[rank:].sum()), abs=1e-10 * total)


def test_whitened_factors_have_a_smaller_output_error_than_plain_ones() -> None:
    weight, x = normal(8, 8, seed=8), inputs(100, 8, seed=9)
    errors = []
    for second_moment in (moment(x), None):
        L, R, _ = factorize_weight(weight, lambda _: 3, second_moment)
        errors.append(float((x @ (weight - L @ R).T).square().sum()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("rows", [None, 0, 2, 50], ids=["plain", "zero moment", "singular moment", "full moment"])
def test_threshold_one_reproduces_the_weight(out_features: int, in_features: int, rows: int | None) -> None:
    weight = normal(out_features, in_features, seed=10)
    second_moment = None
    if rows is not None:
        second_moment = moment(inputs(rows, in_features, seed=11)) if rows else torch.zeros(in_features, in_features)
    L, R, _ = factorize_weight(weight, lambda energies: rank_for_threshold(energies, 1.0), second_moment)
    assert L.shape[1] == min(weight.shape)
    assert relative_error(L @ R, weight) < 1e-12
    assert orthonormality_error(L) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_factors_come_in_the_dtype_of_the_weight(dtype: torch.dtype, tolerance: float) -> None:
    weight = normal(6, 8, seed=12, dtype=dtype)
    L, R, energies = factorize_weight(weight, lambda energies: energies.numel())
    assert (L.dtype, R.dtype, energies.dtype) == (dtype, dtype, torch.float64)
    assert relative_error(L.double() @ R.double(), weight) < tolerance
    assert orthonormality_error(L) < tolerance


def test_select_rank_sees_descending_energies() -> None:
    seen: list[Tensor] = []

    def select(energies: Tensor) -> int:
        seen.append(energies)
        return 1

    for shape in ((4, 7), (7, 4)):
        factorize_weight(normal(*shape, seed=13), select, moment(inputs(20, shape[1], seed=14)))
        assert seen[-1].shape == (4,)
        assert bool((seen[-1].diff() <= 0).all()) and bool((seen[-1] >= 0).all())


# -------------------------------------------------------------------------------- bases


@QUICK
@given(st.integers(1, 10), st.integers(0, 10), SEEDS, st.sampled_from([1e-20, 1e-3, 1.0, 1e5, 1e18]))
def test_orthonormalize_keeps_the_span(columns: int, more_rows: int, seed: int, scale: float) -> None:
    rows = columns + more_rows
    matrix = scale * with_singular_values(rows, columns, torch.linspace(3, 0.1, columns), seed)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        basis = orthonormalize(matrix.to(dtype))
        assert basis.dtype == dtype and basis.shape == (rows, columns)
        assert orthonormality_error(basis) < tolerance
        expected = torch.linalg.qr(matrix).Q
        assert relative_error(basis.double() @ basis.double().T, expected @ expected.T) < 100 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 1e-12, 1e-16, 0.0])
def test_orthonormalize_ill_conditioned(dtype: torch.dtype, smallest: float) -> None:
    """From well below the limit of two Cholesky rounds to far past it, where Householder QR takes over."""
    values = torch.tensor([1.0, 0.5, smallest, smallest / 2], dtype=torch.float64)
    matrix = with_singular_values(20, 4, values, seed=1)
    basis = orthonormalize(matrix.to(dtype))
    assert orthonormality_error(basis) < 100 * torch.finfo(dtype).eps * 2
    leading = torch.linalg.svd(matrix, full_matrices=False).U[:, :2]
    outside = leading - basis.double() @ (basis.double().T @ leading)
    assert float(outside.norm()) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["zero", "repeated column", "zero column"])
def test_orthonormalize_lost_columns(dtype: torch.dtype, case: str) -> None:
    matrix = normal(9, 3, seed=2)
    if case == "zero":
        matrix = torch.zeros_like(matrix)
    elif case == "repeated column":
        matrix[:, 2] = matrix[:, 0]
    else:
        matrix[:, 1] = 0
    basis = orthonormalize(matrix.to(dtype))
    assert basis.dtype == dtype
    assert orthonormality_error(basis) < 10 * torch.finfo(dtype).eps + 1e-6
    lost = matrix - basis.double() @ (basis.double().T @ matrix)
    assert float(lost.norm()) < 30 * torch.finfo(dtype).eps * float(matrix.norm()) + 1e-12


def test_orthonormalize_computes_low_precision_in_float32() -> None:
    matrix = normal(30, 6, seed=3, dtype=torch.bfloat16)
    assert torch.equal(orthonormalize(matrix), orthonormalize(matrix.float()).bfloat16())


def test_orthonormalize_rejects_wide_matrices() -> None:
    with pytest.raises(ValueError, match=r"at least as many rows as columns, got \(2, 3\)"):
        orthonormalize(torch.ones(2, 3))


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (9, 4), (6, 6), (1, 3), (3, 1), (47, 5), (5, 47)])
def test_leading_subspace_is_the_svd(rows: int, columns: int) -> None:
    smaller = min(rows, columns)
    matrix = with_singular_values(rows, columns, torch.linspace(2, 0.5, smaller), seed=4)
    energies, basis = leading_subspace(matrix)
    _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    assert energies.shape == (smaller,) and basis.shape == (columns, smaller)
    assert relative_error(energies, S.square()) < 1e-12
    assert orthonormality_error(basis) < 1e-12
    for rank in range(1, smaller + 1):
        kept, expected = basis[:, :rank], Vh[:rank].T
        assert relative_error(kept @ kept.T, expected @ expected.T) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leading_subspace_of_a_rank_deficient_matrix(dtype: torch.dtype) -> None:
    matrix = (normal(5, 2, seed=5) @ normal(2, 8, seed=6)).to(dtype)
    for case in (matrix, matrix.T, torch.zeros_like(matrix)):
        energies, basis = leading_subspace(case)
        assert energies.dtype == torch.float64 and basis.dtype == dtype
        assert orthonormality_error(basis) < 10 * torch.finfo(dtype).eps
        assert relative_error((case @ basis).float() @ basis.T.float(), case) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("transposed", [False, True])
def test_leading_subspace_is_as_exact_as_the_whole_in_float64(transposed: bool) -> None:
    matrix = (normal(1000, 24, seed=8) * torch.logspace(0, -3, 24)).float()
    matrix = matrix.T if transposed else matrix
    energies, basis = leading_subspace(matrix)
    _, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert float(((energies - S.square()) / S.square()).abs().max()) < 1e-8
    assert relative_error((basis.double() * Vh.T).sum(0).abs(), torch.ones(24)) < 1e-6


def test_leading_subspace_makes_no_copy_of_a_tall_matrix_in_float64() -> None:
    matrix = normal(6000, 40, seed=9).float()
    for case in (matrix, matrix[:, :39]):  # the second is not contiguous
        assert measure_peak_memory(lambda case=case: leading_subspace(case)).peak_bytes < matrix.nbytes // 8
    wide = matrix.T
    images = 2 * matrix.nbytes  # of the singular vectors, in float64: that, a copy and the result of QR
    assert measure_peak_memory(lambda: leading_subspace(wide)).peak_bytes < 3.2 * images


def test_subspace_iteration_converges_to_the_leading_subspace() -> None:
    matrix = with_singular_values(20, 9, torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, 0.2]), seed=7)
    expected = torch.linalg.svd(matrix).Vh[:3].T
    basis, errors = orthonormal(9, 3, seed=9), []
    for _ in range(12):
        basis = subspace_iteration(matrix, basis)
        errors.append(relative_error(basis @ basis.T, expected @ expected.T))
    assert errors[-1] < 1e-9
    # every iteration shrinks the error by (s_4 / s_3)^2 = 1/9
    assert errors[5] / errors[4] == pytest.approx(1 / 9, rel=0.05)


# -------------------------------------------------------------------------------- retraction


@QUICK
@given(factor_sizes(), SEEDS, st.floats(-7, 0.5))
def test_retract_keeps_the_product_and_is_the_polar_factor(sizes: FactorSizes, seed: int, exponent: float) -> None:
    """Small perturbations take the series, large ones the eigen-decomposition."""
    L, R = factors(*sizes, seed)
    noise = normal(*L.shape, seed=seed + 7)
    moved = L + 10**exponent * noise / noise.norm()
    singular = torch.linalg.svdvals(moved)
    new_L, new_R = retract(moved, R)
    assert new_L.shape == L.shape and new_R.shape == R.shape
    assert orthonormality_error(new_L) < 2e-7
    assert relative_error(new_L @ new_R, moved @ R) < 2e-7
    if singular[-1] > 1e-2 * singular[0]:
        Q, H = reference.polar(moved)
        assert relative_error(new_L, Q) < 2e-7
        assert relative_error(new_R, H @ R) < 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 0.01, 0.01999, 0.02001, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("spread", [False, True])
def test_retract_is_polar_on_both_sides_of_the_switch(dtype: torch.dtype, size: float, spread: bool) -> None:
    """At `||L^T L - I|| = 0.02` the series gives way to a decomposition; its error is largest for rank one."""
    base, R = factors(15, 11, 5, seed=1)
    error = normal(5, 5, seed=2)
    error = error + error.T if spread else error[:, :1] @ error[:, :1].T
    values, vectors = torch.linalg.eigh(torch.eye(5) + size * error / torch.linalg.matrix_norm(error))
    L = base @ (vectors * values.sqrt()) @ vectors.T
    assert float(torch.linalg.matrix_norm(L.T @ L - torch.eye(5))) == pytest.approx(size, rel=1e-9)
    new_L, new_R = retract(L.to(dtype), R.to(dtype))
    Q, H = reference.polar(L)
    rounding = 1e-6 if dtype == torch.float32 else 0
    # the first terms that the series drops are 35/128 E^4 and 5/128 E^4
    assert relative_error(new_L, Q) < 5e-8 + rounding
    assert relative_error(new_R, H @ R) < 8e-9 + rounding


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1, 0.5])
def test_retract_flips_no_sign(size: float) -> None:
    """No orthonormal matrix is nearer to the moved L, so optimizer moments stay aligned."""
    for seed in range(5):
        L, R = factors(12, 9, 4, seed=10 * seed)
        noise = normal(12, 4, seed=seed)
        moved = L + size * noise / noise.norm()
        new_L, _ = retract(moved, R)
        assert bool(((new_L * moved).sum(0) > 0.5).all())
        assert float((new_L - moved).norm()) <= float((L - moved).norm()) * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_retract_leaves_a_diverged_factor_alone(bad: float) -> None:
    L, R = factors(6, 5, 3, seed=3)
    L[2, 1] = bad
    new_L, new_R = retract(L, R)
    torch.testing.assert_close(new_L, L, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(new_R, R)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", ["zero column", "repeated column", "zero"])
def test_retract_of_a_lost_column(case: str, seed: int) -> None:
    L, R = factors(8, 6, 3, seed=seed)
    if case == "zero column":
        L[:, 1] = 0
    elif case == "repeated column":
        L[:, 2] = L[:, 0]
    else:
        L.zero_()
    new_L, new_R = retract(L, R)
    assert orthonormality_error(new_L) < 1e-12
    assert float((new_L @ new_R - L @ R).norm()) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 3e-3, 1e-3, 5e-4, 1e-4, 1e-6, 1e-7, 3e-8, 1e-8, 1e-10])
def test_retract_of_an_almost_lost_column(dtype: torch.dtype, tolerance: float, smallest: float) -> None:
    """The smallest eigenvalue of `L^T L` sinks into the rounding of the larger ones."""
    for seed in range(4):
        L = with_singular_values(12, 3, torch.tensor([1.4, 1.0, smallest], dtype=torch.float64), seed=seed).to(dtype)
        R = normal(3, 6, seed=seed + 2, dtype=dtype)
        new_L, new_R = retract(L, R)
        assert orthonormality_error(new_L) < tolerance
        assert relative_error(new_L @ new_R, L @ R) < tolerance


def test_retract_of_orthonormal_factors_changes_nothing() -> None:
    L, R = factors(10, 7, 4, seed=5)
    new_L, new_R = retract(L, R)
    assert relative_error(new_L, L) < 1e-14 and relative_error(new_R, R) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_retract_low_precision(dtype: torch.dtype) -> None:
    L, R = factors(20, 15, 4, seed=6)
    moved = (L + 0.05 * normal(20, 4, seed=7)).to(dtype)
    new_L, new_R = retract(moved, R.to(dtype))
    eps = torch.finfo(dtype).eps
    assert (new_L.dtype, new_R.dtype) == (dtype, dtype)
    assert orthonormality_error(new_L) < 4 * eps
    assert relative_error(new_L.double() @ new_R.double(), moved.double() @ R.to(dtype).double()) < 4 * eps


def test_retract_does_not_modify_its_arguments() -> None:
    L, R = factors(6, 5, 2, seed=8)
    for size in (1e-3, 1.0):
        moved = L + size * normal(6, 2, seed=9)
        before = moved.clone(), R.clone()
        retract(moved, R)
        assert torch.equal(moved, before[0]) and torch.equal(R, before[1])


# -------------------------------------------------------------------------------- gradients, steps


@QUICK
@given(factor_sizes(), st.integers(1, 14), SEEDS, st.booleans())
@example(FactorSizes(9, 7, 4), 3, 0, True)  # q below K
@example(FactorSizes(9, 7, 4), 6, 0, True)  # q above K
@example(FactorSizes(5, 7, 5), 3, 0, True)  # L spans everything
@example(FactorSizes(7, 5, 5), 6, 0, True)  # R is square
def test_factor_gradients_are_the_dense_formulas(
    sizes: FactorSizes, gradient_rank: int, seed: int, known_in_basis: bool
) -> None:
    L, R = factors(*sizes, seed)
    left = normal(sizes.out_features, gradient_rank, seed=seed + 3)
    right = normal(gradient_rank, sizes.in_features, seed=seed + 4)
    G, in_basis = left @ right, L.T @ left if known_in_basis else None
    tolerance = 1e-10 * float(G.norm())
    for tangent, expected_L in ((False, G @ R.T), (True, reference.tangent_gradient(L, R, G))):
        grad_L, grad_R = factor_gradients(L, R, left, right, tangent, in_basis)
        assert grad_L.shape == L.shape and grad_R.shape == R.shape
        assert float((grad_L - expected_L).norm()) < tolerance
        assert float((grad_R - L.T @ G).norm()) < tolerance
    assert float((L.T @ grad_L).norm()) < tolerance  # the tangent gradient does not move along L itself


@pytest.mark.parametrize("gradient_rank", [2, 6])
def test_tangent_gradient_of_a_rank_deficient_factor(gradient_rank: int) -> None:
    L, R = factors(9, 7, 3, seed=10)
    R[2] = 0
    left, right = normal(9, gradient_rank, seed=11), normal(gradient_rank, 7, seed=12)
    grad_L, _ = factor_gradients(L, R, left, right, tangent=True)
    expected = reference.tangent_gradient(L, R, left @ right)
    assert float((grad_L - expected).norm()) < 1e-9 * float(expected.norm())
    assert float(grad_L[:, 2].norm()) < 1e-9 * float(expected.norm())


@QUICK
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.floats(0.5, 2.0), SEEDS)
def test_a_range_finder_keeps_nearly_the_leading_energy(m: int, n: int, rank: int, decay: float, seed: int) -> None:
    rank = min(rank, m, n)
    rotation = torch.linalg.qr(normal(n, n, seed=seed)).Q
    matrix = normal(m, n, seed=seed + 1) * torch.arange(1, n + 1).double() ** -decay @ rotation
    basis = range_finder(matrix, rank)
    assert basis.shape == (n, rank)
    assert orthonormality_error(basis) < 1e-10
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    assert 0.98 * best <= (matrix @ basis).square().sum() <= best * (1 + 1e-9)
    assert torch.equal(basis, range_finder(matrix, rank))


@pytest.mark.parametrize("rank_of_matrix", [1, 4])
def test_a_range_finder_meets_the_whole_of_a_matrix_of_low_rank(rank_of_matrix: int) -> None:
    matrix = normal(30, rank_of_matrix, seed=0) @ normal(rank_of_matrix, 20, seed=1)
    basis = range_finder(matrix, 5)
    assert orthonormality_error(basis) < 1e-10
    assert relative_error(matrix @ basis @ basis.T, matrix) < 1e-10


def test_a_range_finder_needs_less_memory_than_all_vectors() -> None:
    matrix = normal(400, 300, seed=0).float()
    most = measure_peak_memory(lambda: leading_subspace(matrix)).peak_bytes
    assert measure_peak_memory(lambda: range_finder(matrix, 12)).peak_bytes < most / 5


@QUICK
@given(factor_sizes(), st.integers(1, 8), SEEDS, st.floats(1e-5, 0.2))
def test_paper_step_equals_the_dense_step(sizes: FactorSizes, gradient_rank: int, seed: int, lr: float) -> None:
    L, R = factors(*sizes, seed)
    left = normal(sizes.out_features, gradient_rank, seed=seed + 3)
    right = normal(gradient_rank, sizes.in_features, seed=seed + 4)
    left = left / (left @ right).norm()
    new_L, new_R = paper_step(L, R, left, right, lr)
    expected_L, expected_R = reference.dense_paper_step(L, R, left @ right, lr)
    assert new_L.shape == L.shape and new_R.shape == R.shape
    assert orthonormality_error(new_L) < 1e-12
    assert relative_error(new_L @ new_L.T, expected_L @ expected_L.T) < 1e-10
    assert relative_error(new_L @ new_R, expected_L @ expected_R) < 1e-10


def test_authors_pairing_corrupts_the_weight_and_ours_does_not() -> None:
    """QR may flip columns of the new L; `R = L_old^T W` does not know (docs/method.md)."""
    faulty = []
    for seed in range(5):
        L, R = factors(10, 8, 4, seed=20 * seed)
        left, right = normal(10, 3, seed=seed + 1), normal(3, 8, seed=seed + 2)
        lr = 1e-3 / float((left @ right).norm())
        expected_L, expected_R = reference.dense_paper_step(L, R, left @ right, lr)
        expected = expected_L @ expected_R
        authors_L, authors_R = reference.authors_step(L, R, left @ right, lr)
        faulty.append(relative_error(authors_L @ authors_R, expected))

        new_L, new_R = paper_step(L, R, left, right, lr)
        assert relative_error(new_L @ new_R, expected) < 1e-6
        moved = L - lr * left @ (right @ R.T)
        kept_L, kept_R = retract(moved, R)
        assert relative_error(kept_L @ kept_R, moved @ R) < 1e-6
    assert max(faulty) > 0.5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(12, 10, 4), (7, 15, 3), (15, 6, 6)])
def test_sgd_on_the_factors_is_the_papers_step_to_first_order(
    seed: int, out_features: int, in_features: int, rank: int
) -> None:
    """The difference of the two products falls with the square of the learning rate."""
    L, R = factors(out_features, in_features, rank, seed=30 + 5 * seed)
    left, right = normal(out_features, 3, seed=seed), normal(3, in_features, seed=seed + 1)
    left = left / (left @ right).norm()
    grad_L, grad_R = factor_gradients(L, R, left, right, tangent=True)
    rates = np.logspace(-1, -4, 7)
    differences = []
    for lr in rates:
        new_L, new_R = retract(L - lr * grad_L, R - lr * grad_R)
        paper_L, paper_R = paper_step(L, R, left, right, float(lr))
        differences.append(float((new_L @ new_R - paper_L @ paper_R).norm()))
    slope = np.polyfit(np.log(rates), np.log(differences), 1)[0]
    assert 1.8 < slope < 2.3
