"""The models of `real_models.py`, each in a folder as a user has it: weights, tokenizer or processor, data beside it.

DINOv2-small, MiniLM and SmolLM2-135M with their weights; Swin-T, and a mixture of experts of Mixtral's geometry, from
their configurations with random ones.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from common import Batch
from images import load_images
from texts import load_mails, minilm_folder, smollm2_folder
from vit import load_vit

SAMPLES = 32  # of the data, a file or line each
MIXTRAL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 896,  # 3.5 times as wide, as Mixtral's
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Real:
    """A model and how it is used.

    Attributes:
        title: For tables.
        write: Writes its folder.
        auto_class: transformers' class that loads it.
        samples: Of a batch.
        size: Pixels of an image's side, or tokens of a text.
        images: Whether it reads images.
        layer: A linear layer of it, by name.
        rate: Learning rate of AdamW.
    """

    title: str
    write: Callable[[Path], None]
    auto_class: str
    samples: int
    size: int
    images: bool
    layer: str
    rate: float = 5e-4

    @property
    def is_lm(self) -> bool:
        """Whether it is a language model."""
        return "CausalLM" in self.auto_class

    @property
    def head(self) -> list[str] | None:
        """What trains whole."""
        return None if self.is_lm else ["classifier"]

    @property
    def options(self) -> list[str]:
        """Options of the command line that say what a batch is."""
        size = ["--image-size" if self.images else "--sequence-length", str(self.size)]
        return ["--batch-size", str(self.samples), *size]


class Place:
    """The folders of one model, made where they are missing.

    Args:
        name: In :data:`MODELS`.
        work: Where the folders of all models are.
    """

    def __init__(self, name: str, work: Path) -> None:
        """Writes the model and its data, unless they are there."""
        self.name, self.model, self.path = name, MODELS[name], work / name
        self.dense_folder = self.path / "dense"
        self.data = self.path / ("images" if self.model.images else "texts.txt")
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.dense_folder.is_dir():
            scratch = self.path / "dense.partial"
            self.model.write(scratch)
            scratch.rename(self.dense_folder)
        if not self.data.exists():
            self._write_data()

    def _write_data(self) -> None:
        if not self.model.images:
            lines = [" ".join(text.split()) for text, _ in load_mails(SAMPLES)]
            self.data.write_text("\n".join(lines), encoding="utf-8")
            return
        from PIL import Image

        images, _ = load_images(train=SAMPLES, test=1)
        scratch = self.path / "images.partial"
        scratch.mkdir(exist_ok=True)
        for index, pixels in enumerate(images.images):
            Image.fromarray(pixels[0].numpy()).resize((self.model.size,) * 2).save(scratch / f"{index}.png")
        scratch.rename(self.data)

    def dense(self) -> nn.Module:
        """The dense model."""
        cls = getattr(transformers, self.model.auto_class)
        return cls.from_pretrained(self.dense_folder, dtype=torch.float32).eval()

    def batches(self, count: int = 1, labels: bool = True, spread: int = 1) -> list[Batch]:
        """Batches of the data, labels included if asked for; texts are padded to the longest of their batch.

        Args:
            count: How many.
            labels: Whether they have labels.
            spread: How much shorter than the longest ones other texts are.
        """
        size, samples = self.model.size, self.model.samples
        if self.model.images:
            images, _ = load_images(train=count * samples, test=1, image_size=size)
            every = [
                images.__getitems__(range(start, start + samples)) for start in range(0, count * samples, samples)
            ]
            batches = [torch.utils.data.default_collate(items) for items in every]
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.dense_folder)
            tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
            mails, batches = load_mails(count * samples), []
            for start in range(0, count * samples, samples):
                texts, marks = zip(*mails[start : start + samples], strict=True)
                # mails are long: some are cut shorter, so that there is padding
                words = [size // (1 + spread * (index % 3)) for index in range(len(texts))]
                cut = [" ".join(text.split()[:most]) for text, most in zip(texts, words, strict=True)]
                tokens = tokenizer(cut, return_tensors="pt", padding=True, truncation=True, max_length=size)
                batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
                mask = batch["attention_mask"]
                wanted = batch["input_ids"].masked_fill(mask == 0, -100) if self.model.is_lm else torch.tensor(marks)
                batches.append({**batch, "labels": wanted})
        kept = [{name: value for name, value in batch.items() if labels or name != "labels"} for batch in batches]
        return kept


def _write_dinov2(folder: Path) -> None:
    load_vit().save_pretrained(folder)
    _write_processor(folder, 98)


def _write_swin(folder: Path) -> None:
    torch.manual_seed(0)
    transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=10)).save_pretrained(folder)
    _write_processor(folder, 224)


def _write_processor(folder: Path, size: int) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _write_minilm(folder: Path) -> None:
    torch.manual_seed(0)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    load(minilm_folder(), num_labels=2, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)


def _write_smollm2(folder: Path) -> None:
    os.symlink(smollm2_folder(), folder)


def _write_mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    config = transformers.MixtralConfig(**MIXTRAL, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CLASSIFIES, WRITES = "AutoModelFor{}Classification", "AutoModelForCausalLM"
MODELS = {
    "dinov2": Real(
        "DINOv2-small", _write_dinov2, CLASSIFIES.format("Image"), 8, 98, True, "dinov2.encoder.layer.0.mlp.fc1"
    ),
    "minilm": Real(
        "MiniLM", _write_minilm, CLASSIFIES.format("Sequence"), 8, 64, False, "bert.encoder.layer.0.intermediate.dense"
    ),
    "smollm2": Real("SmolLM2-135M", _write_smollm2, WRITES, 2, 64, False, "model.layers.0.mlp.up_proj", 1e-3),
    "swin": Real(
        "Swin-T geometry",
        _write_swin,
        CLASSIFIES.format("Image"),
        4,
        224,
        True,
        "swin.encoder.layers.0.blocks.0.mlp.fc1",
    ),
    "mixtral": Real("Mixtral geometry", _write_mixtral, WRITES, 4, 64, False, "model.layers.0.self_attn.q_proj", 1e-3),
}
