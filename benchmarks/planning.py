"""Times plan_wasi on a model of 210 layers, and checks "fit this fine-tune into N MiB" against what training takes.

Then compares plans that choose a form for every layer with plans of factors alone at the same peak: error of the plan,
measured peak, and accuracy after the same training.

The 210 layers are those of SmolLM2-135M, built from its configuration with random weights and made-up spectra, since
planning only reads numbers. The fit is that of the DINOv2-small ViT at 56 px, batch 32, AdamW, with a head that
trains; its peak is the tracked peak of whole steps on real images. Results: docs/benchmarks/planning.json.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import wasi_peft
from common import RESULTS_FOLDER, adamw, environment, read_json, step_peak_bytes, write_json
from finetuning import accuracy, predict, train, unlabelled
from images import ImageSet, load_images, part
from vit import load_vit
from wasi_peft.cost.estimate import PlannedPeaks
from wasi_peft.planner import peak, planner
from wasi_peft.ranks.choosing import plan_error
from wasi_peft.ranks.spectrum import LayerSpectrum
from wasi_peft.updates import DEFAULT_UPDATE, Update, make_update

RESULTS = RESULTS_FOLDER / "planning.json"
MIB = 2**20
PARTS = ("many_layers", "fit", "forms")
TRAINING = ("images", "batch", "held_out", "test_images", "seeds", "repair_steps", "steps", "epochs", "lr")
SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class MadeUpCalibration:
    """Stands in for a calibration: spectra that fall like a power, differently in every layer."""

    bytes_per_element = 4
    rows = 4096

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self._spectra = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                start, _, kind = name.rpartition(".")
                rate = 1 + 2 * torch.rand((), generator=generator).item()
                energies = torch.arange(1, module.in_features + 1, dtype=torch.float64) ** -rate
                self._spectra[name] = LayerSpectrum(
                    name,
                    module.out_features,
                    module.in_features,
                    f"{start}.{SHARED_INPUT.get(kind, kind)}",
                    tuple(energies[: min(module.weight.shape)].tolist()),
                    {"feature": tuple(energies.tolist())},
                )

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._spectra)

    def require(self, targets: Iterable[str]) -> None:
        assert set(targets) <= set(self._spectra)

    def spectra(self, names: Iterable[str], update: Update | None = None) -> list[LayerSpectrum]:
        return [replace(self._spectra[name], update=update or make_update(DEFAULT_UPDATE)) for name in names]


class Estimates:
    """Counts the estimates of a step that planning makes, and the processor time they take."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def counting(self, function: Any) -> Any:
        """The same function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self.calls, self.seconds = self.calls + 1, self.seconds + time.process_time() - start
            return result

        return counted


def timed_plan(model: nn.Module, calibration: Any, **options: Any) -> tuple[wasi_peft.WasiPlan, dict[str, Any]]:
    """Plans; also returns the time, and how much of it went into how many estimates of a step.

    Processor time is what a busy machine does not distort; with one thread it is the time on an idle one.
    """
    estimates = Estimates()
    start, processor_start = time.perf_counter(), time.process_time()
    with (
        mock.patch.object(peak, "estimate_peak", estimates.counting(peak.estimate_peak)),
        mock.patch.object(PlannedPeaks, "__call__", estimates.counting(PlannedPeaks.__call__)),
    ):
        plan = planner.plan_wasi(model, calibration, **options)
    return plan, {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - processor_start, 2),
        "estimates": estimates.calls,
        "processor_seconds_in_estimates": round(estimates.seconds, 2),
    }


def many_layers(blocks: int, tokens: int) -> dict[str, Any]:
    """Times one plan per kind of budget for SmolLM2-135M's layers."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    calibration = MadeUpCalibration(model)
    tokens_in = torch.arange(2 * tokens).reshape(2, tokens) % config.vocab_size
    batch = {"input_ids": tokens_in, "labels": tokens_in}
    dense_bytes = wasi_peft.estimate_wasi(model, batch=batch).peak_bytes
    asked = {
        "weight_share": 0.4,
        "error": 0.05,
        "inference_flops": 0.5,
        "training_flops": 0.5,
        "step_seconds": 0.6,
    }
    peaks = [int(share * dense_bytes) for share in (0.32, 0.5, 0.7)]
    results: dict[str, Any] = {"layers": len(calibration.layers)}
    for name, value in [*asked.items(), *(("peak_bytes", asked_peak) for asked_peak in peaks)]:
        options = {name: value, "config": wasi_peft.WasiConfig(residual=None)}
        if name in ("training_flops", "step_seconds", "peak_bytes"):
            options["batch"] = batch
        plan, timing = timed_plan(model, calibration, **options)
        if name == "peak_bytes":
            used = wasi_peft.estimate_wasi(model, wasi_peft.WasiConfig(plan=plan), batch=batch)
            timing["share_used"] = round(used.peak_bytes / value, 4)
            name = f"peak of {value / MIB:.0f} MiB"
        results[name] = timing
        print(f"{len(calibration.layers)} layers, {name}={value}: {timing}")
    return results


