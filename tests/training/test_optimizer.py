"""Retraction after optimizer steps, parameter groups, and the paper's own update against its dense form."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from models import exact_config
from peft import get_peft_model
from strategies import normal, orthonormality_error, relative_error
from torch import Tensor, nn

from wasi_peft import SubspaceSGD, WasiLayer, create_wasi_optimizer
from wasi_peft.linalg.subspaces import paper_step
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.tuner.steps import after_optimizer_step
from wasi_peft.updates import subspace

RANK = 3
LAYERS = 12  # two blocks of q, k, v, o, fc1, fc2


def adapted(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny network with factors of rank 3 and exact inputs, unless the options say otherwise."""
    return get_peft_model(reference.tiny_net(seed, dtype), exact_config(**{"weight_rank": RANK, **options}))


def batch(seed: int, samples: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs (samples, tokens, width)."""
    return normal(samples, 5, 8, seed=seed, dtype=dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A scalar that depends on all outputs."""
    return (model(x) - 1).square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factors_of(layer: WasiLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """L and R of the default adapter."""
    return layer.wasi_form["default"].L, layer.wasi_form["default"].R


def largest_orthonormality_error(model: nn.Module) -> float:
    """Over all layers."""
    return max(orthonormality_error(factors_of(layer)[0]) for _, layer in wasi_layers(model))


@pytest.fixture
def retracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the L that were retracted, in order."""
    calls: list[int] = []
    original = subspace.retraction

    def spy(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(id(L))
        return original(L, R)

    monkeypatch.setattr(subspace, "retraction", spy)
    return calls


# -------------------------------------------------------------------------------- retraction

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adamw", "adamw foreach", "adagrad"])
def test_each_optimizer_step_retracts_every_layer_once(
    make: Callable[[Any], torch.optim.Optimizer], retracted: list[int]
) -> None:
    model = adapted()
    optimizer = make(trainable(model))
    expected = sorted(id(factors_of(layer)[0]) for _, layer in wasi_layers(model))
    assert len(expected) == LAYERS
    for step in range(3):
        for micro_batch in range(2):
            loss_of(model, batch(10 * step + micro_batch)).backward()
            assert retracted == []  # gradients accumulate, nothing moves
        optimizer.step()
        assert sorted(retracted) == expected
        assert largest_orthonormality_error(model) < 1e-7
        retracted.clear()
        optimizer.zero_grad()
        with torch.no_grad():
            model(batch(99))
        assert retracted == []


def test_a_closure_counts_as_one_step(retracted: list[int]) -> None:
    model = adapted()
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(1))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(retracted) == LAYERS


def test_optimizers_without_the_factors_retract_nothing(retracted: list[int]) -> None:
    model = adapted(bias="all")
    others = [p for name, p in model.named_parameters() if p.requires_grad and "wasi_" not in name]
    assert others
    loss_of(model, batch(2)).backward()
    torch.optim.SGD(others, lr=0.1).step()
    unrelated = nn.Parameter(torch.ones(3))
    unrelated.grad = torch.ones(3)
    torch.optim.SGD([unrelated], lr=0.1).step()
    assert retracted == []


def test_an_optimizer_with_part_of_the_factors_retracts_that_part(retracted: list[int]) -> None:
    model = adapted()
    layers = [layer for _, layer in wasi_layers(model)]
    loss_of(model, batch(3)).backward()
    torch.optim.SGD([*factors_of(layers[4])], lr=0.1).step()
    assert retracted == [id(factors_of(layers[4])[0])]


@pytest.mark.parametrize("update", ["factor", "frozen_basis"])
def test_other_updates_are_not_retracted(update: str, retracted: list[int]) -> None:
    model = adapted(update=update)
    loss_of(model, batch(4)).backward()
    torch.optim.SGD(trainable(model), lr=0.5).step()
    assert retracted == []
    assert largest_orthonormality_error(model) > 1e-6


def test_the_hook_keeps_every_product() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with torch.no_grad():
        for index, (_, layer) in enumerate(wasi_layers(model)):
            L, _ = factors_of(layer)
            L.add_(normal(*L.shape, seed=index), alpha=10.0 ** -(index % 4))
        before = [factors_of(layer)[0] @ factors_of(layer)[1] for _, layer in wasi_layers(model)]
        after_optimizer_step(optimizer)
        after = [factors_of(layer)[0] @ factors_of(layer)[1] for _, layer in wasi_layers(model)]
    for old, new in zip(before, after, strict=True):
        assert relative_error(new, old) < 1e-7
    assert largest_orthonormality_error(model) < 1e-7


def test_a_step_then_retraction_is_the_plain_step_of_the_product() -> None:
    """What the model computes after `step()` is what SGD alone would have given."""
    model = adapted()
    lr, expected = 0.1, []
    loss_of(model, batch(5)).backward()
    for _, layer in wasi_layers(model):
        L, R = factors_of(layer)
        assert L.grad is not None and R.grad is not None
        expected.append(((L - lr * L.grad) @ (R - lr * R.grad)).detach())
    torch.optim.SGD(trainable(model), lr=lr).step()
    for product, (_, layer) in zip(expected, wasi_layers(model), strict=True):
        L, R = factors_of(layer)
        assert relative_error(L @ R, product) < 1e-7


def test_moments_are_left_alone() -> None:
    """Shapes, objects and values: the first moment after two steps is the average of the two gradients."""
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model), lr=0.01, betas=(0.9, 0.99))
    gradients: list[list[Tensor]] = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        gradients.append([p.grad.clone() for _, layer in wasi_layers(model) for p in factors_of(layer)])
        optimizer.step()
    parameters = [p for _, layer in wasi_layers(model) for p in factors_of(layer)]
    for parameter, first, second in zip(parameters, *gradients, strict=True):
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape
        assert relative_error(moment, 0.9 * 0.1 * first + 0.1 * second) < 1e-12


def test_two_models_retract_their_own_factors(retracted: list[int]) -> None:
    first, second = adapted(seed=1), adapted(seed=2)
    for model, other in ((first, second), (second, first)):
        before = [p.detach().clone() for p in other.parameters()]
        loss_of(model, batch(6)).backward()
        torch.optim.SGD(trainable(model), lr=0.1).step()
        assert sorted(retracted) == sorted(id(factors_of(layer)[0]) for _, layer in wasi_layers(model))
        assert all(torch.equal(p, old) for p, old in zip(other.parameters(), before, strict=True))
        retracted.clear()


def test_a_deep_copy_retracts_its_own_factors(retracted: list[int]) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(twin, batch(7)).backward()
    torch.optim.SGD(trainable(twin), lr=0.5).step()
    assert sorted(retracted) == sorted(id(factors_of(layer)[0]) for _, layer in wasi_layers(twin))
    assert largest_orthonormality_error(twin) < 1e-7
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# -------------------------------------------------------------------------------- SubspaceSGD


class DenseTwin:
    """The same network with dense weights `L R`, and the paper's step on them, all in float64.

    Dense gradients come from autograd on the dense network; the step is SGD (torch's own, with weight decay), after
    `clip_grad_norm_` over everything that trains, then one subspace iteration of each factored weight.
    """

    def __init__(self, model: Any) -> None:
        merged = copy.deepcopy(model).merge_and_unload()
        names = {name.removeprefix("base_model.model."): layer for name, layer in wasi_layers(model)}
        self.net = merged
        self.bases = {name: factors_of(layer)[0].detach().clone() for name, layer in names.items()}
        train = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self.net.named_parameters():
            module, _, kind = name.rpartition(".")
            own = module in names and (
                f"{module}.wasi_form.default.wasi_L" if kind == "weight" else f"{module}.wasi_form.default.bias"
            )
            parameter.requires_grad = (own or name) in train

    def step(self, lr: float, weight_decay: float, max_grad_norm: float | None) -> float:
        """One update from the gradients in `.grad`; returns their norm."""
        parameters = trainable(self.net)
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm)
        torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay).step()
        with torch.no_grad():
            for name, L in self.bases.items():
                weight = self.net.get_submodule(name).weight
                new_L, new_R = reference.subspace_step(weight, L)
                weight.copy_(new_L @ new_R)
                self.bases[name] = new_L
        self.net.zero_grad()
        return float(norm)

    def assert_equals(self, model: Any, tolerance: float) -> None:
        """Products, subspaces, and every other parameter."""
        compared = 0
        for name, layer in wasi_layers(model):
            L, R = factors_of(layer)
            dense = self.net.get_submodule(name.removeprefix("base_model.model."))
            basis = self.bases[name.removeprefix("base_model.model.")]
            assert relative_error(L @ R, dense.weight) < tolerance
            assert relative_error(L @ L.T, basis @ basis.T) < tolerance
            if layer.bias is not None:
                assert relative_error(layer.bias, dense.bias) < tolerance
            compared += 1
        assert compared == LAYERS
        others = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
        for name, parameter in self.net.named_parameters():
            if name in others:
                assert relative_error(others[name], parameter) < tolerance


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 1e-2, 1e3], ids=["no clip", "clips", "clip far away"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_subspace_sgd_is_the_dense_paper_step(
    accumulate: int, weight_decay: float, max_grad_norm: float | None, bias: bool
) -> None:
    config = exact_config(weight_rank=RANK, bias="all")
    model = get_peft_model(reference.tiny_net(3, torch.float64, bias=bias), config)
    twin = DenseTwin(model)
    optimizer = SubspaceSGD(model, lr=0.1, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    start = [factors_of(layer)[0].detach().clone() for _, layer in wasi_layers(model)]
    for step in range(3):
        for micro_batch in range(accumulate):
            x = batch(20 + 10 * step + micro_batch)
            (loss_of(model, x) / accumulate).backward()
            (loss_of(twin.net, x) / accumulate).backward()
        norm = twin.step(0.1, weight_decay, max_grad_norm)
        optimizer.step()
        (model if step % 2 else optimizer).zero_grad()
        if max_grad_norm is not None:
            assert (norm > max_grad_norm) == (max_grad_norm < 1)  # the test does clip where it says so
        # the clipping norm is summed in float32
        twin.assert_equals(model, 1e-9 if max_grad_norm is None else 1e-6)
    assert largest_orthonormality_error(model) < 1e-12
    moved = [
        relative_error(factors_of(layer)[0], old) for (_, layer), old in zip(wasi_layers(model), start, strict=True)
    ]
    assert max(moved) > 1e-4


def test_subspace_sgd_accumulates_at_full_rank() -> None:
    """There L may be square, and its tangent gradient is zero whatever the product's is."""
    model = adapted(weight_rank=8)
    twin = DenseTwin(model)
    optimizer = SubspaceSGD(model, lr=0.1)
    for micro_batch in range(2):
        x = batch(60 + micro_batch)
        (loss_of(model, x) / 2).backward()
        (loss_of(twin.net, x) / 2).backward()
    twin.step(0.1, 0.0, None)
    optimizer.step()
    twin.assert_equals(model, 1e-9)


def test_subspace_sgd_from_compressed_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step, from a thin gradient of the product that agrees with that of R."""
    model = adapted(activation_ranks=3)
    optimizer = SubspaceSGD(model, lr=0.1)
    loss_of(model, batch(50, samples=8)).backward()
    gradients = [factors_of(layer)[1].grad for _, layer in wasi_layers(model)]
    steps = []

    def spy(L: Tensor, R: Tensor, left: Tensor, right: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        steps.append((left, right, *reference.dense_paper_step(L, R, left @ right, lr)))
        assert relative_error(L.T @ left @ right, gradients[len(steps) - 1]) < 1e-10
        return paper_step(L, R, left, right, lr)

    monkeypatch.setattr("wasi_peft.training.subspace_sgd.paper_step", spy)
    optimizer.step()
    assert len(steps) == LAYERS
    for (left, right, expected_L, expected_R), (_, layer) in zip(steps, wasi_layers(model), strict=True):
        assert left.shape[1] == right.shape[0] == 3  # not the 40 rows
        L, R = factors_of(layer)
        assert relative_error(L @ R, expected_L @ expected_R) < 1e-9


def test_subspace_sgd_is_not_retracted_again(retracted: list[int]) -> None:
    model = adapted()
    optimizer = SubspaceSGD(model)
    loss_of(model, batch(8)).backward()
    optimizer.step()
    assert retracted == []


def test_subspace_sgd_follows_a_scheduler_and_runs_a_closure() -> None:
    model, twin_model = adapted(), adapted()
    optimizer = SubspaceSGD(model, lr=0.2)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    twin = SubspaceSGD(twin_model, lr=0.05)

    def closure() -> Tensor:
        loss = loss_of(model, batch(9))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    twin_loss = loss_of(twin_model, batch(9))
    twin_loss.backward()
    twin.step()
    assert loss is not None and torch.equal(loss, twin_loss)
    for own, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("zero", ["optimizer", "model", "both"])
def test_gradients_that_were_thrown_away_take_no_part(zero: str) -> None:
    """`optimizer.zero_grad()` and `model.zero_grad()` mean the same for every torch optimizer."""
    model, clean = adapted(), adapted()
    optimizer, clean_optimizer = SubspaceSGD(model), SubspaceSGD(clean)
    loss_of(model, batch(10)).backward()
    if zero in ("optimizer", "both"):
        optimizer.zero_grad()
    if zero in ("model", "both"):
        model.zero_grad()
    loss_of(model, batch(11)).backward()
    loss_of(clean, batch(11)).backward()
    optimizer.step()
    clean_optimizer.step()
    for own, other in zip(model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_step_without_gradients_changes_nothing() -> None:
    model = adapted()
    optimizer = SubspaceSGD(model, weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class TablePlusLinear(nn.Module):
    """A linear layer and a position table whose gradient, for one sample, is that of the layer's output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False)
        self.position_table = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        table = self.position_table.unsqueeze(0)
        return self.linear(x) + table


def test_collected_gradients_do_not_share_memory_with_a_parameters_gradient() -> None:
    """Autograd may hand dY on as `.grad` of the table; adding to that must not reach what was collected."""
    net = TablePlusLinear().double()
    model = get_peft_model(net, exact_config(target_modules=["linear"], weight_rank=2))
    ((_, layer),) = wasi_layers(model)
    L, R = (factor.detach().clone() for factor in factors_of(layer))
    optimizer = SubspaceSGD(model, lr=0.1)
    G = torch.zeros(4, 6, dtype=torch.float64)
    for micro_batch in range(2):
        x, weight = normal(1, 3, 6, seed=12 + micro_batch), normal(1, 3, 4, seed=14 + micro_batch)
        (model(x) * weight).sum().backward()
        G += weight[0].T @ x[0]
    assert net.position_table.grad is not None
    optimizer.step()
    expected_L, expected_R = reference.dense_paper_step(L, R, G, 0.1)
    new_L, new_R = factors_of(layer)
    assert relative_error(new_L @ new_R, expected_L @ expected_R) < 1e-10


def live_elements() -> int:
    """Elements of all tensors that exist."""
    gc.collect()
    return sum(thing.numel() for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))


def test_a_replaced_subspace_sgd_stops_collecting() -> None:
    """Trying another optimizer on the same model must not pile up the gradients of every step."""
    model = adapted()
    optimizer: torch.optim.Optimizer = SubspaceSGD(model)
    del optimizer
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    sizes = []
    for step in range(3):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step != 1:
            sizes.append(live_elements())
    assert sizes[0] == sizes[1]


def test_a_copied_model_does_not_collect_for_the_originals_optimizer() -> None:
    model = adapted()
    optimizer = SubspaceSGD(model)
    twin = copy.deepcopy(model)
    sizes = []
    for step in range(3):
        loss_of(twin, batch(step)).backward()
        if step != 1:
            sizes.append(live_elements())
    assert sizes[0] == sizes[1]  # .grad is there after the first, and nothing else gets larger
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_only_the_newest_subspace_sgd_of_a_model_can_step() -> None:
    """An older one missed gradients; a step with part of them would be silently wrong."""
    model, clean = adapted(), adapted()
    old = SubspaceSGD(model)
    loss_of(model, batch(17)).backward()
    new = SubspaceSGD(model)
    model.zero_grad()
    clean_optimizer = SubspaceSGD(clean)
    loss_of(model, batch(18)).backward()
    loss_of(clean, batch(18)).backward()
    with pytest.raises(RuntimeError, match="another SubspaceSGD"):
        old.step()
    new.step()
    clean_optimizer.step()
    for own, other in zip(model.parameters(), clean.parameters(), strict=True):
        assert relative_error(own, other) < 1e-12


class AppliedTwice(nn.Module):
    """One layer that runs twice in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("refill", [False, True])
def test_subspace_sgd_of_a_layer_that_runs_twice(refill: bool) -> None:
    """All calls of all micro-batches count, also where the input is a buffer that is filled again."""
    net = AppliedTwice().double()
    with torch.no_grad():
        net.linear.weight.copy_(normal(6, 6, seed=20))
    model = get_peft_model(net, exact_config(target_modules=["linear"], weight_rank=2))
    ((_, layer),) = wasi_layers(model)
    L, R = (factor.detach().clone() for factor in factors_of(layer))
    weight = (L @ R).requires_grad_()
    optimizer = SubspaceSGD(model, lr=0.1)
    buffer = torch.empty(4, 6, dtype=torch.float64)
    for micro_batch in range(2):
        x = normal(4, 6, seed=21 + micro_batch)
        model(buffer.copy_(x) if refill else x).square().sum().backward()
        (torch.tanh(x @ weight.T) @ weight.T).square().sum().backward()
    buffer.zero_()
    optimizer.step()
    assert weight.grad is not None
    expected_L, expected_R = reference.dense_paper_step(L, R, weight.grad, 0.1)
    new_L, new_R = factors_of(layer)
    assert relative_error(new_L @ new_R, expected_L @ expected_R) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    ],
)
def test_subspace_sgd_rejects_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceSGD(adapted(), **arguments)


@pytest.mark.parametrize("update", ["factor", "frozen_basis"])
def test_subspace_sgd_needs_the_subspace_update(update: str) -> None:
    with pytest.raises(ValueError, match=f"SubspaceSGD needs update='subspace', got '{update}'"):
        SubspaceSGD(adapted(update=update))


def test_subspace_sgd_needs_both_factors() -> None:
    model = adapted()
    _, layer = next(iter(wasi_layers(model)))
    layer.wasi_form[layer.active_name].R.requires_grad_(False)
    with pytest.raises(ValueError, match="SubspaceSGD needs both factors to train, but R is frozen"):
        SubspaceSGD(model)


@pytest.mark.parametrize("model", [lambda: reference.tiny_net(0), lambda: adapted(inference_mode=True)])
def test_subspace_sgd_needs_trainable_factors(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="trainable WASI factors, got none"):
        SubspaceSGD(model())


# -------------------------------------------------------------------------------- parameter groups


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter groups by name."""
    return {group["name"]: group for group in optimizer.param_groups}


def expected_group(name: str) -> str:
    """The group that a parameter of the tiny network belongs to, by its name."""
    if name.endswith(".wasi_L"):
        return "basis"
    if name.endswith(".wasi_R"):
        return "factors"
    if ".head." in name:
        return "head" if name.endswith("weight") else "head_vectors"
    return "vectors"


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = adapted(modules_to_save=["head"], bias="all")
    optimizer = create_wasi_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        basis_lr_ratio=0.5,
        head_lr=1e-2,
        weight_decay=0.1,
        betas=(0.8, 0.9),
    )
    groups = groups_of(optimizer)
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "basis": (5e-4, 0.0),
        "factors": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
        "head": (1e-2, 0.1),
        "head_vectors": (1e-2, 0.0),
    }
    assert all(group["betas"] == (0.8, 0.9) for group in groups.values())
    placed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(parameter) for parameter in trainable(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) in {id(p) for p in groups[expected_group(name)]["params"]}, name


