"""Convolutions with an adapter: both forms, every update, saving, merging, estimates, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import wasi_peft
from wasi_peft.forms.convolution import Patches
from wasi_peft.tuner.convolution import Convolution
from wasi_peft.updates import UPDATES

TARGETS = ["stem", "pointwise", "middle", "head"]


class Maps(nn.Module):
    """A small convolutional model: patches, 1 x 1, 3 x 3, a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.middle = nn.Conv2d(24, 16, 3, padding=1, **options)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.pointwise(self.stem(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


def images(samples: int = 4) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def form_of(update: str) -> dict[str, Any]:
    return {"residual": "exact"} if UPDATES[update].needs_residual else {"residual": None}


@pytest.mark.parametrize("update", UPDATES)
def test_at_full_rank_a_model_answers_as_before_and_passes_the_same_gradients_on(update: str) -> None:
    model = Maps().double()
    x = images().double().requires_grad_(True)
    y = model(x)
    weight = torch.randn_like(y)
    (expected,) = torch.autograd.grad((y * weight).sum(), x)
    full = {"stem": 12, "pointwise": 16, "middle": 16, "head": 4}
    config = wasi_peft.WasiConfig(
        update=update, target_modules=TARGETS, rank_pattern=full, weight_rank=4, activation_threshold=None,
        **form_of(update),
    )  # fmt: skip
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    assert isinstance(model.middle, Convolution)
    out = adapted(x)
    torch.testing.assert_close(out, y, rtol=1e-9, atol=1e-10)
    (ours,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_gradients_of_factors_are_those_of_the_convolution() -> None:
    """Of `W = L R`: `dL = dW R^T` and `dR = L^T dW`."""
    model = Maps().double()
    x = images().double()
    twin = Maps().double()
    twin.load_state_dict(model.state_dict())
    config = wasi_peft.WasiConfig(
        update="factor", target_modules=["middle"], weight_rank=16, activation_threshold=None, residual=None
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    adapted(x).square().sum().backward()
    twin(x).square().sum().backward()
    form, dense = model.middle.form, twin.middle.weight.grad.flatten(1)
    torch.testing.assert_close(form.L.grad, dense @ form.R.detach().T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(form.R.grad, form.L.detach().T @ dense, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(form.bias.grad, twin.middle.bias.grad)


@pytest.mark.parametrize("update", ["frozen_basis", "core"])
@pytest.mark.parametrize("frozen_dtype", [None, "int8"])
def test_patches_that_overlap_are_not_unfolded(
    update: str, frozen_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the image is kept, it comes from a convolution; gradients are those of the rows."""
    torch.manual_seed(1)
    config = wasi_peft.WasiConfig(
        residual=None, update=update, frozen_dtype=frozen_dtype, target_modules=["middle"], weight_rank=4
    )
    model = get_peft_model(Maps(), config).train()
    results = []
    for multiplies in (True, False):
        if not multiplies:
            monkeypatch.setattr(Convolution, "_can_multiply", lambda *_: False)
        x = images().requires_grad_(True)
        with monkeypatch.context() as patched:
            if multiplies:
                patched.setattr(Patches, "rows", None)
            y = model(x)
        model.zero_grad()
        y.square().sum().backward()
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad, **trained})
    bound = 1e-5 if frozen_dtype is None else 0.05  # rows are rounded on the way into a product of integers
    for name, value in results[1].items():
        assert (results[0][name] - value).norm() <= bound * value.norm() + 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "int4"},
        {"residual": None, "weight_share": 0.8},
        {"residual": None, "update": "subspace", "activation_ranks": 4},
        {"residual": None, "frozen_dtype": "int8"},
    ],
    ids="int8 int4 share subspace frozen".split(),
)
def test_training_saving_loading_and_merging(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    rank = {} if "weight_share" in options else {"weight_rank": 4}
    model = get_peft_model(Maps(), wasi_peft.WasiConfig(target_modules=TARGETS, **rank, **options)).train()
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (model(images()) - 1).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = model.eval()(images())
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Maps(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(images()), expected)
    merged = model.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_children()} == {
        **dict.fromkeys(("stem", "pointwise", "middle"), nn.Conv2d),
        "head": nn.Linear,
    }
    assert merged.middle.weight.shape == (16, 24, 3, 3)
    torch.testing.assert_close(merged(images()), expected, rtol=0.05, atol=0.05)  # rows were rounded to 8 bits


def test_unloading_and_disabling_give_the_convolutions_back() -> None:
    model = Maps().eval()
    expected, weights = model(images()), {name: value.clone() for name, value in model.state_dict().items()}
    config = wasi_peft.WasiConfig(residual=None, base_weight="keep", target_modules=TARGETS, weight_rank=2)
    adapted = get_peft_model(model, config).eval()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(images()), expected)
    base = adapted.unload()
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(base(images()), expected)


def test_compressed_models_keep_convolutions_dense(tmp_path: Path) -> None:
    model = wasi_peft.compress(
        ARCHITECTURES["vit"].build(), wasi_peft.WasiConfig(target_modules=["projection", "fc1"])
    )
    assert type(model.get_submodule("vit.embeddings.patch_embeddings.projection")) is nn.Conv2d
    model.eval().save_pretrained(str(tmp_path))
    loaded = type(model).from_pretrained(str(tmp_path)).eval()
    batch = ARCHITECTURES["vit"].batch(2, 0)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_a_share_cannot_span_what_was_prepared_and_convolutions() -> None:
    model = Maps()
    config = wasi_peft.WasiConfig(target_modules=TARGETS, weight_share=0.8)
    wasi_peft.preprocess_wasi(model, config, [images(16)], repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match=r"middle: preprocess_wasi did not prepare .* take a weight_rank\."):
        get_peft_model(model, config)


def test_the_patch_embedding_of_a_transformer() -> None:
    model = ARCHITECTURES["vit"].build()
    batch = ARCHITECTURES["vit"].batch(4, 0)
    expected = model.eval()(**batch).logits
    config = wasi_peft.WasiConfig(
        residual="exact", target_modules=r".*(projection|fc1)", weight_rank=4, modules_to_save=["classifier"]
    )
    adapted = get_peft_model(model, config)
    assert len(adapted.wasi_summary().layers) == 3
    torch.testing.assert_close(adapted.eval()(**batch).logits, expected)
    adapted.train()(**batch).loss.backward()
    estimate = wasi_peft.estimate_wasi(ARCHITECTURES["vit"].build(), config, batch=batch)
    assert estimate.peak_bytes > 0 and estimate.training_flops > 0


def test_preparation_leaves_convolutions_to_their_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = Maps()
    config = wasi_peft.WasiConfig(residual=None, target_modules=TARGETS, explained_variance_threshold=0.9)
    with caplog.at_level("INFO", logger="wasi_peft"):
        calibration = wasi_peft.calibrate_wasi(model, [images(16)], config, progress_bar=False)
    assert calibration.layers == ("head",)
    assert "3 convolutions are not prepared" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 8}, "groups=8"),
        ({"dilation": 2}, "dilation=(2, 2)"),
        ({"padding_mode": "circular"}, "padding_mode='circular'"),
    ],
)
def test_other_convolutions_are_refused_before_anything_changes(options: dict[str, Any], reason: str) -> None:
    model = Maps(**options)
    modules = list(model.modules())
    with pytest.raises(ValueError) as error:
        get_peft_model(model, wasi_peft.WasiConfig(target_modules=TARGETS, weight_rank=2))
    assert str(error.value).startswith("middle: a convolution can be a target with groups=1")
    assert reason in str(error.value)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("options", [{"weight_rank": 3}, {"residual": None, "weight_rank": 6}], ids=str)
def test_loading_without_a_second_copy_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))

    options = {"target_modules": ["0", "2"], "residual_product": "restored", **options}
    model, x = get_peft_model(convolutions(), wasi_peft.WasiConfig(**options)).eval(), images()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(convolutions(), tmp_path, low_cpu_mem_usage=True).eval()
    loaded.load_adapter(tmp_path, "other")
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(loaded(x), model(x))
