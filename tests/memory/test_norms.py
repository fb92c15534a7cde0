"""Root-mean-square norms that keep their input: which modules they are, what they compute and what they keep."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from models import checkpoint_activations
from strategies import SEEDS, normal, relative_error
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from wasi_peft.memory import LeanNorms, norms
from wasi_peft.memory.norms import RMSFormula, rms_formula

WIDTH = 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaRMSNorm(WIDTH, eps=1e-3),
    "gemma": lambda: GemmaRMSNorm(WIDTH, eps=1e-5),
    "olmo2": lambda: Olmo2RMSNorm(WIDTH, eps=1e-6),
    "t5": lambda: T5LayerNorm(WIDTH, eps=1e-6),
}
FORMULAS = {
    "llama": RMSFormula(1e-3, 0, scales_rounded=True),
    "gemma": RMSFormula(1e-5, 1, scales_rounded=False),
    "olmo2": RMSFormula(1e-6, 0, scales_rounded=False),
    "t5": RMSFormula(1e-6, 0, scales_rounded=True),
}


def norm(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    module = NORMS[kind]()
    with torch.no_grad():
        module.weight.copy_(normal(WIDTH, seed=7).mul(0.3).add(1 - FORMULAS[kind].offset))
    return module.to(dtype)


def lean(module: nn.Module) -> nn.Module:
    LeanNorms().install(module)
    assert "forward" in module.__dict__
    return module


def run(module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, module.weight], grad.to(y.dtype))]


def in_float64(module: Any, formula: RMSFormula, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The formula as it stands, in float64, from the values of the tensors."""
    x, weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    y = (weight + formula.offset) * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + formula.epsilon)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
