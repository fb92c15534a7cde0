"""What PEFT's own test matrix asks of every tuner, asked of every form on every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FORMS, form_options, frozen_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import WasiLayer, wasi_layers


class Net(nn.Module):
    """A norm, two layers of one kind, and a head."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.lin0 = nn.Linear(12, 16) if kind is nn.Linear else Conv1D(16, 12)
        self.lin1 = nn.Linear(16, 12) if kind is nn.Linear else Conv1D(12, 16)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(self.norm(x)).relu()))


KINDS = (nn.Linear, Conv1D)
matrix = pytest.mark.parametrize(
    ("form", "kind"),
    [(form, kind) for form in FORMS for kind in KINDS],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
inputs = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(3))


def base(kind: type[nn.Module], seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(kind).eval()


def config(form: str, **options: Any) -> WasiConfig:
    """Low rank, so that factors are not the dense layer, on layers whose base is kept."""
    return WasiConfig(
        **{
            "target_modules": ["lin0", "lin1"],
            "weight_rank": 4,
            "update_rank": 2,
            **form_options(form),
            "activation_threshold": None,
            **options,
        }
    )


def adapted(kind: type[nn.Module], form: str, **options: Any) -> PeftModel:
    return get_peft_model(base(kind), config(form, **options)).eval()


def frozen(kind: type[nn.Module], form: str) -> nn.Module:
    return frozen_model(base(kind), form, ["lin0", "lin1"])


def dense_below(form: str) -> bool:
    """Whether the weights below the adapters are those of before the injection."""
    return form_options(form)["residual"] in (None, "exact")


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(inputs)
    return result


# ---------------------------------------------------------------- saving and loading


@matrix
@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "pickle"])
def test_save_and_load(form: str, kind: type[nn.Module], safe_serialization: bool, tmp_path: Path) -> None:
    model = adapted(kind, form, modules_to_save=["head"])
    train(model)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    assert (tmp_path / (SAFETENSORS_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME)).is_file()
    loaded = PeftModel.from_pretrained(base(kind), tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    kept, got = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert kept.keys() == got.keys()
    assert all(torch.equal(kept[key], got[key]) for key in kept)


@matrix
def test_save_selected_adapters(form: str, kind: type[nn.Module], tmp_path: Path) -> None:
    model = adapted(kind, form)
    model.add_adapter("other", config(form, weight_rank=3))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).is_file()
    assert not (tmp_path / "other").exists()
    assert torch.equal(answer(PeftModel.from_pretrained(base(kind), tmp_path)), answer(model))


@matrix
@pytest.mark.parametrize("names", [("ad", "adapter"), ("lin", "line"), ("default", "norm")])
def test_names_that_are_parts_of_others(
    form: str, kind: type[nn.Module], names: tuple[str, str], tmp_path: Path
) -> None:
    first, second = names
    model = get_peft_model(base(kind), config(form), adapter_name=first)
    model.add_adapter(second, config(form, weight_rank=2))
    train(model)
    model.set_adapter(second)
    train(model)
    model.save_pretrained(tmp_path)
    for name, rank in ((first, 4), (second, 2)):
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        loaded = PeftModel.from_pretrained(base(kind), str(folder))
        assert {layer.form.weight_rank for _, layer in wasi_layers(loaded)} == {rank}
        assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("name", ["wasi_L", "wasi_form", "base_layer", "__base__"])
def test_names_of_parts_are_refused(name: str) -> None:
    model = base(nn.Linear)
    with pytest.raises(ValueError, match=name):
        get_peft_model(model, config("frozen_basis"), adapter_name=name)
    assert not any(isinstance(module, WasiLayer) for module in model.modules())


@matrix
def test_load_further_adapters(form: str, kind: type[nn.Module], tmp_path: Path) -> None:
    for name, rank in (("one", 4), ("two", 3)):
        model = adapted(kind, form, weight_rank=rank)
        train(model, steps=rank)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(str(tmp_path / "two"), adapter_name="two")
    two = answer(model)
    one = answer(PeftModel.from_pretrained(base(kind), tmp_path / "one"))
    for name, expected in (("one", one), ("two", two), ("one", one)):
        loaded.set_adapter(name)
        assert torch.equal(answer(loaded), expected)


