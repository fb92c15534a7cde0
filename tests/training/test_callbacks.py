"""What the callback logs and warns about in the Trainer, and ranks that change with their optimizer state."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from models import ARCHITECTURES, FORMS, Architecture, input_options, logits, train
from peft import LoraConfig, PeftModel, get_peft_model
from strategies import normal, orthonormal, orthonormality_error, relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, create_wasi_optimizer
from wasi_peft.ranks.plan import LayerPlan, WasiPlan
from wasi_peft.training.callback import WasiCallback, chordal_distance
from wasi_peft.training.resize import ranks_in_use, resize_rank
from wasi_peft.tuner.layer import wasi_layers

VIT = ARCHITECTURES["vit"]
NAME = "vit.layers.0.mlp.fc1"


def build(architecture: Architecture = VIT, update: str = "subspace", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The initial factors come from a plain")
        return get_peft_model(
            architecture.model(),
            WasiConfig(**{"weight_rank": 6, "update": update, **input_options(update), **options}),
        )


def layer_of(model: Any, name: str = NAME) -> Any:
    return dict(wasi_layers(model.get_base_model()))[name]


def fit(
    model: Any, callback: WasiCallback, folder: Path, architecture: Architecture = VIT, **arguments: Any
) -> tf.Trainer:
    batch = architecture.batch(24, seed=1)
    data = [{key: value[index] for key, value in batch.items()} for index in range(24)]
    settings = tf.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        **{"num_train_epochs": 2, "logging_steps": 2, **arguments},
    )
    trainer = tf.Trainer(model, settings, train_dataset=data, eval_dataset=data[:4], callbacks=[callback])
    trainer.train()
    return trainer


def wasi_logs(trainer: tf.Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# -------------------------------------------------------------------- the log


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
@pytest.mark.parametrize("update", ["subspace", "factor"])
def test_every_training_log_has_the_values(name: str, update: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture, update=update, activation_interval=1)
    logs = wasi_logs(fit(model, WasiCallback(), tmp_path, architecture))
    assert [entry["step"] for entry in logs] == [2, 3, 4, 6]  # two by steps and one at the end of an epoch, 3 and 6
    for entry in logs:
        assert entry["wasi/rank_mean"] == entry["wasi/rank_min"] == entry["wasi/rank_max"] == 6
        assert 0 < entry["wasi/weight_drift"] < 1
        assert 0 < entry["wasi/activation_energy_min"] <= entry["wasi/activation_energy_mean"] <= 1
    assert "wasi/activation_drift" not in logs[0]  # there was no basis to compare with
    assert all(0 < entry["wasi/activation_drift"] < 1 for entry in logs[1:])
    assert 0 < logs[1]["wasi/weight_rank_used"] <= 1


def test_a_low_rank_update_is_followed(tmp_path: Path) -> None:
    model = build(update="low_rank", update_rank=2, activation_interval=1)
    logs = wasi_logs(fit(model, WasiCallback(replan=lambda _: {NAME: 3}), tmp_path))
    assert all(0 < entry["wasi/weight_drift"] < 1 for entry in logs)
    assert [entry["wasi/rank_min"] for entry in logs] == [8, 5, 5, 5] and logs[-1]["wasi/rank_max"] == 8
    assert all(0 < entry["wasi/activation_energy_min"] <= 1 for entry in logs)


def test_only_training_logs_are_extended_and_the_last_epoch_is_not_lost(tmp_path: Path) -> None:
    trainer = fit(build(), WasiCallback(), tmp_path, logging_steps=3, eval_strategy="epoch")
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 3
    assert [key for entry in others for key in entry if "wasi" in key] == ["wasi/weight_rank_used"]


def test_the_kept_energy_is_that_of_the_logged_step(tmp_path: Path) -> None:
    model = build(activation_interval=1)
    first = layer_of(model, "vit.layers.0.attention.q_proj")
    kept = []

    def measure(layer: Any, args: tuple[Tensor], output: Tensor) -> None:
        x, basis = args[0].detach().double(), layer.wasi_input["default"].bases.feature.double()
        kept.append(float((x @ basis).square().sum() / x.square().sum()))

    first.register_forward_hook(measure)
    values = []
    callback = WasiCallback()
    collect = callback.on_log

    def on_log(*args: Any, **kwargs: Any) -> None:
        part, total = callback._energies["vit.layers.0.attention.q_proj"]
        values.append(float(part / total))
        collect(*args, **kwargs)

    callback.on_log = on_log  # type: ignore[method-assign]
    fit(model, callback, tmp_path, logging_steps=1, max_steps=3)
    assert values[:3] == pytest.approx(kept, rel=1e-4)


def test_checkpointing_hides_no_layer(tmp_path: Path) -> None:
    """Inputs are compressed in the recomputation only, which ends before the last layer of a block has returned."""

    class Seeing(WasiCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            if self._energies:
                found.append(set(self._energies))
            super().on_log(*args, **kwargs)

    logs = []
    for arguments in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        found: list[set[str]] = []
        logs.append(wasi_logs(fit(build(), Seeing(), tmp_path, max_steps=4, logging_steps=1, **arguments)))
        assert {len(names) for names in found} == {12}
    for plain, checkpointed in zip(*logs, strict=True):
        for key in ("wasi/activation_energy_mean", "wasi/activation_energy_min"):
            assert checkpointed[key] == pytest.approx(plain[key], abs=1e-4)


def test_no_hook_stays_behind(tmp_path: Path) -> None:
    model = build()
    fit(model, WasiCallback(), tmp_path)
    assert not any(layer._forward_hooks for _, layer in wasi_layers(model))  # type: ignore[attr-defined]


class Interrupting(nn.Module):
    """Interrupts the step, behind the layers that are looked at."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_after_an_interrupted_step_the_model_can_be_copied_and_saved_and_trained(tmp_path: Path) -> None:
    model, callback = build(), WasiCallback()
    head = model.base_model.model.classifier
    model.base_model.model.classifier = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, tmp_path)
    model.base_model.model.classifier = head
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for again in (loaded, copy.deepcopy(model), model):
        logits(again, VIT.batch())
        fit(again, WasiCallback(), tmp_path, max_steps=1)
        assert not any(module._forward_hooks for _, module in wasi_layers(again))  # type: ignore[attr-defined]


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["fc1"])])
def test_a_model_without_wasi_layers_is_refused_at_once(adapter: Any, tmp_path: Path) -> None:
    model = VIT.model() if adapter is None else get_peft_model(VIT.model(), adapter)
    with pytest.raises(ValueError, match="needs a model with an active WASI adapter, got"):
        fit(model, WasiCallback(), tmp_path)


