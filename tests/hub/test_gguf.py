"""GGUF files hold the model's numbers where llama.cpp looks for them, and llama.cpp answers as the model does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import ARCHITECTURES, moved
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizing import byte_tokenizer

from wasi_peft import WasiConfig, compress, export
from wasi_peft.forms.residual import Int4Residual, Int8Residual
from wasi_peft.hub import gguf as gguf_format
from wasi_peft.hub.blocks import blocks_of
from wasi_peft.hub.vocabulary import SPLITS

gguf = pytest.importorskip("gguf")

Q_PROJ = "model.layers.1.self_attn.q_proj"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


MERGES = [("a", "b"), ("Ġ", "a")]


def split_by(*before: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with other steps before BPE."""
    tokenizer = byte_tokenizer(MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(before)) if before[1:] else before[0]
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def dense(kind: str = "llama", **options: Any) -> Any:
    """A tiny model whose rows have blocks of 32."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=266, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        **{**own, **options},
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(**options: Any) -> Any:
    model = get_peft_model(dense(), WasiConfig(**{"weight_rank": 3, "residual_product": "restored", **options}))
    return moved(model.eval(), 0.1)


def written(model: Any, folder: Path, **options: Any) -> float:
    return export(model, folder, "gguf", **{"tokenizer": byte_tokenizer(MERGES), **options})


def tensors_of(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Kinds and values of all tensors, by name."""
    values = {}
    for tensor in gguf.GGUFReader(path).tensors:
        restored = gguf.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(restored.copy()))
    return values


