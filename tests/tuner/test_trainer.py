"""WASI models in the unmodified Hugging Face Trainer: checkpoints, accumulation, recomputation, precision."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from peft import PeftModel
from torch import Tensor, nn
from training_runs import (
    LossRecorder,
    assert_orthonormal,
    assert_same,
    bases,
    build,
    dataset,
    make_trainer,
    run,
    trained_values,
)

import wasi_peft.linalg.tucker as tucker_module
import wasi_peft.updates.subspace as subspace_module
from wasi_peft import SubspaceSGD, create_wasi_optimizer
from wasi_peft.tuner.layer import wasi_layers

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")  # every `train` collects garbage

NAMES = ["vit", "bert", "llama"]
NO_COMPRESSION = {"activation_threshold": None}
COMPRESSION = {"activation_ranks": 4, "activation_interval": 1}
OPTIONS = {"exact": NO_COMPRESSION, "compressed": COMPRESSION}
TARGETS = {"vit": 12, "bert": 12, "llama": 14}  # layers that WASI takes


@pytest.fixture
def retractions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The L of every retraction."""
    calls: list[Tensor] = []
    original = subspace_module.retraction

    def counted(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(L)
        return original(L, R)

    monkeypatch.setattr(subspace_module, "retraction", counted)
    yield calls


# -------------------------------------------------------------------- training, evaluation, prediction


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_train_evaluate_predict(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(name, **options)
    before = trained_values(model)
    trainer = make_trainer(model, name, tmp_path, max_steps=12)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]  # without label_names
    trainer.train()
    assert math.isfinite(first) and trainer.evaluate(trainer.train_dataset)["eval_loss"] < first - 0.05
    assert_orthonormal(model)
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == parameter.requires_grad, parameter_name

    prediction = trainer.predict(dataset(name, 10, seed=2))
    assert "test_loss" in prediction.metrics
    model.eval()
    with torch.no_grad():
        expected = model(**ARCHITECTURES[name].batch(10, 2)).logits
    torch.testing.assert_close(torch.as_tensor(prediction.predictions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_between_steps_changes_nothing(name: str, tmp_path: Path) -> None:
    results = []
    for strategy in ("no", "steps"):
        model = build(name, **COMPRESSION)
        losses = run(model, name, tmp_path, eval_strategy=strategy, eval_steps=1)
        results.append((losses, trained_values(model), bases(model)))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1])
    assert_same(results[1][2], results[0][2])


# -------------------------------------------------------------------- checkpoints


def _resumed(
    name: str, folder: Path, **options: Any
) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses after step 3 and final values, of a run in one go and of one resumed in a fresh model."""
    whole = build(name, **options)
    losses = run(whole, name, folder, max_steps=6, save_strategy="steps", save_steps=3)
    torch.manual_seed(123)
    fresh = build(name, **options)
    for parameter_name, parameter in fresh.named_parameters():
        if "modules_to_save" in parameter_name or ("norm" in parameter_name and parameter.requires_grad):
            nn.init.normal_(parameter)  # the checkpoint must bring them back
    recorder = LossRecorder(fresh)
    trainer = make_trainer(fresh, name, folder, callbacks=[recorder], max_steps=6)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return recorder.losses, losses[3:], trained_values(fresh), trained_values(whole)


@pytest.mark.parametrize("name", NAMES)
def test_resume_repeats_the_run_exactly_without_compression(name: str, tmp_path: Path) -> None:
    losses, expected_losses, values, expected = _resumed(name, tmp_path, **NO_COMPRESSION)
    assert losses == expected_losses
    assert_same(values, expected)


@pytest.mark.parametrize("name", NAMES)
def test_resume_with_compression_stays_close(name: str, tmp_path: Path) -> None:
    """Bases are not saved: they start again from the spectrum of the next batch, so the curve differs a little."""
    losses, expected, *_ = _resumed(name, tmp_path, **COMPRESSION)
    assert losses[0] == expected[0]  # the forward pass is exact
    assert losses == pytest.approx(expected, rel=0.03)  # at this rate; 2 % was seen


def test_resume_with_subspace_sgd_repeats_the_run_exactly(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build("vit", **NO_COMPRESSION)
        recorder = LossRecorder(model)
        trainer = make_trainer(
            model, "vit", tmp_path, SubspaceSGD(model, lr=0.05), max_grad_norm=0.0, callbacks=[recorder],
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        runs.append((recorder.losses[-2:], trained_values(model)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[1][1], runs[0][1])


def test_checkpoint_alone_reproduces_the_model(tmp_path: Path) -> None:
    model = build("vit", **COMPRESSION)
    run(model, "vit", tmp_path, save_strategy="steps", save_steps=4)
    restored = PeftModel.from_pretrained(ARCHITECTURES["vit"].model(), tmp_path / "checkpoint-4")
    batch = ARCHITECTURES["vit"].batch()
    with torch.no_grad():
        assert torch.equal(restored.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("name", NAMES)
def test_load_best_model_at_end(name: str, tmp_path: Path) -> None:
    """The highest loss counts as the best here, so that it is an early checkpoint; training can go on from it."""
    model = build(name, **COMPRESSION)
    trainer = make_trainer(
        model, name, tmp_path, eval_dataset=dataset(name), learning_rate=2e-3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    curve = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(curve) > curve[-1] + 0.01  # otherwise loading the best would not show
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(curve), rel=1e-6)
    assert_orthonormal(model)
    before = trained_values(model)
    trainer.args.max_steps = 2
    trainer.args.load_best_model_at_end = False
    trainer.train()
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == parameter.requires_grad, parameter_name


# -------------------------------------------------------------------- gradient accumulation


# not BERT: its dense model does not pass either, the trainer takes its loss for one that is normalised by the caller
@pytest.mark.parametrize("name", ["vit", "dinov2", "gpt2", "llama"])
def test_accumulation_equals_the_large_batch(name: str, tmp_path: Path, retractions: list[Tensor]) -> None:
    results = []
    for accumulate in (1, 4):
        model = build(name, **NO_COMPRESSION)
        retractions.clear()
        run(
            model, name, tmp_path, optim="sgd", max_grad_norm=0.0, learning_rate=0.1, max_steps=3,
            per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        layers = dict(wasi_layers(model))
        assert len(retractions) == 3 * len(layers)  # once per optimizer step
        results.append(trained_values(model))
    assert_same(results[1], results[0], rtol=1e-4, atol=2e-6)


def test_accumulation_in_subspace_sgd_equals_the_large_batch(tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 4):
        model = build("vit", **NO_COMPRESSION)
        run(
            model, "vit", tmp_path, SubspaceSGD(model, lr=0.05), max_grad_norm=0.0,
            per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        results.append(trained_values(model))
    assert_same(results[1], results[0], rtol=1e-4, atol=2e-6)


# -------------------------------------------------------------------- gradient checkpointing


def _checkpointed(
    name: str, folder: Path, use_reentrant: bool | None, options: dict[str, Any], **arguments: Any
) -> tuple[list[float], dict[str, Tensor], list[dict[str, Tensor]]]:
    model = build(name, **options)
    recorder = LossRecorder(model, lambda: bases(model))
    trainer = make_trainer(
        model, name, folder, callbacks=[recorder], gradient_checkpointing=use_reentrant is not None,
        gradient_checkpointing_kwargs=None if use_reentrant is None else {"use_reentrant": use_reentrant},
        optim="sgd", learning_rate=0.1, **arguments,
    )  # fmt: skip
    trainer.train()
    return recorder.losses, trained_values(model), recorder.seen


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(
    name: str, options: dict[str, Any], use_reentrant: bool, tmp_path: Path, retractions: list[Tensor]
) -> None:
    """Same losses, values and bases after every step; one retraction a layer and step."""
    losses, values, seen = _checkpointed(name, tmp_path, None, options)
    retractions.clear()
    actual_losses, actual_values, actual_seen = _checkpointed(name, tmp_path, use_reentrant, options)
    assert len(retractions) == 4 * TARGETS[name]
    assert actual_losses[:4] == pytest.approx(losses, rel=1e-5)
    assert_same(actual_values, values, rtol=1e-3, atol=1e-5)
    for actual, expected in zip(actual_seen, seen, strict=True):
        assert actual.keys() == expected.keys()
        for layer_name, basis in expected.items():
            torch.testing.assert_close(actual[layer_name], basis, rtol=0, atol=1e-3)
    if options is COMPRESSION:
        assert seen[0] and all(not torch.equal(seen[1][key], seen[0][key]) for key in seen[0])  # they do move


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["stored", "reentrant", "non_reentrant"])
def test_bases_advance_once_a_step_even_when_recomputed(
    use_reentrant: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterations: list[Tensor] = []
    original = tucker_module.subspace_iteration

    def counted(matrix: Tensor, basis: Tensor) -> Tensor:
        iterations.append(basis)
        return original(matrix, basis)

    monkeypatch.setattr(tucker_module, "subspace_iteration", counted)
    _, _, seen = _checkpointed(
        "vit", tmp_path, use_reentrant, COMPRESSION, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    assert len(seen[0]) == 8  # one basis for each distinct input; the first step starts them cold
    assert len(iterations) == 3 * 8


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_are_freed(name: str, tmp_path: Path) -> None:
    """Reentrant recomputation hands detached leaves to the layers; under autocast their casts must not pin them."""
    trainer, _, _ = _checkpointed(name, tmp_path, True, COMPRESSION, bf16=True)
    gc.collect()
    assert {len(layer.inputs) for _, layer in wasi_layers(trainer.model)} == {0}


# -------------------------------------------------------------------- precision


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The curve follows that of float32; factors stay float32 and orthonormal."""
    curves = {}
    for bf16 in (False, True):
        model = build(name, **options)
        curves[bf16] = run(model, name, tmp_path, bf16=bf16, max_steps=8)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert_orthonormal(model)
    assert curves[True] == pytest.approx(curves[False], rel=0.15, abs=0.05)
    assert curves[True] != curves[False]  # autocast was on


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool, retractions: list[Tensor]) -> None:
    """Fused optimizers are called even then, with the skip decided inside; it must still count as no step at all."""
    model = build("vit", **COMPRESSION).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=fused)
    scaler = _scaler()
    for overflow in (False, True):
        scaler.scale(model(**ARCHITECTURES["vit"].batch(8)).loss).backward()
        if overflow:
            assert parameters[0].grad is not None
            parameters[0].grad[0] = float("inf")
            before, retracted = trained_values(model), len(retractions)
            ages = [layer.wasi_input["default"].age for _, layer in wasi_layers(model)]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 512.0  # it did skip
    assert_same(trained_values(model), before)
    assert retracted == 12 and len(retractions) == retracted
    assert [layer.wasi_input["default"].age for _, layer in wasi_layers(model)] == ages


