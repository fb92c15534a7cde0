"""Whatever ends an injection, the model is as it was: structure, values, flags, hooks, outputs; and it can go on."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, exact_config, logits, train, wasi_model
from peft import get_peft_model, inject_adapter_in_model
from strategies import relative_error
from torch import Tensor, nn

import wasi_peft.memory.modes as modes_module
import wasi_peft.tuner.model as model_module
from wasi_peft import WasiConfig, preprocess_wasi
from wasi_peft.forms.residual import Int4Residual, Int8Residual, Residual
from wasi_peft.memory.loss import ChunkedLoss
from wasi_peft.memory.pieces import SlicedBlocks
from wasi_peft.memory.saved import LowBitBlocks
from wasi_peft.tuner import steps
from wasi_peft.tuner.layer import WasiLayer, wasi_layers
from wasi_peft.tuner.model import WasiModel
from wasi_peft.tuner.undo import Structure
from wasi_peft.tuner.vectors import AdapterVectors
from wasi_peft.updates.addition import Addition
from wasi_peft.updates.subspace import Subspace

VIT, LLAMA = ARCHITECTURES["vit"], ARCHITECTURES["llama"]
LOW: dict[str, Any] = {"weight_rank": 5, "modules_to_save": ["classifier"]}
ERRORS = (KeyboardInterrupt, MemoryError)


@dataclass(frozen=True)
class Point:
    """Where an injection is broken off: in which call of a function, before it runs or after."""

    owner: Any
    name: str
    call: int = 1
    after: bool = False

    def __str__(self) -> str:
        return f"{'after' if self.after else 'before'} {self.name} {self.call}"

    @contextlib.contextmanager
    def breaks(self, error: type[BaseException]) -> Iterator[list[int]]:
        """Raises there; yields the list of the calls that were made."""
        original: Callable[..., Any] = getattr(self.owner, self.name)
        calls: list[int] = []

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.call and not self.after:
                raise error("broken off")
            result = original(*args, **kwargs)
            if len(calls) == self.call:
                raise error("broken off")
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.name, broken)
            yield calls


FIRST = [
    Point(model_module, "factorize_weight"),
    Point(model_module, "factorize_weight", 5),
    Point(model_module, "factorize_weight", 12, after=True),
    Point(Subspace, "start", 7),
    Point(WasiModel, "_create_and_replace", 6),
    Point(WasiModel, "_create_and_replace", 12, after=True),
    Point(WasiModel, "_replace_module", 4),
    Point(WasiModel, "_replace_module", 4, after=True),
    Point(WasiLayer, "update_layer", 8, after=True),
    Point(WasiModel, "_mark_only_adapters_as_trainable"),
    Point(WasiModel, "_mark_only_adapters_as_trainable", after=True),
    Point(WasiModel, "_add_vectors"),
    Point(WasiModel, "_add_vectors", after=True),
    Point(AdapterVectors, "add", after=True),
    Point(AdapterVectors, "require_grad", after=True),
    Point(model_module, "enter_memory_mode"),
    Point(model_module, "enter_memory_mode", after=True),
    Point(WasiModel, "_release"),
    Point(WasiLayer, "release_base", 5),
    Point(WasiLayer, "release_base", 12, after=True),
    Point(model_module, "wasi_summary"),
]
FURTHER = [point for point in FIRST if point.name not in ("_replace_module", "release_base")]
MODE = [
    Point(SlicedBlocks, "install", after=True),
    Point(LowBitBlocks, "install"),
    Point(LowBitBlocks, "install", after=True),
    Point(ChunkedLoss, "install"),
    Point(ChunkedLoss, "install", after=True),
    Point(modes_module, "check_memory_mode"),
]


class Snapshot:
    """All that a user can see of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.objects = {name: id(tensor) for name, tensor in tensors(model).items()}
        self.classes = {name: (id(module), type(module)) for name, module in model.named_modules()}
        self.attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        self.trains = {name: tensor.requires_grad for name, tensor in tensors(model).items()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.hooks = {
            name: [list(getattr(module, table).values()) for table in HOOKS] for name, module in model.named_modules()
        }
        self.forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_as_before(model: nn.Module, before: Snapshot) -> None:
    now = Snapshot(model)
    assert list(now.values) == list(before.values)
    for name, value in before.values.items():
        assert torch.equal(now.values[name], value), name
    for attribute in ("objects", "classes", "attributes", "trains", "modes", "hooks", "forwards"):
        assert getattr(now, attribute) == getattr(before, attribute), attribute


def vit(**options: Any) -> nn.Module:
    """As users have it: some parameters frozen, some modules in another mode, a hook of their own."""
    model = VIT.model().eval()
    model.vit.embeddings.cls_token.requires_grad_(False)
    model.vit.layers[0].attention.q_proj.weight.requires_grad_(False)
    model.vit.layers[1].train()
    model.classifier.register_forward_hook(lambda *_: None)
    return model


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**VIT.batch()).logits


