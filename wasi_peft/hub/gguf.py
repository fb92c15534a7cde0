"""GGUF: a language model for llama.cpp, its weights in few bits as they are, and factors beside them as an adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from ..forms.compressed import CompressedLinear
from ..forms.residual import ExactResidual, Residual, ResidualLinear
from ..linalg.low_bit import LARGEST_CODE
from ..tuner.layer import wasi_layers
from .blocks import Rows, blocks_of
from .cases import Case, answered, cases_of, example_batch, tolerance_of
from .formats import Format, Source
from .plain import check_ordinary, multiply_exactly, wasi_copy
from .vocabulary import add_vocabulary, tokenizer_of

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GgufFormat(Format):
    """`model.gguf` with the tokenizer, and `adapter.gguf`, a LoRA adapter of the factors beside its weights.

    Weights in 8 and 4 bits go over as codes (Q8_0, Q4_1), so nothing is rounded twice. Factors in place of a weight
    are multiplied out: llama.cpp has no layer of two. What was written is read by transformers, which restores the
    weights, and the adapter is added to them.

    Args:
        int8: Round all other matrices to 8 bits too (Q8_0), tables of tokens among them.
        tokenizer: Of the model, or where to read it; by default where the model was read.
    """

    name: ClassVar[str] = "gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "gguf"
    int8: bool = False
    tokenizer: Any = None

    def write(self, source: Source, folder: Path) -> float:
        arch = _architecture(source.model)
        tokenizer = tokenizer_of(source.model, self.tokenizer)
        parts = _take_apart(source)
        _write_model(folder / MODEL_FILE, arch, parts.model, tokenizer, self.int8)
        if parts.additions:
            _write_adapter(folder / ADAPTER_FILE, arch, parts)
        tolerance = source.tolerance
        if tolerance is None:
            tolerance = max(tolerance_of(parts.model), math.sqrt(self._precision(parts.model)))
        return answered(_read_back(folder, arch, parts.model.config), parts.cases, tolerance)

    def _precision(self, model: nn.Module) -> float:
        """Of what is written, where that is not the dtype of the model."""
        if self.int8:
            return 1 / LARGEST_CODE
        has_codes = any(isinstance(module, Residual) for module in model.modules())
        return torch.finfo(torch.float16).eps if has_codes else 0.0


class _Parts(NamedTuple):
    """A model without what its factors add, what they add by layer, and what all of it must answer."""

    model: Any
    additions: dict[str, Factors]
    cases: list[Case]


def _architecture(model: nn.Module) -> str:
    """What llama.cpp calls the architecture of a model.

    Raises:
        TypeError: If it is none of those that can be written.
        ValueError: If it computes something that is not written.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base).__name__
    if kind not in ARCHITECTURES or getattr(transformers, kind) is not type(base):
        raise TypeError(f"format 'gguf' is for {', '.join(ARCHITECTURES)}, got {kind}.")
    config = base.config
    for what, value, usual in (
        ("rope_type", config.rope_parameters["rope_type"], "default"),
        ("hidden_act", config.hidden_act, "silu"),
        ("sliding_window", getattr(config, "sliding_window", None), None),
    ):
        if value != usual:
            raise ValueError(f"format 'gguf' takes models with {what}={usual!r}, got {value!r}.")
    return ARCHITECTURES[kind]


def _take_apart(source: Source) -> _Parts:
    """Copies of what is written, on the CPU."""
    model: Any = source.model
    adapted = isinstance(model, PeftModel)
    twin: Any = wasi_copy(model, source.adapter_name) if adapted else copy.deepcopy(model).eval()
    multiply_exactly(twin)
    cases = cases_of(twin, example_batch(model) if source.batch is None else source.batch)
    additions: dict[str, Factors] = {}
    if adapted:
        for name, layer in wasi_layers(twin.base_model.model):
            form = layer.form_of(twin.active_adapter)
            if isinstance(form, ResidualLinear) and type(form.residual) is ExactResidual:
                additions[name] = _factors(form)
                form.L.data.zero_()  # merged, it would be in the weight
        twin = twin.base_model.merge_and_unload(dense=False)
    for name, module in twin.named_modules():
        if isinstance(module, CompressedLinear) and isinstance(module.form, ResidualLinear):
            additions[name] = _factors(module.form)
    return _Parts(twin.cpu(), additions, [_on_cpu(case) for case in cases])


