"""Fine-tunes a language model with 70 % of its weights, by a plain loop that keeps little for backward.

By default a small Llama with random weights learns the bytes of this file: seconds, without a download. For your own
text and a pretrained model, by hub id or folder::

    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --text notes.txt --tokens 128 --lr 5e-3
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import wasi_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder (default: a small Llama with random weights)")
parser.add_argument("--text", type=Path, default=Path(__file__), help="file to learn")
parser.add_argument("--tokens", type=int, default=32, help="of a sample")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--lr", type=float, default=2e-2)
parser.add_argument("--output", type=Path, default=Path("outputs/causal_lm"))
args = parser.parse_args()


def base_model():
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, bos_token_id=0, eos_token_id=0)
    )


text = args.text.read_text()
ids = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"] if args.model else list(text.encode())
samples = torch.tensor(ids[: len(ids) // args.tokens * args.tokens]).view(-1, args.tokens)
test_set, train_set = samples[::8], torch.cat([samples[start::8] for start in range(1, 8)])


@torch.inference_mode()
def perplexity(model):
    model.eval()
    return model(input_ids=test_set, labels=test_set).loss.exp().item()


model = base_model()
print(f"perplexity of the dense model: {perplexity(model):.1f}")
config = wasi_peft.WasiConfig(weight_share=0.7, memory_mode="fast")  # "exact", "fast" or "small"
batches = [{"input_ids": part} for part in train_set[:128].split(args.batch_size)]
wasi_peft.preprocess_wasi(model, config, batches, repair_steps=20)
model = get_peft_model(model, config)  # from here on the dense weights are gone
print(model.wasi_summary())
print(f"perplexity before training: {perplexity(model):.1f}")

optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=args.lr, fused=True)
model.train()
for step in range(args.steps):
    batch = train_set[torch.randint(len(train_set), (args.batch_size,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
trained = perplexity(model)
print(f"perplexity after training: {trained:.1f}")

model.save_pretrained(args.output)
loaded = PeftModel.from_pretrained(base_model(), args.output)
print(f"perplexity of the saved model: {perplexity(loaded):.1f}")
