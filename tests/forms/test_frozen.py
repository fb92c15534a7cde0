"""Factors in few bits: against their restored values in float64, and as parts of an ordinary module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from strategies import normal, relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wasi_peft.forms import CoredLinear, FactoredLinear, SplitLinear
from wasi_peft.forms.frozen import FROZEN
from wasi_peft.forms.products import ProductChoice

IN, OUT, RANK, SIDE = 40, 24, 6, 2
MAKERS: dict[str, tuple[Callable[..., FactoredLinear], tuple[str, ...]]] = {
    "factored": (lambda **options: FactoredLinear(IN, OUT, RANK, **options), ("R",)),
    "cored": (lambda **options: CoredLinear(IN, OUT, RANK, **options), ("L", "R")),
    "split": (lambda **options: SplitLinear(IN, OUT, RANK, side_rank=SIDE, **options), ("L", "R")),
}
forms = pytest.mark.parametrize("kind", MAKERS)
dtypes = pytest.mark.parametrize("stored", FROZEN)
LARGEST_ERROR = {"int8": 0.02, "bfloat16": 2**-8}  # of normal values


def make(kind: str, stored: str, product: str | None = "restored", **options: Any) -> FactoredLinear:
    maker, names = MAKERS[kind]
    form = maker(**options)
    form.store(names, FROZEN[stored], ProductChoice(product))
    return form


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*leading, IN, seed=1, dtype=dtype)


def product(form: Any) -> Tensor:
    """The weight by definition, (out, in), float64, from restored factors."""
    parts = {name: form.part(name).double() for name in form.parts}
    if isinstance(form, SplitLinear):
        return parts["L"] @ parts["R"] + parts["B"] @ parts["A"]
    return parts["L"] @ parts["M"] @ parts["R"] if isinstance(form, CoredLinear) else parts["L"] @ parts["R"]


@dtypes
def test_one_scale_a_row_and_the_error(stored: str) -> None:
    """Rows of very different sizes: each keeps its own accuracy."""
    form = FactoredLinear(IN, OUT, RANK)
    rows = normal(RANK, IN, seed=2, dtype=torch.float32) * torch.logspace(-4, 4, RANK)[:, None]
    form.R.data = rows
    form.store(["R"], FROZEN[stored], ProductChoice())
    for restored, row in zip(form.R, rows, strict=True):
        error = relative_error(restored, row)
        assert 1e-4 < error < LARGEST_ERROR[stored]
    if stored == "int8":
        codes, scale = form.frozen("R").codes, form.frozen("R").scale
        assert codes.dtype == torch.int8 and codes.shape == (RANK, IN)
        assert scale.dtype == torch.float32 and scale.shape == (RANK, 1)
        assert torch.equal(codes.abs().amax(1), torch.full((RANK,), 127, dtype=torch.int8))


@forms
@dtypes
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_exactly_those_of_the_restored_factors(
    kind: str, stored: str, rows: int, bias: bool
) -> None:
    form = make(kind, stored, None, bias=bias, dtype=torch.float64)
    x = inputs(rows, dtype=torch.float64).requires_grad_()
    dY = normal(rows, OUT, seed=2)
    y, expected = form(x), F.linear(x, product(form), form.bias)
    assert relative_error(y, expected) < 1e-13
    wanted = [x, *form.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, dY), torch.autograd.grad(expected, wanted, dY), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-12


@forms
@dtypes
@pytest.mark.parametrize("choice", ["int8", "restored", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_round_are_near(kind: str, stored: str, choice: str, dtype: torch.dtype) -> None:
    form = make(kind, stored, choice)
    y = form(inputs(40, dtype=dtype))
    assert y.dtype == dtype
    assert relative_error(y, inputs(40).double() @ product(form).T + form.bias.double()) < 0.03  # type: ignore[union-attr]


@forms
@dtypes
def test_what_is_stored_and_what_trains(kind: str, stored: str) -> None:
    form, names = make(kind, stored), MAKERS[kind][1]
    assert [name for name, _ in form.named_parameters()] == [
        *(f"wasi_{part}" for part in form.parts if part not in names),
        "bias",
    ]
    buffers = {"int8": ("codes", "scale"), "bfloat16": ("values",)}[stored]
    assert [name for name, _ in form.named_buffers()] == [f"wasi_{part}.{each}" for part in names for each in buffers]
    assert {name for name, _ in form.tensors()} == set(form.state_dict())
    sizes = {"L": (OUT, RANK), "R": (RANK, IN)}
    expected = sum(FROZEN[stored].stored_bytes(*sizes[part], 4) for part in names)
    assert sum(buffer.nbytes for buffer in form.buffers()) == expected
    assert (form.weight_rank, form.dtype) == (RANK, torch.float32)
    assert f"rank={RANK}" in repr(form)


@forms
@dtypes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_round_neither_codes_nor_scales(kind: str, stored: str, dtype: torch.dtype) -> None:
    form = make(kind, stored)
    before = {name: buffer.clone() for name, buffer in form.named_buffers()}
    form.to(dtype)
    assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    for name, buffer in form.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert form.R.dtype == form.weight.dtype == form.multiply_out().dtype == dtype


def through_deepcopy(form: nn.Module, _: Path) -> Any:
    return copy.deepcopy(form)


def through_copy(form: Any, _: Path) -> Any:
    return form.copy()


def through_pickle(form: nn.Module, _: Path) -> Any:
    return pickle.loads(pickle.dumps(form))


@forms
@dtypes
@pytest.mark.parametrize("through", [through_deepcopy, through_copy, through_pickle])
def test_a_copy_is_equal_and_independent(kind: str, stored: str, through: Any, tmp_path: Path) -> None:
    form = make(kind, stored)
    again, before = through(form, tmp_path), form(inputs(5))
    assert torch.equal(again(inputs(5)), before) and repr(again) == repr(form)
    with torch.no_grad():
        for _, tensor in again.tensors():
            tensor.zero_()
    assert torch.equal(form(inputs(5)), before)


@forms
@dtypes
def test_safetensors_take_the_module(kind: str, stored: str, tmp_path: Path) -> None:
    form, other = make(kind, stored), make(kind, stored)
    save_model(form, str(tmp_path / "form.safetensors"))
    load_model(other, str(tmp_path / "form.safetensors"))
    assert torch.equal(form(inputs(5)), other(inputs(5)))


@forms
@dtypes
@pytest.mark.parametrize("rows", [3, 40])
def test_export(kind: str, stored: str, rows: int) -> None:
    form = make(kind, stored).eval()
    program = torch.export.export(form, (inputs(rows),))
    assert torch.allclose(program.module()(inputs(rows)), form(inputs(rows)), atol=1e-6)


@forms
@dtypes
@pytest.mark.parametrize("dense_class", [nn.Linear, Conv1D])
def test_to_dense(kind: str, stored: str, dense_class: type[nn.Module]) -> None:
    form = make(kind, stored, dense_class=dense_class)
    dense = form.to_dense()
    assert type(dense) is dense_class
    assert relative_error(dense(inputs(5)), form(inputs(5))) < 1e-5


@forms
@dtypes
def test_restored_inside_and_rounded_again_after(kind: str, stored: str) -> None:
    """What was rounded is rounded to the same."""
    form = make(kind, stored)
    before, names = {name: tensor.clone() for name, tensor in form.tensors()}, MAKERS[kind][1]
    with form.restored():
        assert not list(form.buffers())
        assert all(type(form.part(name)) is nn.Parameter and not form.part(name).requires_grad for name in names)
    for name, tensor in form.tensors():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="stop"), form.restored():
        raise RuntimeError("stop")
    assert {name for name, _ in form.tensors()} == set(before)


def test_a_folded_core_is_of_parameters() -> None:
    form: Any = make("cored", "int8")
    folded = form.fold()
    assert not list(folded.buffers())
    assert relative_error(folded(inputs(5)), form(inputs(5))) < 1e-5


@dtypes
def test_rows_of_zeros_and_the_meta_device(stored: str) -> None:
    form = FactoredLinear(IN, OUT, RANK)
    form.R.data[0] = 0
    form.store(["R"], FROZEN[stored], ProductChoice())
    assert not form.R[0].any() and bool(form(inputs(3)).isfinite().all())
    empty = make("factored", stored, device="meta")
    assert all(tensor.is_meta for _, tensor in empty.tensors())
    assert empty(inputs(3).to("meta")).shape == (3, OUT)
