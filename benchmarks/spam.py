"""Spam or not: MiniLM fine-tuned in full, with LoRA and with both forms of WASI, several seeds.

A new head on the sentence encoder, mails cut to 64 tokens. Mails with the same body count once, and lie in the order
of the hash of their body, so parts of it share no mail: 3,200 are trained on, 100 steps of 32; the next 600 choose the
learning rate, the next 1,500 are the test. The larger class has about 0.71 of them (`majority` of an entry, of its
test). AdamW without weight decay, warm-up over a tenth of the steps, then cosine decay. "factors" take the place of
the weights, calibrated on 512 of the mails and repaired on all, without labels.

Each run is a process of its own and one entry of docs/benchmarks/spam.json; finished runs are skipped. `job_seconds`
are those from the imports to the trained model, preparation included, and `peak_mib` is the resident set of the
process in that time above that of its imports. Without `--lr`, a method's learning rates of `GRID` are run with seed
0, then the best of them with the other seeds::

    python benchmarks/spam.py
    python benchmarks/spam.py --method factors --share 0.33 0.5 --lr 1e-3
    python benchmarks/spam.py --method residual --residual int8 int4 --dtype float32 bfloat16
    python benchmarks/spam.py --summarise
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

import wasi_peft
from common import RESULTS_FOLDER, environment, process_peak_bytes, read_json, with_lora
from finetuning import CALIBRATION_BATCH, HEAD, build_optimizer, train, with_residual
from runs import (
    Scores,
    Settings,
    add_run_arguments,
    comparison,
    plan_of,
    precision,
    residual_options,
    run_missing,
    updates_for,
)
from texts import load_mails, minilm_folder
from wasi_peft.tuner.config import MEMORY_MODES

RESULTS = RESULTS_FOLDER / "spam.json"
JUDGED = Scores("validation_accuracy", "test_accuracy")
GRID = {
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
    "lora": (2e-4, 5e-4, 1e-3, 2e-3),
    "residual": (2e-4, 5e-4, 1e-3, 2e-3),
    "factors": (2e-4, 5e-4, 1e-3, 2e-3),
}
TOKENS, BATCH, VALIDATION, TEST = 64, 32, 600, 1500
CALIBRATION = 512  # mails
COSTS = ("job_seconds", "peak_mib")
Items = list[dict[str, torch.Tensor]]


def load_items(
    train_count: int, validation: int = VALIDATION, test: int = TEST, tokens: int = TOKENS
) -> tuple[Items, Items, Items]:
    """Returns mails to train on, to choose by and to test on, each a mapping with its label."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    mails = load_mails(train_count + validation + test)
    texts, labels = [text for text, _ in mails], torch.tensor([label for _, label in mails])
    options: dict[str, Any] = {"truncation": True, "max_length": tokens, "padding": "max_length"}
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for start in range(0, len(texts), 50):  # what a tokenizer answers holds all that it cut off
        encoded = tokenizer(texts[start : start + 50], **options)
        for name, part in rows.items():
            part += encoded[name]
    fields = {**{name: torch.tensor(part) for name, part in rows.items()}, "labels": labels}
    items = [{name: tensor[index] for name, tensor in fields.items()} for index in range(len(mails))]
    return items[:train_count], items[train_count : train_count + validation], items[train_count + validation :]