@given(rows=st.integers(1, 9), seed=SEEDS, tile=st.sampled_from([1, 3 * WIDTH, 2**19]), of_four=st.booleans())
def test_the_output_is_the_modules_and_gradients_are_the_formulas(
    kind: str, dtype: torch.dtype, rows: int, seed: int, tile: int, of_four: bool
) -> None:
    shape = (2, 3, rows, WIDTH) if of_four else (rows, WIDTH)
    x = normal(*shape, seed=seed).mul(0.05).to(dtype)
    grad = normal(*shape, seed=seed + 1).to(dtype)
    if of_four:  # as the norms of queries and keys get it
        x, grad = x.transpose(1, 2), grad.transpose(1, 2)
    module = norm(kind, dtype)
    theirs = run(module, x, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wasi_peft.linalg.low_bit.TILE", tile)
        ours = run(lean(module), x, grad)
    exact = in_float64(module, FORMULAS[kind], x, grad)
    assert torch.equal(ours[0], theirs[0]) and ours[0].dtype == theirs[0].dtype
    for found, other, wanted in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        error = relative_error(found, wanted)
        assert error < (1e-5 if dtype == torch.float32 else 5e-3)
        assert error <= 1.2 * relative_error(other, wanted) + 1e-6


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_known_by_what_it_computes(kind: str) -> None:
    module = norm(kind)
    before = module.weight.detach().clone()
    for place in (module, module.to("meta")):
        assert rms_formula(place) == FORMULAS[kind]
    assert "forward" not in module.__dict__
    assert rms_formula(norm(kind, torch.float16)) == FORMULAS[kind]
    assert torch.equal(before, norm(kind).weight)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_the_output_is_the_modules_in_whatever_dtypes(kind: str, dtype: torch.dtype, weight: torch.dtype) -> None:
    """T5 in float16 gives its norms float32."""
    module, x = norm(kind, weight), normal(5, WIDTH, seed=1).to(dtype).requires_grad_()
    wanted = module(x)
    found = lean(module)(x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    if kind == "llama":
        assert type(found.grad_fn).__name__ == "RMSNormFunctionBackward"


class Unlike(LlamaRMSNorm):
    """Called like one, and computes something else: without the epsilon's place, or of another power."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).abs()


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(WIDTH),
        nn.LayerNorm(WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH),
        nn.GroupNorm(4, WIDTH),
        nn.Linear(WIDTH, 1),
        nn.Embedding(4, WIDTH),
        Unlike(WIDTH),
        nn.RMSNorm(WIDTH, elementwise_affine=False),
        nn.Module(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    assert rms_formula(module) is None
    LeanNorms().install(module)
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("groups", [WIDTH, WIDTH // 3])
def test_a_norm_with_a_gate_keeps_its_own_forward_where_it_has_one(groups: int) -> None:
    grouped = "group_size" in inspect.signature(MambaRMSNormGated).parameters
    if groups < WIDTH and not grouped:
        pytest.skip(f"transformers {tf.__version__} has no groups in this norm")
    module = MambaRMSNormGated(WIDTH, **({"group_size": groups} if grouped else {}))
    x, gate = normal(3, WIDTH, seed=1, dtype=torch.float32), normal(3, WIDTH, seed=2, dtype=torch.float32)
    before = module(x, gate), module(x)
    LeanNorms().install(module)
    assert torch.equal(module(x, gate), before[0]) and torch.equal(module(x), before[1])


def test_backward_keeps_the_input_and_a_number_a_row() -> None:
    def kept(module: nn.Module) -> set[tuple[int, ...]]:
        shapes = set()
        x = normal(5, 7, WIDTH, seed=3, dtype=torch.float32).requires_grad_()

        def note(tensor: Tensor) -> Tensor:
            shapes.add((tuple(tensor.shape), tensor.data_ptr() == x.data_ptr()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            assert module(x).requires_grad
        return shapes

    module = norm("llama")
    assert ((5, 7, WIDTH), False) in kept(module)  # the normalised rows
    assert kept(lean(module)) == {((5, 7, WIDTH), True), ((35, 1), False), ((WIDTH,), False)}


@pytest.mark.parametrize("case", ["no gradient", "nothing trains", "no rows", "float64", "keyword", "per sample"])
def test_what_is_not_a_training_step_goes_by_the_modules_own_forward(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = norm("llama")
    x = normal(0 if case == "no rows" else 4, WIDTH, seed=4, dtype=torch.float32)
    x = x.double() if case == "float64" else x
    if case == "nothing trains":
        module.requires_grad_(False)
    monkeypatch.setattr(norms.RMSNormFunction, "apply", None)  # rms_formula has no more use for it
    wanted = module(x)
    formula, module.__dict__["forward"] = FORMULAS["llama"], None
    del module.__dict__["forward"]
    norms.wrap(module, norms._LeanNorm(formula))
    if case == "keyword":
        assert torch.equal(module(hidden_states=x), wanted)
    elif case == "per sample":
        rows = torch.func.vmap(torch.func.grad(lambda row: module(row).sum()))(x)
        assert rows.shape == x.shape
    else:
        with torch.set_grad_enabled(case != "no gradient"):
            assert torch.equal(module(x), wanted)


def test_only_what_needs_a_gradient_gets_one() -> None:
    module = lean(norm("llama"))
    x = normal(4, WIDTH, seed=5, dtype=torch.float32)
    module(x).sum().backward()
    assert module.weight.grad is not None and x.grad is None
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(module(x), x, torch.ones_like(x).requires_grad_(), create_graph=True)[0].sum().backward()


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(intermediate_size=64, vocab_size=50, **sizes))


def gradients_of(model: Any) -> dict[str, Tensor]:
    tokens = torch.arange(12).view(2, 6)
    model.zero_grad()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "copied", "pickled", "compiled"])
def test_a_model_trains_as_before(how: str) -> None:
    model = llama()
    wanted = gradients_of(model)
    LeanNorms().install(model)
    assert sum("forward" in module.__dict__ for module in model.modules()) == 5
    if "reentrant" in how:
        checkpoint_activations(model, {"use_reentrant": how == "reentrant"})
    model = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(how, lambda m: m)(model)
    found = gradients_of(torch.compile(model, backend="aot_eager") if how == "compiled" else model)
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name.removeprefix("_orig_mod.")]) < 1e-5
    LeanNorms().remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
