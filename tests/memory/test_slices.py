"""Blocks that run over a few samples at a time."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture
from torch import Tensor, nn

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import slices
from wasi_peft.memory.recompute import BlockRecomputation, recompute_blocks, stop_recomputation
from wasi_peft.memory.slices import BatchSlices, slice_blocks, unslice_blocks


@pytest.fixture(autouse=True)
def _fresh_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_verdicts", {})


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Recorder:
    """Calls blocks and notes how many samples each call had."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.samples.append(len(args[0]))
        return function(*args, **kwargs)


class Block(nn.Module):
    """What a transformer block may do with its arguments."""

    def __init__(self, mixes: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mixes = mixes
        if mixes == "batch norm":
            self.norm = nn.BatchNorm1d(4)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, table: Any = None, cache: Any = None) -> Any:
        out = self.linear(hidden)
        if mask is not None:
            out = out * mask
        if table is not None:
            out = out + table[0]
        if self.mixes == "batch norm":
            out = self.norm(out.flatten(0, 1)).view_as(out)
        if self.mixes == "samples":
            out = out - out.mean(0, keepdim=True)
        return (out, None) if self.mixes == "tuple" else out


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixes", ["", "tuple"])
@pytest.mark.parametrize("samples", [2, 5, 6])
def test_same_result_in_slices(samples: int, mixes: str) -> None:
    block, recorder = Block(mixes), Recorder()
    hidden = torch.randn(samples, 3, 4, requires_grad=True)
    mask, table = torch.rand(samples, 1, 1), (torch.randn(3, 4), None)
    whole = block(hidden, mask, table=table)
    sliced = BatchSlices(recorder, rows=6)(block, hidden, mask, table=table)
    assert sum(recorder.samples) == samples and max(recorder.samples) <= 2
    if mixes == "tuple":
        assert sliced[1] is None
        whole, sliced = whole[0], sliced[0]
    assert torch.allclose(whole, sliced)
    weight = torch.randn_like(whole)
    parts = (hidden, block.linear.weight)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parts) for out in (sliced, whole))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mixes", ["samples", "batch norm"])
def test_a_block_whose_samples_meet_is_not_sliced(mixes: str) -> None:
    block, recorder = Block(mixes), Recorder()
    state = copy.deepcopy(block.state_dict())
    hidden = torch.randn(6, 3, 4)
    assert torch.equal(BatchSlices(recorder, rows=6)(block, hidden), copy.deepcopy(block)(hidden))
    assert recorder.samples == [6]
    assert mixes == "batch norm" or all(torch.equal(state[key], value) for key, value in block.state_dict().items())


def test_a_table_as_long_as_the_batch_is_not_taken_for_samples() -> None:
    """Its first dimension is the batch's by accident; slices of it would be added to the wrong tokens, or fail."""
    block, recorder = Block(), Recorder()
    hidden, table = torch.randn(6, 6, 4), (torch.randn(6, 4),)
    assert torch.equal(BatchSlices(recorder, rows=12)(block, hidden, table=table), block(hidden, table=table))
    assert recorder.samples == [6]


@pytest.mark.parametrize(
    "reason", ["cache", "hook", "no grad", "one sample", "few rows", "two dimensions", "no module"]
)
def test_what_is_called_whole(reason: str) -> None:
    block, recorder = Block(), Recorder()
    hidden = torch.randn(1 if reason == "one sample" else 6, 3, 4)
    hidden = hidden[:, 0] if reason == "two dimensions" else hidden
    kwargs = {"cache": object()} if reason == "cache" else {}
    if reason == "hook":
        block.register_forward_hook(lambda module, args, output: None)
    function = (lambda x: block(x)) if reason == "no module" else block
    with torch.set_grad_enabled(reason != "no grad"):
        out = BatchSlices(recorder, rows=18 if reason == "few rows" else 6)(function, hidden, **kwargs)
    assert recorder.samples == [len(hidden)]
    assert torch.equal(out, block(hidden))


def test_the_comparison_happens_once_for_a_class_and_leaves_no_trace() -> None:
    block, other, recorder = Block(), Block(), Recorder()
    calls = []
    block.linear.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(4, 3, 4)
    before = torch.get_rng_state()
    run = BatchSlices(recorder, rows=6)
    run(block, hidden)
    assert len(calls) == 1 + 2 + 2 and block.training and block.linear.training
    run(block, hidden)
    run(other, hidden)
    assert len(calls) == 1 + 2 + 2 + 2
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_rows_must_be_a_positive_integer(rows: Any) -> None:
    with pytest.raises(ValueError, match=rf"rows must be an integer of at least 1, got {rows}"):
        BatchSlices(call, rows)
    with pytest.raises(ValueError, match="rows must be"):
        slice_blocks(ARCHITECTURES["vit"].model(), rows)
    model = ARCHITECTURES["vit"].model()
    with pytest.raises(ValueError, match=rf"rows must be an integer of at least 1, got {rows}"):
        slice_blocks(model, mlp_rows=rows)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_failure_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        BatchSlices(call, rows=6)(Block(), torch.randn(4, 3, 5))


