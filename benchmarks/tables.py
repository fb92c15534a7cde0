"""The tables of README and docs/benchmarks, written from the JSON files there, so that no figure is copied by hand.

A page has a comment `<!-- table: NAME -->` where a table is to stand; the table that follows it is replaced::

    python benchmarks/tables.py
"""

import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import finetune_accuracy
import finetune_perplexity
import inference_time
import steps
import whole_job
from common import RESULTS_FOLDER, read_json
from runs import DTYPES, chosen_runs, group_of, mean_and_spread, runs_of
from workloads import MIB

MARKED = re.compile(r"(?<=^<!-- table: )([\w ]+)( -->\n)((?:\n?\|.*\n)*)", flags=re.MULTILINE)
PAGES = [Path(__file__).parents[1] / "README.md", *sorted(RESULTS_FOLDER.glob("*.md"))]
IMAGES = {"train": 6000, "validation": 2000, "test": 10_000, "epochs": 3.0}
REPAIRED = {"calibration_images": 512, "repair_steps": 400, **IMAGES}
PRECISIONS = {"": None, ", bf16": "bfloat16"}
AT_LORA_RATE = "residual, K = 16, at LoRA's rate"


def load(name: str) -> dict[str, Any]:
    """The content of a result file."""
    return read_json(RESULTS_FOLDER / f"{name}.json")


