"""DistributedDataParallel, FSDP2 and accelerate on four gloo processes: every form trains as in one process.

Every process sees the whole batch, so that the averaged gradients are those of one process, and no rounding of inputs
differs. Ranks of 6 and 2 over four processes give shards of unequal size, and empty ones.
"""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from expert_models import experts_model, tokens
from models import ARCHITECTURES, FORMS, logits
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from wasi_peft import WasiConfig, calibrate_wasi, create_wasi_optimizer
from wasi_peft.models.structure import Structure

PROCESSES = 4
STEPS = 3
VIT = ARCHITECTURES["vit"]
CASES = [(form, "exact") for form in FORMS]
CASES += [(form, ("fast", "small")[number % 2]) for number, form in enumerate(FORMS)]
EXPERTS = ("frozen_basis", "factor")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
State = dict[str, Tensor]
pytestmark = pytest.mark.slow


def configuration(form: str, **options: Any) -> WasiConfig:
    """Of a form, exact and the same on every machine."""
    exact = {"activation_threshold": None, "residual_product": "restored" if FORMS[form]["residual"] else None}
    return WasiConfig(**FORMS[form], weight_rank=6, update_rank=2, **exact, **options)


def adapted(base: nn.Module, form: str, **options: Any) -> Any:
    """A model with factors; those of an addition meet data in the first batch, unless they were prepared."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        return get_peft_model(base, configuration(form, **options)).train()


def shard(model: Any) -> Any:
    """FSDP2 as its documentation has it: blocks, then what is left."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in Structure(model).blocks.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW that decays, so that it moves R in the first step too, when it has no gradient.

    Its eps keeps it from making steps of the rounding errors of gradients that are zero, as those of biases of keys.
    """
    return create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1, eps=1e-3)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int, micro_batches: int = 1) -> None:
    for part in range(micro_batches):
        model(**VIT.batch(4, number + 10 * part)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: Any, wrapped: Any = None, micro_batches: int = 1) -> State:
    """The state after a few steps, gathered; of the same training in one process without a wrapper."""
    optimizer = optimizer_of(model)
    for number in range(STEPS):
        step(model if wrapped is None else wrapped, optimizer, number, micro_batches)
    return get_model_state_dict(model, options=WHOLE)


def matrix(engine: str, form: str, mode: str) -> Callable[[], State]:
    def run() -> State:
        model = adapted(VIT.model(), form, memory_mode=mode)
        if not dist.is_initialized():
            return trained(model)
        return trained(model, DistributedDataParallel(model)) if engine == "ddp" else trained(shard(model))

    return run


def micro_batches() -> State:
    """Two before each step: what the first batch makes of R must outlive that its block is sharded again."""
    model = adapted(VIT.model(), "addition int8", memory_mode="exact")
    return trained(shard(model) if dist.is_initialized() else model, micro_batches=2)


def experts(form: str) -> Callable[[], State]:
    """Factors in place of packed experts. Beside frozen weights one process starts R from data, many do not."""

    def run() -> State:
        base, ids = experts_model("mixtral", torch.float32), tokens()
        model = adapted(base, form)
        model = shard(model) if dist.is_initialized() else model
        optimizer = optimizer_of(model)
        for _ in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return get_model_state_dict(model, options=WHOLE)

    return run


def accelerated(form: str) -> Callable[[], State]:
    """As `accelerate launch` does it under FSDP2: on accelerators only, unless it is told that here is one."""

    def run() -> State:
        model = adapted(VIT.model(), form, memory_mode="exact")
        if not dist.is_initialized():
            return trained(model)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["ViTLayer"],
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        accelerator = Accelerator(cpu=True)
        accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        try:
            model, optimizer = accelerator.prepare(model, optimizer_of(model))
            for number in range(STEPS):
                accelerator.backward(model(**VIT.batch(4, number)).loss)
                optimizer.step()
                optimizer.zero_grad()
            return get_model_state_dict(model, options=WHOLE)
        finally:
            AcceleratorState._reset_state()
            os.environ.pop("ACCELERATE_USE_FSDP", None)

    return run


def resumed(form: str, folder: str) -> Callable[[], State]:
    """Two steps, a checkpoint of the shards of model and optimizer, and a third step of a new model from there."""

    def run() -> State:
        if not dist.is_initialized():
            return trained(adapted(VIT.model(), form))
        model = shard(adapted(VIT.model(), form))
        optimizer = optimizer_of(model)
        for number in range(STEPS - 1):
            step(model, optimizer, number)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=folder)
        model = shard(adapted(VIT.model(seed=1), form))
        optimizer = optimizer_of(model)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        step(model, optimizer, STEPS - 1)
        return get_model_state_dict(model, options=WHOLE)

    return run


def calibrated() -> State:
    """Energies and factors of a dense model that lies in shards, by the gradients of its loss."""
    model: Any = VIT.model()
    if dist.is_initialized():
        model = shard(model)
    calibration = calibrate_wasi(model, [VIT.batch()], gradients="loss", progress_bar=False)
    layers = dict(model.named_modules())
    state = {name: calibration.energies(name) for name in calibration.layers}
    for name in calibration.layers:
        initial = calibration.factors(name, layers[name], 4)
        state[f"{name} factors"] = initial.L @ initial.R
    return state


def all_runs(folder: str) -> dict[str, Callable[[], State]]:
    """Everything that is to come out as in one process, by name."""
    runs = {
        f"{engine}, {form}, {mode}": matrix(engine, form, mode) for engine in ("ddp", "fsdp2") for form, mode in CASES
    }
    runs |= {f"experts, {form}": experts(form) for form in EXPERTS}
    runs |= {f"accelerate, {form}": accelerated(form) for form in ("addition int8", "subspace")}
    runs |= {f"resume, {form}": resumed(form, f"{folder}/{form}") for form in ("addition int8", "subspace")}
    return runs | {"micro-batches": micro_batches, "calibration": calibrated}


def work(rank: int, port: int, folder: str) -> None:
    """One of four processes: goes through all runs; what is wrong with one is its result."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    results: dict[str, Any] = {}
    for name, run in all_runs(folder).items():
        try:
            results[name] = run()
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    model = shard(adapted(VIT.model(), "addition int8"))
    state = trained(model)
    if rank == 0:
        model.save_pretrained(f"{folder}/adapter", state_dict=state)
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first of four processes has got."""
    folder = tmp_path_factory.mktemp("engines")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Of every run its state, or the text of an error."""
    loaded: dict[str, Any] = torch.load(folder / "results.pt")
    return loaded


@pytest.mark.parametrize("name", all_runs(""))
def test_four_processes_equal_one(name: str, results: dict[str, Any]) -> None:
    state, alone = results[name], all_runs("")[name]()
    assert isinstance(state, dict), state
    assert state.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_an_adapter_is_saved_from_the_gathered_state(folder: Path) -> None:
    alone = adapted(VIT.model(), "addition int8")
    before = logits(alone, VIT.batch(4))
    trained(alone.train())
    expected = logits(alone, VIT.batch(4))
    assert (expected - before).norm() > 1e-3 * before.norm()
    loaded = PeftModel.from_pretrained(VIT.model(), str(folder / "adapter"))
    torch.testing.assert_close(logits(loaded, VIT.batch(4)), expected, rtol=0, atol=1e-5)
