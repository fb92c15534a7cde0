"""Bases that another library keeps in few bits: factors are beside their weight, or made of what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from wasi_peft import WasiConfig
from wasi_peft.forms.dense import is_quantized
from wasi_peft.tuner.layer import wasi_layers

IDS = torch.randint(1, 128, (4, 12), generator=torch.Generator().manual_seed(0))


def dense_llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128)).eval()


def by_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model = dense_llama()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


def by_bitsandbytes(replaced: Callable[[Any, nn.Linear], nn.Module]) -> nn.Module:
    library = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    model: Any = dense_llama()
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.set_submodule(name, replaced(library, layer).to("cpu"))
    return model  # type: ignore[no-any-return]


def nf4(library: Any, layer: nn.Linear) -> nn.Module:
    sizes = layer.in_features, layer.out_features
    small = library.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    small.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return small  # type: ignore[no-any-return]


def int8(library: Any, layer: nn.Linear) -> nn.Module:
    small = library.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    small.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return small  # type: ignore[no-any-return]


BASES: dict[str, Callable[[], nn.Module]] = {
    "torchao": by_torchao,
    "bitsandbytes nf4": lambda: by_bitsandbytes(nf4),
    "bitsandbytes int8": lambda: by_bitsandbytes(int8),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def trained(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("residual", ["auto", "int4", "exact"])
def test_the_base_is_taken_as_it_is(make: Callable[[], nn.Module], residual: str, tmp_path: Path) -> None:
    base = make()
    before = logits(base)
    model = get_peft_model(base, WasiConfig(residual=residual))
    assert all(is_quantized(layer.base_layer) for _, layer in wasi_layers(model))
    assert torch.allclose(logits(model), before, atol=1e-5)
    losses = trained(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    with model.disable_adapter():
        assert torch.allclose(logits(model)[:, :1], before[:, :1], atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), after)
    merged: Any = model.merge_and_unload()
    assert not any(is_quantized(module) for module in merged.modules())
    assert torch.allclose(logits(merged), after, atol=1e-4)


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_factors_are_made_of_the_restored_weight(make: Callable[[], nn.Module]) -> None:
    base: Any = make()
    restored = base.model.layers[0].mlp.up_proj
    model: Any = get_peft_model(base, WasiConfig(explained_variance_threshold=1.0))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.base_is_released
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), restored(x), atol=1e-4)
    losses = trained(model)
    assert losses[-1] < losses[0]
