"""Models and batches that steps are measured with, and what can be made of the models.

ViT-B/32 geometry (random weights, batch 128, every rank a quarter of the smaller side), the pretrained DINOv2-small at
98 px (batch 64) and at 56 px (batch 32), and SmolLM2-135M (8 mails of 128 tokens), factors with 0.40 of the weights.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import nn

import wasi_peft
from common import Batch, environment, read_json, vit_b32, with_lora, write_json
from images import load_images
from texts import load_mails, smollm2_folder, token_windows
from vit import load_vit
from wasi_peft.tuner.config import MEMORY_MODES
from wasi_peft.tuner.targets import default_target_names
from wasi_peft.updates import DEFAULT_UPDATE, make_update
from wasi_peft.updates.base import Update

CHECKPOINTED = "lora, checkpointing"
RESIDUAL_KINDS = {"int8": "int8", "int4": "int4", "dense": "exact"}
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


def fashion_images(count: int, image_size: int) -> Batch:
    """The first images, resized."""
    images, _ = load_images(train=count, test=1, image_size=image_size)
    return torch.utils.data.default_collate(images.__getitems__(range(count)))


def mails() -> Batch:
    """8 mails, each cut to 128 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    tokens = token_windows(tokenizer, load_mails(200), 8)
    return {"input_ids": tokens, "labels": tokens.clone()}


def smollm2() -> nn.Module:
    """SmolLM2-135M in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


WORKLOADS = {
    "dinov2": Workload(load_vit, functools.partial(fashion_images, 64, 98), "classifier", None, 0.4, 48),
    "smollm2": Workload(smollm2, mails, None, None, 0.4, 48),
    "vit_b32": Workload(vit_b32, random_images, "classifier", 0.25, None, 48),
    "dinov2_56px": Workload(load_vit, functools.partial(fashion_images, 32, 56), "classifier", None, 0.4, 48),
}


def build(variant: str, workload: Workload) -> nn.Module:
    """Makes the model of a variant.

    Args:
        variant: "full", "lora", "lora, checkpointing"; "compressed", weights in 8 bits without an adapter; "residual
            [int4|dense|K|vocabulary] MODE", a frozen weight in 8 bits, in 4 or as it is, beside factors, of rank K,
            or with the vocabulary in 8 bits too; "wasi [UPDATE] MODE", two factors in its place. Every update that
            can compress inputs does so.
        workload: What it is made for.

    Raises:
        ValueError: If there is no such variant.
    """
    form, *options, mode = variant.split() if " " in variant else (variant, "")
    dense = variant in ("full", "lora", CHECKPOINTED)
    if variant == "compressed":
        return wasi_peft.compress(workload.load())
    if not dense and (form not in ("residual", "wasi") or mode not in MEMORY_MODES or len(options) > 1):
        choices = f"full, lora, {CHECKPOINTED!r}, compressed, residual ... MODE or wasi ... MODE"
        raise ValueError(f"a variant must be {choices}, got {variant!r}")
    model, saved = workload.load(), [workload.head] if workload.head else None
    if variant == "full":
        return model
    if dense:
        return with_lora(model, saved, checkpointing=variant == CHECKPOINTED)
    if form == "residual":
        rank = int(options.pop()) if options and options[0].isdecimal() else None
        vocabulary = "int8" if options == ["vocabulary"] else None
        kind = RESIDUAL_KINDS[options[0] if options and vocabulary is None else "int8"]
        config = wasi_peft.WasiConfig(
            residual=kind, weight_rank=rank, memory_mode=mode, modules_to_save=saved, vocabulary=vocabulary
        )
        return peft.get_peft_model(model, config)
    return _with_factors(model, workload, make_update(options[0] if options else DEFAULT_UPDATE), mode, saved)


def _with_factors(
    model: nn.Module, workload: Workload, update: Update, mode: str, saved: list[str] | None
) -> nn.Module:
    """Puts factors in the place of the weights, from plain decompositions: their quality costs nothing here."""
    ranks = {}
    if workload.weight_rank is not None:
        for name in default_target_names(model, wasi_peft.WasiConfig(residual=None)):
            layer = model.get_submodule(name)
            smaller = min(layer.out_features, layer.in_features)
            ranks[name] = int(workload.weight_rank * smaller) - update.side_rank
    config = wasi_peft.WasiConfig(
        residual=None,
        weight_share=workload.weight_share,
        rank_pattern=ranks,
        activation_threshold=None,
        activation_ranks=workload.activation_ranks if update.reads_input else None,
        update=update.name,
        modules_to_save=saved,
        memory_mode=mode,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


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
