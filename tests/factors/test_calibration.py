"""Calibration: spectra against slow references, what is collected from a model, the folder, and every misuse."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from calibrating import (
    INPUTS,
    LAYERS,
    TARGETS,
    CountedData,
    Interrupted,
    Untouched,
    anisotropic,
    batches,
    crash_at,
    inputs_of,
    output_error,
    with_nan,
)
from models import ARCHITECTURES, Architecture
from peft import get_peft_model
from safetensors.torch import save_file
from strategies import normal, orthonormal, orthonormality_error, relative_error
from torch import Tensor, nn
from transformers import BatchEncoding, BatchFeature

from wasi_peft import Calibration, WasiConfig, calibrate_wasi
from wasi_peft.factors import calibration, collecting, statistics
from wasi_peft.factors.data import describe_data
from wasi_peft.factors.statistics import InputStatistics, feature_gradient_energies, token_gradient_energies
from wasi_peft.forms.residual import Int4Residual, Int8Residual
from wasi_peft.linalg.spectra import truncate, weight_spectrum
from wasi_peft.models.calls import evaluating
from wasi_peft.ranks.spectrum import LayerSpectrum
from wasi_peft.updates.base import InitialFactors

SHAPES = [(10, 14), (14, 10), (12, 12)]


def calibrate(net: nn.Module, data: Any, config: WasiConfig | None = None, **options: Any) -> Calibration:
    """`calibrate_wasi` without progress bars."""
    return calibrate_wasi(net, data, config, progress_bar=False, **options)


def all_factors(net: nn.Module, calibrated: Calibration, rank: int = 3) -> dict[str, InitialFactors]:
    """Factors of all calibrated layers at one rank."""
    return {name: calibrated.factors(name, net.get_submodule(name), rank) for name in calibrated.layers}


def assert_same(first: Calibration, second: Calibration) -> None:
    """Everything that can be asked of two calibrations is the same, bit for bit."""
    assert first.spectra(sorted(first.layers)) == second.spectra(sorted(second.layers)) != []
    for name in first.layers:
        for part in ("energies", "left", "right", "mean"):
            assert torch.equal(first._tensor(name, part), second._tensor(name, part)), (name, part)


def second_moment(rows: Tensor, centered: bool) -> Tensor:
    """`E[x x^T]`, or the covariance."""
    rows = rows - rows.mean(0) if centered else rows
    return rows.T @ rows / len(rows)


def moments(out_features: int, in_features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and two full-rank second moments, float64."""
    x, g = anisotropic(300, in_features, seed), anisotropic(300, out_features, seed + 5)
    return normal(out_features, in_features, seed=seed), second_moment(x, False), second_moment(g, False)


class OneLayer(nn.Module):
    """A target and, if asked for, a fixed map behind it that makes some of its outputs matter more than others."""

    def __init__(self, out_features: int, in_features: int, bias: bool = True, behind: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, out_features, bias=bias)
        self.behind = None
        if behind:
            self.behind = nn.Linear(out_features, 2 * out_features, bias=False)
            self.behind.weight.data = anisotropic(2 * out_features, out_features, seed=8, mean=0.0).float()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if self.behind is None else self.behind(y)


FC = WasiConfig(residual=None, weight_rank=1, target_modules=["fc"])


# -------------------------------------------------------------------------------- the spectrum of one weight


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_two_sided_factors_are_those_of_the_reference(out_features: int, in_features: int) -> None:
    weight, C, S = moments(out_features, in_features, seed=1)
    spectrum = weight_spectrum(weight, C, S)
    _, energies = reference.two_sided_svd(weight, C, reference.damped(S), 1)
    assert relative_error(spectrum.energies, energies) < 1e-10
    for rank in range(1, min(weight.shape) + 1):
        product, _ = reference.two_sided_svd(weight, C, reference.damped(S), rank)
        L, R = truncate(weight, spectrum, rank)
        assert relative_error(L @ R, product) < 1e-7
        assert orthonormality_error(L) < 1e-12
        error = reference.two_sided_error(weight - L @ R, C, reference.damped(S))
        assert float(spectrum.energies[rank:].sum()) == pytest.approx(
            error, rel=1e-6, abs=1e-9 * float(energies.sum())
        )


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_no_other_factors_of_the_rank_lose_less(out_features: int, in_features: int) -> None:
    weight, C, S = moments(out_features, in_features, seed=2)
    best = truncate(weight, weight_spectrum(weight, C, S), 4)
    error = reference.two_sided_error(weight - best[0] @ best[1], C, reference.damped(S))
    others = [truncate(weight, weight_spectrum(weight, *given), 4) for given in ((), (C,), (None, S))]
    for seed in range(20):
        nearby = 10.0 ** -(seed % 4)
        moved = best[0] + nearby * normal(out_features, 4, seed=seed)
        others.append((moved, best[1] + nearby * normal(4, in_features, seed=seed + 50)))
        L = orthonormal(out_features, 4, seed + 100)
        others.append((L, L.T @ weight))
    for L, R in others:
        assert error < reference.two_sided_error(weight - L @ R, C, reference.damped(S))


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("gradients", [True, False])
def test_fewer_samples_than_features(out_features: int, in_features: int, gradients: bool) -> None:
    """Five rows: the rank that they span loses nothing on them, and nothing is NaN."""
    weight, x = normal(out_features, in_features, seed=3), normal(5, in_features, seed=4)
    S = second_moment(normal(3, out_features, seed=5), False) if gradients else None
    spectrum = weight_spectrum(weight, second_moment(x, False), S)
    assert float(spectrum.energies[5:].sum()) < 1e-10 * float(spectrum.energies.sum())
    for rank in range(5, min(weight.shape) + 1):
        L, R = truncate(weight, spectrum, rank)
        assert relative_error(x @ (L @ R).T, x @ weight.T) < 1e-6
        assert orthonormality_error(L) < 1e-12


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_layer_gets_the_one_sided_reference_factors(
    out_features: int, in_features: int, mean: float, bias: bool
) -> None:
    """With a bias the covariance whitens and the bias takes up the mean; without, the second moment does."""
    net = OneLayer(out_features, in_features, bias)
    x = anisotropic(400, in_features, seed=3, mean=mean)
    calibrated = calibrate(net, [x[:150].float(), x[150:].float()], FC, gradients=None)
    weight, moment = net.fc.weight.detach().double(), second_moment(x, centered=bias)
    for rank in (2, 5, min(out_features, in_features)):
        initial = calibrated.factors("fc", net.fc, rank)
        L, R, energies = reference.whitened_svd(weight, moment, rank)
        assert relative_error(initial.L @ initial.R, L @ R) < 1e-3
        assert orthonormality_error(initial.L) < 1e-6
        assert relative_error(calibrated.energies("fc"), energies) < 1e-4
        assert (initial.bias is not None) == bias
        if initial.bias is not None:
            assert relative_error(initial.bias, net.fc.bias.double() + (weight - L @ R) @ x.mean(0)) < 1e-3


