"""Recipes against torch's own answer, operation by operation and for whole steps; and what must not have a recipe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture
from slow import partly_slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from wasi_peft import WasiConfig
from wasi_peft.cost import replay
from wasi_peft.cost.estimate import estimate_wasi
from wasi_peft.cost.replay import Recipes

aten = torch.ops.aten
MODE = FakeTensorMode(allow_non_fake_inputs=True)
MODE.cache_enabled = False

OPERATIONS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "mm": (aten.mm.default, ("x", "w"), {}),
    "addmm": (aten.addmm.default, ("row", "x", "w"), {"beta": 1, "alpha": 2.0}),
    "mul": (aten.mul.Tensor, ("swapped", 2), {}),
    "mul of two": (aten.mul.Tensor, ("part", "swapped"), {}),
    "mul of two types": (aten.mul.Tensor, ("whole", 2.5), {}),
    "sum": (aten.sum.default, ("part",), {}),
    "sum of another type": (aten.sum.default, ("part",), {"dtype": torch.float64}),
    "abs": (aten.abs.default, ("swapped",), {}),
    "norm": (aten.linalg_vector_norm.default, ("part", 2), {"dtype": torch.float32}),
    "qr": (aten.linalg_qr.default, ("x",), {}),
    "cholesky": (aten.linalg_cholesky_ex.default, ("square",), {}),
    "triangular": (aten.linalg_solve_triangular.default, ("square", "x"), {"upper": True, "left": False}),
    "slice of a slice": (aten.slice.Tensor, ("part", 0, 1, 3), {}),
    "transpose": (aten.t.default, ("x",), {}),
    "permute": (aten.permute.default, ("part", [1, 0]), {}),
    "transpose of two": (aten.transpose.int, ("part", 0, 1), {}),
    "view": (aten.view.default, ("x", [2, 3, 5]), {}),
    "unsafe view": (aten._unsafe_view.default, ("x", [30]), {}),
    "diagonal": (aten.diagonal.default, ("part",), {}),
    "detach": (aten.detach.default, ("part",), {}),
    "zeros like": (aten.zeros_like.default, ("swapped",), {"memory_format": torch.preserve_format}),
    "zeros like on a device": (aten.zeros_like.default, ("swapped",), {"device": torch.device("cpu")}),
    "expand": (aten.expand.default, ("row", [6, 4]), {}),
    "list of views": (aten.split.Tensor, ("x", 4), {}),
    "tuple": (aten.max.dim, ("x", 1), {}),
    "tuple with a missing tensor": (
        aten.native_layer_norm_backward.default,
        ("x", "part", [5], "stat", "stat", None, None, [True, False, False]),
        {},
    ),
    "argument comes back": (aten.add_.Tensor, ("x", 1), {}),
    "lists of tensors": (aten.cat.default, (["x", "part"],), {}),
    "another type": (aten._to_copy.default, ("x",), {"dtype": torch.bfloat16}),
    "another type on a device": (aten._to_copy.default, ("x",), {"dtype": torch.half, "device": torch.device("cpu")}),
    "memory format": (aten.clone.default, ("swapped",), {"memory_format": torch.contiguous_format}),
    "strides are kept": (aten.clone.default, ("swapped",), {"memory_format": torch.preserve_format}),
    "decomposition": (aten._linalg_eigh.default, ("square",), {}),
    "no tensor among the arguments": (aten.zeros.default, ([3, 2],), {"device": torch.device("cpu")}),
    "nothing comes back": (aten._foreach_mul_.Scalar, (["x", "row"], 2.0), {}),
}


def tensors() -> dict[str, Tensor]:
    with MODE:
        x = torch.empty(6, 5)
        square = torch.empty(5, 5)
        return {
            "x": x,
            "w": torch.empty(5, 4),
            "row": torch.empty(4),
            "stat": torch.empty(6, 1),
            "part": torch.empty(9, 5)[2:8],
            "swapped": torch.empty(5, 6).T,
            "square": square,
            "whole": torch.zeros(3, dtype=torch.long),
        }


def filled(tree: Any, values: dict[str, Tensor]) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(filled(item, values) for item in tree)
    return values[tree] if isinstance(tree, str) else tree


def looks(out: Any, given: dict[str, Tensor]) -> Any:
    """Everything that can be seen of outputs: containers, layouts, and whose memory they are in."""
    found = []
    for tensor in tree_leaves(out):
        if tensor is None:
            found.append(None)
            continue
        storage = tensor.untyped_storage()
        same = [name for name, other in given.items() if other is tensor]
        memory = [name for name, other in given.items() if other.untyped_storage()._cdata == storage._cdata]
        kind = tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)
        layout = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), storage.nbytes()
        found.append((same, memory, layout, kind))
    return type(out), found


def test_every_plain_operation_is_compared() -> None:
    assert {func for func, _, _ in OPERATIONS.values()} > replay._PLAIN_OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_replayed_operation_gives_what_torch_gives(name: str) -> None:
    func, arguments, keywords = OPERATIONS[name]
    recipes, given = Recipes(MODE), tensors()
    args = filled(arguments, given)
    expected = looks(MODE.dispatch(func, (), args, keywords), given)

    signature, found = recipes.signature(func, args, keywords)
    assert recipes.find(signature) is None
    first = recipes.work_out(func, args, keywords, found)
    assert looks(first, given) == expected
    recipes.learn(signature, found, first)

    given = tensors()
    signature, found = recipes.signature(func, filled(arguments, given), keywords)
    recipe = recipes.find(signature)
    assert recipe is not None
    for _ in range(2):
        out, made = recipes.replay(recipe, found)
        assert looks(out, given) == expected
        own = [x for x in tree_leaves(out) if x is not None and looks(x, given)[1][0][1] == []]
        assert [id(tensor) for tensor in made] == [id(tensor) for tensor in own]


def test_another_shape_type_number_or_kind_of_number_is_another_operation() -> None:
    recipes, given = Recipes(MODE), tensors()
    x = given["x"]
    calls: list[tuple[Any, ...]] = [
        (aten.mul.Tensor, (x, 2)),
        (aten.mul.Tensor, (x, 2.0)),
        (aten.mul.Tensor, (x, True)),
        (aten.mul.Tensor, (given["part"], 2)),
        (aten.mul.Tensor, (given["swapped"], 2)),
        (aten.add.Tensor, (x, 2)),
        (aten.sum.dim_IntList, (x, [0])),
        (aten.sum.dim_IntList, (x, [0], True)),
    ]
    signatures = [recipes.signature(func, args, {})[0] for func, args in calls]
    signatures.append(recipes.signature(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64})[0])
    assert None not in signatures and len(set(signatures)) == len(signatures)
    assert recipes.signature(aten.mul.Tensor, (tensors()["x"], 2), {})[0] == signatures[0]


def test_what_shapes_do_not_decide_has_no_recipe() -> None:
    recipes, given = Recipes(MODE), tensors()
    x, w = given["x"], given["w"]
    with MODE:
        complex_x = torch.empty(3, dtype=torch.complex64)
    assert recipes.signature(aten.nonzero.default, (x,), {})[0] is None
    assert recipes.signature(aten._local_scalar_dense.default, (x,), {})[0] is None
    assert recipes.signature(aten.resize_.default, (x, [100]), {})[0] is None
    assert recipes.signature(aten.t_.default, (x,), {})[0] is None
    assert recipes.signature(aten.mm.out, (x, w), {"out": given["row"]})[0] is None
    assert recipes.signature(aten.mul.Tensor, (complex_x, 2), {})[0] is None
    assert recipes.signature(aten.mul.Tensor, (x, torch.ones(())), {})[0] is None
    foreign = copy.deepcopy(x)
    assert isinstance(foreign, FakeTensor) and foreign.fake_mode is not MODE
    assert recipes.signature(aten.mul.Tensor, (foreign, 2), {})[0] is None
    assert recipes.signature(aten.randn.generator, ([3],), {"generator": torch.Generator()})[0] is None


def test_outputs_in_one_memory_of_their_own_have_no_recipe() -> None:
    recipes, given = Recipes(MODE), tensors()
    with MODE:
        whole = torch.empty(4, 4)
    for out in ((whole[0], whole[1]), whole[1]):
        signature, found = recipes.signature(aten.neg.default, (given["x"],), {})
        recipes.learn(signature, found, out)
        assert recipes.find(signature) is None
        recipes = Recipes(MODE)


@pytest.mark.parametrize("architecture", partly_slow(ARCHITECTURES, "vit", "swin", "llama", "t5"), indirect=True)
def test_whole_steps_are_the_same_without_recipes(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WasiConfig(weight_rank=5, activation_ranks=4, update="subspace")
    fast = estimate_wasi(architecture.model(), config, batch=architecture.batch(8))
    replayed = 0

    def find(self: Recipes, signature: Any) -> None:
        nonlocal replayed
        replayed += 1

    monkeypatch.setattr(Recipes, "find", find)
    monkeypatch.setattr(replay, "_PLAIN_OPERATIONS", set())
    assert estimate_wasi(architecture.model(), config, batch=architecture.batch(8)) == fast
    assert replayed > 1000


def test_tensors_are_those_of_the_mode() -> None:
    recipes, given = Recipes(MODE), tensors()
    signature, found = recipes.signature(aten.neg.default, (given["x"],), {})
    recipes.learn(signature, found, recipes.work_out(aten.neg.default, (given["x"],), {}, found))
    recipe = recipes.find(signature)
    assert recipe is not None
    for _ in range(2):
        out, _ = recipes.replay(recipe, found)
        assert isinstance(out, FakeTensor) and out.fake_mode is MODE and not out.is_meta
        with MODE:
            assert (out @ given["w"]).shape == (6, 4)
