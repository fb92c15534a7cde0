"""Gated products that compute an activation once more: the same to the bit, and fewer bytes kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import checkpoint_activations
from strategies import normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wasi_peft.memory import LeanGates
from wasi_peft.memory.gates import _Gates

Gated = Callable[[Tensor, Tensor], Tensor]
LEAN: dict[str, Gated] = {
    "silu": lambda g, u: F.silu(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu by tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "the other way round": lambda g, u: u * F.silu(g),
    "torch.mul": lambda g, u: torch.mul(F.silu(g), u),
    "of the module": lambda g, u: nn.SiLU()(g).mul(u),
}


def used_twice(g: Tensor, u: Tensor) -> Tensor:
    value = F.silu(g)
    return value * u + value


def used_later(g: Tensor, u: Tensor) -> Tensor:
    first, second = F.silu(g), F.silu(u)
    return first * second * u


def changed(g: Tensor, u: Tensor) -> Tensor:
    value = F.silu(g).clone()
    other = F.silu(u)
    other.add_(1)
    return value * g + other * u


def without_gradient(g: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        value = F.silu(g)
    return value * u


OTHERS: dict[str, Gated] = {
    "computed without gradient": without_gradient,
    "used twice": used_twice,
    "used later": used_later,
    "changed in place": changed,
    "by a number": lambda g, u: F.silu(g) * 3.0 * u,
    "by itself": lambda g, u: F.silu(g).mul(2) * F.silu(u) + (lambda a: a * a)(F.silu(g)),
    "broadcast": lambda g, u: F.silu(g) * u[:1],
    "of another dtype": lambda g, u: F.silu(g) * u.double(),
    "in place": lambda g, u: F.silu(g).mul_(u),
    "activation in place": lambda g, u: F.silu(g * 1, inplace=True) * u,
    "an activation that keeps its result": lambda g, u: F.relu(g) * u,
    "a factor without gradient": lambda g, u: F.silu(g) * u.detach(),
    "a gate without gradient": lambda g, u: F.silu(g.detach()) * u,
}


def inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(4, 6, seed=seed).to(dtype).requires_grad_() for seed in (1, 2)]


def run(function: Gated, dtype: torch.dtype, around: Any = nullcontext) -> tuple[list[Tensor | None], int]:
    """Output and gradients, and how many tensors of their size backward keeps beside the inputs."""
    tensors, kept = inputs(dtype), {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), around():
        y = function(*tensors)
    own = {tensor.data_ptr() for tensor in tensors}
    kept = {place: tensor for place, tensor in kept.items() if place not in own and tensor.shape == (4, 6)}
    grads = torch.autograd.grad(y, tensors, normal(*y.shape, seed=3).to(y.dtype), allow_unused=True)
    return [y.detach(), *grads], len(kept)


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LEAN)
def test_values_are_the_same_to_the_bit_and_the_activation_is_not_kept(kind: str, dtype: torch.dtype) -> None:
    wanted, before = run(LEAN[kind], dtype)
    found, after = run(LEAN[kind], dtype, _Gates)
    assert same(found, wanted)
    assert (before, after) == (1, 0)


@pytest.mark.parametrize("kind", OTHERS)
def test_everything_else_is_torchs(kind: str) -> None:
    wanted, before = run(OTHERS[kind], torch.float32)
    found, after = run(OTHERS[kind], torch.float32, _Gates)
    assert all(a is b is None or torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]
    assert after <= before


def test_an_activation_that_was_changed_since_is_not_computed_again() -> None:
    def change(g: Tensor, u: Tensor) -> Tensor:
        value = F.silu(g)
        with torch.no_grad():
            value.mul_(2)
        return value * u

    wanted, _ = run(change, torch.float32)
    found, _ = run(change, torch.float32, _Gates)
    assert same(found, wanted)


def test_a_gate_that_was_changed_since_is_refused_as_by_torch() -> None:
    for around in (nullcontext, _Gates):
        gate, other = (tensor * 1 for tensor in inputs(torch.float32))
        with around():
            value = F.silu(gate)
            gate.mul_(2)
            product = value * other
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_checkpointing_inside_of_the_context_finds_in_backward_what_it_found_before() -> None:
    """It runs the function again outside of the context, and would take one saved tensor for another."""

    def checkpointed(g: Tensor, u: Tensor) -> Tensor:
        result: Tensor = checkpoint(LEAN["silu"], g, u, use_reentrant=False)
        return result

    wanted, _ = run(checkpointed, torch.float32)
    found, _ = run(checkpointed, torch.float32, _Gates)
    assert same(found, wanted)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 50, "pad_token_id": 0}
    if kind == "gemma":
        return tf.GemmaForCausalLM(tf.GemmaConfig(head_dim=8, **sizes))
    if kind == "phi3":
        return tf.Phi3ForCausalLM(tf.Phi3Config(**sizes))
    if kind == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=2, num_experts_per_tok=1, **sizes))
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))


def gradients_of(model: Any) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and how many tensors of the MLPs' width forward kept."""
    tokens, kept = torch.arange(12).view(2, 6), {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (64,) and tensor.numel() == 12 * 64:
            kept[tensor.data_ptr()] = tensor
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
    found = len(kept)
    kept.clear()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, found


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_gated_models_keep_one_tensor_less_in_every_block(kind: str) -> None:
    model = model_of(kind)
    wanted, before = gradients_of(model)
    LeanGates().install(model)
    found, after = gradients_of(model)
    assert before - after == 2
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    LeanGates().remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert gradients_of(model)[1] == before


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "copied", "pickled", "compiled", "experts"])
def test_a_model_trains_as_before(how: str) -> None:
    model = model_of("mixtral" if how == "experts" else "llama")
    wanted, _ = gradients_of(model)
    LeanGates().install(model)
    if "reentrant" in how:
        checkpoint_activations(model, {"use_reentrant": how == "reentrant"})
    model = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(how, lambda m: m)(model)
    found, _ = gradients_of(torch.compile(model, backend="aot_eager") if how == "compiled" else model)
    assert len(found) == len(wanted)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-7)


def test_no_model_is_refused_and_those_without_blocks_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    LeanGates().check(model)
    LeanGates().install(model)
    assert "forward" not in model.__dict__
