"""What follows an optimizer's step: only where it is needed, in the order of layers, and for each thread its own."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from wasi_peft import OptimizerInBackward, SubspaceSGD, WasiConfig
from wasi_peft.tuner import steps
from wasi_peft.tuner.layer import WasiLayer, wasi_layers
from wasi_peft.updates import UPDATES
from wasi_peft.updates.subspace import Subspace

WIDTH = 8


class Net(nn.Module):
    """Three layers of different sizes, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 12), nn.Linear(12, 10), nn.Linear(10, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def adapted(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    options = {"update": "subspace", "activation_threshold": None, "weight_rank": 3, **options}
    return get_peft_model(Net(), WasiConfig(target_modules=["0", "1", "2"], **options)).train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def orthonormal(model: nn.Module) -> list[bool]:
    """Of each layer, whether L has orthonormal columns: a step takes them from that, a retraction restores it."""
    found = []
    for _, layer in wasi_layers(model):
        L = layer.form.L.detach()
        found.append(bool(torch.allclose(L.T @ L, torch.eye(L.shape[1]), atol=1e-5)))
    return found


@pytest.fixture(autouse=True)
def nothing_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No layer is watched and no hook installed when a test begins, whatever others left alive."""
    watched, others = steps._watched, dict(post_hooks)
    number = None if watched._handle is None else watched._handle.id
    post_hooks.clear()
    monkeypatch.setattr(steps, "_watched", steps._Watched())
    yield
    post_hooks.clear()
    if watched._handle is None:  # the last of those layers is gone meanwhile, and so is their hook
        others.pop(number, None)
    post_hooks.update(others)


# -------------------------------------------------------------------- the hook


def test_importing_installs_nothing() -> None:
    script = (
        "import wasi_peft\n"
        "from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks\n"
        "assert not _global_optimizer_post_hooks and not _global_optimizer_pre_hooks\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("update", ["addition", "frozen_basis", "core", "factor", "low_rank"])
def test_of_updates_without_anything_to_do_one_layer_is_watched_for_divergence(update: str) -> None:
    model = adapted(update=update, residual="int8" if update == "addition" else None)
    step(model, sgd(model))
    assert len(post_hooks) == 1 and not pre_hooks
    assert list(steps._watched) == [layer for layer in model.modules() if isinstance(layer, WasiLayer)][:1]


@pytest.mark.parametrize("update", list(UPDATES))
def test_a_step_that_diverges_is_told_with_its_learning_rate(update: str) -> None:
    model = adapted(update=update, residual="int8" if update == "addition" else None)
    optimizer = sgd(model)
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(FloatingPointError, match="training diverged: a step at learning rate inf left NaN or Inf"):
        step(model, optimizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "factor", "activation_threshold": 0.9}, {"update": "low_rank", "activation_ranks": 2}],
    ids=["retraction", "warm bases", "warm bases of B A"],
)
def test_the_hook_comes_with_the_first_layer_and_goes_with_the_last(options: dict[str, Any]) -> None:
    first = adapted(**options)
    assert len(post_hooks) == 1 and not pre_hooks
    second = adapted(1, **options)
    assert len(post_hooks) == 1 and len(list(steps._watched)) == 6
    del first
    gc.collect()
    assert len(post_hooks) == 1 and len(list(steps._watched)) == 3
    step(second, sgd(second))
    del second
    gc.collect()
    assert not post_hooks and not list(steps._watched)
    third = adapted(2, **options)  # and again
    assert len(post_hooks) == 1
    del third


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_the_hook_goes_when_the_adapter_does(how: str) -> None:
    model = adapted(base_weight="keep")
    plain = getattr(model, how)()
    del model
    gc.collect()
    assert not post_hooks
    plain(torch.zeros(2, WIDTH))


def test_the_hooks_of_others_stay() -> None:
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    model = adapted()
    step(model, sgd(model))
    del model
    gc.collect()
    assert len(post_hooks) == 1 and seen == [1]
    handle.remove()


def test_an_injection_that_fails_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Subspace.start, []

    def start(self: Subspace, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return original(self, *args)

    monkeypatch.setattr(Subspace, "start", start)
    with pytest.raises(MemoryError):
        adapted()
    calls.clear()
    gc.collect()
    assert not post_hooks and not list(steps._watched)


@pytest.mark.parametrize("times", [1, 2])
def test_a_layer_is_watched_once(times: int) -> None:
    model = adapted()
    for _ in range(times):
        for _, layer in wasi_layers(model):
            steps.watch(layer)
    assert len(list(steps._watched)) == 3


def test_a_copy_is_watched_too() -> None:
    model = adapted()
    again = copy.deepcopy(model)
    step(again, sgd(again))
    assert all(orthonormal(again)) and len(list(steps._watched)) == 6
    del model
    gc.collect()
    step(again, sgd(again))
    assert all(orthonormal(again)) and len(post_hooks) == 1


def test_layers_do_not_outlive_their_model() -> None:
    model = adapted()
    step(model, sgd(model))
    references = [weakref.ref(layer) for _, layer in wasi_layers(model)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


# -------------------------------------------------------------------- whose layers, and in which order


def test_layers_step_in_the_order_in_which_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """So collective operations of sharded layers meet those of the same layer in every process."""
    models = [adapted(seed) for seed in range(4)]
    forms = [layer.form for model in models for _, layer in wasi_layers(model)]
    stepped: list[int] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(lambda form: stepped.append(forms.index(form))))
    optimizer = torch.optim.SGD([p for model in reversed(models) for p in trainable(model)], lr=0.1)
    for model in models:
        model(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    assert stepped == list(range(12))
    stepped.clear()
    del models[1], model
    gc.collect()
    optimizer.step()
    assert stepped == [index for index in range(12) if index not in (3, 4, 5)]


def test_only_the_layers_that_an_optimizer_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = adapted(), adapted(1)
    stepped: list[Any] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(stepped.append))
    step(one, sgd(one))
    assert {id(form) for form in stepped} == {id(layer.form) for _, layer in wasi_layers(one)}
    stepped.clear()
    first = next(layer for _, layer in wasi_layers(other)).form
    step(other, torch.optim.SGD([first.L, first.R], lr=0.1))
    assert stepped == [first]


def test_optimizers_of_others_disturb_nothing() -> None:
    """A step of an unrelated optimizer neither ages bases nor clears shared inputs nor retracts."""
    model = adapted(update="subspace", activation_threshold=0.9)
    unrelated = nn.Linear(3, 3)
    others = torch.optim.Adam(unrelated.parameters(), lr=0.1)
    x = torch.randn(6, WIDTH)
    model(x).square().mean().backward()
    first = next(layer for _, layer in wasi_layers(model))
    ages, shared = [layer.wasi_input["default"].age for _, layer in wasi_layers(model)], len(first.inputs)
    with torch.no_grad():
        first.form.L.mul_(2)
    unrelated(torch.ones(1, 3)).sum().backward()
    others.step()
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == ages
    assert len(first.inputs) == shared > 0
    assert orthonormal(model) == [False, True, True]
    sgd(model).step()
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == [age + 1 for age in ages]
    assert len(first.inputs) == 0 and all(orthonormal(model))


def test_a_frozen_adapter_is_not_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base_weight="keep", train_vectors=False)
    model.add_adapter("other", WasiConfig(**{**model.peft_config["default"].to_dict(), "target_modules": ["0"]}))
    stepped: list[Any] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(stepped.append))
    step(model, sgd(model))
    assert {id(form) for form in stepped} == {id(layer.form_of("default")) for _, layer in wasi_layers(model)}


def test_an_optimizer_that_retracts_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    stepped: list[Any] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(stepped.append))
    step(model, SubspaceSGD(model, lr=0.1))
    assert not stepped


def test_a_step_that_a_gradient_scaler_skipped_is_none() -> None:
    model = adapted(activation_threshold=0.9)
    optimizer = sgd(model)
    step(model, optimizer)
    ages = [layer.wasi_input["default"].age for _, layer in wasi_layers(model)]
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
    steps.after_optimizer_step(optimizer)
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == ages
    optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    steps.after_optimizer_step(optimizer)
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == [age + 1 for age in ages]


# -------------------------------------------------------------------- a step in parts


def test_parts_of_a_step_are_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    optimizer = sgd(model)
    stepped: list[Any] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(stepped.append))
    with steps.step_in_parts():
        with steps.step_in_parts():
            step(model, optimizer)
        step(model, optimizer)  # the inner context does not end the outer one
    assert not stepped
    with pytest.raises(KeyboardInterrupt), steps.step_in_parts():
        raise KeyboardInterrupt
    step(model, optimizer)
    assert len(stepped) == 3


def test_parts_belong_to_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    stepped: list[Any] = []
    monkeypatch.setattr(Subspace, "after_step", staticmethod(stepped.append))
    with steps.step_in_parts():
        in_threads([lambda: step(model, sgd(model))])
    assert len(stepped) == 3


def test_optimizer_in_backward_steps_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of each parameter inside backward; what follows a step comes once, when all are done."""
    model = adapted()
    counts = {"in backward": 0, "afterwards": 0}
    where = "in backward"

    def count(form: Any) -> None:
        counts[where] += 1

    monkeypatch.setattr(Subspace, "after_step", staticmethod(count))
    optimizer = OptimizerInBackward(torch.optim.SGD(trainable(model), lr=0.1))
    before = [layer.form.L.detach().clone() for _, layer in wasi_layers(model)]
    model(torch.randn(6, WIDTH)).square().mean().backward()
    assert not any(torch.equal(L, layer.form.L) for L, (_, layer) in zip(before, wasi_layers(model), strict=True))
    where = "afterwards"
    optimizer.step()
    assert counts == {"in backward": 0, "afterwards": 3}


# -------------------------------------------------------------------- threads


def in_threads(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run tasks at the same time; returns what they return, raises what they raise."""
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def run(index: int) -> None:
        try:
            start.wait()
            results[index] = tasks[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def trained(model: Any, seed: int, optimizer: str) -> list[Tensor]:
    """Parameters after some steps on data of one's own; layers share inputs, whose bases move every other step."""
    made: Any = SubspaceSGD(model, lr=0.1) if optimizer == "SubspaceSGD" else sgd(model)
    if optimizer == "in backward":
        made = OptimizerInBackward(made)
    for number in range(25):
        step(model, made, seed * 100 + number)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("optimizer", ["SGD", "SubspaceSGD", "in backward"])
def test_threads_that_train_their_own_models_are_as_good_as_one_after_the_other(optimizer: str) -> None:
    def models() -> list[Any]:
        options = {"activation_ranks": 3, "activation_interval": 2}
        return [adapted(seed, **options) for seed in range(2)]

    alone = [trained(model, seed, optimizer) for seed, model in enumerate(models())]
    pair = models()
    together = in_threads([lambda seed=seed: trained(pair[seed], seed, optimizer) for seed in range(2)])
    for expected, actual in zip(alone, together, strict=True):
        assert all(map(torch.equal, actual, expected))
    assert not all(map(torch.equal, alone[0], alone[1]))


@pytest.mark.slow
def test_threads_that_make_and_lose_models_while_another_one_trains() -> None:
    expected = trained(adapted(0), 0, "SGD")
    models = [adapted(0)]
    states = [adapted(seed + 1).state_dict() for seed in range(2)]

    def make_and_lose(seed: int) -> None:
        for _ in range(8):  # no seed of the process is set here: the other thread must not depend on it
            short_lived = get_peft_model(
                Net(),
                WasiConfig(
                    target_modules=["0", "1", "2"], update="subspace", weight_rank=3, activation_threshold=None
                ),
            )
            short_lived.load_state_dict(states[seed])
            step(short_lived, sgd(short_lived))
            assert all(orthonormal(short_lived))
            del short_lived
            gc.collect()

    results = in_threads([lambda: trained(models[0], 0, "SGD"), *(lambda s=s: make_and_lose(s) for s in range(2))])
    assert all(map(torch.equal, results[0], expected))
    models.clear()
    gc.collect()
    assert not list(steps._watched) and not post_hooks