@matrix
def test_low_cpu_mem_usage(form: str, kind: type[nn.Module], tmp_path: Path) -> None:
    model = adapted(kind, form)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(str(tmp_path), adapter_name="other", low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(answer(loaded), answer(model))


@matrix
def test_an_empty_adapter_leaves_nothing_of_the_base_on_the_meta_device(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form)
    expected, state = answer(model), get_peft_model_state_dict(model)
    empty = get_peft_model(base(kind), config(form), low_cpu_mem_usage=True)
    set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert torch.equal(answer(empty), expected)
    with empty.disable_adapter():
        torch.testing.assert_close(answer(empty), answer(frozen(kind, form)))
    assert not any(tensor.is_meta for tensor in empty.unload().state_dict().values())


@matrix
def test_state_dict_round_trip_under_wrapped_names(form: str, kind: type[nn.Module]) -> None:
    """As `set_peft_model_state_dict` gets it from an FSDP or a compiled model: other keys around, the same inside."""
    model, other = adapted(kind, form), adapted(kind, form)
    train(model)
    compiled = get_peft_model(torch.compile(base(kind), backend="eager"), config(form))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    set_peft_model_state_dict(compiled, get_peft_model_state_dict(model))
    assert torch.equal(answer(other), answer(model))
    assert torch.allclose(answer(compiled), answer(model), atol=1e-6)
    assert get_peft_model_state_dict(compiled).keys() == get_peft_model_state_dict(model).keys()


# ---------------------------------------------------------------- merging


@matrix
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_and_unload(form: str, kind: type[nn.Module], safe_merge: bool) -> None:
    model = adapted(kind, form, init_weights=False)
    expected = answer(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.allclose(answer(model), expected, atol=1e-5)
    model.merge_adapter(safe_merge=safe_merge)  # once is enough
    assert torch.allclose(answer(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(answer(model), expected)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, WasiLayer) for module in merged.modules())
    assert isinstance(merged.lin0, kind)
    assert torch.allclose(answer(merged), expected, atol=1e-5)


@matrix
def test_safe_merge_refuses_nan_and_leaves_the_layer(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form)
    with torch.no_grad():
        model.base_model.model.lin0.form.L[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model.base_model.model.lin0, WasiLayer)
    assert not model.base_model.model.lin0.merged


@matrix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_sixteen_bits(
    form: str, kind: type[nn.Module], dtype: torch.dtype, autocast_adapter_dtype: bool, tmp_path: Path
) -> None:
    """Factors in float32 or in the model's dtype, answers and merged layers in the model's."""
    model = get_peft_model(base(kind).to(dtype), config(form), autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {parameter.dtype for name, parameter in model.named_parameters() if "wasi_" in name} == {expected}
    model.train()(inputs.to(dtype)).square().mean().backward()
    layer = model.base_model.model.lin1
    for part in layer.update.trained:
        gradient = layer.form.part(part).grad
        assert gradient.dtype == expected
        assert bool(gradient.isfinite().all())
    model.eval()
    assert layer(torch.ones(2, 16, dtype=dtype)).dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base(kind).to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    assert torch.equal(loaded(inputs.to(dtype)), model(inputs.to(dtype)))
    merged = model.merge_and_unload()
    assert merged.lin0.weight.dtype == dtype
    assert merged(inputs.to(dtype)).dtype == dtype


# ---------------------------------------------------------------- adapters


@matrix
def test_disable_and_unload_give_the_base_model(form: str, kind: type[nn.Module]) -> None:
    """Bit for bit, but for the order in which a product with a rounded weight is summed."""
    expected = answer(frozen(kind, form))
    model = adapted(kind, form, init_weights=False)
    train(model, lr=0.1)
    assert not torch.allclose(answer(model), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(answer(model), expected, rtol=0, atol=0 if dense_below(form) else 1e-5)
    trained = answer(model)
    assert not torch.allclose(trained, expected, atol=1e-2)
    assert torch.equal(answer(copy.deepcopy(model).unload()), expected)
    assert torch.equal(answer(model), trained)


@matrix
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_delete_adapter(form: str, kind: type[nn.Module], active: bool) -> None:
    model = adapted(kind, form)
    train(model)
    expected = answer(model)
    model.add_adapter("gone", config(form, weight_rank=2))
    model.set_adapter("gone")
    train(model, lr=0.1)
    if not active:
        model.set_adapter("default")
    model.delete_adapter("gone")
    assert "gone" not in model.peft_config
    assert not any("gone" in name for name, _ in model.named_parameters())
    assert model.active_adapters == ["default"]
    assert torch.equal(answer(model), expected)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("gone")


@matrix
def test_training_one_adapter_leaves_another(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form)
    model.add_adapter("other", config(form))
    model.set_adapter("other")
    expected = answer(model)
    model.set_adapter("default")
    train(model, lr=0.1)
    assert not torch.allclose(answer(model), expected, atol=1e-3)
    model.set_adapter("other")
    assert torch.equal(answer(model), expected)


@matrix
def test_mixed_adapter_batches(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form, train_vectors=False)
    model.add_adapter("other", config(form, weight_rank=2, train_vectors=False))
    expected = {"__base__": answer(frozen(kind, form))}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = answer(model)
    names = ["other", "__base__", "default", "other", "default"]
    with torch.no_grad():
        mixed = model(inputs, adapter_names=names)
    for index, name in enumerate(names):
        assert torch.allclose(mixed[index], expected[name][index], atol=1e-6)


@matrix
def test_a_batch_of_one_adapter_takes_its_vectors(form: str, kind: type[nn.Module]) -> None:
    model = two_trained(form, kind)
    model.add_adapter("plain", config(form, train_vectors=False))
    expected = {"__base__": answer(frozen(kind, form))}
    for name in ("default", "other", "plain"):
        model.set_adapter(name)
        expected[name] = answer(model)
    for active in ("default", "plain"):
        model.set_adapter(active)
        for names in (["other"] * 5, ["default"] * 5, ["__base__"] * 5, ["plain", "__base__", *["plain"] * 3]):
            with torch.no_grad():
                mixed = model(inputs, adapter_names=names)
            for index, name in enumerate(names):
                torch.testing.assert_close(mixed[index], expected[name][index], atol=1e-5, rtol=1e-5)
        assert torch.equal(answer(model), expected[active])
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(inputs, adapter_names=["other"] * 5), expected["__base__"])


@matrix
def test_mixed_adapter_batches_under_autocast(form: str, kind: type[nn.Module]) -> None:
    model = two_trained(form, kind, train_vectors=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(inputs, adapter_names=["default", "__base__", "other", "other", "default"])
        for index, name in ((0, "default"), (2, "other")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[index].float(), model(inputs)[index].float(), atol=0.02, rtol=0.02)


MIXED_ERRORS: dict[str, tuple[Callable[[PeftModel], Any], list[str], str]] = {
    "training": (lambda model: model.train(), ["default"] * 5, "training mode"),
    "unknown": (lambda model: model.eval(), ["default"] * 4 + ["nobody"], "nobody"),
    "length": (lambda model: model.eval(), ["default"] * 3, "3 for 5 samples"),
    "merged": (lambda model: model.merge_adapter(), ["default"] * 5, "unmerge_adapter"),
}


@pytest.mark.parametrize("case", MIXED_ERRORS)
def test_mixed_adapter_batches_refuse(case: str) -> None:
    model = adapted(nn.Linear, "frozen_basis", train_vectors=False)
    prepare, names, message = MIXED_ERRORS[case]
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(inputs, adapter_names=names)


def test_mixed_adapter_batches_refuse_adapters_with_vectors() -> None:
    model = adapted(nn.Linear, "frozen_basis")
    model.add_adapter("other", config("frozen_basis"))
    with pytest.raises(ValueError, match="trains vectors"):
        model(inputs, adapter_names=["default", "other", "default", "default", "default"])


@matrix
def test_mixed_batches_take_each_samples_head(form: str, kind: type[nn.Module]) -> None:
    options: dict[str, Any] = {"train_vectors": False, "modules_to_save": ["head"]}
    model = two_trained(form, kind, **options)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = answer(model)
    names = ["default", "other", "other", "default", "other"]
    with torch.no_grad():
        mixed = model(inputs, adapter_names=names)
    for index, name in enumerate(names):
        torch.testing.assert_close(mixed[index], expected[name][index], atol=1e-5, rtol=1e-5)
    model.add_adapter("headless", config(form, train_vectors=False))
    with pytest.raises(ValueError, match=r"head: adapter_names can mix adapters that all train this module"):
        model(inputs, adapter_names=["headless", *names[1:]])


def two_trained(form: str, kind: type[nn.Module], **options: Any) -> PeftModel:
    """A model with two adapters that answer differently, the first one active."""
    model = adapted(kind, form, **options)
    train(model)
    model.add_adapter("other", config(form, **options))
    model.set_adapter("other")
    train(model, 6)
    model.set_adapter("default")
    return model


@matrix
@pytest.mark.parametrize("unload", [False, True])
def test_merging_another_than_the_active_adapter_takes_its_vectors(
    form: str, kind: type[nn.Module], unload: bool
) -> None:
    model = two_trained(form, kind)
    active = answer(model)
    model.set_adapter("other")
    other = answer(model)
    model.set_adapter("default")
    assert not torch.allclose(active, other, atol=1e-3)
    if unload:
        torch.testing.assert_close(
            answer(model.merge_and_unload(adapter_names=["other"])), other, atol=1e-5, rtol=1e-5
        )
        return
    model.merge_adapter(["other"])
    torch.testing.assert_close(answer(model), other, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(answer(model), active)


def test_another_than_the_merged_adapter_is_not_unloaded() -> None:
    model = two_trained("addition int8", nn.Linear)
    model.merge_adapter(["default"])
    before = answer(model)
    with pytest.raises(ValueError, match=r"only one adapter can be merged at a time, got \['other'\]"):
        model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(answer(model), before)
    assert torch.equal(answer(model.merge_and_unload(adapter_names=["default"])), before)


@matrix
@pytest.mark.parametrize("dense", [None, True, False])
def test_a_merge_that_is_refused_leaves_all_layers(form: str, kind: type[nn.Module], dense: bool | None) -> None:
    model = adapted(kind, form)
    layers = [type(module) for module in model.modules()]
    next(p for name, p in model.named_parameters() if "lin1" in name and p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True, dense=dense)
    assert [type(module) for module in model.modules()] == layers
    model.unload()


@matrix
def test_a_merged_model_that_is_cast_can_be_unmerged(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    with torch.no_grad(), model.disable_adapter():
        assert model(inputs.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_an_adapter_that_is_none_is_refused(call: str) -> None:
    model = two_trained("addition int8", nn.Linear)
    before = answer(model)
    with pytest.raises(ValueError, match=r"must name adapters of the model, \['default', 'other'\], got none"):
        getattr(model, call)(adapter_names=["none"])
    assert torch.equal(answer(model), before)


@matrix
def test_adapters_without_a_common_layer_are_active_together(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form, target_modules=["lin0"], train_vectors=False)
    model.add_adapter("other", config(form, target_modules=["lin1"], train_vectors=False))
    model.base_model.set_adapter(["default", "other"])
    net = model.base_model.model
    assert net.lin0.active_name == "default"
    assert net.lin1.active_name == "other"
    x = net.norm(inputs)
    expected = net.head(net.lin1.wasi_form["other"](net.lin0.wasi_form["default"](x).relu()))
    assert torch.allclose(answer(model), expected, atol=1e-6)


@matrix
def test_adapters_with_a_common_layer_are_not(form: str, kind: type[nn.Module]) -> None:
    model = adapted(kind, form)
    model.add_adapter("other", config(form, target_modules=["lin1"]))
    before = model.base_model.active_adapters
    with pytest.raises(ValueError, match="only one adapter can be active"):
        model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapters == before
