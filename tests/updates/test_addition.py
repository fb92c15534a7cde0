"""The addition to a frozen weight: outputs, all gradients and what is kept, against float64 autograd on `Q + L R`."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS, FactorSizes, factor_sizes, normal, relative_error
from torch import Tensor, nn

from wasi_peft.forms.products import ProductChoice
from wasi_peft.forms.residual import RESIDUALS, Residual, ResidualLinear
from wasi_peft.linalg.low_bit import quantize_rows
from wasi_peft.linalg.tucker import Bases, CompressionRule, compress, expand
from wasi_peft.updates import make_update
from wasi_peft.updates.addition import addition_linear
from wasi_peft.updates.resizing import Carry

OUT, IN, RANK = 24, 40, 3
SIZES = FactorSizes(OUT, IN, RANK)
SHAPE = (4, 6, IN)
WAYS = [("int8", "int8"), ("int8", "restored"), ("int8", "bfloat16"), ("int4", "restored"), ("exact", "restored")]
EXACT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
ways = pytest.mark.parametrize(("kind", "product"), WAYS)


def leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().clone().requires_grad_(requires_grad)


def base(kind: str, product: str = "restored", sizes: tuple[int, int] = (OUT, IN), seed: int = 0) -> Residual:
    layer = nn.Linear(sizes[1], sizes[0], bias=False, dtype=torch.float32)
    layer.weight.data.copy_(normal(*sizes, seed=seed))
    return RESIDUALS[kind](layer.requires_grad_(False), ProductChoice(product))


def weight_of(residual: Residual) -> Tensor:
    """Q in float64, from codes and scales that float32 holds."""
    return copy.deepcopy(residual).double().dense_weight() if residual.name != "exact" else residual.weight.double()


def parts(dtype: torch.dtype, sizes: FactorSizes = SIZES, seed: int = 1) -> list[Tensor]:
    """L, R, bias, as leaves."""
    out_features, in_features, rank = sizes
    shapes = (out_features, rank), (rank, in_features), (out_features,)
    return [leaf(normal(*shape, seed=seed + index).to(dtype)) for index, shape in enumerate(shapes)]


def reference(x: Tensor, Q: Tensor, L: Tensor, R: Tensor, bias: Tensor, dY: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of x, L, R, bias, by autograd in float64 on the dense weight."""
    leaves = [leaf(tensor.double()) for tensor in (x, L, R, bias)]
    y = F.linear(leaves[0], Q + leaves[1] @ leaves[2], leaves[3])
    return y, list(torch.autograd.grad(y, leaves, dY.double()))


# ---------------------------------------------------------------- outputs and gradients


@ways
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_all_gradients_are_those_of_the_sum(kind: str, product: str, dtype: torch.dtype) -> None:
    residual = base(kind, product)
    x = leaf(normal(*SHAPE, seed=4, dtype=dtype))
    L, R, bias = parts(dtype)
    dY = normal(4, 6, OUT, seed=5, dtype=dtype)
    y = addition_linear(x, residual, L, R, bias)
    gradients = torch.autograd.grad(y, [x, L, R, bias], dY)
    expected, wanted = reference(x, weight_of(residual), L, R, bias, dY)
    rounds = (product == "int8" and dtype != torch.float64) or (product == "bfloat16" and dtype == torch.float32)
    assert [gradient.dtype for gradient in gradients] == [y.dtype] * 4 == [dtype] * 4
    for actual, exact, rounded in zip((y, *gradients), (expected, *wanted), (1, 1, 0, 0, 0), strict=True):
        low, high = (1e-4, 0.02) if rounds and rounded else (0, EXACT[dtype])
        assert low <= relative_error(actual, exact) < high  # those of L, R and bias meet no rounding


@QUICK
@given(factor_sizes(), st.integers(0, 9), SEEDS, st.sampled_from(list(RESIDUALS)))
def test_any_sizes(sizes: FactorSizes, rows: int, seed: int, kind: str) -> None:
    residual = base(kind, sizes=sizes[:2], seed=seed)
    x = leaf(normal(rows, sizes.in_features, seed=seed + 1))
    L, R, bias = parts(torch.float64, sizes, seed + 2)
    dY = normal(rows, sizes.out_features, seed=seed + 5)
    y = addition_linear(x, residual, L, R, bias)
    gradients = torch.autograd.grad(y, [x, L, R, bias], dY)
    expected, wanted = reference(x, weight_of(residual), L, R, bias, dY)
    for actual, exact in zip((y, *gradients), (expected, *wanted), strict=True):
        assert float((actual - exact).norm()) < 1e-12 * (1 + float(exact.norm()))


