"""Model cards: lines that load what they are of as they stand, whoever writes the card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from models import ARCHITECTURES, logits
from peft import PeftModel, TaskType, get_peft_model
from torch import nn

import wasi_peft
from wasi_peft import WasiConfig, compress, write_card
from wasi_peft.hub import cards

pytestmark = pytest.mark.usefixtures("exact_products")

VIT, BERT, LLAMA = (ARCHITECTURES[name] for name in ("vit", "bert", "llama"))


def snippet(folder: Path) -> str:
    """The Python of a card, for this folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(code).replace(cards.FOLDER, str(folder))


def base_of(architecture: Any, folder: Path, **options: Any) -> Any:
    """A base model from a folder, as a hub id would give it."""
    architecture.model().save_pretrained(folder)
    kind = type(architecture.model())
    return kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options).eval()


KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "as it is": (LLAMA, {}, {}),
    "with a task": (LLAMA, {}, {"task_type": TaskType.CAUSAL_LM}),
    "factors": (LLAMA, {}, {"weight_share": 0.6}),
    "classes of the base": (VIT, {}, {}),
    "a new head": (VIT, {"num_labels": 7}, {"modules_to_save": ["classifier"]}),
    "named classes": (
        BERT,
        {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}},
        {"task_type": TaskType.SEQ_CLS},
    ),
}


@pytest.mark.parametrize(("architecture", "options", "config"), KINDS.values(), ids=KINDS.keys())
def test_the_card_of_an_adapter_loads_it(
    architecture: Any, options: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    model = get_peft_model(base_of(architecture, tmp_path / "base", **options), WasiConfig(**config)).eval()
    batch = {key: value for key, value in architecture.batch().items() if key != "labels"}
    model.save_pretrained(tmp_path / "adapter")
    names: dict[str, Any] = {}
    exec(snippet(tmp_path / "adapter"), names)
    loaded = names["model"].eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    assert loaded.config.id2label == model.config.id2label
    card = ModelCard.load(tmp_path / "adapter/README.md")
    assert {"wasi", "arxiv:2510.09160"} <= set(card.data.tags) and card.data.library_name == "peft"
    assert card.data.base_model == str(tmp_path / "base")


@pytest.mark.parametrize("config", [{}, {"residual": "int4"}, {"weight_share": 0.6}])
def test_the_card_of_a_compressed_model_loads_it(config: dict[str, Any], tmp_path: Path) -> None:
    labels = {0: "cat", 1: "dog", 2: "cow"}
    base = base_of(VIT, tmp_path / "base", id2label=labels, label2id={name: index for index, name in labels.items()})
    model, batch = compress(base, WasiConfig(**config)), VIT.batch()
    model.save_pretrained(tmp_path / "small")
    write_card(model, tmp_path / "small", metrics={"accuracy": 0.5})
    names: dict[str, Any] = {}
    exec(snippet(tmp_path / "small"), names)
    assert torch.equal(logits(names["model"].eval(), batch), logits(model.eval(), batch))
    assert names["model"].config.id2label == labels
    text = (tmp_path / "small/README.md").read_text()
    assert "| accuracy | 0.5 |" in text and "| compressed layers | 12 |" in text
    card = ModelCard.load(tmp_path / "small/README.md")
    assert set(cards.TAGS) <= set(card.data.tags) and card.data.library_name == "transformers"
    assert card.data.base_model == str(tmp_path / "base")


def test_saved_again_it_says_it_once(tmp_path: Path) -> None:
    model = get_peft_model(base_of(LLAMA, tmp_path / "base"), WasiConfig())
    for _ in range(3):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("import wasi_peft") == text.count(cards.START) == text.count("## Loading") == 1
    assert text.startswith("---\n")


def test_the_card_of_the_trainer_keeps_it_and_its_own_words(tmp_path: Path) -> None:
    model = get_peft_model(base_of(LLAMA, tmp_path / "base"), WasiConfig())
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments)
    trainer.save_model()
    trainer.create_model_card(model_name="my model", tags="mine")
    text = (tmp_path / "out/README.md").read_text()
    assert text.count("import wasi_peft") == 1 and "my model" in text
    assert {"wasi", "mine"} <= set(ModelCard.load(tmp_path / "out/README.md").data.tags)


