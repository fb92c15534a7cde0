"""What PEFT, transformers and torch expect of a tuner, on every tiny architecture."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, Architecture, Batch, exact_config, logits, train, wasi_model
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import wasi_peft.tuner.model
from wasi_peft import WasiConfig, wasi_summary
from wasi_peft.forms import FactoredLinear, FactoredWeight
from wasi_peft.tuner.layer import WasiLayer, wasi_layers

LOW = {"weight_rank": 5}

# where the second axis of a test matters more: biases and vectors, Conv1D, a model that reads `weight`
FEW = ["vit", "gpt2", "t5"]
few = pytest.mark.parametrize("architecture", FEW, indirect=True)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def trained(architecture: Architecture, steps: int = 2, **options: Any) -> Any:
    """A PEFT model after some training, so that it differs from the base model and from fresh factors."""
    model = wasi_model(architecture.model(), **{**LOW, **options})
    train(model, architecture.batch(), steps)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".wasi_form." in name}


@contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[None]:
    """Fail when a function is called inside the block."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} must not be called here")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


# ------------------------------------------------------------------ output and training

TRAINING = [(name, "subspace", 0.95) for name in ARCHITECTURES]
TRAINING += [
    (name, update, activation)
    for name in FEW
    for update in ("subspace", "factor", "frozen_basis", "low_rank", "core")
    for activation in (None, 0.95)
    if (update, activation) != ("subspace", 0.95)
]
TRAINS = [  # every pair of values of the three options
    (True, "wasi_only", "subspace"),
    (True, "all", "factor"),
    (True, "none", "frozen_basis"),
    (False, "none", "subspace"),
    (False, "wasi_only", "factor"),
    (False, "all", "frozen_basis"),
    (True, "wasi_only", "low_rank"),
    (False, "none", "low_rank"),
    (True, "all", "core"),
    (False, "none", "core"),
]


@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_full_rank_gives_the_dense_logits(architecture: Architecture, base_weight: str) -> None:
    model, batch = architecture.model(), architecture.batch()
    expected = logits(model, batch)
    close(logits(wasi_model(model, base_weight=base_weight), batch), expected)


def test_full_rank_gives_the_dense_gradients_to_what_lies_outside(architecture: Architecture) -> None:
    """Gradients pass through the factors to embeddings, norms and head exactly as through the dense weights."""
    batch = architecture.batch()
    dense = architecture.model()
    dense(**batch).loss.backward()
    model = wasi_model(architecture.model())
    base = model.get_base_model()
    outside = {name: p for name, p in base.named_parameters() if ".wasi_" not in name}
    for parameter in outside.values():
        parameter.requires_grad = True
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if name in outside}
    assert len(expected) == len(outside) > 4
    for name, gradient in expected.items():
        if gradient is not None:
            close(outside[name].grad, gradient)


