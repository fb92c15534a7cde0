"""The state around compressed inputs: warm bases, sharing between layers, memory, and recovery after errors."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, checkpoint_activations
from peft import get_peft_model
from probes import Interrupted, fail, fail_in_backward, live_bytes, shared_inputs, trainable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import wasi_peft.tuner.inputs as inputs_module
import wasi_peft.updates.subspace as subspace_module
from wasi_peft import SubspaceSGD, WasiConfig, WasiLayer
from wasi_peft.linalg.tucker import Tucker, canonical
from wasi_peft.tuner.inputs import SharedInput, SharedInputs
from wasi_peft.tuner.layer import wasi_layers

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

WIDTH = 16
MODES = [["feature"], ["feature", "token"], ["feature", "token", "batch"]]
# first the usual batch, then everything that a data loader may come up with
SHAPES = [
    (8, 10), (3, 10), (8, 7), (8, 12), (1, 9), (8, 1), (1, 1), (20,), (1,), (9,), (4, 2, 3), (2, 11), (8, 10),
]  # fmt: skip


class ReadersOfOneInput(nn.Module):
    """Three layers that read one tensor, as q, k and v do, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 12) for _ in range(3))
        self.o = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))


def wrap(model: nn.Module, **options: Any) -> Any:
    """The model with a WASI adapter, in training mode."""
    options = {"weight_rank": 6, "activation_ranks": 4, "activation_interval": 1, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return get_peft_model(model, WasiConfig(**{"update": "subspace", **options})).train()


def readers(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return wrap(ReadersOfOneInput(), target_modules=["q", "k", "v", "o"], **options)


def architecture_model(name: str, **options: Any) -> Any:
    return wrap(ARCHITECTURES[name].model(), **options)


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=lr)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Same names; values equal bit for bit, or within the tolerance if one is given."""
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(actual[name], value), name


def bases(model: nn.Module) -> dict[str, Tensor]:
    """Every warm basis by layer and mode."""
    found = {}
    for name, layer in wasi_layers(model):
        for mode, basis in layer.wasi_input["default"].bases._asdict().items():
            if basis is not None:
                found[f"{name}.{mode}"] = basis.clone()
    return found


def low_rank_input(shape: tuple[int, ...], seed: int, rank: int = 4) -> Tensor:
    """Rows in one fixed subspace of dimension `rank`, so that keeping `rank` features loses nothing."""
    subspace = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(*shape, rank, generator=torch.Generator().manual_seed(seed)) @ subspace


class Recorder:
    """Stands in for a function of a module and keeps its arguments and results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], Any]] = []
        original: Callable[..., Any] = getattr(module, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.calls.append((args, result))
            return result

        monkeypatch.setattr(module, name, recorded)


# -------------------------------------------------------------------- shapes that change


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_gradients_belong_to_the_present_input_whatever_came_before(modes: list[str]) -> None:
    """The input has rank 4 and 4 features are kept, all tokens and samples: every gradient must be the exact one."""
    ranks = {mode: 4 if mode == "feature" else 100 for mode in modes}
    torch.manual_seed(0)
    only = wrap(
        nn.Sequential(nn.Linear(WIDTH, 12)), target_modules=["0"], activation_modes=modes, activation_ranks=ranks
    )
    torch.manual_seed(0)
    exact = wrap(
        nn.Sequential(nn.Linear(WIDTH, 12)), target_modules=["0"], activation_ranks=None, activation_threshold=None
    )
    steppers = sgd(only), sgd(exact)
    for step, shape in enumerate(SHAPES):
        x = low_rank_input(shape, seed=step)
        for model in (only, exact):
            model(x).square().mean().backward()
        assert_same(gradients(only), gradients(exact), rtol=1e-3, atol=2e-5)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("modes", MODES, ids="+".join)
@pytest.mark.parametrize("rule", ["threshold", "ranks"])
def test_bases_fit_the_input_after_every_change_of_shape(
    modes: list[str], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressions = Recorder(monkeypatch, inputs_module, "compress")
    limits = {
        "threshold": {"activation_threshold": 0.8, "activation_ranks": None},
        "ranks": {"activation_ranks": dict.fromkeys(modes, 3)},
    }[rule]
    model = readers(activation_modes=modes, **limits)
    optimizer = sgd(model)
    compressed = 0
    for step, shape in enumerate(SHAPES):
        x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(step))
        before = bases(model)
        compressions.calls.clear()
        model(x).square().mean().backward()
        assert all(bool(grad.isfinite().all()) for grad in gradients(model).values())
        for (rows, *_), result in compressions.calls:
            if result is None:
                continue
            compressed += 1
            samples, tokens, features = canonical(rows).shape
            tucker, state = result
            assert state.feature is not None and state.feature.shape[0] == features
            assert tucker.core.shape[2] == state.feature.shape[1]
            assert (state.token is not None) == ("token" in modes and tokens > 1)
            for basis, size in ((state.token, tokens), (tucker.batch, samples), (state.feature, features)):
                if basis is not None:
                    assert basis.shape[0] == size
                    identity = torch.eye(basis.shape[1])
                    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-5)
        if all(result is None for _, result in compressions.calls):
            assert_same({**bases(model), "": torch.zeros(1)}, {**before, "": torch.zeros(1)})
        optimizer.step()
        optimizer.zero_grad()
    assert compressed >= len(SHAPES) // 2  # the loop above did check something


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_varying_shapes_do_not_grow_memory(modes: list[str]) -> None:
    model = readers(activation_modes=modes, activation_threshold=0.8, activation_ranks=None)
    optimizer = sgd(model)
    measured = []
    for step in range(100):
        x = torch.randn(
            *SHAPES[step % len(SHAPES)], WIDTH, generator=torch.Generator().manual_seed(step % len(SHAPES))
        )
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        del x
        if step in (13, 52, 91):  # the same place in the round
            measured.append(live_bytes())
    assert len(measured) == 3 and len(set(measured)) == 1
    assert len(shared_inputs(model)) == 0


