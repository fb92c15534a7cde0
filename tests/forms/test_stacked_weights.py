"""What model code reads in the place of packed weights: every way to multiply by them, and all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import normal
from torch import Tensor, nn

from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.forms.stacked import (
    ExactStack,
    FactoredStack,
    ParkedStack,
    ResidualStack,
    Segment,
    StackedWeight,
    residual_of,
)
from wasi_peft.models.experts import ExpertStack

E, OUT, IN = 3, 4, 5
WEIGHT = normal(E, OUT, IN, seed=0)
ROWS = torch.tensor([2, 0, 2, 1, 0, 2])
GROUPED = torch.tensor([1, 1, 6], dtype=torch.int32)


class Counted:
    """A stand-in's functions, which say which of them was used."""

    def __init__(self) -> None:
        self.multiplied = self.made = 0

    def multiply(self, x: Tensor, segments: list[Segment]) -> Tensor:
        self.multiplied += 1
        y = x.new_zeros(len(x), OUT)
        for expert, start, stop in segments:
            y[start:stop] = x[start:stop] @ WEIGHT[expert].T
        return y

    def dense(self) -> Tensor:
        self.made += 1
        return WEIGHT

    def stand_in(self, transposed: bool) -> StackedWeight:
        shape = (E, IN, OUT) if transposed else (E, OUT, IN)
        return StackedWeight(shape, transposed, torch.empty(0, dtype=WEIGHT.dtype), self.multiply, self.dense)


def by_rows(weight: Any) -> Any:
    return torch.bmm(weight[ROWS], normal(6, IN, 1, seed=1))


def grouped(weight: Any, x: Tensor) -> Tensor:
    """As `torch._grouped_mm`, which knows no float64."""
    if isinstance(weight, Tensor):
        parts = zip([0, *GROUPED.tolist()[:-1]], GROUPED.tolist(), weight, strict=True)
        return torch.cat([x[start:stop] @ one for start, stop, one in parts])
    return F.grouped_mm(x, weight, offs=GROUPED)


SERVED: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "linear": (False, lambda w: F.linear(normal(6, IN, seed=1), w[1])),
    "linear with a bias": (
        False,
        lambda w: F.linear(normal(6, IN, seed=1), w[torch.tensor(1)], torch.ones(OUT).double()),
    ),
    "linear of more dimensions": (False, lambda w: F.linear(normal(2, 6, IN, seed=1), w[1])),
    "no rows": (False, lambda w: F.linear(normal(0, IN, seed=1), w[1])),
    "matmul": (True, lambda w: normal(6, IN, seed=1) @ w[1]),
    "matmul transposed": (False, lambda w: normal(6, IN, seed=1) @ w[1].T),
    "all by matmul": (True, lambda w: normal(E, 2, IN, seed=1) @ w),
    "all": (True, lambda w: torch.bmm(normal(E, 2, IN, seed=1), w)),
    "all transposed": (False, lambda w: torch.bmm(normal(E, 2, IN, seed=1), w.transpose(1, 2))),
    "rows": (False, by_rows),
    "rows transposed": (True, lambda w: torch.bmm(normal(6, 1, IN, seed=1), w[ROWS])),
    "grouped": (True, lambda w: grouped(w, normal(6, IN, seed=1))),
    "grouped transposed": (False, lambda w: grouped(w.mT, normal(6, IN, seed=1))),
}
OTHERS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "sum": (False, lambda w: torch.sum(w)),
    "a slice": (True, lambda w: w[1:]),
    "two rows of one": (False, lambda w: w[1][:2]),
    "einsum": (False, lambda w: torch.einsum("noi,mi->nmo", w, normal(2, IN, seed=1))),
    "the wrong side": (False, lambda w: normal(6, OUT, seed=1) @ w[1]),
    "norm": (True, lambda w: w.norm()),
    "cat": (False, lambda w: torch.cat([w, w])),
    "permute": (False, lambda w: w.transpose(0, 1)),
}


@pytest.mark.parametrize("case", SERVED)
def test_products_go_through_the_factors(case: str) -> None:
    transposed, use = SERVED[case]
    counted = Counted()
    y = use(counted.stand_in(transposed))
    torch.testing.assert_close(y, use(WEIGHT.mT if transposed else WEIGHT))
    assert (counted.multiplied, counted.made) == (1, 0)


@pytest.mark.parametrize("case", OTHERS)
def test_any_other_use_gets_the_dense_weight(case: str) -> None:
    transposed, use = OTHERS[case]
    counted = Counted()
    torch.testing.assert_close(use(counted.stand_in(transposed)), use(WEIGHT.mT if transposed else WEIGHT))
    assert counted.multiplied == 0


def test_shapes_are_known_at_no_cost() -> None:
    counted = Counted()
    weight = counted.stand_in(True)
    assert weight.shape == weight.size() == (E, IN, OUT) and weight.size(2) == OUT and weight.dim() == 3
    assert weight.mT.shape == (E, OUT, IN) and weight[0].shape == (IN, OUT) and weight[ROWS].shape == (6, IN, OUT)
    assert len(weight) == E and weight.numel() == E * IN * OUT and weight.is_floating_point()
    assert counted.made == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_forms_give_the_packed_weight_back(transposed: bool) -> None:
    stored = WEIGHT.mT.contiguous() if transposed else WEIGHT
    stack = ExpertStack(nn.Parameter(stored.clone()), transposed)
    torch.testing.assert_close(stack.matrices(), WEIGHT)
    parts = {"L": normal(E, OUT, 2, seed=1), "R": normal(E, 2, IN, seed=2)}
    product = torch.stack([parts["L"][e] @ parts["R"][e] for e in range(E)])
    form = FactoredStack.around(parts, transposed)
    assert (form.experts, form.out_features, form.in_features, form.weight_rank) == (E, OUT, IN, 2)
    torch.testing.assert_close(form.to_dense().weight.detach(), product.mT if transposed else product)
    for name in RESIDUALS:
        residual = ExactStack(stack) if name == "exact" else residual_of(stack, name, None)
        added = ResidualStack.around(residual, parts, transposed)
        frozen = torch.stack([residual.rows(e * OUT, (e + 1) * OUT).dense_weight() for e in range(E)])
        torch.testing.assert_close(added.to_dense().matrices(), frozen + product)
        assert added.copy().residual is residual
    torch.testing.assert_close(ParkedStack(stack).restore(stored.device, stored.dtype).weight.detach(), stored)


def test_int8_has_a_scale_for_every_expert_and_output() -> None:
    weight = WEIGHT * torch.tensor([1.0, 100.0, 1e4], dtype=WEIGHT.dtype)[:, None, None]
    residual = residual_of(ExpertStack(nn.Parameter(weight), False), "int8", None)
    assert residual.scale.shape == (E * OUT, 1)
    torch.testing.assert_close(residual.dense_weight().view_as(weight), weight, rtol=0.0, atol=1e4 * 4 / 127)
    largest = weight.abs().amax(2, keepdim=True)
    assert ((residual.dense_weight().view_as(weight) - weight).abs() <= largest / 127 / 2 * 1.001).all()


def test_a_rank_that_no_expert_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be from 1 to min.* = 4, got 5"):
        FactoredStack(E, IN, OUT, 5)