def test_the_callback_does_not_change_training(tmp_path: Path) -> None:
    losses = []
    for callback in (WasiCallback(), tf.TrainerCallback()):
        trainer = fit(build(), callback, tmp_path, num_train_epochs=1, logging_steps=1)  # type: ignore[arg-type]
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_exact_inputs_have_no_energy_to_log(tmp_path: Path) -> None:
    model = build(activation_ranks=None, activation_threshold=None)
    for entry in wasi_logs(fit(model, WasiCallback(drift=False), tmp_path)):
        assert not {key for key in entry if "activation" in key or "drift" in key}


# -------------------------------------------------------------------- warnings


def test_a_rank_that_no_longer_holds_the_threshold_is_named_once(tmp_path: Path) -> None:
    model = build(activation_ranks=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, WasiCallback(activation_threshold=0.99), tmp_path)
    messages = [str(one.message) for one in caught if "compressed input keeps" in str(one.message)]
    named = {message.partition(":")[0] for message in messages}
    others = [int(count) for message in messages for count in re.findall(r"in (\d+) other layers", message)]
    assert len(named) == len(messages) > 0 and named < set(dict(wasi_layers(model.get_base_model())))
    # those that lose too much from the start are in one message
    assert len(messages) < len(named) + sum(others) <= len(dict(wasi_layers(model.get_base_model())))


@pytest.mark.parametrize("options", [{"activation_ranks": None, "activation_threshold": 0.999}, {}])
def test_no_warning_where_the_threshold_holds_or_nobody_gave_one(options: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compressed input keeps")
        fit(build(**options), WasiCallback(), tmp_path, max_steps=1)


@pytest.mark.parametrize("threshold", [0, -1.0, 1.5])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"activation_threshold must be a number in \(0, 1\]"):
        WasiCallback(activation_threshold=threshold)


