"""Calibrated factors against the whitening reference; collecting, saving, and every way to get it wrong."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from peft import get_peft_model
from strategies import normal, orthonormal, orthonormality_error, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, WasiLayer, calibration, preprocess_wasi
from wasi_peft.calibration import InputStatistics, calibrated_factors
from wasi_peft.layer import InitialFactors, wasi_layers
from wasi_peft.model import INITIAL_FACTORS

QKV = ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
TARGETS = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("q", "k", "v", "o", "fc1", "fc2")]
INPUTS = 8  # per block: q k v share one, then o, fc1 and fc2


def anisotropic(rows: int, features: int, seed: int, mean: float = 1.0) -> Tensor:
    """Inputs with energies over two decades in a random basis, and a mean that is not zero; float64."""
    scales = torch.logspace(0.5, -1.5, features, dtype=torch.float64)
    basis = orthonormal(features, features, seed)
    return (normal(rows, features, seed=seed + 1) * scales) @ basis.T + mean * normal(features, seed=seed + 2)


def statistics_of(x: Tensor) -> InputStatistics:
    """Statistics of one input, as collected."""
    size = x.shape[-1]
    statistics = InputStatistics(torch.zeros(size, size), torch.zeros(size))
    statistics.update(x.float())
    return statistics


def batches(count: int = 3, samples: int = 4, seed: int = 0) -> list[Tensor]:
    """Calibration data for the tiny network."""
    return [anisotropic(samples * 5, 8, seed + index).reshape(samples, 5, 8).float() for index in range(count)]


def run(net: nn.Module, config: WasiConfig, data: Any = None, **options: Any) -> None:
    """`preprocess_wasi` without progress bars."""
    preprocess_wasi(net, config, data, progress_bar=False, **options)


def prepared(net: nn.Module) -> dict[str, InitialFactors]:
    """What calibration left on the modules, by name."""
    return {
        name: module.__dict__[INITIAL_FACTORS].initial
        for name, module in net.named_modules()
        if INITIAL_FACTORS in module.__dict__
    }


def assert_same_factors(first: dict[str, InitialFactors], second: dict[str, InitialFactors]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys() and first
    for name, factors in first.items():
        other = second[name]
        assert torch.equal(factors.L, other.L) and torch.equal(factors.R, other.R), name
        assert (factors.bias is None) == (other.bias is None)
        assert factors.bias is None or other.bias is None or torch.equal(factors.bias, other.bias)


def inputs_of(net: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """Rows that every target reads, recorded without the package."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name in TARGETS:

        def record(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

        handles.append(net.get_submodule(name).register_forward_pre_hook(record))
    with torch.no_grad():
        for x in data:
            net(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def output_error(x: Tensor, linear: nn.Module, L: Tensor, R: Tensor, bias: Tensor | None) -> float:
    """Mean squared error of the factored layer's output."""
    dense = torch.from_numpy(reference.linear_forward(x.numpy(), linear.weight.detach().double().numpy(), None))
    factored = x @ (L.double() @ R.double()).T
    if linear.bias is not None:
        assert bias is not None
        dense, factored = dense + linear.bias.detach().double(), factored + bias.detach().double()
    return float((dense - factored).detach().square().sum() / x.shape[0])


# -------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize(("out_features", "in_features"), [(10, 14), (14, 10), (12, 12)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0])
def test_factors_are_those_of_the_reference_whitening(out_features: int, in_features: int, mean: float) -> None:
    """With a bias the covariance whitens and the bias takes up the mean; without, the second moment does."""
    weight, bias = normal(out_features, in_features, seed=1), normal(out_features, seed=2)
    x = anisotropic(400, in_features, seed=3, mean=mean)
    center = x.mean(0)
    covariance = (x - center).T @ (x - center) / x.shape[0]
    second_moment = x.T @ x / x.shape[0]
    for rank in (2, 5, min(out_features, in_features)):
        initial = calibrated_factors(weight, bias, statistics_of(x), rank)
        L, R, _ = reference.whitened_svd(weight, covariance, rank)
        assert relative_error(initial.L @ initial.R, L @ R) < 1e-4
        assert orthonormality_error(initial.L) < 1e-10
        assert initial.bias is not None
        assert relative_error(initial.bias, bias + (weight - L @ R) @ center) < 1e-4

        plain = calibrated_factors(weight, None, statistics_of(x), rank)
        L, R, _ = reference.whitened_svd(weight, second_moment, rank)
        assert relative_error(plain.L @ plain.R, L @ R) < 1e-4
        assert plain.bias is None


def test_the_mean_corrected_bias_is_the_best_one() -> None:
    """Its error has mean zero, so no other bias does better; the uncorrected ones do worse."""
    linear = nn.Linear(14, 10).double()
    x = anisotropic(400, 14, seed=4, mean=3.0)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    initial = calibrated_factors(weight, bias, statistics_of(x), 4)
    assert initial.bias is not None
    residual = x @ (weight - initial.L @ initial.R).T + bias - initial.bias
    assert float(residual.mean(0).norm()) < 1e-4 * float(residual.norm(dim=1).mean())

    best = output_error(x, linear, initial.L, initial.R, initial.bias)
    second_moment = x.T @ x / x.shape[0]
    whitened = reference.whitened_svd(weight, second_moment, 4)[:2]
    plain = reference.truncated_svd(weight, 4)
    assert best < 0.98 * output_error(x, linear, *whitened, bias)
    assert best < 0.5 * output_error(x, linear, *plain, bias)
    assert best < 0.98 * output_error(x, linear, initial.L, initial.R, bias)


def test_statistics_over_several_batches_of_any_shape() -> None:
    x = anisotropic(60, 6, seed=5)
    statistics = InputStatistics(torch.zeros(6, 6), torch.zeros(6))
    for part in (x[:20].reshape(4, 5, 6), x[20:50].reshape(1, 2, 15, 6), x[50:59], x[59]):
        statistics.update(part.float())
    second_moment, mean = statistics.moments()
    assert statistics.rows == 60
    assert (second_moment.dtype, mean.dtype) == (torch.float64, torch.float64)
    assert relative_error(second_moment, x.T @ x / 60) < 1e-6
    assert relative_error(mean, x.mean(0)) < 1e-6


def test_low_precision_inputs_are_summed_in_float32() -> None:
    """Adding one more row to a large bfloat16 sum would change nothing."""
    statistics = InputStatistics(torch.zeros(2, 2), torch.zeros(2))
    for _ in range(20):
        statistics.update(torch.ones(100, 2, dtype=torch.bfloat16))
    second_moment, mean = statistics.moments()
    assert second_moment.tolist() == [[1.0, 1.0], [1.0, 1.0]] and mean.tolist() == [1.0, 1.0]


# -------------------------------------------------------------------------------- a model


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_layer_gets_the_reference_factors(bias: bool) -> None:
    net = reference.tiny_net(1, bias=bias)
    data = batches()
    recorded = inputs_of(net, data)
    run(net, WasiConfig(weight_rank=3), data)
    factors = prepared(net)
    assert set(factors) == set(TARGETS)
    for name, initial in factors.items():
        linear, x = net.get_submodule(name), recorded[name]
        center = x.mean(0) if bias else torch.zeros(x.shape[1], dtype=torch.float64)
        moment = (x - center).T @ (x - center) / x.shape[0]
        weight = linear.weight.detach().double()
        L, R, energies = reference.whitened_svd(weight, moment, 3, jitter=1e-9)
        error, dropped = output_error(x, linear, initial.L, initial.R, initial.bias), float(energies[3:].sum())
        assert error == pytest.approx(dropped, rel=1e-2, abs=1e-6 * float(energies.sum()))
        assert relative_error(initial.L.double() @ initial.R.double(), L @ R) < 1e-2
        plain = output_error(x, linear, *reference.truncated_svd(weight, 3), linear.bias)
        assert error < plain


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_injection_uses_and_consumes_the_factors(bias: bool) -> None:
    net = reference.tiny_net(2, bias=bias)
    dense = copy.deepcopy(net)
    data = batches()
    run(net, WasiConfig(weight_rank=3), data)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), dense.parameters(), strict=True))
    expected = prepared(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the advice to calibrate first would be wrong here
        model = get_peft_model(net, WasiConfig(weight_rank=3))
    layers = dict(wasi_layers(model.base_model.model))
    assert set(layers) == set(TARGETS)
    for name, layer in layers.items():
        initial = expected[name]
        assert torch.equal(layer.wasi_L["default"], initial.L) and torch.equal(layer.wasi_R["default"], initial.R)
        assert ("default" in layer.wasi_bias) == bias
        if initial.bias is not None:
            assert torch.equal(layer.wasi_bias["default"], initial.bias)
    assert prepared(model) == {}
    plain = get_peft_model(copy.deepcopy(dense), WasiConfig(weight_rank=3))
    with torch.no_grad():
        x = torch.cat(data)
        errors = [float((other(x) - dense(x)).square().mean()) for other in (model, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("threshold", [0.8, 0.99])
def test_the_threshold_is_the_kept_share_of_the_outputs_energy(threshold: float) -> None:
    net, data = reference.tiny_net(3), batches()
    recorded = inputs_of(net, data)
    run(net, WasiConfig(explained_variance_threshold=threshold), data)
    for name, initial in prepared(net).items():
        linear = net.get_submodule(name)
        x = recorded[name] - recorded[name].mean(0)
        total = float((x @ linear.weight.detach().double().T).square().sum() / x.shape[0])
        assert output_error(recorded[name], linear, initial.L, initial.R, initial.bias) <= (1 - threshold) * total * (
            1 + 1e-3
        )
        if initial.L.shape[1] > 1:
            smaller = calibrated_factors(
                linear.weight, linear.bias, statistics_of(recorded[name]), initial.L.shape[1] - 1
            )
            assert output_error(recorded[name], linear, smaller.L, smaller.R, smaller.bias) > (
                1 - threshold
            ) * total * (1 - 1e-3)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "dicts", "loader", "function", "max_batches"])
def test_kinds_of_data_give_the_same_factors(kind: str) -> None:
    net, data = reference.tiny_net(4), batches()
    other = copy.deepcopy(net)
    options: dict[str, Any] = {}
    given: Any = data
    if kind == "tuples":
        given = [(x, torch.zeros(4)) for x in data]
    elif kind == "dicts":
        given = [{"x": x, "labels": torch.zeros(4)} for x in data]
    elif kind == "loader":
        dataset = torch.utils.data.TensorDataset(torch.cat(data))
        given = torch.utils.data.DataLoader(dataset, batch_size=4)
    elif kind == "function":

        def given() -> None:
            for x in data:
                other(x)

    elif kind == "max_batches":
        given, options = [*data, *batches(seed=50)], {"max_batches": 3}
    run(net, WasiConfig(weight_rank=3), data)
    run(other, WasiConfig(weight_rank=3), given, **options)
    assert_same_factors(prepared(net), prepared(other))


class CountedData:
    """Batches that count how often they are iterated."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1  # at the first batch, not where an iterator is only asked for
        yield from self.data


# with 8 features an accumulator takes 4 * 8 * 9 = 288 bytes, with 12 features 624
@pytest.mark.parametrize(("limit", "passes"), [(2**30, 1), (1, INPUTS), (600, None)])
def test_several_passes_give_the_same_factors_as_one(limit: int, passes: int | None, tmp_path: Path) -> None:
    net, data = reference.tiny_net(5), CountedData(batches())
    other = copy.deepcopy(net)
    run(net, WasiConfig(weight_rank=3), data.data)
    run(other, WasiConfig(weight_rank=3), data, max_memory_bytes=limit, statistics_dir=tmp_path)
    assert_same_factors(prepared(net), prepared(other))
    assert data.passes == passes if passes is not None else 1 < data.passes < INPUTS
    entries = json.loads((tmp_path / "index.json").read_text())["inputs"]
    assert len(entries) == INPUTS


def test_layers_that_read_one_tensor_share_an_accumulator(tmp_path: Path) -> None:
    net = reference.tiny_net(6)
    run(net, WasiConfig(weight_rank=3), batches(count=2), statistics_dir=tmp_path)
    entries = json.loads((tmp_path / "index.json").read_text())["inputs"]
    groups = [sorted(entry["modules"]) for entry in entries]
    assert sorted(QKV) in groups
    assert sorted(name for group in groups for name in group) == sorted(TARGETS)
    assert sorted(map(len, groups)) == [1] * 6 + [3] * 2
    assert {entry["rows"] for entry in entries} == {2 * 4 * 5}  # every row once, not once per reader
    assert len(list(tmp_path.glob("*.safetensors"))) == INPUTS


class ChangesItsInput(nn.Module):
    """Two layers read the same tensor, which is changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = self.first(x)
        return first + self.second(x.relu_())


def test_a_tensor_changed_in_place_is_another_input() -> None:
    net, data = ChangesItsInput(), batches()
    run(net, WasiConfig(weight_rank=3, target_modules=["first", "second"]), data)
    rows = torch.cat(data).reshape(-1, 8)
    for name, x in (("first", rows), ("second", rows.relu())):
        linear, initial = net.get_submodule(name), prepared(net)[name]
        expected = calibrated_factors(linear.weight.detach(), linear.bias, statistics_of(x), 3)
        assert relative_error(initial.L @ initial.R, expected.L @ expected.R) < 1e-4


def test_bias_correction_is_off_for_layers_without_bias() -> None:
    """A layer keeps the structure that its architecture says."""
    net, data = reference.tiny_net(7, bias=False), batches()
    run(net, WasiConfig(weight_rank=3), data)
    assert all(initial.bias is None for initial in prepared(net).values())
    model = get_peft_model(net, WasiConfig(weight_rank=3))
    assert not [name for name, _ in model.named_parameters() if "wasi_bias" in name]


# -------------------------------------------------------------------------------- saving


def test_saved_statistics_give_the_same_factors_at_any_rank(tmp_path: Path) -> None:
    net, data = reference.tiny_net(8), batches()
    config, other_config = WasiConfig(weight_rank=3), WasiConfig(explained_variance_threshold=0.9)
    nets = [copy.deepcopy(net) for _ in range(3)]
    run(net, config, data, statistics_dir=tmp_path)
    run(nets[0], config, statistics_dir=tmp_path)
    assert_same_factors(prepared(net), prepared(nets[0]))
    run(nets[1], other_config, data)
    run(nets[2], other_config, statistics_dir=tmp_path)
    assert_same_factors(prepared(nets[1]), prepared(nets[2]))


def test_saved_statistics_serve_a_part_of_the_targets(tmp_path: Path) -> None:
    net = reference.tiny_net(9)
    other = copy.deepcopy(net)
    run(net, WasiConfig(weight_rank=3), batches(), statistics_dir=tmp_path)
    run(other, WasiConfig(weight_rank=3, target_modules=["k", "fc2"]), statistics_dir=tmp_path)
    expected = {name: initial for name, initial in prepared(net).items() if name.endswith((".k", ".fc2"))}
    assert_same_factors(expected, prepared(other))


def test_saving_again_replaces_the_old_statistics(tmp_path: Path) -> None:
    net = reference.tiny_net(10)
    first, second, loaded = (copy.deepcopy(net) for _ in range(3))
    run(first, WasiConfig(weight_rank=3), batches(seed=0), statistics_dir=tmp_path)
    run(second, WasiConfig(weight_rank=3), batches(seed=40), statistics_dir=tmp_path)
    run(loaded, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    assert_same_factors(prepared(second), prepared(loaded))
    assert not torch.equal(prepared(first)["blocks.0.q"].R, prepared(second)["blocks.0.q"].R)
    assert len(list(tmp_path.iterdir())) == INPUTS + 1  # and nothing is left over


class Interrupted(RuntimeError):
    """Stands for a crash."""


@pytest.mark.parametrize("moment", ["data", "file", "index", "replace"])
def test_an_interrupted_save_leaves_the_old_folder_valid(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = reference.tiny_net(11)
    old, crashed, loaded = (copy.deepcopy(net) for _ in range(3))
    run(old, WasiConfig(weight_rank=3), batches(seed=0), statistics_dir=tmp_path)
    calls = 0

    def crash_at_the_third(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise Interrupted
            return function(*args, **kwargs)

        return wrapped

    def crash(*_: Any, **__: Any) -> None:
        raise Interrupted

    def data() -> None:
        for x in batches(seed=40):
            crashed(x)

    if moment == "data":
        data = crash_at_the_third(data)
    with monkeypatch.context() as patch:
        if moment == "file":
            patch.setattr("wasi_peft.calibration.save_file", crash_at_the_third(calibration.save_file))
        elif moment == "index":
            patch.setattr("wasi_peft.calibration.json.dump", crash)
        elif moment == "replace":
            patch.setattr("wasi_peft.calibration.os.replace", crash)
        with pytest.raises(Interrupted):
            run(crashed, WasiConfig(weight_rank=3), data, statistics_dir=tmp_path, max_memory_bytes=1)
    assert prepared(crashed) == {}
    run(loaded, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    assert_same_factors(prepared(old), prepared(loaded))


@pytest.mark.parametrize("moment", ["json.dump", "os.replace"])
def test_leftovers_of_an_interrupted_save_are_removed_by_the_next(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = reference.tiny_net(27)

    def crash(*_: Any, **__: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(f"wasi_peft.calibration.{moment}", crash)
        with pytest.raises(Interrupted):
            run(net, WasiConfig(weight_rank=3), batches(), statistics_dir=tmp_path)
    run(net, WasiConfig(weight_rank=3), batches(), statistics_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == INPUTS + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    net = reference.tiny_net(12, dtype)
    other, data = copy.deepcopy(net), [x.to(dtype) for x in batches()]
    run(net, WasiConfig(weight_rank=3), data, statistics_dir=tmp_path)
    run(other, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    assert_same_factors(prepared(net), prepared(other))
    assert prepared(net)["blocks.0.q"].L.dtype == dtype


# -------------------------------------------------------------------------------- errors


class Untouched:
    """Remembers everything about a model that calibration could leave changed."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        for index, module in enumerate(net.modules()):
            module.training = index % 2 == 0  # a mixture, to be found again
        self.state = self._state()
        self.values = {name: value.clone() for name, value in net.state_dict().items()}

    def _state(self) -> list[Any]:
        return [
            (name, type(module), module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in self.net.named_modules()
        ]

    def check(self) -> None:
        """Everything is as it was."""
        assert self._state() == self.state
        assert self.net.state_dict().keys() == self.values.keys()
        for name, value in self.net.state_dict().items():
            assert torch.equal(value, self.values[name]) or bool(value.isnan().any())


def test_success_restores_training_flags_and_hooks() -> None:
    net = reference.tiny_net(13)
    untouched = Untouched(net)
    run(net, WasiConfig(weight_rank=3), batches(), max_memory_bytes=1)
    untouched.check()
    assert set(prepared(net)) == set(TARGETS)


def with_nan(data: list[Tensor]) -> list[Tensor]:
    data[1][0, 2, 3] = float("nan")
    return data


BAD_DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: [], "at least one batch, got none"),
    "iterator": (lambda: iter(batches()), "got an iterator"),
    "generator": (lambda: (x for x in batches()), "got an iterator"),
    "nan": (lambda: with_nan(batches()), "NaN or Inf on the calibration data"),
    "inf": (lambda: [torch.full((1, 5, 8), float("inf"))], "NaN or Inf on the calibration data"),
    "function that does nothing": (lambda: lambda: None, "never reached this layer"),
    "labels only": (lambda: [{"labels": torch.zeros(4)}], r"must hold model inputs, got only \['labels'\]"),
    "strings": (lambda: ["a text"], "must be dicts, tensors or tuples of tensors"),
    "no rows": (lambda: [torch.zeros(0, 5, 8)], "never reached this layer|at least one"),
}


@pytest.mark.parametrize("limit", [2**30, 1], ids=["one pass", "several passes"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case: str, limit: int, tmp_path: Path) -> None:
    make, message = BAD_DATA[case]
    net = reference.tiny_net(14)
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=message):
        run(net, WasiConfig(weight_rank=3), make(), max_memory_bytes=limit, statistics_dir=tmp_path)
    assert prepared(net) == {}
    untouched.check()
    with pytest.raises(ValueError, match="must hold saved calibration statistics"):
        run(net, WasiConfig(weight_rank=3), statistics_dir=tmp_path)


def test_no_batches_allowed() -> None:
    net = reference.tiny_net(15)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        run(net, WasiConfig(weight_rank=3), batches(), max_batches=0)
    assert prepared(net) == {}


def test_an_error_inside_the_model_comes_through() -> None:
    net = reference.tiny_net(16)
    untouched = Untouched(net)
    with pytest.raises(RuntimeError, match="shape"):
        run(net, WasiConfig(weight_rank=3), [*batches(), torch.zeros(2, 5, 7)])
    assert prepared(net) == {}
    untouched.check()


class SkipsLastBlock(reference.TinyNet):
    """Does not run its last block."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(x)).mean(1))


def test_a_layer_that_the_data_never_reach() -> None:
    net = SkipsLastBlock()
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=r"blocks\.1\.q: the calibration data never reached this layer \(6 in all\)"):
        run(net, WasiConfig(weight_rank=3), batches())
    assert prepared(net) == {}
    untouched.check()
    run(net, WasiConfig(weight_rank=3, target_modules=r"blocks\.0\..*(q|k|v|o|fc1|fc2)"), batches())
    assert set(prepared(net)) == set(TARGETS[:6])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight(bad: float) -> None:
    net = reference.tiny_net(17)
    with torch.no_grad():
        net.blocks[1].fc1.weight[2, 1] = bad
    untouched = Untouched(net)
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1: its weight holds NaN or Inf"):
        run(net, WasiConfig(weight_rank=3), batches())
    assert prepared(net) == {}
    untouched.check()


def test_neither_data_nor_folder() -> None:
    net = reference.tiny_net(18)
    with pytest.raises(ValueError, match="needs data, or a statistics_dir to load from; got neither"):
        run(net, WasiConfig(weight_rank=3))
    assert prepared(net) == {}


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_statistics(exists: bool, tmp_path: Path) -> None:
    net = reference.tiny_net(19)
    folder = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(ValueError, match="must hold saved calibration statistics, got"):
        run(net, WasiConfig(weight_rank=3), statistics_dir=folder)
    assert prepared(net) == {}


def test_statistics_of_another_model(tmp_path: Path) -> None:
    run(reference.tiny_net(20), WasiConfig(weight_rank=3), batches(), statistics_dir=tmp_path)
    other = reference.tiny_net(21)
    with pytest.raises(ValueError, match="the saved statistics belong to another model"):
        run(other, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    one_changed = reference.tiny_net(20)
    with torch.no_grad():
        one_changed.blocks[1].o.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"blocks\.1\.o: the saved statistics belong to another model"):
        run(one_changed, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    assert prepared(other) == {} and prepared(one_changed) == {}


def test_statistics_that_do_not_cover_a_layer(tmp_path: Path) -> None:
    net = reference.tiny_net(22)
    other = copy.deepcopy(net)
    run(net, WasiConfig(weight_rank=3, target_modules=["q", "k"]), batches(), statistics_dir=tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1: the saved statistics .* \(or do not cover this layer\)"):
        run(other, WasiConfig(weight_rank=3, target_modules=["q", "fc1"]), statistics_dir=tmp_path)
    assert prepared(other) == {}


def test_another_format(tmp_path: Path) -> None:
    net = reference.tiny_net(23)
    run(copy.deepcopy(net), WasiConfig(weight_rank=3), batches(), statistics_dir=tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ValueError, match="must have format 1, got 99"):
        run(net, WasiConfig(weight_rank=3), statistics_dir=tmp_path)
    assert prepared(net) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weight_rank": 3}, {"weight_rank": 4}),
        ({"weight_rank": 3}, {"explained_variance_threshold": 0.9}),
        ({"explained_variance_threshold": 0.9}, {"explained_variance_threshold": 0.95}),
        ({"weight_rank": 3}, {"weight_rank": 3, "rank_pattern": {"fc2": 2}}),
    ],
)
def test_a_rank_that_changed_before_the_injection(before: dict[str, Any], after: dict[str, Any]) -> None:
    net = reference.tiny_net(24)
    run(net, WasiConfig(**before), batches())
    kept = prepared(net)
    untouched = Untouched(net)
    with pytest.raises(ValueError, match="Run preprocess_wasi again with this configuration"):
        get_peft_model(net, WasiConfig(**after))
    untouched.check()
    assert not any(isinstance(module, WasiLayer) for module in net.modules())
    assert_same_factors(prepared(net), kept)
    run(net, WasiConfig(**after), batches())
    model = get_peft_model(net, WasiConfig(**after))
    assert len(list(wasi_layers(model))) == len(TARGETS)


def test_an_adapted_model_is_refused() -> None:
    net = reference.tiny_net(25)
    model = get_peft_model(net, WasiConfig(weight_rank=3, base_weight="keep"))
    with pytest.raises(ValueError, match="already a WASI layer; preprocess_wasi needs the dense model"):
        run(model.base_model.model, WasiConfig(weight_rank=3), batches())


def test_a_failed_run_keeps_the_factors_of_an_earlier_one() -> None:
    net = reference.tiny_net(26)
    run(net, WasiConfig(weight_rank=3), batches())
    kept = prepared(net)
    with pytest.raises(ValueError, match="NaN or Inf"):
        run(net, WasiConfig(weight_rank=4), with_nan(batches()))
    assert_same_factors(prepared(net), kept)
