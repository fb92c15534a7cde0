"""What `real_models.py` has each model go through: a function a tool, which does what a user would.

A tool does its work and returns a function that checks what came out and says it in numbers; time and memory are those
of the work. What is wrong raises :class:`Wrong`.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import wasi_peft
from common import Batch, adamw, step_peak_bytes
from real_cases import Place, Real
from wasi_peft.cli import main as cli
from wasi_peft.training.resize import active_layers, ranks_in_use

STEPS = 10
MIB = 2**20
SHARE = 0.5  # of the weights that factors keep
ESTIMATE_TOLERANCE = 0.01  # of a measured peak
Checks = dict[str, Any]
Tool = Callable[[Place], Callable[[], Checks]]


class Wrong(Exception):
    """What came out is not what should."""


class Refused(Exception):
    """What the command line says before it gives up."""


def require(holds: bool, sentence: str) -> None:
    """Raises :class:`Wrong` with a sentence unless something holds."""
    if not holds:
        raise Wrong(sentence)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def command(place: Place, *arguments: object) -> str:
    """Runs `wasi-peft` and returns what it prints; what is meant for people goes to a file too, to be read."""
    words = [str(word) for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    shown = "\n".join(line.rpartition("\r")[2] for line in err.getvalue().split("\n"))  # the last state of each bar
    if "--json" not in words:
        with (place.path / "printed.txt").open("a") as log:
            log.write(f"$ wasi-peft {' '.join(words)}\n{out.getvalue()}{shown}\n")
    if code:
        raise Refused(err.getvalue().strip().splitlines()[-1].removeprefix("wasi-peft: error: "))
    return out.getvalue()


def inspect(place: Place) -> Callable[[], Checks]:
    """`wasi-peft inspect` of the model."""
    command(place, "inspect", place.dense_folder)

    def verify() -> Checks:
        data = json.loads(command(place, "inspect", place.dense_folder, "--json"))
        model = peft.get_peft_model(place.dense(), wasi_peft.WasiConfig())
        require(len(data["layers"]) == len(model.wasi_summary().layers), "it lists other layers than are replaced")
        return {"layers": len(data["layers"]), "share of parameters": data["target_share"]}

    return verify


def estimate(place: Place) -> Callable[[], Checks]:
    """`wasi-peft estimate`."""
    options = place.model.options
    command(place, "estimate", place.dense_folder, *options)

    def verify() -> Checks:
        data = json.loads(command(place, "estimate", place.dense_folder, *options, "--json"))["estimates"]
        peaks = {label: entry["peak_bytes"] / MIB for label, entry in data.items()}
        require(min(peaks, key=lambda label: peaks[label]).startswith("WASI"), "WASI is not the smallest")
        return {f"{label}, MiB": peak for label, peak in peaks.items()}

    return verify


def profile(place: Place) -> Callable[[], Checks]:
    """`wasi-peft profile`, few rounds."""
    options = [*place.model.options, "--rounds", "2", "--json"]
    data = json.loads(command(place, "profile", place.dense_folder, *options))["profiles"]

    def verify() -> Checks:
        estimates = json.loads(command(place, "estimate", place.dense_folder, *place.model.options, "--json"))
        differences = {}
        for label, entry in data.items():
            estimated = estimates["estimates"][label]["peak_bytes"]
            differences[f"{label}, peak over estimate"] = entry["peak_bytes"] / estimated
        worst = max(abs(ratio - 1) for ratio in differences.values())
        require(worst <= ESTIMATE_TOLERANCE, f"a measured peak is {worst:.1%} off the estimated one")
        return differences

    return verify


def plan(place: Place) -> Callable[[], Checks]:
    """`wasi-peft plan` of a peak, from a calibration on the data; then training under the plan."""
    batch = place.batches()[0]
    dense = wasi_peft.estimate_wasi(place.dense(), batch=batch).peak_bytes
    budget, path = int(0.4 * dense), place.path / "plan.json"
    options = ["--data", place.data, *place.model.options, "--samples", "16"]
    budget_option = ["--peak-memory", f"{budget}B"]
    command(place, "plan", place.dense_folder, *options, *budget_option, "--output", path)

    def verify() -> Checks:
        config = wasi_peft.WasiConfig(plan=str(path), modules_to_save=place.model.head)
        forms = [layer["form"] for layer in config.plan["layers"].values()]
        measured = step_peak_bytes(injected(place, config), adamw, batch)
        require(measured <= budget, f"a step takes {measured / MIB:.1f} MiB of {budget / MIB:.1f} MiB")
        losses = fit(injected(place, config), batch, place.model.rate)
        return {
            "budget, MiB": budget / MIB,
            "measured, MiB": measured / MIB,
            "memory mode": config.memory_mode,
            **{form: forms.count(form) for form in sorted(set(forms))},
            **falling(losses),
        }

    return verify


def prepare(place: Place) -> Callable[[], Checks]:
    """`wasi-peft prepare`, 8 bits, and the checkpoint loaded."""
    folder = place.path / "int8"
    command(place, "prepare", place.dense_folder, "--output", folder, "--overwrite")

    def verify() -> Checks:
        cls = getattr(transformers, place.model.auto_class)
        batch = place.batches(labels=False)[0]
        away = difference(answers(cls.from_pretrained(folder).eval(), batch), answers(place.dense(), batch))
        require(away < 0.1, f"answers are {away:.1%} off")
        command(place, "inspect", folder)
        return {"stored over dense": size_of(folder) / size_of(place.dense_folder), "difference": away}

    return verify


def merge(place: Place, dense: bool) -> Callable[[], Checks]:
    """`wasi-peft merge` of the trained adapter."""
    folder = place.path / ("merged-dense" if dense else "merged")
    trained_adapter(place, "residual")
    options = ["--dense"] if dense else []
    command(place, "merge", place.path / "residual", "--output", folder, "--overwrite", *options)

    def verify() -> Checks:
        cls = getattr(transformers, place.model.auto_class)
        batch, adapter = place.batches()[0], peft.PeftModel.from_pretrained(place.dense(), place.path / "residual")
        merged = cls.from_pretrained(folder)
        found = {"difference": difference(answers(merged, batch), answers(adapter, batch))}
        found["difference in float64"] = difference(exact_answers(merged, batch), exact_answers(adapter, batch))
        require(
            found["difference in float64"] < 1e-5, f"answers in float64 are {found['difference in float64']:.1e} off"
        )
        return {"stored over dense": size_of(folder) / size_of(place.dense_folder), **found}

    return verify


def export(place: Place) -> Callable[[], Checks]:
    """`wasi-peft export` of the trained factors as plain modules."""
    folder = place.path / "plain"
    trained_adapter(place, "factors")
    options = ["--image-size", place.model.size] if place.model.images else []
    text = command(place, "export", place.path / "factors", "--output", folder, "--overwrite", *options)

    def verify() -> Checks:
        return {
            "stored over dense": size_of(folder) / size_of(place.dense_folder),
            "said": text.strip().replace(str(place.path), place.path.name),
        }

    return verify


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def injected(place: Place, config: wasi_peft.WasiConfig) -> nn.Module:
    """The dense model with an adapter, from plain weights."""
    return peft.get_peft_model(place.dense(), dataclasses.replace(config))


def fit(
    model: nn.Module,
    batch: Batch,
    rate: float,
    steps: int = STEPS,
    make: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> list[float]:
    """Takes steps on one batch and returns the losses before each."""
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=rate) if make is None else make(model)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def standing(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that changes nothing."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)


def falling(losses: list[float]) -> Checks:
    """First and last loss, of which the last must be lower."""
    require(losses[-1] < losses[0], f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}")
    return {"first loss": losses[0], "last loss": losses[-1]}


@torch.no_grad()
def answers(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits in evaluation mode, those of real tokens."""
    model.eval()
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 and "attention_mask" in batch else logits