# -------------------------------------------------------------------- distances and ranks


def test_chordal_distance_is_that_of_the_definition() -> None:
    first, second = orthonormal(9, 4, seed=0), orthonormal(9, 4, seed=5)
    expected = ((4 - (first.T @ second).square().sum()) / 4).sqrt()
    assert chordal_distance(first, second) == pytest.approx(float(expected), rel=1e-5)
    turned = first @ orthonormal(4, 4, seed=1)
    assert chordal_distance(first, turned) < 1e-6
    assert chordal_distance(first, first[:, :2]) < 1e-6


@pytest.mark.parametrize("update", ["subspace", "factor"])
def test_ranks_in_use_are_those_of_the_product(update: str) -> None:
    model = build(update=update)
    layer = layer_of(model)
    with torch.no_grad():
        layer.wasi_form["default"].L.mul_(3)
        layer.wasi_form["default"].R[2:] = 0
    assert ranks_in_use(model, 1 - 1e-9)[NAME] == 2
    with torch.no_grad():
        layer.wasi_form["default"].R.zero_()
    assert ranks_in_use(model, 0.9)[NAME] == 1
    with torch.no_grad():
        layer.wasi_form["default"].R.fill_(torch.nan)
    assert ranks_in_use(model, 0.9)[NAME] == 6


@pytest.mark.parametrize("form", FORMS)
def test_ranks_in_use_leave_out_what_trains_beside_them(form: str) -> None:
    """The energy is that of the whole product, whatever part of it trains, and of no weight that it is added to."""
    model = build(**FORMS[form], update_rank=2)
    train(model, VIT.batch(), steps=3)
    layer, side = layer_of(model), 2 if form == "low_rank" else 0
    below = 0 if layer.residual is None else layer.residual.dense_weight().double()
    for scale in (1.0, 100.0):
        with torch.no_grad():
            layer.form.part(layer.update.trained[0])[:, 0].mul_(scale)  # one direction of what trains takes over
        outer, inner = (factor.detach().double() for factor in layer.form.factors())
        assert relative_error(layer.get_dense_layer("default").weight, outer @ inner + below) < 1e-5
        energies = torch.linalg.svdvals(outer @ inner).square().tolist()
        for threshold in (0.3, 0.9, 0.999, 1 - 1e-9):
            expected = max(1, reference.smallest_rank(energies, threshold) - side)
            assert ranks_in_use(model, threshold)[NAME] == expected <= 6
    assert ranks_in_use(model, 0.9)[NAME] == 1


# -------------------------------------------------------------------- other ranks

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> list[float]:
    model.train()
    losses = []
    for _ in range(count):
        loss = model(**VIT.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize("update", ["subspace", "factor", "frozen_basis", "core"])
def test_training_goes_on_at_another_rank(kind: str, rank: int, update: str) -> None:
    model = build(update=update)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])  # type: ignore[no-untyped-call]
    steps(model, optimizer)
    places = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    resize_rank(model, NAME, rank, optimizer)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == places
    layer = layer_of(model)
    assert layer.wasi_form["default"].L.shape == (24, rank) and layer.wasi_form["default"].R.shape == (rank, 16)
    for parameter in layer.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape
            assert "sq" not in key or bool((value >= 0).all())
    losses = steps(model, optimizer, 4)
    assert losses[-1] < losses[0]
    assert orthonormality_error(layer.wasi_form["default"].L) < 1e-4 or update != "subspace"