def test_gradcheck() -> None:
    residual = base("int8", sizes=(5, 6))
    tensors = [leaf(normal(3, 6, seed=1)), *parts(torch.float64, FactorSizes(5, 6, 2))]
    assert torch.autograd.gradcheck(lambda x, L, R, b: addition_linear(x, residual, L, R, b), tensors)


@ways
def test_the_form_without_gradients_computes_the_same(kind: str, product: str) -> None:
    residual = base(kind, product)
    L, R, bias = parts(torch.float32)
    form = ResidualLinear.beside(residual, {"L": L, "R": R}, bias)
    x = normal(*SHAPE, seed=4, dtype=torch.float32)
    assert relative_error(addition_linear(x, residual, L, R, bias), form(x)) < 1e-6


def test_factors_of_another_dtype_than_the_input() -> None:
    residual = base("int8")
    L, R, bias = parts(torch.float32)
    x = leaf(normal(*SHAPE, seed=4, dtype=torch.bfloat16))
    y = addition_linear(x, residual, L, R, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert [tensor.grad.dtype for tensor in (x, L, R, bias) if tensor.grad is not None] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("kind", RESIDUALS)
def test_strided_inputs_and_expanded_gradients(kind: str) -> None:
    residual = base(kind)
    L, R, bias = parts(torch.float64)
    x = leaf(normal(IN, 6, 4, seed=4)).transpose(0, 2)
    y = addition_linear(x, residual, L, R, bias)
    (actual,) = torch.autograd.grad(y.sum(), R)
    expected = reference(x, weight_of(residual), L, R, bias, torch.ones(4, 6, OUT))[1][2]
    assert relative_error(actual, expected) < 1e-12


def test_the_output_may_be_edited_in_place() -> None:
    residual = base("exact")
    L, R, bias = parts(torch.float64)
    x = normal(*SHAPE, seed=4)
    y = addition_linear(x, residual, L, R, bias)
    assert not y._is_view()
    y += 1
    y.sum().backward()
    assert R.grad is not None


def test_no_second_derivative() -> None:
    residual = base("exact")
    L, R, bias = parts(torch.float64)
    x = leaf(normal(3, IN, seed=4))
    (dX,) = torch.autograd.grad(addition_linear(x, residual, L, R, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dX.sum().backward()


@ways
@pytest.mark.parametrize("given_rounded", [True, False])
def test_nan_and_inf_are_answered_by_nan(kind: str, product: str, given_rounded: bool) -> None:
    residual = base(kind, product)
    L, R, bias = parts(torch.float32)
    x = normal(9, IN, seed=4, dtype=torch.float32)
    x[4, 2], x[6, 3] = torch.nan, torch.inf
    y = addition_linear(x, residual, L, R, bias, quantize_rows(x) if given_rounded else None)
    assert not bool(y[[4, 6]].isfinite().any()) and bool(y[[0, 1, 2, 3, 5, 7, 8]].isfinite().all())
    (grad_R,) = torch.autograd.grad(y[:, 0].sum(), R)
    assert not bool(grad_R.isfinite().all())  # a diverged run does not look like a sound one


# ---------------------------------------------------------------- what backward keeps


@pytest.mark.parametrize("outliers", [0, 4])
@ways
def test_the_gradient_of_rounded_rows_is_within_a_hundredth(kind: str, product: str, outliers: int) -> None:
    residual = base(kind, product)
    L, R, bias = parts(torch.float32)
    x = leaf(normal(8, 16, IN, seed=4, dtype=torch.float32))
    dY = normal(8, 16, OUT, seed=5, dtype=torch.float32)
    rounded = quantize_rows(x.detach().view(-1, IN), outliers)
    exact = torch.autograd.grad(addition_linear(x, residual, L, R, bias), [x, L, R, bias], dY)
    kept = torch.autograd.grad(addition_linear(x, residual, L, R, bias, rounded), [x, L, R, bias], dY)
    assert 1e-4 < relative_error(kept[2], exact[2]) < 0.01
    restored = (rounded.codes * rounded.scale).double()
    if rounded.columns is not None and rounded.values is not None:
        restored[:, rounded.columns] = rounded.values.double()
    assert relative_error(kept[2], L.double().T @ dY.double().view(-1, OUT).T @ restored) < 1e-5
    for index in (0, 1, 3):
        assert torch.equal(kept[index], exact[index])


def test_the_gradient_of_a_compressed_input_is_that_of_its_reconstruction() -> None:
    residual = base("int8")
    L, R, bias = parts(torch.float64)
    x = normal(*SHAPE, seed=4)
    dY = normal(4, 6, OUT, seed=5)
    for modes in (("feature",), ("token", "feature"), ("batch", "token", "feature")):
        rule = CompressionRule.from_options(modes, None, dict.fromkeys(modes, 3))
        result = compress(x, rule, Bases(), False)
        assert result is not None
        (actual,) = torch.autograd.grad(addition_linear(x, residual, L, R, bias, result[0]), R, dY)
        expected = reference(expand(result[0]), weight_of(residual), L, R, bias, dY)[1][2]
        assert relative_error(actual, expected) < 1e-12


PATTERNS = [pattern for pattern in itertools.product([False, True], repeat=4) if any(pattern)]


@pytest.mark.parametrize("keep", ["input", "rounded"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "".join(n for n, on in zip("xLRb", p, strict=True) if on))
def test_gradients_and_saved_bytes_for_each_requires_grad_pattern(pattern: tuple[bool, ...], keep: str) -> None:
    """K numbers a row for L, one byte a number (and a scale a row) or the input for R, no more."""
    residual = base("int8")
    x = leaf(normal(*SHAPE, seed=4, dtype=torch.float32), pattern[0])
    tensors = [x, *(leaf(part, on) for part, on in zip(parts(torch.float32), pattern[1:], strict=True))]
    rounded = quantize_rows(x.detach().view(-1, IN)) if keep == "rounded" else None
    saved: dict[int, Tensor] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks:
        y = addition_linear(tensors[0], residual, *tensors[1:], kept=rounded)
    own = {tensor.data_ptr() for tensor in tensors[1:]}
    rows = SHAPE[0] * SHAPE[1]
    wanted = rows * RANK * 4 if pattern[1] else 0
    if pattern[2]:
        wanted += rows * (IN + 4) if keep == "rounded" else rows * IN * 4
    assert sum(tensor.nbytes for place, tensor in saved.items() if place not in own) == wanted
    y.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(pattern)
    expected = reference(x, weight_of(residual), *tensors[1:], torch.ones(4, 6, OUT))[1]
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert tensor.grad is None or relative_error(tensor.grad, gradient) < 0.01


# ---------------------------------------------------------------- the update


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_costs_count_what_is_stored(name: str, residual: str) -> None:
    update = make_update(name, residual=residual)
    form = ResidualLinear(base(residual), RANK, bias=False)
    factors = sum(part.nbytes for part in form.parameters())
    kept = RESIDUALS[residual].stored_bytes(OUT, IN, 4)
    assert update.elements(OUT, IN, RANK) == OUT * IN + RANK * (OUT + IN)
    assert update.stored_bytes(OUT, IN, RANK, 4) == factors + kept
    trained = sum(form.part(part).numel() for part in update.trained)
    assert update.trained_elements(OUT, IN, RANK) == trained
    largest = update.break_even_rank(OUT, IN)
    assert (residual == "exact") == (largest == 0)
    assert largest == 0 or update.stored_bytes(OUT, IN, largest, 4) < 4 * OUT * IN
    assert update.stored_bytes(OUT, IN, largest + 1, 4) >= 4 * OUT * IN


@pytest.mark.parametrize(
    ("name", "residual", "message"),
    [
        ("addition", None, "update='addition' adds to a frozen weight, so it needs a residual, got residual=None"),
        ("addition", "int3", "residual must be one of 'int8', 'int4', 'exact', None, got 'int3'"),
        ("core", "int8", "a residual needs update='addition' or 'frozen_basis', got update='core' with .*'int8'"),
    ],
)
def test_updates_and_residuals_that_do_not_go_together(name: str, residual: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_update(name, residual=residual)


def trained_form(zero: bool = False) -> ResidualLinear:
    L, R, bias = parts(torch.float64)
    return ResidualLinear.beside(base("int8"), {"L": torch.zeros_like(L) if zero else L, "R": R}, bias)


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
def test_resizing_changes_the_addition_alone(name: str) -> None:
    update = make_update(name, residual="int8")
    form = trained_form()
    L, R, codes = form.L.detach().clone(), form.R.detach().clone(), form.residual.codes.clone()
    update.grow(form, 7, Carry())
    assert form.weight_rank == 7 and relative_error(form.L @ form.R, L @ R) < 1e-12
    update.shrink(form, RANK, Carry())
    assert form.weight_rank == RANK and relative_error(form.L @ form.R, L @ R) < 1e-10
    assert torch.equal(form.residual.codes, codes)


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
def test_an_addition_of_zero_can_be_resized(name: str) -> None:
    """Before its first step, then it trains."""
    update = make_update(name, residual="int8")
    for rank, change in ((2, update.shrink), (7, update.grow)):
        form = trained_form(zero=True)
        change(form, rank, Carry())
        assert form.weight_rank == rank and bool(form.L.isfinite().all()) and bool(form.R.isfinite().all())
        assert not bool((form.L @ form.R).any())
        update.forward(form, normal(9, IN, seed=4), None, None).square().sum().backward()
        assert any(bool(form.part(part).grad.any()) for part in update.trained)


# ---------------------------------------------------------------- coordinates from the first batch


def meet(name: str, form: ResidualLinear, *parts: Tensor) -> None:
    update = make_update(name, residual="int8")
    sums = [update.input_sums(form, part) for part in parts]
    update.meet(form, sum(sums[1:], start=sums[0]))


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
def test_the_first_batch_whitens_the_image(name: str) -> None:
    form = trained_form(zero=True)
    x = normal(500, IN, seed=6) @ torch.diag(torch.logspace(-1, 1, IN, dtype=torch.float64)) + 1
    R = form.R.detach().clone()
    before = form(x)
    meet(name, form, x)
    image = x @ form.R.T
    moment = image.T @ image / len(x)
    size = moment.diagonal().mean()
    assert relative_error(moment / size, torch.eye(RANK)) < 0.05
    assert float(size) == pytest.approx(float(x.square().mean()), rel=0.05)
    assert relative_error(form.R @ torch.linalg.pinv(R) @ R, form.R) < 1e-10  # the span is as it was
    assert torch.equal(form(x), before)


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
def test_a_batch_in_parts_whitens_as_the_whole_one(name: str) -> None:
    x = normal(500, IN, seed=6) @ torch.diag(torch.logspace(-1, 1, IN, dtype=torch.float64)) + 1
    whole, parts = trained_form(zero=True), trained_form(zero=True)
    meet(name, whole, x)
    meet(name, parts, *x.split(120))
    assert relative_error(parts.R, whole.R) < 1e-6  # the mean square is summed in float32


@pytest.mark.parametrize("rank", [4, 32, 64, 128])
def test_one_step_of_a_wide_addition_moves_outputs_no_further(rank: int) -> None:
    """Adam moves each entry of L by the learning rate: outputs by up to the sum of the image's entries."""
    dense = nn.Linear(256, 200, bias=False)
    L, R = torch.zeros(200, rank), normal(rank, 256, seed=7).float()
    form = ResidualLinear.beside(RESIDUALS["int8"](dense), {"L": L, "R": R}, None)
    x = normal(2000, 256, seed=8).float() @ torch.diag(torch.logspace(-0.3, 0.3, 256))
    meet("addition", form, x)
    largest_change = float((x @ form.R.detach().t()).abs().sum(1).mean() / x.square().mean().sqrt())
    # the mean magnitude of a normal variable is sqrt(2 / pi) of its standard deviation
    assert largest_change == pytest.approx(min(rank, 32) * math.sqrt(2 / math.pi), rel=0.05)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(0, IN), torch.full((5, IN), torch.nan), torch.full((5, IN), torch.inf)],
    ids=["none", "NaN", "Inf"],
)
def test_a_batch_without_numbers_changes_nothing(rows: Tensor) -> None:
    form = trained_form(zero=True)
    R = form.R.detach().clone()
    meet("addition", form, rows.double())
    assert torch.equal(form.R, R)


@pytest.mark.parametrize("rows", [torch.zeros(5, IN), torch.ones(5, IN)], ids=["zeros", "constant"])
def test_a_constant_batch_leaves_finite_directions(rows: Tensor) -> None:
    form = trained_form(zero=True)
    meet("addition", form, rows.double())
    assert bool(form.R.isfinite().all()) and bool(form.R.any())
    assert int(torch.linalg.matrix_rank(form.R.detach())) == RANK


def test_an_addition_that_has_learnt_keeps_its_coordinates() -> None:
    form = trained_form()
    R = form.R.detach().clone()
    meet("addition", form, normal(9, IN, seed=6))
    assert torch.equal(form.R, R)