def exact_answers(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits in float64, in which no input is rounded: a router that would choose otherwise then does not."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.set_experts_implementation("eager")  # torch's grouped product takes no float64
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return answers(model.double(), batch)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Norm of the difference over that of the second."""
    return float((first - second).norm() / second.norm())


def loaded_difference(model: nn.Module, dense: nn.Module, batch: Batch) -> float:
    """Saves an adapter, loads it on a dense model and compares answers, which must be the same."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        loaded = peft.PeftModel.from_pretrained(dense, scratch)
        away = difference(answers(loaded, batch), answers(model, batch))
    require(away < 1e-4, f"answers of the loaded model are {away:.1e} off")
    return away


def size_of(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def estimated_and_measured(model: nn.Module, config: Any, twin: nn.Module, batch: Batch) -> Checks:
    """The estimated peak of a step and the tracked one, which must agree."""
    estimated = wasi_peft.estimate_wasi(model, config, batch=batch).peak_bytes
    measured = step_peak_bytes(twin, adamw, batch)
    away = abs(estimated / measured - 1)
    require(away <= ESTIMATE_TOLERANCE, f"the estimated peak is {away:.1%} off the measured one")
    return {"estimated, MiB": estimated / MIB, "measured, MiB": measured / MIB}


def config_of(place: Place, form: str, **options: Any) -> wasi_peft.WasiConfig:
    """The configuration of a form."""
    given: dict[str, Any] = {"weight_share": SHARE} if form == "factors" else {}
    return wasi_peft.WasiConfig(modules_to_save=place.model.head, **{**given, **options})


def ready(place: Place, config: wasi_peft.WasiConfig) -> nn.Module:
    """The model to train: factors are prepared from data once, and kept."""
    model = place.dense()
    if config.residual is None:
        path = place.path / "factors.safetensors"
        if path.is_file() and place.name != "mixtral":  # files hold no packed experts
            wasi_peft.WasiFactors.load(path).attach(model)
        else:
            batches = place.batches(4, labels=False)
            wasi_peft.preprocess_wasi(model, config, batches, repair_steps=4, progress_bar=False).save(path)
    return peft.get_peft_model(model, config)


def train(place: Place, form: str, mode: str) -> Callable[[], Checks]:
    """Ten steps of a form in a memory mode."""
    batch, config = place.batches()[0], config_of(place, form, memory_mode=mode)
    model = ready(place, dataclasses.replace(config))
    losses = fit(model, batch, place.model.rate)
    if mode == "exact":
        keep(place, form, model)
    del model

    def verify() -> Checks:
        shares = falling(losses)
        if form == "factors":  # ranks do not depend on values here
            fixed = config_of(place, form, memory_mode=mode, weight_share=None, weight_rank=64, residual=None)
            return {**shares, **estimated_and_measured(place.dense(), fixed, injected(place, fixed), batch)}
        return {**shares, **estimated_and_measured(place.dense(), config, injected(place, config), batch)}

    return verify


def keep(place: Place, form: str, model: nn.Module) -> None:
    """Saves a trained adapter, and what it answers."""
    shutil.rmtree(place.path / form, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=place.path) as scratch:
        model.save_pretrained(Path(scratch) / form)
        torch.save(answers(model, place.batches()[0]), Path(scratch) / form / "answers.pt")
        (Path(scratch) / form).rename(place.path / form)


def saved(place: Place, form: str) -> torch.Tensor:
    """What the kept adapter answered."""
    return torch.load(place.path / form / "answers.pt")


def trained_adapter(place: Place, form: str) -> None:
    """Trains the adapter that other tools start from, where it is missing."""
    if not (place.path / form / "answers.pt").is_file():
        train(place, form, "exact")


def reload(place: Place) -> Callable[[], Checks]:
    """The saved adapters of both forms loaded by a fresh process, in two ways."""
    trained_adapter(place, "residual")
    trained_adapter(place, "factors")
    batch, found = place.batches()[0], {}
    for form in ("residual", "factors"):
        model = peft.PeftModel.from_pretrained(place.dense(), place.path / form)
        found[form] = difference(answers(model, batch), saved(place, form))
    loaded = wasi_peft.load_adapter(place.path / "factors")
    found["factors, base not read"] = difference(answers(loaded, batch), saved(place, "factors"))

    def verify() -> Checks:
        require(max(found.values()) < 1e-4, f"answers are {max(found.values()):.1e} off")
        for form in ("residual", "factors"):
            command(place, "inspect", place.path / form)
        return found

    return verify


def resize(place: Place) -> Callable[[], Checks]:
    """`resize_rank` of every second layer between steps, to half and to double."""
    batch, model = place.batches()[0], injected(place, config_of(place, "residual"))
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=place.model.rate)
    losses = fit(model, batch, 0.0, 3, lambda _: optimizer)
    before = answers(model, batch)
    layers = [name for name, layer in active_layers(model).items() if layer.experts == 1]
    for name in layers[::2]:
        wasi_peft.resize_rank(model, name, min(64, *_sides(model, name)), optimizer)
    grown = difference(answers(model, batch), before)
    for name in layers[1::2]:
        wasi_peft.resize_rank(model, name, 16, optimizer)
    losses += fit(model, batch, 0.0, 7, lambda _: optimizer)

    def verify() -> Checks:
        require(grown < 1e-4, f"answers are {grown:.1e} off after ranks have grown")
        return {"after growing": grown, **falling(losses)}

    return verify


def _sides(model: Any, name: str) -> tuple[int, int]:
    layer = active_layers(model)[name]
    return layer.out_features, layer.in_features


def callback(place: Place) -> Callable[[], Checks]:
    """`WasiCallback` in the Trainer, ranks replanned after each epoch."""
    batches = place.batches(2)
    items = [
        {name: value[index] for name, value in batch.items()}
        for batch in batches
        for index in range(4)[: len(batch["labels"])]
    ]
    longest = max(len(item["input_ids"]) for item in items) if not place.model.images else 0
    items = [_padded(item, longest) for item in items] if longest else items
    model = injected(place, config_of(place, "residual"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, num_train_epochs=3, per_device_train_batch_size=2, learning_rate=place.model.rate,
            logging_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False, use_cpu=True,
            disable_tqdm=True, label_names=["labels"],
        )  # fmt: skip
        watch = wasi_peft.WasiCallback(replan=lambda model: ranks_in_use(model, 0.9))
        trainer = transformers.Trainer(model, arguments, train_dataset=items, callbacks=[watch])
        trainer.train()
    log = trainer.state.log_history

    def verify() -> Checks:
        losses = [entry["loss"] for entry in log if "loss" in entry]
        ranks = [entry["wasi/rank_mean"] for entry in log if "wasi/rank_mean" in entry]
        third = len(losses) // 3
        epochs = [sum(losses[:third]) / third, sum(losses[-third:]) / third]
        require(epochs[1] < epochs[0], f"the loss goes from {epochs[0]:.3f} to {epochs[1]:.3f}")
        require(ranks[-1] != ranks[0], "no rank has changed")
        return {"first loss": epochs[0], "last loss": epochs[1], "first rank": ranks[0], "last rank": ranks[-1]}

    return verify


def _padded(item: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    fill = {"labels": -100, "input_ids": 0, "attention_mask": 0}
    return {
        name: nn.functional.pad(value, (0, length - len(value)), value=fill[name]) if value.dim() else value
        for name, value in item.items()
    }


def in_backward(place: Place) -> Callable[[], Checks]:
    """`OptimizerInBackward`: the losses of the plain optimizer."""
    batch, config = place.batches()[0], config_of(place, "residual", memory_mode="small", residual_product="restored")

    def losses_of(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> list[float]:
        transformers.set_seed(0)
        model = injected(place, config)

        def make(model: nn.Module) -> torch.optim.Optimizer:
            return wrap(wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=place.model.rate))

        return fit(model, batch, 0.0, STEPS, make)

    losses = losses_of(wasi_peft.OptimizerInBackward)

    def verify() -> Checks:
        plain = losses_of(lambda optimizer: optimizer)
        require(losses == plain, f"the last loss is {losses[-1]:.4f}, {plain[-1]:.4f} with the plain optimizer")
        return falling(losses)

    return verify


def subspace_sgd(place: Place) -> Callable[[], Checks]:
    """The paper's method: `WasiConfig.paper` and `SubspaceSGD`."""
    config = wasi_peft.WasiConfig.paper(0.8, modules_to_save=place.model.head)
    make = functools.partial(wasi_peft.SubspaceSGD, lr=0.01, max_grad_norm=2.0)
    losses = fit(injected(place, config), place.batches()[0], 0.0, STEPS, make)
    return functools.partial(falling, losses)


def weighted(place: Place) -> Callable[[], Checks]:
    """`add_weighted_adapter` of two trained adapters: exact, and the best of a rank."""
    batch, config = place.batches()[0], config_of(place, "residual")
    model: Any = injected(place, config)
    model.add_adapter("second", config_of(place, "residual"))
    for name in ("default", "second"):
        model.set_adapter(name)
        fit(model, batch, place.model.rate, 3)
    changes = {name: _change(model, place.model.layer, name) for name in ("default", "second")}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", "cat")
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "best", "svd")
    model.set_adapter("sum")

    def verify() -> Checks:
        expected = 0.7 * changes["default"] + 0.3 * changes["second"]
        exact = difference(_change(model, place.model.layer, "sum"), expected)
        best = difference(_change(model, place.model.layer, "best"), expected)
        require(exact < 1e-5 and best < 1, f"the sum is {exact:.1e} off, its best approximation {best:.1%}")
        return {"sum": exact, "best of its rank": best, "loss": fit(model, batch, 0.0, 1, standing)[0]}

    return verify


def _change(model: Any, layer: str, adapter: str) -> torch.Tensor:
    form = model.base_model.model.get_submodule(layer).wasi_form[adapter]
    outer, inner = form.factors()
    return (outer @ inner).detach().clone()


def tokens_that_train(place: Place) -> Callable[[], Checks]:
    """`trainable_token_indices` with `ensure_weight_tying`: rows of those tokens change, and a tied head follows."""
    batch = place.batches()[0]
    rows = batch["input_ids"][0, :3].unique().tolist()
    base: Any = place.dense()
    before = base.get_input_embeddings().weight.detach().clone()
    config = config_of(place, "residual", trainable_token_indices=rows, ensure_weight_tying=True)
    model: Any = peft.get_peft_model(base, config)
    losses = fit(model, batch, place.model.rate)

    def verify() -> Checks:
        away = loaded_difference(model, place.dense(), batch)
        merged = model.merge_and_unload()
        after = merged.get_input_embeddings().weight.detach()
        changed = (after != before).any(1).nonzero()[:, 0].tolist()
        require(changed == rows, f"rows {changed} of the embedding changed, not {rows}")
        if merged.config.tie_word_embeddings:
            same = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
            require(same, "the head came apart from the embedding")
        return {"loaded": away, **falling(losses)}

    return verify


def padding(place: Place) -> Callable[[], Checks]:
    """`skip_padding`: gradients of the padded batch, in less memory where there is much padding."""
    batch = place.batches(spread=5)[0]
    config = config_of(place, "residual", skip_padding=True)
    losses = fit(injected(place, config), batch, place.model.rate)

    def verify() -> Checks:
        measured = {}
        for skips in (True, False):
            options = {"residual_product": "restored", "skip_padding": skips}
            model = injected(place, config_of(place, "residual", **options))
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            fit(model, batch, 0.0, 1, standing)  # coordinates come from the first batch
            model.zero_grad()
            model(**batch).loss.backward()
            every = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
            measured[skips] = torch.cat(every), step_peak_bytes(model, adamw, batch)
        away = difference(measured[True][0], measured[False][0])
        require(away < 1e-2, f"gradients are {away:.1%} off")
        share = 1 - float(batch["attention_mask"].float().mean())
        peaks = {"peak over padded": measured[True][1] / measured[False][1]}
        known = estimated_and_measured(place.dense(), config, injected(place, config), batch)
        return {"padding": share, "gradients": away, **peaks, **known, **falling(losses)}

    return verify


def fewer_tokens(place: Place) -> Callable[[], Checks]:
    """`token_keep`: half of the patches while training, all of them afterwards."""
    batch, config = place.batches()[0], config_of(place, "residual", token_keep=0.5)
    model = injected(place, config)
    losses = fit(model, batch, place.model.rate)

    def verify() -> Checks:
        loaded_difference(model, place.dense(), batch)
        known = estimated_and_measured(place.dense(), config, injected(place, config), batch)
        whole = wasi_peft.estimate_wasi(place.dense(), config_of(place, "residual"), batch=batch).peak_bytes
        ratio = known["measured, MiB"] * MIB / whole
        return {"peak over all patches": ratio, **known, **falling(losses)}

    return verify


def _all(model: Real) -> bool:
    return True


TRAINING = {
    f"{form}, {mode}": functools.partial(train, form=form, mode=mode)
    for form, mode in itertools.product(("residual", "factors"), ("exact", "fast", "small"))
}
TOOLS: dict[str, tuple[Tool, Callable[[Real], bool]]] = {
    "wasi-peft inspect": (inspect, _all),
    "wasi-peft estimate": (estimate, _all),
    "wasi-peft profile": (profile, _all),
    "wasi-peft plan": (plan, _all),
    "wasi-peft prepare": (prepare, _all),
    **{name: (tool, _all) for name, tool in TRAINING.items()},
    "a fresh process": (reload, _all),
    "wasi-peft merge": (functools.partial(merge, dense=False), _all),
    "wasi-peft merge --dense": (functools.partial(merge, dense=True), _all),
    "wasi-peft export": (export, _all),
    "resize_rank": (resize, _all),
    "WasiCallback, replan": (callback, _all),
    "OptimizerInBackward": (in_backward, _all),
    "SubspaceSGD": (subspace_sgd, _all),
    "add_weighted_adapter": (weighted, _all),
    "trainable_token_indices": (tokens_that_train, lambda model: model.is_lm),
    "skip_padding": (padding, lambda model: not model.images),
    "token_keep": (fewer_tokens, lambda model: model.images),
}


def tools_of(model: Real) -> Collection[str]:
    """Names of what a model goes through."""
    return [name for name, (_, suits) in TOOLS.items() if suits(model)]
