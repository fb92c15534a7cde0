"""Recomputed blocks against the same blocks with everything stored."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
import transformers as tf
from models import ARCHITECTURES, checkpoint_activations, input_options
from peft import get_peft_model
from slow import partly_slow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wasi_peft.linalg.tucker as tucker_module
import wasi_peft.memory.recompute as recompute_module
import wasi_peft.tuner.inputs as inputs_module
from wasi_peft import WasiConfig, create_wasi_optimizer, measure_peak_memory
from wasi_peft.memory import BlockRecomputation, RecomputedBlocks
from wasi_peft.memory.quantization import KINDS, bits_per_value, dequantize, quantize
from wasi_peft.memory.wrapping import Around
from wasi_peft.tuner.layer import wasi_layers

WIDTH = 32
ROUNDED = KINDS
SIZES = [("exact", 4.0), *((kind, bits_per_value(kind) / 8) for kind in ROUNDED)]  # bytes an element
UPDATES = ("frozen_basis", "low_rank", "core", "subspace")


class Block(nn.Module):
    """A residual block with dropout; `also` and `nested` are what else a block of a model may be given."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, also: Tensor | None = None, nested: Any = ()) -> Tensor:
        hidden = self.up(self.norm(x))
        if also is not None:
            hidden = hidden * also
        for tensor in nested:
            hidden = hidden + tensor.sin()
        return x + self.dropout(self.down(F.gelu(hidden)))


def block(seed: int = 0, **options: Any) -> Block:
    torch.manual_seed(seed)
    return Block(**options)


def values(*shape: int, seed: int = 1, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def stored(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What recomputation is compared with."""
    return function(*args, **kwargs)


def assert_same(actual: Any, expected: Any, rtol: float = 0, atol: float = 0) -> None:
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def live_bytes() -> int:
    """Memory of all tensors that Python can reach."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if type(value) in (Tensor, nn.Parameter):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# -------------------------------------------------------------------- whole models


def step(model: nn.Module, batch: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_with_dropout_train_as_if_stored(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.model(), architecture.batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    loss, expected = step(model, batch)
    assert not torch.equal(step(model, batch, seed=6)[0], loss) or not any(
        isinstance(module, nn.Dropout) for module in model.modules()
    )
    RecomputedBlocks().install(model)
    actual_loss, actual = step(model, batch)
    torch.testing.assert_close(actual_loss, loss)
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("name", ["vit", "llama", "t5"])
def test_rounding_leaves_the_forward_pass_alone(name: str, kind: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.model(), architecture.batch()
    loss, expected = step(model, batch)
    RecomputedBlocks(kind).install(model)
    actual_loss, actual = step(model, batch)
    assert torch.equal(actual_loss, loss)
    assert all((left is None) == (right is None) for left, right in zip(actual, expected, strict=True))
    assert any(not torch.equal(left, right) for left, right in zip(actual, expected, strict=True) if left is not None)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_it_can_be_undone_copied_and_pickled(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = architecture.model(), architecture.batch()
    RecomputedBlocks("int8").install(model)
    _, rounded = step(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(twin, batch)[1], rounded)
    RecomputedBlocks().remove(model)
    _, exact = step(model, batch)
    assert_same(exact, step(architecture.model(), batch)[1])
    assert any(not torch.equal(left, right) for left, right in zip(exact, rounded, strict=True) if left is not None)


def test_only_training_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch()
    RecomputedBlocks().install(model)
    kept: list[str] = []
    monkeypatch.setattr(
        recompute_module,
        "_keep",
        lambda tensor, kind, keep=recompute_module._keep: kept.append(kind) or keep(tensor, kind),
    )
    model.eval()(**batch).loss.backward()
    with torch.no_grad():
        model.train()(**batch)
    with torch.inference_mode():
        model(**batch)
    assert not kept
    model(**batch)
    assert len(kept) >= 2


def recomputed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), Around)]


def test_bad_input_changes_nothing() -> None:
    for make in (BlockRecomputation, RecomputedBlocks):
        with pytest.raises(ValueError, match=r"kind must be one of 'exact', .*, got 'int7'"):
            make("int7")
        with pytest.raises(ValueError, match="got 3"):
            make(3)  # type: ignore[arg-type]
    module = block()
    with pytest.raises(ValueError, match=r"must have transformer blocks, .* got Block without any"):
        RecomputedBlocks().install(module)
    assert not recomputed(module)


def test_every_model_inside_a_module_takes_part() -> None:
    towers = nn.ModuleList([ARCHITECTURES["vit"].model(), ARCHITECTURES["bert"].model()])
    RecomputedBlocks().install(towers)
    assert recomputed(towers) == [
        *("0.vit.layers.0", "0.vit.layers.1"),
        *("1.bert.encoder.layer.0", "1.bert.encoder.layer.1"),
    ]


class Stack(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(**options) for _ in range(3)))

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"loss": self.blocks(x).square().mean()})


