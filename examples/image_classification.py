"""Fine-tunes an image classifier on a folder of images or a dataset of the hub, by the Trainer.

The two lines that make it WASI are marked. Images in folders ``<class>/*.png``, or any dataset with an image column::

    python examples/image_classification.py --dataset IMAGES
    python examples/image_classification.py --model facebook/dinov2-small --dataset ethz/food101 --image-column image
    accelerate launch --num_processes 2 examples/image_classification.py --dataset IMAGES
"""

import argparse

import datasets
import evaluate
import transformers
from peft import get_peft_model

import wasi_peft  # 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of images, csv, json or parquet files")
parser.add_argument("--image-column", default="image")
parser.add_argument("--label-column", default="label")
parser.add_argument("--metric", default="accuracy", help="hub id, or a script (examples/metrics/accuracy.py)")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--output", default="outputs/image_classification")
args = parser.parse_args()

images = datasets.load_dataset(args.dataset, split="train")
for column in (args.image_column, args.label_column):
    if column not in images.column_names:
        parser.error(f"the dataset must have a column {column!r}, got {', '.join(images.column_names)}")
if None in (labels := images[args.label_column][:]):
    parser.error(f"the column {args.label_column!r} must have a value in every row, row {labels.index(None)} has none")
if not isinstance(images.features[args.label_column], datasets.ClassLabel):
    images = images.class_encode_column(args.label_column)
processor = transformers.AutoImageProcessor.from_pretrained(args.model)


def prepare(batch):
    pixels = processor([image.convert("RGB") for image in batch[args.image_column]], return_tensors="pt")
    return {"pixel_values": pixels["pixel_values"], "labels": batch[args.label_column]}


names = images.features[args.label_column].names
split = images.train_test_split(0.2, seed=0, stratify_by_column=args.label_column).with_transform(prepare)
model = transformers.AutoModelForImageClassification.from_pretrained(
    args.model, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    ignore_mismatched_sizes=True,
)  # fmt: skip
model = get_peft_model(model, wasi_peft.WasiConfig(modules_to_save=["classifier"]))  # 2
model.print_trainable_parameters()

metric, numbers = evaluate.load(args.metric), list(range(len(names)))
try:  # before anything is trained
    score = next(iter(metric.compute(predictions=numbers, references=numbers)))
except Exception as error:
    parser.error(f"--metric must take class numbers, as accuracy does; {args.metric} answers: {error}")
training = transformers.TrainingArguments(
    output_dir=args.output, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr, bf16=args.bf16, eval_strategy="epoch", remove_unused_columns=False, label_names=["labels"],
    save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
trainer = transformers.Trainer(
    model, training, train_dataset=split["train"], eval_dataset=split["test"], processing_class=processor,
    compute_metrics=lambda x: metric.compute(predictions=x.predictions.argmax(-1), references=x.label_ids),
)  # fmt: skip
try:
    trainer.train()
finally:  # whatever ends the training
    trainer.save_model()  # the adapter, the processor and a card; trainer.push_to_hub() shares them
print(f"{score} after training: {trainer.evaluate()['eval_' + score]:.3f}")