def test_an_empty_batch_is_harmless() -> None:
    """torch.nn.Linear takes zero rows; so must a training step, for instance of an expert that got no token."""
    for shape in ((0, WIDTH), (3, 0, WIDTH), (0, 5, WIDTH)):
        model = readers()
        model(torch.zeros(shape)).sum().backward()
        assert all(bool((grad == 0).all()) for grad in gradients(model).values())


def test_fixed_ranks_are_reached_after_a_tiny_batch() -> None:
    """A batch with few rows cannot fill the token basis; the next full batch must."""
    model = readers(activation_modes=["feature", "token"], activation_ranks={"feature": 2, "token": 6})
    for samples in (1, 8):
        model(torch.randn(samples, 10, WIDTH, generator=torch.Generator().manual_seed(samples)))
    assert bases(model)["base_model.model.q.token"].shape == (10, 6)


@pytest.mark.parametrize("interval", [1, 3])
def test_bases_move_once_in_an_interval_of_optimizer_steps(interval: int) -> None:
    """Two micro-batches a step; the basis may move in the first one of every `interval`-th step only."""
    model = readers(activation_interval=interval)
    optimizer = sgd(model)
    moved = []
    for seed in range(14):
        before = bases(model)
        model(torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        if before:
            after = bases(model)
            changed = {not torch.equal(after[name], before[name]) for name in before}
            assert len(changed) == 1
            moved.append(changed == {True})
        if seed % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    expected = [seed % 2 == 0 and seed // 2 % interval == 0 for seed in range(1, 14)]
    assert moved == expected


# -------------------------------------------------------------------- one copy for all readers


def test_readers_of_one_input_keep_one_compressed_copy() -> None:
    """Counted in the storages that autograd packs: one core and one basis for q, k and v together."""
    model = readers()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    inner = model.base_model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = inner.q(x), inner.k(x), inner.v(x)
    assert sum(kept.values()) == 4 * (8 * 10 * 4 + WIDTH * 4)
    del outputs


# distinct inputs of one forward pass: q/k/v (gate/up) read one, all cross-attentions of T5 read the encoder's output
DISTINCT_INPUTS = {"vit": 8, "bert": 8, "gpt2": 8, "llama": 8, "t5": 15}


@pytest.mark.parametrize("name", DISTINCT_INPUTS)
def test_one_compression_for_each_distinct_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressions = Recorder(monkeypatch, inputs_module, "compress")
    model = architecture_model(name)
    model(**ARCHITECTURES[name].batch(samples=8))
    assert len(compressions.calls) == DISTINCT_INPUTS[name]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("vit", ("q_proj", "k_proj", "v_proj")),
        ("bert", ("query", "key", "value")),
        ("llama", ("q_proj", "k_proj", "v_proj")),
        ("llama", ("gate_proj", "up_proj")),
    ],
)
def test_layers_that_read_one_tensor_get_the_same_object(
    name: str, group: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    products = Recorder(monkeypatch, subspace_module, "factored_linear")
    model = architecture_model(name)
    factor_names = {id(layer.wasi_form["default"].L): path for path, layer in wasi_layers(model)}
    model(**ARCHITECTURES[name].batch(samples=8))
    copies: dict[str, dict[str, Tucker]] = {}
    for (_, L, _, _, compressed, *_), _ in products.calls:
        parent, _, last = factor_names[id(L)].rpartition(".")
        copies.setdefault(parent, {})[last] = compressed
    groups = [[members[part] for part in group] for members in copies.values() if set(group) <= set(members)]
    assert len(groups) == 2  # blocks
    for first, *others in groups:
        assert isinstance(first, Tucker)
        assert all(other is first for other in others)


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "low_rank"}, {"activation_modes": MODES[2], "activation_ranks": dict.fromkeys(MODES[2], 3)}],
    ids=["subspace", "low_rank", "all modes"],
)
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "t5"])
def test_sharing_changes_no_bit(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, every reader has a basis of its own, which is that of the one that compresses for all."""

    def run() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        model = architecture_model(name, **options)
        optimizer = sgd(model, lr=0.05)
        losses = []
        for step in range(3):
            loss = model(**ARCHITECTURES[name].batch(samples=8, seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        values = {f"{n}.value": p.detach() for n, p in model.named_parameters()}
        return losses, {**gradients(model), **values}, bases(model)

    shared_losses, shared, shared_bases = run()
    monkeypatch.setattr(SharedInputs, "of", lambda inputs, x: SharedInput(x))
    alone_losses, alone, alone_bases = run()
    assert shared_losses == alone_losses
    assert_same(shared, alone)
    assert (len(shared_bases) < len(alone_bases)) == (name != "gpt2")  # where one layer makes q, k and v
    assert_same({key: alone_bases[key] for key in shared_bases}, shared_bases)


def test_input_changed_in_place_is_not_taken_for_the_old_one() -> None:
    def run(in_place: bool, **options: Any) -> dict[str, Tensor]:
        model = readers(**options)
        inner = model.base_model.model
        x = low_rank_input((8, 10), seed=1)
        first = inner.q(x)
        if in_place:
            x += low_rank_input((8, 10), seed=2)
        else:
            x = x + low_rank_input((8, 10), seed=2)
        (first.square().mean() + inner.k(x).square().mean()).backward()
        return gradients(model)

    exact = run(in_place=False, activation_ranks=None, activation_threshold=None)
    assert_same(run(in_place=True, activation_ranks=4), exact, rtol=1e-3, atol=1e-5)


def test_input_given_other_memory_is_not_taken_for_the_old_one() -> None:
    """By `.data`, which counts no version. (A change of the same memory by `.data` nobody can see.)"""

    def run(given: bool) -> dict[str, Tensor]:
        model = readers(activation_ranks=4)
        inner = model.base_model.model
        x, other = (low_rank_input((8, 10), seed=seed) for seed in (1, 2))
        first = inner.q(x)
        if given:
            x.data = other
        else:
            x = other
        (first.square().mean() + inner.k(x).square().mean()).backward()
        return gradients(model)

    assert_same(run(given=True), run(given=False))


def test_same_tensor_in_another_precision() -> None:
    """One input tensor that is first read in float32, then under autocast, then in float32 again."""
    model = readers()
    x = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert_same(gradients(model), expected, rtol=0.2, atol=0.05)
    model.zero_grad()
    model(x).square().mean().backward()
    assert_same(gradients(model), expected, rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------- memory


def test_forward_passes_without_backward_do_not_grow_memory() -> None:
    model = readers()
    measured = []
    for step in range(30):
        model(torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(step)))
        if step in (5, 15, 29):
            measured.append(live_bytes())
    assert len(measured) == 3 and len(set(measured)) == 1


@pytest.mark.parametrize("leaf", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_an_input_is_freed_after_its_step(leaf: bool, autocast: bool) -> None:
    """A leaf that requires gradients is what reentrant checkpointing hands to every block it recomputes."""
    model = readers()
    for step in range(3):
        x = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(step)).requires_grad_(leaf)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        loss.backward()
        del x, loss
    gc.collect()
    assert len(shared_inputs(model)) == 0


def test_a_kept_batch_takes_part_in_every_step() -> None:
    """Batches that are loaded once and kept: the basis still advances in each step, as for fresh copies of them."""

    def run(fresh: bool) -> dict[str, Tensor]:
        model = readers(activation_ranks=2)
        optimizer = sgd(model)
        batches = [torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        for step in range(4):
            x = batches[step % 2]
            model(x.clone() if fresh else x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return bases(model)

    assert_same(run(fresh=False), run(fresh=True))


# -------------------------------------------------------------------- non-reentrant checkpointing

CHECKPOINTED = {
    "rank": {"activation_ranks": 4},
    "threshold": {"activation_ranks": None, "activation_threshold": 0.8},
    "tokens": {"activation_ranks": {"feature": 4, "token": 3}, "activation_modes": ["feature", "token"]},
    "batch": {"activation_ranks": dict.fromkeys(MODES[2], 3), "activation_modes": MODES[2]},
}


@pytest.mark.parametrize("options", CHECKPOINTED)
@pytest.mark.parametrize("name", DISTINCT_INPUTS)
def test_nothing_is_compressed_in_a_pass_that_is_thrown_away(
    name: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once bases exist, each input is compressed once a step as in the plain run: same gradients, bases and moves."""

    def run(checkpointing: bool) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[list[bool]]]:
        model = architecture_model(name, activation_interval=2, **CHECKPOINTED[options])
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": False})
        optimizer = sgd(model)
        found, kept, advances = [], [], []
        for step in range(5):
            compressions = Recorder(monkeypatch, inputs_module, "compress")
            model(**ARCHITECTURES[name].batch(samples=8, seed=step)).loss.backward()
            monkeypatch.undo()
            advances.append(sorted(advance for (_, _, _, advance), _ in compressions.calls))
            found.append(gradients(model))
            kept.append(bases(model))
            optimizer.step()
            optimizer.zero_grad()
        return found, kept, advances

    plain, checkpointed = run(checkpointing=False), run(checkpointing=True)
    for step in range(5):
        assert_same(checkpointed[0][step], plain[0][step], rtol=1e-3, atol=1e-5)
        assert_same(checkpointed[1][step], plain[1][step], rtol=1e-3, atol=1e-4)
    assert len(checkpointed[2][0]) > len(plain[2][0])  # blocks are recomputed; the first pass made the bases
    once = plain[2][1:]
    assert [len(calls) for calls in once] == [DISTINCT_INPUTS[name]] * 4
    assert any(map(any, once)) and not all(map(any, once))
    if options != "batch":  # whose rank is known only by compressing
        assert checkpointed[2][1:] == once
    assert [sum(calls) for calls in checkpointed[2]] == [sum(calls) for calls in plain[2]]


