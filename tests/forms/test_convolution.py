"""Convolutions as linear layers over patches: against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wasi_peft.forms.convolution import Patches, unsuited


@given(
    dims=st.integers(1, 3),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, "valid", "same"]),
    bias=st.booleans(),
    batched=st.booleans(),
)
def test_the_linear_layer_over_patches_is_the_convolution(
    dims: int, size: int, stride: int, padding: Any, bias: bool, batched: bool
) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    stride = 1 if padding == "same" else stride
    layer = kind(2, 3, size, stride, padding, bias=bias).double()
    shape = (2, 7, 5, 6)[: dims + 1]
    x = torch.randn(*((4,) if batched else ()), *shape, dtype=torch.float64, requires_grad=True)
    patches = Patches.of(layer)
    linear = Patches.linear(layer)
    y, expected = patches.image(linear(patches.rows(x))), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad((out * weight).sum(), x) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if batched:
        h = patches.multiply(x, linear.weight)
        torch.testing.assert_close(h, patches.rows(x) @ linear.weight.T, rtol=1e-10, atol=1e-12)
        (ours,) = torch.autograd.grad((patches.image(h) * weight).sum(), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert patches.overlap == (size > stride)
    again = patches.convolution(linear)
    assert type(again) is kind and repr(again) == repr(layer)
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "groups=2"),
        ({"dilation": 2}, "dilation=(2, 2)"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": 1, "stride": 2}, None),
    ],
)
def test_what_is_no_linear_layer_over_patches(options: dict[str, Any], reason: str | None) -> None:
    assert unsuited(nn.Conv2d(4, 4, 3, **options)) == reason
