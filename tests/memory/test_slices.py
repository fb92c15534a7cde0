"""Blocks that run over a few samples at a time."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, Architecture
from torch import Tensor, nn

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import BatchSlices, BlockRecomputation, RecomputedBlocks, SlicedBlocks
from wasi_peft.memory.pieces import _judge
from wasi_peft.memory.trials import _NothingRandom
from wasi_peft.memory.wrapping import Around, Forward
from wasi_peft.models.structure import Structure


def in_slices(run: Any, rows: int) -> Any:
    """What runs a block in slices, each by `run`."""
    slices = BatchSlices(rows)

    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return slices(Around(run, Forward(block)), *args, **kwargs)

    return call


class Block(nn.Module):
    """What a transformer block may do with its arguments; notes how many samples each call that counts had."""

    def __init__(self, mixes: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mixes = mixes
        self.samples: list[int] = []
        if mixes == "batch norm":
            self.norm = nn.BatchNorm1d(4)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, table: Any = None, cache: Any = None) -> Any:
        if torch.is_grad_enabled():  # not while it is judged
            self.samples.append(len(hidden))
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
    block = Block(mixes)
    hidden = torch.randn(samples, 3, 4, requires_grad=True)
    mask, table = torch.rand(samples, 1, 1), (torch.randn(3, 4), None)
    whole = block(hidden, mask, table=table)
    block.samples.clear()
    sliced = BatchSlices(rows=6)(block, hidden, mask, table=table)
    assert sum(block.samples) == samples and max(block.samples) <= 2
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
    block, hidden = Block(mixes), torch.randn(6, 3, 4)
    twin = copy.deepcopy(block)
    assert torch.equal(BatchSlices(rows=6)(block, hidden), twin(hidden))
    assert block.samples == [6]
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in block.state_dict().items())


def test_a_table_as_long_as_the_batch_is_not_taken_for_samples() -> None:
    """Its first dimension is the batch's by accident; slices of it would be added to the wrong tokens, or fail."""
    block = Block()
    hidden, table = torch.randn(6, 6, 4), (torch.randn(6, 4),)
    assert torch.equal(BatchSlices(rows=12)(block, hidden, table=table), copy.deepcopy(block)(hidden, table=table))
    assert block.samples == [6]


@pytest.mark.parametrize(
    "reason", ["cache", "hook", "inner hook", "inner pre-hook", "no grad", "one sample", "few rows", "two dimensions"]
)
def test_what_is_called_whole(reason: str) -> None:
    block = Block()
    hidden = torch.randn(1 if reason == "one sample" else 6, 3, 4)
    hidden = hidden[:, 0] if reason == "two dimensions" else hidden
    kwargs = {"cache": object()} if reason == "cache" else {}
    lengths: list[int] = []
    if reason == "hook":
        block.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    if reason == "inner hook":
        block.linear.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    if reason == "inner pre-hook":
        block.linear.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    with torch.set_grad_enabled(reason != "no grad"):
        out = BatchSlices(rows=18 if reason == "few rows" else 6)(block, hidden, **kwargs)
    assert block.samples == ([] if reason == "no grad" else [len(hidden)])
    assert "hook" not in reason or lengths == [6]
    assert torch.equal(out, block(hidden))


def test_no_module_is_called_whole() -> None:
    block, hidden = Block(), torch.randn(6, 3, 4)
    BatchSlices(rows=6)(lambda x: block(x), hidden)
    assert block.samples == [6]


def test_the_comparison_happens_once_for_a_block_and_form_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from wasi_peft.memory import pieces

    judged: list[nn.Module] = []
    monkeypatch.setattr(pieces, "_judge", lambda block, *args: judged.append(block) or _judge(block, *args))
    block, other, hidden = Block(), Block(), torch.randn(4, 3, 4)
    slices = BatchSlices(rows=6)
    slices(block, hidden)
    slices(block, torch.randn(6, 3, 4))
    assert judged == [block] and block.training and block.linear.training
    slices(other, hidden)
    slices(block, hidden, torch.ones(4, 1, 1))
    slices(block.eval(), hidden)
    assert judged == [block, other, block, block]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(slices)))
    assert copied.rows == 6 and not copied._verdicts