def test_subspace_sgd_with_a_scaler_takes_the_unscaled_step() -> None:
    values = []
    for scaled in (False, True):
        model = build("vit", **NO_COMPRESSION).train()
        optimizer = SubspaceSGD(model, lr=0.05)
        loss = model(**ARCHITECTURES["vit"].batch(8)).loss
        if scaled:
            scaler = _scaler()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        values.append(trained_values(model))
    assert_same(values[1], values[0], rtol=1e-4, atol=1e-6)


def test_subspace_sgd_forgets_a_skipped_step() -> None:
    """`model.zero_grad()` is all that a Trainer calls after a step that the scaler skipped."""
    values = []
    for overflow in (False, True):
        model = build("vit", **NO_COMPRESSION).train()
        optimizer = SubspaceSGD(model, lr=0.05)
        if overflow:
            model(**ARCHITECTURES["vit"].batch(8, seed=5)).loss.backward()
            model.zero_grad()
        model(**ARCHITECTURES["vit"].batch(8)).loss.backward()
        optimizer.step()
        values.append(trained_values(model))
    assert_same(values[1], values[0])


# -------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", ["arguments", "create_wasi_optimizer", "subspace_sgd"])
@pytest.mark.parametrize("name", NAMES)
def test_optimizers(name: str, kind: str, tmp_path: Path, retractions: list[Tensor]) -> None:
    model = build(name, **COMPRESSION)
    optimizer: torch.optim.Optimizer | None = None
    if kind == "create_wasi_optimizer":
        optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2, head_lr=2e-2, weight_decay=0.01)
    elif kind == "subspace_sgd":
        optimizer = SubspaceSGD(model, lr=0.05, weight_decay=1e-4, max_grad_norm=2.0)
    losses = run(
        model, name, tmp_path, optimizer, max_steps=12, max_grad_norm=0.0 if kind == "subspace_sgd" else 1.0,
        optim="adamw_torch", weight_decay=0.01,
    )  # fmt: skip
    assert sum(losses[-3:]) < sum(losses[:3])  # the same three batches, some epochs later
    assert_orthonormal(model)
    expected = 0 if kind == "subspace_sgd" else 12 * TARGETS[name]
    assert len(retractions) == expected


def test_subspace_sgd_in_the_trainer_equals_the_plain_loop(tmp_path: Path) -> None:
    model = build("vit", **NO_COMPRESSION)
    data = dataset("vit", 8)
    trainer = make_trainer(model, "vit", tmp_path, SubspaceSGD(model, lr=0.05), max_grad_norm=0.0)
    trainer.train_dataset = data
    trainer.train()
    plain = build("vit", **NO_COMPRESSION).train()
    optimizer = SubspaceSGD(plain, lr=0.05)
    for _ in range(4):
        plain(**ARCHITECTURES["vit"].batch(8, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(trained_values(model), trained_values(plain), rtol=1e-4, atol=1e-6)  # the trainer shuffles the batch