def test_the_mean_corrected_bias_is_the_best_one() -> None:
    """Its error has mean zero, so no other bias does better; the uncorrected ones do worse."""
    net, x = OneLayer(10, 14), anisotropic(400, 14, seed=4, mean=3.0)
    initial = calibrate(net, [x.float()], FC, gradients=None).factors("fc", net.fc, 4)
    weight, bias = net.fc.weight.detach().double(), net.fc.bias.detach().double()
    assert initial.bias is not None
    residual = x @ (weight - initial.L.double() @ initial.R.double()).T + bias - initial.bias
    assert float(residual.mean(0).norm()) < 1e-4 * float(residual.norm(dim=1).mean())

    best = output_error(x, net.fc, initial.L, initial.R, initial.bias)
    whitened = reference.whitened_svd(weight, second_moment(x, False), 4)[:2]
    plain = reference.truncated_svd(weight, 4)
    assert best < 0.98 * output_error(x, net.fc, *whitened, bias)
    assert best < 0.5 * output_error(x, net.fc, *plain, bias)
    assert best < 0.98 * output_error(x, net.fc, initial.L, initial.R, bias)


def test_what_is_constant_goes_into_the_bias() -> None:
    """An input that never changes needs no weight at all."""
    net, x = OneLayer(6, 6), torch.ones(8, 6)
    initial = calibrate(net, [x], FC, gradients=None).factors("fc", net.fc, 1)
    assert initial.bias is not None and torch.isfinite(initial.R).all()
    assert relative_error(x @ (initial.L @ initial.R).T + initial.bias, net.fc(x)) < 1e-5


def test_statistics_over_several_batches_of_any_shape() -> None:
    x = anisotropic(60, 6, seed=5)
    statistics = InputStatistics.of_width("fc", 6)
    for part in (x[:20].reshape(4, 5, 6), x[20:50].reshape(1, 2, 15, 6), x[50:59], x[59]):
        statistics.update(part.float())
    moment, mean = statistics.moments()
    assert statistics.rows == 60
    assert (moment.dtype, mean.dtype) == (torch.float64, torch.float64)
    assert relative_error(moment, x.T @ x / 60) < 1e-6
    assert relative_error(mean, x.mean(0)) < 1e-6


def test_low_precision_inputs_are_summed_in_float32() -> None:
    """Adding one more row to a large bfloat16 sum would change nothing."""
    statistics = InputStatistics.of_width("fc", 2)
    for _ in range(20):
        statistics.update(torch.ones(100, 2, dtype=torch.bfloat16))
        statistics.update_output("fc", torch.ones(100, 2, dtype=torch.bfloat16))
    moment, mean = statistics.moments()
    assert moment.tolist() == [[1.0, 1.0], [1.0, 1.0]] and mean.tolist() == [1.0, 1.0]
    assert statistics.output_moments["fc"].tolist() == [[2000.0, 2000.0], [2000.0, 2000.0]]


# -------------------------------------------------------------------------------- gradient energies


def tails(energies: Tensor) -> Tensor:
    """Squared error at every rank."""
    return torch.cat([energies.double(), torch.zeros(1).double()]).flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("shape", [(40, 9), (3, 5, 9), (4, 9), (2, 3, 9), (9, 9)], ids=str)
def test_feature_gradient_energies(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape[:-1]).numel()
    x, gradient = anisotropic(rows, 9, seed=1).reshape(shape), normal(*shape[:-1], 7, seed=2)
    energies = feature_gradient_energies(x, gradient)
    assert energies.shape == (9,) and bool((energies >= 0).all())
    expected = torch.tensor(reference.feature_gradient_errors(x, gradient)).double()
    assert float((tails(energies) - expected).abs().max()) < 1e-3 * float(expected[0])
    assert float((tails(energies)[:3] - expected[:3]).abs().max()) < 1e-5 * float(expected[0])


def test_token_gradient_energies_with_an_exact_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many orthogonal output directions as there are, nothing is left to chance."""
    x, gradient = normal(6, 5, 9, seed=1), normal(6, 5, 8, seed=2)
    x = x * torch.logspace(0, -1, 5).double()[:, None] + 0.3

    def hadamard(*_: Any, **__: Any) -> Tensor:
        signs = torch.ones(1, 1)
        for _ in range(3):
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return (signs.long() + 1) // 2

    monkeypatch.setattr(statistics, "_SKETCH", 8)
    monkeypatch.setattr(torch, "randint", hadamard)
    energies = token_gradient_energies(x, gradient, torch.Generator())
    expected = torch.tensor(reference.token_gradient_errors(x, gradient)).double()
    assert energies.shape == (5,) and bool((energies >= 0).all())
    # never below the true error, and equal to it wherever a larger rank does not do worse
    envelope = expected.flip(0).cummax(0).values.flip(0)
    assert relative_error(tails(energies), envelope) < 1e-5


def test_token_gradient_energies_are_right_on_average() -> None:
    x, gradient = anisotropic(60, 9, seed=1).reshape(12, 5, 9), normal(12, 5, 8, seed=2)
    expected = torch.tensor(reference.token_gradient_errors(x, gradient)).double()
    envelope = expected.flip(0).cummax(0).values.flip(0)
    found = [tails(token_gradient_energies(x, gradient, torch.Generator().manual_seed(seed))) for seed in range(50)]
    assert relative_error(torch.stack(found).mean(0), envelope) < 0.1
    assert all(relative_error(one, envelope) < 0.6 for one in found)


# -------------------------------------------------------------------------------- a model


def output_gradients(
    net: nn.Module,
    data: list[Any],
    names: list[str] = TARGETS,
    run: Callable[[nn.Module, Any], Tensor] = lambda net, x: net(x),
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """Gradients of layers' outputs for an explicit +-1 projection of the features, one entry a batch; float64."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    for name in names:

        def keep(module: nn.Module, args: Any, y: Tensor, name: str = name) -> None:
            y.retain_grad()
            outputs[name] = y

        net.get_submodule(name).register_forward_hook(keep)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for x in data:
        features = run(net, x)
        signs = 2.0 * torch.randint(0, 2, features.shape, generator=generator) - 1
        (features * signs).sum().backward()
        for name, y in outputs.items():
            if y.grad is not None:
                found[name].append(y.grad.double())
    return found


