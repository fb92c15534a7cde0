"""What autograd keeps in few bits: what stays exact, gradients, memory, and contexts that never stay open."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, Architecture, wasi_model
from slow import partly_slow
from strategies import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import saved
from wasi_peft.memory.saved import LowBitBlocks, LowBitSavedTensors, Regions

Gradients = dict[str, Tensor]
# relative error of all gradients together that each kind may cause
BOUNDS = {"bf16": 0.005, "int8": 0.01, "int4": 0.15}


def stored() -> list[Any]:
    """What is stored in few bits anywhere."""
    return [thing for thing in gc.get_objects() if isinstance(thing, saved._Region)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a context open or a stored tensor behind."""
    yield
    gc.collect()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert len(stored()) == 0


class Recorder:
    """Sees every tensor that is packed, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, str]] = []
        original = saved._pack

        def pack(tensor: Tensor, kind: str, minimum_elements: int, regions: Regions) -> Any:
            packed = original(tensor, kind, minimum_elements, regions)
            exact = isinstance(packed, saved._Exact)
            self.seen.append((tensor.detach(), "exact" if exact else packed.region.kept.kind))
            return packed

        monkeypatch.setattr(saved, "_pack", pack)

    def listing(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and format of all tensors but integers, in order."""
        return [(tuple(tensor.shape), kind) for tensor, kind in self.seen if tensor.is_floating_point()]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    """Gradients of the loss, from none."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(ours: Gradients, exact: Gradients) -> float:
    """Relative error of all gradients together."""
    assert ours.keys() == exact.keys()
    flat = [torch.cat([part[name].flatten() for name in exact]) for part in (ours, exact)]
    return float(relative_error(*flat))


def vit(width: int = 64, layers: int = 3, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        image_size=24,
        patch_size=4,
        num_labels=3,
        **options,
    )
    return tf.ViTForImageClassification(config), {
        "pixel_values": torch.randn(8, 3, 24, 24),
        "labels": torch.arange(8) % 3,
    }


def llama(width: int = 64, layers: int = 3, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * width,
        **options,
    )
    ids = torch.randint(0, 50, (8, 40))
    return tf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


# -------------------------------------------------------------------------------- what stays exact

X, EXACT, LOW, ATTENTION = (4, 5, 16), "exact", "int8", "int16"


def of_first_block(model: nn.Module, batch: dict[str, Tensor], recorder: Recorder) -> list[tuple[Any, str]]:
    """What the second of two blocks saves (the first may meet inputs that need no gradient)."""
    LowBitBlocks("int8", 0).install(model)
    model.train()
    loss = model(**batch).loss
    listing = recorder.listing()
    assert len(listing) % 2 == 0
    del loss
    return listing[len(listing) // 2 :]


def rounded(elements: int) -> list[tuple[Any, str]]:
    """What attention keeps of a tensor besides integers: the values after the last group."""
    return [((elements % 64,), EXACT)]


def test_listing_of_a_vit_block(recorder: Recorder) -> None:
    architecture = ARCHITECTURES["vit"]
    norm = [((16,), EXACT), (X, LOW), ((16,), EXACT), ((4, 5, 1), EXACT), ((4, 5, 1), EXACT)]  # mean and rstd
    linear = [((20, 16), LOW), ((16, 16), EXACT)]  # input, transposed weight
    assert of_first_block(architecture.model(), architecture.batch(), recorder) == [
        *norm,
        *linear * 3,
        *rounded(320) * 3,
        *linear,  # attention's output is kept once, by the layer that reads it
        *norm,
        ((20, 16), LOW),
        ((16, 24), EXACT),
        ((4, 5, 24), LOW),
        ((20, 24), LOW),
        ((24, 16), EXACT),
    ]


def test_listing_of_a_gpt2_block_with_eager_attention(recorder: Recorder) -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.model()
    model.set_attn_implementation("eager")
    norm = [((16,), EXACT), ((4, 7, 16), LOW), ((16,), EXACT), ((4, 7, 1), EXACT), ((4, 7, 1), EXACT)]
    assert of_first_block(model, architecture.batch(), recorder) == [
        *norm,
        ((28, 16), LOW),
        ((16, 48), EXACT),
        ((8, 8, 7), LOW),
        ((8, 7, 8), LOW),
        ((4, 2, 7, 7), ATTENTION),  # softmax
        ((8, 7, 8), LOW),
        ((8, 7, 7), ATTENTION),  # the same again
        ((28, 16), LOW),
        ((16, 16), EXACT),
        *norm,
        ((28, 16), LOW),
        ((16, 24), EXACT),
        *[((4, 7, 24), LOW)] * 4,  # GELU with tanh
        ((28, 24), LOW),
        ((24, 16), EXACT),
    ]


def test_listing_of_a_llama_block(recorder: Recorder) -> None:
    architecture = ARCHITECTURES["llama"]
    x, rstd = (4, 7, 16), (4, 7, 1)
    norm = [(x, LOW), (rstd, EXACT), (rstd, EXACT), (x, LOW), (x, LOW), ((16,), EXACT)]
    assert of_first_block(architecture.model(), architecture.batch(), recorder) == [
        *norm,
        *[((16, 16), EXACT), ((28, 16), LOW)],
        *[((16, 8), EXACT), ((28, 16), LOW)] * 2,
        *[((1, 1, 7, 8), EXACT)] * 4,  # rotary tables
        *rounded(448) + rounded(224) * 2,
        ((16, 16), EXACT),
        ((28, 16), LOW),
        *norm,
        *[((16, 24), EXACT), ((28, 16), LOW), ((4, 7, 24), LOW)],
        *[((16, 24), EXACT), ((28, 16), LOW), ((4, 7, 24), LOW), ((4, 7, 24), LOW)],
        *[((24, 16), EXACT), ((28, 24), LOW)],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weights_and_statistics_of_every_architecture_stay_exact(
    architecture: Architecture, attention: str, recorder: Recorder
) -> None:
    model = architecture.model()
    model.set_attn_implementation(attention)
    LowBitBlocks("int8", 0).install(model)
    model(**architecture.batch()).loss.backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kinds = set()
    for tensor, kind in recorder.seen:
        if tensor.untyped_storage().data_ptr() in own or tensor.shape[-1] == 1 or not tensor.is_floating_point():
            assert kind == EXACT
        kinds.add(kind)
    assert kinds - {ATTENTION} == {EXACT, LOW}
    assert attention == "sdpa" or ATTENTION in kinds


def test_casts_of_weights_stay_exact(recorder: Recorder) -> None:
    model, batch = vit()
    LowBitBlocks("int8", 0).install(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    weights = [kind for tensor, kind in recorder.seen if tensor.shape[0] in (64, 256) and tensor.dim() == 2]
    assert len(weights) == 3 * 6 and set(weights) == {EXACT}
    inputs = [(tensor, kind) for tensor, kind in recorder.seen if tensor.shape[0] == 8 * 37 and tensor.shape[1] >= 64]
    assert {kind for tensor, kind in inputs if tensor.dtype == torch.bfloat16} == {LOW}
    assert {kind for tensor, kind in inputs if tensor.dtype != torch.bfloat16} == {EXACT}  # attention's codes
    loss.backward()


@pytest.mark.parametrize("options", [{"weight_rank": 8, "activation_threshold": 0.9}, {"update": "low_rank"}])
def test_cores_of_compressed_inputs_are_rounded_and_bases_are_not(options: dict[str, Any], recorder: Recorder) -> None:
    model, batch = vit()
    model = wasi_model(model, **{"activation_ranks": 4, **options})
    LowBitBlocks("int8", 0).install(model)
    loss = model(**batch).loss
    kinds: dict[int, set[str]] = {2: set(), 3: set()}
    for tensor, kind in recorder.seen:
        if tensor.shape[-1] == 4 and tensor.dim() > 1:
            kinds[tensor.dim()].add(kind)
    assert kinds == {2: {EXACT}, 3: {LOW}}
    loss.backward()


def test_the_exact_input_of_a_factored_layer_is_stored_small(recorder: Recorder) -> None:
    model, batch = vit()
    model = wasi_model(model, weight_rank=8)
    LowBitBlocks("int8", 0).install(model)
    loss = model(**batch).loss
    inputs = [kind for tensor, kind in recorder.seen if tensor.shape == (8, 37, 64)]
    # of each block: input of both norms, of q, k, v, of the output projection and of fc1
    assert inputs == [LOW] * 21
    loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_exact(value: float) -> None:
    x = torch.ones(128, requires_grad=True)
    factor = torch.ones(128)
    factor[3] = value
    with LowBitSavedTensors("int8", 0):
        y = (x * factor).exp()
    assert len(stored()) == 0
    y.sum().backward()
    assert not torch.isfinite(x.grad[3]) and torch.equal(x.grad[4:], torch.ones(124) * torch.e)


def test_small_integer_half_and_expanded_tensors_stay_exact(recorder: Recorder) -> None:
    x = torch.randn(64, requires_grad=True)
    with LowBitSavedTensors("bf16", 100):
        y = (2 * x).sigmoid()  # small
        z = (y.expand(8, 64).half() * 2).sigmoid()  # 16 bits already
        w = (y + 0).expand(8, 64) * torch.randint(3, (8, 64))
        v = (y + 0).expand(8, 64) * w
    assert {(tuple(tensor.stride()), tensor.dtype, kind) for tensor, kind in recorder.seen} == {
        ((1,), torch.float32, EXACT),
        ((64, 1), torch.float16, EXACT),
        ((64, 1), torch.int64, EXACT),
        ((0, 1), torch.float32, EXACT),
        ((64, 1), torch.float32, "bf16"),
    }
    (z.sum() + v.sum()).backward()


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 1.0 / x,
        lambda x: torch.div(torch.ones_like(x), x),
        lambda x: x.sqrt(),
        lambda x: x.log(),
        lambda x: torch.pow(x, -0.5),
        lambda x: (x - x.amax(-1, keepdim=True)).exp(),
        lambda x: x - x.max(),
    ],
    ids=["1 / x", "div", "sqrt", "log", "pow", "amax", "max"],
)
def test_what_is_divided_by_or_compared_stays_exact(function: Any) -> None:
    """Rounding to 8 bits makes small divisors zero, and leaves no value equal to the largest one."""
    start = (2 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))).exp()
    gradients = []
    for small in (False, True):
        leaf = start.clone().requires_grad_(True)
        with LowBitSavedTensors("int8", 0) if small else nullcontext():
            function(leaf * 1.0).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 0.01


@pytest.mark.parametrize("kind", list(BOUNDS))
@pytest.mark.parametrize("build", [vit, llama])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_error_of_the_gradients(kind: str, build: Any, attention: str) -> None:
    model, batch = build()
    model.set_attn_implementation(attention)
    exact = gradients(model, batch)
    LowBitBlocks(kind, 0).install(model)
    assert 1e-6 < error(gradients(model, batch), exact) < BOUNDS[kind]
    LowBitBlocks().remove(model)
    assert error(gradients(model, batch), exact) == 0


def test_every_architecture_trains(architecture: Architecture) -> None:
    model, batch = architecture.model(), architecture.batch()
    exact = gradients(model, batch)
    LowBitBlocks("int8", 0).install(model)
    assert error(gradients(model, batch), exact) < 0.05  # weights of std 0.3, groups over several tokens


def test_fused_attention_with_large_scores_keeps_its_sums() -> None:
    """Scores up to 60, far beyond those of trained models: the worst case for queries and keys in 8 bits."""
    qkv = torch.randn(3, 2, 4, 32, 32) * 4

    def run(kind: str | None) -> Tensor:
        leaf = qkv.clone().requires_grad_()
        q, k, v = (leaf * 1.0).unbind()
        if kind is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            with LowBitSavedTensors(kind, 0):
                out = nn.functional.scaled_dot_product_attention(q, k, v)
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = run(None)
    for kind, bound in (("bf16", 1e-3), ("int8", 0.1), ("int4", 0.1)):
        assert relative_error(run(kind), exact) < bound


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.65), ("int8", 0.5), ("int4", 0.43)])
@pytest.mark.parametrize("build", partly_slow([vit, llama], llama))
def test_peak_of_a_step_falls(kind: str, bound: float, build: Any) -> None:
    model, batch = build(64, layers=10)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)  # the smallest gradients; all of the graph
    batch = {key: value.repeat(4, *[1] * (value.dim() - 1)) for key, value in batch.items()}

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    step()
    exact = measure_peak_memory(step).peak_bytes
    LowBitBlocks(kind).install(model)
    step()
    assert measure_peak_memory(step).peak_bytes < bound * exact


def test_a_tensor_that_is_saved_three_times_is_stored_and_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expansions = []
    original = saved.dequantize_flat
    monkeypatch.setattr(saved, "dequantize_flat", lambda kept: expansions.append(kept) or original(kept))
    x = torch.randn(4, 8, 64, requires_grad=True)
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    with LowBitSavedTensors("int8", 0):
        hidden = 2 * x
        outputs = [hidden @ weight for weight in weights]
        outputs.append(hidden.view(32, 64).exp() * hidden.transpose(0, 1).reshape(32, 64).sigmoid())
        assert {region.kept.shape for region in stored()} >= {(32, 64)}
    shared = [region for region in stored() if region.source.cdata == hidden.untyped_storage()._cdata]
    assert len(shared) == 1
    held = [output.grad_fn.next_functions[0][0]._saved_self for output in outputs[:3]]
    assert len(expansions) == 1
    assert len({tensor.data_ptr() for tensor in held}) == 1
    del held, shared
    sum(output.sum() for output in outputs).backward()
    assert len(expansions) > 1  # nobody held it any more


def test_stored_tensors_go_with_the_graph() -> None:
    model, batch = vit()
    LowBitBlocks("int8").install(model)
    loss = model(**batch).loss
    assert len(stored()) > 20
    loss.backward()
    assert len(stored()) == 0
    loss = model(**batch).loss
    del loss
    assert len(stored()) == 0


def test_memory_that_is_given_to_another_tensor_is_not_mistaken_for_the_first() -> None:
    x = torch.ones(1024, requires_grad=True)
    results, addresses = [], set()
    with LowBitSavedTensors("int8", 0):
        for factor in range(1, 21):
            scaled = x * factor
            addresses.add(scaled.data_ptr())
            results.append(scaled.square().sum())
            del scaled
    assert len(addresses) < 20
    for factor, result in enumerate(results, 1):
        (gradient,) = torch.autograd.grad(result, x)
        torch.testing.assert_close(gradient, torch.full_like(x, 2.0 * factor**2))


# -------------------------------------------------------------------------------- autograd's rules


def test_double_backward_and_a_retained_graph() -> None:
    x = torch.linspace(0.5, 1, 256, dtype=torch.float64, requires_grad=True)
    with LowBitSavedTensors("int8", 0):
        hidden = 2 * x
        y = (hidden**3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 24 * x**2, rtol=0.02, atol=0)
    torch.testing.assert_close(second, 48 * x, rtol=0.02, atol=0)
    assert torch.equal(second, again)


def test_a_change_in_place_after_saving() -> None:
    x = torch.rand(256, requires_grad=True)
    with LowBitSavedTensors("int8", 0):
        hidden = x + 1
        y = hidden.square().sum()
    hidden.detach().mul_(100)
    y.backward()
    torch.testing.assert_close(x.grad, 2 * (x + 1).detach(), rtol=0.02, atol=0)  # the value when it was saved

    with LowBitSavedTensors("int8", 0):
        hidden = x + 1
        first = hidden.square()
        hidden.detach().mul_(2)
        second = hidden.square()  # a new version: stored again
    (gradient,) = torch.autograd.grad(first.sum() + second.sum(), x)
    torch.testing.assert_close(gradient, 6 * (x + 1).detach(), rtol=0.02, atol=0)

    factor = torch.rand(256)
    with LowBitSavedTensors("int8", 0):
        z = (x * factor).sum()
    factor.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: torch.float32 \[256\] is at version 1"):
        z.backward()


def test_saved_tensors_and_random_state_are_not_changed() -> None:
    x = torch.randn(8, 512, requires_grad=True)
    hidden = x * 1
    before, state = hidden.detach().clone(), torch.get_rng_state()
    with LowBitSavedTensors("int4", 0):
        y = hidden.transpose(0, 1).sigmoid()
        z = y.square().sum()
    z.backward()
    assert torch.equal(hidden, before) and torch.equal(torch.get_rng_state(), state)
    assert hidden._version == 0


# -------------------------------------------------------------------------------- blocks


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))
        self.error: BaseException | None = None
        self.checkpoint: bool | None = None  # value of use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpoint is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpoint)
        return x


def failing(error: BaseException | None) -> Failing:
    model = Failing()

    def fail(*_: Any) -> None:
        if error is not None:
            raise error

    model.layers[1][1].register_forward_hook(fail)
    LowBitBlocks("int8", 0).install(model)
    return model


def is_open() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def test_an_exception_in_the_middle_closes_the_context() -> None:
    model = failing(ValueError("in the middle"))
    with pytest.raises(ValueError, match="in the middle"):
        model(torch.randn(4, 64))
    assert not is_open()


def test_an_exception_in_an_earlier_hook_closes_nothing_that_was_not_opened() -> None:
    model = failing(None)

    def fail(*_: Any) -> None:
        raise ValueError("before")

    model.layers[0].register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="before"), LowBitSavedTensors("int8"):
        model(torch.randn(4, 64))
    assert not is_open()


def test_an_interrupt_leaves_nothing_behind() -> None:
    model = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 64))
    assert not is_open() and not torch.overrides._get_current_function_mode_stack()


def test_nothing_happens_without_gradients(recorder: Recorder) -> None:
    model = failing(None)
    with torch.no_grad():
        model(torch.randn(4, 64))
    with torch.inference_mode():
        model(torch.randn(4, 64))
    assert not recorder.seen


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, recorder: Recorder) -> None:
    model = failing(None)
    x = torch.randn(16, 64, requires_grad=True)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    recorder.seen.clear()
    model.checkpoint = reentrant
    y = model(x)
    assert not recorder.seen and not stored()
    y.sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, gradient) < 0.01
    assert bool(recorder.seen) == reentrant  # only what is recomputed with plain autograd meets the hooks


def test_other_hooks_outside_stay_in_charge_and_inside_take_over(recorder: Recorder) -> None:
    model, names = failing(None), []
    x = torch.randn(16, 64, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        names.append(tensor.shape)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
        assert is_open()
    assert names and not recorder.seen
    with LowBitSavedTensors("int8", 0), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x.exp().sum().backward()
    assert not recorder.seen
    LowBitBlocks("int4").install(model)  # a second time: the outer hooks stay in charge
    model(x).sum().backward()
    assert recorder.seen


def test_where_hooks_are_forbidden_nothing_happens() -> None:
    model = failing(None)
    x = torch.randn(4, 64)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        model(x)
    torch.func.grad(lambda x: model(x).sum())(x)


def test_compiling_sees_no_hooks(recorder: Recorder) -> None:
    model = failing(None)
    x = torch.randn(16, 64)
    expected = model(x)
    recorder.seen.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert not recorder.seen


def test_copies_and_pickles_of_a_model_store_small_as_well(recorder: Recorder) -> None:
    model, batch = vit()
    LowBitBlocks("int8").install(model)
    exact_count = None
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        recorder.seen.clear()
        gradients(other, batch)
        count = sum(kind == LOW for _, kind in recorder.seen)
        exact_count = count if exact_count is None else exact_count
        assert count == exact_count > 0


def test_a_block_that_is_called_twice_and_inside_itself() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, depth: int = 0) -> Tensor:
            x = self.linear(x).tanh()
            if depth:
                x = self(x, depth - 1)
            assert is_open()
            return x.tanh()

    model = nn.Module()
    model.layers = nn.ModuleList([Recursive()])
    LowBitBlocks("int8", 0).install(model)
    x = torch.randn(8, 64)
    first, second = model.layers[0](x, 2), model.layers[0](x, 0)
    assert not is_open()
    (first.sum() + second.sum()).backward()


def test_threads_have_their_own_contexts() -> None:
    model = failing(None)
    results = []

    def work() -> None:
        for _ in range(5):
            model(torch.randn(16, 64)).sum().backward()
        results.append(is_open())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [False] * 3


def test_only_blocks_are_stored_small(recorder: Recorder) -> None:
    model, batch = llama()
    LowBitBlocks("int8", 0).install(model)
    loss = model(**batch).loss
    assert not any(tensor.shape[-1] == 50 for tensor, _ in recorder.seen)  # logits
    del loss


def test_bad_input_is_refused_before_anything_changes() -> None:
    model = failing(None)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=r"kind must be one of \['bf16', 'int8', 'int4'\], got 'int2'"):
        LowBitBlocks("int2").install(model)
    with pytest.raises(ValueError, match="minimum_elements must not be negative, got -1"):
        LowBitSavedTensors("int8", -1)
    with pytest.raises(ValueError, match=r"must have transformer blocks, .* got Linear without any"):
        LowBitBlocks("int8").install(nn.Linear(3, 3))
    assert [dict(vars(module)) for module in model.modules()] == before
