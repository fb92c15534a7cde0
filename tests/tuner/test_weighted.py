"""Weighted sums of adapters: exact, or the best of a rank; saved, trained on, and refused where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, logits
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.linalg.sums import compressed_sum, stacked_sum
from wasi_peft.tuner.layer import wasi_layers

VIT = ARCHITECTURES["vit"]


def move_at_random(model: Any) -> Any:
    """Move all parameters of every adapter away from where they started; the first adapter is active then."""
    for seed, name in enumerate(list(model.peft_config)):
        model.set_adapter(name)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.set_adapter("default")
    return model.eval()


def moved_adapters(names: tuple[str, ...] = ("default", "other"), **options: Any) -> Any:
    """A model with adapters whose parameters are all at random, near where they started."""
    model = get_peft_model(VIT.model(), WasiConfig(**{"modules_to_save": ["classifier"], "weight_rank": 3, **options}))
    for name in names[1:]:
        model.add_adapter(name, model.peft_config["default"])
    return move_at_random(model)


def products(model: Any, adapter: str) -> dict[str, Tensor]:
    return {name: torch.linalg.multi_dot(layer.form_of(adapter).factors()) for name, layer in wasi_layers(model)}


def states(model: Any, adapter: str) -> dict[str, Tensor]:
    """Biases, vectors and the head, of an adapter or of the base model."""
    layers = dict(wasi_layers(model))
    vectors = next(iter(layers.values())).vectors
    values = dict(vectors.base_items() if adapter == "base" else vectors.items(adapter))
    for name, layer in layers.items():
        values[name] = layer.residual.bias if adapter == "base" else layer.form_of(adapter).bias
    wrapper = model.get_base_model().classifier
    head: nn.Module = wrapper.original_module if adapter == "base" else wrapper.modules_to_save[adapter]
    return {**values, **{f"head.{name}": value for name, value in head.named_parameters()}}


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.7)])
def test_a_sum_is_exact(weights: tuple[float, float]) -> None:
    model = moved_adapters()
    model.add_weighted_adapter(["default", "other"], weights, "sum", "cat")
    first, second, total = (products(model, name) for name in ("default", "other", "sum"))
    for name, value in total.items():
        torch.testing.assert_close(value, weights[0] * first[name] + weights[1] * second[name], atol=1e-5, rtol=1e-4)
    base, one, two, both = (states(model, name) for name in ("base", "default", "other", "sum"))
    assert both.keys() == one.keys() and len(both) > 20
    for name, value in both.items():
        start = base[name]
        mixed = start + weights[0] * (one[name] - start) + weights[1] * (two[name] - start)
        torch.testing.assert_close(value, mixed, atol=1e-5, rtol=1e-4)
    assert {layer.rank("sum") for _, layer in wasi_layers(model)} == {6}
    assert model.active_adapters == ["default"]


def test_a_sum_of_one_answers_as_that_one(tmp_path: Path) -> None:
    """Also saved and loaded, after it has been a sum of two that cancel."""
    model = moved_adapters(("default", "other", "third"))
    model.add_weighted_adapter(["default", "other", "third"], [1.0, 0.5, 0.0], "two", "cat")
    model.add_weighted_adapter(["two", "other"], [1.0, -0.5], "one", "svd", svd_rank=3)
    batch = VIT.batch()
    expected = logits(model, batch)
    model.set_adapter("one")
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    loaded = PeftModel.from_pretrained(VIT.model(), tmp_path / "one").eval()
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-4, rtol=1e-4)


def test_what_shares_a_factor_keeps_its_rank() -> None:
    """Adapters that trained L alone, from one start."""
    model = moved_adapters(update="frozen_basis")
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "sum", "cat")
    assert {layer.rank("sum") for _, layer in wasi_layers(model)} == {3}
    first, second, total = (products(model, name) for name in ("default", "other", "sum"))
    for name, value in total.items():
        torch.testing.assert_close(value, 0.3 * first[name] + 0.7 * second[name], atol=1e-5, rtol=1e-4)


def test_factors_instead_of_weights_can_be_averaged() -> None:
    model = moved_adapters(residual=None, weight_rank=3, update="factor")
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "mean", "cat")
    first, second, total = (products(model, name) for name in ("default", "other", "mean"))
    for name, value in total.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="must add up to 1"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")


def test_the_best_of_a_rank_against_the_dense_product() -> None:
    pairs = [(torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)) for _ in range(2)]
    L, R = stacked_sum(pairs, [0.4, 2.0])
    dense = 0.4 * pairs[0][0] @ pairs[0][1] + 2.0 * pairs[1][0] @ pairs[1][1]
    torch.testing.assert_close(L @ R, dense)
    U, energies, Vh = torch.linalg.svd(dense)
    for rank in (1, 4, 6):
        thin_L, thin_R = compressed_sum(L, R, rank)
        assert thin_L.shape == (9, rank) and thin_R.shape == (rank, 7)
        torch.testing.assert_close(thin_L @ thin_R, U[:, :rank] * energies[:rank] @ Vh[:rank])
        torch.testing.assert_close(thin_R @ thin_R.T, torch.eye(rank).double() * R.square().sum(1).mean())


def test_a_sum_trains() -> None:
    model = moved_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert {layer.rank("sum") for _, layer in wasi_layers(model)} == {3}
    model.set_adapter("sum")
    before = products(model, "sum")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**VIT.batch()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in products(model, "sum").items())


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ((["default", "none"], [1, 1], "sum"), "adapters must name adapters of the model"),
        (([], [], "sum"), "adapters must name adapters of the model"),
        ((["default", "other"], [1], "sum"), "one for each"),
        ((["default", "other"], [1, float("nan")], "sum"), "must be finite numbers"),
        ((["default", "other"], [1, 1], "other"), "adapter_name must be new"),
        ((["default", "other"], [1, 1], "sum", "ties"), "combination_type must be one of"),
        ((["default", "other"], [1, 1], "sum", "svd", 0), "svd_rank must be a positive integer"),
        ((["default", "other"], [1, 1], "sum", "svd", 2.5), "svd_rank must be a positive integer"),
        ((["default", "other"], [1, 1], "sum", "cat", 2), "svd_rank must be a positive integer"),
    ],
)
def test_bad_sums_are_refused(given: tuple[Any, ...], rule: str) -> None:
    model = moved_adapters()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=rule):
        model.add_weighted_adapter(*given)
    assert list(model.state_dict()) == keys and set(model.peft_config) == {"default", "other"}


def test_other_factors_are_refused() -> None:
    model = moved_adapters(("default",), residual=None, update="core")
    with pytest.raises(ValueError, match=r"factors are L and R.* update='core'"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_failure_leaves_the_adapters_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved_adapters()
    keys, answer = list(model.state_dict()), logits(model, VIT.batch())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wasi_peft.tuner.weighted.compressed_sum", fail)
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert list(model.state_dict()) == keys and set(model.peft_config) == {"default", "other"}
    assert torch.equal(logits(model, VIT.batch()), answer)


def language_models(tokens: list[list[int]]) -> Any:
    """A model with an adapter for each list of tokens that train, moved at random."""
    options: dict[str, Any] = {"weight_rank": 3, "residual_product": "restored"}
    configs = [WasiConfig(**options, trainable_token_indices=own) for own in tokens]
    model = get_peft_model(ARCHITECTURES["llama_tied"].model(), configs[0])
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"other{number}", config)
    return move_at_random(model)


def test_trained_tokens_are_summed(tmp_path: Path) -> None:
    model, batch = language_models([[1, 2, 3], [1, 2, 3]]), ARCHITECTURES["llama_tied"].batch()
    one = logits(model, batch)
    model.add_weighted_adapter(["default"], [1.0], "same", "cat")
    model.add_weighted_adapter(["default", "other1"], [0.25, 0.5], "sum", "cat")
    rows = model.get_base_model().model.embed_tokens.token_adapter
    base, first, second = (
        rows.trainable_tokens_original["default"],
        *(rows.trainable_tokens_delta[name] for name in ("default", "other1")),
    )
    torch.testing.assert_close(
        rows.trainable_tokens_delta["sum"].detach(), (base + 0.25 * (first - base) + 0.5 * (second - base)).detach()
    )
    model.set_adapter("same")
    torch.testing.assert_close(logits(model, batch), one, atol=1e-5, rtol=1e-5)
    model.set_adapter("sum")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(ARCHITECTURES["llama_tied"].model(), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=1e-5)


def test_adapters_that_train_other_tokens_have_no_sum() -> None:
    model = language_models([[1, 2], [2, 3]])
    with pytest.raises(ValueError, match=r"the same trainable_token_indices, got \[\[1, 2\], \[2, 3\]\]"):
        model.add_weighted_adapter(["default", "other1"], [0.5, 0.5], "sum", "cat")
    assert set(model.peft_config) == {"default", "other1"}
