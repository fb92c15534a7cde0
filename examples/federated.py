"""Federated averaging of a text classifier: clients keep their texts, and send what their adapter has learnt.

Each round every client starts from the server's adapter, trains it on its own texts, and sends L, R, biases, norms and
head. The average of the products L R, weighted by numbers of texts, is exact, and is put at rank K by its singular
values. A client that fails is named, and the round goes on. Here they take turns in one process, on one model::

    python examples/federated.py --model FacebookAI/roberta-base --dataset stanfordnlp/imdb --clients 8
"""

import argparse
import functools

import datasets
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict

import wasi_peft
from wasi_peft.training import federated

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

texts, text, label = datasets.load_dataset(args.dataset, split="train"), args.text_column, args.label_column
for column in (text, label):
    if column not in texts.column_names:
        parser.error(f"the dataset must have a column {column!r}, got {', '.join(texts.column_names)}")
if not isinstance(texts.features[label], datasets.ClassLabel):
    texts = texts.class_encode_column(label)
number, tokenizer = texts.features[label].num_classes, transformers.AutoTokenizer.from_pretrained(args.model)
texts = texts.map(
    lambda batch: {**tokenizer(batch[text], truncation=True, max_length=128), "labels": batch[label]},
    batched=True, remove_columns=texts.column_names,
)  # fmt: skip
split, collate = texts.train_test_split(0.2, seed=0), transformers.DataCollatorWithPadding(tokenizer)
loader = functools.partial(torch.utils.data.DataLoader, batch_size=args.batch_size, collate_fn=collate)
if not 1 <= args.clients <= len(split["train"]):
    parser.error(f"--clients must be from 1 to {len(split['train'])}, the training texts, got {args.clients}")
parts = {f"client {i + 1}": split["train"].shard(args.clients, i) for i in range(args.clients)}
model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=number)
model = get_peft_model(model, wasi_peft.WasiConfig(task_type="SEQ_CLS"))
state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}  # the server's


def train(part):
    federated.load_state(model, state)
    optimizer = wasi_peft.create_wasi_optimizer(model.train(), torch.optim.AdamW, lr=args.lr)
    for _, batch in zip(range(args.steps), loader(part, shuffle=True), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return federated.Contribution(state, federated.trained_state(model, state), len(part))


for turn in range(1, args.rounds + 1):
    answers = {}
    for name, part in parts.items():
        try:
            answers[name] = train(part)
        except Exception as error:
            answers[name] = error
    usable = list(federated.usable(state, answers, turn).values())  # a line names each client left out
    state, sent = federated.averaged(state, usable), federated.state_bytes(usable[0].sent) / 2**20
    federated.load_state(model, state)
    model.save_pretrained(args.output)  # whatever ends the training
    with torch.inference_mode():
        right = [model.eval()(**batch).logits.argmax(1) == batch["labels"] for batch in loader(split["test"])]
    print(f"round {turn}: accuracy {torch.cat(right).float().mean():.3f}, {sent:.3f} MiB from each client")