class Meets(nn.Module):
    """Learns the sum of the first batch that reaches it."""

    meets_next_batch = True
    meeting: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.learnt: list[Tensor] = []

    def learn(self, total: Tensor) -> None:
        self.learnt.append(total)
        self.meets_next_batch = False

    def forward(self, hidden: Tensor) -> Tensor:
        self.lengths.append(len(hidden))
        if self.meets_next_batch and self.meeting is None:
            self.learn(hidden.sum())
        elif self.meets_next_batch:
            self.meeting.add(self, hidden.sum(), self.learn)
        return hidden


def block_that_meets() -> tuple[Block, Meets]:
    block, meets = Block(), Meets()
    block.linear, block.unreached = nn.Sequential(meets, block.linear), Meets()
    return block, meets


def test_parts_that_have_met_no_batch_meet_the_whole_one() -> None:
    (block, meets), hidden = block_that_meets(), torch.randn(6, 3, 4)
    slices = BatchSlices(rows=6)
    slices(block, hidden)
    assert meets.lengths == [*[2, 1, 1] * 2, *[2, 2, 2] * 2]  # judged on two samples, met, computed
    meets.lengths.clear()
    slices(block, hidden)
    assert meets.lengths == [2, 2, 2]
    meets.lengths.clear()
    meets.meets_next_batch = True  # after the verdict, as parts of a second adapter
    slices(block, hidden)
    assert meets.lengths == [2, 2, 2] * 2
    assert len(meets.learnt) == 2 and meets.meeting is None
    for learnt in meets.learnt:
        torch.testing.assert_close(learnt, hidden.sum())


def test_blocks_that_are_known_to_treat_samples_apart_never_see_a_whole_batch() -> None:
    (block, meets), hidden = block_that_meets(), torch.randn(6, 3, 4)
    slices = BatchSlices(rows=6, apart=True)
    torch.testing.assert_close(slices(block, hidden), block(hidden))
    assert meets.lengths == [2, *[2, 2, 2] * 2, 6]
    torch.testing.assert_close(meets.learnt, [hidden.sum()])
    assert pickle.loads(pickle.dumps(slices)).apart


def test_a_first_batch_that_fails_on_its_way_is_not_met() -> None:
    class Fails(nn.Module):
        calls = 0

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:  # judged on one slice, then in the second one that is met
                raise ZeroDivisionError
            return hidden

    (block, meets), hidden = block_that_meets(), torch.randn(6, 3, 4)
    block.linear.append(Fails())
    slices = BatchSlices(rows=6, apart=True)
    with pytest.raises(ZeroDivisionError):
        slices(block, hidden)
    assert meets.meets_next_batch and meets.meeting is None and not meets.learnt
    slices(block, hidden)
    torch.testing.assert_close(meets.learnt, [hidden.sum()])


def drop(**options: Any) -> Any:
    return lambda hidden: F.dropout(hidden, **options)


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (drop(p=0.1, training=True), True),
        (drop(p=0.0, training=True), False),
        (drop(p=0.1, training=False), False),
        (drop(), True),
        (lambda hidden: torch.dropout(hidden, 0.1, True), True),
        (lambda hidden: torch.dropout(hidden, 0.1, False), False),
        (lambda hidden: F.alpha_dropout(hidden, 0.1), False),
        (lambda hidden: F.alpha_dropout(hidden, 0.1, True), True),
        (lambda hidden: F.scaled_dot_product_attention(hidden, hidden, hidden, None, 0.1), True),
        (lambda hidden: F.scaled_dot_product_attention(hidden, hidden, hidden, dropout_p=0.0), False),
        (lambda hidden: hidden * (torch.rand(len(hidden), 1, 1) < 0.9), True),
        (lambda hidden: hidden * hidden.new_empty(len(hidden), 1, 1).bernoulli_(0.9), True),
        (lambda hidden: hidden, False),
    ],
)
def test_without_gradients_only_blocks_that_draw_are_sliced(function: Any, draws: bool) -> None:
    """Where they run again in backward, in slices, they have to draw the same numbers."""

    lengths: list[int] = []

    class Drawing(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            lengths.append(len(hidden))
            return super().forward(function(hidden))

    def run() -> list[int]:
        lengths.clear()
        slices(block, hidden)
        return lengths

    block, hidden = Drawing(), torch.randn(6, 3, 4)
    slices = BatchSlices(rows=6)
    with torch.no_grad():
        run()  # judged
        assert run() == ([2, 2, 2] if draws else [6])
        block.eval()
        assert run() == [6]
    block.train()
    assert run() == [2, 2, 2]


@pytest.mark.parametrize(("change", "sliced"), [(0.02, True), (0.04, False)])
def test_what_rounding_changes_is_tolerated(change: float, sliced: bool) -> None:
    """Rounded layers of SmolLM2 answer slices differently by up to 0.017."""

    class Rounding(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * (1 + change if len(hidden) == 2 else 1)

    block = Rounding()
    BatchSlices(rows=6)(block, torch.randn(6, 3, 4))
    assert block.samples == ([2, 2, 2] if sliced else [6])


def test_judging_draws_no_random_numbers() -> None:
    class Jittered(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + (0 if torch.is_grad_enabled() else 1e-6 * torch.randn(()))

    block, hidden = Jittered(), torch.randn(4, 3, 4)
    before = torch.get_rng_state()
    BatchSlices(rows=6)(block, hidden)
    assert block.samples == [2, 2]
    assert torch.equal(before, torch.get_rng_state())


def test_verdicts_are_those_of_the_block_and_not_of_its_class() -> None:
    """An ordinary Sequential first, then one that mixes samples."""

    class Centered(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden - hidden.mean(0, keepdim=True)

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), part) for part in (nn.GELU(), Centered())])
    hidden = torch.randn(6, 3, 4)
    expected = model.layers[1](model.layers[0](hidden))
    SlicedBlocks(rows=6).install(model)
    assert torch.allclose(model.layers[1](model.layers[0](hidden)), expected, atol=1e-6)