def test_any_model_with_blocks_can_recompute() -> None:
    torch.manual_seed(0)
    model, batch = Stack(), {"x": values(4, 5, WIDTH, requires_grad=False)}
    expected = step(model, batch)
    RecomputedBlocks().install(model)
    actual = step(model, batch)
    assert_same([actual[0], *actual[1]], [expected[0], *expected[1]])


def test_the_gradient_checkpointing_of_a_model_stays_in_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ARCHITECTURES["llama"].model(), ARCHITECTURES["llama"].batch()
    expected = step(model, batch)
    RecomputedBlocks("int4").install(model)
    checkpoint_activations(model, {"use_reentrant": False})
    actual = step(model, batch)
    assert_same([actual[0], *actual[1]], [expected[0], *expected[1]])  # nothing is rounded
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    assert any(not torch.equal(a, b) for a, b in zip(step(model, batch)[1], expected[1], strict=True) if a is not None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_blocks_get_no_cache_to_which_they_would_add_twice(name: str) -> None:
    model, batch = ARCHITECTURES[name].model(), ARCHITECTURES[name].batch()
    assert model.config.use_cache
    _, expected = step(model, batch)
    RecomputedBlocks().install(model)
    _, actual = step(model, batch)
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert model.eval()(**batch).past_key_values.get_seq_length() == batch["input_ids"].shape[1] or name == "t5"


def test_the_embeddings_need_no_gradient() -> None:
    """PEFT's hook for models that checkpoint would change what they return."""
    model = get_peft_model(
        ARCHITECTURES["swin"].model(), WasiConfig(residual=None, weight_rank=4, memory_mode="small")
    ).train()
    embeddings = model.get_submodule("base_model.model.swin.embeddings")
    assert not embeddings._forward_hooks
    assert recomputed(model)


@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_what_is_recorded_inside_a_block_keeps_its_gradient(hook: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(dropout=0.0).train(), values(4, 5, WIDTH, requires_grad=False)
    recorded: list[Tensor] = []
    up = model.blocks[1].up
    if hook == "forward":
        up.register_forward_hook(lambda module, args, output: recorded.append(output))
    else:
        up.register_forward_pre_hook(lambda module, args: recorded.append(args[0]))

    def auxiliary() -> list[Tensor | None]:
        model.zero_grad()
        recorded.clear()
        loss = model(x).loss
        assert len(recorded) == 1 and recorded[0].shape[:2] == (4, 5)
        (loss + recorded[0].square().mean()).backward()
        return gradients(model)

    expected = auxiliary()
    RecomputedBlocks("int8").install(model)
    actual = auxiliary()
    flat = [torch.cat([gradient.flatten() for gradient in each]) for each in (actual, expected)]
    assert 0 < float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.02  # the other blocks' inputs are rounded


@pytest.mark.parametrize("mode", ["fast", "small"])
def test_router_logits_are_of_whole_batches_and_have_their_gradient(mode: str) -> None:
    """Collected by transformers' own hooks while the configuration says so."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "use_cache": False}
    config = tf.MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=1.0)
    ids = torch.randint(50, (8, 420), generator=torch.Generator().manual_seed(0))  # more than a slice

    def run(mode: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = tf.MixtralForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model = get_peft_model(model, WasiConfig(residual=None, weight_rank=8, memory_mode=mode)).train()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        output = model(input_ids=ids, output_router_logits=False)  # the hooks are there, but asleep
        assert output.router_logits is None
        found = [p.grad.flatten() for name, p in model.named_parameters() if "wasi_" in name and p.grad is not None]
        return output.logits + 0, torch.cat(found)

    (logits, expected), (other, actual) = run("exact"), run(mode)
    torch.testing.assert_close(other, logits, rtol=1e-3, atol=1e-4)
    assert float((actual - expected).norm() / expected.norm()) < 0.1


# -------------------------------------------------------------------- rounding


def restored(x: Tensor, kind: str) -> Tensor:
    kept = recompute_module._keep(x, kind)
    return kept.restore(*kept.parts).detach()


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("shape", [(3, 5, 48), (7,), (0, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_kept_input_is_what_the_storage_format_makes_of_it(kind: str, shape: Any, dtype: torch.dtype) -> None:
    x = values(*shape, requires_grad=False).to(dtype)
    unchanged = dtype == torch.bfloat16 and kind in ("bf16", "int16")  # they would save nothing
    expected = x if unchanged else dequantize(quantize(x, kind))
    actual = restored(x, kind)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ROUNDED)
def test_the_layout_of_a_kept_input_stays(kind: str) -> None:
    x = values(5, 3, 2 * WIDTH, requires_grad=False).transpose(0, 1)
    assert restored(x, kind).stride() == x.stride()


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_bytes_of_a_kept_input(kind: str, size: float) -> None:
    """What autograd holds of a block, counted by hooks; rounded inputs are held as integers only."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        BlockRecomputation(kind)(block(), values(10, 4, WIDTH).sin())
    own = kept[1:]  # the first is that of sin
    assert sum(tensor.nbytes for tensor in own) == 10 * 4 * WIDTH * size
    assert kind == "exact" or not any(tensor.is_floating_point() for tensor in own)


@pytest.mark.parametrize("kind", ["exact", *ROUNDED])
def test_each_block_starts_from_its_own_rounded_input(kind: str) -> None:
    """The slow reference: exact inputs stored, then block by block the gradient at the rounded one."""
    blocks = [block(seed, dropout=0.0) for seed in range(4)]
    x = values(5, 7, WIDTH)
    hidden = x
    for module in blocks:
        hidden = BlockRecomputation(kind)(module, hidden)
    hidden.square().sum().backward()
    actual = [x.grad, *(gradient for module in blocks for gradient in gradients(module))]

    inputs = [x.detach()]
    for module in blocks:
        inputs.append(module(inputs[-1]).detach())
    assert torch.equal(hidden, inputs[-1])
    gradient, collected = 2 * inputs[-1], []
    for module, kept in zip(reversed(blocks), reversed(inputs[:-1]), strict=True):
        start = restored(kept, kind).requires_grad_()
        gradient, *own = torch.autograd.grad(module(start), [start, *module.parameters()], gradient)
        collected = own + collected
    assert_same(actual, [gradient, *collected])


# -------------------------------------------------------------------- arguments and results


def both_ways(
    run: Callable[[Callable[..., Any]], Tensor], sources: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of `sources` with everything stored, and recomputed."""
    results = []
    for call in (stored, BlockRecomputation()):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(run(call), sources, allow_unused=True))
    return results[0], results[1]


@pytest.mark.parametrize("form", ["positional", "keyword", "partial", "tuple", "list", "dict", "twice", "captured"])
def test_gradients_reach_every_tensor(form: str) -> None:
    module, x, other = block(), values(3, WIDTH), values(3, 2 * WIDTH, seed=2)

    def run(call: Callable[..., Tensor]) -> Tensor:
        also = other * 2
        if form == "positional":
            result = call(module, x, also)
        elif form == "keyword":
            result = call(module, x, also=also)
        elif form == "partial":  # what transformers does
            result = call(functools.partial(Block.forward, module, also=also), x)
        elif form == "tuple":
            result = call(module, x, nested=(also, also.cos()))
        elif form == "list":
            result = call(module, x, None, [also, torch.ones(())])
        elif form == "dict":
            result = call(lambda x, pair: module(x, pair["also"]), x, {"also": also, "name": "a"})
        elif form == "twice":
            result = call(lambda x, y, z: module(x, z) * y, x, x, also)
        else:
            result = call(lambda x: module(x, also), x)
        return result.square().sum()

    expected, actual = both_ways(run, [x, other, *module.parameters()])
    assert_same(actual, expected)
    assert all(gradient is not None for gradient in actual[:2])


def test_two_blocks_read_one_captured_leaf() -> None:
    module, x, scale = block(), values(3, WIDTH), values(2 * WIDTH, seed=2)

    def run(call: Callable[..., Tensor]) -> Tensor:
        return call(lambda x: module(x, scale), call(lambda x: module(x, scale), x)).sum()

    assert_same(*both_ways(run, [x, scale, *module.parameters()]), rtol=1e-5, atol=1e-6)


def test_a_captured_tensor_that_would_count_twice_is_refused() -> None:
    module, x = block(), values(3, WIDTH)
    doubled = module.norm.weight * 2
    with pytest.raises(ValueError, match=r"must not depend on another.*\(32,\).*as an argument"):
        BlockRecomputation()(lambda x: module(x) + doubled + module.norm.weight, x)
    expected, actual = both_ways(
        lambda call: call(lambda x, scale: module(x) + scale, x, module.norm.weight * 2).sum(), [module.norm.weight]
    )
    assert_same(actual, expected)


def test_parameters_train_where_the_input_needs_no_gradient() -> None:
    module, x = block(), values(3, WIDTH, requires_grad=False)
    expected, actual = both_ways(lambda call: call(module, x).sum(), list(module.parameters()))
    assert_same(actual, expected)
    module.requires_grad_(False)
    assert not BlockRecomputation()(module, x).requires_grad


def test_results_of_every_form() -> None:
    x, mask = values(3, WIDTH), torch.zeros(3, WIDTH)

    def function(x: Tensor, mask: Tensor) -> Any:
        return (x.sin(), None, {"count": (x > 0).sum(), "pair": [x.cos(), "text"]}, x, mask)

    first, none, inner, same_x, same_mask = BlockRecomputation()(function, x, mask)
    assert none is None and inner["pair"][1] == "text" and same_x is x and same_mask is mask
    assert not inner["count"].requires_grad and not mask.requires_grad and inner["count"] == (x > 0).sum()
    (first.sum() + inner["pair"][0].sum() + same_x.sum()).backward()
    torch.testing.assert_close(x.grad, x.cos() - x.sin() + 1)


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_is_not_used(used: int) -> None:
    x = values(3, WIDTH)
    assert_same(*both_ways(lambda call: call(lambda x: (x.sin(), x.square()), x)[used].sum(), [x]))


def test_a_result_without_a_graph_gets_no_gradient() -> None:
    x = values(3, WIDTH)
    outputs = BlockRecomputation()(lambda x: (x.sin(), x.detach().cos()), x)
    (outputs[0].sum() + outputs[1].sum()).backward()
    torch.testing.assert_close(x.grad, x.cos())


def test_parameters_train_where_torch_does_not_see_them_used() -> None:
    """As in compiled extensions, which no function mode follows."""
    module, x = block(), values(3, WIDTH)

    def unseen(module: Block, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return module(x)

    expected, actual = both_ways(lambda call: call(unseen, module, x).sum(), [x, *module.parameters()])
    assert_same(actual, expected)


def test_a_buffer_that_is_returned_stays_a_buffer() -> None:
    buffer = torch.ones(WIDTH)
    first, second = BlockRecomputation()(lambda x: (x.sin(), buffer), values(3, WIDTH))
    (first * second).sum().backward()
    assert not buffer.requires_grad and torch.equal(second, buffer)


def test_results_may_be_changed_in_place() -> None:
    module, x = block(), values(3, WIDTH)
    assert_same(*both_ways(lambda call: call(module, x).mul_(3).sum(), [x, *module.parameters()]))


# -------------------------------------------------------------------- the state around a block


@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_autocast_is_replayed(inside: bool) -> None:
    module, x = block(), values(3, WIDTH)

    def run(call: Callable[..., Tensor]) -> list[Tensor | None]:
        module.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                loss = call(module, x).float().square().sum()
                if inside:
                    loss.backward()
        if not inside:
            loss.backward()
        return gradients(module)

    expected = run(stored)
    assert_same(run(BlockRecomputation()), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", enabled=False):
        plain = block()
        torch.manual_seed(3)
        plain(x)
        plain(x).square().sum().backward()
    assert not torch.equal(gradients(plain)[0], expected[0])  # autocast was on


def test_backward_leaves_random_numbers_alone() -> None:
    module, x = block(), values(3, WIDTH)
    output = BlockRecomputation()(module, x)
    torch.rand(3)  # so that the state is not the one that the block left
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_an_exception_leaves_no_trace(moment: str) -> None:
    module, x = block(), values(3, WIDTH)
    failing = {"forward": [True], "backward": [False, True]}[moment]
    alive: list[weakref.ref[Tensor]] = []
    calls: list[int] = []
    module.norm.weight.register_hook(lambda gradient: calls.append(1))

    def function(x: Tensor) -> Tensor:
        result = module(x)
        alive.append(weakref.ref(result))
        if failing and failing.pop(0):
            raise KeyError("in the middle")
        return result

    def run() -> None:
        torch.manual_seed(3)
        BlockRecomputation("int8")(function, x).sum().backward()

    with pytest.raises(KeyError, match="in the middle"):
        run()
    state = torch.get_rng_state()
    gc.collect()
    assert all(reference() is None for reference in alive)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert not torch.overrides._get_current_function_mode_stack()
    run()
    assert torch.equal(torch.get_rng_state(), state) and calls == [1]


def test_an_exception_in_the_inner_backward_wakes_the_hooks() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise KeyError("in the middle")

    module, calls = block(), []
    module.up.weight.register_hook(lambda gradient: calls.append(1))
    with pytest.raises(KeyError, match="in the middle"):
        BlockRecomputation()(lambda x: Failing.apply(module(x)), values(3, WIDTH)).sum().backward()
    BlockRecomputation()(module, values(3, WIDTH)).sum().backward()
    assert calls == [1]


def test_steps_without_backward_leave_nothing() -> None:
    model, batch = ARCHITECTURES["vit"].model().train(), ARCHITECTURES["vit"].batch()
    RecomputedBlocks("int8").install(model)
    measured = []
    for number in range(20):
        model(**batch)
        if number in (2, 10, 19):
            measured.append(live_bytes())
    assert len(set(measured)) == 1


def test_an_input_is_freed_when_backward_is_through() -> None:
    """Also while the loss lives on, as it does in most training loops."""
    module = block()
    x = values(3, WIDTH)
    hidden = x * 2
    alive = weakref.ref(hidden)
    loss = BlockRecomputation()(module, hidden).sum()
    del hidden
    assert alive() is not None
    loss.backward()
    assert alive() is None and loss.requires_grad


# -------------------------------------------------------------------- arguments that changed


def test_arguments_must_not_change_in_the_block() -> None:
    with pytest.raises(RuntimeError, match="must not modify its arguments in place"):
        BlockRecomputation()(lambda x: x.add_(1), values(3, WIDTH) * 1)


def test_arguments_must_not_change_before_backward() -> None:
    x = values(3, WIDTH)
    hidden = x * 1
    output = BlockRecomputation()(block(), hidden)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_parameters_must_not_change_before_backward() -> None:
    module = block()
    output = BlockRecomputation()(module, values(3, WIDTH))
    with torch.no_grad():
        module.up.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(64, 32\) that a recomputed block reads was modified in place"):
        output.sum().backward()


# -------------------------------------------------------------------- ways to go backward


def test_backward_again() -> None:
    module, x = block(), values(3, WIDTH)
    loss = BlockRecomputation("int8")(module, x).square().sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone(), *gradients(module)]
    loss.backward()
    assert_same([x.grad, *gradients(module)], [2 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_backward_twice_differentiated() -> None:
    x = values(3, WIDTH)
    loss = BlockRecomputation()(block(), x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_to_some_inputs_only() -> None:
    module, x = block(), values(3, WIDTH)
    BlockRecomputation()(module, x).sum().backward(inputs=[module.up.weight])
    assert module.up.weight.grad is not None and x.grad is None and module.down.weight.grad is None


def test_hooks_of_parameters_run_once() -> None:
    module, x, scale = block(), values(3, WIDTH), values(2 * WIDTH, seed=2)
    seen: list[str] = []
    module.up.weight.register_hook(lambda gradient: gradient * 2)
    module.up.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))

    def run(call: Callable[..., Tensor]) -> list[Tensor | None]:
        module.zero_grad()
        torch.manual_seed(3)
        captured = scale * 1
        captured.register_hook(lambda gradient: gradient * 3)
        call(lambda x: module(x, captured), x).sum().backward()
        result = [scale.grad, *gradients(module)]
        scale.grad = None
        return result

    expected = run(stored)
    assert_same(run(BlockRecomputation()), expected)
    assert seen == ["accumulated"] * 2


def test_gradients_accumulate() -> None:
    module = block(dropout=0.0)
    for part in values(6, WIDTH).detach().split(2):
        BlockRecomputation()(module, part).sum().backward()
    accumulated = gradients(module)
    module.zero_grad()
    module(values(6, WIDTH).detach()).sum().backward()
    assert_same(accumulated, gradients(module), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- next to other users of the graph


def rounding_hooks() -> torch.autograd.graph.saved_tensors_hooks:
    """Stands for hooks that keep every float in few bits."""
    coarse = lambda tensor: (tensor * 4).round() / 4 if tensor.is_floating_point() else tensor  # noqa: E731
    return torch.autograd.graph.saved_tensors_hooks(coarse, lambda tensor: tensor)


def test_hooks_around_a_block_see_its_input_only() -> None:
    module, x = block(dropout=0.0), values(3, WIDTH)

    def run(kind: str) -> list[Tensor | None]:
        module.zero_grad()
        with rounding_hooks():
            output = BlockRecomputation(kind)(module, x)
        output.sum().backward()
        return gradients(module)

    def reference(start: Tensor) -> list[Tensor | None]:
        module.zero_grad()
        module(start).sum().backward()
        return gradients(module)

    assert_same(run("exact"), reference((x.detach() * 4).round() / 4))
    for kind in ROUNDED:  # rounded once, not twice
        assert_same(run(kind), reference(restored(x.detach(), kind)))


def test_hooks_inside_a_block_act_when_it_runs_again() -> None:
    module, x = block(dropout=0.0), values(3, WIDTH)

    def hooked(x: Tensor) -> Tensor:
        with rounding_hooks():
            return module(x)

    expected, actual = both_ways(lambda call: call(hooked, x).sum(), [x, *module.parameters()])
    assert_same(actual, expected)
    assert not torch.equal(expected[0], torch.autograd.grad(module(x).sum(), x)[0])


def test_offloading_hooks() -> None:
    module, x = block(), values(3, WIDTH)

    def run(call: Callable[..., Tensor]) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return call(module, x).sum()

    assert_same(*both_ways(run, [x, *module.parameters()]))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_torch_checkpoint_outside(use_reentrant: bool) -> None:
    module, x = block(), values(3, WIDTH)

    def run(call: Callable[..., Tensor]) -> list[Tensor | None]:
        module.zero_grad()
        torch.manual_seed(3)
        output = torch_checkpoint.checkpoint(
            lambda x: call(module, call(module, x)).sin(), x, use_reentrant=use_reentrant
        )
        output.sum().backward()
        return gradients(module)

    assert_same(run(BlockRecomputation()), run(stored), rtol=1e-5, atol=1e-6)


def test_torch_checkpoint_and_recomputation_inside() -> None:
    module, x = block(), values(3, WIDTH)
    inner = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)
    for call_inside in (inner, BlockRecomputation()):
        assert_same(
            *both_ways(
                lambda call, call_inside=call_inside: call(lambda x: module(call_inside(module, x)), x).sum(),
                [x, *module.parameters()],
            ),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(find_unused: bool) -> None:
    architecture = ARCHITECTURES["bert"]
    expected = step(architecture.model(), architecture.batch())[1]
    model = architecture.model()
    RecomputedBlocks().install(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):  # the reducer rebuilds its buckets in the second step
        _, actual = step(parallel, architecture.batch())
        assert_same(actual, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- WASI layers


def adapted(name: str = "vit", update: str = "low_rank", **options: Any) -> Any:
    model = ARCHITECTURES[name].model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        torch.manual_seed(0)
        options = {"weight_rank": 6, "activation_interval": 1, **input_options(update), **options}
        return get_peft_model(model, WasiConfig(update=update, **options)).train()  # type: ignore[arg-type]


def train(model: Any, name: str, steps: int = 3) -> tuple[list[float], list[Tensor]]:
    """Losses, and parameters with the activation bases afterwards."""
    optimizer = create_wasi_optimizer(model, torch.optim.SGD, lr=0.05)
    losses = []
    for number in range(steps):
        for half in range(2):  # two micro-batches a step
            loss = model(**ARCHITECTURES[name].batch(seed=2 * number + half)).loss
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    bases = [layer.wasi_input["default"].bases.feature for _, layer in wasi_layers(model)]
    return losses, [p.detach().clone() for p in model.parameters()] + [basis for basis in bases if basis is not None]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_compressed_layers_train_as_if_stored(name: str, update: str) -> None:
    losses, state = train(adapted(name, update=update), name)
    model = adapted(name, update=update)
    RecomputedBlocks().install(model)
    actual_losses, actual_state = train(model, name)
    assert actual_losses == pytest.approx(losses, rel=1e-4)
    assert_same(actual_state, state, rtol=1e-3, atol=1e-4)


def test_the_pass_that_is_thrown_away_compresses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"compress": 0, "iterations": 0}
    compress, iterate = inputs_module.compress, tucker_module.subspace_iteration

    def counted_compress(*args: Any) -> Any:
        counted["compress"] += 1
        return compress(*args)

    def counted_iterate(*args: Any) -> Any:
        counted["iterations"] += 1
        return iterate(*args)

    monkeypatch.setattr(inputs_module, "compress", counted_compress)
    monkeypatch.setattr(tucker_module, "subspace_iteration", counted_iterate)
    model = adapted()
    RecomputedBlocks().install(model)
    loss = model(**ARCHITECTURES["vit"].batch()).loss
    assert counted["compress"] == 0
    loss.backward()
    inputs = counted["compress"]  # q, k and v share one
    assert inputs == 2 * 4
    counted["iterations"] = 0
    train(model, "vit", steps=3)
    assert counted["compress"] == inputs + 3 * 2 * inputs
    assert counted["iterations"] == 2 * inputs  # in the first backward nobody has stepped yet
    gc.collect()
    assert all(len(layer.inputs) == 0 for _, layer in wasi_layers(model))


class _Losses(tf.TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


HOW = {
    "torch_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "torch_non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "blocks": {},
}


def trainer_run(
    update: str, how: str | None, folder: Path, accumulate: int = 2, kind: str = "exact"
) -> tuple[list[float], list[Tensor]]:
    model = adapted(update=update)
    if how == "blocks":
        RecomputedBlocks(kind).install(model)
    batch = ARCHITECTURES["vit"].batch(16)
    arguments = tf.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        max_steps=3, save_strategy="no", logging_steps=1, optim="sgd", learning_rate=0.05, seed=0, max_grad_norm=1.0,
        lr_scheduler_type="constant", per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
        **({} if how is None else HOW[how]),
    )  # fmt: skip
    losses = _Losses()
    data = [{key: value[index] for key, value in batch.items()} for index in range(16)]
    tf.Trainer(model, arguments, train_dataset=data, callbacks=[losses]).train()
    return losses.values, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("update", UPDATES)
def test_trainer_agrees_whichever_way_blocks_are_recomputed(update: str, tmp_path: Path) -> None:
    """Losses to five digits, parameters to 1e-4, after three steps of two micro-batches with clipped gradients."""
    losses, parameters = trainer_run(update, None, tmp_path)
    assert len(losses) == 3
    for how in HOW:
        actual_losses, actual_parameters = trainer_run(update, how, tmp_path)
        assert actual_losses == pytest.approx(losses, rel=1e-4), how
        assert_same(actual_parameters, parameters, rtol=1e-3, atol=1e-4)


def test_trainer_with_rounded_inputs(tmp_path: Path) -> None:
    losses, _ = trainer_run("low_rank", None, tmp_path)
    rounded, _ = trainer_run("low_rank", "blocks", tmp_path, kind="int8")
    assert rounded == pytest.approx(losses, rel=1e-2)


# -------------------------------------------------------------------- memory


def _vit(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=128, image_size=64,
        patch_size=4,
    )  # fmt: skip
    batch = {"pixel_values": values(4, 3, 64, 64, requires_grad=False), "labels": torch.zeros(4, dtype=torch.long)}
    return tf.ViTForImageClassification(config), batch


def _llama(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.LlamaConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=96, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(8, (4, 256), generator=torch.Generator().manual_seed(0))
    return tf.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


TINY = {"vit": _vit, "llama": _llama}


def peak_of_a_step(name: str, how: str, layers: int = 8) -> int:
    torch.manual_seed(0)
    model, batch = TINY[name](layers)
    model.train()
    if how == "torch":
        function = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    elif how != "stored":
        RecomputedBlocks(how).install(model)

    def run() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    run()
    model.zero_grad()
    return measure_peak_memory(run).peak_bytes


@pytest.mark.parametrize("name", TINY)
def test_peak_of_a_step(name: str) -> None:
    exact = peak_of_a_step(name, "exact")
    assert exact < 0.45 * peak_of_a_step(name, "stored")
    assert exact < 1.01 * peak_of_a_step(name, "torch")
    assert peak_of_a_step(name, "int8") < exact


@pytest.mark.parametrize(("kind", "size"), SIZES)
@pytest.mark.parametrize("name", partly_slow(TINY, "llama"))
def test_a_further_block_costs_its_input_only(name: str, kind: str, size: float) -> None:
    """And its gradients; a random state is 5 KB, which no torch operation allocates."""
    tokens = 4 * (257 if name == "vit" else 256)
    model, _ = TINY[name](1)
    parameters = sum(p.nbytes for n, p in model.named_parameters() if "layers.0." in n or "layer.0." in n)
    growth = (peak_of_a_step(name, kind, 12) - peak_of_a_step(name, kind, 8)) / 4
    assert parameters > 0
    assert growth <= tokens * 32 * size + parameters + 1024


# ---------------------------------------------------------------- blocks that do more than answer


class Router(nn.Module):
    """Adds the output of one of two experts, whichever has the larger score, by a narrow margin."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        with torch.no_grad():
            self.score.weight[1] = 1.0001 * self.score.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.score(x).topk(1, dim=-1).indices
        return x + torch.where(chosen == 0, *(expert(x) for expert in self.experts))


def test_a_block_that_chooses_makes_the_same_choice_again() -> None:
    torch.manual_seed(0)
    router, x = Router(), torch.randn(8, 64, WIDTH)
    router(x).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in router.experts.named_parameters()}
    router.zero_grad()
    BlockRecomputation("int8")(router, x).square().mean().backward()
    for name, parameter in router.experts.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], atol=1e-4 * float(expected[name].norm()))


