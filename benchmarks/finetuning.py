"""Full fine-tuning, LoRA and WASI of one classifier by the unmodified Hugging Face ``Trainer``.

WASI comes in its two forms: "residual", the frozen weight in few bits with factors beside it, which is the default of
``WasiConfig`` and needs no preparation, and "wasi", the two factors that take the weight's place.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import wasi_peft
from images import ImageSet
from wasi_peft.factors.model_repair import REPAIR_STEPS

METHODS = ("full", "lora", "residual", "wasi")
# tuned on 6,000 images, see docs/benchmarks
LEARNING_RATES = {"full": 2e-5, "lora": 5e-4, "residual": 2e-4, "wasi": 5e-4}
HEAD = "classifier"
CALIBRATION_BATCH = 32


def build(
    method: str,
    model: nn.Module,
    train_set: ImageSet,
    wasi_options: Mapping[str, Any] | None = None,
    target_share: float | None = None,
    calibration_images: int = 512,
    repair_steps: int = REPAIR_STEPS,
    prepare: int = 0,
) -> nn.Module:
    """Makes ``model`` trainable by one of the methods.

    Args:
        method: "full", "lora" (r=16, alpha=32 on every attention and MLP layer, plus the head), "residual" or "wasi".
        model: A dense classifier. It is changed in place.
        train_set: WASI calibrates on ``calibration_images`` of them and repairs on all, never looking at a label.
        wasi_options: Fields of ``WasiConfig`` that differ from the defaults.
        target_share: If given, "wasi" keeps this share of the weights, spread over the layers as it is best.
        calibration_images: Images for the calibration of "wasi".
        repair_steps: Steps of its label-free repair.
        prepare: Calibration batches of "residual"; 0 for none, its default.

    Returns:
        The model to train.

    Raises:
        ValueError: If there is no such method.
    """
    if method == "full":
        return model
    if method == "lora":
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=[HEAD])
        return peft.get_peft_model(model, config)
    options = {"modules_to_save": [HEAD], **(wasi_options or {})}
    if method == "residual":
        return with_residual(model, wasi_peft.WasiConfig(**options), calibration_loader(train_set), prepare)
    if method == "wasi":
        wasi_config = wasi_peft.WasiConfig(**{"residual": None, "weight_share": target_share, **options})
        batches = math.ceil(calibration_images / CALIBRATION_BATCH)
        wasi_peft.preprocess_wasi(
            model, wasi_config, calibration_loader(train_set), max_batches=batches, repair_steps=repair_steps
        )
        return peft.get_peft_model(model, wasi_config)
    raise ValueError(f"method must be one of {METHODS}, got {method!r}")


def with_residual(model: nn.Module, config: Any, batches: Iterable[Any], prepare: int = 0) -> nn.Module:
    """Returns the model with a residual adapter, which `prepare` batches may choose the directions of."""
    if prepare:
        wasi_peft.preprocess_wasi(model, config, batches, max_batches=prepare, repair_steps=0)
    return peft.get_peft_model(model, config)


def calibration_loader(train_set: ImageSet) -> DataLoader:
    """Returns batches of all images without their labels, in an order that is mixed but always the same."""
    order = torch.Generator().manual_seed(0)
    return DataLoader(train_set, batch_size=CALIBRATION_BATCH, shuffle=True, generator=order, collate_fn=unlabelled)


def unlabelled(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collates items without their labels."""
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}


def build_optimizer(method: str, model: nn.Module, lr: float, head_lr: float | None = None) -> torch.optim.Optimizer:
    """Makes AdamW without weight decay over the trainable parameters, with a learning rate of its own for the head.

    Args:
        method: One of ``METHODS``.
        model: What ``build`` returned.
        lr: Learning rate.
        head_lr: Learning rate of the head; None for ``lr``.

    Returns:
        The optimizer.
    """
    if method in ("residual", "wasi"):
        return wasi_peft.create_wasi_optimizer(
            model, torch.optim.AdamW, lr=lr, head_lr=head_lr, weight_decay=0.0, fused=True
        )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if HEAD not in name.split(".")], "lr": lr},
        {"params": [parameter for name, parameter in named if HEAD in name.split(".")], "lr": head_lr or lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: ImageSet,
    output: Path,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    schedule: str = "cosine",
    seed: int = 0,
    bf16: bool = False,
    max_grad_norm: float = 1.0,
) -> list[dict[str, float]]:
    """Trains with the Hugging Face ``Trainer``: warm-up over a tenth of the steps, then decay to zero.

    Args:
        model: What ``build`` returned.
        optimizer: What ``build_optimizer`` returned.
        train_set: Training images.
        output: Folder for the trainer's files.
        steps: Optimizer steps; None for ``epochs``.
        epochs: Passes over the images, if ``steps`` is None; None for one.
        batch_size: Images a step.
        schedule: "cosine" or "linear".
        seed: Seed of the data order.
        bf16: Train under autocast to bfloat16.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.

    Returns:
        The trainer's log.
    """
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=steps or -1,
        num_train_epochs=epochs or 1.0,
        per_device_train_batch_size=batch_size,
        warmup_steps=0.1,
        lr_scheduler_type=schedule,
        seed=seed,
        data_seed=seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=bf16,
        max_grad_norm=max_grad_norm,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=train_set, optimizers=(optimizer, None))
    trainer.train()
    optimizer.zero_grad(set_to_none=True)
    return trainer.state.log_history


@torch.inference_mode()
def predict(
    model: nn.Module, images: ImageSet, batch_size: int = 100, description: str = "Predicting", bf16: bool = False
) -> torch.Tensor:
    """Returns the logits for every image, (N, classes), float32; computed under autocast if asked."""
    model.eval()
    loader = DataLoader(images, batch_size=batch_size, collate_fn=unlabelled)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return torch.cat([model(**batch).logits.float() for batch in tqdm(loader, desc=description)])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of images whose highest logit is that of their label."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
