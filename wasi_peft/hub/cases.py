"""What an exported model must answer: inputs by name, and the answers of the model that it was made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.calls import LABEL_KEYS, call_arguments
from ..models.texts import ordinary_tokens

EXAMPLE_SAMPLES, EXAMPLE_TOKENS = 2, 16
BATCH_AXIS, SEQUENCE_AXIS = "batch", "sequence"


class Inputs(NamedTuple):
    """What a model is called with: `model(**tensors, **constants)`."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]


class Case(NamedTuple):
    """Inputs, and what a model answers them, by name."""

    inputs: Inputs
    answers: dict[str, Tensor]


def example_batch(
    model: nn.Module, image_size: int | None = None, samples: int = EXAMPLE_SAMPLES, tokens: int = EXAMPLE_TOKENS
) -> dict[str, Tensor]:
    """Samples of noise for a transformers model: images of its size, or tokens, those of a decoder too.

    Args:
        model: Or a PEFT model around one.
        image_size: Pixels of a side, where it is not that of the configuration.
        samples: How many.
        tokens: Of each text, where the model takes as many.

    Raises:
        ValueError: If it reads something else, or its configuration does not tell the size of images.
    """
    config = getattr(model, "config", None)
    reads = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    if config is not None and reads == "pixel_values" and (image_size or getattr(config, "image_size", None)):
        size = image_size or config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.randn(samples, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    if config is None or reads != "input_ids":
        raise ValueError(
            f"batch= is needed, what the model is called with: {type(model).__name__} does not say by itself what "
            "images of which size, or what else, it reads."
        )
    config = config.get_text_config()
    length = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    ordinary = ordinary_tokens(config)
    ids = ordinary[torch.randint(len(ordinary), (samples, length), generator=generator)]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids.clone()} if config.is_encoder_decoder else batch


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """A batch by the names of the model's arguments, where the model is, of at least two samples.

    A single one is doubled: tracing takes a size of 1 for a constant. Labels are left out unless they make the input
    of a decoder.

    Raises:
        TypeError: If the batch is of no known kind.
        ValueError: If it holds no input.
    """
    positional, named = call_arguments(batch)
    first = next(iter(inspect.signature(model.forward).parameters))
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        named = {key: value for key, value in named.items() if key not in LABEL_KEYS}
    named = {**dict(zip([first], positional, strict=False)), **named}
    device = next(model.parameters()).device
    tensors = {key: value.to(device) for key, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"a batch must hold model inputs, got only {sorted(call_arguments(batch).named)}.")
    tensors = {key: torch.cat([value] * 2) if len(value) == 1 else value for key, value in tensors.items()}
    return Inputs(tensors, {key: value for key, value in named.items() if key not in tensors})


def free_axes(tensor: Tensor) -> dict[int, str]:
    """Axes of an input whose sizes an exported model leaves open: samples, and the tokens of a text."""
    is_text = tensor.ndim == 2 and not tensor.is_floating_point()
    return {0: BATCH_AXIS, 1: SEQUENCE_AXIS} if is_text else {0: BATCH_AXIS}


def smaller(inputs: Inputs) -> Inputs:
    """The first sample alone, with one token less: sizes of all axes that are free have changed."""

    def part(tensor: Tensor) -> Tensor:
        shortened = SEQUENCE_AXIS in free_axes(tensor).values() and tensor.shape[1] > 1
        return tensor[:1, :-1] if shortened else tensor[:1]

    return Inputs({key: part(tensor) for key, tensor in inputs.tensors.items()}, inputs.constants)


def answers_of(output: Any) -> dict[str, Tensor]:
    """The tensors that a model answers with, by name.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(output, Tensor):
        output = {"output": output}
    elif not isinstance(output, Mapping):
        output = {f"output_{index}": value for index, value in enumerate(output)}
    answers = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    if not answers:
        raise ValueError(f"the model must answer with tensors, got {list(output)}.")
    return answers


@torch.no_grad()
def cases_of(model: nn.Module, batch: Any) -> list[Case]:
    """What a model answers a batch, and a smaller one."""
    whole = inputs_of(model, batch)
    return [
        Case(inputs, answers_of(model(**inputs.tensors, **inputs.constants))) for inputs in (whole, smaller(whole))
    ]


def tolerance_of(model: nn.Module) -> float:
    """Difference that the dtype of a model explains: the square root of its precision."""
    return math.sqrt(torch.finfo(next(model.parameters()).dtype).eps)


def largest_difference(answers: Mapping[str, Tensor], case: Case) -> float:
    """Between two answers, relative to the largest element of the right one; infinite where one is NaN.

    Raises:
        ValueError: If an answer is missing or has another shape.
    """
    differences = []
    for name, right in case.answers.items():
        got = answers.get(name)
        if got is None or got.shape != right.shape:
            shape = None if got is None else tuple(got.shape)
            raise ValueError(f"the exported model must answer {name} of shape {tuple(right.shape)}, got {shape}.")
        right, got = right.detach().cpu().double(), got.detach().cpu().double()
        scale = right.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        differences.append(float(((got - right).abs().max() / scale).nan_to_num(math.inf)))
    return max(differences)


def check_difference(difference: float, tolerance: float) -> float:
    """The difference itself.

    Raises:
        ValueError: If it is larger than the tolerance.
    """
    if not difference <= tolerance:
        raise ValueError(
            f"the exported model must answer as the model does, to {tolerance:.2g} of the largest element "
            f"(tolerance=), got a difference of {difference:.2g}."
        )
    return difference


def farthest(run: Callable[[Inputs], Mapping[str, Tensor]], cases: list[Case]) -> float:
    """How far answers are from what they must be, at most.

    Args:
        run: Answers inputs, by name.
        cases: What must be answered.
    """
    return max(largest_difference(run(case.inputs), case) for case in cases)


@torch.no_grad()
def answered(model: nn.Module, cases: list[Case], tolerance: float) -> float:
    """How far a module's answers are from what they must be.

    Raises:
        ValueError: If that is further than the tolerance.
    """

    def run(inputs: Inputs) -> dict[str, Tensor]:
        return answers_of(model(**inputs.tensors, **inputs.constants))

    return check_difference(farthest(run, cases), tolerance)
