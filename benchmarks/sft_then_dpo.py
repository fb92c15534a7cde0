"""Supervised fine-tuning, then preferences from its saved adapter: the residual form beside LoRA, by TRL.

SmolLM2-135M on mails. SFTTrainer packs the texts of some, which are learnt; DPOTrainer goes on from the saved adapter
on pairs of others: the prompt is the start of a mail, chosen is how it goes on, rejected how another one does. The
reference is the copy of the adapter that TRL makes, so the margin at the first step is zero. Held-out mails give the
loss of the first part, and accuracy and margin of the second. LoRA has rank 16 and alpha 32, on the same layers. Each
method runs at one learning rate a part, the same for all: 3e-3, the best of four for both on such mails
(finetune_perplexity.py), and 5e-4 for preferences, where no other was tried.

Each run is a process of its own, whose peak counts, and one entry of docs/benchmarks/sft_then_dpo.json; finished runs
are skipped. Time is processor time of training alone::

    for method in lora "lora checkpointing" residual "residual small" \\
            "residual vocabulary" "residual vocabulary small"; do
        python benchmarks/sft_then_dpo.py --method "$method"
    done
    python benchmarks/sft_then_dpo.py --summarise
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from torch import nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import wasi_peft
from common import RESULTS_FOLDER, add_entry, cache_dir, environment, process_peak_bytes, read_json, with_lora
from runs import key_of
from texts import load_mails, smollm2_folder

RESULTS = RESULTS_FOLDER / "sft_then_dpo.json"
RESIDUALS = ("residual", "residual small", "residual vocabulary", "residual vocabulary small")  # also it in 8 bits
METHODS = ("lora", "lora checkpointing", *RESIDUALS)
PROMPT, ANSWER = 48, 40  # tokens
MIB = 2**20


def texts(tokenizer: Any, count: int, held_out: int) -> tuple[list[list[int]], ...]:
    """Returns the first tokens of mails: to learn, to prefer, and as many of each as asked for to test on."""
    length = PROMPT + 2 * ANSWER
    rows = [ids[:length] for text, _ in load_mails(10_000) if len(ids := tokenizer(text)["input_ids"]) >= length]
    sizes = (count, count, held_out, held_out)
    if len(rows) < sum(sizes):
        raise ValueError(f"{sum(sizes)} mails of {length} tokens are needed, got {len(rows)}")
    parts = iter(rows)
    return tuple([next(parts) for _ in range(size)] for size in sizes)


def learnt(tokenizer: Any, rows: list[list[int]]) -> datasets.Dataset:
    """Returns texts for the SFTTrainer."""
    return datasets.Dataset.from_dict({"text": [tokenizer.decode(row) for row in rows]})


def preferences(tokenizer: Any, rows: list[list[int]]) -> datasets.Dataset:
    """Returns pairs of answers for the DPOTrainer; what is rejected is how the next mail goes on."""
    answers = [tokenizer.decode(row[PROMPT : PROMPT + ANSWER]) for row in rows]
    prompts = [tokenizer.decode(row[:PROMPT]) for row in rows]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": [*answers[1:], answers[0]]})


def adapted(method: str, model: nn.Module) -> nn.Module:
    """Returns the model with a new adapter."""
    if method.startswith("lora"):
        return with_lora(model)
    config = wasi_peft.WasiConfig(
        task_type="CAUSAL_LM",
        memory_mode="small" if method.endswith("small") else "exact",
        vocabulary="int8" if "vocabulary" in method else None,
    )
    return peft.get_peft_model(model, config)


def options(settings: dict[str, Any], folder: Path, lr: float, steps: int) -> dict[str, Any]:
    """Returns what both trainers have in common; blocks run once, unless the method says otherwise."""
    return {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": lr, "seed": settings["seed"],
        "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 10), "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "bf16": False,
        "gradient_checkpointing": settings["method"].endswith("checkpointing"),
        "per_device_eval_batch_size": 2, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains and tests once; returns the entry."""
    torch.set_num_threads(settings["threads"])
    folder = smollm2_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    count, batch = settings["samples"], settings["batch_size"]
    learn, prefer, test_texts, test_pairs = texts(tokenizer, count, settings["held_out"])
    entry: dict[str, Any] = {"settings": settings}

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "sft"
        transformers.set_seed(settings["seed"])
        steps = settings["sft_steps"]
        shared = options(settings, saved, settings["sft_lr"], steps)
        trainer = SFTTrainer(
            adapted(settings["method"], base()),
            SFTConfig(per_device_train_batch_size=batch, max_length=PROMPT + 2 * ANSWER, packing=True, **shared),
            train_dataset=learnt(tokenizer, learn), eval_dataset=learnt(tokenizer, test_texts),
            processing_class=tokenizer,
        )  # fmt: skip
        entry["held_out_loss_before"] = trainer.evaluate()["eval_loss"]
        started = time.process_time()
        trainer.train()
        entry["sft_processor_seconds"] = time.process_time() - started
        entry["held_out_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model()
        del trainer

        transformers.set_seed(settings["seed"])
        steps = settings["dpo_steps"]
        shared = options(settings, Path(scratch) / "dpo", settings["dpo_lr"], steps)
        preferring = DPOTrainer(
            peft.PeftModel.from_pretrained(base(), saved, is_trainable=True),
            args=DPOConfig(per_device_train_batch_size=batch // 2, max_length=PROMPT + ANSWER + 8, **shared),
            train_dataset=preferences(tokenizer, prefer), eval_dataset=preferences(tokenizer, test_pairs),
            processing_class=tokenizer,
        )  # fmt: skip
        started = time.process_time()
        preferring.train()
        entry["dpo_processor_seconds"] = time.process_time() - started
        lines = [line for line in preferring.state.log_history if "rewards/margins" in line]
        entry["margin_at_step_0"] = lines[0]["rewards/margins"]
        entry["margins"] = [line["rewards/margins"] for line in lines]
        entry["accuracies"] = [line["rewards/accuracies"] for line in lines]
        test = preferring.evaluate()
        for name in ("loss", "rewards/accuracies", "rewards/margins"):
            entry[f"held_out_dpo_{name.rpartition('/')[2]}"] = test[f"eval_{name}"]
        preferring.save_model()
        entry["adapter_mib"] = next((Path(scratch) / "dpo").glob("*.safetensors")).stat().st_size / MIB
    entry["process_peak_mib"] = process_peak_bytes() / MIB
    entry["environment"] = {**environment(), "trl": trl.__version__}
    return entry


def summary(results: Path) -> str:
    """Formats a table, one row a run."""
    lines = [
        "| method | held-out loss before, after SFT | margin at step 0 | held-out accuracy, margin after DPO | "
        "processor s, SFT + DPO | peak of the process | adapter |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in read_json(results).values():
        lines.append(
            f"| {entry['settings']['method']} | {entry['held_out_loss_before']:.3f}, {entry['held_out_loss']:.3f} | "
            f"{entry['margin_at_step_0']:g} | {entry['held_out_dpo_accuracies']:.3f}, "
            f"{entry['held_out_dpo_margins']:.2f} | {entry['sft_processor_seconds']:.0f} + "
            f"{entry['dpo_processor_seconds']:.0f} | {entry['process_peak_mib']:.0f} MiB | "
            f"{entry['adapter_mib']:.1f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="residual")
    parser.add_argument("--sft-lr", type=float, default=3e-3)
    parser.add_argument("--dpo-lr", type=float, default=5e-4)
    parser.add_argument("--sft-steps", type=int, default=24)
    parser.add_argument("--dpo-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8, help="of samples, of half as many pairs")
    parser.add_argument("--samples", type=int, default=256, help="to learn, and as many pairs")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summarise", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    if not args.summarise:
        names = ("method", "sft_lr", "dpo_lr", "sft_steps", "dpo_steps", "batch_size", "samples", "held_out", "seed")
        settings = {name: getattr(args, name) for name in (*names, "threads")}
        key = key_of(settings)
        if key not in read_json(args.results):
            print(f"running: {key}", flush=True)
            add_entry(args.results, key, run(settings), cache_dir() / f"{args.results.name}.lock")
    print(summary(args.results))


if __name__ == "__main__":
    main()
