"""What the command line loads: models with or without weights, adapters, empty batches, calibration data."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch.utils.data import DataLoader
from transformers.quantizers.auto import AutoHfQuantizer

from ..files.objects import read_object
from ..forms.dense import weight_shape
from ..hub.checkpoint import IN_FOLDERS
from ..hub.compressed import METHOD
from ..hub.settings import PROCESSOR_FILES, copy_processors
from ..models.experts import conceal_experts, expose_experts
from ..models.texts import ordinary_tokens
from ..tuner.config import WasiConfig
from ..tuner.registration import NAME
from ..tuner.targets import default_target_names

SEQUENCE_LENGTH = 128
ADAPTER_CONFIG = "adapter_config.json"
_MISSING = "{}: no such file or folder."
IGNORED_LABEL = -100  # what losses of transformers leave out
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class Task(NamedTuple):
    """What a model is for: the ends of its architecture's name, its auto class, what its labels are."""

    architectures: tuple[str, ...]
    auto_class: str
    labels: str | None


TASKS = {
    "image-classification": Task(("ForImageClassification",), "AutoModelForImageClassification", "classes"),
    "text-classification": Task(("ForSequenceClassification",), "AutoModelForSequenceClassification", "classes"),
    "token-classification": Task(("ForTokenClassification",), "AutoModelForTokenClassification", "tokens"),
    "causal-lm": Task(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM", "tokens"),
    "masked-lm": Task(("ForMaskedLM",), "AutoModelForMaskedLM", "tokens"),
    "seq2seq-lm": Task(("ForConditionalGeneration",), "AutoModelForSeq2SeqLM", "tokens"),
    "features": Task(("Model",), "AutoModel", None),
}


# -------------------------------------------------------------------- models


def load_model(arguments: argparse.Namespace, weights: bool) -> tuple[transformers.PreTrainedModel, str]:
    """The model and its task; without weights it takes no memory, whatever its size."""
    source, config = arguments.model, read_config(arguments)
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    task = arguments.task or task_of((config.architectures or ["nothing"])[0])
    auto_class = getattr(transformers, TASKS[task].auto_class)
    if arguments.dtype:
        options["dtype"] = getattr(torch, arguments.dtype)
    with reading(source):
        if weights:
            labels = {"num_labels": arguments.num_labels} if getattr(arguments, "num_labels", None) else {}
            return auto_class.from_pretrained(source, **options, **labels), task
        with torch.device("meta"):
            model = auto_class.from_config(config, **options)
        if quantized_by(config) == METHOD:
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.preprocess_model(model)
            quantizer.postprocess_model(model)
        return model, task


def read_config(arguments: argparse.Namespace) -> transformers.PretrainedConfig:
    """The configuration of the model that is named."""
    check_model(arguments.model)
    with reading(arguments.model):
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    return config


def check_model(source: str) -> None:
    """Refuse what is no folder of a model and cannot be a hub id."""
    if os.path.isfile(source):
        raise ValueError(f"{source}: must be a folder or a hub id, got a file.")
    if not os.path.isdir(source) and (source.endswith(".json") or source.startswith((".", os.sep))):
        raise ValueError(_MISSING.format(source))
    folder = Path(source)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        settings = read_object(folder / ADAPTER_CONFIG)
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
        raise ValueError(f"{source}: must be a model, got an adapter of type {kind}; its base model is {base!r}.")


def quantized_by(config: transformers.PretrainedConfig) -> str | None:
    """Name of the method that a configuration says to have stored the weights, None for dense ones."""
    known = getattr(config, "quantization_config", None)
    method: str | None = known.get("quant_method") if isinstance(known, dict) else getattr(known, "quant_method", None)
    return method


def load_with_adapter(arguments: argparse.Namespace) -> Any:
    """A model; where a WASI adapter's folder is named, its base model with the adapter."""
    folder, base = Path(arguments.model), base_of(arguments)
    if base is None:
        return load_model(arguments, weights=True)[0]
    settings = adapter_settings(folder)
    adapter_config(folder)
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(f"{folder}: must hold the adapter's weights, {SAFETENSORS_WEIGHTS_NAME}, got none.")
    of_base = argparse.Namespace(**{**vars(arguments), "model": base})
    known = settings.get("auto_mapping") or {}
    if arguments.task is None and known.get("base_model_class"):
        of_base.task = task_of(known["base_model_class"])
    try:
        model, _ = load_model(of_base, weights=True)
    except OSError as error:
        raise OSError(
            f"{folder}: its base model {base!r} cannot be read; give another place with --base: {error}"
        ) from error
    with reading(str(folder)):
        return PeftModel.from_pretrained(model, str(folder)).eval()


def base_of(arguments: argparse.Namespace) -> str | None:
    """The base model of an adapter's folder, by `--base` or as the adapter names it; None of anything else."""
    folder = Path(arguments.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        if arguments.base:
            raise ValueError(f"--base goes with an adapter's folder; {folder} is none.")
        return None
    base: str | None = arguments.base or adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}: the adapter does not name its base model; give it with --base.")
    return base


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the folder of a WASI adapter says of it."""
    settings = read_object(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type")
    if kind != NAME:
        raise ValueError(f"{folder}: must be an adapter of type {NAME}, got {kind}.")
    return settings


def adapter_config(folder: Path) -> WasiConfig:
    """The configuration of a WASI adapter's folder."""
    adapter_settings(folder)
    with reading(str(folder)), naming(folder / ADAPTER_CONFIG):
        config: WasiConfig = WasiConfig.from_pretrained(str(folder))
    return config


def check_file(path: str) -> None:
    """Refuse a path that is no file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: must be a file, got a folder." if os.path.isdir(path) else _MISSING.format(path))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a file is said with its name."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What is wrong with a model's own files is for the user to set right, whatever kind of error it ends in."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(source):
            raise
        raise OSError(f"{source!r} is no folder, and cannot be had from the hub: {error}") from error
    except (ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{source}: cannot be read: {type(error).__name__}: {error}") from error


def task_of(architecture: str) -> str:
    """The task that the name of a model's class tells."""
    for name, task in TASKS.items():
        if architecture.endswith(task.architectures):
            return name
    raise ValueError(f"the model's configuration says {architecture}; name one of {list(TASKS)} with --task.")


class Target(NamedTuple):
    """A layer that WASI replaces: its sizes, and how many weights it has, of packed experts one each."""

    out_features: int
    in_features: int
    experts: int

    @property
    def elements(self) -> int:
        """Elements of all of its weights."""
        return self.experts * self.out_features * self.in_features


def target_sizes(model: transformers.PreTrainedModel) -> dict[str, Target]:
    """The layers that WASI replaces by default, in the model's order."""
    expose_experts(model)
    try:
        targets = default_target_names(model, WasiConfig())
        modules = [(name, module) for name, module in model.named_modules() if name in targets]
        return {name: Target(*weight_shape(module), getattr(module, "experts", 1)) for name, module in modules}
    finally:
        conceal_experts(model)


def task_heads(model: transformers.PreTrainedModel, task: str) -> list[str] | None:
    """Modules of a classification model outside its backbone, which are trained whole."""
    if not task.endswith("classification"):
        return None
    others = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    return [name for name, module in others if any(True for _ in module.parameters())] or None


def _reads_images(model: transformers.PreTrainedModel) -> bool:
    if model.main_input_name not in ("pixel_values", "input_ids"):
        raise ValueError(f"the model must read 'pixel_values' or 'input_ids', got {model.main_input_name!r}.")
    return bool(model.main_input_name == "pixel_values")


def dummy_batch(arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str) -> dict[str, Any]:
    """A batch of the asked shape without content, on the model's device where it holds floating point numbers."""
    try:
        return _dummy_batch(arguments, model, task)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"--batch-size {arguments.batch_size}: there is no memory for such a batch: {error}"
        ) from error