def _factors(form: ResidualLinear) -> Factors:
    outer, inner = (factor.detach().float().cpu().clone() for factor in form.factors())
    return outer, inner


def _on_cpu(case: Case) -> Case:
    tensors = {name: tensor.cpu() for name, tensor in case.inputs.tensors.items()}
    return Case(case.inputs._replace(tensors=tensors), case.answers)


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | Residual]]:
    """All parameters by name; weights in few bits as what they are stored as, factors multiplied out.

    Raises:
        TypeError: If nobody knows what a layer holds.
    """
    if isinstance(module, CompressedLinear):
        yield f"{prefix}weight", module.dense_weight() if module.frozen is None else module.frozen
        if module.bias is not None:
            yield f"{prefix}bias", module.bias
        return
    check_ordinary(prefix.removesuffix("."), module)
    yield from ((prefix + name, parameter) for name, parameter in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


class _Names:
    """Names and orders of rows in GGUF files.

    llama.cpp turns pairs of neighbours in a head where transformers turns an entry of its first half with one of its
    second: rows of queries and keys change places, in architectures that it knows from before transformers did.
    """

    def __init__(self, arch: str, config: Any) -> None:
        import gguf

        self._arch, self._config = arch, config
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)

    def of(self, name: str) -> str:
        """The name of a parameter.

        Raises:
            ValueError: If there is none.
        """
        own: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ValueError(f"{name}: the architecture {self._arch!r} of llama.cpp has no place for it.")
        return own

    def rows(self, name: str) -> Rows:
        """The order of a parameter's rows."""
        config = self._config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if self._arch != "llama" or count is None:
            return slice(None)
        return torch.arange(count * _head_size(config)).view(count, 2, -1).transpose(1, 2).flatten()


def _write_model(path: Path, arch: str, model: Any, tokenizer: Any, int8: bool) -> None:
    import gguf

    writer, config, names = gguf.GGUFWriter(path, arch), model.config, _Names(arch, model.config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_vocabulary(writer, tokenizer, config)
    for name, weight in _weights(model):
        if name == "lm_head.weight" and weight is model.get_input_embeddings().weight:
            continue  # where a file has no head, the table of tokens is it
        blocks = blocks_of(weight, names.rows(name), int8)
        writer.add_tensor(names.of(name), blocks.data, raw_dtype=gguf.GGMLQuantizationType[blocks.type])
    _finish(writer)


def _write_adapter(path: Path, arch: str, parts: _Parts) -> None:
    """Factors of several ranks share one alpha, by which llama.cpp multiplies a product over its rank."""
    import gguf

    writer, names = gguf.GGUFWriter(path, arch), _Names(arch, parts.model.config)
    alpha = max(inner.shape[0] for _, inner in parts.additions.values())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (outer, inner) in parts.additions.items():
        own, rows = names.of(f"{name}.weight"), names.rows(f"{name}.weight")
        writer.add_tensor(f"{own}.lora_a", inner.numpy())
        writer.add_tensor(f"{own}.lora_b", (outer[rows] * (inner.shape[0] / alpha)).numpy())
    _finish(writer)


def _finish(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _read_back(folder: Path, arch: str, config: Any) -> nn.Module:
    """The dense model of the files, in float32."""
    import gguf

    own_config = transformers.AutoConfig.from_pretrained(folder, gguf_file=MODEL_FILE)
    own_config.head_dim = _head_size(config)  # which transformers does not read, and llama.cpp does, like biases
    for name in ("attention_bias", "mlp_bias"):
        setattr(own_config, name, getattr(config, name, False))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=MODEL_FILE, config=own_config, dtype=torch.float32
    )
    if not (folder / ADAPTER_FILE).exists():
        return loaded.eval()
    reader, names = gguf.GGUFReader(folder / ADAPTER_FILE), _Names(arch, config)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    scaling: Any = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = scaling.contents()
    for name, weight in loaded.named_parameters():
        own = names.of(name)
        if f"{own}.lora_a" in tensors:
            inner, outer = tensors[f"{own}.lora_a"], tensors[f"{own}.lora_b"]
            rows = torch.arange(len(outer))[names.rows(name)]
            weight.data[rows] += outer @ inner * (alpha / inner.shape[0])
    return loaded.eval()
