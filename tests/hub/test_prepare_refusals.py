"""What cannot be prepared is refused in one sentence, before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor

from wasi_peft import WasiConfig, WasiPlan, prepare_checkpoint
from wasi_peft.hub.checkpoint import DenseCheckpoint
from wasi_peft.ranks.plan import LayerPlan

FACTORS = {"config": WasiConfig(weight_share=0.6)}


def refused(dense: Path, output: Path, message: str, **options: Any) -> None:
    """The error says so, in one line, and nothing new is there."""
    before = sorted(os.listdir(output.parent)) if output.parent.is_dir() else None
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare_checkpoint(dense, output, **{"progress_bar": False, **options})
    assert "\n" not in str(caught.value)
    assert before is None or sorted(os.listdir(output.parent)) == before


def saved(name: str, folder: Path, **options: Any) -> Path:
    ARCHITECTURES[name].model().save_pretrained(folder, **options)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- checkpoints

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def shorten(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def broken_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def claim(**entry: Any) -> Callable[[Path], None]:
    """The header says something else of a tensor; the file stays as large as it is."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header[NORM].update(entry)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return damage


def long_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def indexed(weight_map: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        whole = dict.fromkeys(load_file(folder / "shard.safetensors"), "shard.safetensors")
        changed = {**whole, **weight_map} if isinstance(weight_map, dict) else weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": changed}))

    return damage


def rewritten(**changes: Callable[[Tensor], Tensor] | Tensor | None) -> Callable[[Path], None]:
    """Other tensors in a whole file, by name with underscores for dots; None for one less."""
    names = {"norm": NORM, "up": UP, "more": "model.more", "twin": "norm.weight"}

    def damage(folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for short, value in changes.items():
                if value is None:
                    del tensors[names[short]]
                else:
                    tensors[names[short]] = value(tensors[names[short]]) if callable(value) else value

        rewrite(folder, change)

    return damage


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: settings(folder, **changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


FLOATS = "dtype F64 or F32 or F16 or BF16 .*got"
TINY = {"input_ids": torch.ones(1, 3).long()}
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shorter than its header says": (shorten, "model.safetensors: the file is damaged or no safetensors file"),
    "a header that claims more": (claim(shape=[2**40], data_offsets=[0, 2**42]), "the file is damaged"),
    "a header as long as no file": (long_header, "the file is damaged"),
    "a configuration that claims more": (
        configured(hidden_size=2**40),
        r"must be of shape \(23, 1099511627776\).*got \(23, 16\) and F32",
    ),
    "a configuration that nothing can be": (
        configured(hidden_size=2**40, intermediate_size=2**40),
        "configuration must be one of which a model can be made, got Storage size calculation overflowed",
    ),
    "another shape": (rewritten(norm=torch.ones(15)), r"norm.weight: must be of shape \(16,\) .*got \(15,\) and F32"),
    "8-bit floats": (rewritten(norm=lambda norm: norm.to(torch.float8_e4m3fn)), f"{FLOATS} .*F8_E4M3"),
    "integers": (rewritten(up=lambda up: up.to(torch.int32)), f"{FLOATS} .*I32"),
    "a missing tensor": (rewritten(up=None), "up_proj.weight: the checkpoint must hold every tensor of the model"),
    "a tensor under two names": (rewritten(twin=torch.ones(16)), "norm.weight: a checkpoint must hold a tensor once"),
    "pickled weights": (pickled, "must be in model.safetensors or indexed shards of it, got only pytorch_model.bin"),
    "no weights": (without("model.safetensors"), "must be in model.safetensors .*got none"),
    "no configuration": (without("config.json"), "a checkpoint must have a config.json, got none"),
    "a configuration that is no JSON": (broken_config("{"), r"config\.json: must be a JSON file: Expecting"),
    "a configuration that is no object": (broken_config("[]"), r"config\.json: must hold a JSON object, got list"),
    "a shard elsewhere": (indexed({NORM: "../a.safetensors"}), "file of the same folder, got '../a.safetensors'"),
    "a pickled shard": (indexed({NORM: "shard.bin"}), "must be a safetensors file .*, got 'shard.bin'"),
    "a shard that is not there": (indexed({NORM: "b.safetensors"}), "names 'b.safetensors', which does not exist"),
    "an index of more than there is": (
        indexed({"model.more": "shard.safetensors"}),
        "model.more: must be in shard.safetensors .*it is not there",
    ),
    "an index of nothing": (indexed([]), "'weight_map' must be an object"),
    "no architecture": (configured(architectures=None), "must name one architecture of transformers, got None"),
    "no known architecture": (configured(architectures=["Other"]), r"must name one architecture .*got \['Other'\]"),
    "no model": (configured(architectures=["AutoConfig"]), "must name one architecture of transformers"),
    "no blocks": (configured(num_hidden_layers=0), "the model must have transformer blocks"),
    "quantized weights": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        "must be dense, got one that is quantized by 'gptq'",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoints(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, message = CHECKPOINTS[case]
    damage(saved("llama", tmp_path / "dense"))
    monkeypatch.setattr(DenseCheckpoint, "read", lambda self, name: pytest.fail("a tensor was read"))
    refused(tmp_path / "dense", tmp_path / "small", message)


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    dense = saved("llama_tied", tmp_path / "dense")
    rewrite(dense, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    output = prepare_checkpoint(dense, tmp_path / "equal", progress_bar=False)
    assert output.is_dir()
    rewrite(dense, lambda t: t["lm_head.weight"].add_(1))
    refused(dense, tmp_path / "small", "lm_head.weight: is tied to model.embed_tokens.weight, so they must be equal")


FIRST = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
EXPERTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one is missing": (
        lambda t: [t.pop(FIRST.format(1).replace("w1", w)) for w in ("w1", "w2", "w3")],
        "must be of shape",
    ),
    "half of one is missing": (lambda t: t.pop(FIRST.format(1)), "transformers must make it of 3 tensors"),
    "one has another shape": (
        lambda t: t.update({FIRST.format(1): torch.zeros(24, 8)}),
        r"experts\.gate_up_proj: transformers must make it of 4 tensors .*, which do not fit together",
    ),
    "one is of integers": (
        lambda t: t.update({FIRST.format(1): torch.zeros(24, 16).int()}),
        "dtype F64 or .* and I32",
    ),
    "both ways": (
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(2, 16, 24)}),
        "a checkpoint must hold a tensor once",
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_that_cannot_be_put_together(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tf.MixtralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    damage, message = EXPERTS[case]
    rewrite(tmp_path / "dense", damage)
    monkeypatch.setattr(DenseCheckpoint, "read", lambda self, name: pytest.fail("a tensor was read"))
    refused(tmp_path / "dense", tmp_path / "small", message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_cannot_be_rounded(value: float, tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    rewrite(dense, lambda t: t[UP].fill_(value))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: "):
        prepare_checkpoint(dense, tmp_path / "small", WasiConfig(residual="int4"), progress_bar=False)
    assert not (tmp_path / "small").exists()


def test_a_prepared_checkpoint_is_not_prepared_again(tmp_path: Path) -> None:
    small = prepare_checkpoint(saved("llama", tmp_path / "dense"), tmp_path / "small", progress_bar=False)
    refused(small, tmp_path / "smaller", "must be dense, got one that is quantized by 'wasi'")


def test_paths_and_ids(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source in (tmp_path / "none", tmp_path / "file", "./none", "a/b/c"):
        refused(source, tmp_path / "small", "the model must be a folder or a hub id, got")
    refused("nobody/nothing", tmp_path / "small", "'nobody/nothing' is no folder, and cannot be had from the hub")


# ---------------------------------------------------------------- arguments


def batch() -> dict[str, Tensor]:
    return ARCHITECTURES["llama"].batch(2)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "exact": ({"config": WasiConfig(residual="exact")}, "residual='exact' keeps the dense weights"),
    "loss": ({"gradients": "loss"}, "gradients must be 'features' or None, got 'loss'"),
    "factors without data": (FACTORS, "factors in the weights' place are prepared from data, got none"),
    "a function": ({"data": lambda: None}, "data must be batches.*got a function"),
    "an iterator": ({"data": iter([])}, "must allow several iterations"),
    "no data": ({"data": []}, "must hold at least one batch, got none"),
    "no batches": ({"data": [{}], "max_batches": 0}, "max_batches must be at least 1, got 0"),
    "an empty batch": ({"data": [{}]}, "a batch must hold at least one tensor"),
    "labels alone": ({"data": [{"labels": torch.ones(2)}]}, "a batch must hold model inputs"),
    "no target": ({"config": WasiConfig(target_modules=["other"])}, "target_modules must match at least one module"),
    "a target outside of blocks": (
        {"config": WasiConfig(target_modules=["lm_head"]), "data": [TINY]},
        "lm_head: .*must be in transformer blocks",
    ),
    "too large a rank": (
        {"config": WasiConfig(weight_rank=17), "data": [TINY]},
        "the rank must be at most .* 16, got 17",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case: str, tmp_path: Path) -> None:
    options, message = ARGUMENTS[case]
    refused(saved("llama", tmp_path / "dense"), tmp_path / "small", message, **options)


def planned(*forms: str) -> WasiConfig:
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    layers = (LayerPlan(name, 24, 16, 2, None, 0.9, form) for name, form in zip(names, forms, strict=True))
    return WasiConfig(plan=WasiPlan(tuple(layers), update="factor"))


def test_plans(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    message = "a plan must make all its layers factors, or none, to be prepared block by block"
    refused(dense, tmp_path / "small", message, config=planned("int8", "factors"), data=[batch()])
    for forms in (("int8", "int4"), ("factors", "factors"), ("int4", "exact")):
        output = prepare_checkpoint(dense, tmp_path / "-".join(forms), planned(*forms), [batch()], progress_bar=False)
        layers = json.loads((output / "config.json").read_text())["quantization_config"]["layers"]
        assert [entry["form"] for entry in layers.values()] == [form for form in forms if form != "exact"]


def test_a_tied_target(tmp_path: Path) -> None:
    config = WasiConfig(target_modules=["lm_head"])
    refused(saved("llama_tied", tmp_path / "dense"), tmp_path / "small", "lm_head: its weight is tied", config=config)


def test_outputs_that_are_there(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    refused(
        dense,
        tmp_path / "folder",
        "the output must not exist yet; one that exists needs overwrite=True, or --overwrite",
    )
    refused(dense, tmp_path / "file", "the output must not exist yet; it is no folder", overwrite=True)
    refused(dense, tmp_path / "link", "the output must not exist yet", overwrite=True)
    refused(dense, tmp_path / "none" / "small", "the folder in which it is to be must exist")


@pytest.mark.parametrize(
    ("name", "message"), [("swin", "each once, got 2 chains"), ("t5", "and no other tensor, got 2")]
)
@pytest.mark.parametrize("options", [{}, FACTORS])
def test_models_whose_blocks_do_not_run_alone(
    name: str, message: str, options: dict[str, Any], tmp_path: Path
) -> None:
    dense = saved(name, tmp_path / "dense")
    refused(dense, tmp_path / "small", message, data=[ARCHITECTURES[name].batch()], **options)


def test_hidden_states_that_are_not_finite(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    rewrite(dense, lambda t: t["model.embed_tokens.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"q_proj: its input holds NaN or Inf on the calibration data"):
        prepare_checkpoint(dense, tmp_path / "small", data=[batch()], progress_bar=False)


def test_the_dense_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].model().save_pretrained(tmp_path / "dense")
    before = {each.name: each.read_bytes() for each in (tmp_path / "dense").iterdir()}
    with pytest.raises(ValueError, match="the output must be another folder than the dense checkpoint"):
        prepare_checkpoint(tmp_path / "dense", tmp_path / "dense", overwrite=True)
    assert {each.name: each.read_bytes() for each in (tmp_path / "dense").iterdir()} == before
    with pytest.raises(TypeError, match="config must be a WasiConfig, got str"):
        prepare_checkpoint(tmp_path / "dense", tmp_path / "small", "int8")
