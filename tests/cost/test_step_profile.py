"""The profile of a step against measured memory and the estimate; that it adds up, and that it changes nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Batch, checkpoint_activations, input_options, wasi_model
from peft import LoraConfig, get_peft_model
from slow import partly_slow
from torch import Tensor, nn

from wasi_peft import SubspaceSGD, WasiConfig, measure_peak_memory
from wasi_peft.cost import profile as implementation
from wasi_peft.cost.estimate import CATEGORIES, OPTIMIZERS, estimate_wasi
from wasi_peft.cost.profile import TRAINING, Cost, StepProfile, profile_wasi
from wasi_peft.cost.trace import KINDS, marked_modules, one_round, operation_kind, phase, read_times
from wasi_peft.forms.products import measured_seconds
from wasi_peft.report import costs_table, plot_profiles, profiles_table
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.tuner.layer import wasi_layers

SAMPLES = 16
CONFIGS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear"),
    "low rank": lambda: WasiConfig(weight_rank=3, activation_ranks=4, update="low_rank", update_rank=2),
    "factor": lambda: WasiConfig(weight_rank=5, activation_ranks=4, update="factor"),
    "frozen basis": lambda: WasiConfig(residual=None, weight_rank=5),
}
VIT = ARCHITECTURES["vit"]


@functools.cache
def profiled(name: str, kind: str) -> StepProfile:
    """One profile for all tests that look at it."""
    architecture = ARCHITECTURES[name]
    return profile_wasi(architecture.model(), CONFIGS[kind](), batch=architecture.batch(SAMPLES), rounds=2)


def measured_peak(model: nn.Module, batch: Batch) -> int:
    """Tracked peak of a copy of the model and its first two steps; in the second one activation bases move."""

    def train() -> None:
        twin = copy.deepcopy(model).train()
        optimizer = OPTIMIZERS["adamw"]([p for p in twin.parameters() if p.requires_grad])
        for _ in range(2):
            loss = twin(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            for _, layer in wasi_layers(twin):
                layer.wasi_input["default"].age = layer.wasi_input["default"].interval

    return measure_peak_memory(train).peak_bytes


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", partly_slow(["vit", "llama", "t5"], "vit", "t5"))
def test_memory_is_what_is_measured(name: str, kind: str) -> None:
    profile, architecture = profiled(name, kind), ARCHITECTURES[name]
    config = CONFIGS[kind]()
    model = architecture.model() if config is None else get_peft_model(architecture.model(), config)
    assert profile.peak_bytes == measured_peak(model, architecture.batch(SAMPLES))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_memory_is_what_is_estimated(name: str, kind: str) -> None:
    profile, architecture = profiled(name, kind), ARCHITECTURES[name]
    estimate = estimate_wasi(architecture.model(), CONFIGS[kind](), batch=architecture.batch(SAMPLES))
    # the estimate leaves out a few bytes that kernels take inside them
    assert profile.peak_bytes == pytest.approx(estimate.peak_bytes, rel=1e-3)
    assert profile.saved_bytes == pytest.approx(estimate.saved_bytes, rel=1e-3)
    for category in CATEGORIES:
        assert profile.at_peak[category] == pytest.approx(estimate.at_peak[category], rel=1e-3, abs=256)


# ---------------------------------------------------------------- memory modes


MANY = {"vit": 256, "llama": 64}  # samples; fewer, and no tensor is worth rounding


def in_mode(name: str, mode: str, update: Any = None) -> nn.Module:
    torch.manual_seed(0)
    config = WasiConfig(
        residual=None, weight_rank=3, update=update, update_rank=2, activation_threshold=None, memory_mode=mode
    )
    return get_peft_model(ARCHITECTURES[name].model(), config)


@functools.cache
def profiled_in_mode(name: str, mode: str, update: str | None = None) -> StepProfile:
    """One profile for all tests that look at it."""
    return profile_wasi(in_mode(name, mode, update), batch=ARCHITECTURES[name].batch(MANY[name]), rounds=1)


def bytes_after_forward(model: nn.Module, batch: Batch) -> int:
    """What a forward pass of the step leaves behind besides the loss, in a copy of the model."""
    twin = copy.deepcopy(model).train()
    losses: list[Tensor] = []
    left = measure_peak_memory(lambda: losses.append(twin(**batch).loss)).left_bytes
    return left - losses[0].untyped_storage().nbytes()


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("name", MANY)
def test_the_step_runs_in_its_memory_mode(name: str, mode: str) -> None:
    """Nothing that looks at the step may take the place of how it keeps what backward needs."""
    profile = profiled_in_mode(name, mode)
    model, batch = in_mode(name, mode), ARCHITECTURES[name].batch(MANY[name])
    assert profile.peak_bytes == measured_peak(model, batch)
    assert profile.saved_bytes == bytes_after_forward(model, batch)
    assert sum(cost.saved_bytes for cost in profile.by_module().values()) == profile.saved_bytes
    others = [profiled_in_mode(name, other).saved_bytes for other in MEMORY_MODES[: MEMORY_MODES.index(mode)]]
    assert all(profile.saved_bytes < 0.8 * other for other in others)


@pytest.mark.parametrize(("update", "operation"), [("frozen_basis", "FactoredLinear"), ("low_rank", "LowRankLinear")])
def test_rounded_tensors_belong_to_what_keeps_them(update: str, operation: str) -> None:
    """Exactly, a norm keeps its input; in few bits, it keeps what the rounding made of it, and the same statistics."""
    profiles = [profiled_in_mode("vit", mode, update) for mode in ("exact", "fast")]
    exact, fast = (profile.by_module() for profile in profiles)
    rows, width = 256 * 5, 16
    norm = "vit.layers.0.layernorm_after"
    statistics = 2 * rows * 4
    assert exact[norm].saved_bytes == rows * width * 4 + statistics
    assert rows * width < fast[norm].saved_bytes - statistics < 1.3 * rows * width
    operations = [set(profile.saved_by_operation) for profile in profiles]
    others = ({"scaled_dot_product_attention", "gelu"}, {"LowBitAttentionFunction", "LowBitActivationFunction"})
    assert others[0] <= operations[0] and others[1] <= operations[1]
    assert operations[0] - others[0] == operations[1] - others[1] >= {"layer_norm", operation}


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_adds_up(kind: str) -> None:
    profile = profiled("vit", kind)
    assert sum(profile.at_peak.values()) == profile.peak_bytes
    assert max(sum(moment.held.values()) for moment in profile.timeline) == profile.peak_bytes
    assert sum(profile.saved_by_operation.values()) == profile.saved_bytes
    assert list(dict.fromkeys(moment.phase for moment in profile.timeline)) == list(TRAINING)
    assert list(profile.seconds_by_kind) == list(profile.inference_seconds_by_kind) == list(KINDS)
    assert sum(profile.seconds_by_kind.values()) == pytest.approx(profile.step_seconds)
    assert sum(profile.inference_seconds_by_kind.values()) == pytest.approx(profile.inference_seconds)
    assert profile.seconds_by_kind["optimizer"] == pytest.approx(profile.optimizer_seconds)
    assert profile.inference_seconds_by_kind["optimizer"] == 0
    for groups in (profile.by_class(), profile.by_block(), profile.by_module()):
        total = sum(groups.values(), Cost())
        assert total.saved_bytes == profile.saved_bytes
        assert total.forward_seconds == pytest.approx(profile.forward_seconds)
        assert total.backward_seconds == pytest.approx(profile.backward_seconds)
        assert total.inference_seconds == pytest.approx(profile.inference_seconds)


# ---------------------------------------------------------------- attribution


class Toy(nn.Module):
    """Layers whose cost is known; `narrow` is done without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 64)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(64)
        self.narrow = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.wide(x))) @ self.narrow.weight.T


