"""Every mistake gets one clear sentence, before anything is changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, exact_config, logits, train, wasi_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import WasiLayer, wasi_layers

VIT = ARCHITECTURES["vit"]
LOW = {"weight_rank": 5}


@pytest.mark.parametrize("name", ["explained_variance_threshold", "activation_threshold"])
@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.9"], ids=repr)
def test_thresholds(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        WasiConfig(**{name: value})
    assert str(error.value) == f"{name} must be a number in (0, 1], got {value!r}."


@pytest.mark.parametrize("value", [0, -2, 2.0, 2.5, True, "3", math.nan], ids=repr)
@pytest.mark.parametrize("where", ["weight_rank", "rank_pattern", "activation_ranks", "activation_ranks by mode"])
def test_ranks(where: str, value: Any) -> None:
    given = {"rank_pattern": {"fc1": value}, "activation_ranks by mode": {"feature": value}}.get(where, value)
    with pytest.raises(ValueError, match="must be a positive integer") as error:
        WasiConfig(**{where.partition(" ")[0]: given})
    assert where.partition(" ")[0] in str(error.value) and f"got {value!r}." in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None], ids=repr)
def test_activation_interval(value: Any) -> None:
    with pytest.raises(ValueError, match=f"activation_interval must be a positive integer, got {value!r}"):
        WasiConfig(residual=None, activation_interval=value)


CHOICES = ("update", "residual", "residual_product", "base_weight", "bias")
NONE_IS_ONE = ("update", "residual", "residual_product")
CLOSED = [(name, value) for name in CHOICES for value in ("other", "", [], 1)]
CLOSED += [(name, None) for name in CHOICES if name not in NONE_IS_ONE]


@pytest.mark.parametrize(("name", "value"), CLOSED)
def test_closed_choices(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of '.*', '.*', ('.*'|None), got ") as error:
        WasiConfig(**{name: value})
    assert str(error.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize("modes", ["feature", [], ["token"], ["feature", "head"]], ids=repr)
def test_activation_modes(modes: Any) -> None:
    with pytest.raises(ValueError, match="activation_modes must be a list with 'feature'") as error:
        WasiConfig(residual=None, activation_modes=modes)
    assert repr(modes) in str(error.value)


def test_activation_ranks_and_modes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"mode .token., (which is )?not in activation_modes=\['feature'\]"):
        WasiConfig(update="factor", activation_ranks={"feature": 3, "token": 2})
    with pytest.raises(ValueError, match="missing \\['token'\\]"):
        WasiConfig(
            update="factor", activation_ranks=3, activation_modes=["feature", "token"], activation_threshold=None
        )


@pytest.mark.parametrize("target", ["all-linear", ".*fc1"])
def test_layers_to_transform_with_a_string(target: str) -> None:
    with pytest.raises(
        ValueError, match="layers_to_transform cannot be used when target_modules is a string"
    ) as error:
        WasiConfig(residual=None, target_modules=target, layers_to_transform=[0])
    assert target in str(error.value)


def test_layers_pattern_alone() -> None:
    with pytest.raises(ValueError, match=r"layers_pattern needs layers_to_transform.*'layers'"):
        WasiConfig(residual=None, layers_pattern="layers")


# ------------------------------------------------------------------ injection


def refused(model: nn.Module, error: type[Exception], match: str, **options: Any) -> None:
    """`get_peft_model` raises, and the model has the same modules, values and trainable parameters as before."""
    modules = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=match):
        wasi_model(model, **options)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    after = model.state_dict()
    assert list(after) == list(state)
    for name, value in state.items():
        assert after[name].device == value.device
        if value.device.type != "meta":
            assert torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not any(isinstance(module, WasiLayer) for module in model.modules())


@pytest.mark.parametrize("option", ["weight_rank", "rank_pattern"])
def test_rank_above_the_smaller_side(option: str) -> None:
    value: Any = 17 if option == "weight_rank" else {"layers.1.mlp.fc1": 17}
    refused(VIT.model(), ValueError, r"vit\.layers\.\d.*: the rank must be at most .* = 16, got 17", **{option: value})


@pytest.mark.parametrize(
    ("target", "kind"),
    [("layernorm", "LayerNorm"), ("mlp", "ViTMLP"), ("vit.layers", "ModuleList")],
)
def test_a_target_of_another_kind(target: str, kind: str) -> None:
    match = rf"{target}: target modules must be torch.nn.Linear or transformers Conv1D, got {kind}"
    refused(VIT.model(), TypeError, match, target_modules=["fc1", target])


def test_embeddings_are_no_target() -> None:
    refused(
        ARCHITECTURES["bert"].model(), TypeError, "word_embeddings: .*Embedding", target_modules=["word_embeddings"]
    )


def test_no_such_target() -> None:
    refused(VIT.model(), ValueError, "not found in the base model", target_modules=["nothing"])


def test_no_blocks_for_default_targets() -> None:
    refused(nn.Sequential(nn.Tanh()), ValueError, "Please specify `target_modules`")


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "bert"])
def test_tied_target(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    target = "lm_head"
    if name == "bert":  # tie two layers by hand
        layers = model.bert.encoder.layer
        layers[0].output.dense.weight = layers[1].output.dense.weight
        target = r"0\.output\.dense"
    match = r"(lm_head|output\.dense): its weight is tied \(.*, .*\)"
    refused(model, ValueError, match, target_modules=[target] if name != "bert" else rf".*{target}")


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = VIT.build()
    refused(model, ValueError, "q_proj: its weight is on the meta device")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    model = VIT.model()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[2, 3] = value
    refused(model, ValueError, r"vit\.layers\.1\.mlp\.fc1: its weight holds NaN or Inf")


def test_weights_past_the_range_of_the_scales_of_4_bits() -> None:
    model = VIT.model()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[2, 3] = 7e4
    message = r"vit\.layers\.1\.mlp\.fc1: residual='int4' needs a weight in the range of float16, got larger values"
    refused(model, ValueError, message, residual="int4", update="addition")


def test_integer_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    refused(model, ValueError, "0: WASI needs a floating point weight matrix, got torch.int8", target_modules=["0"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_8_bit_floating_point(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    for residual in (None, "int8"):
        config = WasiConfig(target_modules=["0"], residual=residual)
        with pytest.raises(ValueError, match=f"0: WASI needs a floating point weight matrix, got {dtype}"):
            get_peft_model(model, config)
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype


def test_a_target_adapted_by_lora() -> None:
    model = get_peft_model(VIT.model(), LoraConfig(target_modules=["fc1"])).get_base_model()
    del model.peft_config
    refused(model, ValueError, r"layers\.0\.mlp\.fc1: already adapted by peft\.tuners\.lora", target_modules=["fc1"])


@pytest.mark.parametrize("missing", ["vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2"])
def test_a_rank_that_any_layer_lacks_is_found_before_the_first_is_replaced(missing: str) -> None:
    model = VIT.model()
    ranks = dict.fromkeys(VIT.targets(model) - {missing}, 3)
    refused(model, ValueError, rf"{missing}: the saved adapter and this model do not have the same .*", ranks=ranks)


# ------------------------------------------------------------------ further adapters


def unchanged(model: Any, error: type[Exception], match: str, config: WasiConfig) -> None:
    """`add_adapter` raises, and the model computes, names and trains what it did before."""
    batch = VIT.batch()
    expected = logits(model, batch)
    keys = list(model.state_dict())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(error, match=match):
        model.add_adapter("second", config)
    assert list(model.state_dict()) == keys
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, batch), expected)
    train(model, batch, 1)


def test_a_second_fresh_adapter_on_a_released_base() -> None:
    model = wasi_model(VIT.model(), **LOW, train_vectors=False, bias="none")
    config = exact_config(**LOW, train_vectors=False, bias="none")
    unchanged(model, ValueError, r"q_proj: a second fresh WASI adapter needs the dense weight", config)


RELEASED_VECTORS = [  # which vectors the first and the second adapter train
    ({"train_vectors": True}, {"train_vectors": False}),
    ({"train_vectors": False}, {"train_vectors": True}),
    ({"bias": "all"}, {"bias": "none"}),
    ({"bias": "none"}, {"bias": "all"}),
    ({"bias": "all"}, {"bias": "wasi_only"}),
]


@pytest.mark.parametrize(("first", "second"), RELEASED_VECTORS, ids=str)
def test_two_adapters_with_different_vectors_on_a_released_base(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    """The base model's own are gone, which the adapter without any would need."""
    wasi_model(VIT.model(), **LOW, **second).save_pretrained(tmp_path)
    model = wasi_model(VIT.model(), **LOW, **first)
    config = WasiConfig.from_pretrained(str(tmp_path))
    unchanged(model, ValueError, "so all adapters must train the same; got train_vectors and bias='all' as", config)


