"""Additions that start as what rounding loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from strategies import relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, WasiFactors, preprocess_wasi, repair_blocks, repair_factors, repair_tokens
from wasi_peft.factors.statistics import InputStatistics
from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.linalg.coordinates import DAMPING, correction
from wasi_peft.tuner.layer import wasi_layers

SIZE = 64


class Net(nn.Module):
    """Two layers, whose first sees inputs of very different sizes with a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 48), nn.Linear(48, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 1, SIZE, dtype=torch.float64)
    return [torch.randn(100, SIZE, generator=generator, dtype=torch.float64) * sizes + 1 for _ in range(4)]


def prepared(model: nn.Module, **options: Any) -> tuple[WasiConfig, WasiFactors]:
    config = WasiConfig(**{"target_modules": ["first", "second"], "weight_rank": 6, **options})
    return config, preprocess_wasi(model, config, batches(), progress_bar=False)


def exact_correction(lost: Tensor, rank: int, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of the output and all singular values, by the root of the damped moment, and that moment."""
    damped = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    U, S, _ = torch.linalg.svd(lost @ torch.linalg.cholesky(damped), full_matrices=False)
    return U[:, :rank], S, damped


@pytest.mark.parametrize("rows", [10, 500], ids=["fewer rows than inputs", "more rows"])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_correction_is_the_best_of_its_rank(shape: tuple[int, int], rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    lost = torch.randn(*shape, generator=generator, dtype=torch.float64)
    spread = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = torch.randn(rows, shape[1], generator=generator, dtype=torch.float64) @ spread
    statistics = InputStatistics.of_width("layer", shape[1])
    for part in x.split(7):
        statistics.update(part)
    C = x.T @ x / rows
    L, R = correction(lost, 5, statistics.times, statistics.mean_square)
    U, S, damped = exact_correction(lost, 5, C)
    left = lost - L @ R
    assert float(torch.trace(left @ damped @ left.T)) == pytest.approx(float(S[5:].square().sum()), rel=1e-3)
    angles = torch.linalg.svdvals(U.T @ torch.linalg.qr(L).Q)
    assert float(angles.min()) > 1 - 1e-2  # the same directions of the output
    image = R @ damped @ R.T
    assert relative_error(image, torch.eye(5, dtype=torch.float64) * C.diagonal().mean()) < 1e-5


@pytest.mark.parametrize("left", [0, 2])
def test_directions_in_which_nothing_was_lost_still_train(left: int) -> None:
    """Their rows are white beside the others, and they answer nothing at first."""
    generator = torch.Generator().manual_seed(3)
    lost = torch.randn(12, left, generator=generator) @ torch.randn(left, 9, generator=generator)
    spread = torch.randn(9, 9, generator=generator).double()
    C = spread @ spread.T
    L, R = correction(lost.double(), 4, lambda columns: C @ columns, float(C.diagonal().mean()))
    assert relative_error(L @ R, lost.double()) < 1e-4 if left else not bool(L.any())
    assert [bool(column.any()) for column in L.T] == [True] * left + [False] * (4 - left)
    damped = C + DAMPING * C.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    white = torch.eye(4, dtype=torch.float64) * C.diagonal().mean()
    assert relative_error(R @ damped @ R.T, white) < 1e-6


@pytest.mark.parametrize("residual", ["int8", "int4"])
def test_prepared_additions_make_good_for_what_rounding_loses(residual: str) -> None:
    x, expected = torch.cat(batches()), net()(torch.cat(batches()))
    model = net()
    config, _ = prepared(model, residual=residual)
    model, plain = get_peft_model(model, config), get_peft_model(net(), config)
    error, without = relative_error(model(x), expected), relative_error(plain(x), expected)
    assert 0 < error < 0.75 * without


def test_the_bias_makes_good_for_the_mean() -> None:
    model, dense = net(), net()
    _, factors = prepared(model, residual="int4")
    layer = factors.initial["first"]
    mean = torch.cat(batches()).mean(0)
    lost = dense.first.weight.detach() - RESIDUALS["int4"](dense.first).dense_weight() - layer.L @ layer.R
    assert layer.bias is not None and factors.initial["second"].bias is None
    assert relative_error(layer.bias - dense.first.bias.detach(), lost @ mean) < 1e-5


def test_beside_an_exact_weight_they_start_at_zero_in_white_coordinates() -> None:
    model = net()
    config, factors = prepared(model, residual="exact")
    x = torch.cat(batches())
    first = factors.initial["first"]
    assert not bool(first.L.any())
    image = x @ first.R.T
    moment = image.T @ image / len(x)
    assert relative_error(moment / moment.diagonal().mean(), torch.eye(6)) < 0.1
    adapted = get_peft_model(model, config)
    assert torch.allclose(adapted(x), net()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", list(RESIDUALS))
def test_what_was_prepared_is_kept_by_the_first_batch(residual: str, tmp_path: Path) -> None:
    model = net()
    config, factors = prepared(model, residual=residual)
    factors.save(tmp_path / "additions")
    other = net()
    WasiFactors.load(tmp_path / "additions").attach(other)
    for each in (model, other):
        adapted = get_peft_model(each, config).train()
        adapted(batches()[0]).sum().backward()
        for name, layer in wasi_layers(adapted):
            initial = factors.initial[name.rpartition(".")[2]]
            assert torch.equal(layer.form.L, initial.L) and torch.equal(layer.form.R, initial.R)


def test_they_are_for_one_residual() -> None:
    model = net()
    config, _ = prepared(model, residual="int4")
    with pytest.raises(ValueError, match=r"first: preprocess_wasi prepared it for residual int4, .* asks for int8"):
        get_peft_model(model, WasiConfig(target_modules=["first", "second"], weight_rank=6))
    get_peft_model(model, config)


def test_repairs_are_for_factors() -> None:
    model = net()
    _, factors = prepared(model)
    for repair in (repair_factors, repair_blocks, repair_tokens):
        with pytest.raises(ValueError, match=f"first: {repair.__name__} is for factors that replace a weight"):
            repair(model, factors, batches())


def test_no_repair_beside_a_residual() -> None:
    config = WasiConfig(target_modules=["first"])
    with pytest.raises(ValueError, match="repair is for factors that replace a weight; leave it out with residual"):
        preprocess_wasi(net(), config, batches(), repair="model", progress_bar=False)
    steps = [preprocess_wasi(net(), config, batches(), repair_steps=n, progress_bar=False).initial for n in (0, 3)]
    assert torch.equal(steps[0]["first"].L, steps[1]["first"].L)  # there is nothing to repair


def test_they_need_data() -> None:
    with pytest.raises(
        ValueError, match="additions to a residual are prepared from data, and nothing else; got no data"
    ):
        preprocess_wasi(net(), WasiConfig(target_modules=["first"]))


def test_several_passes_under_a_bound_of_memory_give_the_same() -> None:
    config = WasiConfig(target_modules=["first", "second"], weight_rank=6, residual="int4")
    one, more = (
        preprocess_wasi(net(), config, batches(), max_memory_bytes=bound, progress_bar=False) for bound in (2**30, 1)
    )
    for name, initial in one.initial.items():
        assert torch.equal(initial.L, more.initial[name].L) and torch.equal(initial.R, more.initial[name].R)
