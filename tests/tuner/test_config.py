"""The configuration: defaults, documentation, what is saved, what is written into the model card."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from models import ARCHITECTURES, wasi_model
from peft import PeftConfig, get_peft_model
from peft.config import PeftConfig as BaseConfig

from wasi_peft import WasiConfig
from wasi_peft.linalg.tucker import CompressionRule
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.tuner.registration import PEFT_TYPE

OWN_FIELDS = [
    field
    for field in dataclasses.fields(WasiConfig)
    if field.name not in {inherited.name for inherited in dataclasses.fields(BaseConfig)}
]

VARIED: dict[str, Any] = {
    "explained_variance_threshold": 0.7,
    "weight_share": 0.4,
    "target_modules": ["fc1", "fc2"],
    "exclude_modules": ["q_proj"],
    "modules_to_save": ["classifier"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "bias": "all",
    "train_vectors": False,
    "activation_threshold": 0.8,
    "activation_ranks": {"feature": 4},
    "activation_modes": ["feature", "token"],
    "activation_interval": 3,
    "update": "factor",
    "update_rank": 8,
    "memory_mode": "small",
    "slice_tokens": 400,
    "skip_padding": True,
    "token_keep": 0.5,
    "trainable_token_indices": [3, 5],
    "ensure_weight_tying": True,
    "base_weight": "cpu",
    "init_weights": False,
    "ranks": {"layers.0.fc1": 3},
}
PLAN = WasiPlan((LayerPlan("layers.0.fc1", 8, 6, 3, {"feature": 2, "token": 4}, 0.5),), {"weight_share": 0.4})
ALONE: list[dict[str, Any]] = [  # what cannot be combined with all of the above
    {"weight_rank": 6, "rank_pattern": {"fc1": 3}},
    {"plan": PLAN.to_dict()},
    {"residual": "int4", "residual_product": "restored", "vocabulary": "int8"},
    {"frozen_dtype": "int8"},
]


def test_defaults() -> None:
    config = WasiConfig()
    assert config.peft_type is PEFT_TYPE
    assert (config.residual, config.residual_product, config.explained_variance_threshold) == ("int8", None, None)
    assert config.activation_threshold == 0.95
    assert config.activation_modes == ["feature"]
    assert (config.update, config.base_weight, config.bias) == ("addition", "release", "wasi_only")
    assert config.update_rank is None and WasiConfig(update="low_rank").update_rank == 16
    assert config.train_vectors is True and config.init_weights is True
    factors = WasiConfig(residual=None)
    assert (factors.update, factors.explained_variance_threshold) == ("frozen_basis", 0.95)
    assert config.target_modules is config.weight_rank is config.activation_ranks is config.ranks is None


def test_mutable_defaults_are_not_shared() -> None:
    one, other = WasiConfig(), WasiConfig()
    one.rank_pattern["fc1"] = 3
    one.activation_modes.append("token")
    assert other.rank_pattern == {} and other.activation_modes == ["feature"]


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_field_is_documented(field: dataclasses.Field[Any]) -> None:
    assert field.metadata.get("help")
    assert WasiConfig.__doc__ is not None and f"\n        {field.name} (`" in WasiConfig.__doc__


def test_the_varied_values_cover_every_field() -> None:
    varied = [item for options in (VARIED, *ALONE) for item in options.items()]
    assert {name for name, _ in varied} == {field.name for field in OWN_FIELDS}
    plain = WasiConfig()
    assert all(getattr(plain, name) != value for name, value in varied)


@pytest.mark.parametrize("sequence", [list, tuple, set])
def test_lists_of_names_become_sets(sequence: type) -> None:
    config = WasiConfig(residual=None, target_modules=sequence(["a", "b"]), exclude_modules=sequence(["c"]))
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert WasiConfig(residual=None, target_modules="a|b").target_modules == "a|b"


@pytest.mark.parametrize("loader", [PeftConfig, WasiConfig], ids=["PeftConfig", "WasiConfig"])
@pytest.mark.parametrize("options", [VARIED, *ALONE], ids=["most", "ranks", "plan", "residual", "few bits"])
def test_round_trip(tmp_path: Path, loader: type[PeftConfig], options: dict[str, Any]) -> None:
    config = WasiConfig(**options)
    config.save_pretrained(str(tmp_path))
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is WasiConfig
    expected = copy.copy(config)
    expected.inference_mode = loaded.inference_mode  # PEFT always saves True
    assert loaded == expected


def test_the_file_is_plain_json_with_the_type(tmp_path: Path) -> None:
    WasiConfig(**VARIED).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "WASI"
    assert sorted(saved["target_modules"]) == ["fc1", "fc2"]
    assert saved["weight_share"] == 0.4 and saved["plan"] is None


def test_a_configuration_that_was_never_injected_is_saved_as_it_is(tmp_path: Path) -> None:
    WasiConfig(residual=None, weight_rank=3).save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.init_weights is True and loaded.ranks is None


def test_after_injection_the_saved_one_asks_for_loading_and_the_live_one_does_not(tmp_path: Path) -> None:
    model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=3)
    live = model.peft_config["default"]
    before = copy.deepcopy(live)
    live.save_pretrained(str(tmp_path))
    assert live == before and live.ranks is None and not live.awaits_loading
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.awaits_loading and loaded.init_weights is True
    assert loaded.ranks == live.resolved_ranks and len(live.resolved_ranks) == 12


def test_unknown_keys_of_a_later_version_do_not_prevent_loading(tmp_path: Path) -> None:
    WasiConfig(residual=None, weight_rank=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(str(tmp_path)).weight_rank == 3


def test_copy_and_pickle() -> None:
    config = WasiConfig(**VARIED)
    config.plan = PLAN.to_dict()
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again.peft_type is PEFT_TYPE


@pytest.mark.parametrize("update", ["low_rank", "subspace", "factor"])
def test_compression_rule(update: str) -> None:
    def rule(**options: Any) -> CompressionRule | None:
        return WasiConfig(update=update, **options).compression_rule("fc1")  # type: ignore[arg-type]

    assert rule(activation_threshold=None) is None
    assert rule() is not None
    assert rule(activation_threshold=None, activation_ranks=4) is not None
    assert rule(activation_ranks=4) == rule(activation_ranks={"feature": 4}) != rule(activation_ranks=5)


@pytest.mark.parametrize("update", [None, "frozen_basis", "core"])
def test_nothing_is_compressed_where_no_input_is_kept(update: Any) -> None:
    assert WasiConfig(residual=None, update=update).compression_rule("fc1") is None
    assert WasiConfig(update=update, plan=PLAN).compression_rule("layers.0.fc1") is None
    with pytest.raises(
        ValueError, match=r"activation_ranks compresses inputs, and update='(frozen_basis|core)' keeps"
    ):
        WasiConfig(residual=None, update=update, activation_ranks=4)


def test_a_rank_that_the_update_does_not_have_is_said() -> None:
    with pytest.warns(UserWarning, match="update_rank=8 has no effect: update='addition' trains no directions beside"):
        assert WasiConfig(update_rank=8).update_rank is None
    plan = dataclasses.replace(PLAN, update="low_rank", update_rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WasiConfig(update="low_rank", update_rank=8).update_rank == 8
        WasiConfig(plan=plan, update="factor")  # the plan's, which nobody asked for
        WasiConfig(**WasiConfig(plan=plan).to_dict())


def test_a_plan_brings_its_update_unless_another_is_named() -> None:
    plan = dataclasses.replace(PLAN, update="low_rank", update_rank=4)

    def chosen(**options: Any) -> tuple[str | None, int | None]:
        config = WasiConfig(**options)
        return config.update, config.update_rank

    assert chosen() == ("addition", None) and chosen(plan=PLAN) == ("frozen_basis", None)
    assert chosen(plan=plan) == ("low_rank", 4)
    assert chosen(plan=plan, update_rank=8) == ("low_rank", 8)
    assert chosen(plan=plan, update="factor") == ("factor", None)
    assert chosen(**WasiConfig(plan=plan).to_dict()) == ("low_rank", 4)


def test_a_plan_brings_its_memory_mode_unless_another_is_named() -> None:
    plan = dataclasses.replace(PLAN, memory_mode="small")
    assert WasiConfig().memory_mode == WasiConfig(plan=PLAN).memory_mode == "exact"
    assert WasiConfig(plan=plan).memory_mode == "small"
    assert WasiConfig(plan=plan, memory_mode="fast").memory_mode == "fast"
    assert WasiConfig(**WasiConfig(plan=plan).to_dict()).memory_mode == "small"


def test_compression_rule_of_a_plan() -> None:
    exact = dataclasses.replace(PLAN.layers[0], name="layers.1.fc1", activation_ranks=None)
    config = WasiConfig(plan=WasiPlan((*PLAN.layers, exact), update="factor"))
    ranks = (("feature", 2), ("token", 4))
    assert config.compression_rule("layers.0.fc1") == CompressionRule(("feature", "token"), None, ranks)
    assert config.compression_rule("layers.1.fc1") is None


def test_a_plan_is_taken_in_any_form_and_stored_as_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    for form in (PLAN, PLAN.to_dict(), path, str(path)):
        config = WasiConfig(plan=form)
        assert config.plan == PLAN.to_dict()
        assert json.loads(json.dumps(config.to_dict()["plan"])) == PLAN.to_dict()
    assert config.planned_names() == {"layers.0.fc1"}
    assert config.planned_layer("layers.0.fc1") == PLAN.layers[0]
    assert config.planned_layer("layers.1.fc1") is None
    assert WasiConfig().planned_names() == set() and WasiConfig().planned_layer("layers.0.fc1") is None


BESIDE_A_PLAN: list[dict[str, Any]] = [
    {"weight_rank": 3},
    {"rank_pattern": {"fc1": 3}},
    {"weight_share": 0.5},
    {"target_modules": ["fc1"]},
    {"exclude_modules": ["fc1"]},
    {"layers_to_transform": [0]},
    {"activation_ranks": 4},
    {"activation_modes": ["feature", "token"]},
]


@pytest.mark.parametrize("options", BESIDE_A_PLAN, ids=lambda options: next(iter(options)))
def test_a_plan_decides_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"plan decides layers and ranks; leave {next(iter(options))} out, got"):
        WasiConfig(plan=PLAN, update="factor", **options)


@pytest.mark.parametrize("options", BESIDE_A_PLAN[:2], ids=lambda options: next(iter(options)))
def test_a_share_decides_every_rank(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"weight_share decides the rank of every layer; leave {next(iter(options))}"):
        WasiConfig(weight_share=0.5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, as ['head'], got 'head'."),
        ({"modules_to_save": [3]}, "modules_to_save must be a list of names, got [3]."),
        ({"target_modules": ["fc1", 3]}, "target_modules must be a list of names or one string, got ['fc1', 3]."),
        ({"target_modules": {"fc1": 3}}, "target_modules must be a list of names or one string, got {'fc1': 3}."),
        ({"exclude_modules": 3}, "exclude_modules must be a list of names or one string, got 3."),
        ({"rank_pattern": [("fc1", 3)]}, "rank_pattern must be a dict of ranks by name, got [('fc1', 3)]."),
        (
            {"layers_to_transform": "0"},
            "layers_to_transform must be an index of a block, from 0, or a list of such, got '0'.",
        ),
        (
            {"layers_to_transform": [0, -1]},
            "layers_to_transform must be an index of a block, from 0, or a list of such, got [0, -1].",
        ),
        ({"train_vectors": "no"}, "train_vectors must be True or False, got 'no'."),
        ({"init_weights": "pissa"}, "init_weights must be True or False, got 'pissa'."),
        ({"skip_padding": 1}, "skip_padding must be True or False, got 1."),
        ({"slice_tokens": 0}, "slice_tokens must be a positive integer, got 0."),
        ({"slice_tokens": 1.5}, "slice_tokens must be a positive integer, got 1.5."),
    ],
    ids=repr,
)
def test_values_of_another_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        WasiConfig(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("names", [("classifier",), {"classifier"}], ids=repr)
def test_names_in_any_collection(names: Any) -> None:
    """A task type appends its own to the list."""
    model = get_peft_model(ARCHITECTURES["bert"].model(), WasiConfig(task_type="SEQ_CLS", modules_to_save=names))
    assert "classifier" in model.peft_config["default"].modules_to_save


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, True, "0.5"], ids=repr)
def test_weight_share_is_a_share(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        WasiConfig(weight_share=value)
    assert str(error.value) == f"weight_share must be a number in (0, 1], got {value!r}."


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (5, "a plan must be a dict with the dict 'layers', got 5"),
        ({**PLAN.to_dict(), "format": 3}, "a plan must have format 2, got 3"),
        ({**PLAN.to_dict(), "other": 2}, "a plan must have the keys .*unknown key 'other'"),
    ],
)
def test_what_is_no_plan(plan: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WasiConfig(plan=plan)


def test_a_saved_configuration_reads_no_other_file(tmp_path: Path) -> None:
    WasiConfig(weight_rank=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    (tmp_path / "other.json").write_text('{"token": "secret"}')
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan": str(tmp_path / "other.json")}))
    with pytest.raises(ValueError, match="holds its plan as an object, and never the path of another file") as error:
        PeftConfig.from_pretrained(tmp_path)
    assert "secret" not in str(error.value)


def test_no_card_is_made_up(tmp_path: Path) -> None:
    WasiConfig().save_pretrained(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


# ---------------------------------------------------------------- which form


@pytest.mark.parametrize(
    ("options", "residual", "update"),
    [
        ({}, "int8", "addition"),
        ({"weight_rank": 4}, "int8", "addition"),
        ({"update": "frozen_basis"}, "int8", "frozen_basis"),
        ({"residual": "int4", "update": "addition"}, "int4", "addition"),
        ({"residual": "exact"}, "exact", "addition"),
        ({"residual": None}, None, "frozen_basis"),
        ({"weight_share": 0.5}, None, "frozen_basis"),
        ({"explained_variance_threshold": 0.9}, None, "frozen_basis"),
        ({"plan": PLAN}, None, "frozen_basis"),
        ({"plan": PLAN, "update": "factor"}, None, "factor"),
        *(({"update": update}, None, update) for update in ("low_rank", "core", "subspace", "factor")),
    ],
    ids=str,
)
def test_the_form_that_is_asked_for(options: dict[str, Any], residual: str | None, update: str) -> None:
    config = WasiConfig(**options)
    assert (config.residual, config.update) == (config.layer_update.residual, config.layer_update.name)
    assert (config.residual, config.update) == (residual, update)
    assert config.base_form == (residual or "release")
    again = WasiConfig(**{**config.to_dict(), "peft_type": PEFT_TYPE})
    assert (again.residual, again.update, again.layer_update) == (residual, update, config.layer_update)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "int3"}, "residual must be one of 'int8', 'int4', 'exact', 'auto', None, got 'int3'."),
        ({"residual": 8}, "residual must be one of 'int8', 'int4', 'exact', 'auto', None, got 8."),
        (
            {"residual": "int8", "weight_share": 0.5},
            "weight_share chooses ranks of factors alone; .*=0.5.",
        ),
        ({"residual": "exact", "explained_variance_threshold": 0.9}, "explained_variance_threshold chooses ranks of"),
        ({"residual": "int8", "plan": PLAN}, "plan decides the form of every layer; leave residual='int8' out"),
        ({"update": "addition", "weight_share": 0.5}, "update='addition' adds to a frozen weight, so it needs a"),
        ({"residual": "int8", "update": "core"}, "a residual needs update='addition' or 'frozen_basis', got"),
        (
            {"residual": None, "update": "addition"},
            "update='addition' adds to a frozen weight, so it needs a residual",
        ),
        ({"base_weight": "keep"}, "base_weight is for factors .* got base_weight='keep' with residual='int8'."),
        ({"residual": "exact", "base_weight": "cpu"}, "base_weight is for factors .* got base_weight='cpu' with"),
        (
            {"residual_product": "float8"},
            "must be one of 'int8', 'restored', 'bfloat16', 'weight_only', None, got 'float8'",
        ),
        ({"weight_rank": 0}, "weight_rank must be a positive integer, got 0."),
        ({"update": "frozen_basis", "activation_ranks": 4}, "activation_ranks compresses inputs, and update='frozen"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WasiConfig(**options)


def test_beside_a_residual_inputs_are_compressed_only_where_ranks_are_asked_for() -> None:
    """In 8 bits they cost little, and every threshold has a default."""
    assert WasiConfig().compression_rule("fc1") is None
    assert WasiConfig(activation_threshold=0.5).compression_rule("fc1") is None
    assert WasiConfig(activation_ranks=4).compression_rule("fc1") is not None