@pytest.mark.parametrize(("first", "second"), RELEASED_VECTORS, ids=str)
def test_two_adapters_with_different_vectors_on_a_kept_base(first: dict[str, Any], second: dict[str, Any]) -> None:
    options = {**LOW, "base_weight": "keep"}
    model = wasi_model(VIT.model(), **options, **first)
    expected = logits(model, VIT.batch())
    model.add_adapter("second", exact_config(**options, **second))
    assert torch.equal(logits(model, VIT.batch()), expected)
    model.set_adapter("second")
    train(model, VIT.batch())
    model.set_adapter("default")
    assert torch.equal(logits(model, VIT.batch()), expected)


def test_another_target_set_on_a_released_base() -> None:
    model = wasi_model(VIT.model(), **LOW, train_vectors=False)
    config = exact_config(target_modules=["fc1"], train_vectors=False, weight_rank=3)
    unchanged(
        model, ValueError, r"fc1: a second fresh WASI adapter needs the dense weight, which was released", config
    )


def test_several_active_adapters() -> None:
    options = {**LOW, "base_weight": "keep", "train_vectors": False, "bias": "none"}
    model = wasi_model(VIT.model(), **options)
    model.add_adapter("second", exact_config(**options))
    expected = logits(model, VIT.batch())
    with pytest.raises(ValueError, match="only one adapter can be active, got \\['default', 'second'\\]"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="only one adapter can be merged"):
        model.merge_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    assert not any(layer.merged for _, layer in wasi_layers(model))
    assert torch.equal(logits(model, VIT.batch()), expected)


