"""The one-way layout: a module imports only from modules earlier in the list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import wasi_peft

ORDER = [
    "linalg",
    "tucker",
    "costs",
    "planning",
    "knapsack",
    "choosing",
    "autograd",
    "low_rank",
    "core",
    "coordinates",
    "timing",
    "_registration",
    "config",
    "released",
    "layer",
    "targets",
    "quantization",
    "attention",
    "activation",
    "saved",
    "chunked_mlp",
    "slices",
    "recompute",
    "chunked_loss",
    "memory",
    "summary",
    "model",
    "calibration_folder",
    "calibration",
    "blocks",
    "refit",
    "repair",
    "image_moments",
    "token_repair",
    "blockwise",
    "preprocessing",
    "optimizer",
    "optimizer_in_backward",
    "profiling",
    "replay",
    "simulation",
    "estimate",
    "trace",
    "step_profile",
    "inference",
    "planner",
    "callbacks",
    "report",
    "profile_report",
    "loading",
    "cli",
]
PACKAGE = Path(wasi_peft.__file__).parent


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wasi_peft"]
            assert not names, f"import relatively, not {names}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1 and (node.module or "").split(".")[0] != "wasi_peft", ast.unparse(node)
            if node.level == 1 and node.module:
                found.add(node.module.split(".")[0])
            elif node.level == 1:
                found.update(alias.name for alias in node.names)
    return found


def test_every_module_has_its_place() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules - {"__init__"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module: str) -> None:
    imported = imported_modules((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert imported <= set(ORDER[: ORDER.index(module)])


def test_the_check_sees_every_kind_of_import() -> None:
    source = (
        "from .a import x\ndef f():\n    from . import b\n    from .c.d import y\nimport torch\nfrom torch import z"
    )
    assert imported_modules(source) == {"a", "b", "c"}
    for absolute in ("import wasi_peft.linalg", "from wasi_peft.linalg import retract", "from ..other import x"):
        with pytest.raises(AssertionError):
            imported_modules(absolute)
