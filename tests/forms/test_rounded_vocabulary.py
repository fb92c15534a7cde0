"""A vocabulary in 8 bits: rows and products against the weight that it stands for, and what modules see of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal, relative_error
from torch import Tensor, nn

from wasi_peft import measure_peak_memory
from wasi_peft.forms import vocabulary as forms
from wasi_peft.forms.dense import StandIn, build_dense
from wasi_peft.forms.products import FEW_ROWS, PRODUCTS, ProductChoice
from wasi_peft.forms.residual import Int8Residual
from wasi_peft.forms.vocabulary import Vocabulary, VocabularyWeight, hold_rounded, restore_vocabulary
from wasi_peft.linalg.low_bit import LARGEST_CODE
from wasi_peft.memory import chunked_cross_entropy

HIDDEN = 12


def vocabulary(size: int, seed: int, asked: str | None = "restored", dtype: torch.dtype = torch.float32) -> Vocabulary:
    weight = normal(size, HIDDEN, seed=seed).to(dtype)
    return Vocabulary(build_dense(nn.Linear, weight, None), ProductChoice(asked))


@given(size=st.integers(1, 40), rows=st.integers(1, 9), tile=st.sampled_from([1, 5 * HIDDEN, 2**20]), seed=SEEDS)
def test_products_are_those_of_the_weight_it_stands_for(size: int, rows: int, tile: int, seed: int) -> None:
    made = vocabulary(size, seed)
    dense = made.dense_weight(torch.float64)
    x = normal(rows, HIDDEN, seed=seed + 1, dtype=torch.float32)
    dY = normal(rows, size, seed=seed + 2, dtype=torch.float32)
    out = torch.empty(rows, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "TILE", tile)
        assert made.product(x, out=out) is out
        assert torch.equal(made.product(x), out)
        for found, left, right in ((out, x.double(), dense.T), (made.transposed_product(dY), dY.double(), dense)):
            assert float((found - left @ right).norm()) < 1e-6 * float(left.norm() * right.norm())
    tokens = torch.arange(size).flip(0).view(1, -1)
    assert relative_error(made.look_up(tokens), dense.flip(0)[None]) < 1e-6


def test_codes_are_off_by_half_a_step_at_most_and_tokens_have_scales_of_their_own() -> None:
    weight = normal(30, HIDDEN, seed=1, dtype=torch.float32) * torch.logspace(-6, 2, 30)[:, None]
    weight[3] = 0
    made = Vocabulary(build_dense(nn.Linear, weight, None))
    step = weight.abs().amax(1, keepdim=True) / LARGEST_CODE
    assert bool(((made.dense_weight() - weight).abs() <= 0.501 * step).all())
    assert made.stored_bytes(30, HIDDEN, 4) == 30 * (HIDDEN + 4)
    assert sum(buffer.nbytes for buffer in made.buffers()) == 30 * (HIDDEN + 4)


@pytest.mark.parametrize("asked", [None, *PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_never_rounded_to_8_bits(asked: str | None, dtype: torch.dtype) -> None:
    """Gradients of logits are probabilities; in 8 bits a row, most of them are zero."""
    made = vocabulary(64, 2, asked, dtype)
    dY = torch.softmax(normal(32, 64, seed=3) * 3, 1)
    dY[:, 0] -= 1
    wanted = dY @ made.dense_weight(torch.float64)
    found = made.transposed_product(dY.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found, wanted) < (1e-6 if dtype == torch.float64 else 5e-3)
    in_8_bits = Int8Residual(build_dense(nn.Linear, made.dense_weight(torch.float32), None), ProductChoice("int8"))
    assert relative_error(in_8_bits.transposed_product(dY.float()), wanted) > 5e-3
    assert made.product(torch.ones(20, HIDDEN, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS, FEW_ROWS + 1])
def test_one_token_reads_the_codes_as_they_are(rows: int, dtype: torch.dtype) -> None:
    table = normal(52, 32, seed=6).to(dtype)
    made = Vocabulary(build_dense(nn.Linear, table, None), ProductChoice("weight_only"))
    x, out = normal(rows, 32, seed=7).to(dtype), torch.empty(rows, 52, dtype=dtype)
    assert made.product(x, out=out) is out
    assert relative_error(out, x.double() @ made.dense_weight(torch.float64).T) < 2**-7
    peak = measure_peak_memory(lambda: made.product(x, out=out)).peak_bytes
    assert peak < 52 * 32 or rows > 1  # no restored row, only products of this one


def modules(tied: bool = True) -> nn.ModuleDict:
    model = nn.ModuleDict({"embedding": nn.Embedding(20, HIDDEN, padding_idx=1), "head": nn.Linear(HIDDEN, 20)})
    if tied:
        model["head"].weight = model["embedding"].weight
    return model


def hold(model: Any) -> None:
    weights = {id(module.weight): module.weight for module in model.values()}
    hold_rounded(
        model,
        [
            (w, Vocabulary(build_dense(nn.Linear, w.detach(), None), ProductChoice("restored")))
            for w in weights.values()
        ],
    )


@pytest.mark.parametrize("tied", [True, False])
def test_modules_stay_and_share_what_they_shared(tied: bool) -> None:
    model = modules(tied)
    embedding, head = model.values()
    dense = [module.weight.detach().clone() for module in (embedding, head)]
    hold(model)
    assert (model["embedding"], model["head"]) == (embedding, head)
    assert type(embedding) is nn.Embedding and type(head) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["head.bias"]
    assert (embedding.weight.vocabulary is head.weight.vocabulary) == tied
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == tied
    tokens, x = torch.tensor([[3, 1], [0, 19]]), normal(2, 3, HIDDEN, seed=4, dtype=torch.float32).requires_grad_()
    assert relative_error(embedding(tokens), F.embedding(tokens, dense[0])) < 0.01
    y = head(x)
    wanted = F.linear(x, dense[1], head.bias)
    assert relative_error(y, wanted) < 0.02
    (found,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(found, torch.autograd.grad(wanted.sum(), x)[0]) < 0.02
    values = head.weight.multiplied_out()
    restore_vocabulary(model)
    assert (embedding.weight is head.weight) == tied and type(head.weight) is nn.Parameter
    assert torch.equal(head.weight, values) and not head.weight.requires_grad
    assert [name for name, _ in model.named_children()] == ["embedding", "head"]
    assert "weight" not in vars(head) and not list(head.children())


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_is_one_of_its_own(how: str) -> None:
    model = modules()
    hold(model)
    twin = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    twin["embedding"].weight.mul_(2.0)
    tokens = torch.arange(20)
    assert torch.allclose(twin["embedding"](tokens), 2 * model["embedding"](tokens))
    assert twin["head"].weight.vocabulary is twin["embedding"].weight.vocabulary is twin["head"].vocabulary


def test_the_stand_in_follows_the_model() -> None:
    model = modules()
    hold(model)
    weight = model["head"].weight
    assert isinstance(weight, VocabularyWeight)
    assert (weight.shape, weight.dtype, weight.device.type, len(weight)) == ((20, HIDDEN), torch.float32, "cpu", 20)
    model.bfloat16()
    assert weight.dtype == torch.bfloat16 and model["embedding"](torch.tensor([1])).dtype == torch.bfloat16
    assert weight.vocabulary.scale.dtype == torch.float32
    assert torch.equal(weight.float(), weight.vocabulary.dense_weight().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()["head"](torch.ones(2, HIDDEN)).dtype == torch.bfloat16
    model.to("meta")
    assert weight.is_meta
    with pytest.raises(AttributeError, match="would be lost"):
        weight.fill_(0)


@pytest.mark.parametrize(
    "index",
    [
        3,
        -1,
        slice(3, 9),
        slice(None, None, 4),
        torch.tensor([[3, 1], [0, 3]]),
        torch.arange(20) % 3 == 0,
        torch.tensor(True),
        (slice(2, 7), slice(1, None, 2)),
        (4, slice(5)),
        (4, 7),
        (torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])),
        (..., 2),
        None,
        [5, 6],
    ],
    ids=str,
)
def test_parts_of_the_table_are_those_of_all_of_it(index: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        made = vocabulary(20, 8, dtype=dtype)
        found, wanted = VocabularyWeight(made)[index], made.dense_weight()[index]
        assert type(found) is Tensor and found.dtype == dtype and torch.equal(found, wanted)


def test_what_goes_past_the_functions_of_torch_gets_the_table() -> None:
    made = vocabulary(20, 8)
    x = normal(3, HIDDEN, seed=9, dtype=torch.float32)
    with torch._C.DisableTorchFunctionSubclass():
        found = F.linear(x, VocabularyWeight(made))
    assert torch.equal(found, F.linear(x, made.dense_weight()))


def test_rows_are_restored_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = VocabularyWeight(vocabulary(20, 8))
    monkeypatch.setattr(Vocabulary, "dense_weight", None)
    assert weight[3:9].shape == (6, HIDDEN) and weight[torch.tensor([1, 1]), 2:4].shape == (2, 2)


def test_autograd_takes_the_stand_in_for_a_tensor() -> None:
    """Functions of others, TRL's for one, are given the head's weight, keep it for backward and read it in parts."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return torch.cat([x @ weight[start : start + 6].t() for start in range(0, 20, 6)], 1)

        @staticmethod
        def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None]:
            (weight,) = ctx.saved_tensors
            assert isinstance(weight, VocabularyWeight) and not any(ctx.needs_input_grad[1:])
            return dY @ weight, None

    made = vocabulary(20, 9)
    x = normal(5, HIDDEN, seed=10, dtype=torch.float32).requires_grad_()
    dY = normal(5, 20, seed=11, dtype=torch.float32)
    y = Product.apply(x, VocabularyWeight(made))
    (found,) = torch.autograd.grad(y, x, dY)
    assert torch.allclose(y, x @ made.dense_weight().t(), atol=1e-6) and torch.equal(found, dY @ made.dense_weight())


