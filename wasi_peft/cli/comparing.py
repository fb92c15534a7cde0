"""`wasi-peft estimate | profile`: what a training step takes, of WASI beside full fine-tuning and LoRA."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from peft import LoraConfig, PeftConfig
from torch import Tensor
from tqdm.auto import tqdm

from ..cost.estimate import Estimate, estimate_wasi
from ..cost.profile import StepProfile, profile_wasi
from ..hub.compressed import METHOD, compressed_layers
from ..report import plots, tables
from ..report.profiles import costs_table, plot_profiles, profiles_table
from ..tuner.config import AUTO, RESIDUAL_RANK, WasiConfig
from ..updates import UPDATES
from .loading import (
    check_file,
    dummy_batch,
    load_model,
    quantized_by,
    random_content,
    read_config,
    target_sizes,
    task_heads,
)
from .options import LORA_RANK, RUNNING, training_fields
from .outputs import check_plot, show

Measured = TypeVar("Measured")


def _variants(
    arguments: argparse.Namespace, model: transformers.PreTrainedModel, task: str
) -> dict[str, PeftConfig | None]:
    """Configurations to compare, by label; None is full fine-tuning."""
    heads = task_heads(model, task)
    configs: dict[str, PeftConfig | None] = {"compressed" if any(compressed_layers(model)) else "dense": None}
    if not arguments.dense:
        rank, targets = arguments.lora or LORA_RANK, target_sizes(model)
        layers, packed = (
            sorted(name for name, target in targets.items() if (target.experts > 1) == several)
            for several in (False, True)
        )
        configs[f"LoRA r={rank}"] = LoraConfig(
            r=rank, target_modules=layers, target_parameters=packed or None, modules_to_save=heads
        )
    if arguments.plan:
        configs["WASI plan"] = WasiConfig(plan=arguments.plan, modules_to_save=heads, **training_fields(arguments))
    elif not arguments.dense:
        configs[f"WASI K={arguments.weight_rank or RESIDUAL_RANK}"] = WasiConfig(
            weight_rank=arguments.weight_rank,
            residual={None: AUTO, "none": None}.get(arguments.residual, arguments.residual),
            activation_ranks=arguments.activation_rank,
            activation_threshold=None,
            modules_to_save=heads,
            **training_fields(arguments),
        )
    return configs


def _check_variants(arguments: argparse.Namespace) -> None:
    if arguments.activation_rank and not arguments.weight_rank:
        raise ValueError("--activation-rank goes with --weight-rank; a plan has its own.")
    if arguments.residual and (arguments.plan or arguments.dense):
        raise ValueError("--residual is for one rank everywhere, --weight-rank; a plan has its own.")
    if arguments.dense and arguments.lora:
        raise ValueError("--dense leaves LoRA out; give --lora or --dense, not both.")
    running = ("memory_mode", *RUNNING)
    if arguments.dense and any(getattr(arguments, name) for name in running):
        options = [f"--{name.replace('_', '-')}" for name in running]
        raise ValueError(f"{', '.join(options[:-1])} and {options[-1]} are for WASI, which --dense leaves out.")
    replaces = arguments.residual == "none" or arguments.frozen_dtype
    replaces = replaces or (arguments.update and not UPDATES[arguments.update].takes_residual)
    if replaces and not (arguments.weight_rank or arguments.plan or arguments.dense):
        raise ValueError("factors in place of the weights need --weight-rank, or --plan.")
    if arguments.plan:
        check_file(arguments.plan)
    check_padding(arguments, "give it with --padding, such as 0.5.")


def check_padding(arguments: argparse.Namespace, way_out: str) -> None:
    """Refuse to skip padding of which nobody said how much there is."""
    if arguments.skip_padding and arguments.padding is None:
        raise ValueError(f"--skip-padding depends on how much of a batch is padding; {way_out}")


def _for_each(
    configs: dict[str, PeftConfig | None], title: str, measure: Callable[[PeftConfig | None], Measured]
) -> dict[str, Measured]:
    """What `measure` says of each configuration; WASI, which may be refused, is asked first."""
    found = {}
    with tqdm(reversed(configs), desc=title, total=len(configs), leave=False) as labels:
        for label in labels:
            found[label] = measure(configs[label])
    return {label: found[label] for label in configs}


def _compared(
    arguments: argparse.Namespace, task: str, batch: dict[str, Any], model: transformers.PreTrainedModel
) -> tuple[str, dict[str, Any]]:
    """What was compared, as a line and as data."""
    shapes = {key: list(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    text = ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in shapes.items())
    data = {"model": arguments.model, "task": task, "optimizer": arguments.optimizer, "batch": shapes}
    return f"{type(model).__name__}, {arguments.optimizer}, {text}", data


def estimate(arguments: argparse.Namespace) -> None:
    """Memory and FLOPs of a training step, without running one."""
    check_plot(arguments.plot)
    _check_variants(arguments)
    method = quantized_by(read_config(arguments))
    if method is not None and method != METHOD:
        raise ValueError(
            f"{arguments.model}: must be dense or compressed by wasi_peft, got weights stored by {method!r}."
        )
    model, task = load_model(arguments, weights=False)
    batch = dummy_batch(arguments, model, task)

    def estimate(config: PeftConfig | None) -> Estimate:
        return estimate_wasi(model, config, batch=batch, optimizer=arguments.optimizer)

    estimates = _for_each(_variants(arguments, model, task), "Estimates", estimate)
    line, data = _compared(arguments, task, batch, model)
    data["estimates"] = {label: estimate.to_dict() for label, estimate in estimates.items()}
    show(arguments, f"{tables.estimates_table(estimates)}\n{line}", data)
    if arguments.plot:
        plots.plot_estimates(estimates, arguments.plot)


def profile(arguments: argparse.Namespace) -> None:
    """Time and memory of a training step, measured."""
    check_plot(arguments.plot)
    _check_variants(arguments)
    model, task = load_model(arguments, weights=True)
    batch = dummy_batch(arguments, model, task)
    random_content(batch, model)

    def profile(config: PeftConfig | None) -> StepProfile:
        return profile_wasi(model, config, batch=batch, optimizer=arguments.optimizer, rounds=arguments.rounds)

    profiles = _for_each(_variants(arguments, model, task), "Profiles", profile)
    line, data = _compared(arguments, task, batch, model)
    line += f", threads {torch.get_num_threads()}"
    data["threads"] = torch.get_num_threads()
    data["profiles"] = {label: profile.to_dict() for label, profile in profiles.items()}
    costs = [f"{label}\n{costs_table(profile, arguments.by)}" for label, profile in profiles.items()]
    show(arguments, "\n\n".join([f"{profiles_table(profiles)}\n{line}", *costs]), data)
    if arguments.plot:
        plot_profiles(profiles, arguments.plot)
