"""PEFT's custom-model tests in small: what every tuner has to do on plain modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FORMS, exact_config, form_options
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class MLP(nn.Module):
    """Two linear layers, the second without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 16, bias=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.relu(self.lin0(x))))


class ConvModel(nn.Module):
    """The same with transformers' Conv1D, whose weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(20, 10)
        self.relu = nn.ReLU()
        self.lin1 = Conv1D(16, 20)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.relu(self.lin0(x))))


TARGETS = {
    "list": ["lin0", "lin1"],
    "one": ["lin0"],
    "regex": r"lin\d",
}
CASES = [(kind, target) for kind in (MLP, ConvModel) for target in TARGETS]
cases = pytest.mark.parametrize(("kind", "target"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)


def config(target: str = "list", **options: Any) -> Any:
    given = {"base_weight": "keep", "bias": "none", "train_vectors": False, "target_modules": TARGETS[target]}
    return exact_config(**{**given, **options})


def beside(form: str, target: str = "list", **options: Any) -> Any:
    """The same with any form, all directions that a layer has."""
    rank = {} if FORMS[form]["residual"] is None else {"weight_rank": 10}
    return config(target, **{"base_weight": "release", **form_options(form), **rank, **options})


def dense(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    model = kind().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if name.endswith("weight") else 0.1)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(9, 10, generator=torch.Generator().manual_seed(4)).to(dtype)


def step(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    model.eval()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@cases
@pytest.mark.parametrize("shape", [(9, 10), (10,), (2, 3, 10), (2, 1, 3, 10), (0, 10)], ids=str)
def test_forward(kind: type[nn.Module], target: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = dense(kind)(x)
    model = get_peft_model(dense(kind), config(target))
    close(model(x), expected)
    close(model.eval()(x).detach(), expected.detach())
    close(model(x=x), expected)


@cases
@pytest.mark.parametrize("form", FORMS)
def test_only_adapter_parameters_change(kind: type[nn.Module], target: str, form: str) -> None:
    model, update = get_peft_model(dense(kind), beside(form, target)), FORMS[form]["update"]
    step(model)  # A moves once B is not zero, and R, beside a residual, to where the data are
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = trainable(model)
    parts = {"low_rank": "AB", "core": "M", "frozen_basis": "L"}.get(update, "LR")
    prefix = "wasi_" if FORMS[form]["residual"] is None else "wasi_added_"
    assert {name.rpartition(f".wasi_form.default.{prefix}")[2] for name in names} == set(parts)
    step(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


@cases
def test_disable_restores(kind: type[nn.Module], target: str) -> None:
    original = dense(kind)(inputs())
    model = get_peft_model(dense(kind), config(target))
    close(model(inputs()), original)
    step(model)
    adapted = model(inputs())
    assert not torch.allclose(adapted, original, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), original)
    assert torch.equal(model(inputs()), adapted)


@cases
def test_disabled_output_is_differentiable_outside(kind: type[nn.Module], target: str) -> None:
    model = get_peft_model(dense(kind), config(target))
    x = inputs().requires_grad_()
    with model.disable_adapter():
        model(x).sum().backward()
    reference = inputs().requires_grad_()
    dense(kind)(reference).sum().backward()
    close(x.grad, reference.grad)


@cases
def test_merge_and_unmerge(kind: type[nn.Module], target: str) -> None:
    model = get_peft_model(dense(kind), config(target))
    step(model)
    expected = model(inputs())
    model.merge_adapter()
    close(model(inputs()), expected)
    model.unmerge_adapter()
    assert torch.equal(model(inputs()), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(model(inputs()), expected)


@cases
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_merge_and_unload(kind: type[nn.Module], target: str, safe_merge: bool, base_weight: str) -> None:
    model = get_peft_model(dense(kind), config(target, base_weight=base_weight))
    step(model)
    expected = model(inputs())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    close(merged(inputs()), expected)
    reference = dense(kind)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in reference.named_modules()}
    assert list(merged.state_dict()) == list(reference.state_dict())
    assert not hasattr(merged, "peft_config")


@cases
def test_merge_then_merge_and_unload(kind: type[nn.Module], target: str) -> None:
    model = get_peft_model(dense(kind), config(target))
    step(model)
    expected = model(inputs())
    model.merge_adapter()
    merged = model.merge_and_unload()
    close(merged(inputs()), expected)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


@cases
@pytest.mark.parametrize("base_weight", ["cpu", "keep"])
@pytest.mark.parametrize("merged", [False, True])
def test_unload(kind: type[nn.Module], target: str, base_weight: str, merged: bool) -> None:
    model = get_peft_model(dense(kind), config(target, base_weight=base_weight))
    step(model)
    if merged:
        model.merge_adapter()
    unloaded = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert torch.equal(unloaded(inputs()), dense(kind)(inputs()))


@cases
def test_adding_and_deleting_adapters(kind: type[nn.Module], target: str) -> None:
    original = dense(kind)(inputs())
    model = get_peft_model(dense(kind), config(target), adapter_name="one")
    step(model)
    first = model(inputs())
    model.add_adapter("two", config(target))
    model.add_adapter("three", config(target, explained_variance_threshold=0.5))
    assert torch.equal(model(inputs()), first)
    model.set_adapter("two")
    close(model(inputs()), original)
    step(model)
    second = model(inputs())
    model.delete_adapter("three")
    assert model.active_adapters == ["two"]
    assert torch.equal(model(inputs()), second)
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("two")
    assert model.active_adapter == "one" or model.active_adapters == ["one"]
    assert torch.equal(model(inputs()), first)
    assert all(".one." in name for name in trainable(model))
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(model.base_model(inputs()), original)  # PeftModel itself needs an adapter to run
    assert not any(".wasi_form." in name for name in model.state_dict())
    model.add_adapter("four", config(target))
    model.set_adapter("four")
    close(model(inputs()), original)


@cases
def test_requires_grad_follows_the_active_adapter(kind: type[nn.Module], target: str) -> None:
    model = get_peft_model(dense(kind), config(target))
    only = trainable(model)
    assert only and all(".wasi_form.default." in name for name in only)
    model.add_adapter("other", config(target))
    assert trainable(model) == only
    model.set_adapter("other")
    assert trainable(model) == {name.replace(".default.", ".other.") for name in only}
    model.set_adapter("default")
    assert trainable(model) == only
    model.set_adapter("other", inference_mode=True)
    assert trainable(model) == set()
    model.set_adapter("default")
    model.set_requires_grad("default", requires_grad=False)
    assert trainable(model) == set()
    model.set_requires_grad("default")
    assert trainable(model) == only


@pytest.mark.parametrize("update", ["subspace", "frozen_basis", "low_rank", "core"])
@pytest.mark.parametrize("bias", ["none", "wasi_only"])
def test_requires_grad_survives_disabling_and_switching(update: str, bias: str) -> None:
    model = get_peft_model(dense(MLP), config(update=update, bias=bias))
    only = trainable(model)
    assert any(name.endswith(".default.wasi_R") for name in only) == (update == "subspace")
    assert any(name.endswith(".default.bias") for name in only) == (bias == "wasi_only")
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == only
    model.set_adapter("default")
    assert trainable(model) == only
    model.set_requires_grad("default", requires_grad=False)
    model.set_requires_grad("default")
    assert trainable(model) == only


def test_adapters_with_different_targets_on_a_kept_base() -> None:
    original = dense(MLP)(inputs())
    model = get_peft_model(dense(MLP), config("one"))
    step(model)
    first = model(inputs())
    model.add_adapter("other", config(target="list", target_modules=["lin1"]))
    assert torch.equal(model(inputs()), first)
    model.set_adapter("other")
    close(model(inputs()), original)
    step(model)
    assert all("lin1" in name for name in trainable(model))
    model.set_adapter("default")
    assert torch.equal(model(inputs()), first)
    model.delete_adapter("other")
    assert torch.equal(model(inputs()), first)


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_other_dtypes(kind: type[nn.Module], target: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    """Factors of 16 bits become float32 unless told otherwise, as with any PEFT method; what they answer does not."""
    model = get_peft_model(dense(kind).to(dtype), config(target), autocast_adapter_dtype=autocast_adapter_dtype)
    trained = torch.float32 if autocast_adapter_dtype and dtype != torch.float64 else dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (trained if ".wasi_" in name else dtype)
    output = model(inputs(dtype))
    assert output.dtype == dtype
    close(output.float(), dense(kind)(inputs()), 0.1)
    output.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in trainable(model):
            assert parameter.grad.dtype == trained and torch.isfinite(parameter.grad).all()
    model.merge_adapter()
    assert model(inputs(dtype)).dtype == dtype
    model.unmerge_adapter()
    assert {p.dtype for p in model.merge_and_unload(safe_merge=True).parameters()} == {dtype}


@cases
def test_wrapping_again_after_unloading(kind: type[nn.Module], target: str) -> None:
    base, original = dense(kind), dense(kind)(inputs())
    for _ in range(3):
        model = get_peft_model(base, config(target))
        close(model(inputs()), original)
        assert list(model.peft_config) == ["default"]
        step(model)
        base = model.unload()
        assert torch.equal(base(inputs()), original)
        assert not hasattr(base, "peft_config")


@cases
def test_the_given_model_is_changed_in_place_and_a_config_can_be_used_again(
    kind: type[nn.Module], target: str
) -> None:
    base, given = dense(kind), config(target)
    model = get_peft_model(base, given)
    assert model.get_base_model() is base
    again = get_peft_model(dense(kind), given)
    close(again(inputs()), model(inputs()))


@cases
def test_inject_adapter_in_model(kind: type[nn.Module], target: str) -> None:
    original = dense(kind)(inputs())
    model = inject_adapter_in_model(config(target), dense(kind), "own")
    assert type(model) is kind
    close(model(inputs()), original)
    assert trainable(model) and all(".wasi_form.own." in name for name in trainable(model))
    step(model)
    state = get_peft_model_state_dict(model, adapter_name="own")
    assert state and not any("own" in name or "base_layer" in name for name in state)
    other = inject_adapter_in_model(config(target), dense(kind), "another")
    result = set_peft_model_state_dict(other, state, adapter_name="another")
    assert not result.unexpected_keys
    assert torch.equal(other(inputs()), model(inputs()))


@cases
def test_inject_on_the_meta_device_then_load(kind: type[nn.Module], target: str) -> None:
    source = get_peft_model(dense(kind), config(target))
    step(source)
    saved = copy.copy(source.peft_config["default"])
    saved.ranks = saved.resolved_ranks
    state = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(saved, dense(kind), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in model.named_parameters() if ".wasi_form." in name)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(inputs()), source(inputs()))


@cases
@pytest.mark.parametrize("bias", ["none", "wasi_only", "all"])
@pytest.mark.parametrize("base_weight", ["release", "keep"])
def test_peft_state_dict_round_trip(kind: type[nn.Module], target: str, bias: str, base_weight: str) -> None:
    options = {"bias": bias, "base_weight": base_weight}
    model = get_peft_model(dense(kind), config(target, **options))
    step(model)
    state = get_peft_model_state_dict(model)
    expected = {name.replace(".default.", ".") for name in model.state_dict() if ".wasi_form." in name}
    if bias == "all":
        own = (".wasi_form.", ".base_layer.")
        biases = {name for name in model.state_dict() if name.endswith(".bias")}
        expected |= {name for name in biases if not any(part in name for part in own)}
    assert set(state) == expected
    other = get_peft_model(dense(kind), config(target, **options))
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(inputs()), model(inputs()))


@cases
def test_repr_and_model_status(kind: type[nn.Module], target: str) -> None:
    model = get_peft_model(dense(kind), config(target))
    status = model.get_model_status()
    assert status.peft_types == {"default": "WASI"}
    assert status.enabled is True and status.merged_adapters == []
    assert status.num_adapter_layers == (1 if target == "one" else 2)
    assert {layer.module_type for layer in model.get_layer_status()} == {"wasi.Linear"}
    assert isinstance(model, PeftModel) and "wasi.Linear" in repr(model)
