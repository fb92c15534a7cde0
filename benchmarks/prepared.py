"""Initial factors of WASI in five variants, kept in a file for the runs that start from the same ones.

Calibration and repair take minutes and see no label, no seed of a run, no learning rate, no memory mode and nothing of
the head. Their result is therefore stored once, under a name that is a digest of all that it does depend on, and every
run, the first too, starts from what the file holds.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

import wasi_peft
from common import cache_dir, environment
from finetuning import CALIBRATION_BATCH, HEAD, calibration_loader
from images import ImageSet
from initial_factors import METHODS as VARIANTS
from initial_factors import REPAIRS, uniform_ranks
from wasi_peft import WasiFactors

# fields of WasiConfig that the preparation does not see, and the update, which `prepared_once` takes from there
UNSEEN = (
    "activation_interval", "activation_modes", "activation_ranks", "activation_threshold", "memory_mode",
    "update", "update_rank",
)  # fmt: skip


def build_config(variant: str, model: nn.Module, share: float | None, options: Mapping[str, Any]) -> Any:
    """Returns the configuration: a share of the weights is the same in every layer with the first two variants.

    Raises:
        ValueError: If the variant is none of ``VARIANTS``.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if share is None or variant not in ("plain", "one-sided"):
        return wasi_peft.WasiConfig(**{"residual": None, **options}, modules_to_save=[HEAD], weight_share=share)
    asked = wasi_peft.WasiConfig(**{"residual": None, **options})
    ranks = uniform_ranks(model, share, asked.layer_update)
    return wasi_peft.WasiConfig(**{"residual": None, **options}, modules_to_save=[HEAD], rank_pattern=ranks)


def attach_factors(
    variant: str,
    model: nn.Module,
    config: Any,
    options: Mapping[str, Any],
    train_set: ImageSet,
    calibration_images: int,
    repair_steps: int,
) -> str | None:
    """Attaches initial factors to a dense model, from a file if they were made before.

    Args:
        variant: One of ``VARIANTS``. "plain" attaches nothing: the injection then decomposes the weights.
        model: The dense model.
        config: What ``build_config`` returned.
        options: Fields of ``WasiConfig`` given by the user.
        train_set: Images to calibrate and repair on, without their labels.
        calibration_images: How many of them to calibrate on.
        repair_steps: Steps of the repair with "repaired" (of the whole model) and "blockwise" (of each block).

    Returns:
        Digest of the factors; None if there are none.
    """
    if variant == "plain":
        return None
    repair = REPAIRS.get(variant)
    steps = repair_steps if repair else 0
    gradients = None if variant == "one-sided" else "features"
    key = {
        "model": digest({name: value for name, value in model.state_dict().items() if HEAD not in name.split(".")}),
        "images": images_digest(train_set),
        "calibration_images": calibration_images,
        "repair": repair,
        "repair_steps": steps,
        "gradients": gradients,
        "options": {name: value for name, value in options.items() if name not in UNSEEN},
    }

    def prepare() -> WasiFactors:
        loader, batches = calibration_loader(train_set), math.ceil(calibration_images / CALIBRATION_BATCH)
        calibration = wasi_peft.calibrate_wasi(model, loader, config, gradients=gradients, max_batches=batches)
        options = {"repair": repair, "repair_steps": steps}
        return wasi_peft.preprocess_wasi(model, config, loader, calibration=calibration, **options)

    return prepared_once(model, config, key, prepare)


def prepared_once(model: nn.Module, config: Any, key: Mapping[str, Any], prepare: Callable[[], WasiFactors]) -> str:
    """Attaches initial factors to a dense model, from a file if they were made before.

    Args:
        model: The dense model.
        config: The configuration that they are for.
        key: What they depend on, besides the configuration's ranks, the code, its libraries and the threads.
        prepare: Makes them by ``preprocess_wasi``.

    Returns:
        Digest of the factors.
    """
    key = {
        **key,
        "weight_share": config.weight_share,
        "rank_pattern": config.rank_pattern,
        "update": config.update,
        "update_rank": config.layer_update.side_rank,
        "frozen_dtype": config.frozen_dtype,
        "versions": environment()["versions"],
        "code": code_digest(),
        "threads": torch.get_num_threads(),  # they decide in which order sums are taken
    }
    text = json.dumps(key, sort_keys=True)
    path = cache_dir() / f"factors-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # a run started at the same time waits rather than do the same
        if not path.is_file():
            prepare().save(path)
    WasiFactors.load(path).attach(model)
    return digest(load_file(path))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the start of the SHA-256 of named tensors, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().numpy())
    return total.hexdigest()[:16]


def images_digest(train_set: ImageSet) -> str:
    """Returns the start of the SHA-256 of all that the model is shown, in that order."""
    total = hashlib.sha256()
    for batch in calibration_loader(train_set):
        total.update(batch["pixel_values"].numpy())
    return total.hexdigest()[:16]


def code_digest() -> str:
    """Returns the start of the SHA-256 of the package's source, committed or not."""
    total = hashlib.sha256()
    package = Path(wasi_peft.__file__).parent
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py")):
        total.update(name.encode() + (package / name).read_bytes())
    return total.hexdigest()[:16]