def build(settings: Settings, model: nn.Module, train_set: Items) -> nn.Module:
    """Makes the model trainable by the method of the settings."""
    if settings["method"] == "full":
        return model
    if settings["method"] == "lora":
        return with_lora(model, [HEAD])
    inputs = [{name: value for name, value in item.items() if name != "labels"} for item in train_set]
    batches = [
        stacked(inputs[start : start + CALIBRATION_BATCH]) for start in range(0, len(inputs), CALIBRATION_BATCH)
    ]
    given = {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    if settings["method"] == "residual":
        config = wasi_peft.WasiConfig(**given, **settings["residual"])
        return with_residual(model, config, batches, settings["prepare"] or 0)
    config = wasi_peft.WasiConfig(**given, weight_share=settings["share"])
    wasi_peft.preprocess_wasi(
        model, config, batches, max_batches=CALIBRATION // CALIBRATION_BATCH, repair_steps=settings["repair_steps"]
    )
    return peft.get_peft_model(model, config)


def stacked(items: Items) -> dict[str, torch.Tensor]:
    """Returns items as one batch."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@torch.inference_mode()
def accuracy(model: nn.Module, items: Items, bf16: bool, description: str) -> float:
    """Returns the share of mails that are classified correctly; under autocast if asked."""
    model.eval()
    correct = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in tqdm(range(0, len(items), 100), desc=description):
            batch = stacked(items[start : start + 100])
            labels = batch.pop("labels")
            correct += int((model(**batch).logits.argmax(1) == labels).sum())
    return correct / len(items)


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates once, in a process that has done nothing before; returns the entry."""
    imports, start = process_peak_bytes(), time.perf_counter()
    train_set, held_out, test_set = load_items(settings["train"])
    transformers.set_seed(settings["seed"])  # the head is drawn from it
    dtype, bf16 = getattr(torch, settings["base_dtype"] or "float32"), settings["dtype"] == "bfloat16"
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = build(settings, load(minilm_folder(), num_labels=2, dtype=dtype), train_set)
    method = {"factors": "wasi"}.get(settings["method"], settings["method"])
    optimizer = build_optimizer(method, model, settings["lr"])
    with tempfile.TemporaryDirectory() as scratch:
        log = train(
            model, optimizer, train_set, Path(scratch),
            steps=settings["steps"], batch_size=BATCH, seed=settings["seed"], bf16=bf16,
        )  # fmt: skip
    costs = round(time.perf_counter() - start, 1), round((process_peak_bytes() - imports) / 2**20, 1)
    spam = sum(int(item["labels"]) for item in test_set) / len(test_set)
    return {
        "settings": settings,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_accuracy": accuracy(model, held_out, bf16, "Validating"),
        "test_accuracy": accuracy(model, test_set, bf16, "Testing"),
        "majority": max(spam, 1 - spam),
        **dict(zip(COSTS, costs, strict=True)),
        "losses": [item["loss"] for item in log if "loss" in item],
        "environment": environment(),
    }


def in_a_process(settings: Settings) -> dict[str, Any]:
    """Does :func:`run` in a process of its own, with as many threads as this one has."""
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(torch.get_num_threads()), "--job"]
    done = subprocess.run([*command, json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def every_settings(args: argparse.Namespace) -> Iterator[Settings]:
    """Yields the settings of all runs asked for, but for learning rates and seed."""
    for method, dtype in itertools.product(args.method, args.dtype):
        fields = itertools.product(args.residual, args.rank, updates_for(method, args.update), args.memory_mode)
        kinds: list[Settings] = [{}]
        if method == "residual":
            kinds = [{"residual": residual_options(*given), "prepare": args.prepare or None} for given in fields]
        elif method == "factors":
            kinds = [{"share": share, "repair_steps": args.repair_steps} for share in args.share]
        for kind in kinds:
            yield {
                "method": method,
                **{"residual": {}, "prepare": None, "share": None, "repair_steps": None, **kind},
                **precision(dtype, args.base_dtype),
                "train": args.train,
                "steps": args.steps,
            }


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", nargs="+", choices=GRID, default=list(GRID))
    add_run_arguments(parser, RESULTS, torch.get_num_threads())
    add("--update", nargs="+", choices=("addition", "frozen_basis"), help="residual: what trains")
    add("--memory-mode", nargs="+", choices=MEMORY_MODES, default=["exact"], help="residual")
    add("--share", type=float, nargs="+", default=[0.5], help="factors: share of the weights that they keep")
    add("--repair-steps", type=int, default=100, help="factors")
    add("--train", type=int, default=3200, help="mails trained on")
    add("--steps", type=int, default=100, help="optimizer steps")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.job:
        print(json.dumps(run(args.job)), flush=True)
        return
    for settings in [] if args.summarise else every_settings(args):
        run_missing(settings, plan_of(args, GRID[settings["method"]]), args.results, JUDGED, in_a_process)
    print(comparison(read_json(args.results), every_settings(args), JUDGED, ("majority", *COSTS)))


if __name__ == "__main__":
    main()