def test_kept_bytes_go_to_the_first_that_keeps_them() -> None:
    profile = profile_wasi(Toy(), batch=torch.randn(128, 32), rounds=1)
    saved = {name: cost.saved_bytes for name, cost in profile.by_module().items()}
    wide = 128 * 64 * 4
    # the input of the activation; its output, mean and deviation; the product keeps the output of the norm
    assert saved == {"": wide, "wide": 0, "act": wide, "norm": wide + 2 * 128 * 4, "narrow": 0}
    assert profile.saved_by_operation == {"layer_norm": wide + 1024, "gelu": wide, "matmul": wide}


def test_time_goes_to_modules_and_kinds_forward_and_backward() -> None:
    costs = profile_wasi(Toy(), batch=torch.randn(128, 32), rounds=1).by_module()
    for name in ("wide", "act", "norm", ""):
        assert (
            costs[name].forward_seconds > 0 and costs[name].backward_seconds > 0 and costs[name].inference_seconds > 0
        )
    assert costs["narrow"] == Cost()


def test_operations_belong_to_their_module_in_both_directions() -> None:
    """By what has any time, not by how much."""
    model = Toy()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with marked_modules(dict(model.named_modules())), torch.profiler.profile(activities=activities) as profile:
        for _ in range(2):
            with one_round():
                with phase("forward"):
                    loss = model(torch.randn(128, 32)).sum()
                with phase("backward"):
                    loss.backward()
        loss = model(torch.randn(128, 32)).sum()  # in no phase
    rounds = read_times(profile)
    assert len(rounds) == 2
    for times in rounds:
        assert {name for name, _, _ in times} == {"forward", "backward"}
        places: dict[tuple[str, str], set[str]] = {}
        for (name, module, kind), nanoseconds in times.items():
            assert nanoseconds >= 0
            if kind in ("matrix products", "attention", "normalisation", "elementwise"):
                places.setdefault((name, kind), set()).add(module)
        assert places["forward", "matrix products"] == places["backward", "matrix products"] == {"wide", ""}
        assert places["forward", "normalisation"] == places["backward", "normalisation"] == {"norm"}
        assert "act" in places["forward", "elementwise"] and "act" in places["backward", "elementwise"]
        assert ("forward", "attention") not in places


