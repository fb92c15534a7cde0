"""OpenVINO: the ONNX graph in its own format, with weights in 8 bits if asked, verified in its runtime on the CPU."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg.low_bit import LARGEST_CODE
from . import onnx
from .cases import Case, Inputs, check_difference, farthest
from .formats import Format, Source
from .plain import plain_form

MODEL_FILE = "model.xml"
WEIGHT_INPUTS = {"MatMul": 1, "Gather": 0}  # linear layers and tables


@dataclass(frozen=True)
class OpenvinoFormat(Format):
    """`model.xml` and `model.bin` in float32, with the batch and the length of texts open, and config.json.

    Language models are written without a cache of keys and values. A runtime on a CPU with 16-bit products uses them,
    unless it is told `INFERENCE_PRECISION_HINT: "f32"`, as it is where the files are verified.

    Args:
        int8: Keep the weights of linear layers and tables in 8 bits, a scale an output channel; products are those of
            float32. What a weight in 8 bits was restored from are the same codes, if no factors add to it.
    """

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    extra: ClassVar[str] = "openvino"
    int8: bool = False

    def write(self, source: Source, folder: Path) -> float:
        import openvino

        form = onnx.in_float32(plain_form(source))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / onnx.MODEL_FILE
            onnx.write_graph(form, path)
            model = openvino.convert_model(path)
            if self.int8:
                _keep_in_8_bits(model)
            openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)
        config: Any = getattr(form.module, "config", None)
        if config is not None:
            config.save_pretrained(folder)
        tolerance = math.inf if self.int8 and source.tolerance is None else form.tolerance
        return check_difference(_difference(folder / MODEL_FILE, form.cases), tolerance)


def _keep_in_8_bits(model: Any) -> None:
    """Have codes and scales in place of float32 weights: constants that the runtime multiplies out, or never does."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        place = WEIGHT_INPUTS.get(node.get_type_name())
        constant = None if place is None else node.input_value(place).get_node()
        if constant is None or constant.get_type_name() != "Constant" or len(constant.shape) != 2:
            continue
        weight = torch.from_numpy(constant.data.copy())
        if not weight.is_floating_point():
            continue
        rows_are_outputs = place == 0 or node.get_attributes()["transpose_b"]
        scale = weight.abs().amax(1 if rows_are_outputs else 0, keepdim=True) / LARGEST_CODE
        codes = (weight / scale.clamp_min(torch.finfo(scale.dtype).tiny)).round().to(torch.int8)
        restored = ops.multiply(ops.convert(ops.constant(codes.numpy()), "f32"), ops.constant(scale.numpy()))
        node.input(place).replace_source_output(restored.output(0))


def _difference(path: Path, cases: list[Case]) -> float:
    """How far what OpenVINO answers is from what it must be."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    reads = {port.get_any_name() for port in compiled.inputs}

    def run(inputs: Inputs) -> dict[str, Tensor]:
        outputs = compiled({name: tensor.numpy() for name, tensor in inputs.tensors.items() if name in reads})
        return {port.get_any_name(): torch.from_numpy(outputs[port]) for port in compiled.outputs}

    return farthest(run, cases)