def test_one_step_reaches_every_trainable_parameter(architecture: Architecture) -> None:
    model = wasi_model(architecture.model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = trainable(model)
    model.train()
    model(**architecture.batch()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == names
    for name in names:
        assert torch.isfinite(gradients[name]).all()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


@pytest.mark.parametrize(("architecture", "update", "activation"), TRAINING, indirect=["architecture"])
def test_training_at_low_rank_lowers_the_loss(
    architecture: Architecture, update: str, activation: float | None
) -> None:
    model = wasi_model(architecture.model(), **LOW, update=update, activation_threshold=activation)
    start = factors(model)
    losses = train(model, architecture.batch(), steps=30 if update in ("core", "frozen_basis") else 10)
    assert losses[-1] < 0.9 * losses[0]
    end = factors(model)
    both = (".default.wasi_L", ".default.wasi_R")
    frozen = {"frozen_basis": (".default.wasi_R",), "low_rank": both, "core": both}.get(update, ())
    for name in end:
        assert torch.equal(end[name], start[name]) == name.endswith(frozen)
        if name.endswith(".default.wasi_L") and update == "subspace":
            close(end[name].T @ end[name], torch.eye(5))


@pytest.mark.parametrize(("vectors", "bias", "update"), TRAINS)
def test_exactly_the_right_parameters_train(architecture: Architecture, vectors: bool, bias: str, update: str) -> None:
    model = architecture.model()
    targets = architecture.targets(model)
    outside = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in targets]
    with_bias = {name for name in targets if model.get_submodule(name).bias is not None}
    parts = {"frozen_basis": ["L"], "low_rank": ["A", "B"], "core": ["M"]}.get(update, ["L", "R"])
    expected = {f"{name}.wasi_form.default.wasi_{part}" for name in targets for part in parts}
    if bias != "none":
        expected |= {f"{name}.wasi_form.default.bias" for name in with_bias}
    if bias == "all":
        expected |= {name for name in outside if name.endswith(".bias")}
    if vectors:
        tables = {"bert.embeddings.position_embeddings.weight"}  # nn.Embedding tables stay as they are
        chosen = {name for name in outside if any(part in name for part in architecture.vectors)} - tables
        assert len(chosen) >= 4
        expected |= chosen
    model = wasi_model(model, **LOW, train_vectors=vectors, bias=bias, update=update)
    assert trainable(model.get_base_model()) == expected


def test_inference_mode_trains_nothing(architecture: Architecture) -> None:
    assert trainable(wasi_model(architecture.model(), **LOW, inference_mode=True)) == set()


def test_print_trainable_parameters(architecture: Architecture, capsys: pytest.CaptureFixture[str]) -> None:
    model = wasi_model(architecture.model(), **LOW, train_vectors=False, bias="none")
    model.print_trainable_parameters()
    count = sum(layer.stored_elements for layer in wasi_summary(model).layers)
    total = sum(p.numel() for p in model.parameters())
    text = capsys.readouterr().out
    assert f"trainable params: {count:,} || all params: {total:,}" in text
    assert model.get_nb_trainable_parameters() == (count, total)


def test_the_released_model_is_smaller(architecture: Architecture) -> None:
    dense = sum(p.numel() for p in architecture.model().parameters())
    model = wasi_model(architecture.model(), weight_rank=2)
    summary = wasi_summary(model)
    saved = sum(layer.dense_elements - layer.stored_elements for layer in summary.layers)
    assert saved > 0
    assert sum(p.numel() for p in model.parameters()) == dense - saved


# ------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize(("low_cpu_mem_usage", "base_weight"), [(False, "keep"), (True, "release")])
def test_save_and_load(
    architecture: Architecture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low_cpu_mem_usage: bool,
    base_weight: str,
) -> None:
    model, batch = trained(architecture, base_weight=base_weight), architecture.batch()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    shapes = {tuple(value.shape) for value in load_file(tmp_path / "adapter_model.safetensors").values()}
    for layer in wasi_summary(model).layers:
        assert not shapes & {(layer.out_features, layer.in_features), (layer.in_features, layer.out_features)}

    with forbidden(monkeypatch, wasi_peft.tuner.model, "factorize_weight"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(
            architecture.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        )
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert trainable(loaded) == trainable(model)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert all(layer.base_is_released == (base_weight == "release") for _, layer in wasi_layers(loaded))
    assert train(loaded, batch, 3) == pytest.approx(train(model, batch, 3), rel=1e-4)


def test_the_file_holds_what_trains_and_nothing_else(architecture: Architecture, tmp_path: Path) -> None:
    model = trained(architecture)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    state = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    assert set(saved) == {name.replace(".default", "") for name in trainable(model)}
    for name, value in saved.items():
        assert torch.equal(value, state[name])


@few
def test_loading_for_inference_freezes(architecture: Architecture, tmp_path: Path) -> None:
    trained(architecture).save_pretrained(tmp_path)
    assert trainable(PeftModel.from_pretrained(architecture.model(), tmp_path)) == set()


@few
def test_released_layers_give_up_the_dense_weight_right_after_loading(
    architecture: Architecture, tmp_path: Path
) -> None:
    trained(architecture).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model(), tmp_path)
    names = {name for name, _ in loaded.named_parameters()}
    assert not any(".base_layer." in name for name in names)


@few
@pytest.mark.parametrize("options", [{"bias": "none"}, {"bias": "all"}, {"train_vectors": False}], ids=str)
def test_save_and_load_with_other_options(architecture: Architecture, tmp_path: Path, options: dict[str, Any]) -> None:
    model, batch = trained(architecture, **options), architecture.batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@few
def test_thresholds_load_without_decomposition_too(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wasi_model(architecture.model(), explained_variance_threshold=0.8, rank_pattern={architecture.example: 2})
    model.save_pretrained(tmp_path)
    with forbidden(monkeypatch, wasi_peft.tuner.model, "factorize_weight"):
        loaded = PeftModel.from_pretrained(architecture.model(seed=5), tmp_path)
    assert wasi_summary(loaded) == wasi_summary(model)


@pytest.mark.parametrize("module", ["classifier"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "bert"])
def test_modules_to_save(tmp_path: Path, name: str, module: str) -> None:
    architecture = ARCHITECTURES[name]
    model, batch = trained(architecture, modules_to_save=[module]), architecture.batch()
    assert any(f"{module}.modules_to_save.default.weight" in name for name in trainable(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    merged = loaded.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    close(logits(merged, batch), logits(model, batch))


def test_modules_to_save_takes_a_target_out(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["vit"]
    model = trained(architecture, target_modules="all-linear", modules_to_save=["classifier"])
    assert len(wasi_summary(model).layers) == 12
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.model(), tmp_path)
    assert torch.equal(logits(loaded, architecture.batch()), logits(model, architecture.batch()))


def test_auto_model(architecture: Architecture, tmp_path: Path) -> None:
    base = architecture.model()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    task_types = {"Classification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}
    task_type = next((t for suffix, t in task_types.items() if architecture.auto_class.endswith(suffix)), None)
    model, batch = wasi_model(base, **LOW, task_type=task_type), architecture.batch()
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = getattr(peft, architecture.auto_class).from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(base)
    close(logits(loaded, batch), logits(model, batch), 1e-6)


def test_a_loaded_configuration_alone_does_not_run(architecture: Architecture, tmp_path: Path) -> None:
    trained(architecture).save_pretrained(tmp_path)
    base = architecture.model()
    weights = {name: base.get_submodule(name).weight.clone() for name in architecture.targets(base)}
    model = get_peft_model(base, PeftConfig.from_pretrained(tmp_path))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'default' were never loaded.*PeftModel\.from_pretrained"):
            model(**architecture.batch())
    with pytest.raises(RuntimeError, match="never loaded"):
        model.merge_and_unload()
    for name, weight in weights.items():
        assert torch.equal(model.get_base_model().get_submodule(name).base_layer.weight, weight)


def test_state_dict_round_trip(architecture: Architecture) -> None:
    model, batch = trained(architecture), architecture.batch()
    other = wasi_model(architecture.model(seed=3), **LOW)
    assert not torch.allclose(logits(other, batch), logits(model, batch), atol=1e-3)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(other, batch), logits(model, batch))


@few
@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_deepcopy_is_independent(architecture: Architecture, base_weight: str) -> None:
    model, batch = trained(architecture, base_weight=base_weight), architecture.batch()
    before = logits(model, batch)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, batch), before)
    for (_, old), (_, new) in zip(wasi_layers(model), wasi_layers(again), strict=True):
        assert new.base_layer is not old.base_layer and type(new.base_layer) is type(old.base_layer)
        assert (new.base_layer is new.form) == (old.base_layer is old.form) == (base_weight == "release")
    train(again, batch)
    assert torch.equal(logits(model, batch), before)
    assert not torch.equal(logits(again, batch), before)
    for name, value in factors(again).items():  # a copy is retracted after its own steps
        if name.endswith(".default.wasi_L"):
            close(value.T @ value, torch.eye(5))


@few
@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_torch_save_of_the_whole_model(architecture: Architecture, base_weight: str) -> None:
    options = {"base_weight": base_weight, "activation_threshold": 0.9}
    model, batch = trained(architecture, **options), architecture.batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert trainable(loaded) == trainable(model)
    assert train(loaded, batch, 2) == pytest.approx(train(model, batch, 2), rel=1e-4)


# ------------------------------------------------------------------ merging, disabling, unloading


@pytest.mark.parametrize("base_weight", ["release", "keep"])
def test_merge_and_unload(architecture: Architecture, tmp_path: Path, base_weight: str) -> None:
    model, batch = trained(architecture, base_weight=base_weight), architecture.batch()
    expected = logits(model, batch)
    original = architecture.model()
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(original)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert {n: v.shape for n, v in merged.state_dict().items()} == {
        n: v.shape for n, v in original.state_dict().items()
    }
    close(logits(merged, batch), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), batch), logits(merged, batch))
    again = wasi_model(merged)
    close(logits(again, batch), expected)