class Writer(Block):
    """Leaves what it computed in a mapping, for the next block to read."""

    def forward(self, x: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        shared["keys"] = (self.up(y),)
        return y


class Reader(Block):
    def forward(self, x: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x) + shared["keys"][0][..., :WIDTH]


def test_what_a_block_leaves_for_others_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Writer(dropout=0.0), Reader(dropout=0.0)])
    x = torch.randn(2, 5, WIDTH)
    gradients = []
    for recomputes in (False, True, True):
        if recomputes:
            RecomputedBlocks().install(model)
        model.zero_grad()
        shared: Any = UserDict()
        y = x
        for layer in model.train().layers:
            y = layer(y, shared=shared)
        y.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.allclose(gradients[1], gradients[0], atol=1e-6)
    assert torch.allclose(gradients[2], gradients[0], atol=1e-6)


class Stateful(nn.Module):
    """Keeps its last state, as recurrent blocks do, and goes on from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(WIDTH, WIDTH), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + 0 * self.state
        self.state = y.mean()
        return y


def test_a_state_that_goes_on_from_call_to_call_holds_no_graph() -> None:
    stateful = Stateful()
    recompute = BlockRecomputation("exact")
    parts = [recompute(stateful, part) for part in torch.randn(4, 3, WIDTH).split(2)]
    torch.cat(parts).sum().backward()
    assert not stateful.state.requires_grad
