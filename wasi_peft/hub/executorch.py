"""ExecuTorch: the traced program for devices, with the kernels of XNNPACK, verified in its runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from torch.export import ExportedProgram

from .cases import Case, Inputs, check_difference, farthest
from .formats import Format, Source
from .onnx import in_float32
from .plain import plain_form
from .programs import trace

PROGRAM_FILE = "model.pte"


@dataclass(frozen=True)
class ExecutorchFormat(Format):
    """`model.pte` in float32; batches and texts may be smaller than the batch that it is exported with, not larger.

    Memory for answers is planned ahead, so that batch says how much. Language models are written without a cache of
    keys and values. Inputs and answers come in the order in which the model names them.
    """

    name: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"

    def write(self, source: Source, folder: Path) -> float:
        form = in_float32(plain_form(source))
        (folder / PROGRAM_FILE).write_bytes(_lowered(trace(form), type(form.module).__name__))
        return check_difference(_difference(folder / PROGRAM_FILE, form.cases), form.tolerance)


def _lowered(program: ExportedProgram, name: str) -> bytes:
    """What the runtime reads.

    Raises:
        ValueError: If the program has an operation that it lacks.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        lowered: bytes = edge.to_executorch().buffer
    except Exception as error:  # of any kind: what it supports is found by trying
        raise ValueError(f"executorch cannot lower {name}: {error}") from error
    return lowered


def _difference(path: Path, cases: list[Case]) -> float:
    """How far what the runtime answers is from what it must be."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    names = list(cases[0].answers)

    def run(inputs: Inputs) -> dict[str, Tensor]:
        outputs = method.execute([tensor.contiguous() for tensor in inputs.tensors.values()])
        return {name: output.clone() for name, output in zip(names, outputs, strict=True)}

    return farthest(run, cases)