def summed(gradients: list[Tensor]) -> Tensor:
    """Sum of `g g^T` over all rows."""
    rows = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients])
    return rows.T @ rows


def test_output_moments_are_those_of_an_explicit_projection() -> None:
    net, data = reference.tiny_net(1), batches()
    untouched = Untouched(net)
    collector = collecting.Collector({name: net.get_submodule(name) for name in TARGETS}, 2**30, "features", seed=5)
    with evaluating(net, True), collector.attached(net):
        for x in data:
            net(x)
    collector.check(fresh=True)
    untouched.check()
    expected = output_gradients(net, data, seed=5)
    found = {name: moment for one in collector.take() for name, moment in one.output_moments.items()}
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        assert relative_error(moment, summed(expected[name])) < 1e-4


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_layer_gets_the_two_sided_reference_spectrum(bias: bool) -> None:
    net, data = reference.tiny_net(1, bias=bias), batches()
    recorded, gradients = inputs_of(net, data), output_gradients(net, data)
    calibrated = calibrate(net, data)
    assert set(calibrated.layers) == set(TARGETS)
    for name in TARGETS:
        linear = net.get_submodule(name)
        weight, C = linear.weight.detach().double(), second_moment(recorded[name], centered=bias)
        S = reference.damped(summed(gradients[name]))
        initial = calibrated.factors(name, linear, 3)
        error = reference.two_sided_error(weight - initial.L.double() @ initial.R.double(), C, S)
        energies = calibrated.energies(name)
        assert error == pytest.approx(float(energies[3:].sum()), rel=1e-2, abs=1e-6 * float(energies.sum()))
        jittered = C + 1e-9 * torch.eye(len(C))
        assert relative_error(energies, reference.two_sided_svd(weight, jittered, S, 3)[1]) < 1e-3


def test_gradient_energies_are_the_sums_over_the_first_batches() -> None:
    net, data = reference.tiny_net(2), batches(4)
    gradients = output_gradients(net, data)
    for spectrum in calibrate(net, data).spectra():
        first = [inputs_of(net, [x])[spectrum.name] for x in data[:2]]
        pairs = list(zip(first, gradients[spectrum.name], strict=False))
        expected = sum(torch.tensor(reference.feature_gradient_errors(x, g)) for x, g in pairs)
        found = tails(torch.tensor(spectrum.gradient_energies["feature"]))
        assert float((found - expected).abs().max()) < 1e-3 * float(expected[0])
        tokens = [reference.token_gradient_errors(x.reshape(g.shape[0], -1, x.shape[1]), g) for x, g in pairs]
        found = tails(torch.tensor(spectrum.gradient_energies["token"]))
        assert 0.5 < float(found[0] / torch.tensor(tokens).sum(0)[0]) < 2


def test_spectra_are_what_planning_needs() -> None:
    net = reference.tiny_net(3)
    calibrated = calibrate(net, batches())
    spectra = {spectrum.name: spectrum for spectrum in calibrated.spectra()}
    assert list(spectra) == list(calibrated.layers)
    assert all(isinstance(spectrum, LayerSpectrum) for spectrum in spectra.values())
    for block in range(2):
        names = {layer: f"blocks.{block}.{layer}" for layer in LAYERS}
        shared = {layer: spectra[name].shared_input for layer, name in names.items()}
        assert shared == {**names, "k": names["q"], "v": names["q"]}
    fc1 = spectra["blocks.0.fc1"]
    assert (fc1.out_features, fc1.in_features) == (12, 8)
    assert fc1.weight_energies == tuple(calibrated.energies("blocks.0.fc1").tolist())
    assert {mode: len(energies) for mode, energies in fc1.gradient_energies.items()} == {"feature": 8, "token": 5}
    assert [spectrum.name for spectrum in calibrated.spectra(["blocks.1.o"])] == ["blocks.1.o"]
    assert (calibrated.rows, calibrated.bytes_per_element) == (60, 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("residual", [Int8Residual, Int4Residual])
def test_rounding_errors_are_in_the_unit_of_the_energies(residual: Any, bias: bool) -> None:
    """The second moment weighs them, since nothing takes the mean of the input out of what rounding loses."""
    net, data = reference.tiny_net(1, bias=bias), batches()
    recorded, gradients = inputs_of(net, data), output_gradients(net, data)
    for spectrum in calibrate(net, data).spectra():
        linear = net.get_submodule(spectrum.name)
        lost = linear.weight.detach().double() - residual(linear).dense_weight().double()
        S = reference.damped(summed(gradients[spectrum.name]))
        expected = reference.two_sided_error(lost, second_moment(recorded[spectrum.name], centered=False), S)
        assert spectrum.rounding_errors[residual.name] == pytest.approx(expected, rel=1e-3)
        assert spectrum.rounding_errors[residual.name] < sum(spectrum.weight_energies)


def test_without_gradients_every_layer_counts_as_shares() -> None:
    calibrated = calibrate(reference.tiny_net(3), batches(), gradients=None)
    for spectrum in calibrated.spectra():
        assert sum(spectrum.weight_energies) == pytest.approx(1)
        assert spectrum.gradient_energies == {}
        assert 0 < spectrum.rounding_errors["int8"] < spectrum.rounding_errors["int4"] < 0.1


def test_the_loss_of_the_model_as_the_source_of_gradients() -> None:
    architecture = ARCHITECTURES["vit"]
    model, data = architecture.model(), [architecture.batch(seed=seed) for seed in range(2)]
    untouched = Untouched(model)
    by_loss = calibrate(model, data, gradients="loss")
    untouched.check()

    def own_loss() -> None:
        for batch in data:
            model(**batch).loss.backward()

    assert_same(by_loss, calibrate(model, own_loss, gradients="loss"))
    by_features = calibrate(model, data)
    name = by_loss.layers[0]
    assert relative_error(by_loss.energies(name), by_features.energies(name)) > 1e-2
    with pytest.raises(ValueError, match="needs batches with labels, for which the model returns a loss"):
        calibrate(model, [{"pixel_values": batch["pixel_values"]} for batch in data], gradients="loss")


def test_features_come_from_the_base_model() -> None:
    """Not the few logits: the last hidden state, before the head."""
    architecture = ARCHITECTURES["vit"]
    model, data = architecture.model(), [architecture.batch(seed=seed) for seed in range(2)]
    names = sorted(architecture.targets(model))

    def hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model.vit(batch["pixel_values"]).last_hidden_state

    gradients = output_gradients(model, data, names, hidden)
    calibrated = calibrate(model, data)
    assert sorted(calibrated.layers) == names
    name = next(name for name in names if name.endswith("fc1"))
    linear, seen = model.get_submodule(name), []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2).double()))
    for batch in data:
        hidden(model, batch)
    handle.remove()
    C, S = second_moment(torch.cat(seen), centered=True), reference.damped(summed(gradients[name]))
    jittered = C + 1e-9 * torch.eye(len(C))
    expected = reference.two_sided_svd(linear.weight.detach().double(), jittered, S, 1)[1]
    assert relative_error(calibrated.energies(name), expected) < 1e-3


