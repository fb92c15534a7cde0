"""A model of which most weights are gone does not keep the file that they were read from."""

import weakref

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wasi_peft
from wasi_peft.tuner.borrowed import borrowed_bytes, own_remainder


class Block(nn.Module):
    def __init__(self, wide: int = 64) -> None:
        super().__init__()
        self.wte, self.norm = nn.Embedding(4, wide), nn.LayerNorm(wide)
        self.up, self.down = nn.Linear(wide, wide), nn.Linear(wide, wide)
        self.register_buffer("position", torch.arange(4.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(self.wte(ids))))


def in_an_array(model: nn.Module) -> numpy.ndarray:
    """Moves all parameters and buffers of a model into one array, as a mapped file holds them."""
    tensors = [*model.parameters(), *model.buffers()]
    array = numpy.concatenate([tensor.detach().flatten().numpy() for tensor in tensors])
    parts = torch.from_numpy(array).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = torch.from_numpy(part.numpy()).view(tensor.shape)
    return array


@pytest.mark.parametrize("options", [{"residual": "int8"}, {"residual": "int4"}, {"weight_rank": 4, "residual": None}])
def test_the_memory_of_all_weights_is_free_once_they_are_gone(options: dict) -> None:
    model = Block()
    freed = weakref.ref(in_an_array(model))
    assert freed() is not None
    embedding = model.wte.weight.detach().clone()
    adapted = peft.get_peft_model(model, wasi_peft.WasiConfig(target_modules=["up", "down"], **options))
    assert freed() is None
    assert torch.equal(model.wte.weight, embedding)
    assert torch.equal(model.position, torch.arange(4.0))
    adapted(torch.arange(4)).sum().backward()


def test_a_checkpoint_that_was_read_is_borrowed(tmp_path) -> None:
    save_file(Block().state_dict(), tmp_path / "model.safetensors")
    model = Block()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert borrowed_bytes(tensors) == sum(tensor.nbytes for tensor in tensors)
    peft.get_peft_model(model, wasi_peft.WasiConfig(target_modules=["up", "down"]))
    assert borrowed_bytes([*model.parameters(), *model.buffers()]) == 0


@pytest.mark.parametrize("options", [{"target_modules": ["up"]}, {"residual": "exact"}])
def test_where_most_of_it_stays_nothing_is_copied(options: dict) -> None:
    model = Block()
    array = in_an_array(model)
    address = model.wte.weight.data_ptr()
    peft.get_peft_model(model, wasi_peft.WasiConfig(**{"target_modules": ["up", "down"], **options}))
    assert model.wte.weight.data_ptr() == address
    assert array.nbytes > 0


def test_equal_views_stay_one_tensor() -> None:
    array = torch.from_numpy(numpy.arange(100.0))
    first, again, other = (nn.Parameter(part) for part in (array[:10], array[:10], array[20:30]))
    own_remainder([first, again, other], array.nbytes)
    assert first.data_ptr() == again.data_ptr() != array.data_ptr()
    assert torch.equal(other, array[20:30])


def test_views_that_overlap_are_left_alone() -> None:
    array = torch.from_numpy(numpy.arange(100.0))
    first, second = nn.Parameter(array[:10]), nn.Parameter(array[5:15])
    own_remainder([first, second], array.nbytes)
    assert first.data_ptr() == array.data_ptr()


def test_equal_views_count_once() -> None:
    array = torch.from_numpy(numpy.zeros(100))
    assert borrowed_bytes([array[:10], array[:10], array[50:60], torch.zeros(5)]) == 160
