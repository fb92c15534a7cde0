"""What the tests of calibration, repair and preprocessing share: data, and a check that a model was left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import reference
import torch
from strategies import normal, orthonormal
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.forms.dense import dense_bias, dense_weight
from wasi_peft.linalg.spectra import truncate, weight_spectrum
from wasi_peft.tuner.prepared import ATTACHED, PreparedLayer, WasiFactors
from wasi_peft.tuner.targets import default_target_names
from wasi_peft.updates.base import InitialFactors

LAYERS = ("q", "k", "v", "o", "fc1", "fc2")
TARGETS = [f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]
INPUTS = 8  # per block: q k v share one, then o, fc1 and fc2


def anisotropic(rows: int, features: int, seed: int, mean: float = 1.0) -> Tensor:
    """Inputs with energies over two decades in a random basis, and a mean that is not zero; float64."""
    scales = torch.logspace(0.5, -1.5, features, dtype=torch.float64)
    basis = orthonormal(features, features, seed)
    return (normal(rows, features, seed=seed + 1) * scales) @ basis.T + mean * normal(features, seed=seed + 2)


def batches(count: int = 3, samples: int = 4, seed: int = 0) -> list[Tensor]:
    """Calibration data for :class:`reference.TinyNet`."""
    return [anisotropic(samples * 5, 8, seed + index).reshape(samples, 5, 8).float() for index in range(count)]


def with_nan(data: list[Tensor]) -> list[Tensor]:
    """Batches, one value of the second of which is NaN."""
    data[1][0, 2, 3] = float("nan")
    return data


class CountedData:
    """Batches that count how often they are iterated."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1  # at the first batch, not where an iterator is only asked for
        yield from self.data


class Interrupted(RuntimeError):
    """Stands for a crash."""


def crash_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails at one call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return function(*args, **kwargs)

    return wrapped


class Untouched:
    """Remembers everything about a model that calibration could leave changed."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        for index, module in enumerate(net.modules()):
            module.training = index % 2 == 0  # a mixture, to be found again
        for index, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(index % 3 != 0)
        self.state = self._state()
        self.values = {name: value.clone() for name, value in net.state_dict().items()}
        self.random = torch.get_rng_state()

    def _state(self) -> list[Any]:
        modules = [
            (name, type(module), module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in self.net.named_modules()
        ]
        return modules + [(name, p.requires_grad, p.grad is None) for name, p in self.net.named_parameters()]

    def check(self) -> None:
        """Everything is as it was, torch's global random generator too."""
        assert self._state() == self.state
        assert self.net.state_dict().keys() == self.values.keys()
        for name, value in self.net.state_dict().items():
            assert torch.equal(value, self.values[name]) or bool(value.isnan().any())
        assert torch.equal(torch.get_rng_state(), self.random)


def assert_same_factors(first: dict[str, InitialFactors], second: dict[str, InitialFactors]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys() and first
    for name, factors in first.items():
        other = second[name]
        assert torch.equal(factors.L, other.L) and torch.equal(factors.R, other.R), name
        assert (factors.bias is None) == (other.bias is None)
        assert factors.bias is None or other.bias is None or torch.equal(factors.bias, other.bias)


def prepared(net: nn.Module) -> dict[str, InitialFactors]:
    """What preprocessing left on the modules, by name."""
    return {name: vars(module)[ATTACHED].initial for name, module in net.named_modules() if ATTACHED in vars(module)}


def plain_factors(model: nn.Module, rank: int = 5) -> dict[str, InitialFactors]:
    """Truncated SVD of the default targets."""
    factors = {}
    for name in sorted(default_target_names(model, WasiConfig(residual=None))):
        module = model.get_submodule(name)
        weight, bias = dense_weight(module), dense_bias(module)
        L, R = truncate(weight, weight_spectrum(weight), rank)
        factors[name] = InitialFactors(L.to(weight.dtype), R.to(weight.dtype), bias)
    return factors


def wasi_factors(initial: dict[str, InitialFactors]) -> WasiFactors:
    """Factors as if they had been prepared for `update="factor"` at their ranks."""
    return WasiFactors(
        {name: PreparedLayer(each, each.L.shape[1], each.L.shape[1], None, "factor") for name, each in initial.items()}
    )


def inputs_of(net: nn.Module, data: list[Tensor], names: list[str] = TARGETS) -> dict[str, Tensor]:
    """Rows that layers read, recorded without the package; float64."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:

        def record(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

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
