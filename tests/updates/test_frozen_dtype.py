"""Updates whose frozen factors are stored in few bits: exact gradients, what backward keeps, bytes, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import normal, relative_error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from wasi_peft.forms.frozen import FROZEN
from wasi_peft.forms.products import ProductChoice
from wasi_peft.updates import UPDATES, Update, make_update
from wasi_peft.updates.image import image_linear

OUT, IN, RANK, SIDE = 12, 20, 5, 2
ABLE = tuple(name for name, update in UPDATES.items() if update.frozen_factors())
updates = pytest.mark.parametrize("name", ABLE)
dtypes = pytest.mark.parametrize("stored", FROZEN)


def make(name: str, stored: str | None, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Update, Any]:
    update = make_update(name, SIDE, None, stored)
    form = update.new_form(IN, OUT, RANK, bias, dtype=dtype)
    update.store(form, ProductChoice("restored"))
    for part in form.parts:
        if form.frozen(part) is None:
            form.part(part).requires_grad_(part in update.trained)
    return update, form


def weight(form: Any) -> Tensor:
    """By definition, from restored factors."""
    if hasattr(form, "B"):
        return form.L @ form.R + form.B @ form.A
    return form.L @ form.M @ form.R if hasattr(form, "M") else form.L @ form.R


def test_which_updates_have_frozen_factors() -> None:
    assert {name: UPDATES[name].frozen_factors() for name in ABLE} == {
        "frozen_basis": ("R",),
        "low_rank": ("L", "R"),
        "core": ("L", "R"),
    }


@updates
@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_are_exactly_those_of_the_restored_factors(
    name: str, stored: str, bias: bool, leading: tuple[int, ...], needs_x: bool
) -> None:
    update, form = make(name, stored, bias=bias)
    x, dY = normal(*leading, IN, seed=1).requires_grad_(needs_x), normal(*leading, OUT, seed=2)
    wanted = [form.part(part) for part in update.trained] + [x] * needs_x + ([form.bias] if bias else [])
    y = update.forward(form, x, None, None)
    expected = F.linear(x, weight(form), form.bias)
    assert relative_error(y, expected) < 1e-13
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, dY), torch.autograd.grad(expected, wanted, dY), strict=True
    ):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-12
    update.forward(form, x, None, None).add_(1)  # models edit what a layer answers


@updates
@dtypes
def test_backward_keeps_what_it_keeps_of_parameters(name: str, stored: str) -> None:
    """Of the input its image, or the input itself where a factor's gradient needs it; never a restored factor."""

    def kept(stored: str | None) -> int:
        update, form = make(name, stored, torch.float32)
        owned, sizes = {tensor.untyped_storage().data_ptr() for _, tensor in form.tensors()}, {}

        def pack(tensor: Tensor) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in owned:
                sizes[place] = tensor.untyped_storage().nbytes()
            return tensor

        x = normal(64, IN, seed=1, dtype=torch.float32).requires_grad_()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            update.forward(form, x, None, None)
        return sum(sizes.values())

    assert 0 < kept(stored) <= kept(None)


@updates
@dtypes
@pytest.mark.parametrize("bytes_per_element", [2, 4])
def test_stored_bytes_are_those_of_the_tensors(name: str, stored: str, bytes_per_element: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes_per_element]
    update, form = make(name, stored, dtype, bias=False)
    held = sum(tensor.nbytes for _, tensor in form.tensors())
    assert update.stored_bytes(OUT, IN, RANK, bytes_per_element) == held
    assert update.elements(OUT, IN, RANK) == make_update(name, SIDE).elements(OUT, IN, RANK)


def test_the_image_in_two_dtypes() -> None:
    """Products in the dtype of the image, gradients in those of the parameters."""
    h = normal(3, 4, RANK, seed=1, dtype=torch.bfloat16).requires_grad_()
    P, bias = normal(OUT, RANK, seed=2, dtype=torch.float32), normal(OUT, seed=3, dtype=torch.float32)
    y = image_linear(h, P.requires_grad_(), bias.requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and h.grad is not None and P.grad is not None and bias.grad is not None
    assert (h.grad.dtype, P.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative_error(P.grad, h.detach().float().sum((0, 1)).expand(OUT, RANK)) < 0.02
    assert torch.equal(bias.grad, torch.full((OUT,), 12.0))


@pytest.mark.parametrize("value", ["int4", "float32", "", 8])
def test_unknown_dtypes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^frozen_dtype must be one of 'bfloat16', 'int8', None, got") as error:
        make_update("frozen_basis", None, None, value)
    assert str(error.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize("name", ["factor", "subspace"])
def test_updates_that_train_all_factors_refuse(name: str) -> None:
    match = (
        f"needs update='frozen_basis' or 'low_rank' or 'core'; all of them train with update='{name}', got .*'int8'"
    )
    with pytest.raises(ValueError, match=match):
        make_update(name, None, None, "int8")


@pytest.mark.parametrize("name", ["addition", "frozen_basis"])
def test_residuals_refuse(name: str) -> None:
    with pytest.raises(ValueError, match="needs residual=None, got frozen_dtype='int8' with residual='exact'"):
        make_update(name, None, "exact", "int8")
