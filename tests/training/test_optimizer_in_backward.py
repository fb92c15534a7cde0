"""Steps inside backward: the same values as without, one gradient at a time, and a refusal of what needs them all."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import ARCHITECTURES, FORMS, checkpoint_activations, input_options
from peft import get_peft_model
from torch import Tensor, nn
from training_runs import LossRecorder, assert_same, bases, build, make_trainer, trained_values

from wasi_peft import (
    OptimizerInBackward,
    SubspaceSGD,
    WasiConfig,
    create_wasi_optimizer,
    estimate_wasi,
    measure_peak_memory,
    profile_wasi,
)
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates import subspace

Make = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adafactor": (torch.optim.Adafactor, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {}),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def in_backward(model: nn.Module) -> OptimizerInBackward:
    return OptimizerInBackward(adamw(model))


def inputs(seed: int = 0) -> Tensor:
    """For the tiny network."""
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed))


def run(model: Any, name: str, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    """Losses of some steps at a falling learning rate."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    for seed in range(steps):
        loss = model.train()(**ARCHITECTURES[name].batch(8, seed)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_both_equal(name: str, make_model: Callable[[], Any], make: Make) -> None:
    """Losses, parameters and activation bases after some steps, with and without; and all matrices did move."""
    plain, model = make_model(), make_model()
    before = trained_values(model)
    losses = run(plain, name, make(plain))
    assert run(model, name, OptimizerInBackward(make(model))) == losses
    assert_same(trained_values(model), trained_values(plain))
    assert bases(model).keys() == bases(plain).keys()
    assert all(torch.equal(basis, bases(plain)[key]) for key, basis in bases(model).items())
    matrices = [key for key, p in model.named_parameters() if p.requires_grad and p.dim() == 2]
    assert matrices and not any(torch.equal(model.get_parameter(key), before[key]) for key in matrices)


# -------------------------------------------------------------------- the same values


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("form", [name for name in FORMS if not name.endswith(("int4", "exact"))])
def test_equals_the_optimizer_bit_for_bit(kind: str, form: str) -> None:
    cls, options = OPTIMIZERS[kind]
    update = FORMS[form]["update"]
    assert_both_equal(
        "vit",
        lambda: build("vit", **FORMS[form], activation_interval=2, **input_options(update)),
        lambda model: create_wasi_optimizer(model, cls, lr=1e-2, head_lr=2e-2, weight_decay=0.1, **options),
    )


@pytest.mark.parametrize("mode", ["exact", "fast", "small"])
@pytest.mark.parametrize("name", ["vit", "llama_tied"])
def test_equals_the_optimizer_in_every_memory_mode(name: str, mode: str) -> None:
    """Everything trains; the embedding of a tied Llama is used at both ends."""

    def make_model() -> Any:
        model = build(name, update="factor", memory_mode=mode, activation_ranks=4, modules_to_save=None)
        for parameter in model.parameters():
            parameter.requires_grad = True
        return model

    assert_both_equal(name, make_model, adamw)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_equals_the_optimizer_under_torchs_checkpointing(use_reentrant: bool) -> None:
    def make_model() -> Any:
        model = build("vit", activation_ranks=4)
        checkpoint_activations(model, {"use_reentrant": use_reentrant})
        return model

    assert_both_equal("vit", make_model, adamw)


def test_equals_the_optimizer_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_both_equal("vit", lambda: build("vit", activation_ranks=4), adamw)


def test_a_closure_steps_once() -> None:
    plain, net = reference.tiny_net(0), reference.tiny_net(0)
    results = []
    for model, optimizer in ((plain, adamw(plain)), (net, in_backward(net))):

        def closure(model: nn.Module = model) -> Tensor:
            loss = model(inputs()).square().mean()
            loss.backward()
            return loss

        results.append(optimizer.step(closure))
    assert torch.equal(results[0], results[1])
    assert_same(trained_values(net), trained_values(plain))


def test_a_parameter_that_is_unfrozen_later_steps_in_backward() -> None:
    plain, net = reference.tiny_net(0), reference.tiny_net(0)
    for model, wrap in ((plain, lambda optimizer: optimizer), (net, OptimizerInBackward)):
        model.head.requires_grad_(False)
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-2))
        assert not model.head.weight.requires_grad
        for seed in range(3):
            before = model.head.weight.detach().clone()
            model(inputs(seed)).square().mean().backward()
            assert torch.equal(model.head.weight, before) == (model is plain or seed == 0)
            optimizer.step()
            optimizer.zero_grad()
            model.head.requires_grad_(True)
    assert_same(trained_values(net), trained_values(plain))


