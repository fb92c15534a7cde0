"""Federated fine-tuning of MiniLM on mails at equal bytes: LoRA averaged in several ways, WASI by products.

The mails of `spam.py`, spam or not. Four clients hold them unevenly: for each class, shares are drawn from a Dirichlet
distribution. Each round every client starts from the server's state, takes a few steps of AdamW, and sends what has
trained; the server weighs it by numbers of mails. Ranks are such that no method sends more in a round, both ways, than
LoRA of rank 8:

* "lora": A and B are averaged, each by itself (FedIT, arXiv 2305.05644), rank 8.
* "lora frozen": A stays as it was drawn, B alone is sent (FFA-LoRA, arXiv 2403.12313), rank 16.
* "lora products": products B A are averaged, and put at rank 8 again by their singular values.
* "wasi": `WasiConfig()` at rank 7, whose biases and norms are sent too; products as `training/federated.py` does it.
* "wasi frozen": the same at rank 14 with `update="frozen_basis"`: R is chosen on 32 mails of the first client and sent
  once, L alone trains, so averages of L are averages of products.
* "wasi budgets": clients of ranks 10, 10, 4 and 4, the last of which trains the last three blocks alone.

Each run is one entry of docs/benchmarks/federated.json; finished runs are skipped. Each method's rates of `GRID` are
run with seed 0, then the best on held-out mails with the other seeds::

    python benchmarks/federated.py
    python benchmarks/federated.py --method "wasi budgets" --ranks 16 16 8 8 --blocks 6 6 6 3 --rounds 3
    python benchmarks/federated.py --summarise
"""

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import wasi_peft
from common import RESULTS_FOLDER, environment, read_json, with_lora
from finetuning import HEAD, build_optimizer, with_residual
from runs import Scores, Settings, add_plan_arguments, comparison, plan_of, run_missing
from spam import Items, accuracy, load_items, stacked
from texts import minilm_folder
from wasi_peft.linalg.sums import compressed_sum, stacked_sum
from wasi_peft.training import federated

RESULTS = RESULTS_FOLDER / "federated.json"
JUDGED = Scores("validation_accuracy", "test_accuracy")
GRID = (5e-4, 1e-3, 2e-3)
RANKS = {
    "lora": [8] * 4,
    "lora frozen": [16] * 4,
    "lora products": [8] * 4,
    "wasi": [7] * 4,
    "wasi frozen": [14] * 4,
    "wasi budgets": [10, 10, 4, 4],
}
LAST_BLOCKS = {"wasi budgets": [6, 6, 6, 3]}
HELD_OUT, TEST, TOKENS, BATCH = 300, 700, 32, 8
COSTS = ("mib_up_a_round", "mib_down_a_round", "seconds")
State = dict[str, Tensor]
items_of = functools.cache(load_items)


def split_by_label(labels: list[int], clients: int, concentration: float, seed: int, least: int) -> list[list[int]]:
    """Returns indices of each client's mails; of each class it has a share drawn from a Dirichlet distribution.

    Drawn again until each client has `least` mails.
    """
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.full((clients,), concentration)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            mails = [index for index, own in enumerate(labels) if own == label]
            drawn = torch._standard_gamma(gamma, generator)
            ends = (torch.cumsum(drawn / drawn.sum(), 0) * len(mails)).round().long().tolist()
            for part, start, end in zip(parts, [0, *ends], ends, strict=False):
                part += mails[start:end]
        if min(map(len, parts)) >= least:
            return parts
    raise ValueError(f"{clients} clients of {least} mails at least cannot be drawn from {len(labels)} mails")


def build(method: str, rank: int, first: Items) -> nn.Module:
    """Returns MiniLM with a new head and an adapter; the first client's mails choose R where it is frozen."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(minilm_folder(), num_labels=2)
    if method == "wasi frozen":
        config = wasi_peft.WasiConfig(weight_rank=rank, update="frozen_basis", modules_to_save=[HEAD])
        mails = [stacked(first[start : start + BATCH]) for start in range(0, min(len(first), 4 * BATCH), BATCH)]
        for batch in mails:
            del batch["labels"]
        return with_residual(model, config, mails, prepare=len(mails))
    if method.startswith("wasi"):
        return peft.get_peft_model(model, wasi_peft.WasiConfig(weight_rank=rank, modules_to_save=[HEAD]))
    model = with_lora(model, [HEAD], rank=rank)
    if method == "lora frozen":
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


def train(model: nn.Module, method: str, mails: Items, settings: Settings, seed: int) -> None:
    """Takes the steps of one client in one round, its mails in an order of the seed."""
    torch.manual_seed(seed)
    order = torch.cat([torch.randperm(len(mails)) for _ in range(settings["steps"] * BATCH // len(mails) + 1)])
    optimizer = build_optimizer("residual" if method.startswith("wasi") else "lora", model.train(), settings["lr"])
    for step in range(settings["steps"]):
        batch = stacked([mails[index] for index in order[step * BATCH : (step + 1) * BATCH].tolist()])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state_of(model: nn.Module) -> State:
    """Returns a copy of the adapter's state."""
    return {key: value.detach().clone() for key, value in peft.get_peft_model_state_dict(model).items()}


