"""Products with an int8 weight: which is fast depends on the machine, so it is measured there, once."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, is_fake

from ..linalg.low_bit import RoundedRows, quantize_rows, row_tiles
from ..linalg.timing import timed_in_one_thread

TILE_ELEMENTS = 2**20  # of a weight that is restored a part at a time
SAMPLE_SIDE, SAMPLE_RUNS = 1024, 8
OUTLIERS = 8  # measured: with more, the error of the rows that are left hardly falls
FEW_ROWS = 16  # torch._int_mm on CUDA needs more, and no kernel for few rows is fast with more

Thin = tuple[Tensor, Tensor]


class Int8Product(ABC):
    """One way to multiply by `W = diag(scale) codes`.

    **Shape**
        - codes: (out, in), int8; scale: (out, 1), float32
    """

    name: ClassVar[str]
    rounds: ClassVar[bool] = False  # whether the forward product takes the rows in 8 bits
    alignment: ClassVar[int] = 1  # bytes, of a multiple of which the address of codes should be

    @staticmethod
    @abstractmethod
    def supports(codes: Tensor, rows: int, dtype: torch.dtype) -> bool:
        """Whether it works for these operands."""

    @staticmethod
    @abstractmethod
    def forward(
        x: Tensor, codes: Tensor, scale: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None
    ) -> Tensor:
        """`x W^T`, (rows, out), of x (rows, in) in its dtype: a tensor of its own.

        Args:
            x: Rows.
            codes: Of the weight.
            scale: Of the weight.
            rounded: The rows in 8 bits, where they are known already.
            thin: Factors h (rows, K) and L (out, K) of a product `h L^T` that is to be added, in the dtype of x.
        """

    @staticmethod
    @abstractmethod
    def transposed(dY: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """`dY W`, (rows, in), of dY (rows, out) in its dtype: a tensor of its own."""


class IntegerProduct(Int8Product):
    """Rows are rounded to int8 on the way, and multiplied in integers (`torch._int_mm`).

    Exact but for the rounding of the rows, :data:`OUTLIERS` columns of which are multiplied as they are, with the
    weight restored: an error of about 1 % of the product. For the gradient of the input the output scales go into dY,
    so the one int8 weight serves both.
    """

    name: ClassVar[str] = "int8"
    rounds: ClassVar[bool] = True

    @staticmethod
    def supports(codes: Tensor, rows: int, dtype: torch.dtype) -> bool:
        """On a GPU: more than 16 rows, sides that are multiples of 8. Not in float64, which is for exact results."""
        if dtype == torch.float64:
            return False
        if codes.device.type == "cuda":
            return rows > FEW_ROWS and codes.shape[0] % 8 == 0 and codes.shape[1] % 8 == 0
        # of one input, `torch._int_mm` on a CPU misreads the transposed codes
        return codes.device.type in ("cpu", "meta") and codes.shape[1] > 1

    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, scale: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None
    ) -> Tensor:
        rows, row_scale, columns, values = quantize_rows(x, OUTLIERS) if rounded is None else rounded
        y = _scaled_product(rows, codes.t(), row_scale, scale.t(), x.dtype)
        if columns is not None:  # at once with the thin product: it is the pass over y that costs
            assert values is not None
            weight = (codes.index_select(1, columns) * scale).to(x.dtype)
            if thin is not None:
                values, weight = torch.cat([thin[0], values], 1), torch.cat([thin[1], weight], 1)
            thin = values, weight
        return add_thin(y, thin)

    @staticmethod
    def transposed(dY: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        rows, row_scale, *_ = quantize_rows(dY, factor=scale.t())
        return _scaled_product(rows, codes, row_scale, None, dY.dtype)


def _scaled_product(
    rows: Tensor, other: Tensor, row_scale: Tensor, column_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`diag(row_scale) (rows other) diag(column_scale)`, the product in integers, the rest in float32.

    **Shape**
        - rows: (rows, n), int8; other: (n, m), int8; row_scale: (rows, 1); column_scale: (1, m); returns (rows, m)
    """
    size = len(rows), other.shape[1]
    tiles = row_tiles(*size, rows.device)
    if dtype == torch.float32 or len(tiles) == 1:
        y = row_scale.new_empty(size, dtype=torch.float32)
        return _into(y, rows, other, row_scale, column_scale).to(dtype)
    y = row_scale.new_empty(size, dtype=dtype)
    work = y.new_empty(tiles[0].stop if tiles else 0, y.shape[1], dtype=torch.float32)
    for part in tiles:
        y[part] = _into(work[: part.stop - part.start], rows[part], other, row_scale[part], column_scale)
    return y


