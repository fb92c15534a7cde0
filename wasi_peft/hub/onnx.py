"""ONNX: the plain form as a graph, verified in onnxruntime."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cases import Case, Inputs, check_difference, farthest, free_axes
from .formats import Format, Source
from .plain import PlainForm, plain_form
from .programs import trace

MODEL_FILE = "model.onnx"
IN_8_BITS = ("MatMul", "Gather")  # linear layers and tables; not all releases have a convolution for it


@dataclass(frozen=True)
class OnnxFormat(Format):
    """`model.onnx` in float32, with the batch and the length of texts open, and the model's config.json.

    Inputs and outputs have the names that the model gives them. Language models are written without a cache of keys
    and values. Weights beyond 2 GiB lie in a file beside it.

    Args:
        int8: Have onnxruntime keep the weights of linear layers and tables in 8 bits, a scale an output channel, and
            round inputs as they come (dynamic quantisation). The difference is then that of rounding, without a bound
            unless one is asked for.
    """

    name: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    int8: bool = False

    def write(self, source: Source, folder: Path) -> float:
        form = in_float32(plain_form(source))
        path = folder / MODEL_FILE
        write_graph(form, path)
        config: Any = getattr(form.module, "config", None)
        if config is not None:
            config.save_pretrained(folder)
        difference = check_difference(_difference(path, form.cases), form.tolerance)
        if not self.int8:
            return difference
        _quantize(path)
        return check_difference(
            _difference(path, form.cases), math.inf if source.tolerance is None else source.tolerance
        )


def in_float32(form: PlainForm) -> PlainForm:
    """The same on the CPU: runtimes have few kernels for 16 bits, and the graph must run where it is verified."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()

    def moved(case: Case) -> Case:
        tensors = {name: cast(tensor) for name, tensor in case.inputs.tensors.items()}
        return Case(case.inputs._replace(tensors=tensors), case.answers)

    return form._replace(module=form.module.cpu().float(), cases=[moved(case) for case in form.cases])


def write_graph(form: PlainForm, path: Path) -> None:
    """Write the graph of a plain form, with weights beyond 2 GiB beside it.

    Raises:
        ValueError: If it cannot be traced or converted.
    """
    program, case = trace(form), form.cases[0]
    axes = {name: free_axes(tensor) for name, tensor in case.inputs.tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two inputs share an axis, and torch's own use of what it deprecates
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(axes),
                output_names=list(case.answers),
                dynamic_shapes=axes,
                verbose=False,
            )
            converted.save(path)
    except Exception as error:  # of any kind, and long
        cause = next(line for line in str(error.__cause__ or error).splitlines() if line.strip())
        raise ValueError(f"torch.onnx cannot convert {type(form.module).__name__}: {cause}") from error


def _quantize(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    dense = path.with_name("float32.onnx")
    beside = path.with_name(f"{path.name}.data")
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]  # shapes of weights that quantisation transposes; older releases mind
    onnx.save(model, dense)
    quantize_dynamic(
        dense,
        path,
        op_types_to_quantize=list(IN_8_BITS),
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=beside.exists(),
    )
    dense.unlink()


def _difference(path: Path, cases: list[Case]) -> float:
    """How far what onnxruntime answers is from what it must be."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    reads = {each.name for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.tensors.items() if name in reads}
        return dict(zip(names, map(torch.from_numpy, session.run(None, arrays)), strict=True))

    return farthest(run, cases)