@pytest.mark.parametrize("base_weight", ["release", "keep"])
def test_merge_and_unmerge_adapter(architecture: Architecture, base_weight: str) -> None:
    model, batch = trained(architecture, base_weight=base_weight), architecture.batch()
    expected, state = logits(model, batch), copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.merge_adapter()
        assert all(layer.merged for _, layer in wasi_layers(model))
        close(logits(model, batch), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model, batch), expected)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


VECTORS = pytest.mark.parametrize("vectors", [{"train_vectors": False}, {}, {"bias": "all"}], ids=str)


@few
@VECTORS
@pytest.mark.parametrize("base_weight", ["cpu", "keep"])
def test_disable_adapter_gives_the_original(
    architecture: Architecture, base_weight: str, vectors: dict[str, Any]
) -> None:
    batch = architecture.batch()
    original = logits(architecture.model(), batch)
    model = trained(architecture, base_weight=base_weight, **vectors)
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, original, atol=1e-3)
    names = trainable(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), original)
        assert trainable(model) == set()
    assert torch.equal(logits(model, batch), adapted)
    assert trainable(model) == names
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), original)


@few
@VECTORS
@pytest.mark.parametrize("base_weight", ["cpu", "keep"])
def test_unload_gives_the_original(architecture: Architecture, base_weight: str, vectors: dict[str, Any]) -> None:
    batch = architecture.batch()
    original = architecture.model()
    model = trained(architecture, base_weight=base_weight, **vectors).unload()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    assert torch.equal(logits(model, batch), logits(original, batch))


