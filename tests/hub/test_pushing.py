"""What is uploaded to a hub, of which a folder takes the place: the files of a model, and a card that loads it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, ModelCard, RepoUrl, constants
from huggingface_hub.errors import EntryNotFoundError
from models import ARCHITECTURES, logits, train
from peft import get_peft_model

from wasi_peft import WasiConfig, compress
from wasi_peft.hub import cards

pytestmark = pytest.mark.usefixtures("exact_products")
LLAMA = ARCHITECTURES["llama"]


class Hub:
    """The calls of `HfApi` that uploads make, and the card that is read before; files go into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def create_repo(self, repo_id: str, **_: Any) -> RepoUrl:
        return RepoUrl(f"{constants.ENDPOINT}/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **_: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                (self.folder / operation.path_in_repo).write_bytes(file.read())
        return repo_id

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
        for path in Path(folder_path).iterdir():
            if path.is_file():
                shutil.copyfile(path, self.folder / path.name)
        return repo_id

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        path = self.folder / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for module in (transformers.utils.hub, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", hub.download)
    return hub


def as_its_card_says(folder: Path) -> Any:
    """The model that the lines of a card load."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(str(code).replace(cards.FOLDER, str(folder)), names)
    return names["model"].eval()


def base(folder: Path) -> Any:
    LLAMA.model().save_pretrained(folder)
    return type(LLAMA.model()).from_pretrained(folder)


def check(hub: Hub, files: set[str], model: Any, library: str) -> None:
    assert {path.name for path in hub.folder.iterdir()} >= files
    card = ModelCard.load(hub.folder / "README.md")
    assert set(cards.TAGS) <= set(card.data.tags) and card.data.library_name == library
    assert card.text.count(cards.START) == 1
    batch = LLAMA.batch()
    torch.testing.assert_close(logits(as_its_card_says(hub.folder), batch), logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [{}, {"weight_share": 0.6}], ids=str)
def test_a_compressed_model(config: dict[str, Any], hub: Hub, tmp_path: Path) -> None:
    model = compress(base(tmp_path / "base"), WasiConfig(**config))
    model.push_to_hub("me/small", tags=["mine"])
    check(hub, {"config.json", "model.safetensors", "README.md"}, model, "transformers")
    assert "mine" in ModelCard.load(hub.folder / "README.md").data.tags
    text = (hub.folder / "README.md").read_text()
    (hub.folder / "README.md").write_text(f"{text}\nMy words.\n")
    model.push_to_hub("me/small")
    check(hub, set(), model, "transformers")
    assert "My words." in (hub.folder / "README.md").read_text()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_adapter(compressed: bool, hub: Hub, tmp_path: Path) -> None:
    dense = base(tmp_path / "base")
    if compressed:
        compress(dense, WasiConfig(weight_share=0.6)).save_pretrained(tmp_path / "small")
        dense = type(dense).from_pretrained(tmp_path / "small")
    model = get_peft_model(dense, WasiConfig(update="low_rank" if compressed else None))
    train(model, LLAMA.batch())
    model.push_to_hub("me/adapter")
    check(hub, {"adapter_config.json", "adapter_model.safetensors", "README.md"}, model, "peft")
    assert not (hub.folder / "model.safetensors").exists()


def test_an_adapter_by_the_trainer(hub: Hub, tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path / "base"), WasiConfig())
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1, hub_model_id="me/trained", disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 20, (4, 6))]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    check(hub, {"adapter_config.json", "adapter_model.safetensors", "README.md"}, model, "peft")
    assert "Training procedure" in (hub.folder / "README.md").read_text()


def test_models_of_others_are_uploaded_as_they_were(hub: Hub) -> None:
    LLAMA.model().push_to_hub("me/dense")
    assert "wasi" not in (hub.folder / "README.md").read_text()
