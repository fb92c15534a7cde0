"""Federated fine-tuning of a text classifier with Flower; every client has a budget of its own.

A client cuts the server's adapter to its rank, trains in its last blocks, and answers with what has trained. The
server averages the products L R, whatever their ranks. Here the clients run in this process; `client` and the strategy
are what an app of several machines has too::

    python examples/federated_flower.py --dataset FOLDER
"""

import argparse

import datasets
import torch
import transformers
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model, get_peft_model_state_dict

import wasi_peft
from wasi_peft.training import federated, flower

BUDGETS = [(16, 6), (16, 6), (8, 6), (8, 3)]  # of each client: rank, and how many of the last blocks train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv files, with columns text and label")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--lr", type=float, default=5e-4)
args = parser.parse_args()

torch.manual_seed(0)
texts = datasets.load_dataset(args.dataset, split="train")
for column in ("text", "label"):
    if column not in texts.column_names:
        parser.error(f"the dataset must have a column {column!r}, got {', '.join(texts.column_names)}")
if not isinstance(texts.features["label"], datasets.ClassLabel):
    texts = texts.class_encode_column("label")
labels, tokenizer = texts.features["label"].num_classes, transformers.AutoTokenizer.from_pretrained(args.model)
texts = texts.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)
split = texts.select_columns(["input_ids", "attention_mask", "label"]).train_test_split(0.2, seed=0)
client, collate = ClientApp(), transformers.DataCollatorWithPadding(tokenizer)
transformers.logging.set_verbosity_error()  # each loading would say that the head is new


def adapter():
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    return get_peft_model(model, wasi_peft.WasiConfig(task_type="SEQ_CLS", weight_rank=BUDGETS[0][0]))


@client.train()
def train(message, context):
    number = context.node_config["partition-id"]
    received, (rank, blocks) = message.content["arrays"].to_torch_state_dict(), BUDGETS[number]
    model, part = adapter().train(), split["train"].shard(len(BUDGETS), number)
    federated.load_state(model, federated.cut_state(received, rank))
    federated.train_last_blocks(model, min(blocks, model.config.num_hidden_layers))
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=args.lr)
    for batch in torch.utils.data.DataLoader(part, 16, shuffle=True, collate_fn=collate):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    arrays, metrics = federated.trained_state(model, received), {"num-examples": len(part)}
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}), reply_to=message)


def evaluate(turn, arrays):
    federated.load_state(model, arrays.to_torch_state_dict())
    model.save_pretrained("outputs/federated_flower")  # whatever ends the rounds
    test = torch.utils.data.DataLoader(split["test"], 16, collate_fn=collate)
    with torch.inference_mode():
        right = [model.eval()(**batch).logits.argmax(1) == batch["labels"] for batch in test]
    print(f"round {turn}: accuracy {torch.cat(right).float().mean():.3f}")


model = adapter()
strategy, grid = flower.ProductAverage(fraction_evaluate=0.0), flower.LocalGrid(client, len(BUDGETS))
strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model)), args.rounds, evaluate_fn=evaluate)
