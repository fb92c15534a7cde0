"""Whole training steps in every memory mode, against full fine-tuning and LoRA with gradient checkpointing.

WASI runs with its default update, "frozen_basis", and with "low_rank" and 48 features of each input.

Three workloads: ViT-B/32 geometry (random weights, batch 128, every rank a quarter of the smaller side), the
pretrained DINOv2-small at 98 px (batch 64, 0.40 of the weights kept) and SmolLM2-135M (8 mails of 128 tokens, 0.40
kept). Peaks are tracked, so they are deterministic: two complete steps from a fresh copy, everything counted. Times
are interleaved rounds; ratios are taken round by round. Neither depends on the quality of the factors, so they come
from plain decompositions. Results: docs/benchmarks/memory_modes.json. Run it on an idle machine::

    python benchmarks/memory_modes.py
    python benchmarks/memory_modes.py --workloads dinov2 --rounds 0     # peaks only
"""

import argparse
import copy
import functools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import wasi_peft
from common import (
    RESULTS_FOLDER,
    Batch,
    adamw,
    environment,
    inference,
    interleaved_seconds,
    median_ratio,
    read_json,
    step_peak_bytes,
    training_step,
    vit_b32,
    with_lora,
    write_json,
)
from images import load_images
from texts import load_mails, smollm2_folder, token_windows
from vit import load_vit
from wasi_peft.tuner.targets import default_target_names
from wasi_peft.updates import DEFAULT_UPDATE, make_update

RESULTS = RESULTS_FOLDER / "memory_modes.json"
LORA = "lora, checkpointing"
MODES = ("exact", "fast", "small")
VARIANTS = ("full", LORA, *(f"wasi {mode}" for mode in MODES), *(f"wasi low_rank {mode}" for mode in MODES))
MIB = 2**20


@dataclass(frozen=True)
class Workload:
    """A model, what it is called with, and how WASI is configured for it.

    Attributes:
        load: Makes the dense model.
        batch: Makes the batch, labels included.
        head: Module that is trained whole, if any.
        weight_rank: Rank of every layer as a share of the smaller of its sizes, or None for ``weight_share``.
        weight_share: Share of all weights to keep.
        activation_ranks: Features of an input that are kept with the update "low_rank".
    """

    load: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    head: str | None
    weight_rank: float | None
    weight_share: float | None
    activation_ranks: int


def random_images() -> Batch:
    """128 images of noise: costs do not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(128, 3, 224, 224, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 10, (128,), generator=generator)}


def fashion_images() -> Batch:
    """64 images at 98 px."""
    images, _ = load_images(train=64, test=1, image_size=98)
    return torch.utils.data.default_collate(images.__getitems__(range(64)))


def mails() -> Batch:
    """8 mails, each cut to 128 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    tokens = token_windows(tokenizer, load_mails(200), 8)
    return {"input_ids": tokens, "labels": tokens.clone()}