# -------------------------------------------------------------------- the first adapter


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", FIRST, ids=str)
@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_the_first_adapter(point: Point, error: type[BaseException], base_weight: str) -> None:
    assert_first_is_undone(point, error, lambda: exact_config(**LOW, base_weight=base_weight))


def assert_first_is_undone(point: Point, error: type[BaseException], make_config: Callable[[], WasiConfig]) -> None:
    """A first injection that is broken off leaves the model as it was; another one does what it would have done."""
    model = vit()
    before, expected = Snapshot(model), answers(model)
    config = make_config()
    with point.breaks(error) as calls, pytest.raises(error, match="broken off"):
        get_peft_model(model, config)
    assert len(calls) == point.call
    assert_as_before(model, before)
    assert torch.equal(answers(model), expected)
    assert not list(wasi_layers(model)) and not hasattr(model, "peft_config")

    again, fresh = get_peft_model(model, config), get_peft_model(vit(), make_config())
    assert torch.equal(answers(again), answers(fresh))
    assert train(again, VIT.batch()) == train(fresh, VIT.batch())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", MODE, ids=str)
def test_in_the_middle_of_a_memory_mode(point: Point, error: type[BaseException]) -> None:
    model = LLAMA.model()
    before, expected = Snapshot(model), logits(model, LLAMA.batch())
    with point.breaks(error) as calls, pytest.raises(error, match="broken off"):
        wasi_model(model, weight_rank=4, memory_mode="fast")
    assert len(calls) == point.call
    assert_as_before(model.train(before.modes[""]), before)
    assert torch.equal(logits(model, LLAMA.batch()), expected)
    losses = train(wasi_model(model, weight_rank=4, memory_mode="fast"), LLAMA.batch())
    assert losses == train(wasi_model(LLAMA.model(), weight_rank=4, memory_mode="fast"), LLAMA.batch())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", FIRST[3:], ids=str)
def test_prepared_factors_are_still_there(point: Point, error: type[BaseException]) -> None:
    """The work of a calibration is not lost."""
    config = exact_config(weight_rank=4)
    model, other = VIT.model(), VIT.model()
    for each in (model, other):
        preprocess_wasi(each, config, [VIT.batch()], repair_steps=0, progress_bar=False)
    before = Snapshot(model)
    with point.breaks(error), pytest.raises(error, match="broken off"):
        get_peft_model(model, config)
    assert_as_before(model, before)
    again, fresh = get_peft_model(model, config), get_peft_model(other, config)
    assert torch.equal(logits(again, VIT.batch()), logits(fresh, VIT.batch()))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", FIRST, ids=str)
def test_without_a_peft_model(point: Point, error: type[BaseException]) -> None:
    model = vit()
    before, expected = Snapshot(model), answers(model)
    with point.breaks(error), pytest.raises(error, match="broken off"):
        inject_adapter_in_model(exact_config(**LOW), model)
    assert_as_before(model, before)
    assert torch.equal(answers(model), expected)


# -------------------------------------------------------------------- beside a residual

BESIDE = [Point(model_module, "addition_basis", 5), Point(Addition, "start", 7)]
BESIDE += [point for point in FIRST[4:] if point.name != "release_base"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", BESIDE, ids=str)
@pytest.mark.parametrize("residual", ["int8", "exact"])
def test_beside_a_residual(point: Point, error: type[BaseException], residual: str) -> None:
    assert_first_is_undone(point, error, lambda: WasiConfig(**LOW, residual=residual))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("memory_mode", ["exact", "small"])
@pytest.mark.parametrize(("call", "after"), [(1, False), (1, True), (7, False), (12, True)])
@pytest.mark.parametrize("residual", [Int8Residual, Int4Residual])
def test_interrupted_rounding_leaves_a_dense_model(
    residual: type[Residual], call: int, after: bool, memory_mode: str, error: type[BaseException]
) -> None:
    """With the weights of some layers as they were rounded, and all flags as they were."""
    model = vit()
    before, expected = Snapshot(model), answers(model)
    with Point(residual, "_hold", call, after).breaks(error), pytest.raises(error, match="broken off"):
        get_peft_model(model, WasiConfig(**LOW, residual=residual.name, memory_mode=memory_mode))
    now = Snapshot(model)
    assert list(now.values) == list(before.values)
    for attribute in ("trains", "modes", "hooks", "forwards"):
        assert getattr(now, attribute) == getattr(before, attribute), attribute
    assert {name: kind for name, (_, kind) in now.classes.items()} == {
        name: kind for name, (_, kind) in before.classes.items()
    }
    changed = {name for name, value in before.values.items() if not torch.equal(now.values[name], value)}
    rounded = call - 1  # the one that was broken off is as it was
    assert len(changed) == rounded and all(name.endswith("weight") for name in changed)
    # again, from weights of which some are rounded already
    assert relative_error(answers(model), expected) < (0.05 if residual is Int8Residual else 0.5)
    again = get_peft_model(model, WasiConfig(**LOW, residual=residual.name, memory_mode=memory_mode))
    assert len(list(wasi_layers(again))) == 12
    losses = train(again, VIT.batch(), 3)
    assert losses[-1] < losses[0]


def test_advice_that_is_an_error_comes_before_the_dense_weights_go() -> None:
    model = vit()
    before = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="plain truncated SVD"):
            get_peft_model(model, WasiConfig(residual=None, weight_rank=3))
    assert_as_before(model, before)


