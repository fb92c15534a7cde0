"""`wasi-peft inspect`: what a model, checkpoint, adapter, plan or calibration holds."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import transformers

from ..factors.calibration import Calibration
from ..files.headers import read_header
from ..forms.residual import RESIDUALS
from ..hub.compressed import compressed_layers
from ..hub.headers import Checkpoint, StoredLayer, is_compressed, read_headers
from ..ranks.plan import WasiPlan
from ..ranks.spectrum import FACTORS
from ..report import plots, tables
from ..report.kinds import stored_rows
from ..tuner.config import WasiConfig
from ..tuner.summary import LayerSummary, WasiSummary
from .loading import ADAPTER_CONFIG, adapter_config, load_model, target_sizes
from .outputs import check_plot, plan_text, show


def inspect(arguments: argparse.Namespace) -> None:
    """Show what is there."""
    check_plot(arguments.plot)
    what = Path(arguments.model)
    if what.is_file():
        plan = WasiPlan.load(what)
        show(arguments, plan_text(arguments, plan), plan.to_dict())
        if arguments.plot:
            plots.plot_plan(plan, path=arguments.plot)
    elif (what / ADAPTER_CONFIG).is_file():
        _inspect_adapter(arguments, what)
    elif (what / "index.json").is_file():
        calibration = Calibration.load(what)
        rows = tables.calibration_rows(calibration)
        show(arguments, tables.table(rows), {"layers": rows})
        if arguments.plot:
            plots.plot_calibration(calibration, arguments.plot)
    elif is_compressed(what):
        _inspect_checkpoint(arguments, read_headers(what))
    else:
        _inspect_model(arguments)


def _stored_in(model: transformers.PreTrainedModel) -> Checkpoint:
    """What a compressed checkpoint holds, by the model that its configuration makes."""
    layers = []
    for name, layer in compressed_layers(model):
        form, size = layer.stored_form, sum(tensor.nbytes for tensor in layer.stored().values())
        layers.append(StoredLayer(name, form.form, form.rank + form.side_rank, size))
    tensors = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return Checkpoint(tuple(layers), sum(tensors.values()))


def _inspect_checkpoint(arguments: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if arguments.plot:
        raise ValueError("--plot needs a plan, an adapter or a calibration, got a compressed checkpoint.")
    compressed = sum(layer.stored_bytes for layer in checkpoint.layers)
    unit, size = tables.byte_unit(compressed)
    rows = stored_rows(checkpoint.layers, unit, size, every=arguments.layers)
    line = (
        f"compressed checkpoint: {len(checkpoint.layers)} layers in {compressed / size:,.2f} {unit}, "
        f"all tensors {checkpoint.stored_bytes / size:,.2f} {unit}"
    )
    data = {
        "layers": [layer._asdict() for layer in checkpoint.layers],
        "layers_bytes": compressed,
        "stored_bytes": checkpoint.stored_bytes,
    }
    show(arguments, f"{tables.table(rows)}\n{line}", data)


def _inspect_adapter(arguments: argparse.Namespace, folder: Path) -> None:
    config, summary = _read_adapter(folder)
    shown = summary if config.plan is None else _plan_as_injected(config)
    inputs = {layer.name: _input_rule(config, layer.name) for layer in summary.layers}
    settings = {
        "base_model": config.base_model_name_or_path,
        "update": config.update,
        "kept_share": summary.kept_share,
    }
    lines = [plan_text(arguments, shown), f"update {config.update}, base model {config.base_model_name_or_path}"]
    if config.plan is None:
        lines.append(f"input kept for backward: {next(iter(inputs.values()))}")
    layers = [
        {
            "layer": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "form": layer.update.residual or FACTORS,
            "weight_rank": layer.rank,
            "input": inputs[layer.name],
        }
        for layer in summary.layers
    ]
    show(arguments, "\n".join(lines), {**settings, "layers": layers})
    if arguments.plot:
        plots.plot_plan(shown, path=arguments.plot)


def _plan_as_injected(config: WasiConfig) -> WasiPlan:
    """The plan of an adapter, with the update and the memory mode that the adapter has, whatever it was made for."""
    plan = WasiPlan.from_dict(config.plan)
    fields = ("memory_mode", "update", "update_rank", "frozen_dtype")
    return replace(plan, **{name: getattr(config, name) for name in fields})


_ON_FACTORS = " The factors of an adapter on a compressed model are in that model's folder: inspect it."


def _read_adapter(folder: Path) -> tuple[WasiConfig, WasiSummary]:
    """Configuration and layers of a saved adapter; the base model is not needed."""
    config = adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    layers = []
    headers = read_header(path)
    shapes = {key: list(header.shape) for key, header in headers.items()}
    widths = {key: 2 if header.dtype in ("F16", "BF16") else 4 for key, header in headers.items()}
    for key in headers:  # a factor in few bits is as large as its codes or values
        factor, _, stored = key.rpartition(".")
        if stored in ("codes", "values"):
            shapes[factor] = shapes[key]
    places = (key.partition(".wasi_form.")[0] for key in shapes if ".wasi_form." in key)
    for place in dict.fromkeys(places):
        name = place.removeprefix("base_model.model.")
        update = config.update_of(name)
        prefix, parts = update.stored_cls.prefix, update.stored_cls.parts
        key = f"{place}.wasi_form.{prefix}L"
        if key not in shapes:
            continue
        L, R = shapes[key], shapes.get(key.removesuffix("L") + "R", [])
        if len(L) not in (2, 3) or len(R) != len(L) or L[-1] != R[-2] or L[:-2] != R[:-2]:  # 3: packed experts
            raise ValueError(f"{path}: {key} must have a matching {prefix}R, got the shapes {L} and {R}.{_ON_FACTORS}")
        missing = [part for part in parts if key.removesuffix("L") + part not in shapes]
        if missing:
            raise ValueError(
                f"{path}: {key} must stand with {prefix}{missing[0]} for update={update.name!r}, got none."
            )
        width = widths[f"{place}.wasi_form.{prefix}{update.trained[0]}"]
        experts = L[0] if len(L) == 3 else 1
        layers.append(LayerSummary(name, L[-2], R[-1], L[-1], update, width, experts=experts))
    if not layers:
        raise ValueError(f"{path}: must hold WASI factors, got none.{_ON_FACTORS}")
    return config, WasiSummary(folder.name, tuple(layers))


def _input_rule(config: WasiConfig, name: str) -> str:
    rule, update = config.compression_rule(name), config.update_of(name)
    if rule is None and update.keeps_image:
        return "image"
    if rule is None:
        rounds = update.residual is not None and RESIDUALS[update.residual].rounds_inputs
        return "8 bits" if rounds else "exact"
    ranks = dict(rule.ranks)
    return ", ".join(f"{mode} {ranks[mode] if mode in ranks else f'{rule.threshold:.0%}'}" for mode in rule.modes)


def _inspect_model(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        raise ValueError("--plot needs a plan, an adapter or a calibration, got a model.")
    model, task = load_model(arguments, weights=False)
    if any(compressed_layers(model)):
        return _inspect_checkpoint(arguments, _stored_in(model))
    sizes = target_sizes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    targeted = sum(target.elements for target in sizes.values())
    shapes = {name: target[:2] for name, target in sizes.items()}
    experts = {name: target.experts for name, target in sizes.items()}
    share = targeted / parameters
    text = f"{type(model).__name__} ({task}): {parameters:,} parameters, {share:.1%} in {len(sizes)} target layers"
    data = {
        "model": arguments.model,
        "architecture": type(model).__name__,
        "task": task,
        "parameters": parameters,
        "target_share": share,
        "kinds": tables.target_rows(shapes, experts),
        "layers": {name: target._asdict() for name, target in sizes.items()},
    }
    show(arguments, f"{tables.table(tables.target_rows(shapes, experts, every=arguments.layers))}\n{text}", data)
