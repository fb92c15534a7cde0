"""Teaches a language model which of two answers is preferred, by TRL's DPOTrainer.

The reference is the model without its adapter, or, where training goes on from an adapter of examples/causal_lm.py,
a frozen copy of that one. The dataset has columns "chosen" and "rejected", and "prompt" unless both are chats::

    python examples/dpo.py --dataset FOLDER
    python examples/dpo.py --adapter outputs/causal_lm --dataset trl-lib/ultrafeedback_binarized
"""

import argparse

import datasets
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import wasi_peft  # 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--adapter", help="hub id or folder of a WASI adapter to go on from (default: a new one)")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv, json or parquet files")
parser.add_argument("--tokens", type=int, default=128, help="at most, of a prompt and its answer")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--output", default="outputs/dpo")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.tokens))
if args.tokens > limit:
    parser.error(f"--tokens must be at most {limit} for this model, got {args.tokens}")
pairs = datasets.load_dataset(args.dataset, split="train")
if not {"chosen", "rejected"} <= set(pairs.column_names):
    parser.error(f"the dataset must have columns 'chosen' and 'rejected', got {', '.join(pairs.column_names)}")
for column in {"prompt", "chosen", "rejected"} & set(pairs.column_names):
    if None in (cells := pairs[column][:]):
        parser.error(f"the column {column!r} must have a value in every row, row {cells.index(None)} has none")
if args.adapter:
    model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)

training = DPOConfig(
    output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
    max_length=args.tokens, bf16=args.bf16, logging_steps=1, save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
trainer = DPOTrainer(
    model, args=training, train_dataset=pairs, processing_class=tokenizer,
    peft_config=None if args.adapter else wasi_peft.WasiConfig(task_type="CAUSAL_LM"),  # 2
)  # fmt: skip
try:
    trainer.train()
finally:  # whatever ends the training
    trainer.save_model()
steps = [line for line in trainer.state.log_history if "rewards/margins" in line]
print(f"margin at the first step: {steps[0]['rewards/margins']:.6f}")  # 0: the model is its own reference
print(f"margin at the last steps: {sum(line['rewards/margins'] for line in steps[-10:]) / len(steps[-10:]):.4f}")