def _disable(model: Any) -> None:
    with model.disable_adapter():
        raise AssertionError("disable_adapter must not be entered")


RELEASED_ACTIONS: dict[str, Callable[[Any], Any]] = {
    "disable_adapter": _disable,
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "unload": lambda model: model.unload(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
}


@few
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("action", RELEASED_ACTIONS.values(), ids=RELEASED_ACTIONS.keys())
def test_released_refuses_and_changes_nothing(
    architecture: Architecture, action: Callable[[Any], Any], merged: bool
) -> None:
    model, batch = trained(architecture), architecture.batch()
    if merged:
        model.merge_adapter()
    expected, names, state = logits(model, batch), trainable(model), model.state_dict()
    with pytest.raises(ValueError, match="released"):
        action(model)
    assert torch.equal(logits(model, batch), expected)
    assert trainable(model) == names
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert list(model.peft_config) == ["default"]
    if merged:
        model.unmerge_adapter()
    train(model, batch, 1)


# ------------------------------------------------------------------ several adapters


def two_saved(architecture: Architecture, folder: Path, **options: Any) -> tuple[list[Path], list[Tensor]]:
    paths, outputs = [], []
    for number in (1, 2):
        model = trained(architecture, steps=2 * number, weight_rank=2 + number, **options)
        paths.append(folder / str(number))
        outputs.append(logits(model, architecture.batch()))
        model.save_pretrained(paths[-1])
    assert not torch.allclose(*outputs, atol=1e-3)
    return paths, outputs


@few
@VECTORS
@pytest.mark.parametrize(
    ("low_cpu_mem_usage", "base_weight"), [(False, "release"), (True, "release"), (False, "cpu"), (True, "keep")]
)
def test_two_loaded_adapters(
    architecture: Architecture, tmp_path: Path, base_weight: str, low_cpu_mem_usage: bool, vectors: dict[str, Any]
) -> None:
    batch = architecture.batch()
    paths, outputs = two_saved(architecture, tmp_path, base_weight=base_weight, **vectors)
    model = PeftModel.from_pretrained(
        architecture.model(), paths[0], adapter_name="one", low_cpu_mem_usage=low_cpu_mem_usage
    )
    model.load_adapter(paths[1], adapter_name="two", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, batch), outputs[0])
    for name, expected in (("two", outputs[1]), ("one", outputs[0]), ("two", outputs[1])):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), expected)
        ours = {parameter for parameter in trainable(model) if ".wasi_form." in parameter}
        assert ours and all(f".wasi_form.{name}." in parameter for parameter in ours)
        assert (ours != trainable(model)) == bool(vectors.get("train_vectors", True))
    assert {layer.rank for layer in wasi_summary(model, "two").layers} == {4}
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    assert not any(".two" in name for name in model.state_dict())
    model.set_adapter("one")
    assert torch.equal(logits(model, batch), outputs[0])
    assert all(layer.base_is_released == (base_weight == "release") for _, layer in wasi_layers(model))


