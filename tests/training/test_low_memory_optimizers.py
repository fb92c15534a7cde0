"""Optimizers with a small state, from torch and transformers: they train, and take the memory documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES
from peft import get_peft_model
from test_optimizer_in_backward import Chain
from training_runs import assert_orthonormal, assert_same, build, make_trainer, run, trained_values

from wasi_peft import OptimizerInBackward, WasiConfig, create_wasi_optimizer, measure_peak_memory

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "torch": (torch.optim.Adafactor, {}),
    "transformers": (tf.Adafactor, {"scale_parameter": False, "relative_step": False}),
}
# KiB of two steps, as in docs/usage.md: with the optimizer as it is, and in backward
PEAKS = {"AdamW": (1537, 1093), "torch": (589, 113), "transformers": (620, 145)}


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", ["torch", "transformers"])
@pytest.mark.parametrize("update", ["low_rank", "subspace"])
def test_adafactor_trains_in_the_groups_of_wasi(kind: str, update: str, in_backward: bool) -> None:
    cls, options = OPTIMIZERS[kind]
    model = build("vit", update=update, activation_ranks=4, activation_interval=1)
    optimizer = create_wasi_optimizer(model, cls, lr=1e-2, weight_decay=0.01, **options)
    optimizer = OptimizerInBackward(optimizer) if in_backward else optimizer
    losses = []
    for _ in range(10):
        loss = model.train()(**ARCHITECTURES["vit"].batch(8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if update == "subspace":
        assert_orthonormal(model)
    assert all(state for state in optimizer.state.values())
    numbers = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    assert numbers < 0.5 * sum(parameter.numel() for parameter in optimizer.state)  # AdamW has twice as many


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_adafactor_by_name_in_the_trainer(name: str, tmp_path: Path) -> None:
    model = build(name, activation_ranks=4, activation_interval=1)
    losses = run(model, name, tmp_path, optim="adafactor", max_steps=12)
    assert sum(losses[-3:]) < sum(losses[:3])  # the same three batches, some epochs later
    assert_orthonormal(model)


def test_adafactor_resumes_exactly(tmp_path: Path) -> None:
    values = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = build("vit", activation_threshold=None)
        trainer = make_trainer(model, "vit", tmp_path, optim="adafactor", save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        values.append(trained_values(model))
    assert_same(values[1], values[0])


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_peaks_are_those_of_the_documentation(kind: str, in_backward: bool) -> None:
    cls, options = OPTIMIZERS[kind]
    config = WasiConfig(
        update="factor", weight_rank=64, activation_threshold=None, target_modules=r"layers\.\d+", bias="none"
    )
    model = get_peft_model(Chain(8, 128), config)
    x = torch.randn(1, 128)

    def steps() -> None:
        optimizer = create_wasi_optimizer(model, cls, lr=1e-3, **options)
        optimizer = OptimizerInBackward(optimizer) if in_backward else optimizer
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert measure_peak_memory(steps).peak_bytes / 1024 == pytest.approx(PEAKS[kind][in_backward], rel=0.03)
