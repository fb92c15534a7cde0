"""Layers of WASI out of the sight of the function modes that techniques put around a model's code."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, wasi_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wasi_peft.memory import BlockRecomputation
from wasi_peft.memory.recompute import _Sources
from wasi_peft.memory.watching import OutOfSight, Watch
from wasi_peft.tuner.layer import Linear

FORMS = {
    "factors": {},
    "residual": {"residual": "int8", "update": "addition", "residual_product": "int8", "weight_rank": 4},
}
NO_LAYER, NO_INPUT = nn.Identity(), torch.zeros(())


class Counting(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.skipped: list[nn.Module] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[getattr(func, "__name__", "")] += 1
        return func(*args, **(kwargs or {}))

    def skip(self, layer: nn.Module, x: Tensor) -> None:
        self.skipped.append(layer)


class Other(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_all_watches_are_asleep_and_awake_again_in_their_order() -> None:
    with Counting() as outer, Counting() as inner:
        with OutOfSight(NO_LAYER, NO_INPUT), OutOfSight(NO_LAYER, NO_INPUT):
            torch.ones(())
        assert not outer.called and not inner.called
        assert outer.skipped == inner.skipped == [NO_LAYER]
        torch.ones(())
    assert outer.called == inner.called == Counter(ones=1)
    torch.ones(())
    assert outer.called == Counter(ones=1)


def test_they_are_awake_after_an_error() -> None:
    with Counting() as outer, Counting() as inner:
        with pytest.raises(KeyError), OutOfSight(NO_LAYER, NO_INPUT):
            raise KeyError
        torch.ones(())
    assert outer.called["ones"] == inner.called["ones"] == 1


def test_they_are_awake_after_an_error_on_the_way_in() -> None:
    class Failing(Counting):
        def skip(self, layer: nn.Module, x: Tensor) -> None:
            raise KeyError

    with Other() as other, Counting() as counting, Failing() as failing:
        with pytest.raises(KeyError), OutOfSight(NO_LAYER, NO_INPUT):
            raise AssertionError
        torch.ones(())
    assert other.calls == counting.called["ones"] == failing.called["ones"] == 1


def test_modes_of_others_see_everything() -> None:
    with Counting() as outer, Other() as other, Counting() as inner:
        with OutOfSight(NO_LAYER, NO_INPUT):
            torch.ones(())
        torch.ones(())
    assert inner.called == Counter(ones=1)
    assert outer.called["ones"] == other.calls == 2  # what is around a mode of another kind stays, too


def llama(form: str) -> Any:
    torch.manual_seed(0)
    return wasi_model(ARCHITECTURES["llama"].build(), **FORMS[form])


def tokens() -> Any:
    return ARCHITECTURES["llama"].batch(2, 5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_no_call_inside_of_a_layer_is_seen(form: str, grad: bool) -> None:
    model, batch = llama(form), tokens()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    with Counting() as counting, torch.set_grad_enabled(grad):
        model(**batch)
    assert len(counting.skipped) == len(layers) > 5
    assert counting.called["scaled_dot_product_attention"] and not counting.called["_int_mm"]
    assert not counting.called["topk"]


@pytest.mark.parametrize("form", FORMS)
def test_rounding_to_8_bits_is_no_choice_of_a_block(form: str) -> None:
    """Its columns with the largest entries are looked for in every layer: no reason to keep hidden states in 16."""
    model, batch = llama(form), tokens()
    with torch.no_grad(), _Sources(()) as sources:
        model(**batch)
    assert not sources.chose
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert wanted <= set(sources.met)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_a_recomputed_function_only_refers_to_trains(form: str) -> None:
    model = llama(form)
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    for parameter in layer.parameters():
        parameter.data.add_(0.1)
    other = copy.deepcopy(layer)
    outside = torch.randn(3, 4, layer.in_features, requires_grad=True)
    x = torch.randn(3, 4, layer.out_features, requires_grad=True)
    BlockRecomputation()(lambda x: x.sin() * layer(outside), x).square().sum().backward()
    gradients = outside.grad, x.grad
    outside.grad = x.grad = None
    (x.sin() * other(outside)).square().sum().backward()
    for found, expected in zip(gradients, (outside.grad, x.grad), strict=True):
        torch.testing.assert_close(found, expected)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert len(names) >= 2
    for name in names:
        torch.testing.assert_close(layer.get_parameter(name).grad, other.get_parameter(name).grad)
