"""`trainable_token_indices`: rows of an embedding that train and are saved with an adapter, as in LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import ARCHITECTURES
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from wasi_peft import WasiConfig
from wasi_peft.memory.modes import MEMORY_MODES

NEW = [3, 17]


def llama(tied: bool) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 3, 5, 17, 2, 3], [17, 4, 6, 3, 8, 9]])
    return {"input_ids": ids, "labels": ids}


def trained(tied: bool, **options: Any) -> Any:
    config = WasiConfig(weight_rank=2, trainable_token_indices=NEW, **options)
    model = get_peft_model(llama(tied), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def table(model: torch.nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_rows_train_and_no_others(tied: bool, mode: str) -> None:
    merged = trained(tied, memory_mode=mode).merge_and_unload(dense=True)
    before, after = table(llama(tied)), table(merged)
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert moved == NEW
    assert torch.equal(merged.get_output_embeddings().weight, after) == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", [{}, {"residual": None}])
def test_a_saved_adapter_holds_the_rows(tied: bool, form: dict[str, Any], tmp_path: Path) -> None:
    model = trained(tied, **form)
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = [value for name, value in stored.items() if "embed" in name or "lm_head" in name]
    assert [tuple(value.shape) for value in rows] == [(2, 16)]
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch()).logits, expected)
    merged = loaded.merge_and_unload(dense=True)(**batch()).logits  # without the rounding of integer products
    torch.testing.assert_close(merged, expected, atol=5e-3, rtol=0)


def test_the_base_has_its_own_rows() -> None:
    model = trained(tied=True)
    plain = get_peft_model(llama(True), WasiConfig(weight_rank=2)).eval()
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits)
    assert torch.equal(table(model.unload()), table(llama(True)))


def test_what_cannot_stay_tied_is_refused() -> None:
    config = WasiConfig(
        weight_rank=2, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True
    )
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        get_peft_model(llama(True), config)


def test_a_model_whose_inputs_are_no_tokens_is_refused() -> None:
    model = ARCHITECTURES["vit"].model()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"ViTForImageClassification reads ViTPatchEmbeddings, got .*=\[3, 5\]"):
        get_peft_model(model, WasiConfig(trainable_token_indices=[3, 5]))
    assert {name: id(module) for name, module in model.named_modules()} == before