class Noisy(nn.Module):
    """Dropout in all its forms."""

    def __init__(self, centered_in: str = "") -> None:
        super().__init__()
        self.linear, self.dropout, self.centered_in = nn.Linear(4, 4), nn.Dropout(0.5), centered_in
        self.samples: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.samples.append(len(hidden))
        x = self.dropout(self.linear(hidden))
        x = torch.nn.functional.dropout(x, 0.3, self.training)
        x = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.3)[:, 0]
        if self.training:  # stochastic depth, in both common forms
            x = x * torch.floor(0.9 + torch.rand(len(x), 1, 1)) / 0.9
            x = x * x.new_empty(len(x), 1, 1).bernoulli_(0.9)
        mode = "training" if self.training else "evaluation"
        return x - x.mean(0, keepdim=True) if self.centered_in == mode else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("centered_in", ["", "training", "evaluation"])
def test_a_block_is_judged_in_its_own_mode_and_dropout_does_not_matter(centered_in: str, training: bool) -> None:
    block = Noisy(centered_in).train(training)
    BatchSlices(rows=6)(block, torch.randn(6, 3, 4))
    assert block.samples == ([6] if centered_in == ("training" if training else "evaluation") else [2, 2, 2])


def test_nothing_is_random_while_judging() -> None:
    block, hidden = Noisy(), torch.randn(6, 3, 4)
    with _NothingRandom():
        first, second = block(hidden), block(hidden)
    assert torch.equal(first, second) and not torch.equal(first, block(hidden))