def _dummy_batch(arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str) -> dict[str, Any]:
    samples, config = arguments.batch_size, model.config
    if _reads_images(model):
        shape = (samples, getattr(config, "num_channels", 3), *_image_size(arguments, model))
        batch: dict[str, Any] = {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}
        batch.update(_image_options(arguments, model))
        tokens = None
    else:
        # an id that is no padding
        tokens = torch.full((samples, _sequence_length(arguments, model)), int(config.pad_token_id == 0))
        lengths = text_lengths(samples, tokens.shape[1], getattr(arguments, "padding", None) or 0.0)
        mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()
        batch = {"input_ids": tokens, "attention_mask": mask}
    if TASKS[task].labels == "tokens":
        assert tokens is not None
        batch["labels"] = tokens if bool(mask.all()) else tokens.masked_fill(mask == 0, IGNORED_LABEL)
    elif TASKS[task].labels == "classes":
        several = config.problem_type == "multi_label_classification"
        kind = torch.float32 if several or config.num_labels == 1 else torch.long
        batch["labels"] = torch.zeros((samples, config.num_labels) if several else (samples,), dtype=kind)
    return batch


def text_lengths(samples: int, longest: int, padding: float) -> list[int]:
    """Tokens of each text of a batch as long as its first one; the others spread evenly, so that a share is padding.

    Raises:
        ValueError: If so much of a batch cannot be padding.

    Example:
        >>> text_lengths(4, 16, 0.5)
        [16, 8, 5, 2]
    """
    others = samples - 1
    left = (1 - padding) * samples * longest - longest  # tokens of the others
    if left < others - 1e-6:
        most = 1 - (longest + others) / (samples * longest)
        raise ValueError(
            f"--padding must be at most {math.floor(1000 * most) / 1000} for {samples} texts of which one has "
            f"{longest} tokens, got {padding}."
        )
    mean = left / max(1, others)
    spread = min(mean - 1, longest - mean)  # to either side
    return [longest, *(round(mean + spread * (1 - (2 * index + 1) / others)) for index in range(others))]


