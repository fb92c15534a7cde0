"""Quantised tensors: error against a slow reference, special values, memory layout, memory while quantising."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import quantization
from wasi_peft.memory.quantization import GROUP, KINDS, bits_per_value, dequantize, is_dense, quantize

INTEGER_KINDS = [kind for kind in KINDS if kind.startswith("int")]
LEVELS = {"int16": 2**16 - 1, "int8": 2**8 - 1, "int4": 2**4 - 1, "int4_half": 2**4 - 1}
TAILS = {"int4_half": np.float16}  # of scale and least value; others take float32


def slow(values: np.ndarray, levels: int, tail: type[np.floating] = np.float32) -> np.ndarray:
    """One group of 64 after the other, in float64 but for the scale and the least value."""
    result = values.astype(np.float64).copy()
    for start in range(0, len(values) // GROUP * GROUP, GROUP):
        group = result[start : start + GROUP]
        low, high = float(tail(group.min())), group.max()
        step = float(tail((high - low) / levels))
        if step > 0:
            codes = np.clip(np.round((group - low) / step), 0, levels)
            result[start : start + GROUP] = low + codes * step
    return result


@QUICK
@given(st.integers(1, 700), st.sampled_from(INTEGER_KINDS), st.floats(-3, 3), SEEDS)
def test_the_result_is_that_of_the_slow_reference(count: int, kind: str, shift: float, seed: int) -> None:
    x = normal(count, seed=seed).double() + shift
    expected = slow(x.numpy(), LEVELS[kind], TAILS.get(kind, np.float32))
    torch.testing.assert_close(dequantize(quantize(x, kind)), torch.from_numpy(expected), rtol=0, atol=1e-12)


@QUICK
@given(
    st.integers(1, 20), st.integers(0, 63), st.sampled_from([torch.float16, torch.float32]),
    st.floats(-3, 3), st.floats(-3, 6), st.booleans(), st.sampled_from(["int8", "int4_half"]), SEEDS,
)  # fmt: skip
def test_the_kernel_agrees_with_the_plain_operations(
    groups: int, rest: int, dtype: torch.dtype, exponent: float, shift: float, gaps: bool, kind: str, seed: int
) -> None:
    x = (normal(groups, GROUP, seed=seed) + shift) * 10**exponent
    x = torch.cat([x.flatten(), x.new_zeros(rest)]).to(dtype)
    if gaps:
        x = torch.stack([x[: groups * GROUP].view(groups, GROUP)] * 2, 1)[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_suits_kernel", lambda rows, kind, largest: False)
        plain = quantize(x, kind)
    fast = quantize(x, kind)
    assert fast.checked
    assert not plain.checked
    assert fast.is_finite()
    assert plain.is_finite()
    # a value half way between two codes may go either way
    step = (x.float().max() - x.float().min()) / LEVELS[kind]
    near = 1.01 * step + 1e-6 * x.float().abs().max() + torch.finfo(dtype).eps * x.float().abs().max()
    assert float((dequantize(fast).float() - dequantize(plain).float()).abs().max()) <= float(near)
    code_bytes = quantization._CODE_BYTES[kind]
    codes = [kept.packed[:, :code_bytes].int() for kept in (fast, plain)]
    if kind == "int8":
        assert int((codes[0] - codes[1]).abs().max()) <= 1
    assert float((codes[0] != codes[1]).float().mean()) < 0.05
    unpacked = quantization._unpack(fast.packed, kind, torch.float32)
    # `low + code * step`, by one rounding or by two: off by the last digit of the largest, also where the sum is small
    last_digit = torch.finfo(torch.float32).eps * float(unpacked.abs().max())
    torch.testing.assert_close(
        quantization._unpack_kernel(fast.packed, kind), unpacked, rtol=1.3e-6, atol=max(1e-5, last_digit)
    )


@QUICK
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([1, 2, 64, 65, 128]),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.randoms(use_true_random=False),
    st.booleans(),
    SEEDS,
)
def test_any_shape_order_and_dtype_comes_back(
    leading: list[int], last: int, kind: str, dtype: torch.dtype, random: object, gaps: bool, seed: int
) -> None:
    x = normal(*leading, last * (2 if gaps else 1), seed=seed).to(dtype)
    x = x[..., :last]
    order = list(range(x.dim()))
    random.shuffle(order)  # type: ignore[attr-defined]
    x = x.permute(order)
    before = x.clone()
    back = dequantize(quantize(x, kind))
    assert (back.shape, back.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)
    assert is_dense(back)
    by_memory = [dim for dim in sorted(range(x.dim()), key=lambda dim: -x.stride(dim)) if x.shape[dim] > 1]
    strides = [back.stride(dim) for dim in by_memory]
    assert strides == sorted(strides, reverse=True)
    bound = {"bf16": 2**-8, "int16": 2**-15, "int8": 2**-7, "int4": 2**-3, "int4_half": 2**-3}[kind] * x.abs().max()
    assert (
        float((back.double() - x.double()).abs().max()) <= float(bound) + torch.finfo(dtype).eps * float(bound) * 128
    )


@pytest.mark.parametrize("kind", [kind for kind in INTEGER_KINDS if kind not in TAILS])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])
def test_values_of_any_size_keep_their_relative_error(kind: str, scale: float) -> None:
    x = torch.linspace(-1, 2, 4 * GROUP) * scale
    error = (dequantize(quantize(x, kind)) - x).abs().max()
    assert error <= 3 * scale / LEVELS[kind] + 1e-38


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero(kind: str) -> None:
    x = normal(8, 96, seed=0).relu()
    back = dequantize(quantize(x, kind))
    assert (x == 0).any()
    assert torch.equal(back[x == 0], torch.zeros_like(back[x == 0]))
    assert torch.equal(dequantize(quantize(torch.zeros(3, 64), kind)), torch.zeros(3, 64))


@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_rounding_has_no_bias(kind: str) -> None:
    x = normal(1000, GROUP, seed=0)
    error = dequantize(quantize(x, kind)) - x
    assert abs(float(error.mean())) < 4 * float(error.std()) / x.numel() ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [5, 130])
def test_nan_and_inf_stay_visible(kind: str, value: float, place: int) -> None:
    x = normal(150, seed=0)
    assert quantize(x, kind).is_finite()
    x[place] = value
    kept = quantize(x, kind)
    assert not kept.is_finite()
    assert not torch.isfinite(dequantize(kept)[place])
    assert torch.isfinite(dequantize(kept)[GROUP : 2 * GROUP]).all()


def test_values_too_large_for_the_format_are_told() -> None:
    assert not quantize(torch.full((64,), 1e300, dtype=torch.float64), "bf16").is_finite()
    wide = torch.tensor([3e38, -3e38]).repeat(32)
    assert not quantize(wide, "int8").is_finite()
    assert quantize(wide / 4, "int8").is_finite()
    assert not quantize(wide.double() * 1e20, "int8").is_finite()
    assert not quantize(torch.linspace(-1e5, 1e5, 64), "int4_half").is_finite()
    assert quantize(torch.linspace(-3e4, 3e4, 64), "int4_half").is_finite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0, 8), (1,), (5, 1), (63,), (3, 65)])
def test_small_and_empty_tensors(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    kept = quantize(x, kind)
    assert kept.is_finite()
    assert torch.equal(dequantize(kept), x)


def test_the_bytes_are_those_of_the_formula() -> None:
    x = normal(32, 256, seed=0).float()
    for kind in KINDS:
        assert quantize(x, kind).nbytes == x.numel() * bits_per_value(kind) / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [False, True])
def test_no_float_copy_of_the_tensor_is_made(kind: str, strided: bool) -> None:
    x = normal(2048, 2048 + GROUP * strided, seed=0).float()[:, :2048]
    kept: list[object] = []
    peak = measure_peak_memory(lambda: kept.append(quantize(x, kind))).peak_bytes
    assert peak < x.numel() * (bits_per_value(kind) / 8 + 0.4)
    quantised = quantize(x, kind)
    peak = measure_peak_memory(lambda: dequantize(quantised)).peak_bytes
    assert peak < x.nbytes * 1.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_without_values_take_the_same_form(kind: str, dtype: torch.dtype) -> None:
    x = normal(6, 40, seed=0).to(dtype)
    kept = quantize(x, kind)
    with FakeTensorMode():
        fake = quantize(torch.empty(6, 40, dtype=dtype), kind)
        back = dequantize(fake)
    for ours, theirs in ((fake.packed, kept.packed), (fake.rest, kept.rest), (back, x)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_bad_input_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"kind must be one of \['bf16', 'int16', 'int8', 'int4', 'int4_half'\], got 'int2'"
    ):
        quantize(torch.zeros(3), "int2")
    with pytest.raises(ValueError, match=r"floating point tensors can be quantised, got torch\.int64"):
        quantize(torch.zeros(3, dtype=torch.long), "int8")
    with pytest.raises(ValueError, match="kind must be one of"):
        bits_per_value("fp8")


def test_the_result_owns_its_memory() -> None:
    x: Tensor = normal(150, seed=0)
    for kind in KINDS:
        kept = quantize(x, kind)
        before = dequantize(kept)
        changed = dequantize(kept)
        changed.zero_()
        x.add_(1)
        assert torch.equal(dequantize(kept), before)
