"""The page for fine-tuning an image classifier: what it does, and, with gradio and a browser, the page itself."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel
from scripts import ROOT

PAGE = ROOT / "examples" / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The page's own modules."""
    monkeypatch.syspath_prepend(str(PAGE))
    return importlib.import_module("uploads"), importlib.import_module("training")


@pytest.fixture
def archive(image_folder: Path, tmp_path: Path) -> Path:
    """A zip with a folder for each of two classes."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for path in sorted(image_folder.glob("class[02]/1*.png")):
            file.write(path, path.relative_to(image_folder))
    return tmp_path / "images.zip"


def test_the_page_is_short() -> None:
    assert all(len(path.read_text().splitlines()) < 80 for path in PAGE.glob("*.py"))


def test_fine_tuning_within_a_budget(
    modules: tuple[Any, Any], model_folder: Path, archive: Path, tmp_path: Path
) -> None:
    uploads, training = modules
    images = uploads.read_zip(archive)
    assert len(images) == 22 and {label for _, label in images} == {"class0", "class2"}
    steps = []
    rows, compared, result = training.fine_tune(
        images, str(model_folder), 500, 12, True, lambda done, desc: steps.append((desc, *done))
    )
    assert [row[0] for row in rows] == ["start", "WASI", "LoRA r=16"]
    assert rows[1][1] == "6 of 6"  # two grey levels
    assert {(answer, label) for (_, label), _, answer in compared} == {("class0", "class0"), ("class2", "class2")}
    assert steps[0] == ("WASI, step", 1, 12) and steps[-1] == ("LoRA r=16, step", 12, 12)
    shutil.unpack_archive(result, tmp_path / "adapter")
    base = transformers.AutoModelForImageClassification.from_pretrained(model_folder, num_labels=2)
    PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_what_cannot_be_learnt_from_is_refused_in_a_sentence(
    modules: tuple[Any, Any], model_folder: Path, image_folder: Path, archive: Path, tmp_path: Path
) -> None:
    uploads, training = modules
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        file.write(image_folder / "class0" / "1.png", "1.png")
    image = image_folder / "class0" / "1.png"
    for refused, sentence in (
        (lambda: uploads.read_files([image, tmp_path / "notes.png"], "cat"), "notes.png is no image"),
        (lambda: uploads.read_files([image], " "), "name of their class"),
        (lambda: uploads.read_files(None, "cat"), "Choose images"),
        (lambda: uploads.read_zip(tmp_path / "notes.png"), "notes.png is no zip"),
        (lambda: uploads.read_zip(tmp_path / "empty.zip"), "one folder for each class"),
        (lambda: uploads.read_zip(tmp_path / "flat.zip"), "one folder for each class"),
        (lambda: uploads.split([]), "Two classes are needed.*no images"),
        (lambda: uploads.split(uploads.read_files([image, image], "cat")), "Two classes are needed.*cat"),
        (lambda: uploads.split([("", "cat"), ("", "cat"), ("", "dog")]), "'dog' needs at least two images"),
    ):
        with pytest.raises(uploads.RefusedError, match=sentence):
            refused()
    images = uploads.read_zip(archive)
    with pytest.raises(uploads.RefusedError, match=r"^0 MiB are too few: the smallest step .* takes \d+ MiB"):
        training.fine_tune(images, str(model_folder), 0, 2, False, print)
    with pytest.raises(uploads.RefusedError, match="nowhere is no model"):
        training.fine_tune(images, str(tmp_path / "nowhere"), 500, 2, False, print)


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, modules: tuple[Any, Any], model_folder: Path) -> Iterator[Any]:
    """The page, opened in a browser without a window."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    monkeypatch.setenv("WASI_MODEL", str(model_folder))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    app = importlib.import_module("app")
    _, address, _ = app.page.launch(prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1500})
        tab.goto(address)
        try:
            yield tab
        finally:
            browser.close()
            app.page.close()


def test_in_a_browser(opened: Any, archive: Path, image_folder: Path, tmp_path: Path) -> None:
    """Wrong uploads are answered with a sentence and lose nothing; then images, fine-tuning, comparison, download."""
    upload_files, upload_zip = opened.locator("#files input[type=file]"), opened.locator("#zip input[type=file]")
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + bytes(18))

    def shoot(name: str) -> None:
        """For the eyes of whoever changes the page: WASI_SCREENSHOTS=FOLDER."""
        if folder := os.environ.get("WASI_SCREENSHOTS"):
            opened.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def click_and_read(button: str, sentence: str) -> None:
        opened.get_by_role("button", name=button, exact=True).click()
        opened.get_by_text(sentence).wait_for(timeout=60_000)

    opened.get_by_role("button", name="Fine-tune").wait_for(timeout=60_000)
    shoot("start")
    upload_zip.set_input_files(tmp_path / "empty.zip")
    opened.get_by_label("empty.zip").first.wait_for()
    click_and_read("Add", "one folder for each class")
    opened.get_by_label("Clear").first.click()
    opened.get_by_label("Class", exact=True).fill("class0")
    upload_files.set_input_files(sorted((image_folder / "class0").glob("*.png"))[:8])
    opened.get_by_label("11.png").first.wait_for()
    click_and_read("Add", "class0: 8")
    click_and_read("Fine-tune", "Two classes are needed")
    upload_files.set_input_files([tmp_path / "notes.png"])
    opened.get_by_label("notes.png").first.wait_for()
    click_and_read("Add", "notes.png is no image")
    shoot("refused")
    opened.get_by_label("Clear").first.click()
    upload_zip.set_input_files(archive)
    opened.get_by_label("images.zip").first.wait_for()
    click_and_read("Add", "class0: 19, class2: 11")  # the eight are still there
    click_and_read("Fine-tune", "Done.")
    assert opened.get_by_text("start: class").count() > 0
    shoot("done")
    with opened.expect_download() as download:
        opened.get_by_role("button", name="Download the adapter").click()
    download.value.save_as(tmp_path / "adapter.zip")
    names = zipfile.ZipFile(io.BytesIO((tmp_path / "adapter.zip").read_bytes())).namelist()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