def test_layers_of_adapters_are_one_module() -> None:
    dense, lora, wasi = (profiled("vit", kind) for kind in ("dense", "lora", "factor"))
    names = {module.name for module in dense.modules}
    assert {module.name for module in wasi.modules} == {module.name for module in lora.modules} == names
    assert wasi.by_class()["wasi.Linear"].saved_bytes < lora.by_class()["lora.Linear"].saved_bytes
    assert list(dense.by_block()) == list(wasi.by_block())
    assert {"vit.layers.0", "vit.layers.1", "vit.embeddings", "classifier", ""} <= set(dense.by_block())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_belong_to_their_modules(reentrant: bool) -> None:
    model, batch = VIT.model(), VIT.batch(SAMPLES)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    profile, plain = profile_wasi(model, batch=batch, rounds=1), profiled("vit", "dense")
    assert profile.saved_bytes < plain.saved_bytes / 2
    assert sum(cost.saved_bytes for cost in profile.by_module().values()) == profile.saved_bytes
    for name, cost in profile.by_module().items():
        if name.endswith(("fc1", "layernorm_before")):
            assert cost.forward_seconds > 0 and cost.backward_seconds > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("ScaledDotProductFlashAttentionForCpuBackward0", "other"),
        ("aten::native_layer_norm_backward", "normalisation"),
        ("aten::linalg_vector_norm", "other"),
        ("aten::add_", "elementwise"),
        ("aten::_softmax", "elementwise"),
        ("aten::_to_copy", "copies"),
        ("quantized::embedding_bag_byte_prepack", "quantization"),
        ("aten::view", "other"),
        ("add", "other"),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert operation_kind(name) == kind


def test_activation_bases_are_state_and_the_optimizer_may_be_any() -> None:
    model = wasi_model(VIT.model(), weight_rank=5, activation_ranks=4, update="subspace")
    profile = profile_wasi(
        model, batch=VIT.batch(SAMPLES), optimizer=lambda twin: SubspaceSGD(twin, lr=1e-4), rounds=1
    )
    assert profile.at_peak["optimizer"] == 0
    with_state = [layer for _, layer in wasi_layers(model) if layer.wasi_input["default"].rule is not None]
    most = sum(4 * layer.in_features * 4 for layer in with_state)
    assert 0 < profile.at_peak["state"] <= most
    nothing = profile_wasi(model, batch=VIT.batch(SAMPLES), optimizer=None, rounds=1)
    assert nothing.at_peak["optimizer"] == 0 and nothing.peak_bytes <= profile.peak_bytes


