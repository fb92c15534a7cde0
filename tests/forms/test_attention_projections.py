"""Attention by projections that are called, against `nn.MultiheadAttention` itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK, SEEDS
from torch import Tensor, nn

from wasi_peft.forms.attention import (
    PROJECTIONS,
    ProjectedAttention,
    conceal_projections,
    expose_projections,
    pack_projections,
    projections_exposed,
)

B, N, S, HEADS = 3, 5, 4, 2


def attention(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(8, HEADS, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def arguments(masks: str, sizes: tuple[int, int], batched: bool, batch_first: bool) -> tuple[list[Tensor], Any]:
    """Query, key and value, and masks."""
    x = [torch.randn(B, count, width).double() for count, width in zip((N, S, S), (8, *sizes), strict=True)]
    kwargs: dict[str, Any] = {}
    if "padding" in masks:
        kwargs["key_padding_mask"] = torch.arange(S)[None] >= torch.tensor([S, 2, 1])[:, None]
    if "square" in masks:
        kwargs["attn_mask"] = torch.randn(N, S).double()
    if "boolean" in masks:
        kwargs["attn_mask"] = torch.rand(N, S) > 0.8
        kwargs["attn_mask"][:, 0] = False
    if "heads" in masks:
        kwargs["attn_mask"] = torch.randn(B * HEADS, N, S).double()
    if "causal" in masks:
        kwargs |= {"attn_mask": torch.ones(N, S).triu(1).bool(), "is_causal": True}
    if not batched:
        x = [one[0] for one in x]
        if "padding" in masks:
            kwargs["key_padding_mask"] = kwargs["key_padding_mask"][0]
        if "heads" in masks:
            kwargs["attn_mask"] = kwargs["attn_mask"][:HEADS]
    elif not batch_first:
        x = [one.transpose(0, 1) for one in x]
    return x, kwargs


@given(
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bias", "add_bias_kv", "add_zero_attn")}),
    sizes=st.sampled_from([(8, 8), (6, 10)]),
    masks=st.sampled_from(
        ["", "padding", "square", "boolean", "boolean padding", "heads", "causal", "causal padding"]
    ),
    batch_first=st.booleans(),
    batched=st.booleans(),
    weights=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=SEEDS,
)
@QUICK
def test_answers_and_gradients_are_the_same(
    options: dict[str, bool],
    sizes: tuple[int, int],
    masks: str,
    batch_first: bool,
    batched: bool,
    weights: tuple[bool, bool],
    seed: int,
) -> None:
    module = attention(seed, kdim=sizes[0], vdim=sizes[1], batch_first=batch_first, **options)
    x, kwargs = arguments(masks, sizes, batched, batch_first)
    kwargs |= {"need_weights": weights[0], "average_attn_weights": weights[1]}
    own, other = ([one.clone().requires_grad_() for one in x] for _ in range(2))
    projected = ProjectedAttention(module)
    answer, expected = projected(*own, **kwargs), module(*other, **kwargs)
    torch.testing.assert_close(answer, expected)
    dY = torch.randn_like(answer[0])
    answer[0].backward(dY), expected[0].backward(dY)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(projected.to_attention()(*x, **kwargs), module(*x, **kwargs))


def test_dropout_is_that_of_training() -> None:
    module = attention(dropout=0.5, batch_first=True)
    projected, x = ProjectedAttention(module), torch.randn(2, 64, 8).double()
    for needed in (True, False):
        torch.testing.assert_close(
            projected.eval()(x, x, x, need_weights=needed), module.eval()(x, x, x, need_weights=needed)
        )
        first, second = (projected.train()(x, x, x, need_weights=needed)[0] for _ in range(2))
        assert not torch.allclose(first, second)


def test_a_causal_hint_needs_a_mask() -> None:
    x = torch.randn(2, 3, 8).double()
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ProjectedAttention(attention(batch_first=True))(x, x, x, is_causal=True)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, HEADS, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.norm(self.encoder(x, src_key_padding_mask=padding))


def test_projections_are_exposed_and_put_back() -> None:
    model = Encoder()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with projections_exposed(model):
        for layer, name in itertools.product(range(2), (*PROJECTIONS, "out_proj")):
            linear = model.get_submodule(f"encoder.layers.{layer}.self_attn.{name}")
            assert isinstance(linear, nn.Linear) and linear.weight.shape == (8, 8)
        model.get_submodule("encoder.layers.0.self_attn.q_proj").__dict__["_wasi_note"] = "waits"
        with projections_exposed(model):
            assert isinstance(model.get_submodule("encoder.layers.0.self_attn"), ProjectedAttention)
        assert isinstance(model.get_submodule("encoder.layers.0.self_attn"), ProjectedAttention)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert dict(model.named_modules()) == modules
    replaced = expose_projections(model)
    assert model.get_submodule("encoder.layers.0.self_attn.q_proj").__dict__["_wasi_note"] == "waits"
    model.encoder.layers[1].self_attn.k_proj = nn.Identity()
    conceal_projections(model, replaced)
    kinds = [type(layer.self_attn) for layer in model.encoder.layers]
    assert kinds == [nn.MultiheadAttention, ProjectedAttention]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_encoders_leave_their_fast_path(padded: bool, grad: bool) -> None:
    model, x = Encoder().eval(), torch.randn(3, 5, 8)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None] if padded else None
    shown = ~padding if padding is not None else torch.ones(3, 5, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        expected = model(x, padding)
        expose_projections(model)
        torch.testing.assert_close(model(x, padding)[shown], expected[shown])
        keys = list(Encoder().state_dict())
        pack_projections(model)
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x, padding)[shown], expected[shown])
