"""Layers that no data reach: unused, without a row, or with a weight that is read while the layer is not called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig, calibrate_wasi, preprocess_wasi
from wasi_peft.models.calls import features_of

FORMS: dict[str, dict[str, Any]] = {
    "factors": {"explained_variance_threshold": 1.0},
    "both factors train": {"explained_variance_threshold": 1.0, "update": "subspace"},
    "exact": {"residual": "exact"},
    "int8": {"residual": "int8"},
}


class Reads(nn.Module):
    """A block that multiplies by a layer's weight without calling the layer, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.unused = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.called(torch.tanh(F.linear(x, self.read.weight, self.read.bias)))
        return x + y


def reading() -> nn.Module:
    return nn.Sequential(nn.Sequential(Reads(), Reads()), nn.Linear(8, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def mamba() -> nn.Module:
    sizes = {"vocab_size": 23, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 8}
    return tf.MambaModel(tf.MambaConfig(**sizes, pad_token_id=0))


MODELS: dict[str, tuple[Any, Any, int]] = {  # the model, a batch, how many layers no data reach
    "read and unused": (reading, lambda: torch.randn(4, 5, 8), 4),
    "attention of torch": (encoder, lambda: torch.randn(4, 5, 16), 0),
    "mamba": (mamba, lambda: torch.randint(23, (4, 6)), 2),
}


def answer(model: Any, batch: Tensor) -> Tensor:
    return features_of(model(batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MODELS)
def test_they_are_prepared_and_compute_what_they_did(case: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    make, make_batch, count = MODELS[case]
    model, batch = make().eval(), make_batch()
    expected = answer(model, batch)
    config = WasiConfig(**FORMS[form])
    preprocess_wasi(model, config, [batch, batch], repair_steps=0, progress_bar=False)
    lines = [record.getMessage() for record in caplog.records if "never reached" in record.getMessage()]
    assert len(lines) == bool(count) and all(f"({count} in all)" in line for line in lines)
    adapted = get_peft_model(model, config).eval()
    tolerance = 2e-2 if form == "int8" else 1e-4
    torch.testing.assert_close(answer(adapted, batch), expected, atol=tolerance, rtol=tolerance)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(answer(merged, batch), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_through_a_weight_that_is_read_are_those_of_its_form(form: str, tmp_path: Any) -> None:
    """Against a twin that calls the layer."""

    class Calls(Reads):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.called(torch.tanh(self.read(x)))
            return x + y

    model, base = reading(), reading()
    base.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    for block in twin[0]:
        block.__class__ = Calls
    options = {**FORMS[form], "activation_threshold": None, "train_vectors": False}
    if form == "int8":
        options["residual_product"] = "restored"
    x = torch.randn(3, 5, 8)
    pair = [get_peft_model(each, WasiConfig(**options)) for each in (model, twin)]
    for each in pair:
        each.eval()(x).square().sum().backward()
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in pair]
    assert {name for name in gradients[0] if "read" in name}
    for name, gradient in gradients[0].items():
        if form == "both factors train" and ".read." in name and "wasi_" in name:
            continue  # a called layer moves within the tangent space
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)
    pair[0].save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(x), pair[0](x))


def test_a_weight_that_is_read_has_the_dtype_of_the_model() -> None:
    """Factors for training are in float32 beside it."""
    model = reading().to(torch.bfloat16)
    adapted = get_peft_model(model, WasiConfig(weight_rank=4))
    assert adapted.base_model.model[0][0].read.weight.dtype == torch.bfloat16
    y = adapted(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16


def test_factors_without_data_are_repaired_like_others() -> None:
    model, config = reading(), WasiConfig(weight_rank=4, residual=None)
    batches = [torch.randn(4, 5, 8) for _ in range(2)]
    plain = preprocess_wasi(model, config, batches, repair_steps=0, progress_bar=False).initial["0.0.read"]
    repaired = preprocess_wasi(model, config, batches, repair_steps=20, progress_bar=False).initial
    assert not torch.equal(repaired["0.0.read"].L @ repaired["0.0.read"].R, plain.L @ plain.R)
    assert repaired["0.0.read"].moments is None and repaired["0.0.called"].moments is not None


class Expert(nn.Module):
    """Of two experts one gets all rows, the other an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x[:0])])


@pytest.mark.parametrize("gradients", ["features", None])
def test_a_layer_that_meets_no_row(gradients: Any) -> None:
    model = nn.Sequential(nn.Sequential(Expert(), nn.Linear(8, 8)))
    calibration = calibrate_wasi(model, [torch.randn(6, 8)], gradients=gradients, progress_bar=False)
    weight = model.get_submodule("0.0.other").weight.detach().double()
    torch.testing.assert_close(calibration.energies("0.0.other"), torch.linalg.svdvals(weight).square())
    assert calibration.rows == 6


class Constant(nn.Module):
    """Its layers see the same row again and again, up to rounding, and hardly pass a gradient on."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        row = torch.linspace(1, 2, 12) + 1e-9 * x
        y: Tensor = self.second(self.first(self.size * row))
        return 1e-22 * y


@pytest.mark.parametrize("size", [1.0, 1e-21, 1e4])
@pytest.mark.parametrize("options", [{"weight_share": 0.8}, {"weight_rank": 4, "residual": "int4"}])
def test_inputs_that_hardly_change(options: dict[str, Any], size: float) -> None:
    model = nn.Sequential(nn.Sequential(Constant(size)))
    config = WasiConfig(target_modules=["first", "second"], **options)
    batches = [torch.randn(4, 5, 12) for _ in range(2)]
    expected = model(batches[0]).detach() / 1e-22
    factors = preprocess_wasi(model, config, batches, repair_steps=0 if "weight_share" in options else None,
                              progress_bar=False)  # fmt: skip
    assert all(bool(part.isfinite().all()) for each in factors.initial.values() for part in (each.L, each.R))
    answered = get_peft_model(model, config).eval()(batches[0]).detach() / 1e-22
    assert float((answered - expected).norm() / expected.norm()) < 1e-2  # the bias makes up for a mean


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.layers(x)
        y: Tensor = self.head(x)
        return y


def test_without_gradients_layers_are_prepared_by_their_own_outputs(caplog: pytest.LogCaptureFixture) -> None:
    model, config, batches = WithoutGradients(), WasiConfig(weight_share=0.9), [torch.randn(20, 8)]
    factors = preprocess_wasi(model, config, batches, repair_steps=2, progress_bar=False)
    assert "gradients need a model that runs with gradients enabled" in caplog.text
    alone = calibrate_wasi(model, batches, config, gradients=None, progress_bar=False)
    expected = alone.factors("layers.0.0", model.layers[0][0], factors.ranks["layers.0.0"])
    found = factors.initial["layers.0.0"]
    torch.testing.assert_close(found.L @ found.R, expected.L @ expected.R)
