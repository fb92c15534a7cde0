"""DeepSpeed's ZeRO on two gloo processes of the CPU, against one process; skipped where DeepSpeed is not there."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from models import FORMS
from peft import LoraConfig, get_peft_model
from test_distributed import EVEN, RANKS, STEPS, share_of
from test_engines import VIT, adapted
from torch import Tensor

LR = 0.05
LORA = "lora"
STAGES = (2, 3)
RETRACTED = "subspace"  # after a step of the parameters themselves, which ZeRO does not take
SCENARIOS = (LORA, *(form for form in FORMS if form != RETRACTED))


def build(form: str) -> Any:
    if form == LORA:
        torch.manual_seed(0)
        return get_peft_model(VIT.model(), LoraConfig(r=4, target_modules="all-linear")).train()
    return adapted(VIT.model(), form)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model).values(), lr=LR)


def alone(form: str) -> dict[str, Tensor]:
    model = build(form)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        model(**VIT.batch(sum(EVEN), step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained(model).items()}


def with_zero(form: str, stage: int, rank: int) -> dict[str, Tensor]:
    import deepspeed

    model = build(form)
    names = list(trained(model))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model),
        config={
            "train_micro_batch_size_per_gpu": EVEN[0],
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # it clips at 1 otherwise
        },
    )
    for step in range(STEPS):
        batch = share_of(VIT.batch(sum(EVEN), step), rank, EVEN)
        engine.backward(engine(**batch).loss)
        engine.step()
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters([parameters[name] for name in names], enabled=stage == 3):
        return {name: parameters[name].detach().clone() for name in names}


def _worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1",
    )  # fmt: skip
    import deepspeed

    deepspeed.init_distributed("gloo")
    results: dict[str, Any] = {}
    for stage in STAGES:
        for form in SCENARIOS:
            try:
                results[f"{form}, {stage}"] = with_zero(form, stage, rank)
            except Exception as error:
                results[f"{form}, {stage}"] = repr(error)
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, args=(str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", SCENARIOS)
def test_zero_trains_as_one_process_does(ranks: list[dict[str, Any]], form: str, stage: int) -> None:
    expected = alone(form)
    for found in ranks:
        assert not isinstance(found[f"{form}, {stage}"], str), found[f"{form}, {stage}"]
        torch.testing.assert_close(found[f"{form}, {stage}"], expected, rtol=1e-4, atol=1e-5)
