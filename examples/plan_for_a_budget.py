"""Fits the fine-tuning of a model into so many MiB: estimate, plan, train, and compare with what it really took.

By default a small ViT with random weights and half of what full fine-tuning would take; for another image classifier,
by hub id or folder, and a budget::

    python examples/plan_for_a_budget.py --model google/vit-base-patch16-224-in21k --budget-mib 1500
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import wasi_peft

MIB = 2**20
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder (default: a small ViT with random weights)")
parser.add_argument("--budget-mib", type=float, help="peak of a training step (default: half of full fine-tuning)")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForImageClassification.from_pretrained(args.model, dtype=torch.float32)
else:
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=64, patch_size=8, num_labels=10))


def images(count):
    """Noise in the place of your data."""
    size = model.config.image_size
    return {
        "pixel_values": torch.randn(count, 3, size, size),
        "labels": torch.randint(model.config.num_labels, (count,)),
    }


# 1. what full fine-tuning would take, found without a step
batch = images(args.batch_size)
dense = wasi_peft.estimate_wasi(model, batch=batch, optimizer="adamw")
budget = int(args.budget_mib * MIB) if args.budget_mib else dense.peak_bytes // 2
print(f"full fine-tuning: {dense.peak_bytes / MIB:.1f} MiB, budget: {budget / MIB:.1f} MiB")

# 2. ranks, and how much is kept for backward, so that a step fits
config = wasi_peft.WasiConfig(modules_to_save=["classifier"])
unlabelled = [{"pixel_values": images(args.batch_size)["pixel_values"]} for _ in range(4)]
calibration = wasi_peft.calibrate_wasi(model, unlabelled, config)
plan = wasi_peft.plan_wasi(
    model, calibration, peak_bytes=budget, batch=batch, config=config, memory_modes=("exact", "fast", "small")
)
print(plan.headline())

# 3. the model of the plan
config = wasi_peft.WasiConfig(plan=plan, modules_to_save=["classifier"])
estimate = wasi_peft.estimate_wasi(model, config, batch=batch, optimizer="adamw").peak_bytes
wasi_peft.preprocess_wasi(model, config, unlabelled, calibration=calibration, repair_steps=10)
model = get_peft_model(model, config)


# 4. training, watched: every tensor counts, those that exist already too
def train():
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=5e-4, fused=True)
    for _ in range(args.steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
peak = held + wasi_peft.measure_peak_memory(train).peak_bytes
print(f"a step was estimated at {estimate / MIB:.1f} MiB and took {peak / MIB:.1f} MiB")
