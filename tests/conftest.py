"""Settings for all tests: small tensors on few threads, fixed seeds, no hub, quiet libraries."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from models import ARCHITECTURES, Architecture
from scripts import BENCHMARKS

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """Do not report the advice against a plain SVD, which tiny random models need not follow."""
    config.addinivalue_line("filterwarnings", "ignore:The initial factors come from a plain truncated SVD")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what uses transformers' own adapter methods where they ask for a newer PEFT than there is (5.24 does)."""
    try:
        return (yield)
    except ValueError as error:
        if "The version of PEFT you are using is not compatible" in str(error):
            pytest.skip(f"transformers {transformers.__version__}: {error}")
        raise


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Collecting and listing objects need not visit all imported libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Each of the tiny architectures in turn."""
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with its image processor's settings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<class>/*.png`, of noise around a grey level that tells the class."""
    image_module = pytest.importorskip("PIL.Image", reason="folders of images need Pillow")
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        (folder / f"class{label}").mkdir()
        for index in range(20):
            pixels = torch.randint(30, (20, 18, 3), generator=generator) + 80 * label
            image_module.fromarray(pixels.byte().numpy()).save(folder / f"class{label}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def split_images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as `train/<class>/*.png` and `test/<class>/*.png`."""
    folder = tmp_path_factory.mktemp("split")
    for path in sorted(image_folder.rglob("*.png")):
        part = folder / ("test" if int(path.stem) % 5 == 0 else "train") / path.parent.name
        part.mkdir(parents=True, exist_ok=True)
        (part / path.name).hardlink_to(path)
    return folder


@pytest.fixture(autouse=True)
def importable_benchmarks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of benchmarks, what `python benchmarks/NAME.py` does for its own imports."""
    if request.path.parent.name == "benchmarks":
        monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tiny_llama() -> Callable[[], transformers.LlamaForCausalLM]:
    """Makes a small language model, the same each time."""

    def make() -> transformers.LlamaForCausalLM:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=500,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return make
