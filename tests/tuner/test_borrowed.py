"""A model of which most weights are gone does not keep the file that they were read from."""

import mmap
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wasi_peft
from wasi_peft.tuner import borrowed, targets
from wasi_peft.tuner.borrowed import borrowed_bytes, own_remainder
from wasi_peft.tuner.layer import WasiLayer
from wasi_peft.tuner.model import WasiModel


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


def mapped(folder: Path, rows: int = 1024) -> torch.Tensor:
    """A weight of 4 MiB whose memory is a file, and whose values have been read."""
    save_file({"before": torch.zeros(7), "weight": torch.randn(rows, 1024)}, folder / "model.safetensors")
    weight = load_file(folder / "model.safetensors")["weight"]
    weight.sum()
    return weight


def pages_in_memory(tensor: torch.Tensor) -> int:
    first = tensor.data_ptr() // mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(8 * first)
        return sum(word >> 63 for word in memoryview(pages.read(8 * count)).cast("Q"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_pages_of_a_file_that_are_done_with_leave_memory(tmp_path: Path) -> None:
    weight = mapped(tmp_path)
    before = weight.clone()
    assert pages_in_memory(weight) >= 1024
    borrowed.MappedFiles().forget([weight, torch.zeros(2**20)])
    assert pages_in_memory(weight) <= 2  # the first and the last may hold other tensors
    assert torch.equal(weight, before)


@linux
def test_pages_that_were_written_to_stay(tmp_path: Path) -> None:
    weight = mapped(tmp_path)
    weight[500] = 3.0
    before = weight.clone()
    borrowed.MappedFiles().forget([weight])
    assert pages_in_memory(weight) >= 1024
    assert torch.equal(weight, before)


def test_without_a_list_of_mapped_files_nothing_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: str, *_: Any, **__: Any) -> Any:
        raise FileNotFoundError(path)

    weight = mapped(tmp_path)
    monkeypatch.setattr("builtins.open", absent)
    files = borrowed.MappedFiles()
    monkeypatch.undo()
    files.forget([weight])
    assert weight.isfinite().all()


@linux
def test_a_checkpoint_is_in_memory_a_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read to be checked, for the start of the factors and to be rounded, and leave memory each time."""
    save_file(Block(512).state_dict(), tmp_path / "model.safetensors")
    model = Block(512)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    weights = [model.up.weight, model.down.weight]
    seen: list[tuple[str, list[int]]] = []

    def watched(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, [pages_in_memory(weight) for weight in weights]))
            result = original(*args, **kwargs)
            seen.append((f"{name} done", [pages_in_memory(weight) for weight in weights]))
            return result

        monkeypatch.setattr(owner, name, watching)

    watched(targets, "_check_target")
    watched(WasiModel, "_initial_factors")
    watched(WasiLayer, "release_base")
    peft.get_peft_model(model, wasi_peft.WasiConfig(target_modules=["up", "down"], weight_rank=4))
    names = [name for name, _ in seen]
    assert {"_check_target", "_initial_factors", "release_base"} <= set(names)
    for name, pages in seen:
        assert sum(count > 32 for count in pages) <= 1, f"{name}: {pages}"  # the system reads ahead by 16
    # they were read, in full, and all are gone in the end
    assert max(count for name, pages in seen for count in pages if name == "_initial_factors done") >= 255
    assert max(count for name, pages in seen for count in pages if name == "_check_target done") >= 255


def test_views_that_overlap_are_left_alone() -> None:
    array = torch.from_numpy(numpy.arange(100.0))
    first, second = nn.Parameter(array[:10]), nn.Parameter(array[5:15])
    own_remainder([first, second], array.nbytes)
    assert first.data_ptr() == array.data_ptr()


def test_equal_views_count_once() -> None:
    array = torch.from_numpy(numpy.zeros(100))
    assert borrowed_bytes([array[:10], array[:10], array[50:60], torch.zeros(5)]) == 160
