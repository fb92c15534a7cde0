"""Fine-tunes a compressed model where its dense weights would not fit: on a Raspberry Pi, say.

On a workstation, or here, block by block in bounded memory, once::

    wasi-peft prepare HuggingFaceTB/SmolLM2-135M-Instruct --residual int8 --output compressed

From then on the folder (or its copy on the hub) is the base; no dense weight is ever read. `wasi-peft run` in place of
`python` has freed memory used again::

    wasi-peft run examples/fine_tune_compressed.py --model compressed --dataset FOLDER --memory small
"""

import argparse

import datasets
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import wasi_peft  # before the model is loaded: transformers learns the format from it

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="hub id or folder of a compressed language model")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv, json or parquet files with a text")
parser.add_argument("--text-column", default="text")
parser.add_argument("--tokens", type=int, default=128, help="at most, of a text")
parser.add_argument("--memory", default="small", choices=["exact", "fast", "small"])
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--output", default="outputs/fine_tune_compressed")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = datasets.load_dataset(args.dataset, split="train")
if args.text_column not in texts.column_names:
    parser.error(f"the dataset must have a column {args.text_column!r}, got {', '.join(texts.column_names)}")
if None in (cells := texts[args.text_column][:]):
    parser.error(f"the column {args.text_column!r} must have a value in every row, row {cells.index(None)} has none")
tokens = texts.map(
    lambda batch: tokenizer(batch[args.text_column], truncation=True, max_length=args.tokens),
    batched=True, remove_columns=texts.column_names,
)  # fmt: skip

model = AutoModelForCausalLM.from_pretrained(args.model)
limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.tokens))
if args.tokens > limit:
    parser.error(f"--tokens must be at most {limit} for this model, got {args.tokens}")
print(f"the base takes {model.get_memory_footprint() / 2**20:.1f} MiB")
model = get_peft_model(model, wasi_peft.WasiConfig(task_type="CAUSAL_LM", memory_mode=args.memory))
training = TrainingArguments(
    output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
    logging_steps=10, save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, training, train_dataset=tokens, data_collator=collator, processing_class=tokenizer)
try:
    print(f"loss: {trainer.train().training_loss:.3f}")
finally:  # whatever ends the training
    trainer.save_model()  # what trained, and the name of its compressed base
