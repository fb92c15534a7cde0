"""Forms without an adapter: what they compute, what they answer for a weight, and what they are in a file."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wasi_peft.forms.compressed import CompressedLinear, CompressedResidual
from wasi_peft.forms.compressing import compressed, from_stored
from wasi_peft.forms.cored import CoredLinear
from wasi_peft.forms.dense import dense_weight, is_quantized, weight_shape
from wasi_peft.forms.factored import FactoredLinear
from wasi_peft.forms.frozen import FROZEN
from wasi_peft.forms.products import ProductChoice
from wasi_peft.forms.residual import ExactResidual, Int4Residual, Int8Residual, ResidualLinear
from wasi_peft.forms.split import SplitLinear
from wasi_peft.forms.stored import StoredForm, stored_layout

OUT, IN = 24, 40
EXACT = ProductChoice("restored")
Form = FactoredLinear | Int8Residual | Int4Residual


def dense(bias: bool = True) -> nn.Linear:
    return nn.Linear(IN, OUT, bias=bias)


def added(kind: type[Any], bias: bool = True) -> ResidualLinear:
    layer = dense(bias)
    form = ResidualLinear(kind(layer, EXACT), rank=3, bias=bias)
    form.residual.register_parameter("bias", None)
    return form


def in_bits(form: FactoredLinear, parts: str, kind: str) -> FactoredLinear:
    form.store(parts, FROZEN[kind], EXACT)
    return form


def forms(bias: bool = True) -> dict[str, Form]:
    return {
        "factors, R in 8 bits": in_bits(FactoredLinear(IN, OUT, 5, bias), "R", "int8"),
        "factors, R in 16 bits": in_bits(FactoredLinear(IN, OUT, 5, bias), "R", "bfloat16"),
        "split": in_bits(SplitLinear(IN, OUT, 5, bias, side_rank=2), "LR", "int8"),
        "core": in_bits(CoredLinear(IN, OUT, 5, bias), "LR", "int8"),
        "factors": FactoredLinear(IN, OUT, 5, bias),
        "int8": Int8Residual(dense(bias), EXACT),
        "int4": Int4Residual(dense(bias), EXACT),
        "int8 and factors": added(Int8Residual, bias),
        "int4 and factors": added(Int4Residual, bias),
    }


NAMES = list(forms())


def weight_of(form: Form) -> Tensor:
    """The weight that a form stands for, in float64, put together by hand."""
    if isinstance(form, ResidualLinear):
        return form.residual.dense_weight().double() + form.L.double() @ form.R.double()
    if isinstance(form, SplitLinear):
        return form.L.double() @ form.R.double() + form.B.double() @ form.A.double()
    if isinstance(form, CoredLinear):
        return form.L.double() @ form.M.double() @ form.R.double()
    if isinstance(form, FactoredLinear):
        return form.L.double() @ form.R.double()
    return form.dense_weight().double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_linear_layer_of_that_weight(name: str, bias: bool) -> None:
    layer = CompressedLinear(forms(bias)[name])
    x = torch.randn(7, 3, IN, requires_grad=True)
    y = layer(x)
    weight = weight_of(layer.form)
    expected = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(y)
    (dX,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dX.double(), grad.double() @ weight, atol=1e-5, rtol=1e-5)
    assert isinstance(layer, nn.Linear) and (layer.out_features, layer.in_features) == (OUT, IN)
    assert is_quantized(layer) and weight_shape(layer) == tuple(layer.weight.shape) == (OUT, IN)
    torch.testing.assert_close(dense_weight(layer).double(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.to_dense()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_products_without_gradients(name: str) -> None:
    """What an addition beside it uses, with thin factors to add and without."""
    layer = CompressedLinear(forms()[name])
    residual, weight = CompressedResidual(layer), weight_of(layer.form)
    x, dY, h, L = torch.randn(6, IN), torch.randn(6, OUT), torch.randn(6, 2), torch.randn(OUT, 2)
    torch.testing.assert_close(residual.product(x).double(), x.double() @ weight.T, atol=1e-4, rtol=1e-4)
    expected = x.double() @ weight.T + h.double() @ L.double().T
    torch.testing.assert_close(residual.product(x, None, (h, L)).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(residual.transposed_product(dY).double(), dY.double() @ weight, atol=1e-4, rtol=1e-4)
    assert residual.module is layer and not residual.product(x).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_and_in_another_dtype(name: str) -> None:
    layer, x = CompressedLinear(forms()[name]), torch.randn(5, IN)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = layer(x)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), exact, atol=0.05, rtol=0.05)
    scale = layer.state_dict().get("form.scale", layer.state_dict().get("residual.scale"))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half.weight.dtype == half.dtype == torch.bfloat16
    if scale is not None:
        kept = half.state_dict().get("form.scale", half.state_dict().get("residual.scale"))
        assert kept is not None and kept.dtype == scale.dtype and torch.equal(kept, scale)


@pytest.mark.parametrize("dense_class", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_a_file_makes_the_same_layer(name: str, bias: bool, dense_class: type[nn.Module]) -> None:
    layer = CompressedLinear(forms(bias)[name])
    state = layer.state_dict()
    stored = layer.stored()
    assert set(layer.stored_names.values()) == set(state)
    layout = stored_layout(layer.stored_form, (OUT, IN), bias, torch.float32)
    assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in stored.items()} == layout
    assert layout["weight"][0] != (OUT, IN), "who does not know the format must stop at the size"
    again = from_stored(layer.stored_form, stored, (OUT, IN), dense_class, torch.float32)
    x = torch.randn(4, IN)
    torch.testing.assert_close(again(x), layer(x), atol=2e-2, rtol=2e-2)  # its products are chosen anew
    assert torch.equal(dense_weight(again), dense_weight(layer)) and type(again.to_dense()) is dense_class
    other = CompressedLinear(forms(bias)[name])
    other.load_state_dict(stored)  # names of a file are taken as well as its own
    assert all(torch.equal(other.state_dict()[key], value) for key, value in state.items())
    other.load_state_dict(state)


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (("factors", 0), r"rank must be from 1 to min\(out_features, in_features\) = 24, got 0"),
        (("factors", 25), r"= 24, got 25"),
        (("int8", 25), r"= 24, got 25"),
        (("int3", 0), r"a form must be one of \['factors', 'split', 'core', 'int8', 'int4'\], got 'int3'"),
        (("exact", 0), r"got 'exact'"),
        (("split", 5), r"side_rank must be from 1 to .* = 24, got 0"),
        (("factors", 5, 2), r"form 'factors' has no side_rank and bits like these, got 2 and \{\}"),
        (("int8", 5, 0, {"L": "int8"}), r"form 'int8' has no .* got 0 and \{'L': 'int8'\}"),
        (("core", 5, 0, {"M": "int8"}), r"bits must say of L and R which of .* got \{'M': 'int8'\}"),
        (("core", 5, 0, {"L": "int3"}), r"bits must say of L and R which of .* got \{'L': 'int3'\}"),
    ],
    ids=str,
)
def test_layouts_that_there_are_not(stored: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        stored_layout(StoredForm(*stored), (OUT, IN), True, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_its_weight_cannot_be_written(name: str) -> None:
    layer = CompressedLinear(forms()[name])
    before = dense_weight(layer)
    for attribute in ("weight", "bias"):
        with pytest.raises(AttributeError, match=rf"the {attribute} of a compressed layer cannot be assigned"):
            setattr(layer, attribute, nn.Parameter(torch.zeros(OUT, IN)))
    with pytest.raises(AttributeError, match="data cannot be set: this weight is multiplied out"):
        layer.weight.data = torch.zeros(OUT, IN)
    layer.reset_parameters()
    assert torch.equal(dense_weight(layer), before)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    layer, x = CompressedLinear(forms()[name]), torch.randn(3, IN)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        if isinstance(layer.form, ResidualLinear):
            assert other.form.residual is other.residual is not layer.residual


# ---------------------------------------------------------------- of adapters


@pytest.mark.parametrize("base", NAMES)
def test_an_addition_to_a_compressed_layer_goes_into_it(base: str) -> None:
    layer = CompressedLinear(forms()[base])
    form = ResidualLinear(CompressedResidual(layer), rank=2)
    assert bool(form.L.any())
    merged = compressed(form, torch.float32)
    assert merged is not None and merged.rank == layer.rank + 2
    assert merged.form_name == ("split" if layer.stored_form.bits else layer.form_name)
    torch.testing.assert_close(dense_weight(merged), form.multiply_out(), atol=1e-6, rtol=1e-6)
    assert torch.equal(merged.bias, form.bias)
    before = dense_weight(merged)
    form.L.data.zero_()
    assert torch.equal(dense_weight(merged), before), "it is a copy"


@pytest.mark.parametrize("kind", [Int8Residual, Int4Residual])
@pytest.mark.parametrize("trained", [True, False])
def test_an_addition_beside_few_bits_stays_beside_them(kind: type[Any], trained: bool) -> None:
    form = ResidualLinear(kind(dense(), EXACT), rank=3)
    if not trained:
        form.L.data.zero_()
    merged = compressed(form, torch.bfloat16)
    assert merged is not None and merged.rank == (3 if trained else 0)
    torch.testing.assert_close(dense_weight(merged).float(), form.multiply_out(), atol=1e-2, rtol=1e-2)
    assert merged.bias is not None and torch.equal(merged.bias.float(), form.bias.to(merged.bias.dtype).float())


@pytest.mark.parametrize(
    "form", [SplitLinear(IN, OUT, 4, side_rank=2), CoredLinear(IN, OUT, 4), FactoredLinear(IN, OUT, 4)], ids=type
)
def test_other_forms_become_two_factors(form: FactoredLinear) -> None:
    merged = compressed(form, torch.float32)
    assert merged is not None and merged.form_name == "factors" and type(merged.form) is FactoredLinear
    torch.testing.assert_close(dense_weight(merged), form.multiply_out(), atol=1e-6, rtol=1e-6)


def test_what_would_not_be_smaller_is_none() -> None:
    assert compressed(FactoredLinear(IN, OUT, 14), torch.float32) is not None
    assert compressed(FactoredLinear(IN, OUT, 15), torch.float32) is None  # 15 (24 + 40) = 24 x 40
    assert compressed(ResidualLinear(ExactResidual(dense()), rank=2), torch.float32) is None