def field(path: Path, name: str) -> Any:
    return gguf.GGUFReader(path).get_field(name).contents()


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp: in each head, entry i of the first half and then entry i of the second."""
    size = len(weight) // heads
    rows = [
        head * size + half * size // 2 + index
        for head in range(heads)
        for index in range(size // 2)
        for half in range(2)
    ]
    return weight[rows]


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("kind", KINDS)
def test_dense_models_are_written_exactly(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    assert written(model, tmp_path / "gguf") < 1e-6
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model.gguf"]
    tensors = tensors_of(tmp_path / "gguf" / "model.gguf")
    assert {kind for kind, _ in tensors.values()} == {"F32"}
    assert ("output.weight" in tensors) is (kind != "tied")
    query = model.model.layers[1].self_attn.q_proj.weight.detach()
    expected = query if kind.startswith("qwen") else neighbours(query, 4)
    assert torch.equal(tensors["blk.1.attn_q.weight"][1], expected)
    assert sum(tensor.numel() for _, tensor in tensors.values()) == sum(each.numel() for each in model.parameters())


def test_what_llama_cpp_is_told(tmp_path: Path) -> None:
    written(dense("wide heads", rope_parameters={"rope_type": "default", "rope_theta": 500.0}), tmp_path / "gguf")
    expected = {
        "general.architecture": "llama", "general.type": "model", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 500.0, "llama.vocab_size": 266,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip
    path = tmp_path / "gguf" / "model.gguf"
    assert {name: field(path, name) for name in expected} == expected
    assert field(path, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


def test_codes_in_8_bits_go_over_as_they_are(tmp_path: Path) -> None:
    model = compress(dense(), WasiConfig(residual_product="restored"))
    assert written(model, tmp_path / "gguf") < 5e-3
    tensors = tensors_of(tmp_path / "gguf" / "model.gguf")
    residual = model.get_submodule(Q_PROJ).frozen
    assert isinstance(residual, Int8Residual)
    kind, weight = tensors["blk.1.attn_q.weight"]
    assert kind == "Q8_0" and tensors["token_embd.weight"][0] == "F32"
    assert torch.equal(weight, neighbours(residual.codes.float() * residual.scale.half().float(), 4))
    exact = neighbours(residual.dense_weight(), 4)
    assert float(((weight - exact) / exact).nan_to_num().abs().max()) <= 2**-11
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    anew = gguf.dequantize(gguf.quantize(exact.numpy(), q8_0), q8_0)
    assert np.linalg.norm(anew - exact.numpy()) > 5 * float((weight - exact).norm()), "not rounded once more"


def test_rows_of_tiny_numbers() -> None:
    layer = torch.nn.Linear(64, 4)
    layer.weight.data.mul_(torch.logspace(-8, 0, 4)[:, None] / layer.weight.abs().amax(1, keepdim=True))
    residual = Int8Residual(layer)
    written = torch.from_numpy(gguf.dequantize(blocks_of(residual).data, gguf.GGMLQuantizationType.Q8_0).copy())
    exact = residual.dense_weight()
    error = (written - exact).abs()
    assert float(error[:3].max()) < 4e-6
    assert float((error[3] / exact[3].abs()).nan_to_num().max()) < 2**-11


def test_codes_in_4_bits_lose_nothing(tmp_path: Path) -> None:
    model = compress(dense(), WasiConfig(residual="int4"))
    assert written(model, tmp_path / "gguf") < 1e-5
    kind, weight = tensors_of(tmp_path / "gguf" / "model.gguf")["blk.1.attn_q.weight"]
    residual = model.get_submodule(Q_PROJ).frozen
    assert isinstance(residual, Int4Residual) and kind == "Q4_1"
    assert torch.equal(weight, neighbours(residual.dense_weight(), 4))


@pytest.mark.parametrize("residual", [Int8Residual, Int4Residual])
def test_rows_without_blocks_are_restored(residual: type[Int8Residual | Int4Residual]) -> None:
    frozen = residual(torch.nn.Linear(40, 3))
    blocks = blocks_of(frozen, int8=True)
    assert blocks.type == "F32" and torch.equal(torch.from_numpy(blocks.data), frozen.dense_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model = dense().to(dtype)
    assert written(model, tmp_path / "gguf") < 0.05
    tensors = tensors_of(tmp_path / "gguf" / "model.gguf")
    expected = "BF16" if dtype == torch.bfloat16 else "F16"
    assert tensors["output.weight"][0] == expected and tensors["output_norm.weight"][0] == "F32"
    assert torch.equal(tensors["output.weight"][1], model.lm_head.weight.float())


def test_all_matrices_in_8_bits(tmp_path: Path) -> None:
    model = dense()
    difference = written(model, tmp_path / "gguf", int8=True)
    assert 1e-4 < difference < 0.09
    kinds = {name: kind for name, (kind, _) in tensors_of(tmp_path / "gguf" / "model.gguf").items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}
    with pytest.raises(ValueError, match=r"must answer as the model does, to 1e-05 of the largest"):
        written(model, tmp_path / "other", int8=True, tolerance=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


# ------------------------------------------------------------------------------------------------ the adapter


@pytest.mark.parametrize("residual", ["int8", "int4", "exact"])
def test_factors_beside_a_weight_are_an_adapter(residual: str, tmp_path: Path) -> None:
    model = adapted(residual=residual, rank_pattern={"layers.1.self_attn.q_proj": 2})
    assert written(model, tmp_path / "gguf") < (5e-3 if residual == "int8" else 1e-5)
    path = tmp_path / "gguf" / "adapter.gguf"
    assert (field(path, "general.type"), field(path, "adapter.type")) == ("adapter", "lora")
    assert field(path, "general.architecture") == "llama"
    alpha, tensors = field(path, "adapter.lora.alpha"), tensors_of(path)
    assert alpha == 3 and len(tensors) == 2 * 2 * 7
    for name, own, heads in ((Q_PROJ, "attn_q", 4), ("model.layers.1.mlp.down_proj", "ffn_down", None)):
        form = model.get_submodule(f"base_model.model.{name}").form_of("default")
        A, B = (tensors[f"blk.1.{own}.weight.lora_{part}"][1] for part in "ab")
        assert A.shape == form.R.shape and B.shape == form.L.shape
        expected = form.L @ form.R if heads is None else neighbours(form.L @ form.R, heads)
        torch.testing.assert_close(alpha / len(A) * (B @ A), expected.detach())
    if residual == "exact":
        base = tensors_of(tmp_path / "gguf" / "model.gguf")["blk.1.ffn_down.weight"][1]
        assert torch.equal(base, dense().model.layers[1].mlp.down_proj.weight)


def test_an_adapter_on_a_compressed_model(tmp_path: Path) -> None:
    compress(adapted()).save_pretrained(tmp_path / "small")  # with additions of its own
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model = moved(get_peft_model(base, WasiConfig(weight_rank=2)).eval(), 0.1)
    assert written(model, tmp_path / "gguf") < 5e-3
    A = tensors_of(tmp_path / "gguf" / "adapter.gguf")["blk.0.attn_k.weight.lora_a"][1]
    assert len(A) == 3 + 2


def test_factors_in_place_of_a_weight_are_multiplied_out(tmp_path: Path) -> None:
    model = compress(dense(), WasiConfig(residual=None, weight_rank=3))
    assert written(model, tmp_path / "gguf") < 1e-5
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model.gguf"]


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = adapted(residual="exact")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written(model, tmp_path / "gguf", int8=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_in_the_files_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format._Names, "rows", lambda self, name: slice(None))
    with pytest.raises(ValueError, match="must answer as the model does"):
        written(dense(), tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("name", SPLITS)
def test_ways_to_split_are_told_by_name(name: str, tmp_path: Path) -> None:
    steps = {
        "ByteLevel": lambda use: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use),
        "Digits": pre_tokenizers.Digits,
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
    }
    tokenizer = split_by(*(steps[kind](value) for kind, value in SPLITS[name]), normalizer=normalizers.NFC())
    written(dense(), tmp_path / "gguf", tokenizer=tokenizer)
    assert field(tmp_path / "gguf" / "model.gguf", "tokenizer.ggml.pre") == name


def test_all_tokens_are_there(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(MERGES)
    tokenizer.add_tokens(["added"])
    written(dense(), tmp_path / "gguf", tokenizer=tokenizer)
    path = tmp_path / "gguf" / "model.gguf"
    tokens, kinds = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert tokens[:264] == tokenizer.convert_ids_to_tokens(range(264)) and tokens[264:] == ["[PAD264]", "[PAD265]"]
    assert kinds == [3] * 5 + [1] * 258 + [4] + [5] * 2
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    for text in ("ab a c 12!", "</s>added ab"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_it_is_read_where_the_model_was(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none can be read from ''"):
        export(dense(), tmp_path / "gguf", "gguf")
    dense().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tokenizer= is needed, one or where to read it: none can be read from '"):
        export(model, tmp_path / "gguf", "gguf")
    byte_tokenizer(MERGES).save_pretrained(tmp_path / "model")
    export(model, tmp_path / "gguf", "gguf")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    export(model, tmp_path / "gguf", "gguf", tokenizer=str(tmp_path / "moved"), overwrite=True)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    unigram = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    lower = split_by(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase())
    spaced = split_by(pre_tokenizers.ByteLevel(add_prefix_space=True))
    for tokenizer in (unigram, lower, spaced):
        with pytest.raises(ValueError, match="byte-level BPE that split texts as gpt-2, smollm, llama-bpe, qwen2 do"):
            written(dense(), tmp_path / "gguf", tokenizer=tokenizer)
    unmerged = byte_tokenizer()
    with pytest.raises(ValueError, match="byte-level BPE"):
        written(dense(), tmp_path / "gguf", tokenizer=unmerged)
    many = byte_tokenizer(MERGES)
    many.add_tokens(["one", "two", "three", "four"])
    with pytest.raises(ValueError, match="the tokenizer has the tokens 0 to 266, and the model only 266"):
        written(dense(), tmp_path / "gguf", tokenizer=many)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ refusals


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"is for LlamaForCausalLM, .*, got ViTForImageClassification"):
        export(ARCHITECTURES["vit"].model(), tmp_path / "gguf", "gguf")
    scaled = dense(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="takes models with rope_type='default', got 'linear'"):
        written(scaled, tmp_path / "gguf")
    with pytest.raises(ValueError, match="takes models with sliding_window=None, got 8"):
        written(dense("mistral", sliding_window=8), tmp_path / "gguf")
    extra = dense()
    extra.model.layers[0].own = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers.0.own.weight: the architecture 'llama' of llama.cpp has no place"):
        written(extra, tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ llama.cpp


PROMPT = "ab a c</s> ab"


def llama_cpp_answers(folder: Path, prompt: Any, adapter: bool) -> tuple[torch.Tensor, int]:
    """Logarithms of what llama.cpp gives all tokens after a prompt, and how many tokens it takes the prompt for."""
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp by pip install xllamacpp")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(folder / "model.gguf"), 64, 1
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, 1
    if adapter:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(str(folder / "adapter.gguf"), 1.0)]
    # with half a letter it would answer no probabilities; those that it answers are without the bias
    bias = [[byte_tokenizer(MERGES)("a")["input_ids"][0], 100.0]]
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 266, "logit_bias": bias}
    answer = llama.Server(params).handle_completions(request)
    values = torch.full((266,), torch.nan)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values, answer["usage"]["prompt_tokens"]


@torch.no_grad()
def answers(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids])).logits
    return logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_as_the_model_does(kind: str, tmp_path: Path) -> None:
    model, ids = dense(kind), byte_tokenizer(MERGES)(PROMPT)["input_ids"]
    written(model, tmp_path / "gguf")
    expected = answers(model, ids)
    for prompt in (ids, PROMPT):
        values, count = llama_cpp_answers(tmp_path / "gguf", prompt, adapter=False)
        assert count == len(ids)
        assert float((values - expected).abs().max()) < 0.02  # it keeps keys and values in 16 bits


@pytest.mark.parametrize("residual", ["int8", "int4", "exact"])
def test_llama_cpp_adds_the_adapter(residual: str, tmp_path: Path) -> None:
    model = adapted(residual=residual, rank_pattern={"layers.1.self_attn.q_proj": 2})
    written(model, tmp_path / "gguf")
    expected = answers(model, list(range(3, 20)))
    added, _ = llama_cpp_answers(tmp_path / "gguf", list(range(3, 20)), adapter=True)
    alone, _ = llama_cpp_answers(tmp_path / "gguf", list(range(3, 20)), adapter=False)
    difference = float((added - expected).abs().max())
    assert difference < 0.1 and float((alone - expected).abs().max()) > 5 * difference  # it rounds what it multiplies