def test_a_gradient_from_elsewhere_steps_at_the_end() -> None:
    plain, net = reference.tiny_net(0), reference.tiny_net(0)
    for model, wrap in ((plain, lambda optimizer: optimizer), (net, OptimizerInBackward)):
        optimizer = wrap(adamw(model))
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert_same(trained_values(net), trained_values(plain))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_group_that_is_added_later_steps_in_backward() -> None:
    plain, net = reference.tiny_net(0), reference.tiny_net(0)
    for model, wrap in ((plain, lambda optimizer: optimizer), (net, OptimizerInBackward)):
        optimizer = wrap(torch.optim.SGD(model.blocks.parameters(), lr=0.1))
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.5})
        before = model.head.weight.detach().clone()
        model(inputs()).square().mean().backward()
        assert torch.equal(model.head.weight, before) == (model is plain)
        optimizer.step()
    assert_same(trained_values(net), trained_values(plain))


@pytest.mark.parametrize("kinds", [(in_backward, in_backward), (in_backward, adamw), (adamw, in_backward)])
def test_state_goes_from_one_run_to_the_next(kinds: tuple[Make, Make]) -> None:
    """Either kind of optimizer reads what the other saved."""
    whole = build("vit", activation_threshold=None)
    optimizer = adamw(whole)
    run(whole, "vit", optimizer)
    run(whole, "vit", optimizer)
    first = build("vit", activation_threshold=None)
    optimizer = kinds[0](first)
    run(first, "vit", optimizer)
    second = build("vit", activation_threshold=None)
    second.load_state_dict(first.state_dict())
    resumed = kinds[1](second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, "vit", resumed)
    assert_same(trained_values(second), trained_values(whole))


# -------------------------------------------------------------------- one gradient at a time


def test_no_two_gradients_live_at_once() -> None:
    model = build("vit", update="factor")
    optimizer = in_backward(model)
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None and p.grad.untyped_storage().nbytes() > 0 for p in trainable(model)))

    for parameter in trainable(model):
        parameter.register_post_accumulate_grad_hook(count)
    model(**ARCHITECTURES["vit"].batch()).loss.backward()
    assert alive == [0] * len(trainable(model))
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())