def checkpointed_step(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    checkpoint(lambda x: model(1.5 * x), x, use_reentrant=False, **options).square().mean().backward()
    return gradients(model)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_input_without_a_subspace_is_recomputed_in_the_form_that_was_announced(bad: float) -> None:
    model = readers()
    optimizer = sgd(model)
    good = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    checkpointed_step(model, good)
    optimizer.step()  # the bases are due to move
    checkpointed_step(model, torch.full_like(good, bad))
    assert all(bool(basis.isfinite().all()) for basis in bases(model).values())
    assert all(bool(grad.isfinite().all()) for grad in checkpointed_step(model, good).values())


def test_operations_that_checkpointing_replays_are_the_same_in_both_passes() -> None:
    """A selective policy hands the second pass the results of the first one's products, in their order."""
    save_products = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    )
    x = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for options in ({}, {"context_fn": save_products}):
        model = readers(activation_interval=8)
        checkpointed_step(model, x)
        results.append(checkpointed_step(model, x, **options))
    assert_same(results[1], results[0])


# -------------------------------------------------------------------- the order of passes


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_two_forward_passes_before_one_backward(modes: list[str]) -> None:
    """What the first pass saved must survive the second one: same gradients as one pass after the other."""

    def run(together: bool) -> dict[str, Tensor]:
        model = readers(activation_modes=modes, activation_ranks=dict.fromkeys(modes, 3))
        optimizer = sgd(model)
        for step in range(2):  # the second time with warm bases
            optimizer.zero_grad()
            inputs = [
                torch.randn(6, 10, WIDTH, generator=torch.Generator().manual_seed(2 * step + part))
                for part in range(2)
            ]
            if together:
                (model(inputs[0]).square().mean() + model(inputs[1]).square().mean()).backward()
            else:
                for x in inputs:
                    model(x).square().mean().backward()
            if step == 0:
                optimizer.step()
        return gradients(model)

    assert_same(run(together=True), run(together=False), rtol=1e-4, atol=1e-6)


