"""Digests of three training steps with every form, memory mode and tiny architecture, to compare two checkouts.

A move of code must not change a bit: `python tests/digests.py before.json` in one checkout, then
`python tests/digests.py after.json --against before.json` in the other, on the same machine and versions. What is
hashed knows no names: losses, logits, and the values of all parameters that train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from models import ARCHITECTURES, FORMS, Architecture, input_options, logits
from peft import get_peft_model

from wasi_peft import WasiConfig

MODES = ("exact", "fast", "small")
SAMPLES = 512  # of at least 7 tokens: "fast" and "small" then cut batches into slices


def digest(tensors: list[torch.Tensor]) -> str:
    """Hash of the values, in an order that depends on shapes and values alone."""
    parts = sorted((str(tuple(t.shape)), t.detach().contiguous().numpy().tobytes()) for t in tensors)
    return hashlib.sha256(b"".join(shape.encode() + values for shape, values in parts)).hexdigest()[:16]


def run(architecture: Architecture, form: str, mode: str, samples: int = SAMPLES) -> dict[str, Any]:
    """Three AdamW steps on three batches; digests of all that they make."""
    torch.manual_seed(0)
    compressed = input_options(FORMS[form]["update"])
    config = WasiConfig(weight_rank=4, **FORMS[form], update_rank=2, memory_mode=mode, **compressed)
    losses = []
    try:
        model = get_peft_model(architecture.model(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            loss = model(**architecture.batch(samples, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    except (ValueError, AttributeError) as error:  # of an architecture that has not this mode
        return {"refused": f"{type(error).__name__}: {error}"}
    return {
        "losses": [float(loss) for loss in losses],
        "logits": digest([logits(model, architecture.batch(4))]),
        "trained": digest([p for p in model.parameters() if p.requires_grad]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path, help="digests of the other checkout")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {
        f"{name} {form} {mode}": run(architecture, form, mode)
        for name, architecture in ARCHITECTURES.items()
        for form in FORMS
        for mode in MODES
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.against is None:
        return 0
    expected = json.loads(arguments.against.read_text())
    different = [key for key in expected if found.get(key) != expected[key]]
    for key in different:
        print(f"{key}:\n  was {expected[key]}\n  is  {found.get(key)}")
    print(f"{len(expected) - len(different)} of {len(expected)} the same")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
