"""Model cards: what a published adapter or compressed model is, and lines that load it as they stand.

PEFT writes an adapter's card whenever it is saved, and again when the Trainer has written its own; transformers writes
none for a model, and its Trainer one that knows nothing of this package; `push_to_hub` puts that of the repository, or
an empty one, in the place of either. :func:`install` has this package add its part each time.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..files.whole import whole_file
from ..forms.compressed import Compressed
from ..tuner.model import WasiModel
from ..tuner.summary import WasiSummary, wasi_summary

logger = logging.getLogger(__name__)

CARD = "README.md"
TAGS = ("wasi", "arxiv:2510.09160")
FOLDER = "path/to/this/folder"  # stands for the folder or hub id in snippets
START, END = "<!-- wasi_peft: start -->", "<!-- wasi_peft: end -->"
MANY_LABELS = 100  # more names of classes would bury the rest of a snippet


def loading_snippet(model: nn.Module) -> str:
    """Lines of Python that load a PEFT model with a WASI adapter, or a compressed model, from :data:`FOLDER`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name, library = type(base).__name__, type(base).__module__.partition(".")[0]
    if not isinstance(base, PreTrainedModel) or library != "transformers":
        call = f'model = PeftModel.from_pretrained(base, "{FOLDER}")  # base: the {name} that it was trained on'
        return f"import wasi_peft  # registers WASI with PEFT\nfrom peft import PeftModel\n\n{call}"
    if not isinstance(model, PeftModel):
        return (
            f"import wasi_peft  # tells transformers how to read it\nfrom transformers import {name}\n\n"
            f'model = {name}.from_pretrained("{FOLDER}")'
        )
    config = model.active_peft_config
    arguments = [repr(config.base_model_name_or_path or base.name_or_path or "base model")]
    if config.revision is not None:
        arguments.append(f"revision={config.revision!r}")
    arguments += _head_arguments(base, bool(config.modules_to_save))
    return (
        "import wasi_peft  # registers WASI with PEFT\nfrom peft import PeftModel\n"
        f"from transformers import {name}\n\nbase = {name}.from_pretrained({', '.join(arguments)})\n"
        f'model = PeftModel.from_pretrained(base, "{FOLDER}")'
    )


def _head_arguments(base: PreTrainedModel, saved_whole: bool) -> list[str]:
    """What gives the base model the head that was trained, and the names of its classes."""
    if "Classification" not in type(base).__name__:
        return []
    labels = {int(index): str(label) for index, label in (base.config.id2label or {}).items()}
    named = any(label != f"LABEL_{index}" for index, label in labels.items())
    given = f"id2label={labels!r}" if named and len(labels) <= MANY_LABELS else f"num_labels={base.config.num_labels}"
    return [given, "ignore_mismatched_sizes=True"] if saved_whole else [given]


def _facts(model: nn.Module) -> list[tuple[str, str]]:
    """Rows of a card's table."""
    if isinstance(model, PeftModel):
        return _facts_of_adapter(wasi_summary(model, model.active_adapter), model)
    layers = [layer for layer in model.modules() if isinstance(layer, Compressed)]
    kept = sum(tensor.nbytes for layer in layers for tensor in layer.stored().values())
    dense = sum(layer.weight.numel() * layer.weight.dtype.itemsize for layer in layers)
    forms = sorted({layer.form_name for layer in layers})
    ranks = sorted(layer.rank for layer in layers if layer.rank)
    rows = [("compressed layers", str(len(layers))), ("form", " and ".join(forms))]
    if ranks:
        rows.append(("rank of factors", f"{ranks[0]} to {ranks[-1]}"))
    return [*rows, ("bytes of these layers", f"{kept:,}, {kept / dense:.1%} of the dense ones")]


def _facts_of_adapter(summary: WasiSummary, model: PeftModel) -> list[tuple[str, str]]:
    ranks = sorted(layer.rank for layer in summary.layers)
    frozen = sorted({layer.frozen or "" for layer in summary.layers} - {""})
    trained = sorted({layer.update.name for layer in summary.layers})
    return [
        ("layers", str(len(summary.layers))),
        ("form", f"factors beside a frozen weight ({' and '.join(frozen)})" if frozen else "factors"),
        ("update", " and ".join(trained)),
        ("rank", f"{ranks[0]} to {ranks[-1]}"),
        ("bytes of these layers", f"{summary.kept_share:.1%} of the dense ones"),
    ]


def card_section(model: nn.Module) -> str:
    """What this package adds to a card, in Markdown."""
    kind = "This adapter" if isinstance(model, PeftModel) else "This compressed model"
    table = "\n".join(f"| {name} | {value} |" for name, value in _facts(model))
    return (
        f"{START}\n## Loading\n\n{kind} was made with `wasi_peft` (`pip install wasi_peft`), which must be imported "
        f"to load it:\n\n```python\n{loading_snippet(model)}\n```\n\n## What is stored\n\n| | |\n| --- | --- |\n"
        f"{table}\n{END}"
    )


