"""Products with an int8 weight against the restored weight in float64, and which of them is chosen."""

from __future__ import annotations

import copy
import pickle
import sys
import time

import pytest
import torch
from strategies import normal, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wasi_peft import measure_peak_memory
from wasi_peft.forms import products
from wasi_peft.forms.products import (
    FEW_ROWS,
    OUTLIERS,
    PRODUCTS,
    IntegerProduct,
    ProductChoice,
    RestoredWeight,
    WeightOnlyProduct,
    measured_seconds,
    tiles,
)
from wasi_peft.forms.residual import Int8Residual
from wasi_peft.linalg import low_bit
from wasi_peft.linalg.low_bit import quantize_rows
from wasi_peft.linalg.timing import timed_in_one_thread

# roundings of a product, by dtype of the rows
EXACT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = tuple(EXACT)
SIZES = [(24, 40), (7, 33), (1, 5), (64, 1)]


def weight(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale, and the weight that they stand for in float64."""
    codes, scale, *_ = quantize_rows(normal(out_features, in_features, seed=seed, dtype=torch.float32))
    return codes, scale, codes.double() * scale.double()


def operands(sizes: tuple[int, int], dtype: torch.dtype, rows: int = 20) -> tuple[Tensor, Tensor]:
    """x (rows, in) and dY (rows, out)."""
    return normal(rows, sizes[1], seed=1, dtype=dtype), normal(rows, sizes[0], seed=2, dtype=dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_restored_weight_is_exact(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale, dense = weight(*sizes)
    x, dY = operands(sizes, dtype)
    y, dX = RestoredWeight.forward(x, codes, scale), RestoredWeight.transposed(dY, codes, scale)
    assert y.dtype == dX.dtype == dtype
    assert relative_error(y, x.double() @ dense.T) < EXACT[dtype]
    assert relative_error(dX, dY.double() @ dense) < EXACT[dtype]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("int8", "bfloat16") for dtype in DTYPES],
    ids=str,
)
def test_products_that_round_say_by_how_much(name: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Rows of 8 bits, with or without an exponent of their own: a hundredth of the product, and not nothing."""
    product = PRODUCTS[name]
    codes, scale, dense = weight(*sizes)
    x, dY = operands(sizes, dtype)
    if not product.supports(codes, len(x), dtype):
        assert dtype == torch.float64 or name == "bfloat16" or sizes[1] == 1
        return
    y, dX = product.forward(x, codes, scale), product.transposed(dY, codes, scale)
    assert y.dtype == dX.dtype == dtype
    for result, expected, width in ((y, x.double() @ dense.T, sizes[1]), (dX, dY.double() @ dense, sizes[0])):
        # a row of one entry is its own largest, so it has no error
        assert (0 if width == 1 else 1e-4) <= relative_error(result, expected) < 0.02


@pytest.mark.parametrize("tile", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_integer_product_is_that_of_the_codes_with_the_scales_in_float32(
    dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "TILE", tile)
    codes, scale, _ = weight(24, 40)
    x, dY = operands((24, 40), dtype, rows=11)
    rows, row_scale, *_ = rounded = quantize_rows(x)
    sums = (rows.long() @ codes.long().t()).float()
    expected = (sums * row_scale * scale.t()).to(dtype)
    assert torch.equal(IntegerProduct.forward(x, codes, scale, rounded), expected)
    rows, row_scale, *_ = quantize_rows(dY.float() * scale.t())
    expected = ((rows.long() @ codes.long()).float() * row_scale).to(dtype)
    assert torch.equal(IntegerProduct.transposed(dY, codes, scale), expected)


def test_an_integer_product_holds_no_second_one_in_32_bits() -> None:
    """Next to the rows that it multiplies and its result; where both have 16 bits, a tile of it."""
    codes, scale, _ = weight(512, 64)
    rows = 4 * low_bit.TILE // 512
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(rows, 64, dtype=dtype)
        rounded = quantize_rows(x)
        peak = measure_peak_memory(lambda x=x, rounded=rounded: IntegerProduct.forward(x, codes, scale, rounded))
        assert peak.peak_bytes <= 4 * low_bit.TILE * (dtype.itemsize + (dtype.itemsize == 2)) + 2**16


def test_a_product_takes_rows_that_are_rounded_already() -> None:
    codes, scale, _ = weight(24, 40)
    x, _ = operands((24, 40), torch.float32)
    rounded = quantize_rows(x, OUTLIERS)
    expected = IntegerProduct.forward(x, codes, scale)
    assert torch.equal(IntegerProduct.forward(torch.full_like(x, torch.nan), codes, scale, rounded), expected)
    assert torch.equal(
        RestoredWeight.forward(x, codes, scale, rounded), RestoredWeight.forward(x, codes, scale)
    )  # which has no use for them


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thin_product_is_added(name: str, dtype: torch.dtype) -> None:
    codes, scale, dense = weight(24, 40)
    x, _ = operands((24, 40), dtype)
    h, L = normal(20, 3, seed=3, dtype=dtype), normal(24, 3, seed=4, dtype=dtype)
    y = PRODUCTS[name].forward(x, codes, scale, None, (h, L))
    expected = x.double() @ dense.T + h.double() @ L.double().T
    assert relative_error(y, expected) < (0.02 if name != "restored" else EXACT[dtype])


def test_columns_that_are_larger_than_the_others_cost_no_digits() -> None:
    """The few inputs of transformers that are many times as large as all others (LLM.int8)."""
    codes, scale, dense = weight(24, 8 * OUTLIERS)
    x = normal(20, 8 * OUTLIERS, seed=1, dtype=torch.float32)
    x[:, ::9][:, :OUTLIERS] *= 100
    kept = IntegerProduct.forward(x, codes, scale)
    without = IntegerProduct.forward(x, codes, scale, quantize_rows(x))
    expected = x.double() @ dense.T
    assert relative_error(kept, expected) < relative_error(without, expected) / 5


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_row_not_finite(name: str, value: float) -> None:
    codes, scale, _ = weight(24, 40)
    x, dY = operands((24, 40), torch.float32)
    x[3, 5], dY[3, 5] = value, value
    for result in (PRODUCTS[name].forward(x, codes, scale), PRODUCTS[name].transposed(dY, codes, scale)):
        assert not bool(result[3].isfinite().any())
        assert bool(result[torch.arange(20) != 3].isfinite().all())


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_and_channels_of_zeros(name: str) -> None:
    dense = normal(24, 40, seed=0, dtype=torch.float32)
    dense[4] = 0
    codes, scale, *_ = quantize_rows(dense)
    x, dY = operands((24, 40), torch.float32)
    x[2], dY[2] = 0, 0
    y, dX = PRODUCTS[name].forward(x, codes, scale), PRODUCTS[name].transposed(dY, codes, scale)
    assert not bool(y[2].any()) and not bool(y[:, 4].any()) and not bool(dX[2].any())
    assert bool(y.isfinite().all()) and bool(dX.isfinite().all())


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_a_product_gives_is_a_tensor_of_its_own(name: str) -> None:
    codes, scale, _ = weight(24, 40)
    x, dY = operands((24, 40), torch.float32)
    before = [tensor.clone() for tensor in (x, dY, codes, scale)]
    PRODUCTS[name].forward(x, codes, scale).zero_()
    PRODUCTS[name].transposed(dY, codes, scale).zero_()
    assert all(map(torch.equal, (x, dY, codes, scale), before))


@pytest.mark.parametrize("name", ["restored", "bfloat16"])
@pytest.mark.parametrize("elements", [1, 40, 100, 959])
def test_weights_larger_than_a_tile(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = weight(24, 40)
    x, dY = operands((24, 40), torch.float32)
    product = PRODUCTS[name]
    whole = product.forward(x, codes, scale), product.transposed(dY, codes, scale)
    monkeypatch.setattr(products, "TILE_ELEMENTS", elements)
    assert len(tiles(24, 40)) > 1
    assert relative_error(product.forward(x, codes, scale), whole[0]) < 1e-6
    assert relative_error(product.transposed(dY, codes, scale), whole[1]) < (1e-6 if name == "restored" else 1e-2)


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (3, 2**21), (2**21, 3), (1000, 2000)])
def test_tiles_cover_a_weight_and_hold_no_more_than_they_may(out_features: int, in_features: int) -> None:
    parts = tiles(out_features, in_features)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == out_features
    assert all((stop - start) * in_features <= products.TILE_ELEMENTS or stop == start + 1 for start, stop in parts)


# ---------------------------------------------------------------- few rows


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
@pytest.mark.parametrize("sizes", [(4, 16), (24, 48), (100, 176)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_are_multiplied_without_restoring(dtype: torch.dtype, sizes: tuple[int, int], rows: int) -> None:
    codes, scale, dense = weight(*sizes)
    x, dY = operands(sizes, dtype, rows)
    assert WeightOnlyProduct.supports(codes, rows, dtype)
    y, dX = WeightOnlyProduct.forward(x, codes, scale), WeightOnlyProduct.transposed(dY, codes, scale)
    assert y.dtype == dX.dtype == dtype
    # rows and sums of 8 bits, of which the row has none to lose in bfloat16
    assert relative_error(y, x.double() @ dense.T) < 2**-8
    assert relative_error(dX, dY.double() @ dense) < 2**-7
    peak = measure_peak_memory(lambda: WeightOnlyProduct.forward(x, codes, scale))
    assert peak.peak_bytes < 2 * rows * sum(sizes) + 14 * max(sizes[0], rows * sizes[0]) + 2**10


@pytest.mark.parametrize(
    ("sizes", "rows", "dtype"),
    [
        ((24, 40), 3, torch.float32),  # the kernel reads sixteen inputs at a time, past the end
        ((22, 48), 3, torch.float32),
        ((24, 48), FEW_ROWS + 1, torch.float32),
        ((24, 48), 0, torch.bfloat16),
        ((24, 48), 3, torch.float16),
        ((24, 48), 3, torch.float64),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_restored(sizes: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    codes, scale, dense = weight(*sizes)
    x, _ = operands(sizes, dtype, rows)
    assert not WeightOnlyProduct.supports(codes, rows, dtype)
    y = WeightOnlyProduct.forward(x, codes, scale)
    assert y.dtype == dtype and y.shape == (rows, sizes[0]) and relative_error(y, x.double() @ dense.T) < 2**-7


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("sizes", [(64, 1), (1, 48), (3, 48)], ids=str)
def test_rows_may_have_any_strides(name: str, sizes: tuple[int, int]) -> None:
    codes, scale, dense = weight(sizes[1], sizes[1])
    x = normal(sizes[1], sizes[0], seed=1, dtype=torch.float32).t()
    for found, expected in (
        (PRODUCTS[name].forward(x, codes, scale), x.double() @ dense.T),
        (PRODUCTS[name].transposed(x, codes, scale), x.double() @ dense),
        (PRODUCTS[name].forward(x[:0], codes, scale), x.new_zeros(0, sizes[1])),
    ):
        assert relative_error(found, expected) < 0.02
    assert quantize_rows(x).codes.is_contiguous()


def test_a_traced_layer_reads_rows_wherever_they_lie() -> None:
    """A trace would remember that those it was made with lay well."""
    residual = Int8Residual(torch.nn.Linear(48, 24), ProductChoice("weight_only"))
    wide = torch.randn(3 * 48 + 8, dtype=torch.bfloat16)
    with torch.no_grad():
        traced = torch.jit.trace(residual, wide[: 3 * 48].view(3, 48))
        x = wide[8:].view(3, 48)
        assert relative_error(traced(x), residual(x)) < 2**-6


def test_tensors_of_other_classes_have_addresses_too() -> None:
    class Named(Tensor):
        pass

    codes, scale, dense = weight(24, 48)
    wide = normal(3 * 48 + 8, seed=1).to(torch.bfloat16)
    x = wide[8:].view(3, 48).as_subclass(Named)
    assert relative_error(WeightOnlyProduct.forward(x, codes, scale).double(), x.double() @ dense.T) < 2**-8


@pytest.mark.parametrize("offset", [1, 8, 24])
def test_operands_may_lie_anywhere(offset: int) -> None:
    """Codes that are mapped from a file do; the kernel would end the process."""
    codes, scale, dense = weight(24, 48)
    room = torch.empty(codes.numel() + offset, dtype=torch.int8)
    moved = room[offset:].view(codes.shape).copy_(codes)
    wide = torch.zeros(3 * 48 + offset, dtype=torch.bfloat16)
    x = wide[offset:].view(3, 48).copy_(operands((24, 48), torch.bfloat16, 3)[0])
    assert moved.data_ptr() % 64 and x.data_ptr() % 64
    assert relative_error(WeightOnlyProduct.forward(x, moved, scale), x.double() @ dense.T) < 2**-8


def test_codes_of_a_file_are_copied_once() -> None:
    residual = Int8Residual(torch.nn.Linear(48, 24), ProductChoice("weight_only"))
    room = torch.empty(residual.codes.numel() + 8, dtype=torch.int8)
    mapped = residual.codes = room[8:].view(24, 48).copy_(residual.codes)
    x = normal(20, 48, seed=1, dtype=torch.float32)
    expected = residual(x)
    assert residual.codes is mapped  # for many rows it stays
    with torch.inference_mode():
        found = residual(x[:3])
    taken = residual.codes
    assert relative_error(found, expected[:3]) < 2**-7 and torch.equal(taken, mapped) and taken.data_ptr() % 64 == 0
    residual(x[:3].requires_grad_()).sum().backward()  # no tensor of inference mode, which autograd refuses
    assert residual.codes is taken


def test_a_compiler_gets_ordinary_operations() -> None:
    residual = Int8Residual(torch.nn.Linear(48, 24), ProductChoice("weight_only"))
    x = normal(3, 48, seed=1, dtype=torch.float32)
    with torch.no_grad():
        expected = residual(x)
        compiled = torch.compile(residual, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(residual, (x,))
    assert relative_error(compiled, expected) < 2**-7
    assert "int8pack" not in str(exported.graph)
    torch._dynamo.reset()


# ---------------------------------------------------------------- the choice


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of 'int8', 'restored', 'bfloat16', 'weight_only', got 'fast"):
        ProductChoice("fastest")


def test_the_fastest_is_chosen_by_measuring_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"int8": 3.0, "restored": 2.0, "bfloat16": 1.0}
    asked = []

    def seconds(device: torch.device, dtype: torch.dtype, few: bool) -> dict[str, float]:
        asked.append((dtype, few))
        return {name: value for name, value in times.items() if dtype == torch.float32 or name != "bfloat16"}

    monkeypatch.setattr(products, "measured_seconds", seconds)
    choice = ProductChoice()
    codes, _, _ = weight(24, 40)
    for _ in range(2):
        assert choice.product(torch.zeros(20, 40), codes).name == "bfloat16"
        assert choice.product(torch.zeros(20, 40, dtype=torch.float16), codes).name == "restored"
    assert asked == [(torch.float32, False), (torch.float16, False)]
    assert choice.chosen == {"cpu, float32, many rows": "bfloat16", "cpu, float16, many rows": "restored"}


def test_measuring_names_every_product_that_works() -> None:
    device = torch.device("cpu")
    assert set(measured_seconds(device, torch.float32, True)) == set(PRODUCTS)
    assert set(measured_seconds(device, torch.float64, True)) == {"restored"}
    assert all(0 < seconds < 60 for seconds in measured_seconds(device, torch.float32, True).values())


def test_where_rows_are_many_the_gradient_of_the_input_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"IntegerProduct.forward": 2.0, "IntegerProduct.transposed": 1.0, "RestoredWeight.transposed": 3.0}
    monkeypatch.setattr(products, "timed_in_one_thread", lambda task, device: costs.get(task.func.__qualname__, 1.0))
    measure = measured_seconds.__wrapped__  # not what this machine's processes remember
    device = torch.device("cpu")
    assert measure(device, torch.bfloat16, True) == {"int8": 2.0, "restored": 1.0, "weight_only": 1.0}
    assert measure(device, torch.bfloat16, False) == {"int8": 3.0, "restored": 4.0}


def test_one_thread_is_timed_and_as_many_as_before_go_on() -> None:
    device, threads, before = torch.device("cpu"), [], torch.get_num_threads()

    def task() -> None:
        threads.append(torch.get_num_threads())
        if len(threads) == 2:
            raise KeyboardInterrupt
        torch.ones(64, 64) @ torch.ones(64, 64)

    torch.set_num_threads(3)
    try:
        assert timed_in_one_thread(task, device) > 0
        with pytest.raises(KeyboardInterrupt):
            timed_in_one_thread(task, device)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="its clock of threads is coarse")
def test_what_others_do_meanwhile_is_not_counted() -> None:
    assert timed_in_one_thread(lambda: time.sleep(0.2), torch.device("cpu")) < 0.1


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_asked_for_is_used_where_it_works(name: str) -> None:
    codes, _, _ = weight(24, 48)
    choice = ProductChoice(name)
    assert choice.product(torch.zeros(3, 48), codes).name == name
    assert choice.product(torch.zeros(3, 48, dtype=torch.float64), codes).name == "restored"
    expected = "restored" if name == "weight_only" else name
    assert choice.product(torch.zeros(FEW_ROWS + 1, 48), codes).name == expected


def test_nothing_is_measured_for_tensors_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "measured_seconds", None)
    choice = ProductChoice()
    assert choice.product(torch.zeros(20, 40, device="meta"), torch.zeros(24, 40, dtype=torch.int8, device="meta"))
    with FakeTensorMode():
        assert choice.product(torch.zeros(20, 40), torch.zeros(24, 40, dtype=torch.int8))
    assert not choice.chosen


def test_copies_of_a_choice_keep_what_was_asked_for() -> None:
    choice = ProductChoice("restored")
    for copied in (copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert copied.product(torch.zeros(3, 40), torch.zeros(24, 40, dtype=torch.int8)) is RestoredWeight


def test_a_thin_product_and_outliers_are_added_in_one() -> None:
    codes, scale, dense = weight(24, 40)
    x, _ = operands((24, 40), torch.float32)
    x[:, 11] *= 100
    h, L = x[:, :3].clone(), torch.ones(24, 3)
    for product in PRODUCTS.values():
        y = product.forward(x, codes, scale, None, (h, L))
        assert relative_error(y, x.double() @ dense.T + (h @ L.T).double()) < 0.01
    alone = quantize_rows(x)  # one large column takes the digits of all others
    worse = IntegerProduct.forward(x, codes, scale, alone)
    inliers = x.clone()
    inliers[:, 11] = 0
    expected = inliers.double() @ dense.T

    def error(y: Tensor) -> float:
        return relative_error(y.double() - x[:, 11:12].double() @ dense[:, 11:12].T, expected)

    assert error(IntegerProduct.forward(x, codes, scale)) < error(worse) / 10


def test_float16_is_not_left_by_codes() -> None:
    """A product with codes up to 127 leaves the range of float16 long before the product with the weight does."""
    torch.manual_seed(0)
    codes, scale, dense = weight(32, 64)
    x = torch.randn(4, 64, dtype=torch.float16)
    x[0, 3] = 2000
    dY = torch.full((4, 32), 3e-6, dtype=torch.float16)
    for name in ("int8", "restored"):
        product = PRODUCTS[name]
        y, dX = product.forward(x, codes, scale), product.transposed(dY, codes, scale)
        assert relative_error(y.double(), x.double() @ dense.T) < 0.02
        assert relative_error(dX.double(), dY.double() @ dense) < 0.05
