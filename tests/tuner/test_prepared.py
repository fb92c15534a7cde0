"""Prepared factors as an object: made, repaired, saved, loaded, attached and injected, bit for bit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from calibrating import (
    TARGETS,
    Interrupted,
    Untouched,
    assert_same_factors,
    batches,
    crash_at,
    prepared,
    wasi_factors,
)
from models import ARCHITECTURES
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from wasi_peft import WasiConfig, WasiFactors, preprocess_wasi, repair_factors
from wasi_peft.tuner import prepared as module_under_test
from wasi_peft.tuner.prepared import FORMAT, PreparedLayer

UPDATES = ("frozen_basis", "low_rank", "core", "subspace", "factor")


def made(net: nn.Module, config: WasiConfig) -> WasiFactors:
    return preprocess_wasi(net, config, batches(), repair_steps=0, progress_bar=False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("options", [{"weight_rank": 3}, {"weight_share": 0.8}, {"explained_variance_threshold": 0.9}])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_file_gives_the_same_adapter(update: str, options: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    net = reference.tiny_net(2, bias=bias)
    other, config = copy.deepcopy(net), WasiConfig(update=update, update_rank=2, **options)
    factors = made(net, config)
    factors.save(tmp_path / "factors.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]
    expected = state(get_peft_model(net, config))
    loaded = WasiFactors.load(tmp_path / "factors.safetensors")
    for name, layer in factors.layers.items():
        assert replace(loaded.layers[name], initial=layer.initial) == layer
    loaded.attach(other)
    assert_same_state(state(get_peft_model(other, config)), expected)


def test_in_every_architecture_and_dtype(tmp_path: Path) -> None:
    for architecture in (ARCHITECTURES["bert"], ARCHITECTURES["gpt2"]):
        for dtype in (torch.float32, torch.bfloat16):
            model, other = architecture.model().to(dtype), architecture.model().to(dtype)
            other.load_state_dict(model.state_dict())
            config, data = WasiConfig(residual=None, weight_rank=3), [architecture.batch(4)]
            factors = preprocess_wasi(model, config, data, repair_steps=0, progress_bar=False)
            factors.save(tmp_path / "f")
            WasiFactors.load(tmp_path / "f").attach(other)
            assert_same_state(state(get_peft_model(other, config)), state(get_peft_model(model, config)))


def test_training_leaves_the_object_as_it_was(tmp_path: Path) -> None:
    """A layer changes what it is given in place."""
    net, config = reference.tiny_net(2), WasiConfig(weight_rank=3, update="factor")
    again, factors = copy.deepcopy(net), made(net, config)
    expected = copy.deepcopy(factors)
    model = get_peft_model(net, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same_factors(factors.initial, expected.initial)
    factors.attach(again)
    get_peft_model(again, config)
    assert prepared(again) == {}


def test_a_repair_leads_to_an_adapter(tmp_path: Path) -> None:
    net, data, config = reference.tiny_net(6), batches(), WasiConfig(residual=None, weight_rank=3)
    other, factors = copy.deepcopy(net), made(net, config)
    repaired = repair_factors(net, factors, data, steps=5, lr=3e-3, progress_bar=False)
    assert_same_factors(prepared(net), factors.initial)  # until it is attached
    assert all(not torch.equal(initial.R, factors.initial[name].R) for name, initial in repaired.initial.items())
    assert repaired.ranks == factors.ranks
    repaired.attach(net)
    repaired.save(tmp_path / "f")
    WasiFactors.load(tmp_path / "f").attach(other)
    assert_same_state(state(get_peft_model(net, config)), state(get_peft_model(other, config)))


def test_the_repair_copies_nothing_that_waits_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = reference.tiny_net(6)
    factors = made(net, WasiConfig(residual=None, weight_rank=3))
    monkeypatch.setattr(PreparedLayer, "__deepcopy__", crash_at(1, lambda *_: None), raising=False)
    repair_factors(net, factors, batches(), steps=2, progress_bar=False)


def test_attached_factors_replace_those_before() -> None:
    net = reference.tiny_net(6)
    made(net, WasiConfig(residual=None, weight_rank=3))
    factors = made(net, WasiConfig(residual=None, weight_rank=2, target_modules=["q", "fc1"]))
    assert_same_factors(prepared(net), factors.initial)
    assert set(prepared(net)) == {name for name in TARGETS if name.endswith((".q", ".fc1"))}


def test_what_is_printed_is_short() -> None:
    factors = made(reference.tiny_net(6), WasiConfig(weight_rank=3, rank_pattern={"fc1": 5}, update="core"))
    assert repr(factors) == "WasiFactors(12 layers, ranks 3 to 5, for update core)"


# -------------------------------------------------------------------- what may go wrong


def without_layer(net: Any) -> nn.Module:
    del net.blocks[1]
    return net  # type: ignore[no-any-return]


def with_wider_layer(net: Any) -> nn.Module:
    net.blocks[1].fc1 = nn.Linear(8, 13)
    return net  # type: ignore[no-any-return]


def with_norm(net: Any) -> nn.Module:
    net.blocks[1].fc1 = nn.Identity()
    return net  # type: ignore[no-any-return]


def without_bias(net: Any) -> nn.Module:
    net.blocks[1].fc1 = nn.Linear(8, 12, bias=False)
    return net  # type: ignore[no-any-return]


def adapted(net: Any) -> nn.Module:
    config = WasiConfig(residual=None, target_modules=["blocks.1.fc1"], weight_rank=2)
    return get_peft_model(net, config).base_model.model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_layer, r"blocks\.1\.\w+: the factors belong to another model, which has this layer"),
        (with_norm, r"blocks\.1\.fc1: the factors belong to another model, which has this layer"),
        (with_wider_layer, r"its weight must have shape \(12, 8\), got \(13, 8\)"),
        (without_bias, r"blocks\.1\.fc1: .* they must agree about a bias, got none"),
        (adapted, r"blocks\.1\.fc1: already a WASI layer; factors are attached to the dense model"),
    ],
)
def test_another_model(change: Any, message: str) -> None:
    factors = made(reference.tiny_net(6), WasiConfig(residual=None, weight_rank=3))
    other = change(reference.tiny_net(6))
    before = other.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        factors.attach(other)
    assert prepared(other) == {} and other.state_dict().keys() == before


def test_a_failed_attachment_keeps_what_was_there() -> None:
    net = reference.tiny_net(6)
    factors = made(net, WasiConfig(residual=None, weight_rank=3))
    wrong = WasiFactors({**factors.layers, "blocks.9.q": next(iter(factors.layers.values()))})
    with pytest.raises(ValueError, match=r"blocks\.9\.q: the factors belong to another model"):
        wrong.attach(net)
    assert_same_factors(prepared(net), factors.initial)


@pytest.mark.parametrize(
    "other", [{"weight_rank": 4}, {"weight_rank": 3, "update": "core"}, {"weight_share": 0.5, "update": "factor"}]
)
def test_another_configuration(other: dict[str, Any], tmp_path: Path) -> None:
    net = reference.tiny_net(6)
    made(net, WasiConfig(weight_rank=3, update="factor")).save(tmp_path / "f")
    fresh = reference.tiny_net(6)
    WasiFactors.load(tmp_path / "f").attach(fresh)
    untouched = Untouched(fresh)
    with pytest.raises(ValueError, match="Run preprocess_wasi again with this configuration"):
        get_peft_model(fresh, WasiConfig(**{"update": "factor", **other}))
    untouched.check()


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = reference.tiny_net(6)
    path = tmp_path / "f"
    made(net, WasiConfig(residual=None, weight_rank=3)).save(path)
    content = path.read_bytes()
    for step in ("save_file", "os.replace"):
        with monkeypatch.context() as patch:
            target, _, name = step.rpartition(".")
            holder = getattr(module_under_test, target) if target else module_under_test
            patch.setattr(holder, name, crash_at(1, getattr(holder, name)))
            with pytest.raises(Interrupted):
                made(net, WasiConfig(residual=None, weight_rank=2)).save(path)
        assert path.read_bytes() == content and [each.name for each in tmp_path.iterdir()] == ["f"]


def rewritten(path: Path, change: Any) -> None:
    """Write a file again, changed by `change(tensors, entries)`."""
    tensors = load_file(path)
    entries = {
        name: {**dict.fromkeys(("rank", "rank_or_threshold"), 3), "weight_share": None, "update": "core"}
        | {"update_rank": 0, "residual": None, "mean_square": 1.0}
        for name in ("blocks.0.q", "blocks.0.fc1")
    }
    metadata = {"format": FORMAT}
    change(tensors, entries, metadata)
    save_file(tensors, path, metadata={**metadata, "layers": json.dumps(entries)})


DAMAGES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda t, e, m: None, ""),
    "format": (lambda t, e, m: m.update(format="pt"), "must have format 'wasi-factors-1', got 'pt'"),
    "lacks L": (lambda t, e, m: t.pop("blocks.0.q.L"), r"it must hold L of blocks\.0\.q"),
    "lacks moments": (lambda t, e, m: t.pop("blocks.0.q.image"), r"it must hold image of blocks\.0\.q"),
    "surplus": (lambda t, e, m: t.update({"x.L": torch.ones(1)}), r"x\.L belongs to none of its 2 layers"),
    "surplus moments": (lambda t, e, m: e["blocks.0.q"].pop("mean_square"), "belongs to none of its 2 layers"),
    "shape of R": (lambda t, e, m: t.update({"blocks.0.q.R": torch.ones(4, 8)}), r"L must be \(out, n\), R \(n, in\)"),
    "dimensions": (lambda t, e, m: t.update({"blocks.0.q.L": torch.ones(8)}), r"L must be \(out, n\), R \(n, in\)"),
    "shape of bias": (lambda t, e, m: t.update({"blocks.0.q.bias": torch.ones(9)}), r"L must be \(out, n\)"),
    "shape of moments": (lambda t, e, m: t.update({"blocks.0.q.image": torch.ones(2, 2)}), r"L must be \(out, n\)"),
    "rank": (lambda t, e, m: e["blocks.0.q"].update(rank=4), "with n at least the rank 4"),
    "rank 0": (lambda t, e, m: e["blocks.0.q"].update(rank=0), "with n at least the rank 0"),
    "nan": (lambda t, e, m: t["blocks.0.q.R"].fill_(torch.nan), r"blocks\.0\.q: its factors must be finite, .* in R"),
    "type": (lambda t, e, m: e["blocks.0.q"].update(rank="3"), r"rank of blocks\.0\.q must be of type int, got '3'"),
    "bool": (lambda t, e, m: e["blocks.0.q"].update(rank=True), r"rank of blocks\.0\.q must be of type int, got True"),
    "key": (lambda t, e, m: e["blocks.0.q"].pop("update"), r"the entry of blocks\.0\.q must have the keys"),
    "unknown key": (lambda t, e, m: e["blocks.0.q"].update(x=1), r"the entry of blocks\.0\.q must have the keys"),
    "no layers": (lambda t, e, m: e.clear(), "belongs to none of its 0 layers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "factors.safetensors"
    config = WasiConfig(weight_rank=3, target_modules=["blocks.0.q", "blocks.0.fc1"], update="core")
    made(reference.tiny_net(6), config).save(path)
    rewritten(path, change)
    if not message:
        assert len(WasiFactors.load(path).layers) == 2
        return
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        WasiFactors.load(path)


def test_what_is_no_file_of_factors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WasiFactors.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="must be a safetensors file of factors, got "):
        WasiFactors.load(tmp_path / "text")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="must have format 'wasi-factors-1', got None"):
        WasiFactors.load(tmp_path / "other")
    with pytest.raises(ValueError, match="factors must be of at least one layer to be saved, got none"):
        wasi_factors({}).save(tmp_path / "none")
    assert not (tmp_path / "none").exists() and repr(wasi_factors({})) == "WasiFactors(0 layers)"