def _into(y: Tensor, rows: Tensor, other: Tensor, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """The same in y, whose memory also holds the integers: new one would take longer to get than they to convert."""
    sums = y.view(torch.int32)
    torch._int_mm(rows, other, out=sums)
    y.copy_(sums).mul_(row_scale)
    return y if column_scale is None else y.mul_(column_scale)


def add_thin(y: Tensor, thin: Thin | None) -> Tensor:
    """`y + h L^T`, in y."""
    return y if thin is None else y.addmm_(thin[0], thin[1].t())


def by_tiles(x: Tensor, sizes: tuple[int, int], columns: Callable[[int, int], Tensor]) -> Tensor:
    """A product (rows, out) in the dtype of x, put together from those with a tile of the weight each.

    Args:
        x: Rows, for their number and dtype.
        sizes: Of the weight, (out, in).
        columns: Given the range of a tile's rows, these columns of the product.
    """
    y = x.new_empty(len(x), sizes[0])
    for start, stop in tiles(*sizes):
        y[:, start:stop] = columns(start, stop)
    return y


def transposed_by_tiles(dY: Tensor, sizes: tuple[int, int], tile: Callable[[int, int], Tensor]) -> Tensor:
    """`dY W`, (rows, in), of a weight (out, in) that is there a tile at a time, in the dtype of both.

    Args:
        dY: Rows, (rows, out).
        sizes: Of the weight.
        tile: Given the range of its rows, a tile.
    """
    first, *others = tiles(*sizes)
    dX = dY[:, : first[1]] @ tile(*first)
    for start, stop in others:
        dX.addmm_(dY[:, start:stop], tile(start, stop))
    return dX


class RestoredWeight(Int8Product):
    """The weight is restored in the dtype of the rows, a tile at a time: exact, at the speed of a dense product.

    Codes are multiplied as they are and the product is scaled, but in float16, whose range that would leave.
    """

    name: ClassVar[str] = "restored"
    compute: ClassVar[torch.dtype | None] = None

    @staticmethod
    def supports(codes: Tensor, rows: int, dtype: torch.dtype) -> bool:
        return True

    @classmethod
    def forward(
        cls, x: Tensor, codes: Tensor, scale: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None
    ) -> Tensor:
        dtype = cls.compute or x.dtype
        rows = x.to(dtype)

        def columns(start: int, stop: int) -> Tensor:
            if dtype == torch.float16:
                return rows @ scaled_codes(codes[start:stop], scale[start:stop], dtype).t()
            return (rows @ codes[start:stop].t().to(dtype)).mul_(scale[start:stop].t())

        return add_thin(by_tiles(x, (codes.shape[0], codes.shape[1]), columns), thin)

    @classmethod
    def transposed(cls, dY: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        dtype, sizes = cls.compute or dY.dtype, (codes.shape[0], codes.shape[1])
        if dtype == torch.float16:
            return transposed_by_tiles(
                dY, sizes, lambda start, stop: scaled_codes(codes[start:stop], scale[start:stop], dtype)
            )
        rows = (dY * scale.t()).to(dtype)
        return transposed_by_tiles(rows, sizes, lambda start, stop: codes[start:stop].to(dtype)).to(dY.dtype)


class RestoredInBFloat16(RestoredWeight):
    """The same with operands in bfloat16, sums in float32: codes are exact there, rows get 8 bits each."""

    name: ClassVar[str] = "bfloat16"
    compute: ClassVar[torch.dtype | None] = torch.bfloat16

    @staticmethod
    def supports(codes: Tensor, rows: int, dtype: torch.dtype) -> bool:
        return dtype == torch.float32


class WeightOnlyProduct(RestoredInBFloat16):
    """For few rows, as one token is: torch's kernel reads the codes once, and no restored weight exists.

    Rows and their products with the codes have 8 bits each, sums and scales 24. Other operands are restored.
    """

    name: ClassVar[str] = "weight_only"
    alignment: ClassVar[int] = 64

    @staticmethod
    def supports(codes: Tensor, rows: int, dtype: torch.dtype) -> bool:
        """On a CPU, for 1 to 16 rows, multiples of 16 inputs and of 4 outputs; not where it is traced."""
        few = 0 < rows <= FEW_ROWS and dtype in (torch.float32, torch.bfloat16)
        fits = codes.shape[0] % 4 == 0 and codes.shape[1] % 16 == 0 and codes.device.type in ("cpu", "meta")
        return few and fits and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    @classmethod
    def forward(
        cls, x: Tensor, codes: Tensor, scale: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None
    ) -> Tensor:
        if not cls.supports(codes, len(x), x.dtype):
            return super().forward(x, codes, scale, rounded, thin)
        return add_thin(cls.with_codes(x, codes).mul(scale.t()).to(x.dtype), thin)

    @classmethod
    def with_codes(cls, x: Tensor, codes: Tensor) -> Tensor:
        """`x codes^T`, (rows, out), in bfloat16, of operands that are supported."""
        rows = aligned(x.detach().to(torch.bfloat16).contiguous(), cls.alignment)
        return torch._weight_int8pack_mm(rows, aligned(codes, cls.alignment), rows.new_ones(len(codes)))


def aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The same values at an address that is a multiple of some bytes, where kernels need that.

    What is mapped from a file lies anywhere.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.data_ptr() % alignment == 0:
        return tensor
    with torch.inference_mode(False):  # also when it is kept for training
        return tensor.clone()


def scaled_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`diag(scale) codes` in a dtype, computed in at least float32."""
    return (codes * scale.to(torch.promote_types(dtype, torch.float32))).to(dtype)


def tiles(out_features: int, in_features: int) -> list[tuple[int, int]]:
    """Ranges of rows of a weight, none with more than :data:`TILE_ELEMENTS` elements, where one row has not."""
    height = max(1, TILE_ELEMENTS // in_features)
    return [(start, min(start + height, out_features)) for start in range(0, out_features, height)]


PRODUCTS: dict[str, type[Int8Product]] = {
    product.name: product for product in (IntegerProduct, RestoredWeight, RestoredInBFloat16, WeightOnlyProduct)
}


@functools.cache
def measured_seconds(device: torch.device, dtype: torch.dtype, few: bool) -> dict[str, float]:
    """Seconds of every product that works there, with a square weight of 1024: what this machine is like.

    With many rows, which is how models train, that of the gradient of the input counts as well.

    Args:
        device: Of the operands.
        dtype: Of the rows.
        few: Whether to measure with 8 rows, else with 256.
    """
    x = torch.zeros(8 if few else 256, SAMPLE_SIDE, dtype=dtype, device=device)
    codes = torch.zeros(SAMPLE_SIDE, SAMPLE_SIDE, dtype=torch.int8, device=device)
    scale = torch.zeros(SAMPLE_SIDE, 1, device=device)
    able = [product for product in PRODUCTS.values() if product.supports(codes, len(x), dtype)]
    seconds = {product.name: math.inf for product in able}
    with torch.no_grad():
        for _ in range(SAMPLE_RUNS):  # in rounds, so that a slow moment of the machine meets all of them
            for product in able:
                took = timed_in_one_thread(functools.partial(product.forward, x, codes, scale), device)
                if not few:
                    took += timed_in_one_thread(functools.partial(product.transposed, x, codes, scale), device)
                seconds[product.name] = min(seconds[product.name], took)
    return seconds


class ProductChoice:
    """Which product the layers of a model use: the one asked for, or the fastest on this machine, measured once.

    Args:
        asked: Name of a product, used for all operands that it supports; None for the fastest.

    Raises:
        ValueError: If there is no such product.
    """

    def __init__(self, asked: str | None = None) -> None:
        if asked is not None and asked not in PRODUCTS:
            raise ValueError(f"a product must be one of {', '.join(map(repr, PRODUCTS))}, got {asked!r}.")
        self.asked = asked
        self._chosen: dict[tuple[torch.device, torch.dtype, bool], type[Int8Product]] = {}

    def product(self, x: Tensor, codes: Tensor) -> type[Int8Product]:
        """The product for rows x and a weight."""
        return self.product_of(len(x), x.dtype, codes)

    def product_of(self, rows: int, dtype: torch.dtype, codes: Tensor) -> type[Int8Product]:
        """The product for so many rows and a weight."""
        kind = (codes.device, dtype, rows <= FEW_ROWS)
        chosen = PRODUCTS[self.asked] if self.asked is not None else self._chosen.get(kind)
        if chosen is None:
            if torch.compiler.is_compiling() or codes.is_meta or is_fake(codes):
                chosen = IntegerProduct
            else:
                chosen = self._measured(*kind)
        return chosen if chosen.supports(codes, rows, dtype) else RestoredWeight

    def restored(self, x: Tensor, codes: Tensor) -> type[RestoredWeight]:
        """Of the products that do not round rows to 8 bits, the one asked for, or the faster one."""
        kinds = [kind for kind in PRODUCTS.values() if issubclass(kind, RestoredWeight)]
        able = [kind for kind in kinds if kind.supports(codes, len(x), x.dtype)]
        asked = [kind for kind in able if kind.name == self.asked]
        if asked or len(able) == 1 or torch.compiler.is_compiling() or codes.is_meta or is_fake(codes):
            return (asked or able)[0]
        seconds = measured_seconds(codes.device, x.dtype, len(x) <= FEW_ROWS)
        return min(able, key=lambda kind: seconds[kind.name])

    def decide(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measure now, for operands without memory that stand for real ones."""
        for few in (True, False) if self.asked is None else ():
            self._measured(device, dtype, few)

    def _measured(self, *kind: Any) -> type[Int8Product]:
        if kind not in self._chosen:
            seconds = measured_seconds(*kind)
            self._chosen[kind] = PRODUCTS[min(seconds, key=lambda name: seconds[name])]
        return self._chosen[kind]

    @property
    def chosen(self) -> dict[str, str]:
        """Names of the products in use so far, by device, dtype and number of rows."""
        return {
            f"{device.type}, {str(dtype).removeprefix('torch.')}, {'few' if few else 'many'} rows": product.name
            for (device, dtype, few), product in self._chosen.items()
        }

    def __repr__(self) -> str:
        return f"ProductChoice(asked={self.asked!r}, chosen={self.chosen})"