def markdown(rows: list[list[str]]) -> str:
    """Formats rows, the first of them titles, as a Markdown table."""
    titles, *others = rows
    lines = [titles, len(titles) * ["---"], *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def step_table(file: str, workload: str) -> str:
    """Peaks and times of one workload's steps."""
    return steps.table(load(file)[workload]["results"]) + "\n"


def job_table(model: str, heap: str | None) -> str:
    """Whole jobs of a model in a heap, in rows of a method each."""
    entries = load("whole_job")
    jobs = [entry["settings"] for entry in entries.values()]
    jobs = [job for job in jobs if (job["model"], job.get("heap")) == (model, heap)]
    jobs.sort(key=lambda job: (DTYPES.index(job["dtype"]), [*whole_job.METHODS, whole_job.IDLE].index(job["method"])))
    return whole_job.summary(entries, jobs) + "\n"


def inference_table() -> str:
    """Milliseconds of every variant and case, and how many times as fast as the dense model in float32."""
    content, cases = load("inference_time"), list(inference_time.CASES)
    names = dict.fromkeys(name for case in cases for name in content[case]["results"])
    rows = [["", *cases]]
    for name in names:
        cells = []
        for case in cases:
            entry = content[case]["results"].get(name)
            milliseconds = 1000 * statistics.median(entry["seconds"]) if entry else 0.0
            cells.append(f"{milliseconds:.0f} ms, {entry['faster_than_dense']:.2f}x" if entry else "-")
        rows.append([name, *cells])
    return markdown(rows)


def accuracy_runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the table of accuracy: what they are called, and their settings, with a rate where it is no choice."""
    for suffix, dtype in PRECISIONS.items():
        own = {"dtype": dtype, **IMAGES}
        yield f"full fine-tuning{suffix}", {"method": "full", **own}
        yield f"LoRA r=16{suffix}", {"method": "lora", **own}
        yield f"residual, K = 32{suffix}", {"method": "residual", **own}
        yield f"residual, K = 16{suffix}", {"method": "residual", "wasi": {"weight_rank": 16}, **own}
    yield AT_LORA_RATE, {"method": "residual", "wasi": {"weight_rank": 16}, **IMAGES, "lr": 5e-4}
    for title, options in {
        "factors, 40 %": {"update": "frozen_basis"},
        'the same, `update="core"`': {"update": "core"},
        'the same, `update="low_rank"`': {"update": "low_rank"},
        'the same, "fast"': {"memory_mode": "fast", "update": "low_rank"},
        'the same, "small"': {"memory_mode": "small", "update": "low_rank"},
    }.items():
        yield (
            title,
            {"method": "wasi", "wasi": {"activation_threshold": None, **options}, "target_share": 0.4, **REPAIRED},
        )


def runs_at(entries: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs by seed, at the rate that settings name, or else at the best."""
    if "lr" not in settings:
        return chosen_runs(entries, group_of(settings), finetune_accuracy.JUDGED)
    return [run for run in runs_of(entries, group_of(settings)) if run["settings"]["lr"] == settings["lr"]]


def accuracy_table() -> str:
    """Accuracy of full fine-tuning, LoRA and both forms, each at the best of its rates."""
    entries, scores = load("finetune_accuracy"), finetune_accuracy.JUDGED
    rows = [["", "rate", "seeds", "trained parameters", "held-out accuracy", "test accuracy"]]
    for title, settings in accuracy_runs():
        found = runs_at(entries, settings)
        cells = [title, f"{found[0]['settings']['lr']:g}", str(len(found))]
        cells.append(f"{found[0]['trainable_parameters'] / 1e6:.2f} M")
        cells += [mean_and_spread([run[field] for run in found]) for field in (scores.held_out, scores.test)]
        rows.append(cells)
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------------------
# What the README shows of them
# ---------------------------------------------------------------------------------------------------------------------


def both(row: str, cell: Callable[[str], str]) -> str:
    """A cell in float32 and, in brackets, in bf16."""
    return f"{cell(row)} ({cell(f'{row}, bf16')})"


def language_model_table() -> str:
    """Perplexity of SmolLM2 after training, peak and time of a step."""
    runs, results = load("finetune_perplexity"), load("steps_residual")["smollm2"]["results"]
    sizes = {"steps": 40, "batch_size": 8}
    rows = [["", "perplexity", "peak of a step, MiB", "step, s"]]
    for title, row, settings in (
        ("full fine-tuning", "full", {"method": "full", **sizes}),
        ("LoRA r=16", "lora", {"method": "lora", **sizes}),
        ("LoRA, gradient checkpointing", "lora, checkpointing", None),
        ("WASI", "residual exact", {"method": "residual", "memory_mode": "exact", **sizes}),
        ('WASI, `vocabulary="int8"`', "residual vocabulary exact", None),
        ('WASI, `memory_mode="small"`', "residual small", None),
        ("WASI, both", "residual vocabulary small", None),
    ):
        found = chosen_runs(runs, group_of(settings), finetune_perplexity.JUDGED) if settings else []
        quality = mean_and_spread([run["perplexity"] for run in found], digits=2) if found else ""
        peaks = both(row, lambda name: f"{results[name]['peak_bytes'] / MIB:.0f}")
        times = both(row, lambda name: f"{statistics.median(results[name]['step_seconds']):.2f}")
        rows.append([title, quality, peaks, times])
    return markdown(rows)


def vision_table() -> str:
    """Accuracy of DINOv2-small after training, peak and time of a step."""
    runs, results = load("finetune_accuracy"), load("steps")["dinov2_56px"]["results"]
    settings = dict(accuracy_runs())
    rows = [["", "accuracy", "peak of a step, MiB", "step"]]
    for title, row, run in (
        ("full fine-tuning", "full", "full fine-tuning"),
        ("LoRA r=16", "lora", "LoRA r=16"),
        ("WASI, K = 32 (the default)", "residual exact", "residual, K = 32"),
        ("WASI, K = 16, at LoRA's rate", "residual 16 exact", AT_LORA_RATE),
        ("WASI, factors with 40 % of the weights", "wasi exact", "factors, 40 %"),
        ('the same, `update="core"`', "wasi core exact", 'the same, `update="core"`'),
    ):
        found = runs_at(runs, settings[run])
        quality = mean_and_spread([one[finetune_accuracy.JUDGED.test] for one in found])
        speed = results[row]["step_speedup"]["full"]
        rows.append([title, quality, f"{results[row]['peak_bytes'] / MIB:.0f}", f"{speed:.2f}x"])
    return markdown(rows)


def jobs_table() -> str:
    """Wall time and peak of whole jobs, both models."""
    entries = load("whole_job").values()
    rows = [["", "SmolLM2, s", "peak, MiB", "DINOv2-small, s", "peak, MiB"]]
    for title, method in (
        ("full fine-tuning", "full"),
        ("LoRA r=16", whole_job.LORA),
        ("LoRA, gradient checkpointing", whole_job.CHECKPOINTED),
        ("WASI", "residual exact"),
        ('WASI, `memory_mode="small"`', "residual small"),
        ("WASI, K = 16", "residual 16 exact"),
        ('WASI, K = 16, "small"', "residual 16 small"),
        ('WASI, `vocabulary="int8"`', "residual vocabulary exact"),
        ('WASI, `vocabulary="int8"`, "small"', "residual vocabulary small"),
    ):
        cells = [title]
        for model in ("smollm2", "dinov2"):
            own = [
                entry for entry in entries if entry["settings"]["model"] == model and not entry["settings"].get("heap")
            ]
            (idle,) = (entry["peak_bytes"] for entry in own if entry["settings"]["method"] == whole_job.IDLE)
            found = {e["settings"]["dtype"]: e for e in own if e["settings"]["method"] == method}
            pair = [found[dtype] for dtype in DTYPES if dtype in found]
            for numbers in (
                [entry["wall_seconds"] for entry in pair],
                [(entry["peak_bytes"] - idle) / MIB for entry in pair],
            ):
                cells.append(" (".join(f"{number:.0f}" for number in numbers) + ")" * (len(numbers) > 1))
        rows.append(cells)
    return markdown(rows)


TABLES: dict[str, Callable[[], str]] = {
    "a language model": language_model_table,
    "a vision transformer": vision_table,
    "jobs": jobs_table,
    "accuracy": accuracy_table,
    "steps of SmolLM2": lambda: step_table("steps_residual", "smollm2"),
    "steps of SmolLM2 as factors": lambda: step_table("steps", "smollm2"),
    "steps of DINOv2": lambda: step_table("steps", "dinov2"),
    "steps of DINOv2 by update": lambda: step_table("steps", "dinov2_56px"),
    "steps of ViT B 32": lambda: step_table("steps", "vit_b32"),
    "jobs of SmolLM2": lambda: job_table("smollm2", None),
    "jobs of SmolLM2 in a lean heap": lambda: job_table("smollm2", "lean, kept"),
    "jobs of DINOv2": lambda: job_table("dinov2", None),
    "jobs of DINOv2 in a lean heap": lambda: job_table("dinov2", "lean, kept"),
    "inference": inference_table,
}


def with_tables(text: str) -> str:
    """A page with its tables as the JSON files have them."""
    return MARKED.sub(lambda found: f"{found[1]}{found[2]}\n{TABLES[found[1]]()}", text)


def main() -> None:
    """Rewrites the pages that have tables."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
