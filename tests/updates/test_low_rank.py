"""The low-rank update: LoRA's gradients beside frozen factors, and budgets that count what it adds."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from reference import tiny_net
from strategies import normal, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, calibrate_wasi, plan_wasi, preprocess_wasi, resize_rank, wasi_summary
from wasi_peft.forms import SplitLinear
from wasi_peft.linalg.tucker import Bases, CompressionRule, canonical, compress, expand
from wasi_peft.tuner.layer import wasi_layers
from wasi_peft.updates.low_rank import low_rank_linear, split_off

RANK = 3


def data() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(4, 5, 8) for _ in range(2)]


def adapted(net: nn.Module, **options: object) -> PeftModel:
    config = WasiConfig(**{"update": "low_rank", "update_rank": RANK, "activation_threshold": None, **options})
    batches = [x.to(next(net.parameters()).dtype) for x in data()]
    preprocess_wasi(net, config, batches, repair_steps=0, progress_bar=False)
    model: PeftModel = get_peft_model(net, config)
    return model


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 5, 7), "L": (6, 2), "R": (2, 7), "B": (6, RANK), "A": (RANK, 7), "bias": (6,)}
    return {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}


# -------------------------------------------------------------------- the function


@pytest.mark.parametrize("needed", [names for n in range(1, 5) for names in itertools.combinations("xBAb", n)])
@pytest.mark.parametrize("modes", [None, ("feature",), ("feature", "token")])
def test_gradients_are_autograds(needed: tuple[str, ...], modes: tuple[str, ...] | None) -> None:
    given = operands()
    compressed, seen = None, given["x"]
    if modes is not None:
        ranks = tuple((mode, 2) for mode in modes)
        result = compress(canonical(given["x"]), CompressionRule(modes, None, ranks), Bases())
        assert result is not None
        compressed = result[0]
        seen = expand(compressed)
    names = [{"b": "bias"}.get(name, name) for name in needed]
    for name in names:
        given[name].requires_grad_()
    ours = low_rank_linear(**given, compressed=compressed)

    def dense(x: Tensor) -> Tensor:
        return F.linear(x, given["L"] @ given["R"] + given["B"] @ given["A"], given["bias"])

    plain = dense(given["x"])
    assert relative_error(ours, plain) < 1e-13
    direction = torch.randn_like(plain)
    found = torch.autograd.grad(ours, [given[name] for name in names], direction)
    for name, gradient in zip(names, found, strict=True):
        x = seen if name == "A" else given["x"]
        (wanted,) = torch.autograd.grad(dense(x), given[name], direction)
        assert gradient.shape == given[name].shape
        assert relative_error(gradient, wanted) < 1e-12, name


def test_only_what_gradients_need_is_kept() -> None:
    sizes = {}
    for needed in ("x", "B", "A", "BA"):
        given = operands()
        for name in needed:
            given[name].requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            low_rank_linear(**given)
        factors = {given[name].data_ptr() for name in ("L", "R", "B", "A")}
        sizes[needed] = sum(t.numel() for t in kept if t.data_ptr() not in factors)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)
    rows, features = 10, 7
    assert sizes == {"x": 0, "B": rows * RANK, "A": rows * features, "BA": rows * (RANK + features)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_with_float32_factors(dtype: torch.dtype) -> None:
    given = operands(torch.float32)
    for name in ("B", "A", "bias"):
        given[name].requires_grad_()
    x = given.pop("x").to(dtype)
    low_rank_linear(x, **given).float().square().sum().backward()
    assert {given[name].grad.dtype for name in ("B", "A", "bias")} == {torch.float32}


# -------------------------------------------------------------------- factors are ordinary parameters


def assert_ordinary(model: nn.Module) -> None:
    """Every part has a contiguous memory of its own, and all of them together are the weight."""
    memories = []
    for _, layer in wasi_layers(model):
        form = layer.wasi_form["default"]
        for part in form.parameters():
            assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
            memories.append(part.untyped_storage().data_ptr())
        with torch.no_grad():
            outer, inner = form.factors()
        assert torch.equal(outer, torch.cat([form.L, form.B], 1)) and torch.equal(inner, torch.cat([form.R, form.A]))
    assert memories and len(set(memories)) == len(memories)


def trained(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """Loss after each step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for _ in range(steps):
        loss = (model(data()[0]) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def through_a_file(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.double().float(),
        copy.deepcopy,
        through_a_file,
        lambda model: resize_rank(model, "blocks.0.fc1", 2) or model,
        lambda model: resize_rank(model, "blocks.0.fc1", 6) or model,
    ],
    ids=["injected", "converted", "copied", "through a file", "shrunk", "grown"],
)
def test_factors_are_ordinary_parameters(change: Callable[[PeftModel], PeftModel]) -> None:
    model = adapted(tiny_net(5), weight_rank=4)
    trained(model)
    output = model(data()[0])
    changed = change(model)
    assert_ordinary(changed)
    if changed is not model:
        assert torch.equal(changed(data()[0]), output)
    losses = trained(changed)
    assert losses[-1] < losses[0]
    assert_ordinary(changed)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_factors_are_ordinary_parameters(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = adapted(tiny_net(6), weight_rank=4)
    trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_net(6), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(data()[0]), model(data()[0]))
    assert_ordinary(loaded)


