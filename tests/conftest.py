"""Settings for all tests: small tensors on few threads, fixed seeds, no hub, quiet libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from models import ARCHITECTURES, Architecture

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """Do not report the advice against a plain SVD, which tiny random models need not follow."""
    config.addinivalue_line("filterwarnings", "ignore:The initial factors come from a plain truncated SVD")


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