def test_merging_twice() -> None:
    options = {**LOW, "base_weight": "keep", "train_vectors": False, "bias": "none"}
    model = wasi_model(VIT.model(), **options)
    model.add_adapter("second", exact_config(**options))
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="only one adapter can be merged at a time, got \\['second'\\]"):
        model.merge_adapter(["second"])


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan(how: str) -> None:
    model = wasi_model(VIT.model(), **LOW)
    with torch.no_grad():
        next(layer for _, layer in wasi_layers(model)).wasi_form["default"].L[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.* The adapter default"):
        getattr(model, how)(safe_merge=True)


# ------------------------------------------------------------------ files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = wasi_model(VIT.model(), **LOW)
    train(model, VIT.batch())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def one(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x10" * 400)


def empty(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def missing_file(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def missing(part: str) -> Any:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop(one(tensors, part)))

    return change


def no_tensors(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.clear())


def other_shape(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = one(tensors, "fc1.wasi_form.wasi_L")
        tensors[name] = tensors[name][:, :4].contiguous()

    rewrite(folder, change)


def nan(part: str, value: float = math.nan) -> Any:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors[one(tensors, part)].view(-1)[-1:].fill_(value))

    return change


def other_ranks(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["ranks"] = dict.fromkeys(config["ranks"], 4)
    path.write_text(json.dumps(config))


def other_model(folder: Path) -> None:
    other = wasi_model(ARCHITECTURES["dinov2"].model(), **LOW)
    shutil.rmtree(folder)
    other.save_pretrained(folder)


def bigger_model(folder: Path) -> None:
    """Same names, other sizes; every rank still fits."""
    config = VIT.build().config
    config.hidden_size, config.intermediate_size = 20, 30
    other = wasi_model(type(VIT.build())(config), **LOW)
    shutil.rmtree(folder)
    other.save_pretrained(folder)


def deeper_model(folder: Path) -> None:
    config = VIT.build().config
    config.num_hidden_layers = 3
    other = wasi_model(type(VIT.build())(config), **LOW, train_vectors=False, bias="none")
    shutil.rmtree(folder)
    other.save_pretrained(folder)


FILES: dict[str, tuple[Any, str]] = {
    "truncated": (truncate, ""),
    "corrupt": (corrupt, ""),
    "empty": (empty, ""),
    "no file": (missing_file, ""),
    "no tensors": (no_tensors, "[qk]_proj: the adapter lacks wasi_L"),
    "missing L": (missing("q_proj.wasi_form.wasi_L"), r"q_proj: the adapter lacks wasi_L"),
    "missing R": (missing("fc2.wasi_form.wasi_R"), r"fc2: the adapter lacks wasi_R"),
    "missing bias": (missing("fc1.wasi_form.bias"), r"fc1: the adapter lacks bias"),
    "missing vector": (missing("layernorm_before.weight"), "layernorm_before"),
    "other shape": (other_shape, r"fc1\.wasi_form\.\w+\.wasi_L: must have shape \(24, 5\), got \(24, 4\)"),
    "NaN in L": (
        nan("k_proj.wasi_form.wasi_L"),
        r"k_proj\.wasi_form\.\w+\.wasi_L: .* holds NaN or Inf",
    ),
    "Inf in R": (
        nan("k_proj.wasi_form.wasi_R", math.inf),
        r"k_proj\.wasi_form\.\w+\.wasi_R: .* holds NaN or Inf",
    ),
    "NaN in bias": (nan("fc1.wasi_form.bias"), r"fc1\.wasi_form\.\w+\.bias: the adapter file holds NaN or Inf"),
    "NaN in vector": (nan("layernorm_after.bias"), r"layernorm_after\.bias: the adapter file holds NaN or Inf"),
    "other ranks": (other_ranks, r"\.wasi_L: must have shape \(16, 4\), got \(16, 5\)"),
    "other model": (other_model, "not found in the base model|same targeted layers|belongs to another model"),
    "other sizes": (bigger_model, r"must have shape .* got .*20|must have shape .* got .*30"),
    "other depth": (deeper_model, r"layers\.2.*: the saved adapter and this model do not have the same targeted"),
}


def nothing_lost(base: Any, expected: dict[str, Tensor]) -> None:
    """All dense weights are still in the model with their values, wrapped or not."""
    for name, value in expected.items():
        module_name, _, parameter = name.rpartition(".")
        module = base.get_submodule(module_name)
        if isinstance(module, WasiLayer):
            module = module.base_layer
            assert type(module) is nn.Linear
        assert torch.equal(getattr(module, parameter), value)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("damage", "match"), FILES.values(), ids=FILES.keys())
def test_damaged_files(saved: Path, damage: Any, match: str, low_cpu_mem_usage: bool) -> None:
    """`from_pretrained` raises and no value of the user's model is lost."""
    damage(saved)
    base = VIT.model()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(Exception, match=match) as error:
        PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    if match:
        assert isinstance(error.value, (ValueError, TypeError))
    nothing_lost(base, state)


NOT_SEEN_BY_LAYERS = ("missing vector", "NaN in vector", "no tensors")
NATIVE_FILES = {name: damage for name, damage in FILES.items() if name not in NOT_SEEN_BY_LAYERS}


@pytest.mark.parametrize(("damage", "match"), NATIVE_FILES.values(), ids=NATIVE_FILES.keys())
def test_damaged_files_with_the_native_loader(saved: Path, damage: Any, match: str) -> None:
    """transformers calls none of the tuner's checks: at the latest the first forward pass must raise.

    Vectors belong to the base model, so a layer cannot know that the file lacked one; docs/usage.md says so.
    """
    damage(saved)
    base = VIT.model()
    names = VIT.targets(base)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(Exception, match="") as error:
        base.load_adapter(str(saved))
        output = base(**VIT.batch()).logits
        pytest.fail(f"a damaged adapter computed {'NaN' if output.isnan().any() else 'something'}")
    assert not isinstance(error.value, pytest.fail.Exception), str(error.value)
    nothing_lost(base, {name: value for name, value in state.items() if name.rpartition(".")[0] in names})


def test_a_file_without_any_tensor_with_the_native_loader(saved: Path) -> None:
    """Nothing came, so the dense layers answer; transformers lists what is missing."""
    no_tensors(saved)
    base = VIT.model()
    expected = logits(base, VIT.batch())
    missing = base.load_adapter(str(saved)).missing_keys
    assert len(missing) == 12 * 3 and all(".wasi_form.default." in key for key in missing)
    assert torch.equal(logits(base, VIT.batch()), expected)


@pytest.mark.parametrize("damage", ["missing L", "other shape", "NaN in L", "other depth", "truncated"])
def test_a_damaged_second_adapter_leaves_the_first_usable(saved: Path, tmp_path: Path, damage: str) -> None:
    options = {**LOW, "train_vectors": False, "bias": "none"}
    wasi_model(VIT.model(), **options).save_pretrained(tmp_path / "first")
    wasi_model(VIT.model(), **options).save_pretrained(saved)
    FILES[damage][0](saved)
    model = PeftModel.from_pretrained(VIT.model(), tmp_path / "first")
    expected = logits(model, VIT.batch())
    with pytest.raises(Exception, match=FILES[damage][1]):
        model.load_adapter(saved, adapter_name="second")
    model.set_adapter("default")
    assert torch.equal(logits(model, VIT.batch()), expected)
    if "second" in model.peft_config:
        model.delete_adapter("second")
        assert torch.equal(logits(model, VIT.batch()), expected)


def test_loading_a_bad_state_dict_into_a_trained_model_changes_nothing(saved: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = wasi_model(VIT.model(), **LOW)
    expected = logits(model, VIT.batch())
    good = get_peft_model_state_dict(model)
    for part, change in (("wasi_L", lambda t: t[:, :2]), ("wasi_R", lambda t: t * math.nan), ("wasi_R", None)):
        bad = dict(good)
        name = one(bad, part)
        if change is None:
            del bad[name]
        else:
            bad[name] = change(bad[name])
        with pytest.raises(ValueError, match="adapter"):
            set_peft_model_state_dict(model, bad)
        assert torch.equal(logits(model, VIT.batch()), expected)
