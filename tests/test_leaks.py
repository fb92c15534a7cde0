"""Nothing piles up in long runs: steps of all shapes, passes without backward, evaluation and failures in between."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from probes import Interrupted, fail, fail_in_backward, live_bytes, shared_inputs, trainable
from torch import Tensor, nn

import wasi_peft.memory.saved as saved_module
from wasi_peft import OptimizerInBackward, WasiConfig, measure_peak_memory
from wasi_peft.tuner.layer import wasi_layers

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

VOCABULARY = 40
# samples and tokens; the first is large enough for MLPs in chunks and for tensors that are stored in few bits
SHAPES = [(8, 40), (3, 17), (1, 1), (5, 40), (2, 9), (6, 31)]
CASES: dict[str, dict[str, Any]] = {
    "exact inputs": {"update": "low_rank", "activation_threshold": None},
    "inputs in 8 bits": {"update": "addition"},
    "compressed inputs": {
        "update": "subspace",
        "activation_modes": ["feature", "token", "batch"],
        "activation_ranks": {"feature": 4, "token": 4, "batch": 2},
        "activation_interval": 2,
    },
}


def llama(**options: Any) -> Any:
    """One block, everything in it adapted."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return get_peft_model(tf.LlamaForCausalLM(config), WasiConfig(weight_rank=6, **options))


def batch(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


class Run:
    """A model and its optimizer, and a round of what may happen to them, which ends with the first shape."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any) -> None:
        self.model = llama(**options).train()
        self.optimizer = make(trainable(self.model))
        self.middle: Any = [layer for _, layer in wasi_layers(self.model)][3]
        self.seeds = itertools.count()
        self.steps = 0

    def loss(self, shape: tuple[int, int]) -> Tensor:
        return self.model(**batch(shape, next(self.seeds))).loss

    def step(self, shape: tuple[int, int]) -> None:
        self.loss(shape).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def fails(self, register: Callable[[], Any]) -> None:
        handle = register()
        with pytest.raises(Interrupted):
            self.loss((4, 23)).backward()
        handle.remove()
        self.optimizer.zero_grad()

    def round(self) -> None:
        self.step(SHAPES[1])
        self.loss((7, 20))  # no backward
        self.step(SHAPES[2])
        self.fails(lambda: self.middle.register_forward_pre_hook(fail))
        self.step(SHAPES[3])
        self.model.eval()
        with torch.no_grad():
            self.loss((4, 11))
        self.loss((2, 13))  # with a graph, which is dropped
        self.model.train()
        self.step(SHAPES[4])
        self.fails(lambda: self.middle.register_forward_hook(fail_where_recorded))
        self.step(SHAPES[5])
        self.step(SHAPES[0])


def fail_where_recorded(module: nn.Module, args: Any, output: Tensor) -> None:
    """A recomputed block records only in backward."""
    if output.requires_grad:
        fail_in_backward(module, args, output)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["exact", "fast", "small"])
def test_long_runs_hold_no_more_than_short_ones(mode: str, case: str) -> None:
    run = Run(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), memory_mode=mode, **CASES[case])
    measured = {}
    for number in range(1, 42):
        run.round()
        if number in (9, 25, 41):
            measured[run.steps] = live_bytes()
    assert list(measured) == [54, 150, 246]
    assert len(set(measured.values())) == 1
    assert len(shared_inputs(run.model)) == 0
    assert not [thing for thing in gc.get_objects() if isinstance(thing, saved_module._Region)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["exact", "fast", "small"])
def test_the_allocator_has_everything_back(mode: str, case: str) -> None:
    """Also what Python cannot see: graphs of passes without backward, and of those that failed."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return OptimizerInBackward(torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))

    run = Run(make, memory_mode=mode, **CASES[case])
    measure_peak_memory(run.round)  # so that the next one knows the size of what this one made
    assert measure_peak_memory(run.round).left_bytes == 0