def write_card(model: nn.Module, folder: str | os.PathLike[str], metrics: Mapping[str, float] | None = None) -> Path:
    """Write a model card into a folder, or this package's part of the one that is there.

    Adapters and compressed models get theirs whenever they are saved; this call adds results.

    Args:
        model: A PEFT model with a WASI adapter, or a compressed model.
        folder: Where it was saved, an existing folder.
        metrics: Results by name, for the table.

    Returns:
        The card's path.

    Raises:
        ValueError: If the model is neither, or the front matter of the card that is there cannot be read.
    """
    adapter = _is_adapter(model)
    if not adapter and not _is_compressed(model):
        raise ValueError(
            f"a card is for a model with a WASI adapter or compressed layers, got {type(model).__name__}."
        )
    path = Path(folder) / CARD
    library = "peft" if adapter else "transformers"
    begun = f"---\n{ModelCardData(library_name=library).to_yaml()}\n---\n"
    card = _load(path) if path.exists() else ModelCard(begun)
    card.data["library_name"] = library
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *TAGS}, key=str)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    origin = getattr(base, "name_or_path", None)
    if origin and not card.data.get("base_model"):
        card.data["base_model"] = origin
    section = card_section(model)
    if metrics:
        rows = "\n".join(f"| {name} | {value:g} |" for name, value in metrics.items())
        section = section.replace(END, f"{rows}\n{END}")
    head, _, rest = card.text.partition(START)
    card.text = f"{section}\n\n{(head + rest.partition(END)[2] if rest else head).strip()}\n"
    with whole_file(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return path


class UnreadableCardError(ValueError):
    """There is a card whose front matter cannot be read."""


def _load(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableCardError(f"{path}: the front matter of a card must be YAML, a dict: {reason}") from error


def _complete_card(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a card for who wants a model saved: one that cannot be read is no reason to fail."""
    try:
        write_card(model, folder)
    except UnreadableCardError as error:
        logger.warning("%s It stays as it is, and says nothing of this model.", error)


def install() -> None:
    """Have cards of WASI adapters and compressed models say what they are, whoever writes them.

    Calling it again changes nothing.
    """
    write = PeftModel.create_or_update_model_card
    if getattr(write, "_wasi", False):
        return

    @functools.wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if not isinstance(self.base_model, WasiModel):
            write(self, output_dir)
            return
        path = Path(output_dir) / CARD
        try:
            tags = _load(path).data.get("tags") if path.exists() else None
        except UnreadableCardError:
            _complete_card(self, output_dir)  # which says so
            return
        write(self, output_dir)
        card = ModelCard.load(path)
        card.data["tags"] = [*(card.data.get("tags") or []), *(tags or [])]  # PEFT forgets those that were there
        card.save(path)
        write_card(self, output_dir)

    create_or_update_model_card._wasi = True  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card
    for cls in (PeftModel, PreTrainedModel):
        cls._upload_modified_files = _with_card(cls._upload_modified_files)
    PreTrainedModel.save_pretrained = _saved_with_card(PreTrainedModel.save_pretrained)


def _saved_with_card(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(
        self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        saved = save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process and _is_compressed_alone(self) and os.path.isdir(save_directory):
            _complete_card(self, save_directory)
            _complete_cards_of_trainer()
        return saved

    return save_pretrained


def _complete_cards_of_trainer() -> None:
    """The Trainer, if there is one, writes a card over that of the model that it has saved."""
    trainer = sys.modules.get("transformers.trainer")  # which takes long to import
    if trainer is None or getattr(trainer.Trainer.create_model_card, "_wasi", False):
        return
    create = trainer.Trainer.create_model_card

    @functools.wraps(create)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if self.is_world_process_zero() and _is_compressed_alone(model):
            _complete_card(model, self.args.output_dir)

    create_model_card._wasi = True  # type: ignore[attr-defined]
    trainer.Trainer.create_model_card = create_model_card


def _with_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upload)
    def upload_with_card(self: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if _is_adapter(self) or _is_compressed_alone(self):
            _complete_card(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return upload_with_card


def _is_adapter(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, WasiModel)


def _is_compressed_alone(model: nn.Module) -> bool:
    """Whether what is saved of a model is a compressed one, and not an adapter on it alone."""
    native = getattr(model, "_hf_peft_config_loaded", False)
    return _is_compressed(model) and not isinstance(model, PeftModel) and not native


def _is_compressed(model: nn.Module) -> bool:
    return any(isinstance(layer, Compressed) for layer in model.modules())
