"""Runners around the forward of a module: their order, and what is found and taken away."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from wasi_peft.memory.wrapping import OWN_COMPUTATION, OWN_PARAMETERS, runner_of, unwrap, wrap

CALLS: list[str] = []


class Noting:
    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        CALLS.append(type(self).__name__)
        return forward(*args)


class Whole(Noting):
    pass


class Again(Noting):
    pass


class Parameters(Noting):
    level: ClassVar[int] = OWN_PARAMETERS


class Computation(Noting):
    level: ClassVar[int] = OWN_COMPUTATION


@pytest.mark.parametrize("order", itertools.permutations((Whole, Again, Parameters, Computation)), ids=str)
def test_runners_keep_their_order_whatever_is_put_in_first(order: tuple[type[Noting], ...]) -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = module(x)
    for kind in (*order, Computation, Whole):  # put in again
        wrap(module, kind())
    CALLS.clear()
    assert torch.equal(module(x), expected)
    assert CALLS == ["Whole", "Again", "Parameters", "Computation"]  # of one level, what was put in last is outside


def test_a_runner_is_found_and_taken_away_wherever_it_is() -> None:
    module, runners = nn.Linear(2, 2), (Computation(), Whole(), Parameters())
    for runner in runners:
        wrap(module, runner)
    assert tuple(runner_of(module, type(runner)) for runner in runners) == runners
    for runner in runners:
        unwrap(module, type(runner))
        assert runner_of(module, type(runner)) is None
    assert "forward" not in module.__dict__
