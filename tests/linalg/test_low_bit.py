"""Rounding to 8 and 4 bits: how far codes are from values, and what becomes of zeros, outliers, NaN and odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS, normal

from wasi_peft.linalg import low_bit
from wasi_peft.linalg.low_bit import (
    GROUP,
    LARGEST_CODE,
    quantize_groups,
    quantize_rows,
    restore_groups,
    row_tiles,
    transposed_times_rows,
)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 70))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---------------------------------------------------------------- rows in 8 bits


@QUICK
@given(sizes=SIZES, seed=SEEDS, exponent=st.integers(-20, 20))
def test_no_entry_of_a_row_is_off_by_more_than_half_a_step(sizes: tuple[int, int], seed: int, exponent: int) -> None:
    x = normal(*sizes, seed=seed) * 10.0**exponent
    codes, scale, *_ = quantize_rows(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == (len(x), 1)
    assert bool(((codes * scale - x).abs() <= scale / 2 * (1 + 1e-12)).all())
    assert bool((codes.abs().amax(1) == LARGEST_CODE).all())  # the largest entry of each row has the largest code


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_scale_has_at_least_the_digits_of_float32(dtype: torch.dtype) -> None:
    x = normal(5, 40, seed=1).to(dtype)
    codes, scale, *_ = quantize_rows(x)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (codes * scale - x.to(scale.dtype)).norm() / x.to(scale.dtype).norm()
    assert 1e-3 < float(error) < 0.01


def test_a_row_of_zeros_is_zero_and_an_outlier_costs_its_own_row_alone() -> None:
    x = normal(3, 40, seed=2, dtype=torch.float32)
    x[1] = 0
    x[2, 7] = 1e6
    codes, scale, *_ = quantize_rows(x)
    assert not bool(codes[1].any()) and float(scale[1]) == 0
    restored = codes * scale
    assert torch.equal(restored[:1], torch.mul(*quantize_rows(x[:1])[:2]))
    assert float(restored[2, 7]) == pytest.approx(1e6) and not bool(codes[2, :7].any())


@pytest.mark.parametrize("tile", [40, 200, low_bit.TILE])  # rows 1, 5 or all at a time
@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gradient_from_rounded_rows_is_that_of_the_values_they_stand_for(
    dtype: torch.dtype, outliers: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, h = normal(12, 40, seed=4).to(dtype), normal(12, 3, seed=5).to(dtype)
    rows = quantize_rows(x, outliers)
    restored = rows.codes * rows.scale.double()
    if rows.columns is not None:
        restored[:, rows.columns] = rows.values.double()
    monkeypatch.setattr(low_bit, "TILE", tile)
    found, wanted = transposed_times_rows(h, rows), h.double().t() @ restored
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert float((found - wanted).norm() / wanted.norm()) < 2 * torch.finfo(dtype).eps


def test_a_small_gradient_in_float16_is_not_lost() -> None:
    x, h = normal(256, 40, seed=4, dtype=torch.float32).half(), (1e-5 * normal(256, 3, seed=5)).half()
    found, expected = transposed_times_rows(h, quantize_rows(x, 4)), h.double().t() @ x.double()
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_row(value: float) -> None:
    x = normal(3, 40, seed=3, dtype=torch.float32)
    x[1, 5] = value
    _, scale, *_ = quantize_rows(x)
    assert scale.isfinite().flatten().tolist() == [True, False, True]


def test_the_smallest_numbers_do_not_overflow() -> None:
    codes, scale, *_ = quantize_rows(torch.full((1, 3), 1e-45))
    assert bool(scale.isfinite().all()) and bool((codes * scale <= 1e-44).all())


def test_tiles_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(11, 40, seed=4, dtype=torch.float32)
    for outliers in (0, 3):
        whole = quantize_rows(x, outliers)[: 4 if outliers else 2]
        for tile in (1, 40, 100, 439):
            monkeypatch.setattr(low_bit, "TILE", tile)
            assert all(map(torch.equal, quantize_rows(x, outliers), whole))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns_are_multiplied_in_at_least_float32_before_they_are_rounded(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(11, 40, seed=4).to(dtype)
    factor = normal(1, 40, seed=5).to(torch.promote_types(dtype, torch.float32)).exp()
    expected = quantize_rows(x * factor)[:2]
    assert x.dtype == torch.float64 or not torch.equal(expected[0], quantize_rows(x)[0])
    for tile in (2**20, 100):
        monkeypatch.setattr(low_bit, "TILE", tile)
        assert all(map(torch.equal, quantize_rows(x, factor=factor)[:2], expected))


@given(rows=st.integers(0, 5000), width=st.integers(1, 5000))
def test_tiles_cover_all_rows_and_the_first_is_the_longest(rows: int, width: int) -> None:
    tiles = row_tiles(rows, width, torch.device("cpu"))
    assert [row for tile in tiles for row in range(rows)[tile]] == list(range(rows))
    lengths = [tile.stop - tile.start for tile in tiles]
    assert lengths == sorted(lengths, reverse=True)
    assert all((length - 1) * width < low_bit.TILE for length in lengths)
    assert len(row_tiles(rows, width, torch.device("meta"))) == min(rows, 1)  # more would be more kernels


def test_columns_with_the_largest_entries_are_kept_as_they_are() -> None:
    x = normal(20, 64, seed=6, dtype=torch.float32)
    x[:, [9, 33]] *= 50
    plain, kept = quantize_rows(x), quantize_rows(x, 2)
    assert kept.columns is not None and sorted(kept.columns.tolist()) == [9, 33]
    assert kept.values is not None and torch.equal(kept.values, x[:, kept.columns])
    assert not bool(kept.codes[:, kept.columns].any())
    others = [column for column in range(64) if column not in (9, 33)]
    assert torch.equal(kept.codes[:, others], quantize_rows(x[:, others]).codes)
    assert kept.scale.mean() < plain.scale.mean() / 10


def test_no_more_than_an_eighth_of_the_columns_is_kept() -> None:
    columns = quantize_rows(torch.ones(3, 17), 8).columns
    assert columns is not None and len(columns) == 2
    assert quantize_rows(torch.ones(3, 7), 8).columns is None


def test_no_rows_are_no_codes() -> None:
    codes, scale, *_ = quantize_rows(torch.empty(0, 7))
    assert codes.shape == (0, 7) and scale.shape == (0, 1)


@QUICK
@given(sizes=SIZES, seed=SEEDS, outliers=st.integers(0, 12))
def test_outlying_columns_are_kept_and_decide_no_scale(sizes: tuple[int, int], seed: int, outliers: int) -> None:
    x = normal(*sizes, seed=seed, dtype=torch.float32)
    count = min(outliers, sizes[1] // 8)
    large = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))[:count]
    x[:, large] += 1000
    codes, scale, columns, values = quantize_rows(x, outliers)
    if not count:
        assert columns is None and values is None
        return
    assert columns is not None and values is not None
    assert set(columns.tolist()) == set(large.tolist())
    assert torch.equal(values, x[:, columns]) and not bool(codes[:, columns].any())
    restored = (codes * scale).index_copy(1, columns, values)
    assert bool(((restored - x).abs() <= scale / 2 * (1 + 1e-6)).all()) and float(scale.max()) < 1


# ---------------------------------------------------------------- weights in 4 bits


@QUICK
@given(sizes=SIZES, seed=SEEDS, exponent=st.integers(-3, 3))
def test_no_entry_of_a_group_is_off_by_more_than_half_a_step(sizes: tuple[int, int], seed: int, exponent: int) -> None:
    weight = normal(*sizes, seed=seed, dtype=torch.float32) * 10.0**exponent
    groups = quantize_groups(weight)
    restored = restore_groups(groups, sizes[1])
    assert restored.shape == weight.shape
    assert groups.codes.shape == (sizes[0], -(-sizes[1] // GROUP) * GROUP // 2) and groups.codes.dtype == torch.uint8
    # half a step; float16 has 11 bits for the scale, multiplied by up to 15, and for the smallest value
    step = groups.scale.float().repeat_interleave(GROUP, 1)[:, : sizes[1]]
    smallest = groups.smallest.float().abs().repeat_interleave(GROUP, 1)[:, : sizes[1]]
    assert bool(((restored - weight).abs() <= step * (0.5 + 15 * 2**-11) + smallest * 2**-11 + 2**-22).all())


def test_a_group_holds_sixteen_values_and_two_of_them_exactly() -> None:
    weight = normal(4, 96, seed=5, dtype=torch.float32)
    restored = restore_groups(quantize_groups(weight), 96)
    error = (restored - weight).norm() / weight.norm()
    assert 0.05 < float(error) < 0.1
    for group, values in zip(restored.view(-1, GROUP), weight.view(-1, GROUP), strict=True):
        assert len(group.unique()) <= 16
        assert torch.allclose(torch.stack(group.aminmax()), torch.stack(values.aminmax()), rtol=2e-3)


def test_padding_widens_no_group() -> None:
    """The last group of 33 columns has one value, which it holds with the digits of float16."""
    weight = 5 + normal(3, GROUP + 1, seed=6, dtype=torch.float32).abs()
    restored = restore_groups(quantize_groups(weight), GROUP + 1)
    assert torch.allclose(restored[:, -1], weight[:, -1], rtol=2**-11, atol=0)


def test_an_outlier_costs_its_own_group_alone() -> None:
    weight = normal(2, 64, seed=7, dtype=torch.float32)
    expected = restore_groups(quantize_groups(weight), 64)
    weight[0, 3] = 1000.0
    restored = restore_groups(quantize_groups(weight), 64)
    assert torch.equal(restored[0, GROUP:], expected[0, GROUP:]) and torch.equal(restored[1], expected[1])
    assert float(restored[0, 3]) == pytest.approx(1000.0, rel=2e-3)


def test_zeros_and_constants() -> None:
    assert not bool(restore_groups(quantize_groups(torch.zeros(3, 40)), 40).any())
    constant = torch.full((2, 40), -0.5)
    assert torch.equal(restore_groups(quantize_groups(constant), 40), constant)