def test_a_compressed_model_that_the_trainer_saves_has_a_card(tmp_path: Path) -> None:
    """By its checkpoints, by `save_model`, and when the Trainer has written a card of its own, as it does to push."""
    base_of(LLAMA, tmp_path / "base")
    compress(LLAMA.model(), WasiConfig(weight_share=0.6)).save_pretrained(tmp_path / "small")
    model = type(LLAMA.model()).from_pretrained(tmp_path / "small")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 20, (4, 6))]
    out = tmp_path / "out"
    arguments = transformers.TrainingArguments(str(out), max_steps=1, save_steps=1, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    expected = logits(model.eval(), LLAMA.batch())
    for folder in (tmp_path / "small", out / "checkpoint-1", out):
        names: dict[str, Any] = {}
        exec(snippet(folder), names)
        equal = torch.equal(logits(names["model"].eval(), LLAMA.batch()), expected)
        assert equal == (folder != tmp_path / "small")
    for _ in range(2):
        trainer.create_model_card(model_name="my model", tags="mine")
    text = (out / "README.md").read_text()
    assert text.count("import wasi_peft") == 1 and "my model" in text and "| form | factors |" in text
    assert {"wasi", "mine"} <= set(ModelCard.load(out / "README.md").data.tags)
    dense = transformers.Trainer(LLAMA.model(), arguments, train_dataset=data)
    dense.save_model(str(tmp_path / "dense"))
    dense.create_model_card()
    assert not (tmp_path / "dense/README.md").exists() and "wasi_peft" not in (out / "README.md").read_text()


def test_words_of_the_user_stay(tmp_path: Path) -> None:
    model = compress(base_of(VIT, tmp_path / "base"))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- own\n---\n# Title\n\nMy words.\n")
    write_card(model, tmp_path)
    first = (tmp_path / "README.md").read_text()
    write_card(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and {"own", "wasi"} <= set(card.data.tags) and "My words." in card.text


UNREADABLE = [
    b"---\n: [a\n---\nMine.",
    b"---\na\n---\nMine.",
    b"---\n1: 2\n---\nMine.",
    b"---\ntags: 3\n---\n",
    b"\xff\xfe",
]


@pytest.mark.parametrize("kind", ["compressed", "adapter"])
@pytest.mark.parametrize("text", UNREADABLE)
def test_a_card_that_cannot_be_read_is_left_alone(
    text: bytes, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compress(VIT.model()) if kind == "compressed" else get_peft_model(VIT.model(), WasiConfig())
    path = tmp_path / "README.md"
    path.write_bytes(text)
    model.save_pretrained(tmp_path)
    assert path.read_bytes() == text and len(list(tmp_path.iterdir())) > 2
    assert f"{path}: the front matter of a card must be YAML, a dict: " in caplog.text
    with pytest.raises(ValueError, match=r"README\.md: the front matter of a card must be YAML"):
        write_card(model, tmp_path)


def test_tags_that_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags:\n- 2024\n- own\n---\n")
    compress(VIT.model()).save_pretrained(tmp_path)
    assert {2024, "own", "wasi"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_many_classes_do_not_bury_the_snippet(tmp_path: Path) -> None:
    labels = {index: f"class {index}" for index in range(200)}
    base = base_of(VIT, tmp_path / "base", id2label=labels, label2id={name: index for index, name in labels.items()})
    get_peft_model(base, WasiConfig(modules_to_save=["classifier"])).save_pretrained(tmp_path)
    assert "num_labels=200" in snippet(tmp_path) and "class 7" not in snippet(tmp_path)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), WasiConfig(target_modules=["0"], weight_rank=2))
    model.save_pretrained(tmp_path)
    assert "PeftModel.from_pretrained(base" in snippet(tmp_path)


def test_adapters_of_other_methods_have_their_own_card(tmp_path: Path) -> None:
    peft.get_peft_model(LLAMA.model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "wasi" not in (tmp_path / "README.md").read_text()


def test_what_a_card_is_not_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a card is for a model with a WASI adapter or compressed layers"):
        write_card(VIT.model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_former_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(VIT.model())
    path = write_card(model, tmp_path)
    before = path.read_text()

    def fail(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr("wasi_peft.files.whole.flush", fail)
    with pytest.raises(OSError, match="full"):
        write_card(model, tmp_path, metrics={"accuracy": 1.0})
    assert path.read_text() == before and [each.name for each in tmp_path.iterdir()] == ["README.md"]


def test_installed_once() -> None:
    before = PeftModel.create_or_update_model_card
    cards.install()
    assert PeftModel.create_or_update_model_card is before
    assert wasi_peft.write_card is write_card
