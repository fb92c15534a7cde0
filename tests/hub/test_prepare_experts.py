"""Checkpoints of packed experts prepared block by block: they are those of the preparation in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from expert_models import FAMILIES, experts_model, run_by, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wasi_peft import WasiConfig, compress, measure_peak_memory, prepare_checkpoint
from wasi_peft.factors.expert_factors import prepare_experts
from wasi_peft.forms.compressed_stack import CompressedStack
from wasi_peft.hub.checkpoint import DenseCheckpoint, stored_tensors_of
from wasi_peft.hub.conversion import Conversion, ConvertedTensor

pytestmark = pytest.mark.usefixtures("exact_products")

BATCHES = [{"input_ids": tokens(4, 8)}, {"input_ids": tokens(4, 8).flip(1)}]
FACTORS: dict[str, dict[str, Any]] = {
    "a rank": {"residual": None, "weight_rank": 3, "update": "factor"},
    "a share": {"weight_share": 0.6},
    "a threshold": {"residual": None, "explained_variance_threshold": 0.7, "update": "factor"},
}


def saved(family: str, folder: Path, packed: bool = False) -> type[nn.Module]:
    """Save a tiny model, as its checkpoints are or with packed tensors."""
    model: Any = experts_model(family, torch.float32)
    if packed:
        model._weight_conversions = []
    model.save_pretrained(folder)
    assert packed or family in ("gpt_oss", "llama4") or any(".experts.1." in key for key in stored_keys(folder))
    return type(model)


def stored_keys(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def prepared(*arguments: Any, **options: Any) -> Path:
    return prepare_checkpoint(*arguments, progress_bar=False, **options)


def stacks(model: nn.Module) -> dict[str, CompressedStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedStack)}


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**BATCHES[0]).logits


@pytest.mark.parametrize("packed", [False, True], ids=["one by one", "packed"])
@pytest.mark.parametrize("residual", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_data_every_bit_is_that_of_compress(family: str, residual: str, packed: bool, tmp_path: Path) -> None:
    model_class: Any = saved(family, tmp_path / "dense", packed)
    config = WasiConfig(residual=residual)
    output = prepared(tmp_path / "dense", tmp_path / "small", config)
    memory = compress(model_class.from_pretrained(tmp_path / "dense"), config)
    memory.save_pretrained(tmp_path / "memory")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "memory"))
    assert ours.keys() == theirs.keys() and any("experts" in key for key in ours)
    assert all(torch.equal(ours[key], value) and ours[key].dtype == value.dtype for key, value in theirs.items())
    assert (output / "config.json").read_text() == (tmp_path / "memory/config.json").read_text()
    loaded = model_class.from_pretrained(output)
    assert len(stacks(loaded)) == 2
    torch.testing.assert_close(answers(loaded), answers(memory))


@pytest.mark.parametrize("gradients", ["features", None])
@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_factors_are_those_of_compress(family: str, form: str, gradients: Any, tmp_path: Path) -> None:
    model_class: Any = saved(family, tmp_path / "dense")
    config = WasiConfig(**FACTORS[form])
    output = prepared(tmp_path / "dense", tmp_path / "small", config, BATCHES, gradients=gradients)
    base = model_class.from_pretrained(tmp_path / "dense")
    run_by(base, "grouped_mm")
    memory = stacks(compress(base, config, BATCHES, repair_steps=0, progress_bar=False))
    loaded = stacks(model_class.from_pretrained(output))
    assert memory and loaded.keys() == memory.keys()
    for name, stack in memory.items():
        assert (loaded[name].form_name, loaded[name].rank) == (stack.form_name, stack.rank) == ("factors", stack.rank)
        torch.testing.assert_close(loaded[name].matrices(), stack.matrices(), rtol=1e-3, atol=1e-4)


def test_experts_alone(tmp_path: Path) -> None:
    model_class: Any = saved("mixtral", tmp_path / "dense")
    config = WasiConfig(weight_share=0.6, target_modules=r".*experts\.(gate_up|down)_proj", update="factor")
    output = prepared(tmp_path / "dense", tmp_path / "small", config, BATCHES)
    base = model_class.from_pretrained(tmp_path / "dense")
    run_by(base, "grouped_mm")
    prepare_experts(base, config, BATCHES, progress_bar=False)
    memory, loaded = stacks(compress(base, config)), stacks(model_class.from_pretrained(output))
    assert len(memory) == 2 and memory.keys() == loaded.keys()
    for name, stack in memory.items():
        torch.testing.assert_close(loaded[name].matrices(), stack.matrices(), rtol=1e-3, atol=1e-4)


def test_weights_in_few_bits_with_data(tmp_path: Path) -> None:
    """The linear layers get additions; experts are rounded, as they are in memory."""
    model_class: Any = saved("mixtral", tmp_path / "dense")
    config = WasiConfig(residual="int4", weight_rank=2)
    loaded = model_class.from_pretrained(prepared(tmp_path / "dense", tmp_path / "small", config, BATCHES))
    base = model_class.from_pretrained(tmp_path / "dense")
    memory = compress(base, config, BATCHES, progress_bar=False)
    assert {name: stack.stored_form for name, stack in stacks(loaded).items()} == {
        name: stack.stored_form for name, stack in stacks(memory).items()
    }
    torch.testing.assert_close(answers(loaded), answers(memory), rtol=1e-3, atol=1e-3)


def test_experts_that_would_be_larger_stay_dense(tmp_path: Path) -> None:
    model_class: Any = saved("mixtral", tmp_path / "dense")
    config = WasiConfig(residual=None, weight_rank=9, update="factor")
    output = prepared(tmp_path / "dense", tmp_path / "small", config, BATCHES)
    loaded = model_class.from_pretrained(output)
    assert [name.rpartition(".")[2] for name in stacks(loaded)] == ["gate_up_proj"]
    assert isinstance(loaded.model.layers[0].mlp.experts.down_proj, nn.Parameter)


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_class: Any = saved("mixtral", tmp_path / "dense")
    config = WasiConfig(weight_share=0.6)
    whole = prepared(tmp_path / "dense", tmp_path / "whole", config, BATCHES)
    read, left = DenseCheckpoint.read, [14]

    def reading(self: DenseCheckpoint, name: str) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(DenseCheckpoint, "read", reading)
    for _ in range(20):
        try:
            prepared(tmp_path / "dense", tmp_path / "parts", config, BATCHES)
            break
        except KeyboardInterrupt:
            left[0] = 14 + 14 * (_ + 1)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "parts", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert len(stacks(model_class.from_pretrained(tmp_path / "parts"))) == 2


def test_what_is_put_together_is_what_transformers_makes(tmp_path: Path) -> None:
    """Expert by expert, against its own conversion of all at once."""
    model_class: Any = saved("mixtral", tmp_path)
    with torch.device("meta"):
        model = model_class(tf.AutoConfig.from_pretrained(tmp_path))
    checkpoint, converted = DenseCheckpoint(model, stored_tensors_of(str(tmp_path))), 0
    for name, parameter in model_class.from_pretrained(tmp_path).named_parameters():
        assert torch.equal(checkpoint.read(name), parameter)
        source = checkpoint._stored[name]
        if isinstance(source, ConvertedTensor):
            converted += 1
            whole = source.conversion._convert(lambda tensor: tensor.read(torch.float32))
            assert torch.equal(whole[name], parameter)
    assert converted == 2


def test_there_is_one_packed_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    config = tf.MixtralConfig(**sizes, intermediate_size=128, num_hidden_layers=3, num_local_experts=8)
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    packed = 4 * 8 * 2 * 128 * 64  # gate_up_proj, float32

    def peak(name: str) -> int:
        return measure_peak_memory(lambda: prepared(tmp_path / "dense", tmp_path / name)).peak_bytes

    expert_by_expert = peak("small")
    assert packed < expert_by_expert < 1.7 * packed  # codes of the block, and what rounds one expert
    monkeypatch.setattr(Conversion, "_stacked", lambda self, shape, dtype: self._convert(
        lambda tensor: tensor.read(torch.float32))[self.name].to(dtype, copy=True))  # fmt: skip
    assert peak("at once") > 1.2 * expert_by_expert


def test_names_that_only_look_like_experts_are_copied(tmp_path: Path) -> None:
    """Tensors of the checkpoint that the model lacks are left out, experts too."""
    model_class: Any = saved("olmoe", tmp_path / "dense")
    path = tmp_path / "dense/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.7.mlp.experts.0.up_proj.weight"] = torch.zeros(12, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    assert len(stacks(model_class.from_pretrained(prepared(tmp_path / "dense", tmp_path / "small")))) == 2
