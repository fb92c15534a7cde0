"""The configuration: defaults, documentation, what is saved, what is written into the model card."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from models import ARCHITECTURES, wasi_model
from peft import PeftConfig
from peft.config import PeftConfig as BaseConfig

from wasi_peft import WasiConfig
from wasi_peft._registration import PEFT_TYPE, WASI_IMPORT_NOTE

OWN_FIELDS = [
    field
    for field in dataclasses.fields(WasiConfig)
    if field.name not in {inherited.name for inherited in dataclasses.fields(BaseConfig)}
]

VARIED: dict[str, Any] = {
    "explained_variance_threshold": 0.7,
    "weight_rank": 6,
    "rank_pattern": {"fc1": 3},
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
    "base_weight": "cpu",
    "init_weights": False,
    "ranks": {"layers.0.fc1": 3},
}


def test_defaults() -> None:
    config = WasiConfig()
    assert config.peft_type is PEFT_TYPE
    assert config.explained_variance_threshold == 0.95
    assert config.activation_threshold == 0.95
    assert config.activation_modes == ["feature"]
    assert (config.update, config.base_weight, config.bias) == ("subspace", "release", "wasi_only")
    assert config.train_vectors is True and config.init_weights is True
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
    assert set(VARIED) == {field.name for field in OWN_FIELDS}
    plain = WasiConfig()
    assert all(getattr(plain, name) != value for name, value in VARIED.items())


@pytest.mark.parametrize("sequence", [list, tuple, set])
def test_lists_of_names_become_sets(sequence: type) -> None:
    config = WasiConfig(target_modules=sequence(["a", "b"]), exclude_modules=sequence(["c"]))
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert WasiConfig(target_modules="a|b").target_modules == "a|b"


@pytest.mark.parametrize("loader", [PeftConfig, WasiConfig], ids=["PeftConfig", "WasiConfig"])
def test_round_trip(tmp_path: Path, loader: type[PeftConfig]) -> None:
    config = WasiConfig(**VARIED)
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
    assert saved["rank_pattern"] == {"fc1": 3}


def test_a_configuration_that_was_never_injected_is_saved_as_it_is(tmp_path: Path) -> None:
    WasiConfig(weight_rank=3).save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.init_weights is True and loaded.ranks is None


def test_after_injection_the_saved_one_asks_for_loading_and_the_live_one_does_not(tmp_path: Path) -> None:
    model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=3)
    live = model.peft_config["default"]
    before = copy.deepcopy(live)
    live.save_pretrained(str(tmp_path))
    assert live == before and live.init_weights is True
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.init_weights is False
    assert loaded.ranks == live.ranks and len(live.ranks) == 12


def test_unknown_keys_of_a_later_version_do_not_prevent_loading(tmp_path: Path) -> None:
    WasiConfig(weight_rank=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(str(tmp_path)).weight_rank == 3


def test_copy_and_pickle() -> None:
    config = WasiConfig(**VARIED)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again.peft_type is PEFT_TYPE


def test_compression_rule() -> None:
    assert WasiConfig(activation_threshold=None).compression_rule() is None
    assert WasiConfig().compression_rule() is not None
    assert WasiConfig(activation_threshold=None, activation_ranks=4).compression_rule() is not None
    same = WasiConfig(activation_ranks=4).compression_rule()
    assert same == WasiConfig(activation_ranks={"feature": 4}).compression_rule()
    assert same != WasiConfig(activation_ranks=5).compression_rule()


CARDS = {
    "front matter": "---\nlibrary_name: peft\n---\n\n# Model\n",
    "front matter with a rule further down": "---\nlibrary_name: peft\n---\n# Model\n\n---\nmore\n",
    "no front matter": "# Model\n",
    "rule first": "---\nnot closed\n",
    "empty": "",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_the_note_goes_behind_the_front_matter_once(tmp_path: Path, card: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(card)
    config = WasiConfig()
    config.save_pretrained(str(tmp_path))
    text = path.read_text()
    assert text.count(WASI_IMPORT_NOTE) == 1
    if "library_name" in card:
        front = "---\nlibrary_name: peft\n---\n"
        assert text.startswith(front)
        assert text == front + "\n" + WASI_IMPORT_NOTE + "\n" + card.removeprefix(front)
    else:
        assert text.endswith(card)
    config.save_pretrained(str(tmp_path))
    assert path.read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json"]


def test_no_card_is_made_up(tmp_path: Path) -> None:
    WasiConfig().save_pretrained(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]