def test_what_the_stand_in_says_of_itself() -> None:
    weight = VocabularyWeight(vocabulary(20, 8))
    assert isinstance(weight, Tensor) and isinstance(weight, StandIn) and not isinstance(weight, nn.Parameter)
    assert repr(weight) == "VocabularyWeight(shape=(20, 12), dtype=torch.float32, device='cpu')"
    assert weight.untyped_storage().nbytes() == 20 * HIDDEN  # of the codes, which others count anyway
    assert weight in {weight} and not weight.requires_grad and weight.grad is None and weight.is_leaf
    weight.requires_grad = False
    weight.requires_grad_(False)
    for change in (
        lambda: setattr(weight, "requires_grad", True),
        lambda: weight.requires_grad_(),
        lambda: setattr(weight, "data", torch.zeros(20, HIDDEN)),
        lambda: weight.__setitem__(0, 0.0),
        lambda: weight.__iadd__(1),
        lambda: weight.mul_(torch.ones(HIDDEN)),
        lambda: nn.init.zeros_(weight),
        lambda: torch.add(torch.ones(20, HIDDEN), 1, out=weight),
    ):
        with pytest.raises(AttributeError, match="would be lost"):
            change()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_that_of_the_dense_weight(dtype: torch.dtype, bias: bool) -> None:
    made = vocabulary(50, 5, dtype=dtype)
    hidden = normal(3, 7, HIDDEN, seed=6).to(dtype).requires_grad_()
    labels = torch.randint(50, (3, 7))
    labels[0, :3] = -100
    offset = normal(50, seed=7).to(dtype) if bias else None

    def run(weight: Any, hidden: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = chunked_cross_entropy(hidden, weight, offset, labels, chunk_rows=4)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    found = run(VocabularyWeight(made), hidden, offset)
    exact = hidden.detach().double().requires_grad_()
    wanted = run(made.dense_weight(torch.float64), exact, None if offset is None else offset.double())
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_float16_is_not_left_by_codes() -> None:
    torch.manual_seed(0)
    table = 0.02 * torch.randn(100, 256)
    h = 10 * torch.randn(3, 256)
    table[7] = 200 * h[0] / h[0].norm() ** 2
    vocabulary = Vocabulary(build_dense(nn.Linear, table.half(), None))
    dense, dY = vocabulary.dense_weight(torch.float64), torch.full((3, 100), 1e-6, dtype=torch.float16)
    assert relative_error(vocabulary.product(h.half()).double(), h.half().double() @ dense.T) < 0.01
    assert relative_error(vocabulary.transposed_product(dY).double(), dY.double() @ dense) < 0.1
