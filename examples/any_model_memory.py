"""Any transformers model in less memory, without WASI or any adapter: techniques of `wasi_peft.memory`, one by one.

By default a small Llama with random weights; for another language model, by hub id or folder::

    python examples/any_model_memory.py --model HuggingFaceTB/SmolLM2-135M --tokens 256
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wasi_peft import measure_peak_memory, memory

MIB = 2**20
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--tokens", type=int, default=128, help="of a sample")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
else:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=4096))
model.train()
tokens = torch.randint(model.config.vocab_size, (args.batch_size, args.tokens))
batch = {"input_ids": tokens, "labels": tokens}

TECHNIQUES = {
    "nothing": [],
    "the loss in chunks": [memory.ChunkedLoss()],
    "blocks in 8 bits": [memory.LowBitBlocks("int8")],
    "blocks recomputed": [memory.RecomputedBlocks("int8")],
    "recomputed, in slices": [memory.RecomputedBlocks("int8"), memory.SlicedBlocks(drop_caches=True)],
    'all of memory_mode="fast"': memory.MODES["fast"],
    'all of memory_mode="small"': memory.MODES["small"],
}


def step():
    """Forward and backward; the gradients are part of what is measured."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    losses.append(loss.item())


for name, techniques in TECHNIQUES.items():
    losses = []
    for technique in techniques:  # each is put around those before it
        technique.install(model)
    model.zero_grad()
    peak = measure_peak_memory(step).peak_bytes
    for technique in reversed(techniques):
        technique.remove(model)
    print(f"{name:40}{peak / MIB:8.1f} MiB   loss {losses[0]:.6f}")
