"""Checkpoints prepared block by block: they are those of the preparation in memory, and need no room for the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from models import ARCHITECTURES, logits
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from wasi_peft import WasiConfig, calibrate_wasi, compress, measure_peak_memory, prepare_checkpoint, preprocess_wasi
from wasi_peft.forms.compressed import CompressedLinear
from wasi_peft.forms.dense import dense_weight
from wasi_peft.hub import checkpoint
from wasi_peft.hub.cards import FOLDER, TAGS, card_section
from wasi_peft.hub.compressed import mark_compressed

NAMES = ("llama", "llama_tied", "bert", "vit", "dinov2", "gpt2")
FORMS: dict[str, dict[str, Any]] = {
    "int4 with additions": {"residual": "int4", "weight_rank": 2},
    "int8 with additions": {"residual": "int8", "weight_rank": 2},
    "factors of a share": {"weight_share": 0.6},
    "factors of a threshold": {"explained_variance_threshold": 0.8, "update": "low_rank", "update_rank": 1},
}


def batches(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Calibration batches, some tokens of which are padding."""
    made = [ARCHITECTURES[name].batch(4, seed) for seed in range(1, 1 + count)]
    for batch in made:
        if "attention_mask" in batch:
            batch["attention_mask"][0, -3:] = 0
    return made


def saved(name: str, folder: Path, **options: Any) -> type[nn.Module]:
    """Save a tiny dense model; returns its class."""
    model = ARCHITECTURES[name].model()
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return type(model)