def smollm2() -> nn.Module:
    """SmolLM2-135M in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


WORKLOADS = {
    "vit_b32": Workload(vit_b32, random_images, "classifier", 0.25, None, 48),
    "dinov2": Workload(load_vit, fashion_images, "classifier", None, 0.4, 48),
    "smollm2": Workload(smollm2, mails, None, None, 0.4, 48),
}


def build(variant: str, workload: Workload) -> nn.Module:
    """Makes the model of a variant."""
    model = workload.load()
    saved = [workload.head] if workload.head else None
    if variant == "full":
        return model
    if variant == LORA:
        model = with_lora(model, saved)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    *low_rank, mode = variant.split()[1:]
    update = make_update("low_rank" if low_rank else DEFAULT_UPDATE)
    ranks = {}
    if workload.weight_rank is not None:
        for name in default_target_names(model, wasi_peft.WasiConfig(residual=None)):
            layer = model.get_submodule(name)
            smaller = min(layer.out_features, layer.in_features)
            ranks[name] = int(workload.weight_rank * smaller) - update.side_rank
    config = wasi_peft.WasiConfig(
        weight_share=workload.weight_share,
        rank_pattern=ranks,
        activation_threshold=None,
        activation_ranks=workload.activation_ranks if low_rank else None,
        update=update.name,
        modules_to_save=saved,
        memory_mode=mode,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain factors are what is meant here
        return peft.get_peft_model(model, config)


def measure(name: str, variants: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Peaks, and with rounds also times, of one workload."""
    workload = WORKLOADS[name]
    batch = workload.batch()
    models = {variant: build(variant, workload) for variant in variants}
    results: dict[str, dict[str, Any]] = {variant: {} for variant in variants}
    for variant, model in models.items():
        entry = results[variant]
        entry["peak_bytes"] = step_peak_bytes(model, adamw, batch)
        entry["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if variant.startswith("wasi"):
            entry["kept_share"] = model.wasi_summary().kept_share
        print(f"{name} {variant}: {entry['peak_bytes'] / MIB:.0f} MiB", flush=True)
    if rounds:
        steps = {
            variant: functools.partial(training_step, model, adamw(model), batch) for variant, model in models.items()
        }
        deployed = {variant: models[variant] for variant in ("full", "wasi exact") if variant in models}
        if LORA in models:
            deployed[LORA] = copy.deepcopy(models[LORA]).merge_and_unload()
        forward = {variant: functools.partial(inference, model, batch) for variant, model in deployed.items()}
        for kind, tasks in (("step", steps), ("inference", forward)):
            seconds = interleaved_seconds(tasks, rounds, warmup=1, description=f"{name}: {kind}")
            for variant, values in seconds.items():
                results[variant][f"{kind}_seconds"] = values
                for baseline in ("full", LORA):
                    if baseline in seconds:
                        ratio = median_ratio(seconds, variant, baseline)
                        results[variant][f"{kind}_speedup_against_{baseline.split(',')[0]}"] = ratio
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats one workload as a Markdown table."""
    lines = [
        "| variant | peak MiB | of full | of LoRA | step s | faster than full | than LoRA | inference s | faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full, lora = (results.get(name, {}).get("peak_bytes") for name in ("full", LORA))
    for variant, entry in results.items():
        peak = entry["peak_bytes"]
        cells = [variant, f"{peak / MIB:.0f}", *(f"1/{base / peak:.2f}" if base else "" for base in (full, lora))]
        for kind, baselines in (("step", ("full", "lora")), ("inference", ("full",))):
            seconds = entry.get(f"{kind}_seconds")
            cells.append(f"{statistics.median(seconds):.3f}" if seconds else "")
            for baseline in baselines:
                ratio = entry.get(f"{kind}_speedup_against_{baseline}")
                cells.append(f"{ratio:.2f}x" if ratio else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_workloads(
    args: argparse.Namespace,
    measure_one: Callable[[str], dict[str, dict[str, Any]]],
    format_one: Callable[[dict[str, dict[str, Any]]], str],
) -> dict[str, Any]:
    """Measures the workloads asked for and prints a table of each; those measured before stay in the JSON.

    Args:
        args: ``workloads``, ``rounds`` and ``results``, the JSON file, which is written after every workload.
        measure_one: Results by variant, of the workload of that name.
        format_one: Makes the table.

    Returns:
        The content of the JSON file.
    """
    transformers.logging.set_verbosity_error()
    content = read_json(args.results)
    for name in args.workloads:
        results = measure_one(name)
        print(f"\n{name}\n\n{format_one(results)}\n", flush=True)
        content[name] = {"rounds": args.rounds, "results": results, "environment": environment()}
        write_json(args.results, content)
    return content


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables and writes the JSON; workloads measured before stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; 0: peaks only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    return measure_workloads(args, lambda name: measure(name, args.variants, args.rounds), table)


if __name__ == "__main__":
    main()