def test_a_tensor_that_holds_the_batch_times_something_is_looked_at() -> None:
    """Such as a bias of shape (batch * heads, n, n), which is not cut; without it the block can be sliced."""

    class Biased(Block):
        def forward(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
            out = super().forward(hidden)
            return out if bias is None else out + bias.view(len(bias) // 2, 2, 3, 3).sum((1, 3))[: len(out), :, None]

    block, hidden, bias = Biased(), torch.randn(6, 3, 4), torch.randn(12, 3, 3)
    slices = BatchSlices(rows=6)
    slices(block, hidden)
    assert block.samples == [2, 2, 2]
    assert torch.equal(slices(block, hidden, bias), copy.deepcopy(block)(hidden, bias))


def test_experts_with_a_capacity_are_never_sliced() -> None:
    """Also where the first batch does not fill them."""

    class Capacity(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            rows = super().forward(hidden).flatten(0, 1)
            expert = rows[:, 0] > 0
            place = torch.where(expert, expert.cumsum(0), (~expert).cumsum(0))
            return (rows * (place <= 12)[:, None]).view_as(hidden)

    block = Capacity()
    nn.init.eye_(block.linear.weight)
    nn.init.zeros_(block.linear.bias)
    hidden = torch.randn(6, 3, 4)
    hidden[:, :, 0] = torch.tensor([1.0, -1.0, 1.0]) * torch.tensor([1.0, -1.0] * 3)[:, None]  # 9 tokens each
    BatchSlices(rows=6)(block, hidden)
    assert block.samples == [6]


def test_a_block_that_chooses_is_judged_on_the_whole_batch() -> None:
    """What its experts have room for may be more than the tokens of two slices and less than those of a batch."""
    lengths: list[int] = []

    class Roomy(Block):
        room = 14

        def forward(self, hidden: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                lengths.append(len(hidden))
            rows = super().forward(hidden).flatten(0, 1)
            place = torch.ones(len(rows)).cumsum(0)
            return (rows * (place <= self.room)[:, None]).view_as(hidden)

    block, plain, hidden = Roomy(), Block(), torch.randn(8, 3, 4)
    BatchSlices(rows=6)(block, hidden)
    assert max(lengths) == 8 and block.samples == [8]
    block.room = 24
    BatchSlices(rows=6)(block, hidden)
    assert block.samples == [8, 2, 2, 2, 2]
    BatchSlices(rows=6)(plain, hidden)
    assert plain.samples == [2, 2, 2, 2]


class Windowed(Block):
    """Places a bias by a table of its own, as Swin does, or by a copy of it that was written to."""

    lengths: tuple[int, ...] = ()

    def __init__(self, routes: bool) -> None:
        super().__init__()
        self.routes = routes
        self.bias = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("places", torch.tensor([[0, 3, 1]]))

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.lengths += (len(hidden),)
        places = self.places.view(-1).clone()
        if self.routes:
            places.view(3)[:] = (hidden[0, :, 0] > 0).long()
        return super().forward(hidden) + 0 * self.bias[places]


def test_a_table_of_its_own_is_no_choice() -> None:
    hidden = torch.randn(8, 3, 4)
    for routes in (False, True):
        block = Windowed(routes)
        BatchSlices(rows=6)(block, hidden)
        assert block.samples == [2, 2, 2, 2]
        assert max(block.lengths) == (8 if routes else 2)


def test_samples_that_are_alike_hide_no_block_that_mixes_them() -> None:
    """Such as answers to one prompt."""
    block, hidden = Block("samples"), torch.randn(1, 3, 4).expand(8, 3, 4).clone()
    BatchSlices(rows=6)(block, hidden)
    assert block.samples == [8]


def test_samples_from_all_over_the_batch_are_looked_at() -> None:
    block, hidden = Block(), torch.zeros(9, 3, 4)
    seen: list[float] = []
    block.linear.forward = lambda x: seen.extend(x[:, 0, 0].tolist()) or x  # type: ignore[method-assign]
    hidden[:, 0, 0] = torch.arange(1.0, 10)
    BatchSlices(rows=6)(block, hidden)
    assert 1.0 in seen and 18.0 in seen[:3]  # two slices of three, the last one times two


def test_too_little_memory_says_nothing_about_a_block() -> None:
    class Starved(Block):
        starved = True

        def forward(self, hidden: Tensor) -> Tensor:
            if self.starved:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(hidden)

    block, hidden, slices = Starved(), torch.randn(6, 3, 4), BatchSlices(rows=6)
    with pytest.raises(torch.OutOfMemoryError):
        slices(block, hidden)
    block.starved = False
    slices(block, hidden)
    assert block.samples == [2, 2, 2]


ROUTING: dict[str, Any] = {
    "max": lambda x: x.max(-1),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "topk": lambda x: x.topk(1),
    "cumsum_": lambda x: x.cumsum_(0),
    "multinomial": lambda x: torch.multinomial(x.abs() + 1, 1),
    "scatter": lambda x: x.scatter(1, x.argmax(1, keepdim=True), 0.0),
}


@pytest.mark.parametrize("name", ROUTING)
def test_operations_that_choose_are_known(name: str) -> None:
    with _NothingRandom() as watch:
        ROUTING[name](torch.randn(3, 4))
    assert watch.chose


@pytest.mark.parametrize(
    "function",
    [lambda x: x.max(), lambda x: torch.max(x, x), lambda x: torch.where(x > 0, x, x), lambda x: x[:, None, ..., 0]],
)
def test_operations_of_ordinary_blocks_choose_nothing(function: Any) -> None:
    with _NothingRandom() as watch:
        function(torch.randn(3, 4).softmax(-1).masked_fill(torch.ones(3, 4).bool(), 0.0))
    assert not watch.chose


def test_running_statistics_are_kept_once() -> None:
    """A buffer that changes in a forward pass would change once for every slice, and while judging."""

    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(hidden)

    block = Counting()
    BatchSlices(rows=6)(block, torch.randn(6, 3, 4))
    assert block.calls == 1 and block.samples == [6]


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_rows_must_be_a_positive_integer(rows: Any) -> None:
    for make in (BatchSlices, SlicedBlocks):
        with pytest.raises(ValueError, match=rf"rows must be an integer of at least 1, got {rows}"):
            make(rows)
    with pytest.raises(ValueError, match=rf"mlp_rows must be an integer of at least 1, got {rows}"):
        SlicedBlocks(mlp_rows=rows)


def test_a_failure_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        BatchSlices(rows=6)(Block(), torch.randn(4, 3, 5))


# -------------------------------------------------------------------------------- models


@pytest.mark.parametrize("rows", [{"rows": 1}, {"rows": 10**6, "mlp_rows": 1}])
def test_models_give_the_same_gradients_in_slices(architecture: Architecture, rows: dict[str, int]) -> None:
    model, batch = architecture.model(), architecture.batch()
    loss, exact = gradients(model, batch)
    SlicedBlocks(**rows).install(model)
    assert "forward" in vars(model.get_submodule(next(iter(Structure(model).stages))))
    sliced_loss, sliced = gradients(model, batch)
    assert torch.allclose(loss, sliced_loss, atol=1e-6)
    for name, grad in exact.items():
        assert torch.allclose(sliced[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-7), name
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(gradients(copied, batch)[0], sliced_loss)
    SlicedBlocks().remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(gradients(model, batch)[0], loss)


def test_a_forward_that_was_replaced_is_called_and_comes_back() -> None:
    """As accelerate replaces it, to move the arguments between devices."""
    model, batch = ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch(6)
    block = model.get_submodule("vit.layers.1")
    original, lengths = block.forward, []

    def moved(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(len(hidden))
        return original(hidden, *args, **kwargs)

    block.forward = moved
    SlicedBlocks(rows=1).install(model)
    RecomputedBlocks().install(model)
    gradients(model, batch)
    assert lengths[-6:] == [1] * 6
    for technique in (SlicedBlocks, RecomputedBlocks):
        technique().remove(model)
    assert block.forward is moved
    assert [name for name, part in model.named_modules() if "forward" in part.__dict__] == ["vit.layers.1"]


def test_mlps_take_slices_of_their_own() -> None:
    architecture = ARCHITECTURES["vit"]
    model, batch = architecture.model(), architecture.batch(8)
    counts: dict[str, list[int]] = {"attention": [], "mlp": []}
    block = model.get_submodule("vit.layers.0")
    for name, linears in counts.items():
        layer = next(m for n, m in block.named_modules() if isinstance(m, nn.Linear) and name in n)
        forward = layer.forward
        layer.forward = lambda x, forward=forward, seen=linears: seen.append(len(x)) or forward(x)
    tokens = model.vit(batch["pixel_values"]).last_hidden_state.shape[1]
    SlicedBlocks(rows=4 * tokens, mlp_rows=tokens).install(model)
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
    RecomputedBlocks(kind).install(model)
    loss, whole = gradients(model, batch)
    SlicedBlocks(rows=1, drop_caches=True).install(model)
    sliced_loss, sliced = gradients(model, batch)
    assert torch.allclose(loss, sliced_loss, atol=1e-6)
    tolerance = {"exact": 1e-5, "int8": 0.05}[kind]  # groups of 64 values are others in a slice
    for name, grad in whole.items():
        assert float((sliced[name] - grad).norm()) <= tolerance * float(grad.norm()) + 1e-7, name
    assert kind == "exact" or any(not torch.equal(sliced[name], grad) for name, grad in whole.items())


def test_dropout_is_replayed_slice_by_slice() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x = torch.randn(6, 3, 4, requires_grad=True)
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(BatchSlices(rows=6)(block, x).sum(), x)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(in_slices(BlockRecomputation(), rows=6)(block, x).sum(), x)
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

    whole, sliced = peak(BlockRecomputation()), peak(in_slices(BlockRecomputation(), rows=256))
    assert whole > 2 * wide > 1.5 * wide > sliced
