"""Every example runs at a tiny size, in a process of its own, and stays short enough to copy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import ROOT, run_script

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TINY = {
    "any_model_memory.py": ("--batch-size", "16", "--tokens", "64"),
    "causal_lm.py": ("--steps", "3"),
    "image_classification.py": ("--epochs", "1"),
    "plan_for_a_budget.py": ("--batch-size", "4", "--steps", "2"),
}
MEASURED = re.compile(r"^(.+?) +(\S+) MiB   loss (\S+)$", re.MULTILINE)


def numbers(pattern: str, text: str) -> list[float]:
    """What the groups of the only place that matches hold."""
    (match,) = re.finditer(pattern, text)
    return [float(group) for group in match.groups()]


def test_examples_are_short_scripts() -> None:
    assert sorted(TINY) == [path.name for path in EXAMPLES]
    assert {path.name for path in (ROOT / "examples").iterdir()} - {"__pycache__"} == set(TINY)
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 80, path.name


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Name, folder and text of an example that ran at a tiny size."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    return request.param.stem, folder, run_script(request.param, *TINY[request.param.name], folder=folder)


def test_examples_run(outcome: tuple[str, Path, str]) -> None:
    """What one tells of its result holds, and it writes below `outputs` only."""
    name, folder, text = outcome
    if name == "causal_lm":
        (trained,) = numbers(r"perplexity after training: (\S+)", text)
        assert numbers(r"perplexity of the saved model: (\S+)", text) == [trained]
        assert numbers(r"perplexity before training: (\S+)", text)[0] > trained
    elif name == "image_classification":
        assert numbers(r"accuracy before training: (\S+)\n", text)[0] < 1
        assert numbers(r"accuracy after training: (\S+)\n", text)[0] > 0.4
    elif name == "plan_for_a_budget":
        dense, budget = numbers(r"full fine-tuning: (\S+) MiB, budget: (\S+) MiB", text)
        estimate, measured = numbers(r"estimated at (\S+) MiB and took (\S+) MiB", text)
        assert measured == pytest.approx(estimate, rel=0.05) and measured < budget < dense
    elif name == "any_model_memory":
        rows = {title.strip(): (float(peak), float(loss)) for title, peak, loss in MEASURED.findall(text)}
        peaks, losses = zip(*rows.values(), strict=True)
        assert len(rows) == 7 and max(peaks) == rows["nothing"][0] and min(peaks) < 0.5 * max(peaks)
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert {path.name for path in folder.iterdir()} <= {"outputs"}


def test_image_classification_of_a_folder(model_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "image_classification.py"
    text = run_script(script, "--model", model_folder, "--dataset", image_folder, "--epochs", "1", folder=tmp_path)
    assert "12 layers" in text and 0 <= numbers(r"accuracy after training: (\S+)\n", text)[0] <= 1
    assert (tmp_path / "outputs" / "image_classification" / "adapter_model.safetensors").is_file()


def test_causal_lm_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("To every thing there is a season. " * 40)
    script = ROOT / "examples" / "causal_lm.py"
    text = run_script(script, "--text", "notes.txt", "--tokens", "16", "--steps", "30", folder=tmp_path)
    before, after = numbers(r"perplexity before training: (\S+)[^$]*perplexity after training: (\S+)", text)
    assert after < 0.7 * before
