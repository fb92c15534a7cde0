"""FSDP2 on two gloo processes: every form trains as in one process, and is saved from the gathered state."""

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
from models import ARCHITECTURES, FORMS, logits
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from wasi_peft import WasiConfig, create_wasi_optimizer, preprocess_wasi

VIT = ARCHITECTURES["vit"]
CASES = [
    *((form, "exact") for form in FORMS),
    *(("frozen_basis", "fast"), ("subspace", "small"), ("addition int8", "fast"), ("addition int8", "small")),
]
pytestmark = pytest.mark.slow


def train(form: str, mode: str, sharded: bool) -> Any:
    """Three steps; every process sees the whole batch, so the averaged gradients are those of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
        config = WasiConfig(**FORMS[form], weight_rank=4, update_rank=2, memory_mode=mode, activation_threshold=None)
        base = VIT.model()
        if config.residual is not None:  # R has met data, so no batch gives it other coordinates
            preprocess_wasi(base, config, [VIT.batch()], progress_bar=False)
        model = get_peft_model(base, config).train()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.get_base_model().vit.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-3)
    for step in range(3):
        model(**VIT.batch(4, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes: trains every case and saves it from the gathered state dict."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for form, mode in CASES:
        model = train(form, mode, sharded=True)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            model.save_pretrained(f"{folder}/{form}-{mode}", state_dict=state)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, written by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize(("form", "mode"), CASES)
def test_two_processes_train_and_save_as_one(sharded: Path, form: str, mode: str) -> None:
    alone = train(form, mode, sharded=False)
    loaded = PeftModel.from_pretrained(VIT.model(), str(sharded / f"{form}-{mode}"))
    before = logits(VIT.model(), VIT.batch(4))
    expected = logits(alone, VIT.batch(4))
    assert (expected - before).norm() > 1e-3 * before.norm()
    assert torch.allclose(logits(loaded, VIT.batch(4)), expected, atol=1e-5)
