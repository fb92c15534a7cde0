"""SmolLM2-135M as GGUF files in llama.cpp: bytes, distance from the answers in PyTorch, and tokens per second.

Weights in 8 bits and 4 bits are the codes of WASI's residuals; "adapter" is a base in 8 bits with factors of rank 32
beside all layers, which llama.cpp adds as a LoRA adapter (random ones: speed and sizes are measured, not quality). The
table of tokens is in 8 bits, except in F32. All models answer in each round, in alternating order; times are those of
llama.cpp itself. "difference" is that of log-probabilities of the 100 likeliest next tokens, at most, after the first
127 tokens of mails, from the model in PyTorch that was exported, whose products do not round what they multiply;
llama.cpp's do. Needs `pip install xllamacpp`, whose wheels hold llama.cpp for any CPU, without the instructions that
only some have. Results: docs/benchmarks/export_llama_cpp.json. Run it on an idle machine::

    WASI_MAILS=... python benchmarks/export_llama_cpp.py --threads 1
"""

import argparse
import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import wasi_peft
from common import RESULTS_FOLDER, environment, write_json
from texts import load_mails, smollm2_folder, token_windows

RESULTS = RESULTS_FOLDER / "export_llama_cpp.json"
PROMPT, LIKELIEST, RANK = 127, 100, 32


def dense() -> Any:
    """SmolLM2 in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


def compressed(residual: str) -> Any:
    """Its weights as codes."""
    return wasi_peft.compress(dense(), wasi_peft.WasiConfig(residual=residual, residual_product="restored"))


def adapted() -> Any:
    """Codes of 8 bits, and factors beside them."""
    config = wasi_peft.WasiConfig(weight_rank=RANK, residual_product="restored")
    model = peft.get_peft_model(dense(), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wasi_added_L" in name:
                parameter.normal_(0.0, 1e-2)
    return model


VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dense, F32": (dense, {}),
    "dense, Q8_0": (dense, {"int8": True}),
    "codes of 8 bits, Q8_0": (lambda: compressed("int8"), {"int8": True}),
    "codes of 4 bits, Q4_1": (lambda: compressed("int4"), {"int8": True}),
    "adapter on codes of 8 bits": (adapted, {"int8": True}),
}


def server(folder: Path, threads: int) -> Any:
    """llama.cpp with a model, and its adapter."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(folder / "model.gguf"), 512, 1
    params.verbosity, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = -1, threads, threads
    if (folder / "adapter.gguf").exists():
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "adapter.gguf"), 1.0)]
    return xllamacpp.Server(params)


@torch.no_grad()
def difference(model: Any, llama: Any, windows: torch.Tensor) -> float:
    """Largest one of the log-probabilities that llama.cpp finds the highest."""
    largest = 0.0
    for window in windows:
        expected = model(window[None, :PROMPT]).logits[0, -1].log_softmax(-1)
        prompt = window[:PROMPT].tolist()
        bias = [[prompt[0], 100.0]]  # half a letter would be answered with no probabilities, which lack the bias
        request = {"prompt": prompt, "n_predict": 1, "n_probs": LIKELIEST, "logit_bias": bias}
        answer = llama.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        largest = max(largest, *(abs(entry["logprob"] - float(expected[entry["id"]])) for entry in answer))
    return largest


def measure(folder: Path, windows: torch.Tensor, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Everything of all variants."""
    results: dict[str, dict[str, Any]] = {}
    servers = {}
    for index, (name, (build, options)) in enumerate(VARIANTS.items()):
        model, place = build(), folder / str(index)
        error = wasi_peft.export(model, place, "gguf", **options)
        servers[name] = server(place, threads)
        results[name] = {
            "bytes": {path.name: path.stat().st_size for path in sorted(place.iterdir())},
            "difference_of_the_file": error,
            "difference": difference(model, servers[name], windows),
            "read": [],
            "written": [],
        }
    names = list(VARIANTS)
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            prompt = windows[number % len(windows), :PROMPT].tolist()
            request = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False}
            timings = servers[name].handle_completions(request)["timings"]
            results[name]["read"].append(timings["prompt_per_second"])
            results[name]["written"].append(timings["predicted_per_second"])
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats the results as a Markdown table."""
    lines = [
        "| model | MiB | difference in llama.cpp | tokens read a second | written |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, entry in results.items():
        size = " + ".join(f"{count / 2**20:.1f}" for count in reversed(entry["bytes"].values()))
        rates = " | ".join(f"{statistics.median(entry[what]):.1f}" for what in ("read", "written"))
        lines.append(f"| {name} | {size} | {entry['difference']:.3f} | {rates} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mails", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    windows = token_windows(tokenizer, load_mails(20 * args.mails), args.mails)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), windows, args.tokens, args.rounds, args.threads)
    print(table(results))
    llama_cpp = {"xllamacpp": importlib.metadata.version("xllamacpp"), "threads": args.threads}
    content = {"results": results, "llama_cpp": llama_cpp, "environment": environment()}
    write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
