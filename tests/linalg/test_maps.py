"""Compressed maps, [batch, height, width, features]: four modes against a reference in float64, or two flattened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS, normal, orthonormal, orthonormality_error, relative_error
from torch import Tensor

from wasi_peft.linalg.tucker import (
    Bases,
    CompressionRule,
    Tucker,
    arranged,
    compress,
    expand,
    expand_rows,
    placeholder,
)

PLACES = ("feature", "height", "width")
AXES = {"feature": 3, "height": 1, "width": 2, "batch": 0}  # in the order in which they are truncated


def rule(modes: tuple[str, ...] = PLACES, threshold: float | None = None, **ranks: int) -> CompressionRule:
    return CompressionRule.from_options(modes, threshold, ranks)


def smooth(batch: int, height: int, width: int, features: int, seed: int) -> Tensor:
    """A map whose energies decay in every mode."""
    x = normal(batch, height, width, features, seed=seed)
    for axis, size in enumerate(x.shape):
        basis = orthonormal(size, size, seed + axis + 1) * 0.5 ** torch.arange(size, dtype=torch.float64)
        x = torch.tensordot(x, basis, dims=([axis], [1])).movedim(-1, axis)
    return x


def sequential_hosvd(x: np.ndarray, ranks: dict[str, int]) -> np.ndarray:
    """What is left of a map, by SVDs of its unfoldings, one mode after the other."""
    core, bases = x, {}
    for mode, axis in AXES.items():
        if mode in ranks:
            columns = np.moveaxis(core, axis, 0).reshape(core.shape[axis], -1)
            U = np.linalg.svd(columns, full_matrices=False)[0][:, : ranks[mode]]
            bases[axis], core = U, np.moveaxis(np.tensordot(core, U, axes=([axis], [0])), -1, axis)
    for axis, U in bases.items():
        core = np.moveaxis(np.tensordot(core, U, axes=([axis], [1])), -1, axis)
    return core


@QUICK
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([None, 1, 2]), SEEDS)
def test_four_modes_are_the_sequential_hosvd(
    feature: int, height: int, width: int, batch: int | None, seed: int
) -> None:
    x = smooth(3, 5, 4, 16, seed)
    batch = None if batch is None else min(batch, feature * height * width)
    ranks = {"feature": feature, "height": height, "width": width} | ({} if batch is None else {"batch": batch})
    result = compress(x, rule(tuple(ranks), **ranks), Bases())
    assert result is not None
    form, bases = result
    expected = torch.from_numpy(sequential_hosvd(x.numpy(), ranks))
    assert relative_error(expand(form), expected) < 1e-7
    rows = expand_rows(form) @ form.feature.T
    assert torch.allclose(rows, expand(form).reshape(-1, 16))
    assert form.core.shape == (batch or 3, height, width, feature)
    for basis in (bases.feature, bases.height, bases.width):
        assert basis is not None and orthonormality_error(basis) < 1e-10
    assert form.elements == sum(part.numel() for part in form if part is not None) < x.numel()


def test_what_is_no_map_keeps_its_modes() -> None:
    """Without both places in the rule, or with other dimensions, places are tokens."""
    x = smooth(3, 5, 4, 16, 0)
    assert arranged(x, rule()).shape == x.shape
    assert arranged(x, rule(("feature", "token"))).shape == (3, 20, 16)
    assert arranged(x[0], rule()).shape == (5, 4, 16)
    assert arranged(x[None], rule()).shape == (1, 60, 16)
    result = compress(x[0], rule(feature=2, height=2, width=2), Bases())
    assert result is not None and result[0].bases == []  # nothing but features is named for it


@pytest.mark.parametrize("separable", [True, False])
def test_with_tokens_too_what_keeps_less_is_taken_and_stays(separable: bool) -> None:
    """A map of rank one in height and width; one whose two token directions are no products of such."""
    generator = torch.Generator().manual_seed(0)
    if separable:
        places = torch.einsum("h,w->hw", *torch.randn(2, 6, generator=generator, dtype=torch.float64)).flatten()[
            :, None
        ]
    else:
        places = torch.randn(36, 2, generator=generator, dtype=torch.float64)
    values = torch.randn(8, places.shape[1], 12, generator=generator, dtype=torch.float64)
    x = torch.einsum("nk,bkf->bnf", places, values).reshape(8, 6, 6, 12)
    options = rule((*PLACES, "token"), 0.999999)
    result = compress(x, options, Bases())
    assert result is not None
    form, bases = result
    assert (form.token is None) == separable
    assert relative_error(expand(form).reshape(x.shape), x) < 1e-2
    other = compress(x, rule(PLACES if form.token is not None else ("feature", "token"), 0.999999), Bases())
    assert other is None or form.elements < other[0].elements
    again = compress(x, options, bases)
    assert again is not None and [part is None for part in again[0]] == [part is None for part in form]


@pytest.mark.parametrize("advance", [False, True])
def test_warm_bases_go_on(advance: bool) -> None:
    x, options = smooth(3, 5, 4, 16, 1), rule(feature=3, height=2, width=2)
    first = compress(x, options, Bases())
    assert first is not None
    second = compress(x, options, first[1], advance)
    assert second is not None
    for mode in PLACES:
        assert (getattr(second[1], mode) is getattr(first[1], mode)) != advance
    assert relative_error(expand(second[0]), expand(first[0])) < 1e-6
    resized = compress(smooth(3, 7, 4, 16, 2), options, second[1])  # another height
    assert resized is not None and resized[0].height is not None and resized[0].height.shape == (7, 2)
    kept = compress(smooth(3, 7, 4, 16, 2), options, second[1], advance=False)
    assert kept is not None and kept[0].width is second[1].width and kept[0].height is not None


def test_the_placeholder_has_the_form_to_come() -> None:
    x, options = smooth(3, 5, 4, 16, 1), rule(feature=3, height=2, width=2)
    assert placeholder(x, options, Bases()) is None
    result = compress(x, options, Bases())
    assert result is not None
    announced = placeholder(x, options, result[1])
    assert announced is not None
    assert [None if part is None else part.shape for part in announced] == [
        None if part is None else part.shape for part in result[0]
    ]
    assert announced.core.untyped_storage().nbytes() == 8


def test_a_single_row_has_no_mode() -> None:
    result = compress(smooth(4, 1, 6, 16, 3), rule(feature=2, height=1, width=2), Bases())
    assert result is not None and result[0].height is None and result[0].core.shape == (4, 1, 2, 2)


def test_parts_of_a_form_by_axis() -> None:
    core = normal(2, 2, 3, 4, seed=0)
    form = Tucker(core, orthonormal(8, 4, 1), None, orthonormal(5, 2, 2), orthonormal(6, 2, 3), orthonormal(7, 3, 4))
    expected = torch.einsum("bhwf,If,Bb,Hh,Ww->BHWI", core, form.feature, form.batch, form.height, form.width)
    assert relative_error(expand(form), expected) < 1e-13
