"""Finished training runs: what they are called, which learning rate was best on held-out data, tables of them.

A run is an entry of a JSON file, `{"settings": {...}, scores...}`. Its name is made of its settings; None and {} are
left out, so a new setting whose default is None renames no entry.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import add_entry, cache_dir, read_json

Settings = dict[str, Any]
Entries = dict[str, Any]
DTYPES = ("float32", "bfloat16")
BEST = "best"
PARAMETERS = "float32"  # of --frozen-dtype: WasiConfig(frozen_dtype=None)


@dataclass(frozen=True)
class Scores:
    """What entries are judged by.

    Attributes:
        held_out: Field by which learning rates are chosen.
        test: Field that is reported.
        best: `max` or `min`, of held-out scores.
    """

    held_out: str
    test: str
    best: Callable[..., Any] = max


def key_of(settings: Settings) -> str:
    """Returns the name of a run's entry: all that its result depends on."""
    return " ".join(
        f"{name}={json.dumps(value, sort_keys=True) if isinstance(value, dict) else value}"
        for name, value in settings.items()
        if value not in (None, {})
    )


def group_of(settings: Settings) -> str:
    """Returns what runs share that differ in learning rates and seed only."""
    return key_of({name: value for name, value in settings.items() if name not in ("lr", "head_lr", "seed")})


def rates_of(entry: dict[str, Any]) -> tuple[float, float | None]:
    """Returns the learning rates of a run: of what is adapted, and of the head if it has one of its own."""
    return entry["settings"]["lr"], entry["settings"].get("head_lr")


def runs_of(entries: Entries, group: str) -> list[dict[str, Any]]:
    """Returns the runs of a group, by seed."""
    found = [entry for entry in entries.values() if group_of(entry["settings"]) == group]
    return sorted(found, key=lambda entry: entry["settings"]["seed"])


def best_rates(entries: Entries, group: str, scores: Scores) -> tuple[float, float | None]:
    """Returns the learning rates of a group's seed-0 run that is best on held-out data.

    Raises:
        ValueError: If the group has no such run yet.
    """
    runs = [entry for entry in runs_of(entries, group) if entry["settings"]["seed"] == 0]
    if not runs:
        raise ValueError(f"--lr best needs finished runs with --seed 0 of: {group}")
    return rates_of(scores.best(runs, key=lambda entry: entry[scores.held_out]))


def chosen_runs(entries: Entries, group: str, scores: Scores) -> list[dict[str, Any]]:
    """Returns a group's runs, by seed, at the learning rates that are best on held-out data.

    Raises:
        ValueError: If the group has no run with seed 0 yet.
    """
    rates = best_rates(entries, group, scores)
    return [entry for entry in runs_of(entries, group) if rates_of(entry) == rates]


