"""Fine-tunes a text classifier on csv, json or parquet files or a dataset of the hub, by the Trainer.

The two lines that make it WASI are marked::

    python examples/text_classification.py --dataset FOLDER
    python examples/text_classification.py --model FacebookAI/roberta-base --dataset stanfordnlp/imdb
    accelerate launch --num_processes 2 examples/text_classification.py --dataset FOLDER
"""

import argparse

import datasets
import evaluate
import transformers
from peft import get_peft_model

import wasi_peft  # 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv, json or parquet files")
parser.add_argument("--text-column", default="text")
parser.add_argument("--label-column", default="label")
parser.add_argument("--metric", default="accuracy", help="hub id, or a script (examples/metrics/accuracy.py)")
parser.add_argument("--tokens", type=int, default=128, help="at most, of a text")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--output", default="outputs/text_classification")
args = parser.parse_args()

texts = datasets.load_dataset(args.dataset, split="train")
for column in (args.text_column, args.label_column):
    if column not in texts.column_names:
        parser.error(f"the dataset must have a column {column!r}, got {', '.join(texts.column_names)}")
    if None in (cells := texts[column][:]):
        parser.error(f"the column {column!r} must have a value in every row, row {cells.index(None)} has none")
if not isinstance(texts.features[args.label_column], datasets.ClassLabel):
    texts = texts.class_encode_column(args.label_column)
names = texts.features[args.label_column].names
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)


def prepare(batch):
    tokens = tokenizer(batch[args.text_column], truncation=True, max_length=args.tokens)
    return {**tokens, "labels": batch[args.label_column]}


split = texts.train_test_split(0.2, seed=0, stratify_by_column=args.label_column)
split = split.map(prepare, batched=True, remove_columns=texts.column_names)
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    args.model, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
)
limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.tokens))
if args.tokens > limit:
    parser.error(f"--tokens must be at most {limit} for this model, got {args.tokens}")
model = get_peft_model(model, wasi_peft.WasiConfig(task_type="SEQ_CLS"))  # 2: the new head trains with it
model.print_trainable_parameters()

metric, numbers = evaluate.load(args.metric), list(range(len(names)))
try:  # before anything is trained
    score = next(iter(metric.compute(predictions=numbers, references=numbers)))
except Exception as error:
    parser.error(f"--metric must take class numbers, as accuracy does; {args.metric} answers: {error}")
training = transformers.TrainingArguments(
    output_dir=args.output, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr, bf16=args.bf16, eval_strategy="epoch", label_names=["labels"], save_strategy="no",
    report_to="none", seed=0,
)  # fmt: skip
trainer = transformers.Trainer(
    model, training, train_dataset=split["train"], eval_dataset=split["test"], processing_class=tokenizer,
    compute_metrics=lambda x: metric.compute(predictions=x.predictions.argmax(-1), references=x.label_ids),
)  # fmt: skip
try:
    trainer.train()
finally:  # whatever ends the training
    trainer.save_model()
print(f"{score} after training: {trainer.evaluate()['eval_' + score]:.3f}")
