"""Fine-tunes a language model on texts or chats, by TRL's SFTTrainer.

The lines that make it WASI are marked. The dataset has a column "text", "messages", or "prompt" and "completion"::

    python examples/causal_lm.py --dataset FOLDER --packing --memory small
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara
    accelerate launch --num_processes 2 examples/causal_lm.py --dataset FOLDER
"""

import argparse
import math

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import wasi_peft  # 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv, json or parquet files")
parser.add_argument("--tokens", type=int, default=128, help="at most, of a sample")
parser.add_argument("--packing", action="store_true", help="several samples in a row of tokens")
parser.add_argument("--assistant-only", action="store_true", help="learn what the assistant says, of chats")
parser.add_argument("--memory", default="exact", choices=["exact", "fast", "small"])
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--output", default="outputs/causal_lm")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.tokens))
if args.tokens > limit:
    parser.error(f"--tokens must be at most {limit} for this model, got {args.tokens}")
samples = datasets.load_dataset(args.dataset, split="train")
present = set(samples.column_names)
used = next((names for names in ({"messages"}, {"prompt", "completion"}, {"text"}) if names <= present), None)
if used is None:
    wanted = "'text', 'messages', or 'prompt' and 'completion'"
    parser.error(f"the dataset must have a column {wanted}, got {', '.join(samples.column_names)}")
for column in used:
    if None in (cells := samples[column][:]):
        parser.error(f"the column {column!r} must have a value in every row, row {cells.index(None)} has none")
split = samples.train_test_split(0.1, seed=0)

training = SFTConfig(
    output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
    max_length=args.tokens, packing=args.packing, assistant_only_loss=args.assistant_only, bf16=args.bf16,
    gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=20, seed=0,
)  # fmt: skip
trainer = SFTTrainer(
    model, training, train_dataset=split["train"], eval_dataset=split["test"], processing_class=tokenizer,
    peft_config=wasi_peft.WasiConfig(task_type="CAUSAL_LM", memory_mode=args.memory),  # 2
)  # fmt: skip
print(f"perplexity before training: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
try:
    trainer.train()
finally:  # whatever ends the training
    trainer.save_model()
print(f"perplexity after training: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