def test_training_does_not_depend_on_the_memory_of_factors() -> None:
    """Parameters that a user has made views of something else: transposed, and with a stride."""
    # without biases: that of the keys has a gradient of zero, whose rounding Adam would make steps of
    model = adapted(tiny_net(7), weight_rank=4, bias="none")
    apart = copy.deepcopy(model)
    for _, layer in wasi_layers(apart):
        for part in layer.wasi_form["default"].parameters():
            if part.dim() == 2:
                part.data = part.detach().T.contiguous().T
                assert not part.is_contiguous()
    for ours, theirs in zip(trained(model, 5), trained(apart, 5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), apart.parameters(), strict=True):
        assert relative_error(ours, theirs) < 1e-4, name


def test_factors_have_gradients_where_one_is_asked_for() -> None:
    model = adapted(tiny_net(8), weight_rank=4)
    for _, layer in wasi_layers(model):
        form = layer.wasi_form["default"]
        outer, inner = form.factors()
        found = torch.autograd.grad(outer.sum() + inner.sum(), [form.B, form.A])
        assert all(bool((gradient == 1).all()) for gradient in found)


@pytest.mark.parametrize("rows", [(1,), (3, 5), (16,), (4, 5)])
def test_few_rows_and_many_are_answered_alike(rows: tuple[int, ...]) -> None:
    given = operands()
    form = SplitLinear.from_parts(given, given["bias"])
    x = torch.randn(*rows, 7, dtype=torch.float64)
    expected = F.linear(x, given["L"] @ given["R"] + given["B"] @ given["A"], given["bias"])
    with torch.no_grad():
        assert relative_error(form(x), expected) < 1e-13
        assert form(x.bfloat16()).dtype == torch.bfloat16
        assert relative_error(form(x.float()), expected) < 1e-5


def test_factors_may_differ_in_dtype() -> None:
    given = operands()
    expected = low_rank_linear(**given)
    for name in ("B", "A"):
        given[name] = given[name].float().requires_grad_()
    output = low_rank_linear(**given)
    assert output.dtype == torch.float64 and relative_error(output, expected) < 1e-6
    output.sum().backward()
    assert {given[name].grad.dtype for name in ("B", "A")} == {torch.float32}


# -------------------------------------------------------------------- where training starts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [3, 5, 7])
def test_the_least_important_directions_train(directions: int, dtype: torch.dtype) -> None:
    """Against a singular value decomposition of the whole weight; 3 stay, up to 4 train."""
    L = torch.linalg.qr(normal(9, directions, seed=1)).Q.to(dtype)
    R = (normal(directions, 11, seed=2) * torch.logspace(0, 1, directions, dtype=torch.float64)[:, None]).to(dtype)
    kept_L, kept_R, B, A = split_off(L, R, 3, 4)
    sizes = [tuple(part.shape) for part in (kept_L, kept_R, B, A)]
    assert sizes == [(9, 3), (3, 11), (9, 4), (4, 11)]
    assert {part.dtype for part in (kept_L, kept_R, B, A)} == {dtype}
    tolerance = 8 * torch.finfo(dtype).eps
    left, values, right = torch.linalg.svd(L.double() @ R.double(), full_matrices=False)
    kept = kept_L.double() @ kept_R.double()
    assert relative_error(kept, left[:, :3] * values[:3] @ right[:3]) < 10 * tolerance
    assert relative_error(kept + B.double() @ A.double(), L.double() @ R.double()) < tolerance
    found = directions - 3
    size = torch.full((found,), 2 / 3**0.5, dtype=torch.float64)
    assert torch.allclose(A[:found].double().norm(dim=1), size, rtol=tolerance)
    assert not B[:, found:].any() and A[found:].any(1).all() and bool((A[found:].abs() <= 2 / 11**0.5).all())


