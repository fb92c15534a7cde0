"""What is computed on a CUDA device: products with few bits, whole steps, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import wasi_peft
from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.forms.products import PRODUCTS, ProductChoice
from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.linalg.low_bit import quantize_rows
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.updates.addition import addition_linear

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
# of a product of random operands, relative: rows are rounded to 8 bits, to bfloat16, or not at all
BOUNDS = {"int8": 0.02, "bfloat16": 0.01, "restored": 1e-5}


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_agree_with_float64(name: str, rows: int) -> None:
    """With few rows too, where the integer product cannot run and another one takes its place."""
    residual = RESIDUALS["int8"](nn.Linear(96, 64).to(DEVICE), ProductChoice(name))
    x, dY = torch.randn(rows, 96, device=DEVICE), torch.randn(rows, 64, device=DEVICE)
    weight = residual.dense_weight().double()
    assert relative(residual.product(x), x.double() @ weight.T) < BOUNDS[name]
    assert relative(residual.transposed_product(dY), dY.double() @ weight) < BOUNDS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_product_is_chosen_and_named(dtype: torch.dtype) -> None:
    choice = ProductChoice()
    residual = RESIDUALS["int8"](nn.Linear(96, 64).to(DEVICE), choice)
    x = torch.randn(40, 96, device=DEVICE, dtype=dtype)
    assert relative(residual.product(x), x.double() @ residual.dense_weight().double().T) < 0.03
    ((kind, name),) = choice.chosen.items()
    assert kind.startswith(DEVICE) and name in PRODUCTS


@pytest.mark.parametrize("kind", RESIDUALS)
def test_gradients_agree_with_float64(kind: str) -> None:
    residual = RESIDUALS[kind](nn.Linear(96, 64).to(DEVICE))
    x, L, R = (torch.randn(*size, device=DEVICE) for size in ((40, 96), (64, 8), (8, 96)))
    inputs = [tensor.clone().requires_grad_() for tensor in (x, L, R)]
    exact = [tensor.double().requires_grad_() for tensor in (x, L, R)]
    kept = quantize_rows(x) if residual.rounds_inputs else None
    dY = torch.randn(40, 64, device=DEVICE)
    addition_linear(inputs[0], residual, inputs[1], inputs[2], None, kept).backward(dY)
    weight = residual.dense_weight().double() + exact[1] @ exact[2]
    (exact[0] @ weight.T).backward(dY.double())
    for value, reference in zip(inputs, exact, strict=True):
        assert value.grad is not None and reference.grad is not None
        assert relative(value.grad, reference.grad) < 0.02


def train(model: nn.Module, device: str, bf16: bool) -> list[float]:
    """Losses of a few whole steps."""
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    tokens = (torch.arange(24, device=device)[None] + torch.arange(16, device=device)[:, None]) % 50
    losses = []
    for _ in range(12):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options", [{"residual_product": "restored"}, {"weight_share": 0.6}], ids=["residual", "factors"]
)
@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize(("bf16", "bound"), [(False, 0.01), (True, 0.1)], ids=["float32", "bfloat16"])
def test_steps_are_those_of_the_cpu(
    options: dict[str, Any], mode: str, bf16: bool, bound: float, tiny_llama: Callable[[], nn.Module]
) -> None:
    model = peft.get_peft_model(tiny_llama(), wasi_peft.WasiConfig(memory_mode=mode, **options))
    expected = train(copy.deepcopy(model), "cpu", False)
    assert train(model, DEVICE, bf16) == pytest.approx(expected, rel=bound)
    assert expected[-1] < 0.97 * expected[0]


def test_integer_products_train_as_well(tiny_llama: Callable[[], nn.Module]) -> None:
    model = peft.get_peft_model(tiny_llama(), wasi_peft.WasiConfig(residual_product="int8"))
    losses = train(model, DEVICE, False)
    assert losses[-1] < 0.9 * losses[0]


def test_a_residual_takes_a_quarter_of_the_weights_memory() -> None:
    dense = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    config = wasi_peft.WasiConfig(target_modules=["0", "1", "2", "3"], weight_rank=8, train_vectors=False)

    def held(make: Callable[[], nn.Module]) -> int:
        models = []
        measured = measure_peak_memory(lambda: models.append(make().to(DEVICE)))
        return measured.left_bytes

    whole = held(lambda: copy.deepcopy(dense))
    rounded = held(lambda: peft.get_peft_model(copy.deepcopy(dense), config))
    assert rounded < 0.3 * whole
