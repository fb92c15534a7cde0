"""The table of architectures in docs/models.md, written from what the run found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checks import FORMS
from families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

# columns of the table, and the checks that each stands for
COLUMNS = {
    "full rank": ("output", "gradients"),
    "step": ("step",),
    "fast": ("fast", "fast, slices"),
    "small": ("small", "small, slices"),
    "estimate": ("estimate",),
    "prepare": ("prepare",),
    "checkpoints": ("checkpointing", "reentrant"),
    "bf16": ("bf16",),
    "save": ("save",),
    "merge": ("merge",),
    "generate": ("generate", "left padding"),
}

INTRODUCTION = """# Models

What works with which architecture: written by `make test-models` from tiny models with random weights. `make test` runs
a dozen of them.

| package | version |
| --- | --- |
{versions}

{count} architectures. Forms: "int8", the default (`WasiConfig()`: an int8 residual and an addition), "factors" at a fixed
rank (`weight_rank=4, residual=None`), and "exact", an addition beside the exact weight (`residual="exact"`). {outcome}

{counts}

| column | what is asked |
| --- | --- |
| targets | layers that are found by default, and their share of all weights of the tiny model; heads and embeddings weigh more there than in real ones |
| full rank | output and gradients at full rank, or beside the residual, are those of the dense model (with its weights rounded) |
| step | two AdamW steps move every layer that the dense model's gradients reach, and leave no NaN |
| fast, small | outputs and gradients under each memory mode, with whole batches and in slices |
| estimate | the peak of a step is estimated without running it, as `estimate_wasi` does |
| prepare | `preprocess_wasi` prepares all targets, and the injection takes what it made |
| checkpoints | the model's own gradient checkpointing, reentrant or not |
| bf16 | a training pass under bfloat16 autocast, as exact as the dense model's |
| save | a saved and loaded adapter answers the same |
| merge | `merge_and_unload()` leaves plain layers that answer the same |
| generate | the dense model's tokens, with a cache, and with padding on the left |

"yes": in all forms that were run. "-": the dense model, or LoRA on it, cannot do it either. A number is a sentence below.
"""  # noqa: E501


def write_table(content: dict[str, Any]) -> None:
    """Write docs/models.md."""
    models = content["models"]
    notes: dict[str, list[str]] = {}
    lines = []
    group = None
    for name, entry in models.items():
        family = FAMILIES.get(name)
        if family is None or not set(FORMS) & set(entry):
            continue
        if family.group != group:
            group = family.group
            lines += [f"\n## {group.capitalize()}\n", f"| model | targets | {' | '.join(COLUMNS)} |"]
            lines += ["| --- " * (len(COLUMNS) + 2) + "|"]
        found = entry[next(iter(FORMS))]["targets"]
        cells = [_cell(name, entry, checks, notes) for checks in COLUMNS.values()]
        first = found[1] if found[0] == "works" else _cell(name, entry, ("targets",), notes)
        lines.append(f"| {family.title} | {first} | {' | '.join(cells)} |")
    lines += ["\n## Sentences\n"]
    for number, (text, where) in enumerate(notes.items(), 1):
        lines.append(f"{number}. {', '.join(dict.fromkeys(where))}: {text}")
    absent = [f"{name}: {entry['skipped']}" for name, entry in models.items() if "skipped" in entry]
    absent += [f"{name}: {entry['broken']}" for name, entry in models.items() if "broken" in entry]
    if absent:
        lines += ["\n## Not run\n", *(f"* {line}" for line in absent)]
    PAGE.write_text(_introduction(content) + "\n".join(lines) + "\n")


def _introduction(content: dict[str, Any]) -> str:
    run = {name: entry for name, entry in content["models"].items() if set(FORMS) & set(entry)}
    clean = sum(all(result[0] in ("works", "absent") for _, _, result in _results(entry)) for entry in run.values())
    rows = [
        "| form | works | not of the dense model | refused in a sentence | fails |",
        "| --- | --- | --- | --- | --- |",
    ]
    for form in FORMS:
        counts = Counter(result[0] for entry in run.values() for key, _, result in _results(entry) if key == form)
        rows.append(f"| {form} | {' | '.join(str(counts[key]) for key in ('works', 'absent', 'refused', 'fails'))} |")
    versions = "\n".join(f"| {package} | {version} |" for package, version in content["versions"].items())
    return INTRODUCTION.format(
        versions=versions,
        count=len(run),
        counts="\n".join(rows),
        outcome=f"{clean} of them pass every check.",
    )


def _results(entry: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    for form in FORMS:
        for check, result in entry.get(form, {}).items():
            yield form, check, result


def _cell(name: str, entry: dict[str, Any], checks: tuple[str, ...], notes: dict[str, list[str]]) -> str:
    results = [(form, check, result) for form, check, result in _results(entry) if check in checks]
    bad = [(form, result[1]) for form, _, result in results if result[0] in ("refused", "fails")]
    forms_of: dict[str, list[str]] = {}
    for form, text in bad:
        forms_of.setdefault(text, []).append(form)
    numbers = []
    for text, forms in forms_of.items():
        where = (
            name if len(set(forms)) == len(set(FORMS) & set(entry)) else f"{name} ({', '.join(dict.fromkeys(forms))})"
        )
        notes.setdefault(text, []).append(where)
        numbers.append(str(list(notes).index(text) + 1))
    if numbers:
        return ", ".join(numbers)
    return "yes" if any(result[0] == "works" for _, _, result in results) else "-"