def test_every_architecture_can_be_calibrated(architecture: Architecture) -> None:
    model = architecture.model()
    untouched = Untouched(model)
    data = [architecture.batch(seed=seed) for seed in range(2)]
    calibrated = calibrate(model, data)
    untouched.check()
    assert set(calibrated.layers) == architecture.targets(model)
    for spectrum in calibrated.spectra():
        assert "feature" in spectrum.gradient_energies, spectrum.name
        assert sum(spectrum.weight_energies) > 0


@pytest.mark.parametrize("limit", [2**30, 1], ids=["one pass", "several passes"])
def test_a_layer_that_the_features_do_not_depend_on(limit: int) -> None:
    """The head is behind them: it gets one-sided factors, and counts as much as the average layer."""
    architecture = ARCHITECTURES["vit"]
    model, data = architecture.model(), [architecture.batch(seed=seed) for seed in range(2)]
    config = WasiConfig(residual=None, target_modules=r".*\.(fc1|fc2)|classifier")
    calibrated = calibrate(model, data, config, max_memory_bytes=limit)
    one_sided = calibrate(model, data, config, gradients=None)
    assert torch.equal(calibrated.energies("classifier"), one_sided.energies("classifier"))
    totals = {spectrum.name: sum(spectrum.weight_energies) for spectrum in calibrated.spectra()}
    head = totals.pop("classifier")
    assert len(totals) == 4 and head == pytest.approx(sum(totals.values()) / 4)
    assert calibrated.spectra(["classifier"])[0].gradient_energies == {}
    everything = calibrate(model, data, WasiConfig(residual=None, target_modules=["classifier"]), gradients=None)
    assert everything.layers == ("classifier",)


class TwoRates(nn.Module):
    """Two equal layers, one of which sees every token and one only every other."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rarely = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.rarely.weight = nn.Parameter(self.often.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.often(x), self.rarely(x[:, ::2])], 1)


def test_a_layer_that_sees_more_rows_counts_more() -> None:
    """The features' error adds up over rows: energies are comparable between stages of different resolution."""
    x = normal(64, 16, 8, seed=3).float()
    spectra = calibrate(TwoRates(), [x], WasiConfig(residual=None, target_modules=["often", "rarely"])).spectra()
    often, rarely = (sum(spectrum.weight_energies) for spectrum in spectra)
    assert often / rarely == pytest.approx(2, rel=0.15)


def test_padding_does_not_count() -> None:
    """Whatever stands behind the mask changes neither moments nor gradients."""
    architecture = ARCHITECTURES["bert"]
    model, batch = architecture.model(), architecture.batch(samples=6)
    batch["attention_mask"][:3, 4:] = 0
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    first, second = calibrate(model, [batch]), calibrate(model, [other])
    assert first.rows == int(batch["attention_mask"].sum())
    for name in first.layers:
        assert relative_error(first.energies(name), second.energies(name)) < 1e-4


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Samples of a data set whose size nobody knows."""

    def __iter__(self) -> Any:
        yield from torch.cat(batches())


@pytest.mark.parametrize("kind", ["tensors", "tuples", "dicts", "loader", "stream", "function", "max_batches"])
def test_kinds_of_data_give_the_same_spectra(kind: str) -> None:
    net, data = reference.tiny_net(4), batches()
    options: dict[str, Any] = {}
    given: Any = data
    if kind == "tuples":
        given = [(x, torch.zeros(4)) for x in data]
    elif kind == "dicts":
        given = [{"x": x, "labels": torch.zeros(4)} for x in data]
    elif kind == "loader":
        dataset = torch.utils.data.TensorDataset(torch.cat(data))
        given = torch.utils.data.DataLoader(dataset, batch_size=4)
    elif kind == "stream":
        given = torch.utils.data.DataLoader(Stream(), batch_size=4)
    elif kind == "function":

        def given() -> None:
            for x in data:
                net(x)

    elif kind == "max_batches":
        given, options = [*data, *batches(seed=50)], {"max_batches": 3}
    assert_same(calibrate(net, data), calibrate(net, given, **options))


def test_no_batch_is_loaded_in_vain() -> None:
    loaded = []

    class Data:
        def __iter__(self) -> Any:
            for index, x in enumerate(batches()):
                loaded.append(index)
                yield x

    calibrate(reference.tiny_net(4), Data(), max_batches=2)
    assert loaded == [0, 1]


# q k v share 4 * 8 * 9 + 3 * 4 * 64 bytes of sums with gradients, fc1 and fc2 take 864 and 880
@pytest.mark.parametrize("gradients", ["features", None])
@pytest.mark.parametrize(("limit", "passes"), [(2**30, 1), (1, INPUTS), (1800, None)])
def test_several_passes_give_the_same_as_one(limit: int, passes: int | None, gradients: Any) -> None:
    net, data = reference.tiny_net(5), CountedData(batches())
    once = calibrate(net, data.data, gradients=gradients)
    assert_same(once, calibrate(net, data, max_memory_bytes=limit, gradients=gradients))
    assert data.passes == passes if passes is not None else 1 < data.passes < INPUTS


def test_the_memory_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all sums at the end of a pass, but for the layers of a single input."""
    held = []
    check = collecting.Collector.check

    def recorded(self: Any, fresh: bool) -> None:
        sums = [[one.sums.total(), one.total, *one.output_moments.values()] for one in self.collected]
        held.append((len(sums), sum(part.numel() * 4 for parts in sums for part in parts), self.bytes_held))
        check(self, fresh)

    monkeypatch.setattr(collecting.Collector, "check", recorded)
    calibrate(reference.tiny_net(6), batches(), max_memory_bytes=2000)
    assert len(held) > 2
    for inputs, actual, counted in held:
        assert actual == counted and (actual <= 2000 or inputs == 1)


