"""Programs traced from the plain form, which leave the number of samples and the length of texts open."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .cases import Inputs, answers_of, free_axes
from .formats import Format, Source
from .plain import PlainForm, plain_form

PROGRAM_FILE = "model.pt2"


class Named(nn.Module):
    """A model whose arguments are tensors by name, and whose answer is a dict of tensors: what tracers take.

    Args:
        model: Any.
        inputs: Its arguments; constants become part of it.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        names = list(inputs.tensors)

        def forward(*args: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
            named = {**dict(zip(names, args, strict=False)), **tensors}
            return answers_of(model(**named, **inputs.constants))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def trace(form: PlainForm) -> ExportedProgram:
    """The program of a plain form, by `torch.export`; without a cache of keys and values.

    Raises:
        ValueError: If it cannot be traced, or only for these very sizes.
    """
    config = getattr(form.module, "config", None)
    for part in () if config is None else (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    inputs = form.cases[0].inputs
    shapes = {name: dict.fromkeys(free_axes(tensor), Dim.DYNAMIC) for name, tensor in inputs.tensors.items()}
    named = Named(form.module.requires_grad_(False), inputs)  # for gradients attention lies otherwise in memory
    try:
        with torch.no_grad():
            return torch.export.export(named, (), dict(inputs.tensors), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of any kind: it is the model's code that runs there
        raise ValueError(f"torch.export cannot trace {type(form.module).__name__}: {error}") from error


@dataclass(frozen=True)
class TorchFormat(Format):
    """A program of `torch.export`, `model.pt2`, which torch alone runs: `torch.export.load(path).module()`."""

    name: ClassVar[str] = "torch"

    def write(self, source: Source, folder: Path) -> float:
        form = plain_form(source)
        torch.export.save(trace(form), folder / PROGRAM_FILE)
        return form.differs(torch.export.load(folder / PROGRAM_FILE).module())
