"""A model that is compiled before it has trained is one graph, and trains as it would without a compiler."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES
from strategies import relative_error
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

from wasi_peft import WasiConfig
from wasi_peft.tuner.first_batch import FirstBatch
from wasi_peft.tuner.layer import wasi_layers

LLAMA, VIT = ARCHITECTURES["llama"], ARCHITECTURES["vit"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(architecture: Any, **options: Any) -> Any:
    return peft.get_peft_model(architecture.model(), WasiConfig(weight_rank=4, **options)).train()


def watches(model: Any) -> list[FirstBatch]:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), FirstBatch)]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("architecture", "inner"), [(LLAMA, False), (VIT, True)], ids=["llama", "vit, inside"])
def test_compiling_first_gives_one_graph_and_the_same_step(architecture: Any, inner: bool) -> None:
    plain, other = adapted(architecture), adapted(architecture)
    batch = architecture.batch()
    plain(**batch).loss.backward()
    counter = CompileCounter()
    compiled = torch.compile(other.base_model.model if inner else other, backend=counter)
    compiled(**batch).loss.backward()
    assert counter.frame_count == 1
    expected = trained(plain)
    for name, parameter in trained(other).items():
        if "wasi_added_R" in name:  # which the batch has given its coordinates
            torch.testing.assert_close(parameter, expected[name], atol=1e-4, rtol=1e-3)
        assert relative_error(parameter.grad, expected[name].grad) < 1e-3, name
    compiled(**batch)
    assert counter.frame_count == 1
    assert not any(layer.fresh_adapters for _, layer in wasi_layers(other))


def test_after_a_plain_step_there_is_no_break_at_all() -> None:
    model, batch = adapted(LLAMA), LLAMA.batch()
    assert len(watches(model)) == 1
    model(**batch).loss.backward()
    assert not watches(model)
    torch.compile(model, backend="eager", fullgraph=True)(**batch).loss.backward()


def test_the_first_batch_is_one_to_train_on() -> None:
    model, batch = adapted(VIT), VIT.batch()
    before = {name: parameter.clone() for name, parameter in trained(model).items()}
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(**batch)
        model(**batch)
    assert len(watches(model)) == 1 and all(layer.fresh_adapters for _, layer in wasi_layers(model))
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


def test_inference_with_a_fresh_model_has_no_break() -> None:
    model, batch = adapted(VIT).eval(), VIT.batch()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    assert len(watches(model)) == 1


def test_after_a_compiled_step_nothing_is_left_where_the_model_trains_without_a_compiler() -> None:
    model, batch = adapted(VIT), VIT.batch()
    torch.compile(model, backend="eager")(**batch).loss.backward()
    (watch,) = watches(model)
    assert watch.over
    torch.compile(model, backend="eager", fullgraph=True)(**batch).loss.backward()
    model(**batch)
    assert not watches(model)


def test_disabled_factors_go_on_waiting() -> None:
    model, batch = adapted(VIT), VIT.batch()
    with model.disable_adapter():
        model(**batch)
        torch.compile(model, backend="eager")(**batch)
    (watch,) = watches(model)
    assert not watch.over and all(layer.fresh_adapters for _, layer in wasi_layers(model))


def test_an_adapter_that_becomes_active_waits_for_a_batch_of_its_own() -> None:
    model, batch = adapted(VIT), VIT.batch()
    model.add_adapter("second", WasiConfig(weight_rank=4))
    model(**batch)
    assert not watches(model)
    model.set_adapter("second")
    counter = CompileCounter()
    torch.compile(model, backend=counter)(**batch).loss.backward()
    assert counter.frame_count == 1
    assert not any(layer.fresh_adapters for _, layer in wasi_layers(model))


def test_one_that_is_not_active_is_not_waited_for() -> None:
    model, batch = adapted(VIT), VIT.batch()
    model(**batch)
    model.add_adapter("second", WasiConfig(weight_rank=4))
    assert not watches(model)
    model.set_adapter("second")
    assert len(watches(model)) == 1
    model.set_adapter("default")
    assert not watches(model)
    torch.compile(model, backend="eager", fullgraph=True)(**batch)


def test_a_model_that_was_loaded_for_inference_is_watched_too() -> None:
    model = peft.get_peft_model(LLAMA.model().eval(), WasiConfig(weight_rank=4))
    assert len(watches(model)) == 1


def test_no_random_number_is_drawn_for_it() -> None:
    model, batch = adapted(VIT), VIT.batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    (watch,) = watches(model)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    watch._meet(model.base_model.model, (), batch)
    assert torch.equal(torch.rand(3), expected)
    assert not any(layer.fresh_adapters for _, layer in wasi_layers(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["by position", "past_key_values", "cache_params", "nested"])
def test_a_cache_is_not_filled_twice(where: str) -> None:
    model, batch = adapted(LLAMA), LLAMA.batch()
    cache, args = DynamicCache(), (batch.pop("input_ids"),)
    if where == "by position":
        args = (*args, None, None, cache)
    elif where != "nested":
        batch[where] = cache
    else:
        batch["inputs"] = {"states": [cache]}
    (watch,) = watches(model)
    watch._meet(model.base_model.model, args, batch)
    assert not watch.over and cache.get_seq_length() == 0
    assert all(layer.fresh_adapters for _, layer in wasi_layers(model))


def test_nothing_is_watched_without_fresh_factors() -> None:
    with pytest.warns(UserWarning, match="plain truncated SVD"):
        assert not watches(adapted(VIT, residual=None, update="frozen_basis"))


def test_it_ends_with_the_adapter_and_moves_with_the_model() -> None:
    model, batch = adapted(VIT), VIT.batch()
    model.add_adapter("second", WasiConfig(weight_rank=4))
    assert len(watches(model)) == 1
    other, stream = copy.deepcopy(model), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    for each in (other, again):
        each.train()(**batch)
        assert not watches(each)
    assert len(watches(model)) == 1
    assert not watches(model.merge_and_unload())