def test_layers_that_read_one_tensor_share_an_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    update = InputStatistics.update
    monkeypatch.setattr(InputStatistics, "update", lambda self, x, mask: updates.append(update(self, x, mask)))
    calibrate(reference.tiny_net(6), batches(2))
    assert len(updates) == 2 * INPUTS


class ChangesItsInput(nn.Module):
    """Two layers read the same tensor, which is changed in place between them, as is the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = self.first(x).relu_()
        return first + self.second(x.relu_())


@pytest.mark.parametrize("gradients", ["features", None])
def test_a_tensor_changed_in_place_is_another_input(gradients: Any) -> None:
    net, data = ChangesItsInput(), batches()
    calibrated = calibrate(
        net, data, WasiConfig(residual=None, target_modules=["first", "second"]), gradients=gradients
    )
    recorded, spectra = inputs_of(net, data, ["first", "second"]), calibrated.spectra()
    assert [spectrum.shared_input for spectrum in spectra] == ["first", "second"]
    for name, x in recorded.items():
        assert relative_error(calibrated._tensor(name, "mean"), x.mean(0)) < 1e-5
    if gradients is not None:
        # what the first layer read is gone when its gradient arrives
        assert [sorted(spectrum.gradient_energies) for spectrum in spectra] == [[], ["feature", "token"]]


def test_the_token_mode_needs_one_number_of_tokens_everywhere() -> None:
    """Even where it only changes after the batches on which gradients are compared."""
    net = reference.tiny_net(6)
    for lengths in ((5, 5, 5, 4), (5, 4, 5), (4, 5)):
        data = [batches(1)[0][:, :tokens] for tokens in lengths]
        for spectrum in calibrate(net, data).spectra():
            assert set(spectrum.gradient_energies) == {"feature"}


def test_the_token_mode_of_long_inputs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a decomposition of tokens x tokens for each layer."""
    for most, modes in ((5, {"feature", "token"}), (4, {"feature"})):  # of 5 tokens
        monkeypatch.setattr(statistics, "MOST_TOKENS", most)
        for spectrum in calibrate(reference.tiny_net(6), batches()).spectra():
            assert set(spectrum.gradient_energies) == modes


def test_bias_correction_is_off_for_layers_without_bias() -> None:
    """A layer keeps the structure that its architecture says."""
    net = reference.tiny_net(7, bias=False)
    assert all(initial.bias is None for initial in all_factors(net, calibrate(net, batches())).values())


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    net, data = reference.tiny_net(8), batches()
    first = calibrate(net, data)
    torch.manual_seed(77)
    assert_same(first, calibrate(net, data))
    other = calibrate(net, data, seed=1)
    name = "blocks.0.q"
    assert not torch.equal(first.energies(name), other.energies(name))
    assert relative_error(first.energies(name), other.energies(name)) < 1
    assert_same(calibrate(net, data, gradients=None), calibrate(net, data, seed=1, gradients=None))


@pytest.mark.parametrize("limit", [2**30, 1], ids=["one pass", "several passes"])
def test_success_restores_everything(limit: int) -> None:
    net = reference.tiny_net(13)
    untouched = Untouched(net)
    calibrate(net, batches(), max_memory_bytes=limit)
    untouched.check()


# -------------------------------------------------------------------------------- the folder


