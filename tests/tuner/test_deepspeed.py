"""DeepSpeed's ZeRO on two gloo processes of the CPU, against one process; skipped where DeepSpeed is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from models import FORMS
from peft import LoraConfig, PeftModel, get_peft_model
from test_distributed import EVEN, RANKS, STEPS, free_port, share_of
from test_engines import VIT, adapted
from torch import Tensor

from wasi_peft import WasiConfig

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


def with_the_trainer(stage: int, folder: str) -> dict[str, float]:
    """Trains, saves, loads and resumes; returns how far what was loaded and what was resumed is from what trained."""
    import deepspeed
    import transformers

    models = [get_peft_model(VIT.model(), WasiConfig(weight_rank=6, modules_to_save=["classifier"])) for _ in range(2)]
    batch = VIT.batch(16, 1)
    data = [{key: value[index] for key, value in batch.items()} for index in range(16)]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    optimizers = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    arguments = transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        ddp_backend="gloo", max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=4,
        lr_scheduler_type="constant", deepspeed={"zero_optimization": zero, **sizes, **optimizers},
    )  # fmt: skip

    def run(model: Any, checkpoint: str | None) -> tuple[Any, dict[str, Tensor]]:
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        parameters = trained(trainer.model)
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
            return trainer, {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
        return max(float((found[name] - value).abs().max()) for name, value in expected.items())

    trainer, values = run(models[0], None)
    trainer.save_model(f"{folder}/final")
    torch.distributed.barrier()
    _, again = run(models[1], f"{folder}/checkpoint-2")
    loaded = PeftModel.from_pretrained(VIT.model(), f"{folder}/final", is_trainable=True)
    return {"loaded": distance(trained(loaded), values), "resumed": distance(again, values)}


def _enter(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
        DS_SKIP_CUDA_CHECK="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def _train_by_trainer(rank: int, folder: str, port: int, stage: int) -> None:
    _enter(rank, port)
    torch.save(with_the_trainer(stage, folder), Path(folder) / f"{rank}.pt")


def _worker(rank: int, folder: str, port: int) -> None:
    _enter(rank, port)
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


def in_two_processes(worker: Any, folder: Path, *args: Any) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    mp.spawn(worker, args=(str(folder), free_port(), *args), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(_worker, tmp_path_factory.mktemp("zero"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", SCENARIOS)
def test_zero_trains_as_one_process_does(ranks: list[dict[str, Any]], form: str, stage: int) -> None:
    expected = alone(form)
    for found in ranks:
        assert not isinstance(found[f"{form}, {stage}"], str), found[f"{form}, {stage}"]
        torch.testing.assert_close(found[f"{form}, {stage}"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_the_trainer_saves_is_loaded_and_resumed_exactly(tmp_path: Path, stage: int) -> None:
    for found in in_two_processes(_train_by_trainer, tmp_path, stage):
        assert found == {"loaded": 0.0, "resumed": 0.0}
