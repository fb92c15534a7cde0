"""Federated averaging of a text classifier: clients keep their texts, and send what their adapter has learnt.

Each round every client starts from the server's adapter, trains it on texts of its own, and sends L, R, biases, norms
and head. The average of the products L R, weighted by how many texts each has, is exact; it is put at rank K again by
its singular values. Here the clients run one after the other in one process and share the frozen weights::

    python examples/federated.py --dataset FOLDER
    python examples/federated.py --model FacebookAI/roberta-base --dataset stanfordnlp/imdb --clients 8
"""

import argparse

import datasets
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict

import wasi_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of csv, json or parquet files")
parser.add_argument("--text-column", default="text")
parser.add_argument("--label-column", default="label")
parser.add_argument("--clients", type=int, default=4)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=10, help="of a client in a round")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--output", default="outputs/federated")
args = parser.parse_args()

torch.manual_seed(0)
texts = datasets.load_dataset(args.dataset, split="train")
if not isinstance(texts.features[args.label_column], datasets.ClassLabel):
    texts = texts.class_encode_column(args.label_column)
number = texts.features[args.label_column].num_classes
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
texts = texts.map(
    lambda batch: {
        **tokenizer(batch[args.text_column], truncation=True, max_length=128),
        "labels": batch[args.label_column],
    },
    batched=True, remove_columns=texts.column_names,
)  # fmt: skip
split = texts.train_test_split(0.2, seed=0)


def loader(part):
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return torch.utils.data.DataLoader(part, args.batch_size, shuffle=True, collate_fn=collate)


clients = [loader(split["train"].shard(args.clients, index)) for index in range(args.clients)]
shares = [len(client.dataset) / len(split["train"]) for client in clients]
model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=number)
model = get_peft_model(model, wasi_peft.WasiConfig(task_type="SEQ_CLS"), adapter_name="server")

for turn in range(args.rounds):
    names = [f"client{index}" for index in range(args.clients)]
    for name, client in zip(names, clients, strict=True):
        model.add_weighted_adapter(["server"], [1.0], name, "cat")  # a copy
        model.set_adapter(name)
        optimizer = wasi_peft.create_wasi_optimizer(model.train(), torch.optim.AdamW, lr=args.lr)
        for _, batch in zip(range(args.steps), client, strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    sent = sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, adapter_name=names[0]).values())
    model.set_adapter(names[0])
    model.delete_adapter("server")
    model.add_weighted_adapter(names, shares, "server", "svd")
    model.set_adapter("server")
    for name in names:
        model.delete_adapter(name)
    with torch.inference_mode():
        right = [model.eval()(**batch).logits.argmax(1) == batch["labels"] for batch in loader(split["test"])]
    print(f"round {turn + 1}: accuracy {torch.cat(right).float().mean():.3f}, {sent / 2**20:.3f} MiB from each client")
model.save_pretrained(args.output)