class EightBits(torch.optim.SGD):
    """Keeps codes of the parameter's own shape, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["state1"] = torch.full_like(parameter, 200, dtype=torch.uint8)
        return super().step(closure)


@pytest.mark.parametrize("cls", [torch.optim.Rprop, torch.optim.Adadelta, EightBits])
def test_state_that_cannot_be_rotated_starts_afresh(cls: Any) -> None:
    """Step sizes and codes are no gradients."""
    model = build()
    optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps(model, optimizer)
    factors = [layer_of(model).wasi_form["default"].L, layer_of(model).wasi_form["default"].R]
    count = len(optimizer.state)
    resize_rank(model, NAME, 9, optimizer)
    assert len(optimizer.state) == count - 2 and not any(factor in optimizer.state for factor in factors)
    steps(model, optimizer)
    assert all(factor in optimizer.state for factor in factors)


@pytest.mark.parametrize("update", ["subspace", "factor", "frozen_basis", "core", "addition"])
def test_growing_changes_nothing_that_the_layer_computes(update: str) -> None:
    model = build(update=update)
    train(model, VIT.batch())
    before = logits(model, VIT.batch())
    resize_rank(model, NAME, 16)
    assert orthonormality_error(layer_of(model).wasi_form["default"].L) < 1e-5 or update != "subspace"
    assert relative_error(logits(model, VIT.batch()), before) < 1e-5


@pytest.mark.parametrize("update", ["subspace", "factor"])
def test_shrinking_keeps_the_best_approximation(update: str) -> None:
    model = build(update=update)
    train(model, VIT.batch())
    layer = layer_of(model)
    product = (layer.wasi_form["default"].L @ layer.wasi_form["default"].R).detach().double()
    resize_rank(model, NAME, 3)
    L, R = layer.wasi_form["default"].L.detach(), layer.wasi_form["default"].R.detach()
    U, S, Vh = torch.linalg.svd(product)
    assert relative_error(L @ R, (U[:, :3] * S[:3]) @ Vh[:3]) < 1e-5
    assert orthonormality_error(L) < 1e-5


def test_shrinking_keeps_the_largest_singular_values_of_a_core() -> None:
    model = build(update="core")
    train(model, VIT.batch())
    layer = layer_of(model)
    L, M, R = (layer.form.part(part).detach().clone() for part in "LMR")
    resize_rank(model, NAME, 3)
    U, S, Vh = torch.linalg.svd(M)
    wanted = L @ ((U[:, :3] * S[:3]) @ Vh[:3]) @ R
    assert relative_error(layer.get_dense_layer("default").weight, wanted) < 1e-5
    assert layer.wasi_form["default"].M.shape == (3, 3)


def test_shrinking_keeps_the_image_of_a_frozen_basis_white() -> None:
    model = build(update="frozen_basis")
    train(model, VIT.batch())
    layer = layer_of(model)
    L, R = (layer.form.part(part).detach().clone() for part in "LR")
    U, S, Vh = torch.linalg.svd(L, full_matrices=False)
    resize_rank(model, NAME, 3)
    turned = layer.wasi_form["default"].R.detach()
    assert relative_error(layer.wasi_form["default"].L.detach() @ turned, (U[:, :3] * S[:3]) @ Vh[:3] @ R) < 1e-5
    assert relative_error(turned @ turned.T, Vh[:3] @ R @ R.T @ Vh[:3].T) < 1e-5


def test_a_grown_frozen_basis_trains_in_its_new_directions() -> None:
    model = build(update="frozen_basis")
    resize_rank(model, NAME, 9)
    L = layer_of(model).wasi_form["default"].L
    assert not L[:, 6:].any()
    train(model, VIT.batch())
    assert bool(L[:, 6:].any(0).all())


def test_averages_of_gradients_follow_a_core() -> None:
    model = build(update="core").double()
    M = layer_of(model).wasi_form["default"].M
    with torch.no_grad():
        M.copy_(normal(6, 3, seed=1) @ normal(3, 6, seed=2))  # rank 3
    U, _, Vh = torch.linalg.svd(M.detach())
    optimizer = torch.optim.SGD([M], lr=0.0, momentum=0.9)
    G = normal(6, 6, seed=3)
    (M * G).sum().backward()
    optimizer.step()
    resize_rank(model, NAME, 3, optimizer)
    assert relative_error(optimizer.state[M]["momentum_buffer"], U[:, :3].T @ G @ Vh[:3].T) < 1e-9


@pytest.mark.parametrize("orthonormal_L", [True, False])
def test_averages_of_gradients_follow_the_basis(orthonormal_L: bool) -> None:
    """At a rank that loses nothing, gradients taken before and carried over are those taken after."""
    model = build(update="factor").double()
    layer = layer_of(model)
    L, R = layer.wasi_form["default"].L, layer.wasi_form["default"].R
    with torch.no_grad():
        L.copy_(orthonormal(24, 6, seed=0) if orthonormal_L else normal(24, 6, seed=0))
        R.copy_(normal(6, 3, seed=1) @ normal(3, 16, seed=2))  # rank 3
    optimizer = torch.optim.SGD([L, R], lr=0.0, momentum=0.9)
    G = normal(24, 16, seed=3)
    (L @ R * G).sum().backward()
    optimizer.step()
    resize_rank(model, NAME, 3, optimizer)
    assert relative_error(optimizer.state[L]["momentum_buffer"], G @ R.T) < 1e-9
    assert relative_error(optimizer.state[R]["momentum_buffer"], L.T @ G) < 1e-9


def test_a_resized_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    base = VIT.model()
    sizes = {name: tuple(base.get_submodule(name).weight.shape) for name in VIT.targets(base)}
    plan = WasiPlan(tuple(LayerPlan(name, *size, 5, {"feature": 3}, 0.5) for name, size in sorted(sizes.items())))
    model = build(weight_rank=None, activation_ranks=None, plan=plan)
    resize_rank(model, NAME, 2)
    resize_rank(model, "vit.layers.1.mlp.fc2", 8)
    train(model, VIT.batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.model(), str(tmp_path))
    assert torch.equal(logits(loaded, VIT.batch()), logits(model, VIT.batch()))
    layers = loaded.peft_config["default"].plan["layers"]
    assert layers[NAME]["weight_rank"] == 2 and loaded.peft_config["default"].ranks[NAME] == 2


def test_ranks_are_planned_again_between_epochs(tmp_path: Path) -> None:
    model = build(update="subspace")
    calls = []

    def replan(module: nn.Module) -> dict[str, int]:
        calls.append(copy.deepcopy(ranks_in_use(module, 0.5)))
        return {NAME: 3, "vit.layers.1.mlp.fc1": 8}

    logs = wasi_logs(fit(model, WasiCallback(replan=replan), tmp_path, num_train_epochs=3, logging_steps=1))
    assert len(calls) == 2  # not after the last epoch
    assert [entry["wasi/rank_min"] for entry in logs] == [6] * 3 + [3] * 6
    assert logs[-1]["wasi/rank_max"] == 8
    assert all(0 <= entry["wasi/weight_drift"] < 1 for entry in logs)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_follow_the_energy_between_epochs(form: str, tmp_path: Path) -> None:
    """Ranks only fall, to those in use; what trains beside them stays."""
    model = build(**FORMS[form], update_rank=2)
    plans: list[dict[str, int]] = []

    def replan(module: nn.Module) -> dict[str, int]:
        plans.append(ranks_in_use(module, 0.8))
        return plans[-1]

    fit(model, WasiCallback(replan=replan), tmp_path, num_train_epochs=3)
    layers = dict(wasi_layers(model.get_base_model()))
    assert {name: layer.form.weight_rank for name, layer in layers.items()} == plans[-1]  # type: ignore[attr-defined]
    assert all(plans[1][name] <= plans[0][name] <= 6 for name in layers) and min(plans[0].values()) < 6
    side = 2 if form == "low_rank" else 0
    assert {layer.form.rank - layer.form.weight_rank for layer in layers.values()} == {side}  # type: ignore[attr-defined]


def test_the_optimizer_of_the_package_works_too(tmp_path: Path) -> None:
    model = build()
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-3)
    steps(model, optimizer)
    resize_rank(model, NAME, 2, optimizer)
    assert optimizer.state[layer_of(model).wasi_form["default"].L]["exp_avg"].shape == (24, 2)
    assert torch.isfinite(torch.tensor(steps(model, optimizer))).all()


@pytest.mark.parametrize("rank", [0, 17, True, 2.0])
def test_an_impossible_rank_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 16"):
        resize_rank(build(), NAME, rank)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be that of a WASI layer"):
        resize_rank(build(), "vit.layers.0", 2)


def test_a_merged_layer_is_refused() -> None:
    model = build(base_weight="keep")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it"):
        resize_rank(model, NAME, 2)
