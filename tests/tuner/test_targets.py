"""Which layers a configuration selects, and at which rank."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture, exact_config, wasi_model
from peft import get_peft_model
from torch import nn

from wasi_peft import WasiConfig, wasi_summary
from wasi_peft.forms.dense import dense_weight
from wasi_peft.linalg.spectra import rank_for_threshold


def replaced(model: Any) -> set[str]:
    return {layer.name for layer in wasi_summary(model).layers}


def block_number(name: str) -> int:
    """First number in a name; in every tiny model but Swin and T5 that is the block."""
    match = re.search(r"\.(\d+)\.", name)
    assert match is not None
    return int(match.group(1))


def test_default_targets_are_the_layers_of_the_blocks(architecture: Architecture) -> None:
    model = architecture.model()
    expected = architecture.targets(model)
    assert len(expected) == architecture.target_count
    peft_model = wasi_model(model)
    assert replaced(peft_model) == expected
    assert set(peft_model.peft_config["default"].resolved_ranks) == expected
    for name in architecture.dense:
        assert type(peft_model.get_base_model().get_submodule(name)) is nn.Linear


def test_explicit_list(architecture: Architecture) -> None:
    model = architecture.model()
    expected = {name for name in architecture.targets(model) if name.endswith("." + architecture.example)}
    assert 2 <= len(expected) < architecture.target_count
    assert replaced(wasi_model(model, target_modules=[architecture.example])) == expected


def test_full_names(architecture: Architecture) -> None:
    model = architecture.model()
    chosen = sorted(architecture.targets(model))[1:4:2]
    assert replaced(wasi_model(model, target_modules=chosen)) == set(chosen)


def test_regular_expression(architecture: Architecture) -> None:
    model = architecture.model()
    expected = {
        name
        for name in architecture.targets(model)
        if name.endswith("." + architecture.example) and f".{architecture.layers_pattern}.1." in name
    }
    pattern = rf".*\.{architecture.layers_pattern}\.1\..*\.{architecture.example}"
    assert expected
    assert replaced(wasi_model(model, target_modules=pattern)) == expected


def test_all_linear_takes_the_layers_outside_the_blocks_too(architecture: Architecture) -> None:
    """PEFT's meaning of 'all-linear': everything but the output embedding of a language model."""
    model = architecture.model()
    kept = {"lm_head"} if model.get_output_embeddings() is not None else set()
    if architecture.auto_class.endswith("SequenceClassification"):
        kept.add("classifier")
    expected = architecture.targets(model) | (set(architecture.dense) - kept)
    task_type = "SEQ_CLS" if "classifier" in kept else None
    assert replaced(wasi_model(model, target_modules="all-linear", task_type=task_type)) == expected


def test_exclude_modules_with_default_targets(architecture: Architecture) -> None:
    model = architecture.model()
    expected = {name for name in architecture.targets(model) if not name.endswith("." + architecture.example)}
    assert len(expected) < architecture.target_count
    assert replaced(wasi_model(model, exclude_modules=[architecture.example])) == expected


def test_exclude_modules_by_regular_expression(architecture: Architecture) -> None:
    model = architecture.model()
    expected = {name for name in architecture.targets(model) if f".{architecture.layers_pattern}.0." not in name}
    pattern = rf".*\.{architecture.layers_pattern}\.0\..*"
    assert 0 < len(expected) < architecture.target_count
    assert replaced(wasi_model(model, exclude_modules=pattern)) == expected