def test_a_saved_calibration_loads(tmp_path: Path) -> None:
    net = reference.tiny_net(8)
    calibrated = calibrate(net, batches(), directory=tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded.layers == calibrated.layers
    assert_same(calibrated, loaded)
    assert len(list(tmp_path.iterdir())) == len(TARGETS) + 1  # and nothing is left over


def test_a_temporary_folder_goes_with_its_object() -> None:
    calibrated = calibrate(reference.tiny_net(8), batches())
    folder = calibrated.directory
    assert os.path.isdir(folder)
    del calibrated
    gc.collect()
    assert not os.path.exists(folder)


def test_further_targets_are_added_to_a_folder(tmp_path: Path) -> None:
    net, data = reference.tiny_net(9), batches()
    part = calibrate(net, data, WasiConfig(residual=None, target_modules=["o", "fc2"]), directory=tmp_path)
    assert set(part.layers) == {name for name in TARGETS if name.endswith((".o", ".fc2"))}
    whole = calibrate(net, data, directory=tmp_path)
    assert set(whole.layers) == set(TARGETS)
    assert_same(calibrate(net, data), whole)


@pytest.mark.parametrize("gradients", ["features", None])
@pytest.mark.parametrize("crash", [1, 3, 5, 12])
def test_an_interrupted_calibration_goes_on(
    crash: int, gradients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does the remaining layers only, and the result is that of an uninterrupted one."""
    net, data = reference.tiny_net(11), batches()
    save_file = calibration.save_file
    untouched = Untouched(net)
    monkeypatch.setattr(calibration, "save_file", crash_at(crash, save_file))
    with pytest.raises(Interrupted):
        calibrate(net, data, directory=tmp_path, gradients=gradients)
    untouched.check()
    if crash > 3:
        with pytest.raises(ValueError, match="this calibration was interrupted; run calibrate_wasi again"):
            Calibration.load(tmp_path)
    saved = []
    monkeypatch.setattr(calibration, "save_file", lambda *args, **options: saved.append(save_file(*args, **options)))
    resumed = calibrate(net, data, directory=tmp_path, gradients=gradients)
    # the layers of one input are done together
    assert len(saved) == len(TARGETS) - {1: 0, 3: 0, 5: 4, 12: 11}[crash]
    assert len(list(tmp_path.iterdir())) == len(TARGETS) + 1
    whole = calibrate(net, data, gradients=gradients)
    assert resumed.layers == whole.layers
    assert_same(whole, resumed)


@pytest.mark.parametrize("moment", ["data", "json.dumps", "os.replace"])
def test_other_interruptions(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = reference.tiny_net(11), batches()
    given: Any = data
    with monkeypatch.context() as patch:
        if moment == "data":
            given = CountedData(data)
            patch.setattr(collecting, "model_output", crash_at(8, collecting.model_output))
        else:
            module, name = {"json": json, "os": os}[moment.split(".")[0]], moment.split(".")[1]
            patch.setattr(module, name, crash_at(4, getattr(module, name)))
        with pytest.raises(Interrupted):
            calibrate(net, given, directory=tmp_path, max_memory_bytes=1)
    assert_same(calibrate(net, data), calibrate(net, data, directory=tmp_path))
    assert len(list(tmp_path.iterdir())) == len(TARGETS) + 1


def test_a_finished_calibration_is_not_repeated(tmp_path: Path) -> None:
    net, data = reference.tiny_net(10), CountedData(batches())
    first = calibrate(net, data, directory=tmp_path)
    assert_same(first, calibrate(net, data, directory=tmp_path))
    assert data.passes == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    net = reference.tiny_net(12, dtype)
    data = [x.to(dtype) for x in batches()]
    calibrated = calibrate(net, data, directory=tmp_path)
    assert calibrated.bytes_per_element == dtype.itemsize
    exact = calibrate(net.float(), [x.float() for x in data])
    for name, initial in all_factors(net.to(dtype), Calibration.load(tmp_path)).items():
        assert initial.L.dtype == initial.R.dtype == dtype
        assert orthonormality_error(initial.L) < 8 * torch.finfo(dtype).eps
        assert relative_error(calibrated.energies(name), exact.energies(name)) < 0.1


def test_full_rank_gives_the_weight_back(tmp_path: Path) -> None:
    net = reference.tiny_net(12)
    for name, initial in all_factors(net, calibrate(net, batches()), rank=8).items():
        linear = net.get_submodule(name)
        assert relative_error(initial.L @ initial.R, linear.weight) < 1e-5
        assert initial.bias is not None and relative_error(initial.bias, linear.bias) < 1e-4


# -------------------------------------------------------------------------------- errors


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: [], "at least one batch, got none"),
    "iterator": (lambda: iter(batches()), "got an iterator"),
    "generator": (lambda: (x for x in batches()), "got an iterator"),
    "nan": (lambda: with_nan(batches()), "NaN or Inf on the calibration data"),
    "inf": (lambda: [torch.full((2, 5, 8), float("inf"))], "NaN or Inf on the calibration data"),
    "function that does nothing": (lambda: lambda: None, "never reached this layer"),
    "labels only": (lambda: [{"labels": torch.zeros(4)}], r"must hold model inputs, got only \['labels'\]"),
    "strings": (lambda: ["a text"], "must be a mapping, a tensor, or a tuple that begins with one of them, got str"),
    "no rows": (lambda: [torch.zeros(0, 5, 8)], "at least one tensor and no empty one"),
}


@pytest.mark.parametrize("gradients", ["features", None])
@pytest.mark.parametrize("limit", [2**30, 1], ids=["one pass", "several passes"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str, limit: int, gradients: Any, tmp_path: Path) -> None:
    make, message = BAD_DATA[case]
    net = reference.tiny_net(14)
    untouched = Untouched(net)
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(net, make(), max_memory_bytes=limit, directory=tmp_path, gradients=gradients)
    untouched.check()
    with pytest.raises(ValueError, match="must hold a saved calibration"):
        Calibration.load(tmp_path)


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def test_a_gradient_that_is_no_number() -> None:
    net = OneLayer(8, 8)
    net.behind = NanGradient.apply
    with pytest.raises(ValueError, match="fc: the gradient of its output holds NaN or Inf"):
        calibrate(net, batches(), FC)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_batches_allowed(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_batches must be at least 1, got {limit}"):
        calibrate(reference.tiny_net(15), batches(), max_batches=limit)


def test_an_unknown_source_of_gradients() -> None:
    with pytest.raises(ValueError, match="gradients must be one of 'features', 'loss', None, got 'logits'"):
        calibrate(reference.tiny_net(15), batches(), gradients="logits")


class WithoutGradients(reference.TinyNet):
    """Runs in a mode of its own."""

    mode: Any = torch.no_grad

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return super().forward(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gradients", ["features", "loss"])
def test_a_model_that_runs_without_gradients(mode: Any, gradients: Any) -> None:
    net, data = WithoutGradients(), batches()
    net.mode = mode
    forward = net.forward

    class Output(dict):
        loss = property(lambda self: self["x"].sum())

    if gradients == "loss":
        net.forward = lambda x: Output(x=forward(x))  # type: ignore[method-assign]
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=r"runs with gradients enabled .* got none for blocks\.0\.q. Use gradients=N"):
        calibrate(net, data, gradients=gradients)
    untouched.check()
    assert set(calibrate(net, data, gradients=None).layers) == set(TARGETS)


def test_an_error_inside_the_model_comes_through() -> None:
    net = reference.tiny_net(16)
    untouched = Untouched(net)
    with pytest.raises(RuntimeError, match="shape"):
        calibrate(net, [*batches(), torch.zeros(2, 5, 7)])
    untouched.check()


class SkipsLastBlock(reference.TinyNet):
    """Does not run its last block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(x)).mean(1))


