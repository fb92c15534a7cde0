"""Forms are ordinary modules: whatever torch does with a linear layer, it does with them."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from wasi_peft.forms import (
    CoredLinear,
    FactoredLinear,
    FactoredWeight,
    ParkedLinear,
    SplitLinear,
    build_dense,
    dense_bias,
    dense_weight,
)

IN, OUT, RANK, SIDE = 8, 6, 3, 2
FORMS: dict[str, Callable[..., FactoredLinear]] = {
    "factored": lambda *sizes, **options: FactoredLinear(*sizes, **options),
    "cored": lambda *sizes, **options: CoredLinear(*sizes, **options),
    "split": lambda *sizes, **options: SplitLinear(*sizes, **{"side_rank": SIDE, **options}),
}
CLASSES = {"factored": FactoredLinear, "cored": CoredLinear, "split": SplitLinear}
forms = pytest.mark.parametrize("kind", FORMS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
layouts = pytest.mark.parametrize("dense_class", [nn.Linear, Conv1D])


def make(kind: str, **options: Any) -> FactoredLinear:
    return FORMS[kind](IN, OUT, RANK, **options)


def product(form: Any) -> Tensor:
    """The weight by definition, (out, in)."""
    if isinstance(form, SplitLinear):
        return form.L @ form.R + form.B @ form.A
    return form.L @ form.M @ form.R if isinstance(form, CoredLinear) else form.L @ form.R


def expected(form: Any, x: Tensor) -> Tensor:
    return F.linear(x, product(form), form.bias)


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*leading, IN, seed=1, dtype=dtype)


# -------------------------------------------------------------------- what a form computes


@forms
@biases
@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 3), (4, 5), (2, 3, 4)], ids=str)
def test_forward_is_that_of_the_product(kind: str, bias: bool, leading: tuple[int, ...]) -> None:
    form = make(kind, bias=bias, dtype=torch.float64)
    x = inputs(*leading, dtype=torch.float64)
    assert form(x).shape == (*leading, OUT)
    assert relative_error(form(x), expected(form, x)) < 1e-13


@forms
@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_are_those_of_the_product(kind: str, rows: int) -> None:
    form = make(kind, dtype=torch.float64)
    x = inputs(rows, dtype=torch.float64).requires_grad_()
    wanted = [x, *form.parameters()]
    direction = normal(rows, OUT, seed=2)
    actual = torch.autograd.grad(form(x), wanted, direction)
    reference = torch.autograd.grad(expected(form, x), wanted, direction)
    for ours, theirs in zip(actual, reference, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_input_decides_the_dtype(kind: str, dtype: torch.dtype, rows: int) -> None:
    form = make(kind)
    output = form(inputs(rows, dtype=dtype))
    assert output.dtype == dtype
    assert relative_error(output, expected(form, inputs(rows))) < 0.03


@forms
def test_the_output_may_be_edited_in_place(kind: str) -> None:
    """As models do that add a residual to what a layer returned."""
    form = make(kind)
    output = form(inputs(4))
    output += 1
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in form.parameters())


@forms
@pytest.mark.parametrize("rank", [1, min(IN, OUT)])
def test_extreme_ranks(kind: str, rank: int) -> None:
    form: Any = FORMS[kind](IN, OUT, rank)
    assert form.weight_rank == rank
    assert form.rank == rank + (SIDE if kind == "split" else 0)
    assert relative_error(form(inputs(5)), expected(form, inputs(5))) < 1e-5


@forms
def test_all_directions_together_are_the_weight(kind: str) -> None:
    form = make(kind)
    outer, inner = form.factors()
    assert outer.shape == (OUT, form.rank) and inner.shape == (form.rank, IN)
    assert relative_error(outer @ inner, product(form)) < 1e-6


def test_a_folded_core_computes_the_same() -> None:
    form = make("cored")
    assert isinstance(form, CoredLinear)
    folded = form.fold()
    assert type(folded) is FactoredLinear and folded.weight_rank == RANK
    assert relative_error(folded(inputs(5)), form(inputs(5))) < 1e-6


# -------------------------------------------------------------------- what torch does with it


@forms
@biases
def test_parameters_are_contiguous_and_named_as_the_parts(kind: str, bias: bool) -> None:
    form = make(kind, bias=bias)
    names = {"factored": "LR", "cored": "LMR", "split": "LRBA"}[kind]
    assert [name for name, _ in form.named_parameters()] == [*names, *(["bias"] if bias else [])]
    assert tuple(names) == form.parts and not list(form.named_buffers())
    memories = set()
    for parameter in form.parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad and parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        memories.add(parameter.untyped_storage().data_ptr())
    assert len(memories) == len(list(form.parameters()))


@forms
@biases
def test_state_dict_round_trip(kind: str, bias: bool) -> None:
    form, other = make(kind, bias=bias), make(kind, bias=bias)
    assert not torch.equal(form(inputs(5)), other(inputs(5)))
    result = other.load_state_dict(form.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(form(inputs(5)), other(inputs(5)))


def through_deepcopy(form: nn.Module, _: Path) -> Any:
    return copy.deepcopy(form)


def through_pickle(form: nn.Module, _: Path) -> Any:
    return pickle.loads(pickle.dumps(form))


def through_torch_save(form: nn.Module, folder: Path) -> Any:
    torch.save(form, folder / "form.pt")
    return torch.load(folder / "form.pt", weights_only=False)


@forms
@layouts
@biases
@pytest.mark.parametrize("through", [through_deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_equal_and_independent(
    kind: str, dense_class: type[nn.Module], bias: bool, through: Callable[..., Any], tmp_path: Path
) -> None:
    form = make(kind, bias=bias, dense_class=dense_class)
    again = through(form, tmp_path)
    before = form(inputs(5))
    assert type(again) is type(form) and repr(again) == repr(form)
    assert torch.equal(again(inputs(5)), before)
    assert torch.equal(again.weight.float(), form.weight.float())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(form(inputs(5)), before)
    assert not again.weight.float().any()  # the stand-in is that of the copy


@forms
@biases
def test_safetensors_take_the_module(kind: str, bias: bool, tmp_path: Path) -> None:
    form, other = make(kind, bias=bias), make(kind, bias=bias)
    save_model(form, str(tmp_path / "form.safetensors"))
    load_model(other, str(tmp_path / "form.safetensors"))
    assert torch.equal(form(inputs(5)), other(inputs(5)))


@forms
@biases
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("training", [True, False])
def test_export(kind: str, bias: bool, rows: int, training: bool) -> None:
    form = make(kind, bias=bias).train(training)
    program = torch.export.export(form, (inputs(rows),))
    assert torch.allclose(program.module()(inputs(rows)), form(inputs(rows)), atol=1e-6)
    assert set(program.state_dict) == set(form.state_dict())


@forms
def test_moving_and_casting(kind: str) -> None:
    form = make(kind).to(torch.float64)
    assert {parameter.dtype for parameter in form.parameters()} == {torch.float64}
    assert form.weight.dtype == torch.float64
    empty = make(kind, device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters()) and empty.weight.is_meta
    assert empty(inputs(3).to("meta")).shape == (3, OUT)


@forms
def test_repr(kind: str) -> None:
    text = repr(make(kind, bias=False))
    assert text.startswith(type(make(kind)).__name__)
    assert f"in_features={IN}, out_features={OUT}, rank={RANK}, bias=False" in text
    assert (f"side_rank={SIDE}" in text) == (kind == "split")


# -------------------------------------------------------------------- dense weights


@forms
@layouts
def test_the_weight_is_known_without_being_multiplied_out(
    kind: str, dense_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = make(kind, dense_class=dense_class)
    monkeypatch.setattr(type(form), "multiply_out", lambda _: pytest.fail("multiplied out"))
    weight = form.weight
    shape = (IN, OUT) if dense_class is Conv1D else (OUT, IN)
    assert isinstance(weight, FactoredWeight)
    assert weight.shape == shape == weight.size() and weight.size(0) == shape[0] and weight.size(-1) == shape[1]
    assert (weight.dtype, weight.device, weight.ndim) == (torch.float32, torch.device("cpu"), 2)
    assert weight.numel() == IN * OUT and weight.is_meta is False
    assert not hasattr(weight, "quant_state") and not hasattr(weight, "qweight")


@forms
@layouts
def test_the_weight_takes_part_in_torch_functions(kind: str, dense_class: type[nn.Module]) -> None:
    form = make(kind, dense_class=dense_class)
    dense = product(form).T if dense_class is Conv1D else product(form)
    weight = form.weight
    assert relative_error(weight.float(), dense) < 1e-6
    assert relative_error(torch.cat([weight, weight]), torch.cat([dense, dense])) < 1e-6
    x = torch.ones(2, dense.shape[1])
    assert relative_error(F.linear(input=x, weight=weight), x @ dense.T) < 1e-6
    torch.nn.functional.mse_loss(weight, torch.zeros_like(dense)).backward()
    assert all(getattr(form, part).grad is not None for part in form.parts)


@forms
@layouts
@biases
def test_to_dense(kind: str, dense_class: type[nn.Module], bias: bool) -> None:
    form = make(kind, dense_class=dense_class, bias=bias or dense_class is Conv1D)
    dense = form.to_dense()
    assert type(dense) is dense_class
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    assert all(parameter.is_contiguous() for parameter in dense.parameters())
    assert relative_error(dense(inputs(5)), form(inputs(5))) < 1e-5
    assert relative_error(dense_weight(dense), product(form)) < 1e-6
    before = form(inputs(5))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.equal(form(inputs(5)), before)


@layouts
def test_a_dense_layer_around_tensors(dense_class: type[nn.Module]) -> None:
    weight, bias = torch.randn(IN, OUT) if dense_class is Conv1D else torch.randn(OUT, IN), torch.randn(OUT)
    layer: Any = build_dense(dense_class, weight, bias)
    assert type(layer) is dense_class and layer.weight.data_ptr() == weight.data_ptr()
    assert dense_weight(layer).shape == (OUT, IN)
    assert torch.equal(dense_bias(layer), bias)
    assert relative_error(layer(inputs(3)), inputs(3) @ dense_weight(layer).T + bias) < 1e-6
    if dense_class is nn.Linear:
        assert dense_bias(build_dense(dense_class, weight, None)) is None


@layouts
def test_a_parked_layer_owns_nothing_and_computes_the_same(dense_class: type[nn.Module]) -> None:
    dense: Any = Conv1D(OUT, IN) if dense_class is Conv1D else nn.Linear(IN, OUT)
    parked = ParkedLinear(dense)
    assert not list(parked.parameters()) and not list(parked.buffers()) and not parked.state_dict()
    assert torch.equal(parked(inputs(5)), dense(inputs(5)))
    assert (parked.out_features, parked.in_features) == (OUT, IN) and "parked on cpu" in repr(parked)
    assert torch.equal(dense_weight(parked), dense_weight(dense)) and torch.equal(dense_bias(parked), dense.bias)
    again = parked.to(torch.float64).restore(torch.device("cpu"), torch.float64)
    assert type(again) is dense_class and again.weight.dtype == torch.float64
    assert torch.equal(again.weight.float(), dense.weight)


# -------------------------------------------------------------------- existing tensors, and mistakes


@forms
def test_parts_that_are_not_contiguous_are_copied(kind: str) -> None:
    form = make(kind)
    parts = {name: getattr(form, name).detach().T.contiguous().T for name in form.parts}
    bias = torch.randn(OUT)
    again = CLASSES[kind].from_parts(parts, bias)
    assert type(again) is CLASSES[kind]
    for name, part in parts.items():
        assert not part.is_contiguous() and getattr(again, name).is_contiguous()
        assert torch.equal(getattr(again, name), part)
    with torch.no_grad():
        again.bias.zero_()  # type: ignore[union-attr]
    assert bias.any()
    assert CLASSES[kind].from_parts(parts, None).bias is None


BAD_RANKS = [0, -1, min(IN, OUT) + 1, 10**9, 2.0, True, "3", None]


class Nothing(TorchDispatchMode):
    """Fails where anything is computed or allocated."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pytest.fail(f"{func} ran")


@forms
@pytest.mark.parametrize("rank", BAD_RANKS, ids=repr)
def test_bad_ranks(kind: str, rank: Any) -> None:
    match = r"^rank must be from 1 to min\(out_features, in_features\) = 6, got"
    with Nothing(), pytest.raises(ValueError, match=match) as error:
        FORMS[kind](IN, OUT, rank)
    assert str(error.value).endswith(f"got {rank!r}.")


@pytest.mark.parametrize("rank", BAD_RANKS, ids=repr)
def test_bad_side_ranks(rank: Any) -> None:
    with Nothing(), pytest.raises(ValueError, match=r"^side_rank must be from 1 to .* = 6, got") as error:
        SplitLinear(IN, OUT, RANK, side_rank=rank)
    assert str(error.value).endswith(f"got {rank!r}.")