class Chain(nn.Module):
    """Layers whose factors outweigh everything else by far."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("fused", [False, True])
def test_the_peak_falls_by_the_gradients(fused: bool) -> None:
    """What is left of them are the two of one layer, and what the optimizer computes with one of these."""
    depth, width, rank = 8, 128, 64
    peaks = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        config = WasiConfig(
            update="factor", weight_rank=rank, activation_threshold=None, target_modules=r"layers\.\d+", bias="none"
        )
        model = get_peft_model(Chain(depth, width), config)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
        optimizer = OptimizerInBackward(optimizer) if wrapped else optimizer
        x = torch.randn(1, width)

        def step(model: Any = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # which makes the optimizer's state
        peaks.append(measure_peak_memory(step).peak_bytes)
    factor = 4 * width * rank
    gradients = 2 * depth * factor
    assert gradients == sum(4 * p.numel() for p in trainable(model))
    assert gradients <= peaks[0]
    assert peaks[0] - peaks[1] >= gradients - 4 * factor
    assert peaks[1] < 0.35 * peaks[0]


def test_estimates_and_profiles_know_of_it() -> None:
    """They find no gradients after backward, and agree on the peak."""
    net = reference.tiny_net(0)
    plain, estimate = (estimate_wasi(net, batch=inputs(), optimizer=make) for make in (adamw, in_backward))
    assert plain.gradients_bytes == sum(4 * p.numel() for p in trainable(net)) and estimate.gradients_bytes == 0
    assert estimate.peak_bytes < plain.peak_bytes
    profile = profile_wasi(net, batch=inputs(), optimizer=in_backward, rounds=1)
    assert profile.peak_bytes == estimate.peak_bytes


# -------------------------------------------------------------------- once a step


def test_retraction_and_ages_count_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    retracted: list[Tensor] = []
    original = subspace.retraction

    def spy(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        retracted.append(L)
        return original(L, R)

    monkeypatch.setattr(subspace, "retraction", spy)
    model = build("vit", activation_ranks=4, activation_interval=100)
    layers = [layer for _, layer in wasi_layers(model)]
    optimizer = in_backward(model)
    for step in range(1, 4):
        model.train()(**ARCHITECTURES["vit"].batch(8, step)).loss.backward()
        assert len(retracted) == (step - 1) * len(layers)  # nothing between the steps of single parameters
        optimizer.step()
        assert len(retracted) == step * len(layers)
        assert {layer.wasi_input["default"].age for layer in layers} == {step}


def test_after_an_exception_in_backward_training_goes_on() -> None:
    """What came before it has moved; no gradient is left."""
    net = reference.tiny_net(0)
    optimizer = in_backward(net)
    before = trained_values(net)

    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    handle = net.blocks[0].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(ZeroDivisionError):
        net(inputs()).square().mean().backward()
    handle.remove()
    assert not torch.equal(net.head.weight, before["head.weight"])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())
    net(inputs()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_gradients_stay_once_the_optimizer_is_removed_or_gone() -> None:
    net = reference.tiny_net(0)
    removed = in_backward(net)
    removed.remove()
    net(inputs()).square().mean().backward()
    removed.step()  # it still steps, as any optimizer does
    values = trained_values(net)
    other = in_backward(net)
    del other
    gc.collect()
    net.zero_grad()
    net(inputs()).square().mean().backward()
    assert_same(trained_values(net), values)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


# -------------------------------------------------------------------- what is refused


def _clip(net: nn.Module, optimizer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)


def _clip_values(net: nn.Module, optimizer: Any) -> None:
    torch.nn.utils.clip_grad_value_(net.parameters(), 1.0)


def _accumulate(net: nn.Module, optimizer: Any) -> None:
    net(inputs()).square().mean().backward()


def _unscale(net: nn.Module, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # a scaler must have been used
    scaler.step(optimizer)


def _own_as_well(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    second = in_backward(net)
    net(inputs()).square().mean().backward()
    second.step()


@pytest.mark.parametrize("action", [_clip, _clip_values, _accumulate, _unscale, _own_as_well])
def test_whatever_needs_gradients_is_refused(action: Callable[[nn.Module, Any], None]) -> None:
    net = reference.tiny_net(0)
    optimizer = in_backward(net)
    net(inputs()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"already used and freed this gradient, and aten\..* came too late"):
        action(net, optimizer)


def test_a_norm_alone_is_infinite() -> None:
    """The Trainer takes one for its log, as clipping to an infinite norm."""
    net = reference.tiny_net(0)
    optimizer = in_backward(net)
    net(inputs()).square().mean().backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), float("inf")).isinf()
    optimizer.step()


class CountsInGroups(torch.optim.SGD):
    """Keeps the number of steps in its groups, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_optimizers_that_need_more_than_one_gradient() -> None:
    net = reference.tiny_net(0)
    with pytest.raises(ValueError, match="without a closure, got LBFGS"):
        OptimizerInBackward(torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match="every parameter by itself, got SubspaceSGD"):
        OptimizerInBackward(SubspaceSGD(build("vit")))
    with pytest.raises(ValueError, match="every parameter by itself, got OptimizerInBackward"):
        OptimizerInBackward(in_backward(net))
    net = reference.tiny_net(0)
    optimizer = OptimizerInBackward(CountsInGroups(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="got CountsInGroups, which keeps k in its parameter groups"):
        net(inputs()).square().mean().backward()
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = reference.tiny_net(0)
    optimizer = in_backward(net)
    before = trained_values(net)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="in a distributed run, got 2 processes"):
        in_backward(net)
    with pytest.raises(RuntimeError, match="in a distributed run, got 2 processes"):
        net(inputs()).square().mean().backward()
    assert_same(trained_values(net), before)
    optimizer.remove()


def test_copies() -> None:
    net = reference.tiny_net(0)
    optimizer = in_backward(net)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(optimizer)
    twin = copy.deepcopy(net)
    before = trained_values(twin)
    twin(inputs()).square().mean().backward()
    assert_same(trained_values(twin), before)  # hooks stay with the original


# -------------------------------------------------------------------- in the Trainer


def _trained(name: str, folder: Path, make: Make, **arguments: Any) -> tuple[list[float], Any]:
    model = build(name, activation_ranks=4, activation_interval=2)
    recorder = LossRecorder(model)
    arguments = {"max_grad_norm": 0.0, "lr_scheduler_type": "linear", "warmup_steps": 1, **arguments}
    make_trainer(model, name, folder, make(model), callbacks=[recorder], **arguments).train()
    return recorder.losses, model


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_trainer_gives_the_same_parameters(name: str, tmp_path: Path) -> None:
    (losses, plain), (found, model) = (_trained(name, tmp_path, make) for make in (adamw, in_backward))
    assert found == losses
    assert_same(trained_values(model), trained_values(plain))
    assert_same(bases(model), bases(plain))


def test_the_trainer_resumes(tmp_path: Path) -> None:
    values = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build("vit", activation_threshold=None)
        trainer = make_trainer(
            model, "vit", tmp_path, in_backward(model), max_grad_norm=0.0, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=resume)
        values.append(trained_values(model))
    assert_same(values[1], values[0])


@pytest.mark.parametrize(
    "arguments", [{"max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}], ids=["clipping", "accumulation"]
)
def test_the_trainer_refuses(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"\(max_grad_norm=0 in TrainingArguments\), .* \(gradient_accumulation_steps must be 1"
    ):
        _trained("vit", tmp_path, in_backward, **arguments)