def mean_and_spread(values: list[float], sign: str = "", digits: int = 4) -> str:
    """Formats a mean, with the sample standard deviation if there are several values."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def comparison(entries: Entries, asked: Iterable[Settings], scores: Scores, columns: tuple[str, ...] = ()) -> str:
    """Formats a table of the groups asked for, the best learning rate of each: what a README shows.

    A group's row names what its settings have that not all rows share.

    Args:
        entries: Finished runs.
        asked: Settings, learning rates and seed left open; those without a finished run with seed 0 are left out.
        scores: How rates are chosen and what is reported.
        columns: Further fields, of which mean and spread are shown, of the runs that have them.
    """
    rows: list[tuple[Settings, list[dict[str, Any]], int]] = []
    for group in dict.fromkeys(group_of(settings) for settings in asked):
        try:
            runs = chosen_runs(entries, group, scores)
        except ValueError:
            continue
        tried = {rates_of(entry) for entry in runs_of(entries, group) if entry["settings"]["seed"] == 0}
        rows.append((runs[0]["settings"], runs, len(tried)))
    shared = {
        name for name in {name for row in rows for name in row[0]} if len({str(r[0].get(name)) for r in rows}) == 1
    }
    fields = (scores.held_out, scores.test, *columns)
    titles = ["run", "best rate (of)", "seeds", *(field.replace("_", " ") for field in fields)]
    lines = [f"| {' | '.join(titles)} |", f"|{len(titles) * ' --- |'}"]
    for settings, runs, tried in rows:
        own = {name: value for name, value in settings.items() if name == "method" or name not in shared}
        rate = f"{runs[0]['settings']['lr']:g} ({tried})"
        seeds = str(len({entry["settings"]["seed"] for entry in runs}))
        cells = [group_of(own).removeprefix("method="), rate, seeds]
        known = [[entry[field] for entry in runs if field in entry] for field in fields]
        cells += [mean_and_spread(values) if values else "-" for values in known]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_missing(
    settings: Settings,
    plan: Iterable[tuple[str | float, int]],
    results: Path,
    scores: Scores,
    run: Callable[[Settings], dict[str, Any]],
    head_lr: float | None = None,
) -> None:
    """Does the runs of one group that are not done yet, and stores each when it is finished.

    Args:
        settings: Of the group; learning rates and seed are added behind them.
        plan: Pairs of a learning rate, or "best", and a seed, in this order.
        results: The JSON file.
        scores: How "best" is chosen.
        run: Trains and evaluates; returns the entry.
        head_lr: Learning rate of the head, where it is not "best"; None for that of the rest.
    """
    for rate, seed in plan:
        entries = read_json(results)
        rates = best_rates(entries, group_of(settings), scores) if rate == BEST else (float(rate), head_lr)
        full = {**settings, "lr": rates[0], "head_lr": rates[1], "seed": seed}
        key = key_of(full)
        if key in entries:
            print(f"finished before: {key}", flush=True)
            continue
        print(f"running: {key}", flush=True)
        entry = run(full)
        add_entry(results, key, entry, lock=cache_dir() / f"{results.name}.lock")
        print(f"held-out {entry[scores.held_out]:.4f}, test {entry[scores.test]:.4f}: {key}", flush=True)


def plan_of(args: argparse.Namespace, grid: Iterable[float], repeats: int = 3) -> list[tuple[str | float, int]]:
    """Returns learning rates and seeds: those given, else the grid with seed 0 and then the best with others."""
    seeds = args.seed or ([0] if args.lr else range(repeats))
    return [(rate, seed) for seed in seeds for rate in args.lr or (list(grid) if seed == 0 else [BEST])]


def add_plan_arguments(parser: argparse.ArgumentParser, results: Path, threads: int) -> None:
    """Adds the options of every script of runs: which ones, and where they go.

    Args:
        parser: The script's.
        results: Its JSON file.
        threads: By default.
    """
    add = parser.add_argument
    add("--lr", nargs="+", help="learning rates, or best: that of the finished runs of seed 0 (default: GRID, best)")
    add("--seed", type=int, nargs="+", help="seeds (default: 0 with --lr, else 0, 1 and 2; 0 must come first)")
    add("--threads", type=int, default=threads)
    add("--results", type=Path, default=results, help="the JSON file")
    add("--summarise", action="store_true", help="run nothing, print mean and spread of the finished runs")


def add_run_arguments(parser: argparse.ArgumentParser, results: Path, threads: int) -> None:
    """Adds these and what is to be known of the residual form and the precision."""
    from wasi_peft.forms.frozen import FROZEN
    from wasi_peft.forms.residual import RESIDUALS

    add_plan_arguments(parser, results, threads)
    add = parser.add_argument
    add("--residual", nargs="+", choices=RESIDUALS, default=["int8"], help="residual: how the frozen weight is kept")
    add("--rank", type=int, nargs="+", default=[None], help="residual: K (default: that of WasiConfig)")
    add("--prepare", type=int, default=0, help="residual: calibration batches; 0: the adapter alone, no preparation")
    add(
        "--frozen-dtype",
        nargs="+",
        choices=(*FROZEN, PARAMETERS),
        default=[PARAMETERS],
        help="wasi: how factors that do not train are stored, at the same bytes (float32: as what trains)",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="bfloat16: autocast, in training and testing")
    add("--base-dtype", choices=DTYPES, default="float32", help="bfloat16: the model is loaded in it (with autocast)")


def updates_for(method: str, asked: list[str] | None) -> list[str | None]:
    """Returns the updates asked for that a method can train by, [None] where there are none of them."""
    from wasi_peft.updates import UPDATES

    beside = method == "residual"
    able = [
        name for name in asked or () if (UPDATES[name].takes_residual if beside else not UPDATES[name].needs_residual)
    ]
    return able or [None]


def residual_options(kind: str, rank: int | None, update: str | None, mode: str | None = None) -> dict[str, Any]:
    """Returns fields of `WasiConfig` of the method "residual", those that differ from the defaults."""
    given = {"residual": kind, "weight_rank": rank, "update": update, "memory_mode": mode}
    defaults = {"residual": "int8", "weight_rank": None, "update": "addition", "memory_mode": "exact"}
    return {name: value for name, value in given.items() if value not in (None, defaults[name])}


def precision(dtype: str, base_dtype: str) -> Settings:
    """Returns the settings of a run's precision: None is float32.

    Raises:
        ValueError: If the base alone is in bfloat16.
    """
    if base_dtype == "bfloat16" and dtype == "float32":
        raise ValueError("--base-dtype bfloat16 needs --dtype bfloat16, got --dtype float32")
    return {"dtype": unless_float32(dtype), "base_dtype": unless_float32(base_dtype)}


def unless_float32(dtype: str) -> str | None:
    """Returns a dtype as settings name it: None is float32."""
    return None if dtype == "float32" else dtype
