"""Closed-form sizes and FLOPs against the tensors and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, FactorSizes, factor_sizes, normal
from torch.utils.flop_counter import FlopCounterMode

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.linalg.spectra import factorize_weight
from wasi_peft.linalg.tucker import Bases, CompressionRule, compress
from wasi_peft.updates.costs import (
    break_even_rank,
    dense_elements,
    dense_forward_flops,
    factored_elements,
    input_elements,
    rank_step,
)
from wasi_peft.updates.factored import factored_linear


@QUICK
@given(factor_sizes(largest=40))
def test_elements_are_those_of_the_tensors(sizes: FactorSizes) -> None:
    weight = torch.zeros(sizes.out_features, sizes.in_features)
    L, R, _ = factorize_weight(weight, lambda _: sizes.rank)
    assert dense_elements(sizes.out_features, sizes.in_features) == weight.numel()
    assert factored_elements(*sizes) == L.numel() + R.numel()


@QUICK
@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_break_even_rank_is_the_last_that_saves(out_features: int, in_features: int, core: bool) -> None:
    last = break_even_rank(out_features, in_features, core)
    dense = dense_elements(out_features, in_features)
    assert 0 <= last < min(out_features, in_features)
    assert factored_elements(out_features, in_features, last, core) < dense
    assert factored_elements(out_features, in_features, last + 1, core) >= dense


@QUICK
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_rank_step_leaves_eight_ranks_to_choose_from(out_features: int, in_features: int) -> None:
    step, last = rank_step(out_features, in_features), break_even_rank(out_features, in_features)
    assert step in (1, 2, 4, 8, 16)
    assert step == 1 or 8 * step <= last
    assert step == 16 or 8 * 2 * step > last


@QUICK
@given(factor_sizes(), st.integers(1, 9))
def test_flops_are_those_of_torchs_counter(sizes: FactorSizes, rows: int) -> None:
    out_features, in_features, rank = sizes
    x = torch.ones(rows, in_features)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(x, torch.ones(out_features, in_features))
    assert dense_forward_flops(rows, out_features, in_features) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        factored_linear(x, torch.ones(out_features, rank), torch.ones(rank, in_features))
    assert 2 * rows * factored_elements(out_features, in_features, rank) == counter.get_total_flops()


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(96, 128, 16), (130, 70, 5)])
def test_bytes_are_those_the_allocator_hands_out(out_features: int, in_features: int, rank: int) -> None:
    """Sizes in multiples of the allocator's alignment or not: the profiler reports what was asked for."""
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        kept.extend((torch.empty(out_features, rank), torch.empty(rank, in_features)))

    assert measure_peak_memory(allocate).left_bytes == 4 * factored_elements(out_features, in_features, rank)
    kept.clear()
    assert measure_peak_memory(
        lambda: kept.append(torch.empty(out_features, in_features))
    ).left_bytes == 4 * dense_elements(out_features, in_features)


@QUICK
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)),
    st.integers(1, 10),
    st.none() | st.integers(1, 7),
    st.none() | st.integers(1, 6),
)
def test_input_elements_are_those_of_the_compressed_form(
    shape: tuple[int, int, int], feature: int, token: int | None, batch: int | None
) -> None:
    """And `compress` refuses exactly the ranks whose form is not smaller than the copy."""
    ranks = {"feature": feature, "token": token, "batch": batch}
    given_ranks = {mode: rank for mode, rank in ranks.items() if rank is not None}
    rule = CompressionRule.from_options(tuple(given_ranks), None, given_ranks)
    compressed = compress(normal(*shape, seed=3), rule, Bases())
    elements, exact = input_elements(*shape, given_ranks), input_elements(*shape, None)
    assert exact == shape[0] * shape[1] * shape[2]
    assert (compressed is None) == (elements >= exact)
    if compressed is not None:
        assert elements == sum(part.numel() for part in compressed[0] if part is not None)
