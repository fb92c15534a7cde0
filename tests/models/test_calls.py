"""One notion of a batch: what takes one calls the model in the same way, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from calibrating import Untouched, assert_same_factors, batches, plain_factors, wasi_factors
from models import ARCHITECTURES
from torch import Tensor, nn

from wasi_peft import (
    WasiConfig,
    calibrate_wasi,
    estimate_wasi,
    merge_slow_layers,
    plan_wasi,
    profile_wasi,
    repair_factors,
)
from wasi_peft.cost.estimate import input_sizes
from wasi_peft.factors.moments import image_moments
from wasi_peft.models.calls import (
    Reached,
    call_arguments,
    differentiable,
    evaluating,
    features_of,
    hooked,
    loss_of,
    model_output,
    real_rows,
    token_mask,
    training_loss,
)
from wasi_peft.planner.planner import _run_for_sizes

LLAMA = ARCHITECTURES["llama"]
X, Y = torch.ones(2, 8), torch.tensor([0, 1])

# -------------------------------------------------------------------- what a batch is


class Recorder(nn.Module):
    """Remembers what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        self.calls.append((args, kwargs))
        y: Tensor = self.fc(args[0] if args else kwargs["x"])
        return y


@pytest.mark.parametrize(
    ("batch", "positional", "names"),
    [
        (X, 1, set()),
        ((X,), 1, set()),
        ([X, Y], 1, set()),
        ((X, Y, Y), 1, set()),
        ((X, None), 1, set()),
        ({"x": X}, 0, {"x"}),
        ({"x": X, "labels": Y}, 0, {"x", "labels"}),
        (({"x": X}, Y), 0, {"x"}),
    ],
    ids=["tensor", "tuple", "pair", "more", "no target", "mapping", "with labels", "mapping and target"],
)
def test_what_a_model_is_called_with(batch: Any, positional: int, names: set[str]) -> None:
    arguments = call_arguments(batch)
    assert (len(arguments.positional), set(arguments.named)) == (positional, names)
    model = Recorder()
    for with_labels in (False, True):
        model_output(model, batch, with_labels)
        args, kwargs = model.calls[-1]
        assert set(kwargs) == (names if with_labels else names - {"labels"})
        assert torch.equal(args[0] if args else kwargs["x"], X)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (3, TypeError, "a tuple that begins with one of them, got int"),
        ("text", TypeError, "a tuple that begins with one of them, got str"),
        (None, TypeError, "a tuple that begins with one of them, got NoneType"),
        (["text", X], TypeError, "got list that begins with str"),
        (([X], Y), TypeError, "got tuple that begins with list"),
        ((), ValueError, r"at least one tensor and no empty one, got shapes \[\]"),
        ({}, ValueError, r"at least one tensor and no empty one, got shapes \[\]"),
        ({"x": 1}, ValueError, r"at least one tensor and no empty one, got shapes \[\]"),
        (torch.zeros(0, 8), ValueError, r"no empty one, got shapes \[\(0, 8\)\]"),
    ],
)
def test_what_is_no_batch(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_arguments(batch)
    with pytest.raises(error, match=message):
        estimate_wasi(nn.Linear(8, 2), batch=batch)
    with pytest.raises(error, match=message):
        calibrate_wasi(reference.tiny_net(0), [batch], progress_bar=False)


def test_a_batch_of_labels_alone() -> None:
    with pytest.raises(ValueError, match=r"a batch must hold model inputs, got only \['label_ids', 'labels'\]"):
        model_output(Recorder(), {"labels": Y, "label_ids": Y})


def test_labels_that_are_the_input_of_a_decoder_are_passed_on() -> None:
    architecture = ARCHITECTURES["t5"]
    assert loss_of(model_output(architecture.model(), architecture.batch())) is not None
    assert loss_of(model_output(LLAMA.model(), LLAMA.batch())) is None


class TwoArguments(nn.Module):
    """What a transformers model is: a second positional argument means something else than a target."""

    def __init__(self) -> None:
        super().__init__()
        self.net = reference.tiny_net(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.net(x if mask is None else torch.cat([x, x * mask], 1))
        return y


def _calibrated(batch: Any) -> Any:
    calibration = calibrate_wasi(TwoArguments(), [batch], progress_bar=False)
    return [spectrum.weight_energies for spectrum in calibration.spectra()]


def _repaired(batch: Any) -> Any:
    net = TwoArguments()
    factors = repair_factors(net, wasi_factors(plain_factors(net)), [batch], steps=2, progress_bar=False)
    return [initial.R.tolist() for initial in factors.initial.values()]


def _moments(batch: Any) -> Any:
    net = TwoArguments()
    moments = image_moments(net, plain_factors(net), [batch], progress_bar=False)
    return [(each.image.tolist(), each.mean_square) for each in moments.values()]


def _estimated(batch: Any) -> Any:
    return estimate_wasi(TwoArguments(), batch=batch)


def _profiled(batch: Any) -> Any:
    profile = profile_wasi(TwoArguments(), batch=batch, rounds=1)
    return profile.saved_bytes, profile.peak_bytes, profile.saved_by_operation


def _planned(batch: Any) -> Any:
    net = TwoArguments()
    calibration = calibrate_wasi(net, batches(), progress_bar=False)
    config = WasiConfig(update="factor")
    return plan_wasi(net, calibration, training_flops=0.7, batch=batch, config=config)


def _sizes(batch: Any) -> Any:
    net = TwoArguments()
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    sizes = input_sizes(net, names, batch)
    assert sizes == _run_for_sizes(net, {name: net.get_submodule(name) for name in names}, batch)
    return sizes


@pytest.mark.parametrize(
    "use",
    [_calibrated, _repaired, _moments, _estimated, _profiled, _planned, _sizes],
    ids=lambda use: use.__name__.strip("_"),
)
def test_all_that_take_a_batch_take_the_same(use: Callable[[Any], Any]) -> None:
    """The target of a pair would change every one of these as a second argument."""
    x, target = batches()[0], torch.zeros(())
    expected = use(x)
    for batch in ((x,), [x, target], {"x": x}, ({"x": x}, target)):
        assert use(batch) == expected


@pytest.mark.parametrize(
    "use",
    [
        lambda model, batch: calibrate_wasi(model, [batch], progress_bar=False),
        lambda model, batch: estimate_wasi(model, batch=batch),
        lambda model, batch: estimate_wasi(model, WasiConfig(), batch=batch),
        lambda model, batch: profile_wasi(model, WasiConfig(), batch=batch, rounds=1),
    ],
    ids=["calibrated", "estimated", "estimated with a configuration", "profiled"],
)
@pytest.mark.parametrize("name", ["images", "input_ids"])
def test_all_say_what_a_batch_lacks(use: Callable[[Any, Any], Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"ViT\w* cannot run a batch of {name}: .*\. Give batches that hold by name"):
        use(ARCHITECTURES["vit"].model(), {name: torch.zeros(2, 3, 16, 16)})


def test_tokens_beyond_the_vocabulary_are_told() -> None:
    batch = {"input_ids": torch.full((2, 4), 10**6)}
    with pytest.raises(ValueError, match=r"Llama\w* cannot run a batch of input_ids: index out of range"):
        calibrate_wasi(ARCHITECTURES["llama"].model(), [batch], progress_bar=False)


def test_layers_are_merged_for_a_pair_too() -> None:
    from peft import get_peft_model

    model = get_peft_model(reference.tiny_net(3), WasiConfig(weight_rank=7, update="factor"))
    ratios = merge_slow_layers(model, [batches()[0], torch.zeros(4)], least_gain=0.0)
    assert all(ratio <= 1 for ratio in ratios.values())


def test_a_loader_of_pairs() -> None:
    x, labels = torch.cat(batches()), torch.arange(12)
    dataset = torch.utils.data.TensorDataset(x, labels)
    loaders = [torch.utils.data.DataLoader(each, batch_size=4) for each in (dataset, x)]
    net = TwoArguments()
    factors = wasi_factors(plain_factors(net))
    first, second = (repair_factors(net, factors, data, steps=2, progress_bar=False) for data in loaders)
    assert_same_factors(first.initial, second.initial)


def test_masks_and_rows() -> None:
    batch, x = LLAMA.batch(2), torch.arange(14.0).reshape(2, 7, 1)
    batch["attention_mask"][0, 3:] = 0
    for each in (batch, (batch, Y)):
        mask = token_mask(each)
        assert mask is not None and real_rows(x, mask).flatten().tolist() == [0, 1, 2, *range(7, 14)]
    assert token_mask(X) is None and token_mask({"x": X, "attention_mask": None}) is None
    assert len(real_rows(x, None)) == 14
    assert len(real_rows(x[:, :3], mask)) == 6  # no mask of these tokens


# -------------------------------------------------------------------- what a model answers


def test_features_are_found_in_any_output() -> None:
    features, numbers = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    other = torch.ones(3)
    for output in (
        features,
        (numbers, features),
        [features],
        {"ids": numbers, "hidden": features},
        {"loss": other, "logits": features},
        SimpleNamespace(loss=other, logits=features),
        ((other,), features),
        ({"deep": [features]},),
    ):
        assert features_of(output) is features
    for nothing in (numbers, (numbers, None), {}, None, "text"):
        with pytest.raises(ValueError, match="must hold a floating point tensor"):
            features_of(nothing)


def test_the_loss_is_the_models_own_where_it_has_one() -> None:
    features, loss = torch.ones(4), torch.tensor(7.0)
    for output in ({"logits": features, "loss": loss}, SimpleNamespace(logits=features, loss=loss)):
        assert loss_of(output) is loss and training_loss(output) is loss
    for output in (features, (features, loss), {"logits": features, "loss": None}):
        assert loss_of(output) is None and float(training_loss(output)) == 4


# -------------------------------------------------------------------- watching


@pytest.mark.parametrize("error", [None, Reached, KeyboardInterrupt])
def test_hooks_go_whatever_happens(error: type[BaseException] | None) -> None:
    net = reference.tiny_net(1)
    untouched, seen = Untouched(net), []
    names = ["blocks.0", "blocks.1.fc1"]

    def before(name: str, args: Any, kwargs: Any) -> None:
        seen.append(("before", name))

    def after(name: str, output: Any) -> None:
        seen.append(("after", name))
        if error is not None:
            raise error

    try:
        with hooked(net, names, before, after):
            net(batches()[0])
    except (Reached, KeyboardInterrupt):
        pass
    untouched.check()
    whole = [("before", names[0]), ("after", names[0]), ("before", names[1]), ("after", names[1])]
    assert seen == (whole if error is None else whole[:2])
    with pytest.raises(AttributeError), hooked(net, ["blocks.0", "nothing"], before):
        raise AssertionError
    untouched.check()


@pytest.mark.parametrize("gradients", [True, False])
def test_evaluation_leaves_the_model_as_it_was(gradients: bool) -> None:
    net = reference.tiny_net(1)
    untouched, enabled = Untouched(net), torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt), evaluating(net, gradients):
        assert torch.is_grad_enabled() is gradients
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        raise KeyboardInterrupt
    untouched.check()
    assert torch.is_grad_enabled() is enabled


def test_a_new_start_of_the_graph_can_be_changed_in_place() -> None:
    y = differentiable(torch.ones(3))
    y.add_(1)
    assert y.requires_grad
    x = torch.ones(2, requires_grad=True) * 2
    assert differentiable(x) is x