def test_defaults_of_the_groups() -> None:
    model = adapted()
    groups = groups_of(create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-3))
    # AdamW's own default decay applies to nothing
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "basis": (1e-3, 0.0),
        "factors": (1e-3, 0.0),
        "vectors": (1e-3, 0.0),
    }
    decayed = groups_of(create_wasi_optimizer(model, torch.optim.SGD, lr=1e-3, weight_decay=0.1, decay_basis=True))
    assert (decayed["basis"]["weight_decay"], decayed["factors"]["weight_decay"]) == (0.1, 0.1)
    assert decayed["vectors"]["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    model = adapted(update="frozen_basis", bias="none", train_vectors=False)
    optimizer = create_wasi_optimizer(model, torch.optim.SGD, lr=1e-3)
    assert set(groups_of(optimizer)) == {"factors"}  # L is the whole of what trains: it decays, and has no ratio
    assert len(groups_of(optimizer)["factors"]["params"]) == LAYERS


def test_the_optimizer_trains_and_retracts(retracted: list[int]) -> None:
    model = adapted(modules_to_save=["head"])
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=0.02, weight_decay=0.01)
    before = [p.detach().clone() for p in trainable(model)]
    losses = []
    for _ in range(10):
        loss = loss_of(model, batch(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(retracted) == 10 * LAYERS
    assert not any(torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": 1e-3, "basis_lr_ratio": 0.0}, "basis_lr_ratio must be positive"),
        ({"lr": 1e-3, "head_lr": -1.0}, "head_lr must be positive, got -1.0"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
    ],
)
def test_create_wasi_optimizer_rejects_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_wasi_optimizer(adapted(), torch.optim.AdamW, **arguments)


@pytest.mark.parametrize("model", [lambda: reference.tiny_net(0), lambda: adapted(inference_mode=True)])
def test_create_wasi_optimizer_needs_trainable_factors(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="trainable WASI factors, got none"):
        create_wasi_optimizer(model(), torch.optim.AdamW, lr=1e-3)