def test_directions_without_size_can_train() -> None:
    """A weight of zeros: no row of A is zero, or the layer would stay what it is."""
    L, R = torch.linalg.qr(normal(6, 4, seed=3)).Q, torch.zeros(4, 5, dtype=torch.float64)
    _, kept_R, B, A = split_off(L, R, 2, 2)
    assert not kept_R.any() and not B.any() and A.any(1).all()


# -------------------------------------------------------------------- in a model


def test_gradients_are_those_of_lora_on_the_product() -> None:
    net = tiny_net(0, dtype=torch.float64)
    torch.manual_seed(0)
    wasi = adapted(net, weight_rank=4, bias="none", train_vectors=False)
    dense = tiny_net(0, dtype=torch.float64)
    names = [name for name, _ in wasi_layers(net)]
    lora = get_peft_model(dense, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for name, layer in wasi_layers(net):
        torch.manual_seed(1)
        nn.init.normal_(layer.wasi_form["default"].B)
        twin = dense.get_submodule(name)
        twin.base_layer.weight.data = (layer.wasi_form["default"].L @ layer.wasi_form["default"].R).detach()
        twin.base_layer.bias.data = layer.wasi_form["default"].bias.detach()
        twin.lora_A["default"].weight.data = layer.wasi_form["default"].A.detach().clone()
        twin.lora_B["default"].weight.data = layer.wasi_form["default"].B.detach().clone()
    x = data()[0].double()
    outputs = [model(x) for model in (wasi, lora)]
    assert relative_error(*outputs) < 1e-12
    for output in outputs:
        output.square().mean().backward()
    for name, layer in wasi_layers(net):
        twin = dense.get_submodule(name)
        assert relative_error(layer.wasi_form["default"].A.grad, twin.lora_A["default"].weight.grad) < 1e-10
        assert relative_error(layer.wasi_form["default"].B.grad, twin.lora_B["default"].weight.grad) < 1e-10
        assert layer.wasi_form["default"].L.grad is None and layer.wasi_form["default"].R.grad is None


@pytest.mark.parametrize("update_rank", [2, 4, 9])
def test_it_starts_as_the_best_weight_of_all_directions_and_trains(update_rank: int) -> None:
    net = tiny_net(1)
    plain = copy.deepcopy(net)
    x = data()[0]
    model = adapted(net, weight_rank=4, update_rank=update_rank, activation_threshold=0.9)
    other = adapted(plain, weight_rank=min(4 + update_rank, 8), update="factor")
    assert torch.allclose(model(x), other(x), atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_the_change_counts_in_the_share(share: float) -> None:
    net = tiny_net(2)
    model = adapted(net, weight_share=share, update_rank=1)
    summary = wasi_summary(net)
    assert share - 0.2 < summary.kept_share <= share
    assert not summary.past_break_even
    for (_, layer), entry in zip(wasi_layers(net), summary.layers, strict=True):
        assert entry.rank == layer.wasi_form["default"].L.shape[1] + 1
    merged = model.merge_and_unload()
    assert torch.isfinite(merged(data()[0])).all()


def test_the_change_counts_in_a_plan() -> None:
    net = tiny_net(3)
    calibration = calibrate_wasi(net, data(), progress_bar=False)
    config = WasiConfig(update="low_rank", update_rank=1)
    plan = plan_wasi(net, calibration, weight_share=0.8, config=config)
    config = WasiConfig(plan=plan, update="low_rank", update_rank=1)
    get_peft_model(net, config)
    assert wasi_summary(net).kept_share <= 0.8


def test_prepared_for_another_update() -> None:
    net = tiny_net(4)
    preprocess_wasi(net, WasiConfig(weight_share=0.9, update="factor"), data(), repair_steps=0, progress_bar=False)
    with pytest.raises(ValueError, match="prepared it for update factor, the configuration now asks for low_rank"):
        get_peft_model(net, WasiConfig(weight_share=0.9, update="low_rank", update_rank=1))


def test_a_share_that_leaves_no_room() -> None:
    with pytest.raises(ValueError, match="what trains beside it"):
        adapted(tiny_net(5), weight_share=0.3, update_rank=8)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_bad_rank(rank: object) -> None:
    with pytest.raises(ValueError, match="update_rank must be a positive integer"):
        WasiConfig(update="low_rank", update_rank=rank)