def fits(budgets: Iterable[float], images: int, batch_size: int) -> dict[str, Any]:
    """Plans for each budget in MiB, and measures training steps of the planned model."""
    dense = load_vit()
    train_set, _ = load_images(train=images, test=1)
    data = DataLoader(train_set, batch_size=batch_size, collate_fn=unlabelled)
    calibration = wasi_peft.calibrate_wasi(dense, data)
    pixels = next(iter(data))["pixel_values"]
    batch = {"pixel_values": pixels, "labels": train_set.labels[: len(pixels)]}
    options = {"modules_to_save": ["classifier"]}
    results: dict[str, Any] = {"dense": {"measured_mib": round(step_peak_bytes(dense, adamw, batch) / MIB, 2)}}
    for budget in budgets:
        config = wasi_peft.WasiConfig(**options)
        plan, timing = timed_plan(dense, calibration, peak_bytes=int(budget * MIB), batch=batch, config=config)
        config = wasi_peft.WasiConfig(plan=plan, **options)
        estimate = wasi_peft.estimate_wasi(dense, config, batch=batch).peak_bytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The initial factors come from a plain truncated SVD")
            model = peft.get_peft_model(load_vit(), config)
        measured = step_peak_bytes(model, adamw, batch)
        results[f"{budget:g} MiB"] = {
            "estimate_mib": round(estimate / MIB, 2),
            "measured_mib": round(measured / MIB, 2),
            "share_used": round(measured / (budget * MIB), 4),
            "weights_kept": round(plan.kept_share, 4),
            "exact_inputs": sum(layer.activation_ranks is None for layer in plan.layers),
            "planning": timing,
        }
        print(plan.headline(), results[f"{budget:g} MiB"])
    return results


