"""Norms, tokens, biases and batch-norm statistics belong to each adapter; the base model's own are never touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, exact_config, logits, train, wasi_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import wasi_peft
from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.tuner.vectors import AdapterVectors, Place, vector_places

VIT = ARCHITECTURES["vit"]


class Net(nn.Module):
    """A token, a batch norm in a numbered block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x + self.cls_token[0]))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def inputs(seed: int = 1) -> Tensor:
    return 3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) + 1


def step(model: nn.Module, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(steps):
        model(inputs(seed + 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def places(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Place]:
    found = dict(vector_places(model, vectors=True, biases=True))
    return found if names is None else {name: found[name] for name in names}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes with: parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def fill(vectors: AdapterVectors, adapter: str, value: float) -> None:
    for _, vector in vectors.items(adapter):
        vector.data.fill_(value)


NORM = ["blocks.0.1.weight", "blocks.0.1.bias"]
STATISTICS = [f"blocks.0.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]


# -------------------------------------------------------------------- which they are


def test_places() -> None:
    model = net()
    assert set(dict(vector_places(model))) == {"cls_token", *NORM, *STATISTICS}
    assert set(dict(vector_places(model, vectors=False, biases=True))) == {
        "blocks.0.0.bias",
        "blocks.0.1.bias",
        "head.bias",
    }
    assert set(places(model)) == {"cls_token", *NORM, *STATISTICS, "blocks.0.0.bias", "head.bias"}
    for name, place in places(model).items():
        assert place.table[place.name] is tensors(model)[name]


def test_layers_that_are_adapted_or_saved_whole_have_none() -> None:
    model = get_peft_model(
        net(), WasiConfig(residual=None, weight_rank=3, bias="all", modules_to_save=["head"], base_weight="keep")
    )
    names = set(places(model.get_base_model()))
    assert names == {"cls_token", *NORM, *STATISTICS}


# -------------------------------------------------------------------- the object


@pytest.fixture
def two() -> tuple[Net, AdapterVectors, dict[str, Tensor]]:
    """A model with two adapters whose vectors are all 1 and all 2; none is active."""
    model, vectors = net(), AdapterVectors()
    before = values(model)
    for number, name in enumerate(("one", "two"), 1):
        vectors.add(name, places(model), keep_base=True)
        fill(vectors, name, number)
    return model, vectors, before


def seen(model: nn.Module) -> set[float]:
    """The values in all places of vectors."""
    return {float(value) for place in places(model).values() for value in place.table[place.name].flatten()}


def test_adding_changes_nothing_that_the_model_computes_with() -> None:
    model, vectors = net(), AdapterVectors()
    before, objects = values(model), tensors(model)
    vectors.add("one", places(model), keep_base=True)
    assert vectors.active is None and vectors.adapters == {"one"} and vectors.keeps_base
    assert all(tensor is objects[name] for name, tensor in tensors(model).items())
    assert_equal(
        {name: vector.detach() for name, vector in vectors.items("one")}, {n: before[n] for n in places(model)}
    )


def test_each_adapter_has_its_own(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, before = two
    base = tensors(model)
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        vectors.activate(name)
        assert vectors.active == name and seen(model) == {value}
    vectors.activate(None)
    assert all(tensor is base[name] for name, tensor in tensors(model).items())
    assert_equal(values(model), before)


def test_what_is_registered_is_what_is_handed_out(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    """Wrappers for distributed training put other objects into the places; those are then the adapter's."""
    model, vectors, _ = two
    vectors.activate("one")
    model.cls_token = nn.Parameter(torch.full((1, 1, 8), 7.0))
    assert dict(vectors.items("one"))["cls_token"] is model.cls_token
    vectors.activate("two")
    assert dict(vectors.items("one"))["cls_token"].flatten()[0] == 7
    vectors.activate("one")
    assert model.cls_token.flatten()[0] == 7


def test_an_adapter_without_vectors_uses_those_of_the_base(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, before = two
    vectors.activate("one")
    vectors.activate("another")
    assert vectors.active is None
    assert_equal(values(model), before)


def test_adapters_that_train_different_places() -> None:
    """What only one of them trains is the base model's for the other."""
    model, vectors = net(), AdapterVectors()
    before = values(model)
    vectors.add("norms", places(model, NORM), keep_base=True)
    fill(vectors, "norms", 1)
    vectors.add("biases", places(model, ["head.bias", NORM[1]]), keep_base=True)
    fill(vectors, "biases", 2)
    vectors.activate("norms")
    assert torch.equal(model.head.bias.detach(), before["head.bias"]) and seen_at(model, NORM) == {1.0}
    vectors.activate("biases")
    assert torch.equal(model.blocks[0][1].weight.detach(), before[NORM[0]])
    assert seen_at(model, ["head.bias", NORM[1]]) == {2.0}
    vectors.activate(None)
    assert_equal(values(model), before)


def seen_at(model: nn.Module, names: list[str]) -> set[float]:
    return {float(value) for name in names for value in tensors(model)[name].detach().flatten()}


def test_a_second_adapter_starts_from_the_base_even_if_another_is_active() -> None:
    model, vectors = net(), AdapterVectors()
    before = values(model)
    vectors.add("one", places(model), keep_base=True)
    vectors.activate("one")
    fill(vectors, "one", 1)
    vectors.add("two", places(model), keep_base=True)
    assert_equal({n: v.detach() for n, v in vectors.items("two")}, {n: before[n] for n in places(model)})
    vectors.add("copied", places(model), keep_base=True, source="one")
    assert {float(x) for _, v in vectors.items("copied") for x in v.flatten()} == {1.0}
    fill(vectors, "copied", 9)
    assert seen(model) == {1.0}


def test_without_a_base_the_first_adapter_takes_over() -> None:
    model, vectors = net(), AdapterVectors()
    objects = tensors(model)
    vectors.add("one", places(model), keep_base=False)
    assert vectors.active == "one" and not vectors.keeps_base
    assert all(vector is objects[name] for name, vector in vectors.items("one"))
    fill(vectors, "one", 1)
    vectors.add("two", places(model), keep_base=False)
    fill(vectors, "two", 2)
    assert seen(model) == {1.0}
    vectors.activate("two")
    assert seen(model) == {2.0}
    vectors.activate(None)  # there is nothing to go back to
    assert vectors.active == "two" and seen(model) == {2.0}


@pytest.mark.parametrize("active", ["one", "two", None])
def test_removing(two: tuple[Net, AdapterVectors, dict[str, Tensor]], active: str | None) -> None:
    model, vectors, before = two
    vectors.activate(active)
    vectors.remove("two")
    assert vectors.adapters == {"one"} and not vectors.names("two")
    if active == "one":
        assert vectors.active == "one" and seen(model) == {1.0}
    else:
        assert vectors.active is None
        assert_equal(values(model), before)
    vectors.activate("one")
    assert seen(model) == {1.0}
    vectors.remove("no such adapter")
    assert vectors.active == "one" and seen(model) == {1.0}


def test_removing_the_active_one_without_a_base() -> None:
    model, vectors = net(), AdapterVectors()
    for number, name in enumerate(("one", "two"), 1):
        vectors.add(name, places(model), keep_base=False)
        fill(vectors, name, number)
    vectors.activate("two")
    vectors.remove("two")
    vectors.activate("one")
    assert vectors.active == "one" and seen(model) == {1.0}


def test_only_one_of_several(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, _ = two
    vectors.activate_one_of(["another", "two"])
    with pytest.raises(ValueError, match=r"only one adapter that trains vectors .* got \['one', 'two'\]"):
        vectors.activate_one_of(["one", "another", "two"])
    assert vectors.active == "two" and seen(model) == {2.0}
    vectors.activate_one_of(["another"])
    assert vectors.active is None


def test_those_that_wait_follow_the_model(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, before = two
    vectors.activate("one")
    model.double()
    for name in ("two", None, "one"):
        vectors.activate(name)
        for key, tensor in tensors(model).items():
            assert tensor.dtype == (torch.int64 if "num_batches" in key else torch.float64)
    vectors.activate(None)
    assert_equal({name: value.to(before[name].dtype) for name, value in values(model).items()}, before)


def test_only_parameters_are_made_to_train(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, _ = two
    vectors.activate("one")
    for trains in (True, False, True):
        vectors.require_grad("one", trains)
        assert {vector.requires_grad for _, vector in vectors.items("one") if isinstance(vector, nn.Parameter)} == {
            trains
        }
    vectors.activate("two")
    assert not any(tensor.requires_grad for tensor in model.buffers())


def test_a_tied_vector_stays_tied() -> None:
    model = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    model[1].weight = model[0].weight
    vectors = AdapterVectors()
    vectors.add("one", places(model), keep_base=True)
    vectors.activate("one")
    assert model[1].weight is model[0].weight and model[1].bias is not model[0].bias


def test_a_copy_of_the_model_is_independent(two: tuple[Net, AdapterVectors, dict[str, Tensor]]) -> None:
    model, vectors, _ = two
    model.vectors = vectors  # type: ignore[assignment]  # as tuner layers hold it
    vectors.activate("one")
    again: Any = copy.deepcopy(model)
    again.vectors.activate("two")
    assert seen(again) == {2.0} and seen(model) == {1.0}
    fill(again.vectors, "one", 5)
    assert seen(model) == {1.0}


# -------------------------------------------------------------------- in models

LOW: dict[str, Any] = {"weight_rank": 5, "base_weight": "keep"}
DEFAULTS: list[dict[str, Any]] = [{}, {"bias": "all"}, {"bias": "all", "train_vectors": False}, {"update": "low_rank"}]


@pytest.mark.parametrize("base_weight", ["keep", "cpu"])
def test_any_number_of_adapters_live_together(base_weight: str) -> None:
    batch = VIT.batch()
    dense = logits(VIT.model(), batch)
    model: Any = VIT.model()
    answers: dict[str, Tensor] = {}
    for number, options in enumerate(DEFAULTS):
        name, config = f"adapter{number}", exact_config(**{**LOW, "base_weight": base_weight, **options})
        if number:
            model.add_adapter(name, config)
            model.set_adapter(name)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        train(model, batch, steps=2 + number)
        answers[name] = logits(model, batch)
    for name in [*answers, *reversed(answers)]:
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), answers[name])
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), dense)
    for name in list(answers)[:-1]:
        model.delete_adapter(name)
        del answers[name]
        for other in answers:
            model.set_adapter(other)
            assert torch.equal(logits(model, batch), answers[other])
    assert torch.equal(logits(model.unload(), batch), dense)


@pytest.mark.parametrize("base_weight", ["release", "keep"])
def test_adapters_are_saved_and_loaded_with_their_own(base_weight: str, tmp_path: Path) -> None:
    batch = VIT.batch()
    answers = {}
    for number, name in enumerate(("one", "two")):
        model = wasi_model(VIT.model(), weight_rank=4 + number, base_weight=base_weight)
        train(model, batch, steps=2 + number)
        answers[name] = logits(model, batch)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(VIT.model(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")  # while the first is active
    model.save_pretrained(tmp_path / "both")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), answers[name])
        again = PeftModel.from_pretrained(VIT.model(), tmp_path / "both" / name)
        assert torch.equal(logits(again, batch), answers[name])


def test_a_copied_adapter_has_vectors_of_its_own() -> None:
    """What trainers that need a frozen reference do: the same configuration object once more."""
    batch = VIT.batch()
    model: Any = wasi_model(VIT.model(), **LOW)
    train(model, batch)
    trained = logits(model, batch)
    model.add_adapter("reference", model.peft_config["default"])
    train(model, batch)
    assert not torch.allclose(logits(model, batch), trained, atol=1e-3)
    model.set_adapter("reference")
    assert torch.equal(logits(model, batch), trained)


def test_gradients_go_to_the_active_adapter_alone() -> None:
    model: Any = wasi_model(VIT.model(), **LOW)
    model.add_adapter("other", exact_config(**LOW))
    vectors = next(layer for _, layer in wasi_layers(model)).vectors
    model(**VIT.batch()).loss.backward()
    assert all(vector.grad is not None for _, vector in vectors.items("default"))
    assert all(vector.grad is None and not vector.requires_grad for _, vector in vectors.items("other"))
    model.set_adapter("other")
    assert all(vector.requires_grad for _, vector in vectors.items("other"))
    assert len(list(vectors.items("other"))) == len(list(vectors.items("default"))) > 4
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merging_takes_the_adapters_vectors_along() -> None:
    model: Any = wasi_model(VIT.model(), **LOW)
    train(model, VIT.batch())
    expected = logits(model, VIT.batch())
    torch.testing.assert_close(logits(model.merge_and_unload(), VIT.batch()), expected, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------- batch norms


def batch_norm_model(**options: Any) -> Any:
    config = WasiConfig(**{"residual": None, "weight_rank": 5, "base_weight": "keep", **options})
    return get_peft_model(net(), config).eval()


def test_statistics_follow_the_adapter_that_trains() -> None:
    dense = net().eval()(inputs())
    model = batch_norm_model()
    model.add_adapter("other", WasiConfig(residual=None, weight_rank=5, base_weight="keep"))
    step(model)
    first = model(inputs())
    model.set_adapter("other")
    norm = model.get_base_model().blocks[0][1]
    assert int(norm.num_batches_tracked) == 0 and bool((norm.running_mean == 0).all())
    step(model, steps=3)
    assert int(norm.num_batches_tracked) == 3
    second = model(inputs())
    model.set_adapter("default")
    assert int(norm.num_batches_tracked) == 2
    assert torch.equal(model(inputs()), first) and not torch.allclose(first, second, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), dense)


def test_statistics_of_the_base_do_not_move_while_an_adapter_trains() -> None:
    before = values(net())
    model = batch_norm_model()
    step(model)
    assert_equal(values(model.unload()), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("base_weight", ["release", "keep"])
def test_statistics_are_saved_and_loaded(tmp_path: Path, low_cpu_mem_usage: bool, base_weight: str) -> None:
    model = batch_norm_model(base_weight=base_weight)
    step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(inputs()), model(inputs()))
    assert int(loaded.get_base_model().blocks[0][1].num_batches_tracked) == 2


def test_statistics_stay_where_vectors_do_not_train() -> None:
    """They move as those of any frozen model in training mode do, and are the base model's."""
    model = batch_norm_model(train_vectors=False)
    assert not next(layer for _, layer in wasi_layers(model)).vectors.adapters
    step(model)
    assert int(model.unload().blocks[0][1].num_batches_tracked) == 2


def norms_train(model: Any) -> set[bool]:
    return {parameter.requires_grad for name, parameter in model.named_parameters() if "layernorm" in name}


def test_vectors_train_where_the_factors_of_their_adapter_do() -> None:
    options: dict[str, Any] = {"residual": None, "update": "frozen_basis", **LOW}
    model = get_peft_model(VIT.model(), WasiConfig(**options))
    model.add_adapter("other", WasiConfig(**options))
    for trains in (False, True):
        model.base_model.set_requires_grad("default", trains)
        assert norms_train(model) == {trains}
        forms = [layer.form_of("default") for _, layer in wasi_layers(model)]
        assert [{form.part(part).requires_grad for form in forms} for part in ("L", "R")] == [{trains}, {False}]
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and norms_train(model) == {True}


@pytest.mark.parametrize("call", ["set_adapter", "add_adapter"])
def test_while_adapters_are_disabled_the_base_keeps_its_vectors(call: str) -> None:
    model: Any = get_peft_model(VIT.model(), exact_config(**LOW))
    train(model, VIT.batch())
    model.add_adapter("other", exact_config(**LOW))
    model.set_adapter("other")
    train(model, VIT.batch(), steps=4)
    expected = logits(model, VIT.batch())
    with model.disable_adapter():
        base = logits(model, VIT.batch())
        if call == "set_adapter":
            model.set_adapter("default")
            model.set_adapter("other")
        else:
            model.add_adapter("third", exact_config(**LOW))
        assert torch.equal(logits(model, VIT.batch()), base)
    assert torch.equal(logits(model, VIT.batch()), expected)


def test_beside_compressed_layers_the_same_vectors_train() -> None:
    dense = get_peft_model(VIT.model(), WasiConfig(weight_rank=4))
    base = wasi_peft.compress(VIT.model(), WasiConfig(weight_rank=4))
    rounded = get_peft_model(base, WasiConfig(weight_rank=4))
    trained = [
        {name for name, parameter in model.named_parameters() if parameter.requires_grad} for model in (dense, rounded)
    ]
    assert trained[0] == trained[1]
