"""DistributedDataParallel and the Trainer on two gloo processes: the ranks agree, and equal one process."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import ARCHITECTURES
from peft import get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from wasi_peft import SubspaceSGD, WasiConfig, create_wasi_optimizer
from wasi_peft.tuner.layer import wasi_layers

RANKS = 2
STEPS = 3
NO_COMPRESSION = {"activation_threshold": None}
COMPRESSION = {"activation_ranks": 4, "activation_interval": 1}
UNEVEN = (3, 5)  # samples of each rank
EVEN = (4, 4)

# name of a scenario: architecture, options of the adapter, optimizer, samples of each rank
SCENARIOS: dict[str, tuple[str, dict[str, Any], str, tuple[int, int]]] = {
    "exact-vit": ("vit", NO_COMPRESSION, "sgd", EVEN),
    "exact-bert": ("bert", NO_COMPRESSION, "sgd", EVEN),
    "exact-llama": ("llama", NO_COMPRESSION, "sgd", EVEN),
    "compressed-uneven-vit": ("vit", COMPRESSION, "adamw", UNEVEN),
    "compressed-uneven-bert": ("bert", COMPRESSION, "adamw", UNEVEN),
    "compressed-uneven-llama": ("llama", COMPRESSION, "adamw", UNEVEN),
    "frozen_basis": ("vit", {"update": "frozen_basis"}, "adamw", UNEVEN),
    "core": ("vit", {"update": "core"}, "adamw", UNEVEN),
    "low_rank": ("vit", {**COMPRESSION, "update": "low_rank"}, "adamw", UNEVEN),
}


def build(name: str, options: dict[str, Any]) -> Any:
    model = ARCHITECTURES[name].model()
    options = {"weight_rank": 6, "train_vectors": True, **options}
    if hasattr(model, "classifier"):
        options["modules_to_save"] = ["classifier"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return get_peft_model(model, WasiConfig(**{"update": "subspace", **options})).train()


def make_optimizer(kind: str, model: Any) -> torch.optim.Optimizer:
    if kind == "adamw":
        return create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)


def share_of(batch: dict[str, Tensor], rank: int, samples: tuple[int, int]) -> dict[str, Tensor]:
    start = sum(samples[:rank])
    return {key: value[start : start + samples[rank]] for key, value in batch.items()}


def train(scenario: str, rank: int | None) -> dict[str, Tensor]:
    """Final parameters of one rank, or of a single process on the joint batches."""
    name, options, optimizer_kind, samples = SCENARIOS[scenario]
    model = build(name, options)
    optimizer = make_optimizer(optimizer_kind, model)
    runner = model if rank is None else DistributedDataParallel(model, find_unused_parameters=False)
    for step in range(STEPS):
        batch = ARCHITECTURES[name].batch(sum(samples), step)
        if rank is not None:
            batch = share_of(batch, rank, samples)
        runner(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


def train_with_trainer(folder: Path) -> dict[str, Tensor]:
    """The unmodified Trainer; it finds the process group by itself. Per rank 4 samples a step, alone 8."""
    import transformers

    distributed = dist.is_initialized()
    model = build("vit", NO_COMPRESSION)
    batch = ARCHITECTURES["vit"].batch(16, 1)
    data = [{key: value[index] for key, value in batch.items()} for index in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        ddp_backend="gloo" if distributed else None, max_steps=STEPS, save_strategy="no", optim="sgd", seed=0,
        learning_rate=0.05, lr_scheduler_type="constant", per_device_train_batch_size=4 if distributed else 8,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    assert arguments.world_size == (RANKS if distributed else 1)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == distributed
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


def free_port() -> int:
    """One that no process listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _worker(rank: int, folder: str, port: int) -> None:
    """All scenarios in one process of two; an error is a result too."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    try:
        SubspaceSGD(build("vit", NO_COMPRESSION))
    except RuntimeError as error:
        results["subspace_sgd"] = str(error)
    for scenario in SCENARIOS:
        try:
            results[scenario] = train(scenario, rank)
        except Exception as error:
            results[scenario] = repr(error)
    try:
        results["trainer"] = train_with_trainer(Path(folder) / "trainer")
    except Exception as error:
        results["trainer"] = repr(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both ranks, for every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    mp.spawn(_worker, args=(str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_ranks_agree(first: Any, second: Any) -> None:
    for values in (first, second):
        assert isinstance(values, dict), values  # otherwise the text of an error
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("scenario", [*SCENARIOS, "trainer"])
def test_ranks_hold_the_same_parameters(scenario: str, ranks: list[dict[str, Any]]) -> None:
    assert_ranks_agree(ranks[0][scenario], ranks[1][scenario])


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "frozen_basis"])
def test_factors_are_retracted_on_every_rank(scenario: str, ranks: list[dict[str, Any]]) -> None:
    name, options, *_ = SCENARIOS[scenario]
    start = dict(build(name, options).named_parameters())
    layers = [path for path, _ in wasi_layers(build(name, options))]
    for values in (rank[scenario] for rank in ranks):
        assert isinstance(values, dict), values
        for path in layers:
            L = values[f"{path}.wasi_form.default.wasi_L"]
            torch.testing.assert_close(L.T @ L, torch.eye(L.shape[1]), rtol=0, atol=1e-5)
        assert any(not torch.equal(values[path], parameter) for path, parameter in start.items())


@pytest.mark.parametrize("scenario", ["exact-vit", "exact-bert", "exact-llama"])
def test_two_processes_equal_one_on_the_joint_batch(scenario: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(scenario, rank=None)
    for rank in range(RANKS):
        values = ranks[rank][scenario]
        assert isinstance(values, dict), values
        for name, value in alone.items():
            torch.testing.assert_close(
                values[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_subspace_sgd_refuses_several_processes(ranks: list[dict[str, Any]]) -> None:
    """Its product gradients are not reduced: ranks would part in silence."""
    for rank in range(RANKS):
        assert "got 2 processes" in ranks[rank]["subspace_sgd"]


def test_trainer_on_two_processes_equals_one(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = train_with_trainer(tmp_path)
    for name, value in alone.items():
        torch.testing.assert_close(
            ranks[0]["trainer"][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
