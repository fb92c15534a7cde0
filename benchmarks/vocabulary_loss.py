"""The loss of a large vocabulary, as transformers computes it from all logits and in chunks of tokens.

The head's product, cross-entropy and backward to the hidden states for 8 x 128 tokens at SmolLM2-135M's sizes (hidden
size 576, vocabulary 49,152, frozen head), in float32 and under autocast to bfloat16: time, page faults (memory that
the process has to ask the system for), tracked peak, and the error of the gradient against float64. In a process with
the heap that Python starts with, and in one with that of `wasi-peft run`; all ways in turn, medians, and as the
spread half the range between the quartiles. Results: docs/benchmarks/vocabulary_loss.json; on an idle machine::

    python benchmarks/vocabulary_loss.py
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import RESULTS_FOLDER, environment, measured_in_a_process, write_json
from wasi_peft import measure_peak_memory
from wasi_peft.memory import chunked_cross_entropy

RESULTS = RESULTS_FOLDER / "vocabulary_loss.json"
SAMPLES, TOKENS, HIDDEN, VOCABULARY = 8, 128, 576, 49152
HEAPS = ("Python's", "of wasi-peft run")


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What transformers' `ForCausalLMLoss` does with a head's product; float64 inputs stay in float64."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    following = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), following.reshape(-1))


def in_chunks(rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same, that many tokens at a time."""
    return lambda hidden, weight, labels: chunked_cross_entropy(hidden, weight, None, labels, chunk_rows=rows)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": all_logits,
    "256 tokens at a time": in_chunks(256),  # memory_mode="exact"
    "128 tokens at a time": in_chunks(128),  # "fast" and "small"
}


def measure(rounds: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """All ways in both precisions, in this process."""
    torch.manual_seed(0)
    hidden = torch.randn(SAMPLES, tokens, HIDDEN)
    weight = torch.randn(vocabulary, HIDDEN) * 0.05
    labels = torch.randint(vocabulary, (SAMPLES, tokens))

    def gradient(way: str, dtype: torch.dtype, bf16: bool) -> Tensor:
        x = hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = WAYS[way](x, weight.to(dtype), labels)
        return torch.autograd.grad(loss, x)[0]

    results: dict[str, Any] = {}
    for precision, bf16 in (("float32", False), ("bfloat16", True)):
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
        for repetition in range(rounds + 1):
            for way in list(WAYS) if repetition % 2 else list(WAYS)[::-1]:
                faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
                gradient(way, torch.float32, bf16)
                took = time.perf_counter() - start
                found[way].append((took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
        for way, values in found.items():
            low, middle, high = statistics.quantiles([seconds for seconds, _ in values[1:]], n=4)
            peak = measure_peak_memory(lambda way=way, bf16=bf16: gradient(way, torch.float32, bf16))
            results[f"{precision}, {way}"] = {
                "milliseconds": round(1e3 * middle, 1),
                "spread": round(5e2 * (high - low), 1),
                "page_faults": statistics.median(faults for _, faults in values[1:]),
                "peak_mib": round(peak.peak_bytes / 2**20, 1),
            }
    exact = gradient("all logits", torch.float64, False)
    for precision, bf16 in (("float32", False), ("bfloat16", True)):
        for way in WAYS:
            error = (gradient(way, torch.float32, bf16).double() - exact).norm() / exact.norm()
            results[f"{precision}, {way}"]["gradient_error"] = float(f"{error:.2g}")
    return results


def in_a_process(heap: str, args: argparse.Namespace) -> dict[str, Any]:
    """The measurements of a process that starts with that heap."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rounds", "tokens", "vocabulary")]
    command = [sys.executable, str(Path(__file__).resolve()), "--here", *sizes]
    return measured_in_a_process(command, lean_heap=heap == HEAPS[1])


def main(arguments: list[str] | None = None) -> None:
    """Measures in both processes and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each of {SAMPLES} samples")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.here:
        print(json.dumps(measure(args.rounds, args.tokens, args.vocabulary)))
        return
    settings = {name: getattr(args, name) for name in ("rounds", "tokens", "vocabulary")}
    found = {heap: in_a_process(heap, args) for heap in HEAPS}
    for heap, rows in found.items():
        for name, row in rows.items():
            print(f"{heap}, {name}: {row}")
    write_json(args.results, {"settings": settings, **found, "environment": environment()})


if __name__ == "__main__":
    main()
