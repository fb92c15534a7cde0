"""Attention that keeps rounded queries, keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import relative_error
from torch import Tensor

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import LowBitSavedTensors, attention
from wasi_peft.memory.attention import attention_gradients, low_bit_attention


def inputs(
    samples: int, heads: int, groups: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as models make them: views of (B, N, H, d)."""
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    tensors = [torch.randn(samples, rows, count, width, dtype=dtype) for rows, count in shapes]
    q, k, v = (tensor.transpose(1, 2).requires_grad_() for tensor in tensors)
    return q, k, v


def mask_of(kind: str | None, samples: int, queries: int, keys: int) -> Tensor | None:
    if kind == "bool":
        mask = torch.rand(samples, 1, queries, keys) > 0.4
        mask[0, 0, 0] = False  # looks nowhere
        return mask
    return torch.randn(1, 1, queries, keys, dtype=torch.float64) if kind == "float" else None


@given(
    samples=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    mask=st.sampled_from([None, "causal", "bool", "float"]),
    scale=st.sampled_from([None, 0.3]),
    scores=st.sampled_from([1, 20, 100, 10**6]),
)
def test_gradients_equal_those_of_autograd(
    samples: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    mask: str | None,
    scale: float | None,
    scores: int,
) -> None:
    """In pieces of any size."""
    torch.manual_seed(samples + 10 * queries)
    q, k, v = inputs(samples, groups * shared, groups, queries, keys, 4)
    allowed, causal = mask_of(mask, samples, queries, keys), mask == "causal"
    out = F.scaled_dot_product_attention(q, k, v, allowed, 0.0, causal, scale=scale, enable_gqa=shared > 1)
    grad = torch.randn_like(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", scores)
        ours = attention_gradients(q.detach(), k.detach(), v.detach(), grad, allowed, causal, scale)
    for got, wanted, tensor in zip(ours, torch.autograd.grad(out, (q, k, v), grad), (q, k, v), strict=True):
        assert torch.allclose(got, wanted, atol=1e-12)
        assert got.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "bound"), [("int16", 1e-3), ("int8", 0.03), ("int4", 0.4)])
def test_output_is_exact_and_gradients_are_near(dtype: torch.dtype, kind: str, bound: float) -> None:
    torch.manual_seed(0)
    exact = inputs(2, 4, 2, 16, 16, 32, dtype)
    ours = [tensor.detach().clone().requires_grad_() for tensor in exact]
    out = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    kept = low_bit_attention(*ours, is_causal=True, enable_gqa=True, kind=kind)
    assert torch.equal(out, kept)
    grad = torch.randn_like(out)
    smaller = 8 * dtype.itemsize > {"int16": 17, "int8": 9, "int4": 5}[kind]
    assert (type(kept.grad_fn).__name__ == "LowBitAttentionFunctionBackward") == smaller
    rounding = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 0}[dtype]
    pairs = zip(torch.autograd.grad(kept, ours, grad), torch.autograd.grad(out, exact, grad), strict=True)
    for got, wanted in pairs:
        assert got.dtype == dtype
        assert relative_error(got.double(), wanted.double()) < bound + rounding


def test_what_is_kept() -> None:
    """Of three tensors of 2 x 4 x 16 x 32: a byte an element, and eight bytes for each group of 64."""
    q, k, v = inputs(2, 4, 4, 16, 16, 32, torch.float32)
    q, k, v = q * 1, k * 1, v * 1
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        low_bit_attention(q, k, v)
    elements = 2 * 4 * 16 * 32
    assert sum(tensor.nbytes for tensor in kept) == 3 * (elements + 8 * elements // 64)


def unchanged(**options: Any) -> dict[str, Any]:
    return options


@pytest.mark.parametrize(
    "options",
    [
        unchanged(dropout_p=0.5),
        unchanged(attn_mask=torch.zeros(5, 5, requires_grad=True)),
        unchanged(kind="int16", half=True),
        unchanged(no_grad=True),
        unchanged(three=True),
    ],
    ids=lambda options: next(iter(options)),
)
def test_torchs_function_answers_where_rounding_is_not_possible(options: dict[str, Any]) -> None:
    q, k, v = inputs(2, 2, 2, 5, 5, 64, torch.float32)
    half, no_grad, three = (options.pop(name, False) for name in ("half", "no_grad", "three"))
    tensors = [tensor.half() if half else tensor[0] if three else tensor * 1 for tensor in (q, k, v)]
    kind = options.pop("kind", "int8")
    with torch.set_grad_enabled(not no_grad):
        torch.manual_seed(0)
        ours = low_bit_attention(*tensors, **options, kind=kind)
        torch.manual_seed(0)
        assert torch.equal(ours, F.scaled_dot_product_attention(*tensors, **options))
    assert ours.grad_fn is None or "LowBit" not in type(ours.grad_fn).__name__


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'int2'"):
        low_bit_attention(*inputs(1, 1, 1, 2, 2, 2), kind="int2")


def test_the_context_takes_the_place_of_torchs_function() -> None:
    q, k, v = inputs(1, 2, 2, 4, 4, 8)
    with LowBitSavedTensors("int8"):
        inside = F.scaled_dot_product_attention(q, key=k, value=v)
    outside = F.scaled_dot_product_attention(q, k, v)
    assert "LowBit" in type(inside.grad_fn).__name__ and "LowBit" not in type(outside.grad_fn).__name__
    assert torch.equal(inside, outside)


def test_infinite_and_missing_numbers_reach_the_gradient() -> None:
    q, k, v = inputs(1, 1, 1, 8, 8, 8, torch.float32)
    with torch.no_grad():
        q[0, 0, 0, 0] = torch.nan
    low_bit_attention(q, k, v).sum().backward()
    assert q.grad is not None and bool(q.grad.isnan().any())


def test_double_backward_is_refused() -> None:
    q, k, v = inputs(1, 1, 1, 4, 4, 8)
    (grad,) = torch.autograd.grad(low_bit_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_holds_few_scores_at_a_time() -> None:
    """All scores together would take 32 MiB; a few pieces and the results take a fraction."""
    q, k, v = (tensor.detach() for tensor in inputs(8, 4, 4, 512, 512, 8, torch.float32))
    grad = torch.randn_like(q)
    peak = measure_peak_memory(lambda: attention_gradients(q, k, v, grad)).peak_bytes
    assert peak < 3 * q.nbytes + 8 * 4 * attention.SCORES
