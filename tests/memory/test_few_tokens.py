"""Attention of few tokens in 16 bits, of which backward is one of batched products."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import checkpoint_activations
from strategies import relative_error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from wasi_peft import WasiConfig
from wasi_peft.memory import ShortAttention, attention, few_tokens, short_attention
from wasi_peft.memory.attention import SCORES, attention_gradients
from wasi_peft.memory.few_tokens import WORK_PER_QUERY


class Backwards(TorchDispatchMode):
    """Notes the backward passes of attention: the dtype of the fused kernel's, or that it was the batched one."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[torch.dtype | str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.met.append(args[1].dtype)
        return func(*args, **(kwargs or {}))

    def batched(self, *args: Any) -> Any:
        self.met.append("batched")
        return attention_gradients(*args)


@contextmanager
def backwards() -> Iterator[list[torch.dtype | str]]:
    """What backward passes attention takes inside."""
    with Backwards() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_tokens, "attention_gradients", mode.batched)
        yield mode.met


def inputs(
    samples: int, heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype, width: int = 8
) -> list[Tensor]:
    """Queries, keys and values as models make them: views of (B, N, H, d)."""
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    made = [torch.randn(samples, rows, count, width).to(dtype) for rows, count in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def mask_of(kind: str | None, samples: int, queries: int, keys: int) -> Tensor | None:
    if kind == "bool":
        mask = torch.rand(samples, 1, queries, keys) > 0.4
        mask[0, 0, 0] = False  # looks nowhere
        return mask
    if kind == "of two dimensions":
        return torch.randn(queries, keys)
    if kind == "of three dimensions":
        return torch.randn(1, queries, keys)
    return torch.randn(1, 1, queries, keys) if kind == "float" else None


def gradients(function: Any, tensors: list[Tensor], grad: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*tensors, **options)
    return output.detach(), list(torch.autograd.grad(output, tensors, grad.to(output.dtype)))


@given(
    samples=st.integers(1, 5),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    mask=st.sampled_from([None, "causal", "bool", "float", "of two dimensions", "of three dimensions"]),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scores=st.sampled_from([1, 300, SCORES]),
)
def test_output_is_torchs_and_gradients_are_nearer_to_the_exact_ones(
    samples: int,
    groups: int,
    shared: int,
    queries: int,
    keys: int,
    mask: str | None,
    scale: float | None,
    dtype: torch.dtype,
    scores: int,
) -> None:
    torch.manual_seed(samples + 10 * queries)
    tensors = inputs(samples, groups * shared, groups, queries, keys, dtype)
    grad = torch.randn(samples, groups * shared, queries, 8).to(dtype)
    attn_mask = mask_of(mask, samples, queries, keys)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    options = {"attn_mask": attn_mask, "is_causal": mask == "causal", "scale": scale, "enable_gqa": shared > 1}
    with pytest.MonkeyPatch.context() as patch, backwards() as met:
        patch.setattr(attention, "SCORES", scores)
        output, found = gradients(short_attention, tensors, grad, **options)
    choice = torch._fused_sdp_choice(*tensors, attn_mask, 0.0, options["is_causal"], enable_gqa=shared > 1)
    assert met == (["batched"] if choice == SDPBackend.FLASH_ATTENTION.value else [])
    torchs, by_torch = gradients(F.scaled_dot_product_attention, tensors, grad, **options)
    assert torch.equal(output, torchs)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        options["attn_mask"] = attn_mask.double()
    _, exact = gradients(F.scaled_dot_product_attention, [tensor.double() for tensor in tensors], grad, **options)
    for ours, theirs, wanted, tensor in zip(found, by_torch, exact, tensors, strict=True):
        assert ours.dtype == dtype and (not met or ours.stride() == tensor.stride())
        error = (ours.double() - wanted).norm()
        assert error <= 1.1 * (theirs.double() - wanted).norm() + 4e-3 * wanted.norm() + 1e-6


@pytest.mark.parametrize(
    "change",
    ["float32", "long", "dropout", "trainable mask", "no gradient", "three dimensions", "switched off"],
)
def test_everything_else_is_torchs(change: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if change == "float32" else torch.bfloat16
    keys = WORK_PER_QUERY // 8 + 1 if change == "long" else 5
    options: dict[str, Any] = {}
    tensors = inputs(2, 2, 2, 3, keys, dtype)
    if change == "dropout":
        options["dropout_p"] = 0.5
    if change == "trainable mask":
        options["attn_mask"] = torch.randn(2, 2, 3, keys, dtype=dtype, requires_grad=True)
    if change == "three dimensions":
        tensors = [tensor.detach()[0].requires_grad_() for tensor in tensors]
    if change == "no gradient":
        tensors = [tensor.detach() for tensor in tensors]
    with sdpa_kernel(SDPBackend.MATH) if change == "switched off" else nullcontext():
        torch.manual_seed(1)
        output = short_attention(*tensors, **options)
        torch.manual_seed(1)
        assert torch.equal(output, F.scaled_dot_product_attention(*tensors, **options))
    if change == "no gradient":
        assert not output.requires_grad
        return
    with backwards() as met:
        output.sum().backward()
    assert set(met) <= {dtype}
    if change == "long":
        assert met == [torch.bfloat16]


def test_autocast_casts_as_it_does_torchs_function() -> None:
    torch.manual_seed(0)
    tensors = inputs(2, 2, 2, 5, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), backwards() as met:
        output = short_attention(*tensors, attn_mask=torch.zeros(5, 5))
        assert torch.equal(output, F.scaled_dot_product_attention(*tensors, attn_mask=torch.zeros(5, 5)))
        output.sum().backward()
    assert output.dtype == torch.bfloat16 and met == ["batched"]
    assert tensors[0].grad is not None and tensors[0].grad.dtype == torch.float32


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return ViTForImageClassification(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, vocab_size=50, max_position_embeddings=16, **sizes))


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if isinstance(model, LlamaForCausalLM):
        tokens = torch.randint(50, (2, 8))
        return {"input_ids": tokens, "labels": tokens, "attention_mask": (tokens % 7 > 0).long()}
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("mode", ["exact", "small"])
@pytest.mark.parametrize("make", [vit, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_a_model_in_training(make: Any, mode: str, checkpointing: bool) -> None:
    model = make()
    batch = batch_of(model)
    config = WasiConfig(memory_mode=mode, weight_rank=4, task_type="CAUSAL_LM" if make is llama else None)
    adapted = peft.get_peft_model(model, config).train()
    if checkpointing:
        checkpoint_activations(model)
        adapted.enable_input_require_grads()
    with backwards() as met:
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(**batch).loss
        loss.backward()
        assert set(met) == {"batched"}
    with backwards() as met:
        adapted(**batch).loss.backward()
    assert set(met) == {torch.float32}
    if checkpointing:  # transformers' hook on the embeddings cannot be pickled
        return
    twin = pickle.loads(pickle.dumps(copy.deepcopy(adapted)))
    with backwards() as met, torch.autocast("cpu", torch.bfloat16):
        twin(**batch).loss.backward()
    assert set(met) == {"batched"}


def test_what_is_removed_leaves_no_trace() -> None:
    model = vit()
    ShortAttention().install(model)
    ShortAttention().remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with backwards() as met, torch.autocast("cpu", torch.bfloat16):
        model(**batch_of(model)).loss.backward()
    assert set(met) == {torch.bfloat16}


def test_sizes_that_do_not_fit_get_torchs_error() -> None:
    q, k, v = inputs(2, 4, 2, 3, 5, torch.bfloat16)
    with pytest.raises(RuntimeError) as ours:
        short_attention(q, k, v)
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(q, k, v)
    assert str(ours.value) == str(theirs.value)


def test_models_without_blocks_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ShortAttention().check(model)
    ShortAttention().install(model)
    assert "forward" not in model.__dict__


def test_backward_keeps_all_that_torchs_function_does_but_the_output() -> None:
    def kept(function: Any) -> int:
        tensors, sizes = inputs(2, 4, 4, 16, 16, torch.bfloat16), {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = function(*tensors)
        assert output.requires_grad
        return sum(sizes.values())

    output_and_sums = 2 * 4 * 16 * (8 * 2 + 4)
    assert kept(short_attention) == kept(F.scaled_dot_product_attention) - output_and_sums


def test_checkpointing_inside_of_a_module_finds_in_backward_what_it_found_before() -> None:
    def attend(*tensors: Tensor) -> Tensor:
        result: Tensor = checkpoint(F.scaled_dot_product_attention, *tensors, use_reentrant=False)
        return result

    torch.manual_seed(0)
    tensors = inputs(2, 2, 2, 5, 5, torch.bfloat16)
    grad = torch.randn(2, 2, 5, 8)
    _, wanted = gradients(attend, tensors, grad)

    def inside(*tensors: Tensor) -> Tensor:
        with few_tokens._Functions():
            return attend(*tensors)

    _, found = gradients(inside, tensors, grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_compiled_blocks_train_the_same() -> None:
    model, batch = vit().bfloat16(), batch_of(vit())
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    ShortAttention().install(model)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        run(**batch).loss.backward()
        found.append(model.vit.layers[0].attention.q_proj.weight.grad)
        model.zero_grad()
    assert relative_error(found[1].float(), found[0].float()) < 0.02
