"""The compressed activation against loops, the HOSVD and its error bound."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from strategies import (
    QUICK,
    SEEDS,
    TuckerSizes,
    decaying,
    normal,
    orthonormal,
    orthonormality_error,
    relative_error,
    tucker_sizes,
)
from torch import Tensor

from wasi_peft.linalg.tucker import (
    MODES,
    Bases,
    CompressionRule,
    Tucker,
    canonical,
    compress,
    expand,
    expand_rows,
    mode_dot,
    placeholder,
    unfold,
)

ALL = ("feature", "token", "batch")


def rule(modes: tuple[str, ...] = ("feature",), threshold: float | None = None, **ranks: int) -> CompressionRule:
    """A rule from keyword ranks."""
    return CompressionRule.from_options(modes, threshold, ranks)


def compressed(x: Tensor, options: CompressionRule, bases: Bases | None = None) -> Tucker:
    """The compressed form where there must be one."""
    result = compress(x, options, bases or Bases())
    assert result is not None
    return result[0]


def span(basis: Tensor) -> Tensor:
    """Projection on the columns of a basis, float64."""
    return basis.double() @ basis.double().T


# -------------------------------------------------------------------------------- primitives


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_unfold_lists_the_fibers(axis: int) -> None:
    x = normal(3, 4, 5, seed=1)
    assert np.array_equal(unfold(x, axis).numpy(), reference.unfold(x.numpy(), axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_mode_dot_is_einsum(axis: int, rows: int) -> None:
    x = normal(3, 4, 5, seed=2)
    matrix = normal(rows, x.shape[axis], seed=3)
    expected = torch.from_numpy(reference.contract(x.numpy(), matrix.numpy(), axis))
    assert relative_error(mode_dot(x, matrix, axis), expected) < 1e-14


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8,), (1, 1, 8)), ((5, 8), (1, 5, 8)), ((2, 5, 8), (2, 5, 8)), ((2, 3, 4, 8), (2, 12, 8)), ((0, 8), (1, 0, 8))],
)
def test_canonical_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert canonical(torch.zeros(shape)).shape == expected


def test_canonical_keeps_the_order_of_rows() -> None:
    x = normal(2, 3, 4, 5, seed=4)
    assert torch.equal(canonical(x).reshape(-1, 5), x.reshape(-1, 5))


@QUICK
@given(tucker_sizes(largest=4), SEEDS)
def test_expand_is_the_reconstruction_entry_by_entry(sizes: TuckerSizes, seed: int) -> None:
    full = {"batch": sizes.batch, "token": sizes.tokens, "feature": sizes.features}
    core = normal(*(sizes.ranks.get(mode, full[mode]) for mode in ("batch", "token", "feature")), seed=seed)
    bases = {mode: normal(full[mode], rank, seed=seed + 1) for mode, rank in sizes.ranks.items()}
    form = Tucker(core, bases["feature"], bases.get("token"), bases.get("batch"))
    numpy_bases = {mode: basis.numpy() for mode, basis in bases.items()}
    expected = torch.from_numpy(reference.tucker_reconstruct(core.numpy(), numpy_bases))
    assert float((expand(form) - expected).norm()) < 1e-12 * (1 + float(expected.norm()))
    from_rows = (expand_rows(form) @ form.feature.T).reshape(expected.shape)
    assert float((from_rows - expected).norm()) < 1e-12 * (1 + float(expected.norm()))


# -------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("modes", [("feature",), ("feature", "token"), ("feature", "batch"), ALL])
def test_ranks_of_the_input_are_exact(modes: tuple[str, ...]) -> None:
    """An input of multilinear rank (2, 3, 4), compressed at just these ranks."""
    core = normal(2, 3, 4, seed=5)
    x = expand(Tucker(core, orthonormal(12, 4, 6), orthonormal(10, 3, 7), orthonormal(9, 2, 8)))
    ranks = {mode: rank for mode, rank in zip(ALL, (4, 3, 2), strict=True) if mode in modes}
    form = compressed(x, rule(modes, **ranks))
    assert relative_error(expand(form), x) < 1e-10


def test_full_orthonormal_bases_are_exact() -> None:
    x = normal(4, 5, 6, seed=9)
    bases = orthonormal(6, 6, 10), orthonormal(5, 5, 11), orthonormal(4, 4, 12)
    core = x @ bases[0]
    core = mode_dot(mode_dot(core, bases[1].T, 1), bases[2].T, 0)
    assert relative_error(expand(Tucker(core, *bases)), x) < 1e-13


@QUICK
@given(tucker_sizes(largest=7), SEEDS)
def test_error_is_what_the_modes_dropped(sizes: TuckerSizes, seed: int) -> None:
    """ST-HOSVD: error^2 is the sum of the energies dropped in sequence, at most that of the full unfoldings."""
    x = decaying(sizes.batch, sizes.tokens, sizes.features, seed)
    result = compress(x, rule(tuple(sizes.ranks), **sizes.ranks), Bases())
    if result is None:
        return
    array, total = x.numpy(), float(x.square().sum())
    ranks = {
        mode: rank for mode, rank in sizes.ranks.items() if mode == "feature" or x.shape[reference.AXES[mode]] > 1
    }
    error = float((expand(result[0]) - x).square().sum())
    _, _, dropped = reference.sequential_hosvd(array, ranks)
    bound = sum(reference.mode_energies(array, reference.AXES[mode])[rank:].sum() for mode, rank in ranks.items())
    assert error == pytest.approx(dropped, rel=1e-6, abs=1e-13 * total)
    assert error <= bound + 1e-13 * total


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("modes", [("feature",), ("feature", "token"), ALL])
def test_threshold_bounds_the_error(threshold: float, modes: tuple[str, ...]) -> None:
    x = decaying(8, 9, 20, seed=13)
    form = compressed(x, rule(modes, threshold))
    total = float(x.square().sum())
    assert float((expand(form) - x).square().sum()) <= len(modes) * (1 - threshold) * total
    energies = reference.mode_energies(x.numpy(), 2)
    assert form.core.shape[2] == reference.smallest_rank(energies.tolist(), threshold)


def test_cold_bases_span_those_of_the_hosvd() -> None:
    x = decaying(8, 9, 20, seed=14)
    ranks = {"feature": 5, "token": 4, "batch": 3}
    form = compressed(x, rule(ALL, **ranks))
    core, bases, _ = reference.sequential_hosvd(x.numpy(), ranks)
    for mode, basis in bases.items():
        assert relative_error(span(getattr(form, mode)), span(torch.from_numpy(basis))) < 1e-7
    assert relative_error(expand(form), torch.from_numpy(reference.tucker_reconstruct(core, bases))) < 1e-7
    # the plain HOSVD is not better by more than its own bound allows
    plain_core, plain_bases = reference.hosvd(x.numpy(), ranks)
    plain = torch.from_numpy(reference.tucker_reconstruct(plain_core, plain_bases))
    assert relative_error(expand(form), x) < 3**0.5 * relative_error(plain, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("modes", [("feature",), ALL])
def test_bases_are_orthonormal_and_keep_the_dtype(dtype: torch.dtype, modes: tuple[str, ...]) -> None:
    bases = Bases()
    for step in range(4):
        x = decaying(8, 9, 20, seed=15 + step).to(dtype)
        result = compress(x, rule(modes, 0.9), bases)
        assert result is not None
        form, bases = result
        parts = [part for part in form if part is not None]
        assert [part.dtype for part in parts] == [dtype] * (1 + len(modes))
        for basis in parts[1:]:
            assert orthonormality_error(basis) < 20 * torch.finfo(dtype).eps
    assert bases.feature is form.feature and bases.token is form.token


def test_fixed_ranks_win_and_never_exceed_the_size() -> None:
    """The batch mode has no fixed rank, so the threshold decides it."""
    x = decaying(8, 9, 20, seed=16)
    form = compressed(x, rule(ALL, 0.5, feature=6, token=1000))
    assert form.token is not None and form.token.shape == (9, 9)
    array, left = x.numpy(), reference.sequential_hosvd(x.numpy(), {"feature": 6})[0]
    batch_rank = reference.smallest_rank(reference.mode_energies(left, 0).tolist(), 0.5)
    assert batch_rank < 8
    assert form.core.shape == (batch_rank, 9, 6)
    assert reference.smallest_rank(reference.mode_energies(array, 2).tolist(), 0.5) < 6


def test_modes_that_are_not_asked_for_stay_whole() -> None:
    x = decaying(8, 9, 20, seed=17)
    form = compressed(x, rule(("feature", "batch"), feature=4, batch=3))
    assert form.token is None and form.core.shape == (3, 9, 4)
    form = compressed(x, rule(("feature", "token"), feature=4, token=3))
    assert form.batch is None and form.core.shape == (8, 3, 4)


@pytest.mark.parametrize("shape", [(8, 9, 20), (1, 40, 20), (40, 1, 20)])
def test_input_is_neither_modified_nor_kept(shape: tuple[int, int, int]) -> None:
    x = decaying(*shape, seed=18)
    before, version = x.clone(), x._version
    form = compressed(x, rule(ALL, feature=3, token=2, batch=2))
    assert torch.equal(x, before) and x._version == version
    owners = {part.untyped_storage().data_ptr() for part in form if part is not None}
    assert x.untyped_storage().data_ptr() not in owners
    assert sum(part.untyped_storage().nbytes() for part in form if part is not None) == sum(
        part.numel() * 8 for part in form if part is not None
    )


@pytest.mark.parametrize(
    ("shape", "ranks"), [((2, 2, 6), {"feature": 4}), ((4, 5, 6), {"feature": 6}), ((1, 1, 6), {"feature": 1})]
)
def test_none_where_the_form_is_not_smaller(shape: tuple[int, int, int], ranks: dict[str, int]) -> None:
    assert compress(normal(*shape, seed=19), rule(**ranks), Bases()) is None


@QUICK
@given(tucker_sizes(largest=7), SEEDS)
def test_a_form_is_always_smaller_than_its_input(sizes: TuckerSizes, seed: int) -> None:
    x = normal(sizes.batch, sizes.tokens, sizes.features, seed=seed)
    result = compress(x, rule(tuple(sizes.ranks), **sizes.ranks), Bases())
    # modes of size one need no basis
    bases = {
        mode: rank for mode, rank in sizes.ranks.items() if mode == "feature" or x.shape[reference.AXES[mode]] > 1
    }
    shape = dict(zip(("batch", "token", "feature"), x.shape, strict=True))
    elements, left = 0, dict(shape)
    for mode in MODES:
        if mode in bases:
            rank = min(bases[mode], np.prod(list(left.values())) // left[mode])
            elements += shape[mode] * rank
            left[mode] = rank
    elements += int(np.prod(list(left.values())))
    assert (result is None) == (elements >= x.numel())
    if result is not None:
        assert sum(part.numel() for part in result[0] if part is not None) == elements


# -------------------------------------------------------------------------------- warm start


def test_warm_start_converges_to_the_leading_subspace() -> None:
    """From a random basis, repeated calls on one input reach what a cold start computes."""
    x = decaying(8, 9, 20, seed=20, rate=0.5)
    options = rule(("feature", "token"), feature=4, token=3)
    bases = Bases(orthonormal(20, 4, 21), orthonormal(9, 3, 22))
    cold = compressed(x, options)
    errors = []
    for _ in range(25):
        result = compress(x, options, bases)
        assert result is not None
        form, bases = result
        errors.append(relative_error(span(form.feature), span(cold.feature)))
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-8
    assert form.token is not None and cold.token is not None
    assert relative_error(span(form.token), span(cold.token)) < 1e-8
    assert relative_error(expand(form), expand(cold)) < 1e-8


def test_one_warm_call_is_one_subspace_iteration() -> None:
    x = decaying(8, 9, 20, seed=23)
    previous = orthonormal(20, 4, 24)
    form = compressed(x, rule(feature=4), Bases(previous))
    rows = x.reshape(-1, 20)
    expected = torch.linalg.qr(rows.T @ (rows @ previous)).Q
    assert relative_error(span(form.feature), span(expected)) < 1e-10
    assert relative_error(form.core, x @ form.feature) < 1e-14


def test_warm_bases_are_left_alone_without_advance() -> None:
    x, options = decaying(8, 9, 20, seed=25), rule(ALL, feature=4, token=3, batch=2)
    first = compress(x, options, Bases())
    assert first is not None
    copies = [basis.clone() for basis in first[1] if basis is not None]
    second = compress(decaying(8, 9, 20, seed=29), options, first[1], advance=False)
    assert second is not None
    assert second[1].feature is first[1].feature and second[1].token is first[1].token
    for basis, copy in zip(filter(lambda basis: basis is not None, second[1]), copies, strict=True):
        assert basis is not None and torch.equal(basis, copy)


def test_advance_makes_new_bases_and_keeps_the_old_ones() -> None:
    """A saved activation still refers to the old basis."""
    x, options = decaying(8, 9, 20, seed=26), rule(("feature", "token"), feature=4, token=3)
    first = compress(x, options, Bases(orthonormal(20, 4, 27), orthonormal(9, 3, 28)))
    assert first is not None
    copies = [part.clone() for part in first[0] if part is not None]
    second = compress(decaying(8, 9, 20, seed=30), options, first[1])
    assert second is not None
    assert relative_error(span(second[0].feature), span(first[0].feature)) > 1e-3
    for part, copy in zip([part for part in first[0] if part is not None], copies, strict=True):
        assert torch.equal(part, copy)


@pytest.mark.parametrize(
    ("shape", "dtype", "rebuilt"),
    [
        ((8, 9, 16), torch.float64, ("feature",)),
        ((8, 7, 20), torch.float64, ("token",)),
        ((3, 9, 20), torch.float64, ()),
        ((8, 9, 20), torch.float32, ("feature", "token")),
    ],
    ids=["features", "tokens", "batch", "dtype"],
)
def test_bases_that_no_longer_fit_are_rebuilt(
    shape: tuple[int, int, int], dtype: torch.dtype, rebuilt: tuple[str, ...]
) -> None:
    options = rule(ALL, feature=4, token=3, batch=2)
    first = compress(decaying(8, 9, 20, seed=31), options, Bases())
    assert first is not None
    x = decaying(*shape, seed=32).to(dtype)
    for advance in (True, False):
        second = compress(x, options, first[1], advance)
        assert second is not None
        assert expand(second[0]).shape == shape and second[0].core.dtype == dtype
        for mode in ("feature", "token"):
            basis = getattr(second[1], mode)
            assert orthonormality_error(basis) < 20 * torch.finfo(dtype).eps
            if mode in rebuilt:
                # as from the spectrum, given what the modes before made of the input
                others = Bases(**{key: None if key == mode else getattr(second[1], key) for key in Bases._fields})
                cold = compress(x, options, others, advance=False)
                assert cold is not None
                assert relative_error(span(basis), span(getattr(cold[1], mode))) < 1e-4
            elif not advance:
                assert basis is getattr(first[1], mode)


def test_too_few_rows_leave_a_warm_basis_as_it_is() -> None:
    """One sample with two features left has two rows for three token directions: they cannot define a new basis."""
    kept = Bases(orthonormal(20, 2, 33), orthonormal(9, 3, 34))
    options = rule(("feature", "token"), feature=2, token=3)
    one = compress(decaying(1, 9, 20, seed=35), options, kept)
    assert one is not None
    assert one[1].token is kept.token and one[1].feature is not kept.feature
    two = compress(decaying(2, 9, 20, seed=36), options, kept)
    assert two is not None and two[1].token is not kept.token


EDGES = {
    "no token": torch.zeros(1, 0, 8),
    "no sample": torch.zeros(0, 5, 8),
    "zero": torch.zeros(6, 7, 8),
    "NaN": torch.full((6, 7, 8), float("nan")),
    "one Inf": torch.ones(6, 7, 8).index_put(
        (torch.tensor(1), torch.tensor(2), torch.tensor(3)), torch.tensor(torch.inf)
    ),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("options", [rule(ALL, 0.9), rule(feature=3)], ids=["threshold", "rank"])
@pytest.mark.parametrize("warm", [False, True])
def test_inputs_without_a_subspace_do_no_harm(case: str, options: CompressionRule, warm: bool) -> None:
    """Kept whole, or compressed with orthonormal bases to the very same values: and no basis is spoiled."""
    x = EDGES[case]
    bases = Bases(orthonormal(8, 3, 37).float(), orthonormal(7, 2, 38).float()) if warm else Bases()
    result = compress(x, options, bases)
    if case not in ("zero",):
        assert result is None
    elif result is not None:
        assert torch.equal(expand(result[0]), x)
        for basis in result[1]:
            assert basis is None or orthonormality_error(basis) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_low_precision_inputs(dtype: torch.dtype) -> None:
    """Products of three entries leave the range of float16."""
    x = (1000 * decaying(8, 9, 20, seed=39)).to(dtype)
    bases = Bases()
    for _ in range(3):
        result = compress(x, rule(("feature",), feature=6), bases)
        assert result is not None
        form, bases = result
        assert orthonormality_error(form.feature) < 20 * torch.finfo(dtype).eps
    exact = compressed(x.double(), rule(("feature",), feature=6))
    kept, best = (relative_error(expand(f).double(), x.double()) for f in (form, exact))
    assert kept < best + 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", ["feature", "token"])
def test_a_fixed_rank_is_reached_again_after_a_small_input(mode: str) -> None:
    """A basis that is narrower than asked for, because an input was too small for more, does not stay."""
    narrow = Bases(orthonormal(20, 2, 40), orthonormal(9, 1, 41))
    options = rule(("feature", "token"), feature=5, token=4)
    for advance in (True, False):
        result = compress(decaying(8, 9, 20, seed=42), options, narrow, advance)
        assert result is not None
        assert getattr(result[1], mode).shape[1] == {"feature": 5, "token": 4}[mode]


def test_rules_are_hashable_values() -> None:
    ranks = {"token": 3, "feature": 4}
    same = rule(ALL, 0.9, feature=4, token=3)
    assert CompressionRule.from_options(ALL, 0.9, ranks) == same
    assert len({same, CompressionRule.from_options(ALL, 0.9, ranks), rule(ALL, 0.8, **ranks)}) == 2


@pytest.mark.parametrize("rank", [1, 2])
def test_a_basis_keeps_no_other_vectors_alive(rank: int) -> None:
    x = normal(3, 5, 6, seed=1)
    result = compress(x, CompressionRule(ranks=(("feature", rank),)), Bases())
    assert result is not None
    feature = result[0].feature
    assert feature.untyped_storage().nbytes() == feature.numel() * feature.element_size()


@pytest.mark.parametrize("options", [rule(("feature",), 0.9), rule(("feature", "token"), 0.9), rule(feature=3)])
@pytest.mark.parametrize("advance", [True, False])
def test_a_placeholder_has_the_form_that_compressing_gives(options: CompressionRule, advance: bool) -> None:
    x = decaying(4, 9, 20, seed=40)
    assert placeholder(x, options, Bases()) is None
    first = compress(x, options, Bases())
    assert first is not None
    announced = placeholder(x, options, first[1])
    result = compress(decaying(4, 9, 20, seed=41), options, first[1], advance)
    assert announced is not None and result is not None
    for form, part in zip(announced, result[0], strict=True):
        assert (form is None) == (part is None)
        assert form is None or (form.shape, form.dtype) == (part.shape, part.dtype)
    assert announced.core.untyped_storage().nbytes() == x.itemsize