def averaged_lora(method: str, states: list[State], shares: list[float]) -> State:
    """Returns what a server makes of LoRA adapters of one rank."""
    result = {key: sum(w * state[key] for w, state in zip(shares, states, strict=True)) for key in states[0]}
    if method == "lora products":
        for left in [key for key in result if ".lora_B." in key]:
            right = left.replace(".lora_B.", ".lora_A.")
            L, R = stacked_sum([(state[left], state[right]) for state in states], shares)
            L, R = compressed_sum(L, R, result[left].shape[1])
            result[left], result[right] = L.float(), R.float()
    return result


def lora_round(model: nn.Module, state: State, parts: list[Items], settings: Settings) -> tuple[State, int, int]:
    """Returns the server's state after a round, and bytes that it has received and sent."""
    method, states = settings["method"], []
    fixed = {key for key in state if method == "lora frozen" and ".lora_A." in key}
    for client, mails in enumerate(parts):
        peft.set_peft_model_state_dict(model, state)
        train(model, method, mails, settings, settings["draw"] + client)
        states.append(state_of(model))
    total = sum(map(len, parts))
    one_way = len(parts) * sum(value.nbytes for key, value in state.items() if key not in fixed)
    return averaged_lora(method, states, [len(mails) / total for mails in parts]), one_way, one_way


def wasi_round(model: nn.Module, state: State, parts: list[Items], settings: Settings) -> tuple[State, int, int]:
    """Returns the server's state after a round, and bytes that it has received and sent."""
    contributions = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for client, mails in enumerate(parts):
        given = federated.cut_state(state, settings["ranks"][client])
        federated.load_state(model, given)
        if settings["blocks"]:
            federated.train_last_blocks(model, settings["blocks"][client])
        train(model, settings["method"], mails, settings, settings["draw"] + client)
        contributions.append(federated.Contribution(given, federated.trained_state(model, given), len(mails)))
        for parameter in trainable:
            parameter.requires_grad_()
    received = sum(federated.state_bytes(one.sent) for one in contributions)
    sent = sum(federated.state_bytes(one.received) for one in contributions)
    if settings["method"] == "wasi frozen" and settings["turn"]:  # clients have R since the first round
        sent = received
    return federated.averaged(state, contributions), received, sent


def run(settings: Settings) -> dict[str, Any]:
    """Does all rounds and evaluates once; returns the entry."""
    train_set, held_out, test_set = items_of(settings["train"], HELD_OUT, TEST, TOKENS)
    labels = [int(item["labels"]) for item in train_set]
    indices = split_by_label(labels, len(settings["ranks"]), settings["dirichlet"], settings["seed"], 2 * BATCH)
    parts = [[train_set[index] for index in part] for part in indices]
    transformers.set_seed(settings["seed"])  # the head is drawn from it, and A of LoRA
    model = build(settings["method"], max(settings["ranks"]), parts[0])
    state, up, down = state_of(model), 0, 0
    start = time.perf_counter()
    one_round = wasi_round if settings["method"].startswith("wasi") else lora_round
    for turn in range(settings["rounds"]):
        draw = 1000 * settings["seed"] + len(parts) * turn
        state, received, sent = one_round(model, state, parts, {**settings, "draw": draw, "turn": turn})
        up, down = up + received, down + sent
    seconds = time.perf_counter() - start
    federated.load_state(model, state)
    spam = sum(int(item["labels"]) for item in test_set) / len(test_set)
    mib = 2**20 * settings["rounds"]
    costs = round(up / mib, 4), round(down / mib, 4), round(seconds, 1)
    return {
        "settings": settings,
        "validation_accuracy": accuracy(model, held_out, False, "Validating"),
        "test_accuracy": accuracy(model, test_set, False, "Testing"),
        "majority": max(spam, 1 - spam),
        "mails": [len(part) for part in parts],
        "spam": [sum(labels[index] for index in part) for part in indices],
        **dict(zip(COSTS, costs, strict=True)),
        "environment": environment(),
    }


def every_settings(args: argparse.Namespace) -> Iterator[Settings]:
    """Yields the settings of all runs asked for, but for learning rate and seed."""
    for method in args.method:
        yield {
            "method": method,
            "ranks": args.ranks or RANKS[method],
            "blocks": args.blocks or LAST_BLOCKS.get(method),
            "dirichlet": args.dirichlet,
            "train": args.train,
            "rounds": args.rounds,
            "steps": args.steps,
        }


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, one run after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", nargs="+", choices=RANKS, default=list(RANKS))
    add("--ranks", type=int, nargs="+", help="of each client (default: RANKS)")
    add("--blocks", type=int, nargs="+", help="wasi: of each client, how many of the last blocks train (default: all)")
    add("--dirichlet", type=float, default=0.3, help="concentration; the smaller, the more uneven are labels")
    add("--train", type=int, default=1600, help="mails of all clients")
    add("--rounds", type=int, default=8)
    add("--steps", type=int, default=8, help="of a client in a round, of 8 mails")
    add_plan_arguments(parser, RESULTS, threads=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    plan = [] if args.summarise else plan_of(args, GRID)
    for one in plan:  # the first seed of all methods, then the next
        for settings in every_settings(args):
            run_missing(settings, [one], args.results, JUDGED, run)
    print(comparison(read_json(args.results), every_settings(args), JUDGED, ("majority", *COSTS)))


if __name__ == "__main__":
    main()