def test_a_configuration_that_failed_can_be_used_again() -> None:
    config = exact_config(weight_share=0.5)
    with Point(WasiModel, "_release").breaks(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        get_peft_model(ARCHITECTURES["bert"].model(), config)
    config.target_modules = None
    expected = wasi_model(VIT.model(), weight_share=0.5)
    assert torch.equal(logits(get_peft_model(VIT.model(), config), VIT.batch()), logits(expected, VIT.batch()))


def test_nothing_of_a_failed_injection_stays_alive() -> None:
    model = vit()
    with Point(WasiModel, "_release").breaks(RuntimeError), contextlib.suppress(RuntimeError):
        get_peft_model(model, exact_config(**LOW))
    gc.collect()
    assert not [layer for layer in steps._watched if layer in model.modules()]
    own = {id(module) for module in model.modules()}
    alive = [item for item in gc.get_objects() if isinstance(item, WasiLayer)]
    assert not [layer for layer in alive if id(layer._modules.get("base_layer")) in own]


# -------------------------------------------------------------------- a further adapter


def two_options(first: str, second: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**LOW, "base_weight": "keep", "bias": first}, {**LOW, "base_weight": "keep", "bias": second}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", FURTHER, ids=str)
@pytest.mark.parametrize("active", [True, False], ids=["enabled", "disabled"])
def test_a_further_adapter(point: Point, error: type[BaseException], active: bool) -> None:
    first, second = two_options("wasi_only", "all")
    model: Any = get_peft_model(vit(), exact_config(**first))
    train(model, VIT.batch())
    model.eval()
    if not active:
        model.base_model.disable_adapter_layers()
    before, expected = Snapshot(model), answers(model)
    vectors = next(layer for _, layer in wasi_layers(model)).vectors
    with point.breaks(error) as calls, pytest.raises(error, match="broken off"):
        model.add_adapter("second", exact_config(**second))
    assert len(calls) == point.call
    assert_as_before(model, before)
    assert torch.equal(answers(model), expected)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert vectors.adapters == {"default"} and vectors.active == ("default" if active else None)
    for _, layer in wasi_layers(model):
        assert set(layer.wasi_form) == set(layer.wasi_update) == set(layer.wasi_input) == {"default"}
        assert not layer._awaiting

    if not active:
        model.base_model.enable_adapter_layers()
    model.add_adapter("second", exact_config(**second))
    model.set_adapter("second")
    assert train(model, VIT.batch(), 3)[-1] < 5
    with model.disable_adapter():
        assert torch.equal(logits(model, VIT.batch()), logits(VIT.model(), VIT.batch()))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", [p for p in FURTHER if p.name not in ("factorize_weight", "start")], ids=str)
def test_a_further_adapter_that_is_a_copy(point: Point, error: type[BaseException]) -> None:
    """Also of a released base: a copy needs no dense weight."""
    model: Any = get_peft_model(vit(), exact_config(weight_rank=5))
    train(model, VIT.batch())
    model.eval()
    before, expected = Snapshot(model), answers(model)
    with point.breaks(error), pytest.raises(error, match="broken off"):
        model.add_adapter("reference", model.peft_config["default"])
    assert_as_before(model, before)
    assert torch.equal(answers(model), expected)
    model.add_adapter("reference", model.peft_config["default"])
    model.set_adapter("reference")
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", MODE, ids=str)
def test_a_further_adapter_leaves_the_memory_mode(point: Point, error: type[BaseException]) -> None:
    options: dict[str, Any] = {"weight_rank": 4, "memory_mode": "fast", "base_weight": "keep"}
    model, other = (wasi_model(LLAMA.model(), **options) for _ in range(2))
    before = Snapshot(model)
    with point.breaks(error) as calls, pytest.raises(error, match="broken off"):
        model.add_adapter("second", exact_config(**options))
    assert len(calls) == point.call
    assert list(model.peft_config) == ["default"]
    assert_as_before(model, before)
    assert runners(model) == runners(other)
    assert train(model, LLAMA.batch()) == train(other, LLAMA.batch())


def runners(model: nn.Module) -> dict[str, list[str]]:
    """Classes of what runs around the forward of each module, outermost first."""
    found = {}
    for name, module in model.named_modules():
        around, names = vars(module).get("forward"), []
        while around is not None and hasattr(around, "run"):
            names.append(type(around.run).__name__)
            around = around.inner
        if names:
            found[name] = names
    return found


# -------------------------------------------------------------------- the structure alone


def test_restoring_what_never_changed_changes_nothing() -> None:
    model = vit()
    before = Snapshot(model)
    Structure(model).restore()
    assert_as_before(model, before)


def test_structure_holds_no_copy_of_a_value() -> None:
    model = vit()
    structure = Structure(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    structure.restore()
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())
