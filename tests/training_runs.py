"""Tiny models with an adapter in the unmodified Trainer, and what there is to compare of two runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from models import ARCHITECTURES
from peft import get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.tuner.layer import wasi_layers

SAMPLES = 24


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model with a WASI adapter; its head trains too where it is a classifier."""
    model = ARCHITECTURES[name].model(seed)
    options = {"weight_rank": 6, **options}
    if hasattr(model, "classifier"):
        options = {"modules_to_save": ["classifier"], **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return get_peft_model(model, WasiConfig(**{"update": "subspace", **options}))


def dataset(name: str, samples: int = SAMPLES, seed: int = 1) -> list[dict[str, Tensor]]:
    batch = ARCHITECTURES[name].batch(samples, seed)
    return [{key: value[index] for key, value in batch.items()} for index in range(samples)]


class LossRecorder(tf.TrainerCallback):
    """Full-precision training losses, which the trainer's log rounds, and what `look` sees after every step."""

    def __init__(self, model: nn.Module, look: Callable[[], Any] = lambda: None) -> None:
        self.losses: list[float] = []
        self.seen: list[Any] = []
        self._look = look

        def record(module: nn.Module, _: Any, output: Any) -> None:
            if module.training:
                self.losses.append(output.loss.item())

        model.register_forward_hook(record)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self._look())


def make_trainer(
    model: Any,
    name: str,
    folder: Path,
    optimizer: torch.optim.Optimizer | None = None,
    eval_dataset: Any = None,
    callbacks: list[tf.TrainerCallback] | None = None,
    **arguments: Any,
) -> tf.Trainer:
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
        **arguments,
    }
    return tf.Trainer(
        model,
        tf.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=dataset(name),
        eval_dataset=dataset(name, 10, seed=2) if eval_dataset is None else eval_dataset,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def run(
    model: Any, name: str, folder: Path, optimizer: torch.optim.Optimizer | None = None, **arguments: Any
) -> list[float]:
    """Train; returns the losses of all forward passes."""
    recorder = LossRecorder(model)
    make_trainer(model, name, folder, optimizer, callbacks=[recorder], **arguments).train(
        resume_from_checkpoint=arguments.pop("resume_from_checkpoint", None)
    )
    return recorder.losses


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bases(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in wasi_layers(model):
        feature = layer.wasi_input["default"].bases.feature
        if feature is not None:
            found[name] = feature.clone()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(actual[name], value), name


def assert_orthonormal(model: nn.Module, tolerance: float = 1e-5) -> None:
    for name, layer in wasi_layers(model):
        L = layer.wasi_form["default"].L.detach()
        error = (L.T @ L - torch.eye(L.shape[1])).abs().max().item()
        assert error <= tolerance, (name, error)
