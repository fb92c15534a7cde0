"""Packed experts' products: outputs, all gradients and what is kept, against one linear layer an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS, normal, relative_error
from torch import Tensor, nn

from wasi_peft.forms.products import ProductChoice
from wasi_peft.forms.residual import Residual
from wasi_peft.forms.stacked import ExactStack, Segment, residual_of, segments_of
from wasi_peft.linalg.low_bit import RoundedRows, quantize_rows
from wasi_peft.models.experts import ExpertStack
from wasi_peft.updates.stacked import stacked_linear

OUT, IN, RANK = 6, 40, 3
KINDS = ["none", "exact", "int8", "int4"]


def frozen(kind: str, experts: int, transposed: bool, seed: int) -> tuple[Residual | None, Tensor]:
    """A frozen weight, and what it stands for, (E, out, in)."""
    weight = normal(experts, OUT, IN, seed=seed)
    stored = weight.mT.contiguous() if transposed else weight
    stack = ExpertStack(nn.Parameter(stored, requires_grad=False), transposed)
    if kind == "none":
        return None, torch.zeros(experts, OUT, IN, dtype=torch.float64)
    residual = ExactStack(stack) if kind == "exact" else residual_of(stack, kind, ProductChoice("restored"))
    return residual, residual.dense_weight().view(experts, OUT, IN)


def reference(x: Tensor, Q: Tensor, L: Tensor, R: Tensor, segments: list[Segment], rows: int) -> Tensor:
    parts = [torch.zeros(rows, OUT, dtype=x.dtype) * sum(leaf.sum() for leaf in (x, L, R))]
    for expert, start, stop in segments:
        y = F.linear(x[start:stop], Q[expert] + L[expert] @ R[expert])
        parts.append(F.pad(y, (0, 0, start, rows - stop)))
    return torch.stack(parts).sum(0)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    left=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    transposed=st.booleans(),
    train_R=st.booleans(),
    seed=SEEDS,
)
@QUICK
def test_it_is_one_linear_layer_an_expert(
    counts: list[int], left: int, kind: str, transposed: bool, train_R: bool, seed: int
) -> None:
    experts, rows = len(counts), sum(counts) + left
    segments = segments_of(torch.tensor(counts).cumsum(0), rows)
    residual, Q = frozen(kind, experts, transposed, seed)
    leaves = [normal(rows, IN, seed=seed), normal(experts, OUT, RANK, seed=seed + 1)]
    leaves.append(normal(experts, RANK, IN, seed=seed + 2))
    own = [leaf.clone().requires_grad_(train_R or index < 2) for index, leaf in enumerate(leaves)]
    other = [leaf.clone().requires_grad_() for leaf in leaves]
    y = stacked_linear(own[0], residual, own[1], own[2], OUT, segments)
    expected = reference(other[0], Q, other[1], other[2], segments, rows)
    torch.testing.assert_close(y, expected)
    dY = normal(rows, OUT, seed=seed + 3)
    y.backward(dY), expected.backward(dY)
    for mine, theirs in zip(own, other, strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad)
        else:
            assert mine.grad is None


def test_the_gradient_of_R_is_that_of_the_rounded_input() -> None:
    x, L, R = normal(9, IN, seed=0), normal(2, OUT, RANK, seed=1), normal(2, RANK, IN, seed=2).requires_grad_()
    segments = [Segment(1, 0, 4), Segment(0, 4, 9)]
    residual, Q = frozen("int8", 2, False, 3)
    rounded = quantize_rows(x, 4)
    restored = rounded.codes * rounded.scale
    restored[:, rounded.columns] = rounded.values
    dY = normal(9, OUT, seed=4)
    stacked_linear(x, residual, L, R, OUT, segments, rounded).backward(dY)
    other = R.detach().clone().requires_grad_()
    reference(restored, Q, L, other, segments, 9).backward(dY)
    torch.testing.assert_close(R.grad, other.grad)


@pytest.mark.parametrize(
    ("trains", "kept"),
    [("L", {(9, RANK)}), ("LR", {(9, RANK), (9, IN)}), ("", set())],
    ids=["image", "input", "nothing"],
)
def test_backward_keeps_the_image_alone_where_R_does_not_train(trains: str, kept: set[Any]) -> None:
    L, R = normal(2, OUT, RANK, seed=1), normal(2, RANK, IN, seed=2)
    L.requires_grad_("L" in trains), R.requires_grad_("R" in trains)
    x = normal(9, IN, seed=0).requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stacked_linear(x, None, L, R, OUT, [Segment(0, 0, 4), Segment(1, 4, 9)])
    assert {tuple(tensor.shape) for tensor in saved if tensor.dim() == 2} == kept


def test_rounded_rows_are_taken_by_a_product_in_integers() -> None:
    weight = normal(2, 8, IN, seed=0).float()
    residual = residual_of(ExpertStack(nn.Parameter(weight), False), "int8", ProductChoice("int8"))
    x = normal(64, IN, seed=1).float()
    segments = [Segment(0, 0, 32), Segment(1, 32, 64)]
    rounded: RoundedRows = quantize_rows(x, 4)
    y = stacked_linear(x, residual, None, None, 8, segments, rounded)
    expected = torch.cat([F.linear(x[:32], weight[0]), F.linear(x[32:], weight[1])])
    assert 1e-4 < relative_error(y, expected) < 0.02


def test_an_input_without_values_is_spread_over_the_experts() -> None:
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    assert segments_of(offsets, 7) == [Segment(0, 0, 2), Segment(1, 2, 4), Segment(2, 4, 7)]
