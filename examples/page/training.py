"""What the page does with its images: fine-tune a model within a budget, and compare. Knows nothing of gradio."""

import copy
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from classifier import BATCH, answers, load
from uploads import RefusedError, split

import wasi_peft

MIB = 2**20
MODES = ("exact", "fast", "small")  # what WASI keeps for the backward pass, the fastest first
HEAD = {"modules_to_save": ["classifier"]}
RATES = {"LoRA r=16": 5e-4, "WASI": 2e-4}


class Progress(transformers.TrainerCallback):
    def __init__(self, report, name):
        self.report, self.name = report, name

    def on_step_end(self, args, state, control, **_):
        self.report((state.global_step, state.max_steps), desc=f"{self.name}, step")


def wasi_within(model, batch, budget_mib):
    """WASI in the fastest mode whose training step fits."""
    for mode in MODES:
        config = wasi_peft.WasiConfig(memory_mode=mode, **HEAD)
        peak = wasi_peft.estimate_wasi(model, config, batch=batch, optimizer="adamw").peak_bytes / MIB
        if peak <= budget_mib:
            return config
    raise RefusedError(f"{budget_mib} MiB are too few: the smallest step of this model takes {peak:.0f} MiB.")


def trained(base, config, name, data, steps, folder, report):
    transformers.set_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    settings = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATES[name], label_names=["labels"],
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=data, callbacks=[Progress(report, name)]).train()
    model.save_pretrained(folder)
    return model


def fine_tune(images, model_id, budget_mib, steps, with_lora, report):
    """Rows of a table, answers to the test images at the start and at the end, and a zip of the adapter."""
    names, train, test = split(images)
    base, pixels = load(model_id, names, [image for image, _ in images])
    labels = torch.tensor([names.index(label) for _, label in images])
    batch = {"pixel_values": pixels[:1].repeat(BATCH, 1, 1, 1), "labels": labels[:1].repeat(BATCH)}
    configs = {"WASI": wasi_within(base, batch, budget_mib)}
    if with_lora:
        configs["LoRA r=16"] = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **HEAD)
    found, size = answers(base, pixels[test]), base.get_memory_footprint() / MIB
    data = [{"pixel_values": pixels[index], "labels": labels[index]} for index in train]
    rows, told = [], {}
    for name, config in {"start": None, **configs}.items():
        peak = wasi_peft.estimate_wasi(base, config, batch=batch, optimizer="adamw").peak_bytes / MIB
        if config:
            folder = Path(tempfile.mkdtemp()) / name
            found = answers(trained(base, config, name, data, steps, folder, report), pixels[test])
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MIB
        told[name] = [names[answer] for answer in found]
        right = f"{(found == labels[test]).sum()} of {len(test)}"
        rows.append([name, right, f"{peak:.0f} MiB", f"{size:.1f} MiB"])
        if name == "WASI":
            archive = shutil.make_archive(str(folder.parent / "wasi-adapter"), "zip", folder)
    return rows, [(images[index], told["start"][i], told["WASI"][i]) for i, index in enumerate(test)], archive