@few
def test_saving_two_adapters_writes_two_folders(architecture: Architecture, tmp_path: Path) -> None:
    paths, outputs = two_saved(architecture, tmp_path / "in")
    model = PeftModel.from_pretrained(architecture.model(), paths[0], adapter_name="one")
    model.load_adapter(paths[1], adapter_name="two")
    model.save_pretrained(tmp_path / "out")
    for name, expected in zip(("one", "two"), outputs, strict=True):
        loaded = PeftModel.from_pretrained(architecture.model(), tmp_path / "out" / name)
        assert torch.equal(logits(loaded, architecture.batch()), expected)


@few
def test_a_second_fresh_adapter_on_a_kept_base(architecture: Architecture) -> None:
    batch = architecture.batch()
    dense = logits(architecture.model(), batch)
    choices = [{"train_vectors": False, "bias": "none"}, {}, {"bias": "all"}]
    for base_weight, choice in itertools.product(("keep", "cpu"), choices):
        options = {"base_weight": base_weight, **choice}
        model = trained(architecture, **options)
        first = logits(model, batch)
        model.add_adapter("second", exact_config(**options))
        assert torch.equal(logits(model, batch), first)
        model.set_adapter("second")
        close(logits(model, batch), dense)
        train(model, batch)
        model.set_adapter("default")
        assert torch.equal(logits(model, batch), first)


# ------------------------------------------------------------------ transformers' own adapter methods

NATIVE = [(name, {}) for name in ARCHITECTURES]
NATIVE += [
    (name, options) for name in FEW for options in ({"bias": "all"}, {"train_vectors": False}, {"bias": "none"})
]


@pytest.mark.parametrize(("architecture", "options"), NATIVE, indirect=["architecture"], ids=str)
def test_native_add_save_load(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    batch = architecture.batch()
    model = architecture.model()
    model.add_adapter(exact_config(**LOW, **options))
    assert model.active_adapters() == ["default"]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, batch, 3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert any(part in name for name in moved for part in architecture.vectors) == options.get("train_vectors", True)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in {p.name for p in tmp_path.iterdir()}
    assert "model.safetensors" not in {p.name for p in tmp_path.iterdir()}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_weights"] is True and set(saved["ranks"]) == architecture.targets(architecture.model())

    loaded = architecture.model()
    with forbidden(monkeypatch, wasi_peft.tuner.model, "factorize_weight"):
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, batch), expected)
    assert not any(".wasi_" in parameter for parameter in trainable(loaded))
    through_peft = PeftModel.from_pretrained(architecture.model(), tmp_path)
    assert torch.equal(logits(through_peft, batch), expected)


@few
@pytest.mark.parametrize("options", [{}, {"bias": "all"}], ids=str)
def test_native_load_of_an_adapter_saved_by_peft(
    architecture: Architecture, tmp_path: Path, options: dict[str, Any]
) -> None:
    model, batch = trained(architecture, **options), architecture.batch()
    model.save_pretrained(tmp_path)
    loaded = architecture.model()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@few
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "none"}, {"update": "frozen_basis"}, {"update": "low_rank"}, {"update": "core"}],
    ids=str,
)
def test_native_load_for_training(architecture: Architecture, tmp_path: Path, options: dict[str, Any]) -> None:
    model, batch = trained(architecture, **options), architecture.batch()
    model.save_pretrained(tmp_path)
    loaded = architecture.model()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    logits(loaded, batch)  # transformers makes everything it loads trainable; the first forward pass puts that right
    assert trainable(loaded) == trainable(model.get_base_model())
    assert train(loaded, batch, 3) == pytest.approx(train(model, batch, 3), rel=1e-4)


@few
def test_native_switching_and_deleting(architecture: Architecture, tmp_path: Path) -> None:
    batch = architecture.batch()
    paths, outputs = two_saved(architecture, tmp_path)
    model = architecture.model()
    model.load_adapter(str(paths[0]), adapter_name="one")
    model.load_adapter(str(paths[1]), adapter_name="two")
    for name, expected in (("one", outputs[0]), ("two", outputs[1]), ("one", outputs[0])):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model, batch), expected)
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    assert torch.equal(logits(model, batch), outputs[0])