def test_mixed_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        profile = profile_wasi(Toy(), batch=torch.randn(128, 32), rounds=1)
    assert profile.saved_by_operation["gelu"] == 128 * 64 * 2


# ---------------------------------------------------------------- nothing changes


@contextlib.contextmanager
def unchanged(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Asserts that model, gradients, bases, modes, hooks, batch, modes of torch and random state stay as they are."""

    def state() -> tuple[list[Any], list[Tensor | None]]:
        states = [state for _, layer in wasi_layers(model) for state in layer.wasi_input.values()]
        plain = [
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            [(state.age, id(state.bases.feature)) for state in states],
            list(model.state_dict()),
            torch.is_grad_enabled(),
            torch.autograd._profiler_enabled(),
        ]
        tensors = [*model.parameters(), *model.buffers(), *batch.values(), torch.get_rng_state()]
        tensors += [state.bases.feature for state in states]
        return plain, [*tensors, *(parameter.grad for parameter in model.parameters())]

    plain, tensors = state()
    tensors = [None if tensor is None else tensor.detach().clone() for tensor in tensors]
    yield
    now_plain, now_tensors = state()
    assert now_plain == plain
    for now, before in zip(now_tensors, tensors, strict=True):
        assert (now is None and before is None) or torch.equal(now, before)  # type: ignore[arg-type]


def model_in_use(kind: str) -> Any:
    """A model after two steps, with gradients; dropout draws random numbers, and parts are in different modes."""
    model: Any = VIT.model()
    if kind != "dense":
        model = wasi_model(model, weight_rank=5, update=kind, **input_options(kind))
    model.train()
    for seed in range(2):
        model(**VIT.batch(8, seed)).loss.backward()
    next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


@pytest.mark.parametrize("kind", ["dense", "factor", "low_rank", "core"])
def test_the_model_stays_as_it_is(kind: str) -> None:
    model, batch = model_in_use(kind), VIT.batch(SAMPLES)
    with unchanged(model, batch):
        first = profile_wasi(model, batch=batch, rounds=1)
    second = profile_wasi(model, batch=batch, rounds=1)
    assert (first.at_peak, first.saved_by_operation) == (second.at_peak, second.saved_by_operation)


def test_a_config_goes_into_the_copy() -> None:
    model, batch = VIT.model(), VIT.batch(SAMPLES)
    with unchanged(model, batch):
        profile_wasi(model, WasiConfig(residual=None, weight_rank=3), batch=batch, rounds=1)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("last", partly_slow([1, 4, 5, 6], 1, 5))
def test_a_step_that_raises_changes_nothing(where: str, last: int) -> None:
    """In each kind of step: with memory traced, to warm up, timed, with time traced."""
    model, batch = model_in_use("factor"), VIT.batch(SAMPLES)
    calls = 0

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            count("backward")
            return grad

    def count(here: str) -> None:
        nonlocal calls
        calls += here == where
        if calls == last:
            raise RuntimeError(f"in {here}")

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            count("optimizer")
            return super().step(closure)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if module.training:
            count("forward")
            return Stop.apply(output)
        return None

    norm = next(module for name, module in model.named_modules() if name.endswith("layers.1.layernorm_after"))
    norm.register_forward_hook(hook)
    make = lambda twin: Optimizer([p for p in twin.parameters() if p.requires_grad], lr=0.0)  # noqa: E731
    with unchanged(model, batch), pytest.raises(RuntimeError, match=f"in {where}"):
        profile_wasi(model, batch=batch, optimizer=make, rounds=1)
    assert calls == last
    calls = -1000
    profile_wasi(model, batch=batch, optimizer=make, rounds=1)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": {}}, "at least one tensor"),
        ({"batch": {"pixel_values": torch.zeros(0, 3, 8, 8)}}, "no empty one"),
        ({"optimizer": "adagrad"}, "must be one of 'adamw'.*got 'adagrad'"),
        ({"rounds": 0}, "rounds must be .* at least 1, got 0"),
        ({"rounds": 1.5}, "got 1.5"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_wasi(VIT.model(), **{"batch": VIT.batch()} | options)


def test_models_that_cannot_be_profiled() -> None:
    batch = VIT.batch()
    with pytest.raises(ValueError, match="require a gradient, got none"):
        profile_wasi(VIT.model().requires_grad_(False), batch=batch)
    with pytest.raises(ValueError, match=r"on the CPU, got .*meta"):
        profile_wasi(VIT.model().to("meta"), batch=batch)
    adapted = wasi_model(VIT.model(), weight_rank=3)
    with pytest.raises(ValueError, match="has an adapter already"):
        profile_wasi(adapted, WasiConfig(residual=None, weight_rank=3), batch=batch)
    with pytest.raises(TypeError, match="PEFT configuration"):
        profile_wasi(VIT.model(), {"r": 3}, batch=batch)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is shown


def test_plain_data_and_tables() -> None:
    profile = profiled("vit", "factor")
    data = json.loads(json.dumps(profile.to_dict()))
    assert data["step_seconds"] == profile.step_seconds
    assert data["peak_bytes"] == sum(data["at_peak"].values())
    assert {"phase": "forward", **profile.timeline[0].held} == data["timeline"][0]
    assert {module["name"] for module in data["modules"]} == set(profile.by_module())
    text = str(profile)
    assert "wasi.Linear" in text and "FactoredLinear" in text and "held at the peak" in text


def test_profiles_side_by_side() -> None:
    profiles = {kind: profiled("vit", kind) for kind in ("dense", "factor")}
    header, *lines = profiles_table(profiles).splitlines()
    assert header.split() == ["dense", "factor"]
    rows = {line.split(", ")[0].strip(): line.split()[-2:] for line in lines}
    unit = 1024
    assert rows["saved for backward"] == [f"{profile.saved_bytes / unit:.2f}" for profile in profiles.values()]
    assert f"{profiles['factor'].peak_bytes / profiles['dense'].peak_bytes:.1%}" in profiles_table(profiles)
    for by, row in (("class", "GELUActivation"), ("block", "vit.layers.1"), ("module", "vit.layers.1.mlp.fc1")):
        assert row in costs_table(profiles["factor"], by)
    with pytest.raises(ValueError, match="by must be one of 'class', 'block', 'module', got 'layer'"):
        costs_table(profiles["factor"], "layer")
    assert "(model)" in costs_table(profiles["dense"], "block")
    with pytest.raises(ValueError, match="must be one of 'class', 'block', 'module', got 'layer'"):
        costs_table(profiles["dense"], "layer")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profiles = {kind: profiled("vit", kind) for kind in ("dense", "factor")}
    figure = plot_profiles(profiles, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    left, right, step, inference = figure.axes
    assert [ax.get_title().split(":")[0] for ax in (left, right)] == list(profiles)
    assert (step.get_title(), inference.get_title()) == ("Training step, ms", "Inference, ms")
    tops = [max(bar.get_y() + bar.get_height() for bar in step.patches[index::2]) for index in range(2)]
    assert tops == pytest.approx([1000 * profile.step_seconds for profile in profiles.values()])


def test_long_timelines_keep_the_peak() -> None:
    moments = [implementation.Moment("forward", {"saved": value}) for value in [*range(1000), *range(700, 0, -1)]]
    thinned = list(implementation._thinned(moments))
    assert len(thinned) <= implementation.TIMELINE_POINTS
    assert max(moment.held["saved"] for moment in thinned) == 999


def test_measuring_the_products_is_no_part_of_a_step() -> None:
    """It holds megabytes of operands, once a process."""
    architecture = ARCHITECTURES["vit"]

    def peak() -> int:
        batch = architecture.batch()
        return profile_wasi(architecture.model(), WasiConfig(), batch=batch, rounds=1).peak_bytes

    measured_seconds.cache_clear()
    assert peak() == peak()
