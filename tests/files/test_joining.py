"""Files of tensors that are put into one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wasi_peft.files.joining import join_files

DTYPES = (torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8)


def test_all_tensors_are_in_the_new_file_whatever_they_are(tmp_path: Path) -> None:
    tensors = {
        f"{index}.{dtype}": torch.arange(size).reshape(-1, 1).to(dtype)
        for index, dtype in enumerate(DTYPES)
        for size in (0, 3, 2**20 + 1)
    }
    tensors |= {"scalar": torch.tensor(2.0), "wide": torch.randn(5, 7)}
    names = list(tensors)
    for part in range(3):
        save_file({name: tensors[name] for name in names[part::3]}, tmp_path / f"{part}", metadata={"part": "1"})
    join_files([tmp_path / f"{part}" for part in range(3)], tmp_path / "all")
    joined = load_file(tmp_path / "all")
    assert joined.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert joined[name].dtype == tensor.dtype and torch.equal(joined[name], tensor), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "all"]


def test_what_cannot_be_joined_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one")
    save_file({"a": torch.ones(2)}, tmp_path / "two")
    with pytest.raises(ValueError, match=r"a: must be in one file, got it in .*one and .*two"):
        join_files([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    (tmp_path / "two").write_bytes((tmp_path / "two").read_bytes()[:-1])
    with pytest.raises(ValueError, match="two: the file is damaged"):
        join_files([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