def padding_share(batches: Iterable[dict[str, Any]]) -> float:
    """Share of tokens that are padding in batches of texts."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def random_content(batch: dict[str, Any], model: transformers.PreTrainedModel) -> None:
    """Fills images with noise and texts with tokens, the same every time; rows of zeros would have no subspace."""
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in batch:
        batch["pixel_values"].normal_(generator=generator)
        return
    ordinary = ordinary_tokens(model.config)
    chosen = torch.randint(len(ordinary), batch["input_ids"].shape, generator=generator)
    batch["input_ids"].copy_(ordinary[chosen])


def _image_size(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> tuple[int, int]:
    for option in ("sequence_length", "padding", "skip_padding"):
        if getattr(arguments, option, None):
            raise ValueError(f"--{option.replace('_', '-')} is for text, {type(model).__name__} reads images.")
    size = arguments.image_size or getattr(model.config, "image_size", None)
    if size is None:
        raise ValueError("--image-size is needed: the model's configuration does not say.")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _image_options(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> dict[str, bool]:
    """What a model must be told about images of another size than its own."""
    name = "interpolate_pos_encoding"
    return {name: True} if arguments.image_size and name in inspect.signature(model.forward).parameters else {}


def _sequence_length(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> int:
    for option in ("image_size", "token_keep"):
        if getattr(arguments, option, None):
            raise ValueError(f"--{option.replace('_', '-')} is for images, {type(model).__name__} reads text.")
    largest = getattr(model.config, "max_position_embeddings", None) or arguments.sequence_length or SEQUENCE_LENGTH
    length = arguments.sequence_length or min(SEQUENCE_LENGTH, largest)
    if length > largest:
        raise ValueError(f"--sequence-length must be at most {largest} for this model, got {length}.")
    return int(length)


# -------------------------------------------------------------------- tokenizers and processors

_MARKS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def bring_processors(arguments: argparse.Namespace, folder: Path) -> None:
    """Files of tokenizer and processor of an adapter, or else of its base model, beside those of a model."""
    source = Path(arguments.model)
    if not any((source / name).is_file() for name in _MARKS):
        base = str(base_of(arguments))
        patterns = [f"*{ending}" for ending in PROCESSOR_FILES]
        if not os.path.isdir(base):
            base = snapshot_download(base, allow_patterns=patterns, ignore_patterns=list(IN_FOLDERS))
        source = Path(base)
    copy_processors(source, folder)


# -------------------------------------------------------------------- data


def calibration_batches(
    arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str
) -> Iterable[dict[str, Any]]:
    """Batches of the data that are named, made ready for the model."""
    path = Path(arguments.data)
    if not path.exists():
        raise ValueError(_MISSING.format(path))
    if _reads_images(model):
        items: list[Any] = _image_paths(path)
        collate = _image_collator(arguments, model)
    else:
        items = _texts(path, arguments.text_key)
        collate = _text_collator(arguments, model, task)
    # spread over the whole: sorted folders hold one class after another
    items = items[:: max(1, len(items) // arguments.samples)][: arguments.samples]
    return DataLoader(items, batch_size=arguments.batch_size, collate_fn=collate)  # type: ignore[arg-type]


def _image_paths(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: must be a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
    return paths


def _image_collator(arguments: argparse.Namespace, model: transformers.PreTrainedModel) -> Any:
    with reading(arguments.model), naming(arguments.model):
        processor = transformers.AutoImageProcessor.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    options: dict[str, Any] = {}
    if arguments.image_size:
        square = {"height": arguments.image_size, "width": arguments.image_size}
        cropped = getattr(processor, "do_center_crop", False)
        options = (
            {"size": {"shortest_edge": arguments.image_size}, "crop_size": square} if cropped else {"size": square}
        )
    extra = _image_options(arguments, model)

    def collate(paths: list[Path]) -> dict[str, Any]:
        from PIL import Image

        images = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except Exception as error:  # of a damaged file Pillow raises whatever it stumbles on
                raise ValueError(f"{path}: {error}") from error
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        return {"pixel_values": pixels.to(model.dtype), **extra}

    return collate


def _texts(path: Path, key: str) -> list[str]:
    if path.is_dir():
        raise ValueError(f"{path}: must be a text file or a .jsonl file for a text model, got a folder.")
    with naming(path), path.open(encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    texts = [line.strip() for _, line in lines]
    if path.suffix == ".jsonl":
        texts = [_text_of(line, key, f"{path}, line {number}") for number, line in lines]
    if not texts:
        raise ValueError(f"{path}: must hold at least one line of text, got none.")
    return texts


def _text_of(line: str, key: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        found = list(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: must be an object with the text under {key!r} (see --text-key), got {found}.")
    return str(entry[key])


def _text_collator(arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str) -> Any:
    with reading(arguments.model), naming(arguments.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = _sequence_length(arguments, model)

    def collate(texts: list[str]) -> dict[str, Any]:
        tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        # the decoder's input; there is no other text to give it
        return {**batch, "labels": tokens["input_ids"]} if task == "seq2seq-lm" else batch

    return collate