# -------------------------------------------------------------------------------- models


@pytest.mark.parametrize("rows", [{"rows": 1}, {"rows": 10**6, "mlp_rows": 1}])
def test_models_give_the_same_gradients_in_slices(architecture: Architecture, rows: dict[str, int]) -> None:
    model, batch = architecture.model(), architecture.batch()
    loss, exact = gradients(model, batch)
    names = slice_blocks(model, **rows)
    sliced_loss, sliced = gradients(model, batch)
    assert torch.allclose(loss, sliced_loss, atol=1e-6)
    for name, grad in exact.items():
        assert torch.allclose(sliced[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-7), name
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(gradients(copied, batch)[0], sliced_loss)
    unslice_blocks(model)
    assert names and not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(gradients(model, batch)[0], loss)


@pytest.mark.parametrize("name", ["vit.layers.1", "vit.layers.1.mlp"])
def test_a_replaced_forward_is_refused_before_anything_changes(name: str) -> None:
    model = ARCHITECTURES["vit"].model()
    module = model.get_submodule(name)
    module.forward = module.forward
    message = rf"{re.escape(name)}: its forward was replaced by .*, which must be undone first"
    with pytest.raises(ValueError, match=message):
        slice_blocks(model, mlp_rows=8)
    assert [each for each, part in model.named_modules() if "forward" in part.__dict__] == [name]


def test_mlps_take_slices_of_their_own() -> None:
    architecture = ARCHITECTURES["vit"]
    model, batch = architecture.model(), architecture.batch(8)
    counts: dict[str, list[int]] = {"attention": [], "mlp": []}
    block = model.get_submodule("vit.layers.0")
    for name, linears in counts.items():
        layer = next(m for n, m in block.named_modules() if isinstance(m, nn.Linear) and name in n)
        layer.register_forward_hook(lambda _, args, y, seen=linears: seen.append(len(args[0])))
    tokens = model.vit(batch["pixel_values"]).last_hidden_state.shape[1]
    slice_blocks(model, rows=4 * tokens, mlp_rows=tokens)
    model(**batch)  # the first call also compares answers whole and in slices
    for linears in counts.values():
        linears.clear()
    model(**batch)
    assert counts == {"attention": [4, 4], "mlp": [1] * 8}


@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_recomputed_blocks_in_slices(kind: str) -> None:
    architecture = ARCHITECTURES["llama"]
    model, batch = architecture.model(), architecture.batch(16)
    model.train()
    recompute_blocks(model, kind)
    loss, whole = gradients(model, batch)
    recompute_blocks(model, kind, slice_rows=1)
    assert isinstance(model.model.layers[0]._gradient_checkpointing_func, BatchSlices)
    sliced_loss, sliced = gradients(model, batch)
    assert torch.allclose(loss, sliced_loss, atol=1e-6)
    tolerance = {"exact": 1e-5, "int8": 0.05}[kind]  # groups of 64 values are others in a slice
    for name, grad in whole.items():
        assert float((sliced[name] - grad).norm()) <= tolerance * float(grad.norm()) + 1e-7, name
    assert stop_recomputation(model) and not model.is_gradient_checkpointing


def test_dropout_is_replayed_slice_by_slice() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x = torch.randn(6, 3, 4, requires_grad=True)
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(BatchSlices(call, rows=6)(block, x).sum(), x)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(BatchSlices(BlockRecomputation(), rows=6)(block, x).sum(), x)
    assert torch.equal(plain, again)


def test_peak_of_recomputed_blocks_falls() -> None:
    """Of a block with a wide MLP, the graph of a quarter of the batch is held instead of all of it."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.mlp(hidden)

    block, x = Wide(), torch.randn(16, 64, 8, requires_grad=True)
    wide = 16 * 64 * 256 * 4  # bytes of one intermediate tensor

    def peak(run: Any) -> int:
        run(block, x).sum().backward()  # the comparison, once
        return measure_peak_memory(lambda: run(block, x).sum().backward()).peak_bytes

    whole, sliced = peak(BlockRecomputation()), peak(BatchSlices(BlockRecomputation(), rows=256))
    assert whole > 2 * wide > 1.5 * wide > sliced
