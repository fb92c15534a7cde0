"""A frozen weight in few bits beside factors: against the dequantised weight in float64, and as an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import normal, relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from wasi_peft.forms import products, residual
from wasi_peft.forms.products import FEW_ROWS, ProductChoice
from wasi_peft.forms.residual import RESIDUALS, ExactResidual, Int8Residual, Residual, ResidualLinear

IN, OUT, RANK = 40, 24, 3
ROUNDED = tuple(name for name in RESIDUALS if name != "exact")
# what computes with each of them, and whether it rounds rows on the way
WAYS = [("int8", "int8"), ("int8", "restored"), ("int8", "bfloat16"), ("int4", "restored"), ("exact", "restored")]
EXACT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
kinds = pytest.mark.parametrize("kind", RESIDUALS)
rounded_kinds = pytest.mark.parametrize("kind", ROUNDED)
layouts = pytest.mark.parametrize("dense_class", [nn.Linear, Conv1D])


def dense(
    dense_class: type[nn.Module] = nn.Linear,
    sizes: tuple[int, int] = (OUT, IN),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Any:
    """A dense layer, of (out, in) features."""
    layer = Conv1D(sizes[0], sizes[1]) if dense_class is Conv1D else nn.Linear(sizes[1], sizes[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=1))
        if bias:
            layer.bias.copy_(normal(sizes[0], seed=2))
    return layer.to(dtype).requires_grad_(False)


def make(kind: str, layer: nn.Module | None = None, product: str = "restored") -> Residual:
    return RESIDUALS[kind](dense() if layer is None else layer, ProductChoice(product))


def form_beside(base: Residual, dtype: torch.dtype | None = None, bias: bool = True) -> ResidualLinear:
    torch.manual_seed(3)
    return ResidualLinear(base, RANK, bias, dtype=dtype)


def tolerance(product: str, dtype: torch.dtype) -> tuple[float, float]:
    """Least and largest relative error: products that round say so."""
    rounds = (product == "int8" and dtype != torch.float64) or (product == "bfloat16" and dtype == torch.float32)
    return (1e-4, 0.02) if rounds else (0, EXACT[dtype])


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("sizes", [(OUT, IN), (7, 33), (5, 1), (1, 64)], ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("kind", "product"), WAYS)
def test_forward_and_gradient_are_those_of_the_weight_that_is_kept(
    kind: str, product: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    base = make(kind, dense(sizes=sizes, dtype=dtype), product)
    weight = base.dense_weight().double() if kind == "exact" else base.to(torch.float64).dense_weight()
    base.to(dtype)
    x = normal(4, 5, sizes[1], seed=4, dtype=dtype).requires_grad_()
    dY = normal(4, 5, sizes[0], seed=5, dtype=dtype)
    y = base.multiply(x)
    (dX,) = torch.autograd.grad(y, x, dY)
    assert y.dtype == dX.dtype == dtype and y.shape == (4, 5, sizes[0])
    least, most = tolerance(product, dtype)
    if 1 in sizes:
        least = 0  # one input, or one output, is its own largest: no error of rounding
    assert least <= relative_error(y, x.double() @ weight.T) < most
    assert least <= relative_error(dX, dY.double() @ weight) < most


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@kinds
def test_without_gradients_few_rows_meet_factors_as_they_are_held(
    kind: str, rows: int, dtype: torch.dtype, bias: bool
) -> None:
    """Factors in float32 beside a weight of 16 bits, as in a model that writes text: none is cast."""
    form = form_beside(make(kind, dense(sizes=(24, 48), dtype=dtype)), torch.float32, bias)
    with torch.no_grad():
        for part in form.parameters():
            part.copy_(normal(*part.shape, seed=7))
    weight, x = form.residual.dense_weight().double() + form.L.double() @ form.R.double(), normal(rows, 48, seed=8)
    expected = x.to(dtype).double() @ weight.T + (0 if form.bias is None else form.bias.double())
    casts = []

    class Casts(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cast = func is Tensor.to and args[1] != args[0].dtype
            casts.extend(part for part in form.parameters() if cast and args[0] is part)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Casts():
        y = form(x.to(dtype))
    assert y.dtype == dtype and relative_error(y, expected) < EXACT[dtype]
    assert len(casts) == (0 if rows <= FEW_ROWS or dtype == torch.float32 else 2 + bias)
    with_gradients = form(x.to(dtype))
    assert relative_error(y, with_gradients) < 2 * EXACT[dtype]
    if dtype == torch.bfloat16:  # what the tuner's layer passes under autocast
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert relative_error(form(x.to(dtype)), expected) < EXACT[dtype]


@rounded_kinds
def test_shapes_are_known_without_values(kind: str) -> None:
    form = form_beside(make(kind)).to("meta")
    with torch.no_grad():
        assert form(torch.empty(2, 3, IN, device="meta")).shape == (2, 3, OUT)


@kinds
@layouts
def test_the_layer_answers_as_the_dense_one_but_for_its_bits(kind: str, dense_class: type[nn.Module]) -> None:
    layer = dense(dense_class)
    base = make(kind, layer)
    x = normal(2, 9, IN, seed=6, dtype=torch.float32)
    error = relative_error(base.module(x), layer(x))
    low, high = {"exact": (0, 1e-6), "int8": (1e-3, 0.015), "int4": (0.03, 0.12)}[kind]
    assert low <= error < high


@layouts
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_an_exact_residual_is_a_linear_layer(dense_class: type[nn.Module], bias: bool) -> None:
    """Output and every gradient against the dense layer with the weight `Q + L R`."""
    if dense_class is Conv1D and not bias:
        pytest.skip("Conv1D always has a bias")
    layer = dense(dense_class, bias=bias)
    form = form_beside(make("exact", layer), bias=bias)
    x = normal(4, 5, IN, seed=7, dtype=torch.float32).requires_grad_()
    dY = normal(4, 5, OUT, seed=8, dtype=torch.float32)
    parameters = [form.L, form.R, *([form.bias] if bias else [])]
    y = form(x)
    gradients = torch.autograd.grad(y, [x, *parameters], dY)
    Q = layer.weight.T if dense_class is Conv1D else layer.weight
    expected = F.linear(x, Q + form.L @ form.R, form.bias)
    wanted = torch.autograd.grad(expected, [x, *parameters], dY)
    assert relative_error(y, expected) < 1e-5
    for actual, reference in zip(gradients, wanted, strict=True):
        assert relative_error(actual, reference) < 1e-5


@kinds
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 3, 4)], ids=str)
def test_leading_dimensions(kind: str, leading: tuple[int, ...]) -> None:
    form = form_beside(make(kind))
    x = normal(*leading, IN, seed=9, dtype=torch.float32).requires_grad_()
    y = form(x)
    assert y.shape == (*leading, OUT)
    assert y.numel() == 0 or relative_error(y, F.linear(x, form.multiply_out(), form.bias)) < 1e-5
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@kinds
@pytest.mark.parametrize("elements", [1, IN, 100, OUT * IN - 1])
def test_a_weight_larger_than_a_tile(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dY = normal(9, IN, seed=10, dtype=torch.float32), normal(9, OUT, seed=11, dtype=torch.float32)
    whole = make(kind)
    expected = whole.dense_weight(), whole.product(x), whole.transposed_product(dY)
    monkeypatch.setattr(products, "TILE_ELEMENTS", elements)
    tiled = make(kind)
    assert torch.equal(tiled.dense_weight(), expected[0])
    assert relative_error(tiled.product(x), expected[1]) < 1e-6
    assert relative_error(tiled.transposed_product(dY), expected[2]) < 1e-6


@kinds
def test_rows_of_zeros_and_outliers(kind: str) -> None:
    layer = dense()
    layer.weight[3] = 0
    layer.weight[4, 6] = 500.0
    base = make(kind, layer)
    weight = base.dense_weight()
    assert not bool(weight[3].any())
    assert float(weight[4, 6]) == pytest.approx(500.0, rel=2e-3)
    others = torch.arange(OUT) != 4
    assert relative_error(weight[others], layer.weight[others]) < 0.12
    assert bool(base.product(torch.ones(2, IN)).isfinite().all())


@pytest.mark.parametrize(("kind", "product"), WAYS)
def test_nan_in_a_row_gives_nan_and_spares_the_others(kind: str, product: str) -> None:
    form = form_beside(make(kind, product=product))
    x = normal(9, IN, seed=12, dtype=torch.float32)
    x[4, 2] = torch.nan
    y = form(x)
    others = torch.arange(9) != 4
    assert bool(y[4].isnan().all()) and bool(y[others].isfinite().all())


@pytest.mark.parametrize("outputs_train", [True, False])
@pytest.mark.parametrize(("kind", "product"), WAYS)
def test_export_where_autograd_records(kind: str, product: str, outputs_train: bool) -> None:
    """The input needs a gradient, as behind layers that train, so what is rounded must not."""
    form = form_beside(make(kind, product=product)).eval().requires_grad_(outputs_train)
    x = normal(40, IN, seed=12, dtype=torch.float32).requires_grad_()
    program = torch.export.export(form, (x,))
    torch.testing.assert_close(program.module()(x), form(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@kinds
def test_dense_layers_of_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    base = make(kind, dense(dtype=dtype))
    assert base.dtype == dtype and base.dense_weight().dtype == dtype
    assert relative_error(base.dense_weight(), dense(dtype=torch.float64).weight) < 0.12
    assert base.module(normal(3, IN, seed=13, dtype=dtype)).dtype == dtype
    form = form_beside(base)
    assert form.L.dtype == dtype


@kinds
def test_the_input_decides_the_dtype_of_the_answer(kind: str) -> None:
    form = form_beside(make(kind))
    x = normal(5, IN, seed=14)
    for dtype in EXACT:
        y = form(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y, F.linear(x.float(), form.multiply_out(), form.bias)) < 0.03


@kinds
def test_autocast(kind: str) -> None:
    base = make(kind)
    x = normal(5, IN, seed=15, dtype=torch.float32).requires_grad_()
    expected = base.module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = base.module(x)
    assert y.dtype == torch.bfloat16 and 0 < relative_error(y, expected) < 0.02
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert relative_error(x.grad, base.dense_weight().sum(0).expand(5, -1)) < 0.02


@kinds
def test_the_output_may_be_edited_in_place(kind: str) -> None:
    base = make(kind, dense(bias=False))
    form = form_beside(base)
    x = normal(2, 4, IN, seed=16, dtype=torch.float32).requires_grad_()
    for y in (form(x), base.module(x)):
        y += 1
        y.sum().backward()
    assert all(parameter.grad is not None for parameter in form.parameters())


# ---------------------------------------------------------------- bytes


@rounded_kinds
@pytest.mark.parametrize("sizes", [(OUT, IN), (7, 33), (16, 64)], ids=str)
def test_stored_bytes_are_those_of_the_buffers(kind: str, sizes: tuple[int, int]) -> None:
    base = make(kind, dense(sizes=sizes))
    held = sum(buffer.nbytes for buffer in base.buffers())
    assert type(base).stored_bytes(*sizes, 4) == type(base).stored_bytes(*sizes, 2) == held
    assert [name for name, _ in base.named_parameters()] == ["bias"]
    assert ExactResidual.stored_bytes(*sizes, 4) == dense(sizes=sizes).weight.nbytes


@rounded_kinds
def test_backward_keeps_nothing_for_the_product(kind: str) -> None:
    saved: list[Tensor] = []
    x = normal(5, IN, seed=17, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        make(kind).multiply(x)
    assert not saved


# ---------------------------------------------------------------- an ordinary module


@rounded_kinds
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_codes_and_scales_as_they_are(kind: str, cast: str) -> None:
    base = make(kind)
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    getattr(base, cast)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    assert base.dtype == dtype and base.dense_weight().dtype == dtype
    assert base.weight.dtype == dtype and base.bias.dtype == dtype
    assert all(torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())
    assert all(buffer.dtype == before[name].dtype for name, buffer in base.named_buffers())
    base.float()
    assert torch.equal(base.dense_weight(), make(kind).dense_weight())


@rounded_kinds
def test_meta_and_back(kind: str) -> None:
    base = make(kind)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    base.to("meta", torch.bfloat16)
    assert base.device.type == "meta" and {value.device.type for value in base.state_dict().values()} == {"meta"}
    assert base.product(torch.zeros(3, IN, device="meta")).shape == (3, OUT)
    base.to_empty(device="cpu").float()
    base.load_state_dict(state)
    assert torch.equal(base.dense_weight(), make(kind).dense_weight())


@rounded_kinds
def test_state_dict(kind: str) -> None:
    base = make(kind)
    other = RESIDUALS[kind](nn.Linear(IN, OUT))
    assert base.state_dict().keys() == {name for name, _ in base.named_buffers()} | {"bias"}
    other.load_state_dict(base.state_dict())
    assert torch.equal(other.dense_weight(), base.dense_weight()) and torch.equal(other.bias, base.bias)


def test_the_form_holds_its_factors_alone() -> None:
    form = form_beside(make("int8"))
    assert form.state_dict().keys() == {"wasi_added_L", "wasi_added_R", "bias"}
    assert not list(form.children()) and not list(form.buffers())
    base, before = form.residual, form.residual.codes.data_ptr()
    form.double()
    assert form.residual is base and base.codes.data_ptr() == before and base.dtype == torch.float32


class Two(nn.Module):
    """A frozen weight and two forms beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        base = make(kind)
        self.base = base.module
        self.one, self.two = form_beside(base), form_beside(base)


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_module_share_its_copy_of_the_weight(kind: str, copied: Any) -> None:
    module = Two(kind)
    other = copied(module)
    assert other.one.residual is other.two.residual and other.one.residual is not module.one.residual
    assert other.one.residual.module is other.base
    x = normal(3, IN, seed=18, dtype=torch.float32)
    assert torch.equal(other.one(x), module.one(x))
    assert len({t.data_ptr() for t in other.state_dict().values()}) == len(module.state_dict())