@pytest.mark.parametrize("limit", [2**30, 1], ids=["one pass", "several passes"])
def test_layers_that_the_data_never_reach(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    """They are taken apart as plain weights, the others as without them."""
    net = SkipsLastBlock()
    untouched = Untouched(net)
    calibration = calibrate(net, batches(), max_memory_bytes=limit)
    untouched.check()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("blocks.1.q: the calibration data never reached this layer (6 in all)")
    assert set(calibration.layers) == set(TARGETS)
    config = WasiConfig(residual=None, target_modules=r"blocks\.0\..*(q|k|v|o|fc1|fc2)")
    alone = calibrate(net, batches(), config)
    for name in TARGETS[:6]:
        assert torch.equal(calibration.energies(name), alone.energies(name))
    weight = net.blocks[1].fc1.weight.detach()
    factors = calibration.factors("blocks.1.fc1", net.blocks[1].fc1, 3)
    left, values, right = torch.linalg.svd(weight)
    torch.testing.assert_close(factors.L @ factors.R, left[:, :3] * values[:3] @ right[:3])
    assert factors.bias is not None and torch.equal(factors.bias, net.blocks[1].fc1.bias)
    spectra = {spectrum.name: sum(spectrum.weight_energies) for spectrum in calibration.spectra()}
    assert spectra["blocks.1.fc1"] == pytest.approx(sum(spectra[name] for name in TARGETS[:6]) / 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight(bad: float) -> None:
    net = reference.tiny_net(17)
    with torch.no_grad():
        net.blocks[1].fc1.weight[2, 1] = bad
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1: its weight holds NaN or Inf"):
        calibrate(net, batches())
    untouched.check()


def test_no_target() -> None:
    with pytest.raises(ValueError, match=r"target_modules must match at least one module, got \{'nothing'\}"):
        calibrate(reference.tiny_net(17), batches(), WasiConfig(residual=None, target_modules=["nothing"]))


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_calibration(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(ValueError, match="directory must hold a saved calibration, got"):
        Calibration.load(folder)


def test_a_calibration_of_another_model(tmp_path: Path) -> None:
    net = reference.tiny_net(20)
    calibrated = calibrate(net, batches(), directory=tmp_path)
    one_changed = copy.deepcopy(net)
    with torch.no_grad():
        one_changed.blocks[1].o.weight[0, 0] += 1e-6
    calibrated.require({name: net.get_submodule(name) for name in TARGETS})
    with pytest.raises(ValueError, match=r"blocks\.1\.o: the calibration belongs to another model"):
        calibrated.require({name: one_changed.get_submodule(name) for name in TARGETS})
    with pytest.raises(ValueError, match=r"blocks\.2\.o: .*\(or does not cover this layer\)"):
        calibrated.require({"blocks.2.o": net.blocks[1].o})
    with pytest.raises(ValueError, match=r"blocks\.1\.o: .* holds the calibration of another model"):
        calibrate(one_changed, batches(), directory=tmp_path)


@pytest.mark.parametrize("option", [{"seed": 1}, {"gradients": None}])
def test_other_settings_need_another_folder(option: dict[str, Any], tmp_path: Path) -> None:
    net = reference.tiny_net(21)
    calibrate(net, batches(), directory=tmp_path)
    with pytest.raises(ValueError, match=r"holds a calibration with .* Use another folder"):
        calibrate(net, batches(), directory=tmp_path, **option)
    assert set(Calibration.load(tmp_path).layers) == set(TARGETS)


def test_another_format(tmp_path: Path) -> None:
    net = reference.tiny_net(23)
    calibrate(net, batches(), directory=tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ValueError, match="must have format 6, got 99"):
        Calibration.load(tmp_path)
    with pytest.raises(ValueError, match="must have format 6, got 99"):
        calibrate(net, batches(), directory=tmp_path)


def other_data(kind: str) -> Any:
    if kind == "another first batch":
        return batches(seed=70)
    if kind == "fewer batches":
        return batches(2)
    if kind == "another type":
        return [x.double() for x in batches()]
    dataset = torch.utils.data.TensorDataset(torch.cat(batches(seed=70)))
    return torch.utils.data.DataLoader(dataset, batch_size=4)


@pytest.mark.parametrize("kind", ["another first batch", "fewer batches", "another type", "loader in order"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_data_need_another_folder(
    kind: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = reference.tiny_net(21)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "save_file", crash_at(100 if finished else 5, calibration.save_file))
        with nullcontext() if finished else pytest.raises(Interrupted):
            calibrate(net, batches(), directory=tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"holds a calibration on other data: .* got \d+. Use another folder"):
        calibrate(net, other_data(kind), directory=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(calibrate(net, batches()), calibrate(net, batches(), directory=tmp_path))


def test_data_in_random_order_are_compared_by_their_number_only(tmp_path: Path) -> None:
    net, dataset = reference.tiny_net(21), torch.utils.data.TensorDataset(torch.cat(batches()))
    shuffled = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    first = calibrate(net, shuffled, directory=tmp_path)
    assert_same(first, calibrate(net, shuffled, directory=tmp_path))
    with pytest.raises(ValueError, match=r"on other data: batches 3, got 2\."):
        calibrate(net, shuffled, directory=tmp_path, max_batches=2)


def test_batches_with_words_and_numbers_are_told_apart() -> None:
    batch = {"x": torch.zeros(2, 3), "name": "a", "scale": 1.0}
    assert describe_data([batch], None) == describe_data([dict(batch)], 5)
    others = [{**batch, "name": "b"}, {**batch, "scale": 2.0}, {**batch, "x": torch.zeros(3, 2)}]
    assert len({describe_data([other], None)["first_batch"] for other in [batch, *others]}) == 4


@pytest.mark.parametrize("made", [BatchEncoding, BatchFeature, lambda batch: (BatchEncoding(batch), torch.ones(2))])
def test_what_tokenizers_and_processors_give_is_told_apart(made: Any) -> None:
    first, other = [describe_data([made({"x": torch.full((2, 3), value)})], None) for value in (0.0, 1.0)]
    assert first != other
    if isinstance(made, type):
        assert first == describe_data([{"x": torch.zeros(2, 3)}], None)


def test_a_stream_is_as_long_as_it_may_be() -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    assert [describe_data(loader, limit)["batches"] for limit in (None, 2)] == [None, 2]


@pytest.mark.parametrize("change", ["another architecture", "another shape", "a layer that is not asked for"])
def test_a_folder_of_another_model(change: str, tmp_path: Path) -> None:
    """Even where the layers that are asked for now are not those in the folder."""
    net = reference.tiny_net(21)
    calibrate(net, batches(), WasiConfig(residual=None, target_modules=["o"]), directory=tmp_path)
    other, asked = copy.deepcopy(net), ["fc1"]
    if change == "another architecture":
        other, asked = TwoRates(), ["often"]
    elif change == "another shape":
        other.blocks[0].o = nn.Linear(8, 9)
    else:
        other.blocks[1].o.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"blocks\.[01]\.o: .* holds the calibration of another model"):
        calibrate(other, batches(), WasiConfig(residual=None, target_modules=asked), directory=tmp_path)
    assert set(Calibration.load(tmp_path).layers) == {"blocks.0.o", "blocks.1.o"}


def test_a_folder_with_more_layers_gives_those_that_are_asked_for(tmp_path: Path) -> None:
    net, data = reference.tiny_net(21), batches()
    calibrate(net, data, directory=tmp_path)
    config = WasiConfig(residual=None, target_modules=["o", "fc2"])
    assert_same(calibrate(net, data, config), calibrate(net, data, config, directory=tmp_path))
    assert set(Calibration.load(tmp_path).layers) == set(TARGETS)


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda index: [index], "must be a JSON object, got list"),
    "no complete": (lambda index: {k: v for k, v in index.items() if k != "complete"}, "it misses 'complete'"),
    "no layers": (lambda index: {k: v for k, v in index.items() if k != "layers"}, "it misses 'layers'"),
    "complete by a word": (lambda index: {**index, "complete": "yes"}, "must be of type bool, got 'yes'"),
    "an entry that is a number": (lambda index: {**index, "layers": {"blocks.0.o": 3}}, "blocks.0.o must be a JSON"),
    "an entry without its file": (
        lambda index: {**index, "layers": {"blocks.0.o": {"shape": [8, 8]}}},
        "the entry of blocks.0.o must have the keys .* it misses 'file'",
    ),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "no JSON", "empty", "outside", "no safetensors file"])
def test_a_damaged_folder(damage: str, tmp_path: Path) -> None:
    net, path = reference.tiny_net(21), tmp_path / "index.json"
    calibrate(net, batches(), directory=tmp_path)
    index = json.loads(path.read_text())
    if damage in ("outside", "no safetensors file"):
        named = {"outside": "../00001.safetensors", "no safetensors file": "index.json"}[damage]
        index["layers"]["blocks.1.o"]["file"] = named
        path.write_text(json.dumps(index))
        message = rf"index\.json must name safetensors files in the folder, got '{re.escape(named)}' for blocks\.1\.o"
    elif damage in DAMAGES:
        change, message = DAMAGES[damage]
        path.write_text(json.dumps(change(index)))
    else:
        path.write_text("" if damage == "empty" else path.read_text()[:100])
        message = r"index\.json must be the JSON index of a calibration, got"
    for read in (Calibration.load, lambda folder: calibrate(net, batches(), directory=folder)):
        with pytest.raises(ValueError, match=message) as refused:
            read(tmp_path)
        assert str(path) in str(refused.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def of_another_size(path: Path) -> None:
    save_file({"energies": torch.zeros(3), "mean": torch.zeros(2)}, path, metadata={"layer": "blocks.1.o"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"file of blocks\.1\.o is missing\. Run calibrate_wasi again"),
        (cut, r"file of blocks\.1\.o is damaged"),
        (of_another_size, r"file of blocks\.1\.o must be of a \[8, 8\] weight"),
    ],
)
def test_a_damaged_file_of_a_layer_is_measured_again(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = reference.tiny_net(21)
    calibrated = calibrate(net, batches(), directory=tmp_path)
    whole = {each.name: each for each in calibrated.spectra()}
    damage(Path(calibrated._path("blocks.1.o")))
    with pytest.raises(ValueError, match=message):
        Calibration.load(tmp_path)
    data = CountedData(batches())
    calibrate(net, data, directory=tmp_path)
    assert data.passes == 1 and "It is measured again" in caplog.text
    assert {each.name: each for each in Calibration.load(tmp_path).spectra()} == whole


def test_files_of_two_layers_swapped(tmp_path: Path) -> None:
    net, path = reference.tiny_net(21), tmp_path / "index.json"
    calibrate(net, batches(), directory=tmp_path)
    index = json.loads(path.read_text())
    first, second = (index["layers"][name] for name in ("blocks.0.o", "blocks.1.o"))
    first["file"], second["file"] = second["file"], first["file"]
    path.write_text(json.dumps(index))
    for read in (Calibration.load, lambda folder: calibrate(net, batches(), directory=folder)):
        with pytest.raises(ValueError, match=r"must be the file of blocks\.0\.o, as the index says, got that of 'bl"):
            read(tmp_path)


def test_an_entry_that_was_lost_takes_no_file_of_another_layer(tmp_path: Path) -> None:
    net, path = reference.tiny_net(21), tmp_path / "index.json"
    whole = calibrate(net, batches(), directory=tmp_path).spectra()
    index = json.loads(path.read_text())
    del index["layers"]["blocks.0.o"]
    path.write_text(json.dumps({**index, "complete": False}))
    again = calibrate(net, batches(), directory=tmp_path)
    assert {spectrum.name: spectrum for spectrum in again.spectra()} == {each.name: each for each in whole}
    files = [entry["file"] for entry in json.loads(path.read_text())["layers"].values()]
    assert len(files) == len(set(files)) == len(TARGETS)


def test_an_adapted_model_is_refused() -> None:
    model = get_peft_model(reference.tiny_net(25), WasiConfig(residual=None, weight_rank=3, base_weight="keep"))
    with pytest.raises(ValueError, match="already a WASI layer; calibration needs the dense model"):
        calibrate(model.base_model.model, batches())