def compare_forms(args: argparse.Namespace, rows: dict[str, Any], save: Callable[[], None]) -> None:
    """Fine-tunes the model of both kinds of plan for each budget in MiB; a row for each budget and kind not there yet.

    A row that was made with other settings is made again.

    Every rate trains the same prepared model with the first seed; the best by held-out images has the other seeds.
    """
    pool, test_set = load_images(train=args.images + args.held_out, test=args.test_images)
    train_set, held_out = part(pool, 0, args.images), part(pool, args.images, len(pool))
    dense = load_vit()
    data = list(DataLoader(train_set, batch_size=args.batch, collate_fn=unlabelled))
    calibration = wasi_peft.calibrate_wasi(dense, data)
    batch = {"pixel_values": data[0]["pixel_values"], "labels": train_set.labels[: len(data[0]["pixel_values"])]}
    options = {"modules_to_save": ["classifier"]}
    settings = {name: getattr(args, name) for name in TRAINING}
    for budget in args.budgets:
        for kind, forms in (("forms", None), ("factors", ("factors",))):
            if rows.get(f"{budget:g} MiB, {kind}", {}).get("settings") == settings:
                continue
            config = wasi_peft.WasiConfig(**options)
            try:
                plan, timing = timed_plan(
                    dense, calibration, peak_bytes=int(budget * MIB), batch=batch, config=config, forms=forms
                )
            except ValueError as infeasible:
                rows[f"{budget:g} MiB, {kind}"] = {"infeasible": str(infeasible)}
                continue
            spectra = calibration.spectra([layer.name for layer in plan.layers])
            row: dict[str, Any] = {
                "settings": settings,
                "forms": dict(Counter(layer.form for layer in plan.layers)),
                "memory_mode": plan.memory_mode,
                "error": plan_error(spectra, plan),
                "weights_kept": round(plan.kept_share, 4),
                "planning": timing,
                "held_out_accuracy": {},
                "accuracy": {},
            }
            for seed in args.seeds:
                torch.manual_seed(seed)
                model, config = load_vit(seed=seed), wasi_peft.WasiConfig(plan=plan, **options)
                wasi_peft.preprocess_wasi(model, config, data, calibration=calibration, repair_steps=args.repair_steps)
                for lr in args.lr if seed == args.seeds[0] else [row["lr"]]:
                    adapted = peft.get_peft_model(copy.deepcopy(model), config)
                    row["measured_mib"] = round(step_peak_bytes(adapted, adamw, batch) / MIB, 2)
                    _fine_tune(adapted, train_set, lr, seed, args)
                    found = [round(accuracy(predict(adapted, s), s.labels), 4) for s in (held_out, test_set)]
                    row["held_out_accuracy"][f"{lr:g}, seed {seed}"], row["accuracy"][f"{lr:g}, seed {seed}"] = found
                if "lr" not in row:
                    row["lr"] = max(args.lr, key=lambda lr: row["held_out_accuracy"][f"{lr:g}, seed {args.seeds[0]}"])
            of_best = [row["accuracy"][f"{row['lr']:g}, seed {seed}"] for seed in args.seeds]
            row["mean_accuracy"] = round(statistics.mean(of_best), 4)
            row["spread"] = round(statistics.stdev(of_best), 4) if len(of_best) > 1 else None
            rows[f"{budget:g} MiB, {kind}"] = row
            print(f"{budget:g} MiB, {kind}: {row}", flush=True)
            save()
    print(_forms_table(rows))


def _fine_tune(model: nn.Module, train_set: ImageSet, lr: float, seed: int, args: argparse.Namespace) -> None:
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, optimizer, train_set, Path(folder),
            steps=args.steps, epochs=args.epochs, batch_size=args.batch, seed=seed,
        )  # fmt: skip


def _forms_table(rows: dict[str, Any]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| budget, plan | forms | mode | error | measured MiB | rate | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "infeasible" in row:
            lines.append(f"| {name} | infeasible | | | | | |")
            continue
        forms = ", ".join(f"{count} {form}" for form, count in row["forms"].items())
        spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
        lines.append(
            f"| {name} | {forms} | {row['memory_mode']} | {row['error']:.2e} | {row['measured_mib']} | "
            f"{row['lr']:g} | {row['mean_accuracy']:.4f}{spread} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the parts and writes the JSON, in which rows of "forms" stay that were made with the same settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--budgets", type=float, nargs="+", default=[220, 260, 320], help="MiB")
    parser.add_argument("--images", type=int, default=512, help="for calibration")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=2000, help="images after those, to choose the rate by")
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repair-steps", type=int, default=None, help="None: the default of preprocess_wasi")
    parser.add_argument("--steps", type=int, default=None, help="of training; None for --epochs")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="tried with the first seed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()

    torch.manual_seed(0)
    results: dict[str, Any] = {}

    def save() -> None:
        settings = {key: value for key, value in vars(args).items() if key != "results"}
        write_json(args.results, {"settings": settings, **results, "environment": environment()})

    parts = {
        "many_layers": lambda: results.update(many_layers=many_layers(args.blocks, args.tokens)),
        "fit": lambda: results.update(fit=fits(args.budgets, args.images, args.batch)),
        "forms": lambda: compare_forms(
            args, results.setdefault("forms", read_json(args.results).get("forms", {})), save
        ),
    }
    for name in args.parts:
        parts[name]()
    save()
    return results


if __name__ == "__main__":
    main()
