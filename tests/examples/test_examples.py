"""Every example runs at a tiny size, in a process of its own, and stays short enough to copy."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
import transformers
from scripts import ROOT, run_script
from tokenizing import byte_llama, byte_tokenizer, save_byte_bert

import wasi_peft
from wasi_peft.training import federated

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
METRICS = ROOT / "examples" / "metrics"
MEASURED = re.compile(r"^(.+?) +(\S+) MiB   loss (\S+)$", re.MULTILINE)


def number(pattern: str, text: str) -> float:
    """What the group of the only place that matches holds."""
    (match,) = re.finditer(pattern, text)
    return float(match[1])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    byte_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, with a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    save_byte_bert(folder)
    return folder


@pytest.fixture(scope="module")
def segmentation_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SegFormer with its image processor's settings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("segformer")
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 16], num_encoder_blocks=2, depths=[1, 1], num_attention_heads=[2, 2], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    )  # fmt: skip
    transformers.SegformerModel(config).save_pretrained(folder)
    settings = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
    except ValueError as error:
        if "torchvision" not in str(error):
            raise
        pytest.skip("this version of transformers needs torchvision for SegFormer's image processor")
    return folder


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file with texts that their class can be told from."""
    folder = tmp_path_factory.mktemp("mails")
    rows = [f"{word} {index % 7},{label}" for index in range(40) for word, label in (("aaa", "ham"), ("zzz", "spam"))]
    (folder / "mails.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def json_folder(folder: Path, rows: list[dict[str, object]]) -> Path:
    """A folder with one file of json lines."""
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def question(text: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of chats, of which one is preferred."""
    rows = [{"chosen": question(f"say {i}", "yes"), "rejected": question(f"say {i}", "no")} for i in range(16)]
    return json_folder(tmp_path_factory.mktemp("preferences"), list(rows))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats in which the answer is always the same."""
    rows = [{"messages": question(f"say {i}", "yes, I do")} for i in range(40)]
    return json_folder(tmp_path_factory.mktemp("chats"), list(rows))


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose left half is dark, as a parquet file with the class of each pixel."""
    image_module = pytest.importorskip("PIL.Image", reason="images need Pillow")
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("maps")
    images, annotations = [], []
    for _ in range(20):
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[:, 8:] += 150
        annotation = np.zeros((16, 16), dtype=np.uint8)
        annotation[:, 8:], annotation[0] = 1, 255
        images.append(image_module.fromarray(pixels))
        annotations.append(image_module.fromarray(annotation))
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": images, "annotation": annotations}, features=features)
    table.to_parquet(folder / "maps.parquet")
    return folder


@pytest.fixture
def run(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs an example in an empty folder; it writes below `outputs` only, and nothing into the user's caches.

    In this process, where the libraries are imported already.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str | Path) -> str:
        script = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        assert {path.name for path in tmp_path.iterdir()} <= {"outputs"}
        return capsys.readouterr().out

    return run_example


def test_examples_are_short_scripts() -> None:
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 80, path.name
    tested = set(re.findall(r"def test_(\w+)\(\s*run", Path(__file__).read_text()))
    assert tested == {path.stem for path in EXAMPLES}


def test_demo(run: Callable[..., str], model_folder: Path, split_images: Path, tmp_path: Path) -> None:
    """A table in Markdown, since this is no terminal; six rows at most, those in 16 bits where they are fast."""
    text = run("demo", "--model", model_folder, "--dataset", split_images, "--steps", "2")
    rows = json.loads((tmp_path / "outputs" / "demo" / "demo.json").read_text())
    header, _, *lines = (line.strip("| ").split(" | ") for line in text.splitlines())
    assert header == list(rows[0]) == ["method", "dtype", "job, s", "peak, MiB", "accuracy, %", "to share, MiB"]
    assert [line[:2] for line in lines] == [[row["method"], row["dtype"]] for row in rows]
    assert [row["method"] for row in rows[:3]] == ["full fine-tuning", "LoRA r=16", "WASI"]
    full, lora, wasi = rows[:3]
    assert all(row["peak, MiB"] > row["to share, MiB"] > 0 and 0 <= row["accuracy, %"] <= 100 for row in rows)
    assert full["to share, MiB"] > lora["to share, MiB"]
    folder = tmp_path / "outputs" / "demo" / "WASI fp32" / "adapter_model.safetensors"
    assert wasi["to share, MiB"] == pytest.approx(folder.stat().st_size / 2**20)


def test_image_classification(run: Callable[..., str], model_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    text = run(
        "image_classification", "--model", model_folder, "--dataset", image_folder,
        "--metric", METRICS / "accuracy.py", "--epochs", "8", "--batch-size", "8", "--lr", "3e-3",
    )  # fmt: skip
    assert number(r"accuracy after training: (\S+)\n", text) > 0.6  # of three classes
    folder = tmp_path / "outputs" / "image_classification"
    assert "import wasi_peft" in (folder / "README.md").read_text()
    assert (folder / "adapter_model.safetensors").is_file()


def test_adversarial(run: Callable[..., str], model_folder: Path, image_folder: Path) -> None:
    """Classes are 80 grey levels apart: a change of 15 fools a model that was trained without, and not one with."""
    robust = {}
    for steps in (0, 3):
        text = run(
            "adversarial", "--model", model_folder, "--dataset", image_folder, "--epochs", "16", "--batch-size", "8",
            "--lr", "1e-2", "--epsilon", "15", "--attack-steps", str(steps), "--token-keep", "0.75",
        )  # fmt: skip
        clean, robust[steps] = (
            number(rf"{kind} accuracy after training: (\S+)\n", text) for kind in ("clean", "robust")
        )
        assert clean > 0.6 and robust[steps] <= clean
    assert robust[3] > robust[0] + 0.2


def test_text_classification(run: Callable[..., str], text_model: Path, mails: Path) -> None:
    text = run(
        "text_classification", "--model", text_model, "--dataset", mails, "--metric", METRICS / "accuracy.py",
        "--tokens", "32", "--epochs", "5", "--batch-size", "8", "--lr", "3e-3",
    )  # fmt: skip
    assert number(r"accuracy after training: (\S+)\n", text) > 0.8


@pytest.mark.parametrize("options", [("--packing", "--memory", "small"), ("--assistant-only", "--memory", "fast")])
def test_causal_lm(run: Callable[..., str], language_model: Path, chats: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("trl")
    text = run(
        "causal_lm", "--model", language_model, "--dataset", chats, "--steps", "30", "--tokens", "48",
        "--lr", "1e-2", "--batch-size", "8", *options,
    )  # fmt: skip
    before, after = (number(rf"perplexity {when} training: (\S+)\n", text) for when in ("before", "after"))
    assert after < 0.75 * before


def test_dpo(run: Callable[..., str], language_model: Path, preferences: Path, tmp_path: Path) -> None:
    """From a fresh adapter, whose reference is the model without it, and from a trained one, a copy of which it is."""
    pytest.importorskip("trl")
    arguments = ("--model", language_model, "--dataset", preferences, "--steps", "30", "--lr", "1e-2")
    for start in ((), ("--adapter", tmp_path / "outputs" / "dpo", "--output", "outputs/next")):
        text = run("dpo", *arguments, *start)
        assert number(r"margin at the first step: (\S+)", text) == 0
        assert number(r"margin at the last steps: (\S+)", text) > 0.05


def let_clients_fail(monkeypatch: pytest.MonkeyPatch, answers: str) -> None:
    """Has clients run out of memory in turn, those with an x."""
    fails, trained_state = iter(answers), federated.trained_state

    def answer(*given: Any) -> Any:
        if next(fails) == "x":
            raise MemoryError("no memory left")
        return trained_state(*given)

    monkeypatch.setattr(federated, "trained_state", answer)


def test_federated(
    run: Callable[..., str],
    text_model: Path,
    mails: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = ("--rounds", "4", "--steps", "4", "--batch-size", "8", "--lr", "3e-3")
    arguments = ("--model", text_model, "--dataset", mails, *steps)
    text = run("federated", *arguments)
    accuracies = [float(value) for value in re.findall(r"round \d: accuracy (\S+),", text)]
    assert len(accuracies) == 4 and accuracies[-1] > 0.8
    file, warnings = tmp_path / "outputs" / "federated" / "adapter_model.safetensors", "wasi_peft.training.federated"
    trained = file.read_bytes()
    assert not [record for record in caplog.records if record.name == warnings]
    let_clients_fail(monkeypatch, "xx..xxxx")
    with pytest.raises(RuntimeError, match="round 2: none of 4 clients has sent anything"):
        run("federated", *arguments)
    lines = [record.getMessage() for record in caplog.records if record.name == warnings]
    assert len(lines) == 6
    assert lines[:2] == [f"round 1: client {number} is left out: MemoryError: no memory left" for number in (1, 2)]
    assert file.read_bytes() != trained  # the average of the other two


def test_federated_flower(
    run: Callable[..., str], text_model: Path, mails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    arguments = ("--model", text_model, "--dataset", mails, "--rounds", "3", "--lr", "3e-3")
    text = run("federated_flower", *arguments)
    accuracies = [float(value) for value in re.findall(r"round \d: accuracy (\S+)", text)]
    assert len(accuracies) == 4 and accuracies[-1] > 0.8
    file = tmp_path / "outputs" / "federated_flower" / "adapter_model.safetensors"
    trained = file.read_bytes()
    let_clients_fail(monkeypatch, "x..xxxxx")
    with pytest.raises(RuntimeError, match="round 2: none of 4 clients has sent anything"):
        run("federated_flower", *arguments)
    assert file.read_bytes() != trained


@pytest.mark.parametrize("name", ["federated", "federated_flower"])
def test_federated_examples_name_a_missing_column(
    name: str, run: Callable[..., str], text_model: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any
) -> None:
    if name == "federated_flower":
        pytest.importorskip("flwr")
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.csv").write_text("\n".join(["text,class", *["aaa,ham", "zzz,spam"] * 4]))
    with pytest.raises(SystemExit):
        run(name, "--model", text_model, "--dataset", folder)
    assert "the dataset must have a column 'label', got text, class" in capsys.readouterr().err
    if name == "federated":
        with pytest.raises(SystemExit):
            run(name, "--model", text_model, "--dataset", folder, "--label-column", "class", "--clients", "7")
        assert "--clients must be from 1 to 6, the training texts, got 7" in capsys.readouterr().err


def test_semantic_segmentation(run: Callable[..., str], segmentation_model: Path, maps: Path) -> None:
    text = run(
        "semantic_segmentation", "--model", segmentation_model, "--dataset", maps, "--classes", "2",
        "--metric", METRICS / "mean_iou.py", "--epochs", "8", "--batch-size", "4", "--lr", "1e-2",
    )  # fmt: skip
    assert number(r"mean IoU after training: (\S+)\n", text) > 0.6


def test_fine_tune_compressed(run: Callable[..., str], language_model: Path, mails: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "compressed"
    folder.parent.mkdir()
    wasi_peft.prepare_checkpoint(str(language_model), folder, wasi_peft.WasiConfig(residual="int8"))
    text = run(
        "fine_tune_compressed", "--model", folder, "--dataset", mails, "--steps", "5", "--tokens", "16",
    )  # fmt: skip
    assert number(r"loss: (\S+)\n", text) > 0
    saved = json.loads((tmp_path / "outputs" / "fine_tune_compressed" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder)


@pytest.mark.slow
def test_plan_for_a_budget(run: Callable[..., str]) -> None:
    text = run("plan_for_a_budget", "--batch-size", "4", "--steps", "2")
    ((dense, budget),) = re.findall(r"full fine-tuning: (\S+) MiB, budget: (\S+) MiB", text)
    ((estimate, measured),) = re.findall(r"estimated at (\S+) MiB and took (\S+) MiB", text)
    assert float(measured) == pytest.approx(float(estimate), rel=0.05)
    assert float(measured) < float(budget) < float(dense)


def test_any_model_memory(run: Callable[..., str]) -> None:
    text = run("any_model_memory", "--batch-size", "16", "--tokens", "64")
    rows = {title.strip(): (float(peak), float(loss)) for title, peak, loss in MEASURED.findall(text)}
    peaks, losses = zip(*rows.values(), strict=True)
    assert len(rows) == 7 and max(peaks) == rows["nothing"][0] and min(peaks) < 0.5 * max(peaks)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def sentence(run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The sentence with which an example ends that refuses what it is given, before it trains anything."""

    def sentence_of(name: str, *arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as ended:
            run(name, *arguments)
        assert ended.value.code not in (0, None)
        return f"{capsys.readouterr().err}{ended.value.code}"

    return sentence_of


def test_columns_that_are_not_there_are_named(
    sentence: Callable[..., str], model_folder: Path, image_folder: Path, split_images: Path, text_model: Path,
    mails: Path, language_model: Path, preferences: Path, segmentation_model: Path, maps: Path,
) -> None:  # fmt: skip
    images, texts, masks = ("--dataset", image_folder), ("--dataset", mails), ("--dataset", maps)
    for name, model, options, answer in (
        ("image_classification", model_folder, (*images, "--label-column", "kind"), "column 'kind', got image, label"),
        ("image_classification", model_folder, texts, "column 'image', got text, label"),
        ("demo", model_folder, texts, "it lacks image"),
        ("text_classification", text_model, (*texts, "--text-column", "mail"), "column 'mail', got text, label"),
        ("causal_lm", language_model, ("--dataset", preferences), "'prompt' and 'completion', got chosen, rejected"),
        ("dpo", language_model, texts, "'chosen' and 'rejected', got text, label"),
        ("fine_tune_compressed", language_model, (*texts, "--text-column", "mail"), "'mail', got text, label"),
        (
            "semantic_segmentation",
            segmentation_model,
            (*masks, "--classes", "2", "--map-column", "mask"),
            "'mask', got",
        ),
    ):
        assert answer in sentence(name, "--model", model, *options), name


def test_rows_without_a_value_are_named(
    sentence: Callable[..., str], text_model: Path, language_model: Path, model_folder: Path, tmp_path: Path
) -> None:
    """A missing label would be a class of its own, in silence."""
    texts = json_folder(tmp_path / "texts", [{"text": None if i == 3 else "a b", "label": i % 2} for i in range(8)])
    labels = json_folder(tmp_path / "labels", [{"text": "a b", "label": None if i > 5 else i % 2} for i in range(8)])
    pairs = json_folder(
        tmp_path / "pairs", [{"prompt": "a", "chosen": "b", "rejected": "c" if i else None} for i in range(8)]
    )
    for name, model, data, column, row in (
        ("text_classification", text_model, texts, "text", 3), ("text_classification", text_model, labels, "label", 6),
        ("causal_lm", language_model, texts, "text", 3), ("dpo", language_model, pairs, "rejected", 0),
        ("fine_tune_compressed", language_model, texts, "text", 3),
    ):  # fmt: skip
        answer = sentence(name, "--model", model, "--dataset", data)
        assert f"the column {column!r} must have a value in every row, row {row} has none" in answer, name
    answer = sentence("image_classification", "--model", model_folder, "--dataset", labels, "--image-column", "text")
    assert "the column 'label' must have a value in every row, row 6 has none" in answer


def test_a_prompt_needs_a_completion(sentence: Callable[..., str], language_model: Path, tmp_path: Path) -> None:
    prompts = json_folder(tmp_path / "prompts", [{"prompt": "a"}] * 8)
    answer = sentence("causal_lm", "--model", language_model, "--dataset", prompts)
    assert "must have a column 'text', 'messages', or 'prompt' and 'completion', got prompt" in answer


def test_more_tokens_than_the_model_takes(
    sentence: Callable[..., str], text_model: Path, mails: Path, language_model: Path, preferences: Path
) -> None:
    for name, model, data in (
        ("text_classification", text_model, mails), ("causal_lm", language_model, mails),
        ("dpo", language_model, preferences), ("fine_tune_compressed", language_model, mails),
    ):  # fmt: skip
        answer = sentence(name, "--model", model, "--dataset", data, "--tokens", "100000")
        assert re.search(r"--tokens must be at most \d+ for this model, got 100000", answer), name


def test_a_metric_that_does_not_fit(
    sentence: Callable[..., str], model_folder: Path, image_folder: Path, text_model: Path, mails: Path,
    segmentation_model: Path, maps: Path,
) -> None:  # fmt: skip
    for name, model, data, metric in (
        ("image_classification", model_folder, image_folder, "mean_iou"),
        ("text_classification", text_model, mails, "mean_iou"),
        ("semantic_segmentation", segmentation_model, maps, "accuracy"),
    ):
        options = {"text_classification": ("--tokens", "32"), "semantic_segmentation": ("--classes", "2")}.get(
            name, ()
        )
        answer = sentence(name, "--model", model, "--dataset", data, "--metric", METRICS / f"{metric}.py", *options)
        assert re.search(rf"--metric must .*{metric}\.py answers: \w+", answer), name


def test_a_processor_of_another_size(
    model_folder: Path, image_folder: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    model = tmp_path / "outputs" / "other"
    shutil.copytree(model_folder, model)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"size \(32\*32\) doesn't match model \(16\*16\)"):
        run("image_classification", "--model", model, "--dataset", image_folder, "--metric", METRICS / "accuracy.py")


def test_what_is_trained_is_kept_when_an_image_is_none(
    model_folder: Path, image_folder: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    images = tmp_path / "outputs" / "images"
    shutil.copytree(image_folder, images)
    (images / "class1" / "7.png").write_text("no image")
    with pytest.raises(OSError, match=r"class1.7\.png"):
        run("image_classification", "--model", model_folder, "--dataset", images, "--metric", METRICS / "accuracy.py")
    assert (tmp_path / "outputs" / "image_classification" / "adapter_model.safetensors").is_file()


def test_a_map_with_a_class_too_many(sentence: Callable[..., str], segmentation_model: Path, maps: Path) -> None:
    options = ("--classes", "1", "--metric", METRICS / "mean_iou.py")
    answer = sentence("semantic_segmentation", "--model", segmentation_model, "--dataset", maps, *options)
    assert "the maps must hold numbers below --classes 1, or 255, got 1" in answer


# ------------------------------------------------------------------------------------------------------ metrics


def test_metric_scripts_count_right() -> None:
    accuracy = evaluate.load(str(METRICS / "accuracy.py"))
    assert accuracy.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    mean_iou = evaluate.load(str(METRICS / "mean_iou.py"))
    predictions, references = [[[0, 0], [1, 1]]], [[[0, 1], [1, 255]]]
    answer = mean_iou.compute(predictions=predictions, references=references, num_labels=3, ignore_index=255)
    assert answer == {"mean_iou": pytest.approx((1 / 2 + 1 / 2) / 2)}  # class 2 appears nowhere


# ------------------------------------------------------------------------------------------------------ launching


def test_two_processes_train_one_model(text_model: Path, mails: Path, tmp_path: Path) -> None:
    """`accelerate launch` on the same script."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    text = run_script(
        launch[0], *launch[1:], "--mixed_precision", "no", "--dynamo_backend", "no",
        ROOT / "examples" / "text_classification.py", "--model", text_model, "--dataset", mails,
        "--metric", METRICS / "accuracy.py", "--tokens", "32", "--epochs", "5", "--batch-size", "4", "--lr", "3e-3",
        folder=tmp_path,
    )  # fmt: skip
    accuracies = set(re.findall(r"accuracy after training: (\S+)\n", text))
    assert len(accuracies) == 1 and float(accuracies.pop()) > 0.8
