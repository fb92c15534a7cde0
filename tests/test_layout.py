"""The one-way layout: a folder imports only from itself and the folders before it, its modules in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import wasi_peft

# folders, bottom to top: one imports only from itself and those before it
LADDER = [
    "files",
    "linalg",
    "models",
    "forms",
    "updates",
    "memory",
    "ranks",
    "tuner",
    "factors",
    "hub",
    "cost",
    "training",
    "planner",
    "report",
    "cli",
]
PACKAGE = Path(wasi_peft.__file__).parent


def imported(source: str, room: str) -> list[str]:
    """What a module of a room imports of the package anywhere, inside functions too, as `room.module`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wasi_peft"]
            assert not names, f"import relatively, not {names}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 2 and (node.module or "").split(".")[0] != "wasi_peft", ast.unparse(node)
            where = f"{room}." if node.level == 1 else ""
            if node.level and node.module:
                found.append(where + node.module)
            elif node.level:
                found += [where + alias.name for alias in node.names]
    return found


def modules(room: str) -> list[str]:
    """Modules of a room."""
    return sorted(path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__")


def test_every_module_is_in_a_room() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__.py", "__main__.py"} == set(LADDER)
    assert all(len(path.relative_to(PACKAGE).parts) <= 2 for path in PACKAGE.rglob("*.py")), "rooms have no rooms"


@pytest.mark.parametrize("room", LADDER)
def test_rooms_import_one_way(room: str) -> None:
    allowed = {*LADDER[: LADDER.index(room) + 1]}
    for path in sorted((PACKAGE / room).glob("*.py")):
        for name in imported(path.read_text(encoding="utf-8"), room):
            assert name.split(".")[0] in allowed, f"{room}/{path.name} imports {name}"


@pytest.mark.parametrize("room", LADDER)
def test_modules_of_a_room_have_no_cycle(room: str) -> None:
    graph = {}
    for module in modules(room):
        names = imported((PACKAGE / room / f"{module}.py").read_text(encoding="utf-8"), room)
        graph[module] = [name.split(".")[1] for name in names if name.startswith(f"{room}.")]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_check_sees_every_kind_of_import() -> None:
    source = (
        "from .a import x\ndef f():\n    from . import b\n    from ..c.d import y\nimport torch\nfrom torch import z"
    )
    assert imported(source, "room") == ["room.a", "room.b", "c.d"]
    for absolute in ("import wasi_peft.linalg", "from wasi_peft.linalg import retract", "from ...other import x"):
        with pytest.raises(AssertionError):
            imported(absolute, "room")


def test_torch_may_be_built_without_distributed() -> None:
    """Its submodules are imported in functions that asked `torch.distributed.is_available()` first."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") for name in names), path
