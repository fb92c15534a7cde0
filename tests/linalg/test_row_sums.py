"""Sums of products of rows, with and without the sum."""

from __future__ import annotations

import pytest
import torch
from strategies import relative_error

from wasi_peft.linalg.row_sums import RowSums
from wasi_peft.linalg.subspaces import symmetric_range_finder


@pytest.mark.parametrize("count", [0, 3, 8, 9, 40])
def test_products_are_those_with_the_sum(count: int) -> None:
    x, columns = torch.randn(count, 8), torch.randn(8, 2, dtype=torch.float64)
    sums = RowSums(8)
    for rows in x.split(2):
        before = rows.clone()
        sums.add(rows)
        rows.fill_(7)  # whose memory it is not
        rows.copy_(before)
    expected = x.double().T @ x.double()
    held = sum(part.numel() for part in sums._rows) + (0 if sums._sum is None else sums._sum.numel())
    assert held <= 8 * 8 and (sums._sum is None) == (count <= 8)
    assert sums.trace == pytest.approx(float(expected.trace()), rel=1e-5)
    assert torch.allclose(sums.times(columns), expected @ columns, atol=1e-4)
    total = sums.total()
    assert torch.allclose(total.double(), expected, atol=1e-4) and not sums._rows
    assert torch.allclose(sums.times(columns), expected @ columns, atol=1e-4)
    sums.add(x)
    assert torch.allclose(sums.total().double(), 2 * expected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_leading_eigenvectors_of_what_is_known_by_products(rank: int) -> None:
    vectors = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    values = torch.logspace(0, -6, 20, dtype=torch.float64)
    matrix = (vectors * values) @ vectors.T
    found, basis = symmetric_range_finder(lambda columns: matrix @ columns, torch.zeros(20, 12).double(), rank)
    assert basis.shape == (20, rank) and relative_error(basis.T @ basis, torch.eye(rank).double()) < 1e-8
    assert torch.allclose(found, values[:rank], rtol=1e-3)
    assert relative_error(matrix @ basis, basis * values[:rank]) < 1e-3