@few
def test_native_disable_and_delete_on_a_kept_base(architecture: Architecture) -> None:
    batch = architecture.batch()
    model = architecture.model()
    original = logits(model, batch)
    model.add_adapter(exact_config(**LOW, base_weight="keep", train_vectors=False))
    train(model, batch)
    adapted = logits(model, batch)
    model.disable_adapters()
    assert torch.equal(logits(model, batch), original)
    model.enable_adapters()
    assert torch.equal(logits(model, batch), adapted)
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), original)


@few
def test_native_disable_and_delete_on_a_released_base(architecture: Architecture) -> None:
    batch = architecture.batch()
    model = architecture.model()
    model.add_adapter(exact_config(**LOW))
    expected, names = logits(model, batch), trainable(model)
    for action in (model.disable_adapters, lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match="released"):
            action()
        assert torch.equal(logits(model, batch), expected)
        assert trainable(model) == names
        assert list(model.peft_config) == ["default"]


# ------------------------------------------------------------------ the stand-in for the dense weight


def test_weight_is_read_without_multiplying_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vit", "gpt2"):
        architecture = ARCHITECTURES[name]
        original = architecture.model()
        model = wasi_model(architecture.model(), **LOW)
        for layer_name, layer in wasi_layers(model.get_base_model()):
            dense = original.get_submodule(layer_name).weight
            with forbidden(monkeypatch, FactoredLinear, "multiply_out"):
                weight = layer.weight
                assert isinstance(weight, FactoredWeight)
                assert weight.shape == dense.shape and weight.size() == dense.size()
                assert weight.size(0) == dense.size(0) and weight.size(-1) == dense.size(-1)
                assert (weight.dtype, weight.device, weight.ndim) == (dense.dtype, dense.device, dense.ndim)
                assert weight.numel() == dense.numel() and weight.is_meta is False


def test_weight_passed_to_torch_is_multiplied_out() -> None:
    for name in ("vit", "gpt2"):
        architecture = ARCHITECTURES[name]
        original = architecture.model()
        model = wasi_model(architecture.model())
        for layer_name, layer in wasi_layers(model.get_base_model()):
            dense, weight = original.get_submodule(layer_name).weight, layer.weight
            x = torch.randn(3, dense.shape[0])
            close(torch.matmul(x, weight), x @ dense)
            close(torch.cat([weight, weight]), torch.cat([dense, dense]))
            close(torch.nn.functional.linear(input=x, weight=weight.T), x @ dense)
            close(weight.float(), dense)
            close(weight.norm(), dense.norm())
            assert weight.requires_grad is True


