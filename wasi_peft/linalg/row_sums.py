"""Sums of `x x^T` over rows, without the sum for as long as there are few rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowSums:
    """`sum x x^T`, held as the rows themselves while these are no more than their width.

    Rows then take no more memory than the sum. It costs width^2 for each row, and is never made where only products
    with a few columns are asked for.

    Args:
        width: Of the rows.
        device: Where they are held, in float32.

    Example:
        >>> sums = RowSums(2)
        >>> sums.add(torch.tensor([[1.0, 2.0]]))
        >>> sums.times(torch.eye(2)).tolist(), sums.trace
        ([[1.0, 2.0], [2.0, 4.0]], 5.0)
    """

    def __init__(self, width: int, device: Any = None) -> None:
        self.width, self.device = width, device
        self.trace = 0.0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows, (n, width), which are copied."""
        rows = rows.detach().to(self.device, torch.float32, copy=True)
        self.trace += float(rows.square().sum())
        self._rows.append(rows)
        if self._sum is not None or sum(map(len, self._rows)) > self.width:
            self.total()

    def total(self) -> Tensor:
        """The sum, (width, width), float32; the rows are given up for it."""
        if self._sum is None:
            self._sum = torch.zeros(self.width, self.width, dtype=torch.float32, device=self.device)
        while self._rows:
            rows = self._rows.pop(0)
            self._sum.addmm_(rows.T, rows)
        return self._sum

    def times(self, columns: Tensor) -> Tensor:
        """The sum times columns, (width, k), in their dtype and on their device."""
        work = columns.to(self.device, torch.float32)
        if self._sum is not None:
            return (self._sum @ work).to(columns)
        product = torch.zeros_like(work)
        for rows in self._rows:
            product.addmm_(rows.T, rows @ work)
        return product.to(columns)
