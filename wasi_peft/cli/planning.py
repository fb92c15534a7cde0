"""`wasi-peft plan`: forms and ranks under a budget."""

from __future__ import annotations

import argparse

from ..factors.calibration import Calibration, calibrate_wasi
from ..hub.compressed import METHOD
from ..memory.modes import MEMORY_MODES
from ..planner.planner import BUDGETS, plan_wasi
from ..ranks.spectrum import FACTORS
from ..report import plots
from ..tuner.config import WasiConfig
from .comparing import check_padding
from .loading import calibration_batches, dummy_batch, load_model, padding_share, quantized_by, read_config, task_heads
from .options import RUNNING, training_fields
from .outputs import check_plan, check_plot, plan_text, show


def plan(arguments: argparse.Namespace) -> None:
    """Choose forms and ranks under a budget."""
    check_plan(arguments.output)
    check_plot(arguments.plot, arguments.data)
    if arguments.data is None and arguments.calibration is None:
        raise ValueError("--data is needed, or --calibration with a finished calibration; got neither.")
    if arguments.data is None:
        check_padding(arguments, "give it with --padding, or --data to measure it on.")
    if quantized_by(read_config(arguments)) == METHOD:
        raise ValueError(f"{arguments.model}: a plan is made for a dense model, got a compressed checkpoint.")
    model, task = load_model(arguments, weights=True)
    data = None if arguments.data is None else calibration_batches(arguments, model, task)
    if data is not None and arguments.skip_padding and arguments.padding is None:
        arguments.padding = padding_share(data)
    batch = dummy_batch(arguments, model, task)
    if data is None:
        calibration = Calibration.load(arguments.calibration)
    else:
        calibration = calibrate_wasi(model, data, directory=arguments.calibration)
    heads = task_heads(model, task)
    plan = plan_wasi(
        model,
        calibration,
        **{name: getattr(arguments, name) for name in BUDGETS},
        batch=batch,
        optimizer=arguments.optimizer,
        config=WasiConfig(weight_rank=arguments.addition_rank, modules_to_save=heads, **training_fields(arguments)),
        forms=arguments.forms,
        memory_modes=arguments.memory_modes or (MEMORY_MODES if arguments.peak_bytes else None),
    )
    if arguments.output:
        plan.save(arguments.output)
    text = plan_text(arguments, plan)
    if arguments.output:
        text += f"\nto train under it: {_how_to_train(arguments, heads)}"
        if any(layer.form == FACTORS for layer in plan.layers):
            text += ", and preprocess_wasi(model, config, data) before, for the layers that became factors"
    show(arguments, text, plan.to_dict())
    if arguments.plot:
        plots.plot_plan(plan, calibration, arguments.plot)


def _how_to_train(arguments: argparse.Namespace, heads: list[str] | None) -> str:
    """The configuration that a plan was made for, as Python."""
    fields = {"plan": arguments.output, "modules_to_save": heads}
    fields |= {name: getattr(arguments, name) or None for name in RUNNING}
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
    return f"WasiConfig({given})"