@kinds
def test_a_copy_of_a_form_trains_by_itself(kind: str) -> None:
    form = form_beside(make(kind))
    other = form.copy()
    assert other.residual is form.residual
    x = normal(3, IN, seed=19, dtype=torch.float32)
    expected = form(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.L.add_(1)
        other.bias.add_(1)
    assert torch.equal(form(x), expected)


@kinds
@layouts
def test_the_weight_answers_as_a_dense_one(kind: str, dense_class: type[nn.Module]) -> None:
    layer = dense(dense_class)
    base = make(kind, layer)
    form = form_beside(base)
    for weight, expected in ((base.weight, base.dense_weight()), (form.weight, base.dense_weight() + form.L @ form.R)):
        assert weight.shape == layer.weight.shape and weight.dtype == torch.float32
        assert torch.allclose(torch.clone(weight), expected.T if dense_class is Conv1D else expected)
    assert type(form.to_dense()) is dense_class and type(base.to_dense()) is dense_class
    x = normal(3, IN, seed=20, dtype=torch.float32)
    assert relative_error(form.to_dense()(x), form(x)) < 1e-5
    assert relative_error(base.to_dense()(x), base.module(x)) < 1e-5
    assert not any(parameter.requires_grad for parameter in form.to_dense().parameters())


def test_rounding_leaves_the_dense_layer_as_it_is() -> None:
    layer = dense()
    layer.requires_grad_(True)
    before = copy.deepcopy(layer)
    base = Int8Residual(layer)
    base.codes.zero_()
    base.bias.data.add_(0)
    assert torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)
    assert layer.weight.requires_grad and layer.bias.requires_grad and not base.bias.requires_grad


@kinds
@pytest.mark.parametrize("rank", [0, -1, OUT + 1, 2.0, True, None])
def test_ranks_that_a_weight_cannot_have(kind: str, rank: Any) -> None:
    with pytest.raises(ValueError, match=rf"rank must be from 1 to min\(out_features, in_features\) = {OUT}, got"):
        ResidualLinear(make(kind), rank)


def test_forms_move_beside_another_weight() -> None:
    form = form_beside(make("exact"))
    other = make("int8")
    form.move_beside(other)
    x = normal(3, IN, seed=21, dtype=torch.float32)
    assert form.residual is other
    assert relative_error(form(x), other.product(x) + F.linear(x, form.L @ form.R, form.bias)) < 1e-6
    assert residual.RESIDUALS[form.residual.name] is Int8Residual and "residual=int8" in repr(form)
