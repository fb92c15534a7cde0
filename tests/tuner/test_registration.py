"""PEFT knows the type `WASI` after one import, in either order, and a saved adapter loads with that import alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import ARCHITECTURES, logits, train, wasi_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file

import wasi_peft
from wasi_peft import WasiConfig
from wasi_peft.tuner.model import WasiModel
from wasi_peft.tuner.registration import PEFT_TYPE, _enum_member, register


def check_member() -> None:
    member = PeftType("WASI")
    assert member is PeftType.WASI is PeftType["WASI"] is PEFT_TYPE  # type: ignore[attr-defined]
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert (member.name, member.value) == ("WASI", "WASI")
    assert member == "WASI" and hash(member) == hash("WASI")
    assert member in PeftType and list(PeftType).count(member) == 1
    assert len(list(PeftType)) == len(PeftType) == len(PeftType.__members__)
    assert repr(member).startswith("<PeftType.WASI") and f"{member.value.lower()}_" == WasiModel.prefix


def test_a_real_member_of_the_enum() -> None:
    check_member()


def test_pickle_and_copy_keep_identity() -> None:
    assert pickle.loads(pickle.dumps(PEFT_TYPE)) is PEFT_TYPE
    assert copy.copy(PEFT_TYPE) is PEFT_TYPE and copy.deepcopy(PEFT_TYPE) is PEFT_TYPE


def test_tables() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is WasiConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is WasiModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == "wasi_"
    assert peft.get_peft_config({"peft_type": "WASI", "weight_rank": 3}).weight_rank == 3


def test_registering_again_changes_nothing() -> None:
    sizes = [len(PeftType), *map(len, (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING))]
    assert _enum_member() is PEFT_TYPE
    register(WasiConfig, WasiModel)
    check_member()
    test_tables()
    assert sizes == [len(PeftType), *map(len, (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING))]


def test_other_methods_are_as_before() -> None:
    assert PeftType("LORA") is PeftType.LORA and PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"
    with pytest.raises(ValueError, match="WASABI"):
        PeftType("WASABI")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = Path(wasi_peft.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(path)!r})\n{script}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


LOAD = """
import wasi_peft
import torch
from peft import {auto_class}
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder = sys.argv[1]
model = {auto_class}.from_pretrained(folder + "/adapter").eval()
batch = load_file(folder + "/batch.safetensors")
with torch.no_grad():
    save_file({{"logits": model(**batch).logits}}, folder + "/result.safetensors")
"""

BARE = """
from peft import PeftConfig
assert "wasi_peft" not in sys.modules
PeftConfig.from_pretrained(sys.argv[1] + "/adapter")
"""


def test_another_process_loads_with_one_import_and_fails_without(tmp_path: Path) -> None:
    """wasi_peft is imported first there, peft first here."""
    architecture = ARCHITECTURES["bert"]
    base = architecture.model()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = wasi_model(base, weight_rank=4, task_type="SEQ_CLS")
    batch = architecture.batch()
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    save_file(batch, tmp_path / "batch.safetensors")

    done = run(LOAD.format(auto_class=architecture.auto_class), tmp_path)
    assert done.returncode == 0, done.stderr
    result = load_file(tmp_path / "result.safetensors")["logits"]
    torch.testing.assert_close(result, logits(model, batch), atol=1e-6, rtol=1e-6)

    bare = run(BARE, tmp_path)
    assert bare.returncode != 0
    assert bare.stderr.rstrip().endswith("KeyError: 'WASI'")
    assert "import wasi_peft" in (tmp_path / "adapter" / "README.md").read_text()
