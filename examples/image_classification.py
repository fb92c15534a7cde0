"""Fine-tunes an image classifier with 60 % of its weights, by the Trainer.

By default a small ViT with random weights learns which colour of an image is bright: seconds, without a download. For
your own images, in folders ``<class>/*.png``, with a pretrained model::

    python examples/image_classification.py --dataset IMAGES --model google/vit-base-patch16-224-in21k --epochs 3
"""

import argparse
import random
from pathlib import Path

import torch
import transformers
from peft import get_peft_model

import wasi_peft


def tinted_noise(count=480, size=32):
    """Noise in which one of the colours, whose number is the label, is a little brighter."""
    labels = torch.randint(3, (count,))
    images = torch.randn(count, 3, size, size)
    images[range(count), labels] += 0.3
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)], 3


def images_in(folder, processor):
    """The images of `<class>/*.png`, as the model's processor prepares them."""
    from PIL import Image

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).glob("*.png"))]
    pixels = [processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0] for path, _ in files]
    return [{"pixel_values": x, "labels": label} for x, (_, label) in zip(pixels, files, strict=True)], len(classes)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", type=Path, help="folder of <class>/*.png (default: made-up images)")
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="for --dataset: hub id or folder")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--output", type=Path, default=Path("outputs/image_classification"))
args = parser.parse_args()

torch.manual_seed(0)
if args.dataset:
    items, classes = images_in(args.dataset, transformers.AutoImageProcessor.from_pretrained(args.model))
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = load(args.model, num_labels=classes, ignore_mismatched_sizes=True)
else:
    items, classes = tinted_noise()
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**shape, intermediate_size=128, num_labels=classes)
    model = transformers.ViTForImageClassification(config)
random.Random(0).shuffle(items)
test_set, train_set = items[::4], [item for index, item in enumerate(items) if index % 4]

# which factors: ranks where they matter most, on unlabelled images, and a short repair against the dense model
pixels = torch.stack([item["pixel_values"] for item in train_set[:512]])
config = wasi_peft.WasiConfig(weight_share=0.6, modules_to_save=["classifier"])
wasi_peft.preprocess_wasi(model, config, pixels.split(32), repair_steps=50)
model = get_peft_model(model, config)  # from here on the dense weights are gone
print(model.wasi_summary())

training = transformers.TrainingArguments(
    output_dir=str(args.output), num_train_epochs=args.epochs, per_device_train_batch_size=32, learning_rate=args.lr,
    remove_unused_columns=False, report_to="none", save_strategy="no", label_names=["labels"],
)  # fmt: skip
trainer = transformers.Trainer(
    model, training, train_dataset=train_set, eval_dataset=test_set,
    compute_metrics=lambda answers: {"accuracy": (answers.predictions.argmax(-1) == answers.label_ids).mean()},
)  # fmt: skip
print(f"accuracy before training: {trainer.evaluate()['eval_accuracy']:.2f}")
trainer.train()
print(f"accuracy after training: {trainer.evaluate()['eval_accuracy']:.2f}")
model.save_pretrained(args.output)
