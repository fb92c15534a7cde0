"""Factors that do not train, in few bits: what a form can store in place of them (:meth:`FactoredLinear.store`).

A frozen factor is a frozen weight like any other, so the classes are those of :mod:`residual`, which multiply by it
and restore it. In 8 bits each row has a scale of its own, so R, (K, in), takes `K (in + 4)` bytes, and L, (out, K),
takes `out (K + 4)`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg.low_bit import RoundedRows
from .products import Thin, add_thin
from .residual import Int8Residual, Layout, Residual


class BFloat16Factor(Residual):
    """Values in bfloat16: half of the bytes of float32, an error of about 0.2 %, and no cast under autocast to it.

    **Shape**
        - values: (out, in), bfloat16
    """

    name: ClassVar[str] = "bfloat16"
    rounds_inputs: ClassVar[bool] = False
    values: Tensor

    def _hold(self, weight: Tensor) -> None:
        self.register_buffer("values", weight.to(torch.bfloat16))

    @staticmethod
    def layout(out_features: int, in_features: int) -> Layout:
        return {"values": ((out_features, in_features), torch.bfloat16)}

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.to(dtype or self.dtype, copy=True)

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        return add_thin(F.linear(x, self.values.to(x.dtype)), thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        return dY @ self.values.to(dY.dtype)


FROZEN: dict[str, type[Residual]] = {cls.name: cls for cls in (BFloat16Factor, Int8Residual)}
