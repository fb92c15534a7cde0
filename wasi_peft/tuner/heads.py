"""What trains whole beside the targets: heads that were just made, which an adapter trains only where it is told to.

Names in `modules_to_save` that no module has would leave one out in silence, too; single tokens need an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import WasiConfig
from .layer import WasiLayer

FRESH_HEAD = (
    "{head!r} looks newly initialised and stays as it is: with this configuration it does not train. Name it in "
    "modules_to_save, or set task_type."
)
UNMATCHED = "modules_to_save names {name!r}, and no module of {model} has that name: nothing is trained whole for it."
CLASSIFIES = "Classification"  # in the names of transformers' classes
HEADS_OF_TASKS: Mapping[str | None, tuple[str, ...]] = {  # which PEFT trains whole, some of them after the injection
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def fresh_heads(model: nn.Module, config: WasiConfig) -> Iterator[str]:
    """Names of linear layers outside a transformers model's backbone that look untrained and are not going to train.

    A layer looks untrained where its bias is exactly zero, which training would not leave it. One without a bias, of a
    classifier, does where the checkpoint that was read is of no classifier.

    Args:
        model: With the adapter injected.
        config: Of the adapter.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(backbone, nn.Module) or backbone is model or config.inference_mode:
        return
    inner = {id(module) for module in backbone.modules()}
    saved = {*(config.modules_to_save or ()), *HEADS_OF_TASKS.get(config.task_type, ())}
    new_classifier = _is_new_classifier(model)
    for name, module in model.named_modules():
        if isinstance(module, (WasiLayer, AuxiliaryTrainingWrapper)):
            inner |= {id(child) for child in module.modules()}
        if id(module) in inner or not isinstance(module, nn.Linear):
            continue
        if module.weight.is_meta or any(part in saved for part in name.split(".")):
            continue
        if new_classifier if module.bias is None else not bool(module.bias.detach().any()):
            yield name


def _is_new_classifier(model: nn.Module) -> bool:
    """Whether a classifier was read from a checkpoint of another architecture, which has no such head."""
    read = getattr(getattr(model, "config", None), "architectures", None) or []
    return CLASSIFIES in type(model).__name__ and bool(read) and not any(CLASSIFIES in name for name in read)


def unmatched_names(model: nn.Module, config: WasiConfig) -> list[str]:
    """Names in `modules_to_save` that no module of a model has, but for those that PEFT adds for a task type."""
    added = HEADS_OF_TASKS.get(config.task_type, ())
    names = [name for name, _ in model.named_modules()]
    wanted = () if config.inference_mode else config.modules_to_save or ()
    return [key for key in wanted if key not in added and not any(name.endswith(key) for name in names)]


def check_trained_tokens(model: nn.Module, config: WasiConfig) -> None:
    """Refuse to train single tokens of a model whose inputs are none.

    Raises:
        ValueError: If `trainable_token_indices` is a list, which is of the input embedding, and that is no embedding.
    """
    if config.trainable_token_indices is None or isinstance(config.trainable_token_indices, dict):
        return
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else None
    if found is not None and not isinstance(found, (nn.Embedding, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"trainable_token_indices trains rows of the input embedding, an Embedding; {type(model).__name__} reads "
            f"{type(found).__name__}, got trainable_token_indices={config.trainable_token_indices!r}. A dict names "
            "another module of the model."
        )
