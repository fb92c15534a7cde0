"""Fine-tunes a SegFormer to answer a class for each pixel, by the Trainer.

The dataset has an image column and one with maps of class numbers, as images; 255 is counted nowhere::

    python examples/semantic_segmentation.py --dataset FOLDER --classes 3
    python examples/semantic_segmentation.py --dataset segments/sidewalk-semantic --map-column label --classes 35
"""

import argparse

import datasets
import evaluate
import torch
import transformers
from peft import get_peft_model

import wasi_peft  # 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="nvidia/mit-b0", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of parquet files or of images and metadata")
parser.add_argument("--image-column", default="image")
parser.add_argument("--map-column", default="annotation")
parser.add_argument("--classes", type=int, required=True)
parser.add_argument("--metric", default="mean_iou", help="hub id, or a script (examples/metrics/mean_iou.py)")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--output", default="outputs/semantic_segmentation")
args = parser.parse_args()

processor = transformers.AutoImageProcessor.from_pretrained(args.model, do_reduce_labels=False)


def prepare(batch):
    images = [image.convert("RGB") for image in batch[args.image_column]]
    prepared = processor(images, segmentation_maps=batch[args.map_column], return_tensors="pt")
    numbers = set(prepared["labels"].unique().tolist()) - {255}
    if max(numbers, default=0) >= args.classes:
        raise SystemExit(f"the maps must hold numbers below --classes {args.classes}, or 255, got {max(numbers)}")
    return dict(prepared)


def classes_of(logits, labels):
    """Called for each batch of the evaluation, so that its logits need not be kept."""
    return torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear").argmax(1)


images = datasets.load_dataset(args.dataset, split="train")
for column in (args.image_column, args.map_column):
    if column not in images.column_names:
        parser.error(f"the dataset must have a column {column!r}, got {', '.join(images.column_names)}")
split = images.train_test_split(0.2, seed=0).with_transform(prepare)
model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
    args.model, num_labels=args.classes, ignore_mismatched_sizes=True
)
model = get_peft_model(model, wasi_peft.WasiConfig(modules_to_save=["decode_head"]))  # 2
model.print_trainable_parameters()

metric, settings = evaluate.load(args.metric), {"num_labels": args.classes, "ignore_index": 255}
try:  # before anything is trained
    metric.compute(predictions=[[[0]]], references=[[[0]]], **settings)["mean_iou"]
except Exception as error:
    parser.error(f"--metric must answer as mean_iou does; {args.metric} answers: {error}")
training = transformers.TrainingArguments(
    output_dir=args.output, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr, eval_strategy="epoch", remove_unused_columns=False, label_names=["labels"],
    save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
trainer = transformers.Trainer(
    model, training, train_dataset=split["train"], eval_dataset=split["test"], processing_class=processor,
    preprocess_logits_for_metrics=classes_of,
    compute_metrics=lambda x: metric.compute(predictions=x.predictions, references=x.label_ids, **settings),
)  # fmt: skip
try:
    trainer.train()
finally:  # whatever ends the training
    trainer.save_model()
print(f"mean IoU after training: {trainer.evaluate()['eval_mean_iou']:.3f}")