def prepared(*arguments: Any, **options: Any) -> Path:
    return prepare_checkpoint(*arguments, progress_bar=False, **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_close(model: nn.Module, other: nn.Module) -> None:
    """The same forms of the same ranks, weights and biases."""
    for name, layer in other.named_modules():
        ours = model.get_submodule(name)
        assert type(ours) is type(layer), name
        if isinstance(layer, CompressedLinear):
            assert (ours.form_name, ours.rank) == (layer.form_name, layer.rank), name
            torch.testing.assert_close(ours.dense_weight(), layer.dense_weight(), rtol=1e-4, atol=1e-5)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        if not name.endswith(("form.wasi_L", "form.wasi_R")):  # in coordinates of their own
            torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- equal to the preparation in memory


@pytest.mark.parametrize("residual", ["int8", "int4"])
@pytest.mark.parametrize("name", [*NAMES, "swin", "t5"])
def test_without_data_every_bit_is_that_of_compress(name: str, residual: str, tmp_path: Path) -> None:
    model_class = saved(name, tmp_path / "dense")
    config = WasiConfig(residual=residual)
    output = prepared(tmp_path / "dense", tmp_path / "small", config)
    compress(model_class.from_pretrained(tmp_path / "dense"), config).save_pretrained(tmp_path / "memory")
    ours = model_class.from_pretrained(output).state_dict()
    theirs = model_class.from_pretrained(tmp_path / "memory").state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype, key
    assert config_of(output) == config_of(tmp_path / "memory")
    assert (output / "generation_config.json").is_file() == (tmp_path / "memory" / "generation_config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["dense", "memory", "small"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_with_data_it_is_what_compress_gives(name: str, form: str, tmp_path: Path) -> None:
    model_class, data = saved(name, tmp_path / "dense"), batches(name)
    config = WasiConfig(**FORMS[form])
    output = prepared(tmp_path / "dense", tmp_path / "small", config, data)
    options = {} if config.residual else {"repair_steps": 0}
    memory = compress(model_class.from_pretrained(tmp_path / "dense"), config, data, progress_bar=False, **options)
    assert_close(model_class.from_pretrained(output), memory)


@pytest.mark.parametrize("update", ["frozen_basis", "low_rank", "core"])
def test_factors_in_few_bits(update: str, tmp_path: Path) -> None:
    """In other coordinates than in memory, so they are not rounded alike."""
    model_class, data = saved("llama", tmp_path / "dense"), batches("llama")
    rank = {"update_rank": 2} if update == "low_rank" else {}
    config = WasiConfig(weight_rank=4, frozen_dtype="int8", update=update, residual=None, **rank)
    exact = WasiConfig(weight_rank=4, update=update, residual=None, **rank)
    rounded, whole = (
        model_class.from_pretrained(prepared(tmp_path / "dense", tmp_path / name, settings, data))
        for name, settings in (("rounded", config), ("whole", exact))
    )
    memory = compress(
        model_class.from_pretrained(tmp_path / "dense"), config, data, repair_steps=0, progress_bar=False
    )
    layers = {name: layer for name, layer in memory.named_modules() if isinstance(layer, CompressedLinear)}
    assert layers
    for name, layer in layers.items():
        ours, expected = rounded.get_submodule(name), dense_weight(whole.get_submodule(name))
        assert ours.stored_form == layer.stored_form and ours.stored_form.bits["R"] == "int8"
        assert 0 < (ours.dense_weight() - expected).norm() < 0.03 * expected.norm()


def test_data_make_a_difference(tmp_path: Path) -> None:
    model_class = saved("llama", tmp_path / "dense")
    config = WasiConfig(weight_share=0.6)
    one = prepared(tmp_path / "dense", tmp_path / "one", config, batches("llama"))
    other = prepared(tmp_path / "dense", tmp_path / "other", config, batches("llama")[1:])
    blind = prepared(tmp_path / "dense", tmp_path / "blind", config, batches("llama"), gradients=None)
    layers = [model_class.from_pretrained(folder).model.layers[0].mlp.up_proj for folder in (one, other, blind)]
    assert not torch.allclose(layers[0].dense_weight(), layers[1].dense_weight(), atol=1e-3)
    assert not torch.allclose(layers[0].dense_weight(), layers[2].dense_weight(), atol=1e-3)


def test_without_gradients_errors_count_at_each_output(tmp_path: Path) -> None:
    model_class, data = saved("gpt2", tmp_path / "dense"), batches("gpt2")
    config = WasiConfig(residual=None, weight_rank=3)
    output = prepared(tmp_path / "dense", tmp_path / "small", config, data, gradients=None)
    model = model_class.from_pretrained(tmp_path / "dense")
    calibration = calibrate_wasi(model, data, config, gradients=None, progress_bar=False)
    preprocess_wasi(model, config, calibration=calibration, progress_bar=False)
    memory = get_peft_model(model, config).base_model.merge_and_unload(dense=False)
    assert_close(model_class.from_pretrained(output), mark_compressed(memory))


@pytest.mark.parametrize("form", ["int4 with additions", "factors of a share"])
def test_less_memory_for_sums_gives_the_same(form: str, tmp_path: Path) -> None:
    model_class, data, config = saved("llama", tmp_path / "dense"), batches("llama"), WasiConfig(**FORMS[form])
    wide = prepared(tmp_path / "dense", tmp_path / "wide", config, data)
    narrow = prepared(tmp_path / "dense", tmp_path / "narrow", config, data, max_memory_bytes=1)
    assert_close(model_class.from_pretrained(narrow), model_class.from_pretrained(wide))


@pytest.mark.parametrize("form", ["int4 with additions", "factors of a share"])
def test_some_blocks_only(form: str, tmp_path: Path) -> None:
    model_class, data = saved("bert", tmp_path / "dense"), batches("bert")
    config = WasiConfig(**FORMS[form], layers_to_transform=[1])
    output = prepared(tmp_path / "dense", tmp_path / "small", config, data)
    options = {} if config.residual else {"repair_steps": 0}
    memory = compress(model_class.from_pretrained(tmp_path / "dense"), config, data, progress_bar=False, **options)
    assert {name.split(".")[3] for name in config_of(output)["quantization_config"]["layers"]} == {"1"}
    assert_close(model_class.from_pretrained(output), memory)


def test_factors_that_would_be_larger_stay_dense_and_some_must_be_smaller(tmp_path: Path) -> None:
    model_class, data = saved("vit", tmp_path / "dense"), batches("vit")
    config = WasiConfig(residual=None, weight_rank=9)
    output = prepared(tmp_path / "dense", tmp_path / "small", config, data)  # 9 is less than 24 * 16 / 40, not than 8
    layers = config_of(output)["quantization_config"]["layers"]
    assert {name.rpartition(".")[2] for name in layers} == {"fc1", "fc2"}
    memory = compress(
        model_class.from_pretrained(tmp_path / "dense"), config, data, repair_steps=0, progress_bar=False
    )
    assert_close(model_class.from_pretrained(output), memory)
    with pytest.raises(ValueError, match="no layer became smaller"):
        prepared(tmp_path / "dense", tmp_path / "none", WasiConfig(residual=None, weight_rank=16), data)
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- what is read


def test_shards_16_bits_and_another_dtype(tmp_path: Path) -> None:
    model_class = saved("llama", tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="4KB")
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()
    own = model_class.from_pretrained(prepared(tmp_path / "dense", tmp_path / "own"))
    assert own.dtype == torch.bfloat16 and own.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    output = prepared(tmp_path / "dense", tmp_path / "wide", dtype=torch.float32)
    wide = model_class.from_pretrained(output)
    memory = compress(model_class.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    for key, tensor in memory.state_dict().items():
        assert torch.equal(wide.state_dict()[key], tensor) and wide.state_dict()[key].dtype == tensor.dtype


def test_old_names_and_what_old_files_hold_beside_the_model(tmp_path: Path) -> None:
    model_class = saved("bert", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in load_file(path).items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    assert any("gamma" in key for key in tensors)
    output = prepared(tmp_path / "dense", tmp_path / "small")
    memory = compress(model_class.from_pretrained(tmp_path / "dense"))
    assert_close(model_class.from_pretrained(output), memory)


def test_tensors_that_the_model_lacks_are_left_out_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As BERT was published: a second head, a pooler that the architecture does not have, positions."""
    whole = tf.BertForPreTraining(ARCHITECTURES["bert"].model().config)
    whole.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense/model.safetensors"
    extra = {"bert.embeddings.position_ids": torch.arange(12)[None]}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    config = tmp_path / "dense/config.json"
    config.write_text(json.dumps({**config_of(tmp_path / "dense"), "architectures": ["BertForMaskedLM"]}))
    output = prepared(tmp_path / "dense", tmp_path / "small")
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("4 tensors of the checkpoint are of no part of a BertForMaskedLM")
    assert "cls.seq_relationship.bias" in lines[0] and "position_ids" not in lines[0]
    memory = compress(tf.BertForMaskedLM.from_pretrained(tmp_path / "dense"))
    batch = {key: value for key, value in ARCHITECTURES["bert"].batch().items() if key != "labels"}
    assert torch.equal(logits(tf.BertForMaskedLM.from_pretrained(output), batch), logits(memory, batch))


@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification"])
def test_the_prefix_of_the_base_model(architecture: str, tmp_path: Path) -> None:
    """A base model from the checkpoint of one with a head, and one with a head whose base lies there by itself."""
    saved("bert", tmp_path / "dense")
    path = tmp_path / "dense/model.safetensors"
    if architecture != "BertModel":
        tensors = {key.removeprefix("bert."): value for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = tmp_path / "dense/config.json"
    config.write_text(json.dumps({**config_of(tmp_path / "dense"), "architectures": [architecture]}))
    output = prepared(tmp_path / "dense", tmp_path / "small")
    model_class = getattr(tf, architecture)
    assert_close(model_class.from_pretrained(output), compress(model_class.from_pretrained(tmp_path / "dense")))


def test_files_of_tokenizers_are_copied_and_nothing_else(tmp_path: Path) -> None:
    saved("bert", tmp_path / "dense")
    for name in ("tokenizer.json", "vocab.txt", "LICENSE", "README.md", "pytorch_model.bin", "adapter_config.json"):
        (tmp_path / "dense" / name).write_text(name)
    output = prepared(tmp_path / "dense", tmp_path / "small")
    copied = {"tokenizer.json", "vocab.txt", "LICENSE"}
    assert set(os.listdir(output)) == {"config.json", "model.safetensors", "README.md", *copied}
    assert (output / "vocab.txt").read_text() == "vocab.txt"
    assert (output / "README.md").read_text() != "README.md"


def test_all_chat_templates_are_copied(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=templates).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/onnx").mkdir()
    output = prepared(tmp_path / "dense", tmp_path / "small")
    assert tf.AutoTokenizer.from_pretrained(output).chat_template == templates
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["additional_chat_templates"]


def test_of_the_hub_all_that_is_copied_is_read_and_other_folders_are_not() -> None:
    files = ["model.safetensors", "tokenizer.json", "additional_chat_templates/tool_use.jinja"]
    others = ["onnx/model.onnx_data", "original/consolidated.safetensors", "a/b.json", "a/ja/b.pth", "model.gguf"]
    assert list(filter_repo_objects([*files, *others], ignore_patterns=checkpoint._NOT_READ)) == files


@pytest.mark.parametrize("form", ["int8 with additions", "factors of a share"])
def test_its_card_is_that_of_the_model_and_loads_it(form: str, tmp_path: Path) -> None:
    model_class = saved("bert", tmp_path / "dense")
    output = prepared(tmp_path / "dense", tmp_path / "small", WasiConfig(**FORMS[form]), batches("bert"))
    text = (output / "README.md").read_text()
    loaded = model_class.from_pretrained(output)
    assert text.rstrip().endswith(card_section(loaded)) and set(TAGS) <= set(
        ModelCard.load(output / "README.md").data.tags
    )
    scope: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0].replace(FOLDER, str(output)), scope)
    assert_close(scope["model"], loaded)


@pytest.mark.parametrize("size", [1, "6KB", "1MB"])
def test_files_are_as_large_as_they_may_be(size: int | str, tmp_path: Path) -> None:
    model_class = saved("llama", tmp_path / "dense", dtype=torch.bfloat16)
    output = prepared(tmp_path / "dense", tmp_path / "small", max_shard_size=size)
    files = list(output.glob("*.safetensors"))
    assert len(files) == {1: 3, "6KB": 2, "1MB": 1}[size]
    assert (output / "model.safetensors.index.json").is_file() == (len(files) > 1)
    loaded = model_class.from_pretrained(output)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(files, [tmp_path / "again/model.safetensors"])


def assert_same_tensors(paths: list[Path], others: list[Path]) -> None:
    ours, theirs = ({k: v for path in files for k, v in load_file(path).items()} for files in (paths, others))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_the_index_names_every_tensor_and_their_bytes(tmp_path: Path) -> None:
    saved("llama_tied", tmp_path / "dense")
    output = prepared(tmp_path / "dense", tmp_path / "small", max_shard_size=1)
    index, found, size = json.loads((output / "model.safetensors.index.json").read_text()), {}, 0
    for path in output.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), path.name)
            size += sum(file.get_tensor(key).nbytes for key in file.keys())
    assert index == {"metadata": {"total_size": size}, "weight_map": found}
    assert "lm_head.weight" not in found and "model.embed_tokens.weight" in found


def test_it_trains(tmp_path: Path) -> None:
    model_class = saved("llama", tmp_path / "dense")
    output = prepared(tmp_path / "dense", tmp_path / "small", WasiConfig(weight_share=0.6), batches("llama"))
    model = get_peft_model(model_class.from_pretrained(output), WasiConfig(weight_rank=2, activation_threshold=None))
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**ARCHITECTURES["llama"].batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- memory

BLOCKS = (3, 12)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Llamas of few and of many blocks, whose embeddings are smaller than a block."""
    folders = {}
    for blocks in BLOCKS:
        folders[blocks] = tmp_path_factory.mktemp("deep")
        config = tf.LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
        tf.LlamaForCausalLM(config).save_pretrained(folders[blocks], max_shard_size="300KB")
    return folders


def block_bytes() -> int:
    """Of a block of the models above."""
    return 4 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128)


def peak(run: Callable[[], Any]) -> int:
    return measure_peak_memory(run).peak_bytes


def test_without_data_there_is_less_than_a_block(deep: dict[int, Path], tmp_path: Path) -> None:
    # one dense layer and what it is rounded with, and the block in 8 bits
    assert peak(lambda: prepared(deep[12], tmp_path / "small")) < block_bytes()
    # the measure sees what it should
    assert peak(lambda: compress(tf.LlamaForCausalLM.from_pretrained(deep[12]))) > 12 * block_bytes()


@pytest.mark.parametrize("form", ["int8 with additions", "factors of a share"])
def test_the_number_of_blocks_does_not_matter(form: str, deep: dict[int, Path], tmp_path: Path) -> None:
    data, config = [{"input_ids": torch.arange(8)[None] + seed} for seed in range(4)], WasiConfig(**FORMS[form])

    def used(blocks: int) -> int:
        return peak(lambda: prepared(deep[blocks], tmp_path / f"{blocks}", config, data, max_memory_bytes=1))

    few, many = map(used, BLOCKS)
    assert block_bytes() < few < 7 * block_bytes()  # sums and spectra of one input too, in float64
    assert many < few + 0.1 * block_bytes()