def test_eval_mode_still_gives_gradients() -> None:
    """Without dropout, eval mode with gradients enabled differs in nothing from training mode."""
    results = []
    for training in (True, False):
        model = architecture_model("vit").train(training)
        model(**ARCHITECTURES["vit"].batch(samples=8)).loss.backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_leave_no_trace(guard: Callable[[], Any]) -> None:
    model = readers(activation_ranks=2)
    optimizer = sgd(model)
    x, other = (torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    model(x.clone()).square().mean().backward()
    optimizer.step()
    before = bases(model)
    ages = [layer.wasi_input["default"].age for _, layer in wasi_layers(model)]
    with guard():
        model(other.clone())
        model.eval()(other.clone())
    assert_same(bases(model), before)
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == ages
    assert len(shared_inputs(model)) == 0


# -------------------------------------------------------------------- errors


def _step_after_interruption(where: str | None, name: str = "vit") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and bases of a second step; before it, a pass over the same batch breaks off in the middle."""
    model = architecture_model(name)
    optimizer = sgd(model)
    architecture = ARCHITECTURES[name]
    model(**architecture.batch(samples=8, seed=1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    batch = architecture.batch(samples=8, seed=2)
    middle: WasiLayer = [layer for _, layer in wasi_layers(model)][6]
    if where == "forward":
        handle = middle.register_forward_pre_hook(fail)
        with pytest.raises(Interrupted):
            model(**batch)
        handle.remove()
    elif where == "backward":
        handle = middle.register_forward_hook(fail_in_backward)
        with pytest.raises(Interrupted):
            model(**batch).loss.backward()
        handle.remove()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    del batch
    gc.collect()
    assert len(shared_inputs(model)) == 0
    return gradients(model), bases(model)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupted_pass_is_simply_repeated(where: str) -> None:
    actual, expected = _step_after_interruption(where), _step_after_interruption(None)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1])


def test_interrupted_backward_leaves_nothing_in_subspace_sgd() -> None:
    """`model.zero_grad()` is how a Trainer forgets gradients; the products' gradients must go with them."""

    def run(interrupt: bool) -> dict[str, Tensor]:
        model = architecture_model("vit")
        optimizer = SubspaceSGD(model, lr=0.05)
        batch = ARCHITECTURES["vit"].batch(samples=8)
        if interrupt:
            middle = [layer for _, layer in wasi_layers(model)][6]
            handle = middle.register_forward_hook(fail_in_backward)
            with pytest.raises(Interrupted):
                model(**batch).loss.backward()
            handle.remove()
            model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    assert_same(run(interrupt=True), run(interrupt=False))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("moment", ["first", "later"])
def test_a_bad_batch_does_not_poison_the_following_ones(bad: float, moment: str) -> None:
    """Mixed precision training expects overflows now and then: it skips that step and goes on."""
    model = readers()
    optimizer = sgd(model)
    good = torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    if moment == "later":
        model(good.clone()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    broken = good.clone()
    broken[0, 0, 0] = bad
    loss = model(broken).square().mean()
    assert not bool(loss.isfinite())
    loss.backward()
    optimizer.zero_grad()  # the step is skipped
    model(good.clone()).square().mean().backward()
    assert all(bool(grad.isfinite().all()) for grad in gradients(model).values())
    assert all(bool(basis.isfinite().all()) for basis in bases(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_finite_inputs_in_low_precision(dtype: torch.dtype) -> None:
    """Sums over thousands of rows exceed the range of float16 although every input, output and gradient fits."""
    model = readers()
    optimizer = sgd(model, lr=1e-4)
    for seed in range(3):
        x = 3 * torch.randn(32, 200, WIDTH, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(x)
        y.float().mean().backward()
        assert all(bool(grad.isfinite().all()) for grad in gradients(model).values())
        assert all(bool(basis.isfinite().all()) for basis in bases(model).values())
        optimizer.step()


def test_another_optimizer_after_subspace_sgd_does_not_grow_memory() -> None:
    """Once SubspaceSGD is gone, nobody consumes the gradients of the products, so nobody may collect them."""
    model = readers()
    optimizer: torch.optim.Optimizer = SubspaceSGD(model)
    optimizer = sgd(model)
    measured = []
    for seed in range(6):
        model(torch.randn(8, 10, WIDTH, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if seed >= 2:
            measured.append(live_bytes())
    assert len(set(measured)) == 1