def test_forward_never_multiplies_out(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 reads `self.wo.weight.dtype` in its forward pass."""
    model, batch = wasi_model(architecture.model(), **LOW), architecture.batch()
    with forbidden(monkeypatch, FactoredLinear, "multiply_out"):
        logits(model, batch)
        train(model, batch)


# ------------------------------------------------------------------ no dense matrix


def dense_shapes(model: nn.Module, square: bool) -> set[tuple[int, ...]]:
    """Both orientations of every targeted weight, in the sizes that no activation has; see the next test."""
    shapes = {(layer.out_features, layer.in_features) for layer in wasi_summary(model).layers}
    shapes |= {shape[::-1] for shape in shapes}
    return {shape for shape in shapes if square or shape[0] != shape[1]}


class Shapes(TorchDispatchMode):
    """Records the shape of every floating point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.seen.add(tuple(value.shape))
        return result


@pytest.fixture
def young_objects() -> Iterator[None]:
    """Hide what existed before the test from `gc.get_objects`, which is then quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> set[tuple[int, ...]]:
    """Shapes of all floating point tensors that exist."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()}


# exact inputs, or compressed to rank 3: no threshold, whose ranks could give a basis the size of a weight
DENSE_CASES = [(name, 3, "subspace") for name in ARCHITECTURES]
DENSE_CASES += [("bert", None, "subspace"), ("gpt2", None, "factor"), ("t5", 3, "factor")]
DENSE_CASES += [("vit", None, "frozen_basis"), ("t5", None, "frozen_basis"), ("llama", None, "subspace")]
DENSE_CASES += [("vit", 3, "low_rank"), ("llama", None, "low_rank"), ("vit", None, "core"), ("t5", None, "core")]


@pytest.mark.usefixtures("young_objects")
@pytest.mark.parametrize(("name", "activation", "update"), DENSE_CASES)
def test_no_dense_matrix_exists_after_injection(name: str, activation: int | None, update: str) -> None:
    """Not alive between steps, not saved for backward, not the result of any operation of a training step.

    With compressed inputs the first step chooses bases from Gram matrices of size in x in, which equals the size of a
    square weight: square sizes count from the second step on.
    """
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    targets = architecture.targets(model)
    outside = {
        shape
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in targets
        for shape in (tuple(parameter.shape), tuple(parameter.shape)[::-1])
    }
    batch = architecture.batch(samples=5)
    with Shapes() as recorded:  # sizes that occur as activations, or in the head, say nothing
        outputs = model(**batch, output_hidden_states=True)
        outside |= {tuple(x.shape) for x in (outputs.logits, *(outputs.get("hidden_states") or ()))}
    del outputs
    existing = alive()
    wasi_model(model, **LOW, update=update, update_rank=2, activation_ranks=activation)
    model.train()
    all_sizes = dense_shapes(model, square=True) - outside
    assert len(all_sizes) >= 2
    assert {max(shape, shape[::-1]) for shape in all_sizes} <= {max(shape, shape[::-1]) for shape in existing}
    with Shapes() as recorded:  # a product would be seen
        next(layer for _, layer in wasi_layers(model)).weight.float()
    assert recorded.seen & (dense_shapes(model, square=True))
    assert not alive() & all_sizes

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        saved: set[tuple[int, ...]] = set()

        def pack(tensor: Tensor, saved: set[tuple[int, ...]] = saved) -> Tensor:
            saved.add(tuple(tensor.shape))
            return tensor

        with Shapes() as recorded:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(**batch).loss
            loss.backward()
            held = alive()
            optimizer.step()
            optimizer.zero_grad()
        del loss
        bad = dense_shapes(model, square=step > 0 or activation is None) - outside
        assert bad and saved and recorded.seen
        assert not saved & bad
        assert not recorded.seen & bad
        assert not held & bad
    assert not alive() & all_sizes


@few
@pytest.mark.usefixtures("young_objects")
def test_no_dense_matrix_exists_after_loading(architecture: Architecture, tmp_path: Path) -> None:
    trained(architecture).save_pretrained(tmp_path)
    base = architecture.model()
    heads = {tuple(base.get_submodule(name).weight.shape) for name in architecture.dense}
    loaded = PeftModel.from_pretrained(base, tmp_path)
    bad = dense_shapes(loaded, square=True) - heads
    assert bad and not alive() & bad


# ------------------------------------------------------------------ other users of a layer


class Attention(nn.Module):
    """`nn.MultiheadAttention` itself passes `out_proj.weight` and `.bias` to a torch function and calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("base_weight", ["release", "cpu", "keep"])
def test_multihead_attention_reads_the_product(base_weight: str, rank: int) -> None:
    dense = Attention()
    x = torch.randn(2, 5, 8)
    options = {"target_modules": ["out_proj"], "weight_rank": rank, "base_weight": base_weight}
    model = wasi_model(copy.deepcopy(dense), **options)
    layer = model.get_base_model().attention.out_proj
    product = copy.deepcopy(dense)
    with torch.no_grad():
        layer.wasi_form["default"].bias.add_(1.0)
        product.attention.out_proj.bias.add_(1.0)
        product.attention.out_proj.weight.copy_(layer.wasi_form["default"].L @ layer.wasi_form["default"].R)
    model(x).square().sum().backward()
    gradient = layer.wasi_form["default"].R.grad  # at full rank the manifold leaves L where it is
    assert gradient is not None and gradient.abs().sum() > 0
    close(model(x), product(x))
    model.eval(), product.eval()
    with torch.no_grad():  # the fast path
        close(model(x), product(x))
        if base_weight != "release":
            with model.disable_adapter():
                close(model(x), dense.eval()(x))
        close(model.merge_and_unload()(x), product(x))


class Small(nn.Module):
    """Two layers of either kind and a loss, quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), Conv1D(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def check_compiled(backend: str, build: Callable[[], Any], loss: Callable[[Any], Tensor]) -> None:
    """Output, gradients and parameters after two steps are those of the eager model."""
    torch._dynamo.reset()
    eager, model = build(), build()
    compiled = torch.compile(model, backend=backend)
    eager.eval(), model.eval()
    with torch.no_grad():
        close(loss(compiled), loss(eager), 1e-5)
    eager.train(), model.train()
    for _ in range(2):
        expected, actual = loss(eager), loss(compiled)
        expected.backward(), actual.backward()
        close(actual, expected, 1e-5)
        reference = dict(eager.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                close(parameter.grad, reference[name].grad)
        for used in (eager, model):
            torch.optim.SGD([p for p in used.parameters() if p.requires_grad], lr=1e-2).step()
            used.zero_grad()
    for name, parameter in model.named_parameters():
        close(parameter, reference[name])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("update", "activation"),
    [("subspace", None), ("subspace", 0.9), ("frozen_basis", 0.9), ("low_rank", 0.9), ("core", 0.9)],
)
def test_compile_equals_eager(update: str, activation: float | None) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        options = {"update": update, "activation_threshold": activation, "weight_rank": 3}
        return wasi_model(Small(), target_modules=["up", "down"], **options)

    x = torch.randn(5, 7, 8)
    check_compiled("aot_eager", build, lambda model: model(x).square().mean())


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return wasi_model(Small(), target_modules=["up", "down"], weight_rank=3, activation_threshold=0.9)

    x = torch.randn(5, 7, 8)
    check_compiled("inductor", build, lambda model: model(x).square().mean())


@pytest.mark.slow
def test_compile_a_transformer() -> None:
    architecture = ARCHITECTURES["vit"]
    batch = architecture.batch()
    options = {**LOW, "activation_threshold": 0.9}
    check_compiled("aot_eager", lambda: wasi_model(architecture.model(), **options), lambda model: model(**batch).loss)


@few
@pytest.mark.parametrize("activation", [None, 0.9], ids=["exact", "compressed"])
def test_autocast(architecture: Architecture, activation: float | None) -> None:
    model, batch = wasi_model(architecture.model(), **LOW, activation_threshold=activation), architecture.batch()
    reference = wasi_model(architecture.model(), **LOW, activation_threshold=activation)
    reference(**batch).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
        inference = logits(model, batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(reference(**batch).loss.item(), abs=0.1)
    close(inference.float(), logits(reference, batch), 0.3)
    expected = dict(reference.named_parameters())
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
    ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    theirs = torch.cat([expected[n].grad.flatten() for n, p in model.named_parameters() if p.requires_grad])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


@few
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_model_keeps_its_dtype(architecture: Architecture, autocast_adapter_dtype: bool) -> None:
    """But for what trains, and the factors, which are held in float32 unless told otherwise."""

    def assert_dtypes(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            raised = autocast_adapter_dtype and (parameter.requires_grad or ".wasi_" in name)
            assert parameter.dtype == (torch.float32 if raised else torch.bfloat16)

    base = architecture.model().to(torch.bfloat16)
    config = exact_config(**LOW, activation_threshold=0.9)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert_dtypes(model)
    batch = architecture.batch(dtype=torch.bfloat16)
    losses = train(model, batch, 8)
    assert losses[-1] < losses[0]
    assert_dtypes(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.modules())
    assert merged(**batch).logits.dtype == torch.bfloat16


@few
def test_moving_the_model_moves_the_factors(architecture: Architecture) -> None:
    model = trained(architecture).to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    single = trained(architecture)
    batch = architecture.batch()
    close(logits(model, architecture.batch(dtype=torch.float64)).float(), logits(single, batch))
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float64}


def test_conv1d_keeps_its_layout() -> None:
    architecture = ARCHITECTURES["gpt2"]
    merged = trained(architecture).merge_and_unload()
    original: Batch = architecture.model().state_dict()
    assert isinstance(merged.transformer.h[0].mlp.c_fc, Conv1D)
    assert {n: v.shape for n, v in merged.state_dict().items()} == {n: v.shape for n, v in original.items()}


def test_the_plain_svd_warns_once_and_only_where_something_is_lost() -> None:
    with pytest.warns(UserWarning, match="plain truncated SVD") as caught:
        wasi_model(ARCHITECTURES["vit"].model(), **LOW)
    assert len([w for w in caught if "plain truncated SVD" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wasi_model(ARCHITECTURES["vit"].model())


def test_layers_print_as_ours() -> None:
    assert "wasi.Linear" in repr(wasi_model(ARCHITECTURES["vit"].model()))
    assert isinstance(next(iter(wasi_layers(wasi_model(ARCHITECTURES["vit"].model()))))[1], WasiLayer)
    assert WasiConfig(residual=None).peft_type == "WASI"
