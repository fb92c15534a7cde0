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
parser.add_argument("--dataset", required=True, help="with columns text and label")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--lr", type=float, default=5e-4)
args = parser.parse_args()

tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
texts = datasets.load_dataset(args.dataset, split="train").class_encode_column("label")
texts = texts.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)
split = texts.select_columns(["input_ids", "attention_mask", "label"]).train_test_split(0.2, seed=0)
labels, collate = texts.features["label"].num_classes, transformers.DataCollatorWithPadding(tokenizer)


def adapter():
    torch.manual_seed(0)  # all start from one head
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    return get_peft_model(model, wasi_peft.WasiConfig(task_type="SEQ_CLS", weight_rank=BUDGETS[0][0]))


client = ClientApp()


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
    sent = ArrayRecord(federated.trained_state(model, received))
    return Message(
        RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": len(part)})}), reply_to=message
    )


def evaluate(turn, arrays):
    federated.load_state(model, arrays.to_torch_state_dict())
    test = torch.utils.data.DataLoader(split["test"], 16, collate_fn=collate)
    with torch.inference_mode():
        right = [model.eval()(**batch).logits.argmax(1) == batch["labels"] for batch in test]
    return MetricRecord({"accuracy": torch.cat(right).float().mean().item()})


model = adapter()
strategy, grid = flower.ProductAverage(fraction_evaluate=0.0), flower.LocalGrid(client, len(BUDGETS))
result = strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model)), args.rounds, evaluate_fn=evaluate)
for turn, metrics in result.train_metrics_clientapp.items():
    accuracy = result.evaluate_metrics_serverapp[turn]["accuracy"]
    print(f"round {turn}: accuracy {accuracy:.3f}, {metrics['received-bytes'] / 2**20:.3f} MiB from all clients")
model.save_pretrained("outputs/federated_flower")
