"""Models as folders that other programs read."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..files.folders import Location, new_folder
from .executorch import ExecutorchFormat
from .formats import Format, Source
from .gguf import GgufFormat
from .lora import LoraFormat
from .onnx import OnnxFormat
from .openvino import OpenvinoFormat
from .plain import PlainFormat
from .programs import TorchFormat

FORMATS: dict[str, type[Format]] = {
    cls.name: cls
    for cls in (PlainFormat, OnnxFormat, OpenvinoFormat, TorchFormat, ExecutorchFormat, LoraFormat, GgufFormat)
}


def ready_format(format: str, **options: Any) -> Format:
    """A format with its options, whose packages are there.

    Raises:
        ValueError: If there is no such format or option.
        ImportError: If it needs a package that is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    known = [field.name for field in dataclasses.fields(FORMATS[format])]  # type: ignore[arg-type]
    if not set(options) <= set(known):
        raise ValueError(f"format {format!r} has the options {known}, got {sorted(options)}.")
    writer = FORMATS[format](**options)
    writer.require_packages()
    return writer


def export(
    model: nn.Module,
    folder: Location,
    format: str = "plain",
    *,
    batch: Any = None,
    adapter_name: str | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> float:
    """Write a model as a folder that needs no `wasi_peft`, and check that what was written answers as the model does.

    The folder is there whole, on the disk, or not at all; a former one stays whole until then.

    Args:
        model: A compressed model, a PEFT model with a WASI adapter, or a dense one; not changed.
        folder: To be made.
        format: 'plain': safetensors of ordinary layers, two for two factors, with a `load.py` that needs torch,
            transformers and safetensors. 'onnx' and 'openvino': a graph in float32; with `int8=True` weights in 8
            bits. 'torch': a program of `torch.export`. 'executorch': one for devices. 'lora': factors beside a weight
            as a LoRA adapter for the dense base. 'gguf': a language model for llama.cpp, factors beside its weights as
            an adapter; with `int8=True` all matrices in 8 bits, with `tokenizer=` another tokenizer than the model's.
        batch: What the model is called with, as for [`estimate_wasi`]; by default noise, for transformers models of
            images or texts. Images have its size in graphs and programs, samples and lengths of texts are free; in
            'executorch' they are at most its own.
        adapter_name: Of a PEFT model; by default the active one.
        tolerance: Largest difference of answers, relative to their largest element, that is no error; by default the
            square root of the dtype's precision, and none with `int8=True`; in 'gguf' that of what is written.
        overwrite: Whether a folder that is there may be replaced, with all that is in it.
        **options: Of the format.

    Returns:
        The difference: the largest one over the largest element, for the batch and for one sample with a token less.

    Raises:
        ValueError: If there is no such format or option, the model cannot be written so, or answers differ too much.
        TypeError: If the model is of a kind that cannot be written so.
        ImportError: If the format needs a package that is not installed.
        FileExistsError: If something is there already.

    Example:
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from wasi_peft import compress
        >>> vit = ViTConfig(image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = compress(ViTForImageClassification(vit))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     difference = export(model, f"{folder}/plain")
        >>> difference < 1e-5
        True
    """
    writer = ready_format(format, **options)
    with new_folder(folder, overwrite) as scratch:
        return writer.write(Source(model, batch, adapter_name, tolerance), scratch)
