"""Layers that are dense again where that is faster: which ones, what the model then computes, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import tiny_net
from safetensors.torch import load_file
from strategies import relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, merge_slow_layers
from wasi_peft.planner import inference
from wasi_peft.tuner.layer import WasiLayer, wasi_layers

pytestmark = pytest.mark.filterwarnings("ignore:The initial factors come from a plain truncated SVD")


class KnownMachine:
    """A multiplication takes a second, and each product `call` seconds besides."""

    def __init__(self, call: float = 0.0) -> None:
        self.call = call
        self.asked: list[tuple[int, int, int, int]] = []

    def __call__(self, layer: WasiLayer, rows: int, evicted_bytes: int) -> float:
        assert evicted_bytes > 0
        rank, sizes = layer.rank("default"), (layer.out_features, layer.in_features)
        self.asked.append((rows, *sizes, rank))
        return (rows * sizes[0] * sizes[1] + self.call) / (rows * rank * sum(sizes) + 2 * self.call)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> KnownMachine:
    known = KnownMachine()
    monkeypatch.setattr(inference, "dense_over_factored", known)
    return known


def batch(samples: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(samples, 5, 8)


def adapted(**options: Any) -> PeftModel:
    settings = {"update": "factor", "activation_threshold": None, "train_vectors": False, **options}
    model: PeftModel = get_peft_model(tiny_net(0), WasiConfig(**settings)).eval()
    return model


def merged(model: nn.Module) -> set[str]:
    return {name for name, layer in wasi_layers(model) if layer.merged}


@pytest.mark.parametrize("update", ["factor", "low_rank"])
def test_only_layers_that_gain_are_merged(machine: KnownMachine, update: str) -> None:
    # 8 x 8 layers lose a fifth with 5 directions, 12 x 8 layers a twenty-fifth, and a fifth with 6
    ranks = {r"blocks\.0\.[qkvo]": 5, r"blocks\.0\.fc[12]": 5, r"blocks\.1\.[qkvo]": 3, r"blocks\.1\.fc[12]": 6}
    update_rank = 1 if update == "low_rank" else 0
    ranks = {name: rank - update_rank for name, rank in ranks.items()}
    options = {"update_rank": update_rank} if update_rank else {}
    model = adapted(rank_pattern=ranks, weight_rank=2, update=update, **options)
    with torch.no_grad():
        before = model(batch())
        found = merge_slow_layers(model, batch())
        after = model(batch())
    wanted = {f"blocks.0.{name}" for name in "qkvo"} | {f"blocks.1.fc{number}" for number in (1, 2)}
    assert {name.removeprefix("base_model.model.") for name in found} == wanted
    assert merged(model) == set(found)
    assert found["base_model.model.blocks.0.q"] == pytest.approx(64 / (5 * 16))
    assert 0 < relative_error(after, before) < 1e-6
    model.unmerge_adapter()
    assert not merged(model)
    with torch.no_grad():
        assert torch.equal(model(batch()), before)


def test_every_kind_is_timed_once_with_the_rows_of_the_batch(machine: KnownMachine) -> None:
    merge_slow_layers(adapted(weight_rank=3), batch(7))
    assert sorted(machine.asked) == [(35, 8, 8, 3), (35, 8, 12, 3), (35, 12, 8, 3)]


def test_few_rows_are_decided_by_the_calls(machine: KnownMachine) -> None:
    machine.call = 1000.0
    for samples, all_merged in ((1, True), (100, False)):
        model = adapted(weight_rank=2)
        found = merge_slow_layers(model, batch(samples))
        assert len(found) == (len(list(wasi_layers(model))) if all_merged else 0)


@pytest.mark.parametrize(("least_gain", "count"), [(0.0, 12), (0.24, 12), (0.26, 0)])
def test_what_a_layer_must_gain(monkeypatch: pytest.MonkeyPatch, least_gain: float, count: int) -> None:
    monkeypatch.setattr(inference, "dense_over_factored", lambda *_: 0.75)
    assert len(merge_slow_layers(adapted(weight_rank=2), batch(), least_gain=least_gain)) == count


def test_this_machine_is_measured() -> None:
    model = adapted(weight_rank=3, update="low_rank", update_rank=2)
    with torch.no_grad():
        before = model(batch())
        found = merge_slow_layers(model, {"x": batch()})
        assert relative_error(model(batch()), before) < 1e-6
    assert merged(model) == set(found)
    assert all(0 < ratio <= 0.95 for ratio in found.values())


def test_saving_is_not_affected(machine: KnownMachine, tmp_path: Path) -> None:
    model = adapted(weight_rank=7)
    model.save_pretrained(tmp_path / "before")
    assert merge_slow_layers(model, batch())
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize("least_gain", [-0.1, 1, 1.5, "0", True, None])
def test_gain_out_of_range(machine: KnownMachine, least_gain: Any) -> None:
    model = adapted(weight_rank=7)
    with pytest.raises(ValueError, match=r"least_gain must be in \[0, 1\)"):
        merge_slow_layers(model, batch(), least_gain=least_gain)
    assert not merged(model)


@pytest.mark.parametrize("wrong", [{}, torch.zeros(0, 5, 8)])
def test_empty_batch(machine: KnownMachine, wrong: Any) -> None:
    model = adapted(weight_rank=7)
    with pytest.raises(ValueError, match="batch must hold at least one tensor"):
        merge_slow_layers(model, wrong)
    assert not merged(model)


def test_models_without_an_active_adapter() -> None:
    with pytest.raises(ValueError, match="must have WASI layers with an active adapter"):
        merge_slow_layers(tiny_net(0), batch())
    model = adapted(weight_rank=7, base_weight="keep")
    with model.disable_adapter(), pytest.raises(ValueError, match="must have WASI layers with an active adapter"):
        merge_slow_layers(model, batch())


def test_merged_already() -> None:
    model = adapted(weight_rank=7)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already; call unmerge_adapter"):
        merge_slow_layers(model, batch())


def test_shapes_that_depend_on_values(machine: KnownMachine) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[x.sum(-1) > 0])

    model = get_peft_model(Picky(), WasiConfig(weight_rank=7, target_modules=["fc"], update="factor"))
    with pytest.raises(ValueError, match="depend on values"):
        merge_slow_layers(model, batch())
    assert not merged(model)