@pytest.mark.parametrize("layers", [1, [1]], ids=["int", "list"])
@pytest.mark.parametrize("explicit", [False, True], ids=["default-targets", "explicit-targets"])
def test_layers_to_transform(architecture: Architecture, layers: Any, explicit: bool) -> None:
    model = architecture.model()
    expected = {name for name in architecture.targets(model) if f".{architecture.layers_pattern}.1." in name}
    options: dict[str, Any] = {}
    if explicit:
        options["target_modules"] = [architecture.example]
        expected = {name for name in expected if name.endswith("." + architecture.example)}
    assert 0 < len(expected) < architecture.target_count
    peft_model = wasi_model(model, layers_to_transform=layers, layers_pattern=architecture.layers_pattern, **options)
    assert replaced(peft_model) == expected


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert", "gpt2", "llama", "t5"])
def test_layers_to_transform_without_a_pattern(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    expected = {n for n in architecture.targets(model) if f".{architecture.layers_pattern}.0." in n}
    assert replaced(wasi_model(model, layers_to_transform=[0])) == expected


def test_layers_to_transform_of_all_blocks_is_the_default(architecture: Architecture) -> None:
    model = architecture.model()
    expected = architecture.targets(model)
    peft_model = wasi_model(model, layers_to_transform=[0, 1], layers_pattern=architecture.layers_pattern)
    assert replaced(peft_model) == expected


def ranks(model: Any) -> dict[str, int]:
    return {layer.name: layer.rank for layer in wasi_summary(model).layers}


def test_weight_rank_is_the_rank_of_every_layer(architecture: Architecture) -> None:
    peft_model = wasi_model(architecture.model(), weight_rank=5)
    assert set(ranks(peft_model).values()) == {5}
    assert peft_model.peft_config["default"].resolved_ranks == ranks(peft_model)


def test_rank_pattern_overrides_weight_rank(architecture: Architecture) -> None:
    model = architecture.model()
    exact = sorted(architecture.targets(model))[-1]
    pattern = {exact: 2, architecture.example: 3}
    if exact.endswith("." + architecture.example):
        del pattern[architecture.example]
    found = ranks(wasi_model(model, weight_rank=5, rank_pattern=pattern))
    assert found[exact] == 2
    for name, rank in found.items():
        if name != exact:
            assert rank == (pattern.get(architecture.example, 5) if name.endswith("." + architecture.example) else 5)


def test_rank_pattern_as_regular_expression_overrides_the_threshold(architecture: Architecture) -> None:
    pattern = {rf"{architecture.layers_pattern}\.0\..*": 2}
    found = ranks(wasi_model(architecture.model(), rank_pattern=pattern))
    first = {name for name in found if re.search(rf"\.{architecture.layers_pattern}\.0\.", name)}
    assert first and all(found[name] == 2 for name in first)
    assert all(found[name] >= 8 for name in set(found) - first)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95, 1.0])
def test_thresholds_give_the_smallest_sufficient_rank(architecture: Architecture, threshold: float) -> None:
    model = architecture.model()
    weights = {name: dense_weight(model.get_submodule(name)).clone() for name in architecture.targets(model)}
    found = ranks(wasi_model(model, explained_variance_threshold=threshold))
    for name, weight in weights.items():
        energies = torch.linalg.svdvals(weight.double()) ** 2
        shares = energies.cumsum(0) / energies.sum()
        rank = found[name]
        if threshold == 1.0:
            assert rank == min(weight.shape)
        else:
            assert shares[rank - 1] >= threshold - 1e-12
            assert rank == 1 or shares[rank - 2] < threshold
            assert rank == rank_for_threshold(energies, threshold)


def test_plain_modules_without_a_transformers_config() -> None:
    """Default targets need numbered blocks, not a known architecture."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 8))
    model.add_module("blocks", nn.Sequential(Block(), Block()))
    model.add_module("head", nn.Linear(8, 2))
    peft_model = wasi_model(model)
    assert replaced(peft_model) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("up", "down")}


def test_one_target_set_for_the_live_configuration() -> None:
    """The configuration that was given is the one in the model, as PEFT's own tuners keep it."""
    config = exact_config()
    peft_model = get_peft_model(ARCHITECTURES["vit"].model(), config)
    assert peft_model.peft_config["default"] is config
    assert isinstance(config, WasiConfig) and config.init_weights is True
