"""Models of PyTorch's own transformer layers under an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from strategies import relative_error
from torch import Tensor, nn

import wasi_peft
from wasi_peft.forms.attention import ProjectedAttention

NAMES = {
    f"layers.{stack}.layers.{layer}.{name}"
    for stack, layer, attention in [("encoder", 0, ["self_attn"]), ("decoder", 0, ["self_attn", "multihead_attn"])]
    for name in [
        *(f"{module}.{kind}_proj" for module in attention for kind in ("q", "k", "v", "out")),
        "linear1",
        "linear2",
    ]
}


class Translator(nn.Module):
    """An encoder and a decoder, whose cross-attention reads two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"batch_first": True, "dropout": 0.0}
        self.layers = nn.Transformer(16, 2, 1, 1, 24, **options)
        self.head = nn.Linear(16, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.layers(source, target)).mean(1)
        return logits if labels is None else F.cross_entropy(logits, labels)


def batch(labels: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(6, size, 16, generator=generator) for name, size in (("source", 5), ("target", 4))}
    return {**tensors, "labels": torch.arange(6) % 3} if labels else tensors


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch())


@pytest.mark.parametrize(
    "options",
    [{"weight_rank": 4}, {"weight_rank": 4, "residual": "exact"}, {"explained_variance_threshold": 1.0}],
    ids=str,
)
def test_all_projections_are_targets_and_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    base = Translator()
    model = get_peft_model(copy.deepcopy(base), wasi_peft.WasiConfig(residual_product="restored", **options))
    assert {layer.name for layer in model.wasi_summary().layers} == NAMES
    assert not any("in_proj" in name for name, _ in model.named_parameters())
    assert relative_error(answers(model), answers(base)) < 0.05
    optimizer = wasi_peft.create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch(labels=True))
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None or not parameter.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = answers(model)
    model.save_pretrained(tmp_path)
    for empty in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=empty)
        torch.testing.assert_close(answers(loaded), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not any(isinstance(module, ProjectedAttention) for module in merged.modules())
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-5)


def test_attention_without_an_adapter_stays_what_it_was() -> None:
    base = Translator()
    attention = base.layers.encoder.layers[0].self_attn
    model = get_peft_model(
        base, wasi_peft.WasiConfig(target_modules=["linear1"], weight_rank=4, base_weight="keep", residual=None)
    )
    assert base.layers.encoder.layers[0].self_attn is attention
    assert not any(parameter.requires_grad for parameter in attention.parameters())
    assert model.unload().layers.encoder.layers[0].self_attn is attention


def test_projections_are_prepared_with_data() -> None:
    base = Translator()
    config = wasi_peft.WasiConfig(weight_share=0.6)
    factors = wasi_peft.preprocess_wasi(base, config, [batch()] * 2, repair_steps=0, progress_bar=False)
    assert set(factors.layers) == NAMES
    assert isinstance(base.layers.decoder.layers[0].multihead_attn, nn.MultiheadAttention)
    model = get_peft_model(copy.deepcopy(base), wasi_peft.WasiConfig(weight_share=0.6))
    assert {layer.name: layer.weight_rank for layer in model.wasi_summary().layers} == factors.ranks
    plain = Translator()
    factors.attach(plain)
    other = get_peft_model(plain, wasi_peft.WasiConfig(weight_share=0.6))
    torch.testing.assert_close(answers(other), answers(model))


def test_preparation_leaves_what_trains_of_an_attention_as_it_was() -> None:
    base = Translator()
    attention = base.layers.encoder.layers[0].self_attn
    attention.in_proj_bias.requires_grad_(False)
    wasi_peft.preprocess_wasi(
        base, wasi_peft.WasiConfig(weight_share=0.6), [batch()], repair_steps=0, progress_bar=False
    )
    trains = {name: parameter.requires_grad for name, parameter in attention.named_parameters()}
    assert [name for name, value in trains.items() if not value] == ["in_proj_bias"]


def test_projections_read_one_input_together() -> None:
    """q, k and v keep one rounded copy of what they read, where they read the same."""
    model = get_peft_model(Translator(), wasi_peft.WasiConfig(weight_rank=4)).train()
    attention = model.base_model.model.layers.encoder.layers[0].self_attn
    x = torch.randn(2, 5, 16)
    attention(x, x, x)[0].sum()
    entry = attention.q_proj.inputs.of(x)
    assert len(entry.rounded) == 1 and attention.k_proj.inputs is attention.q_proj.inputs


def test_an_estimate_counts_the_projections() -> None:
    base = Translator()
    config = wasi_peft.WasiConfig(weight_rank=4, residual_product="restored")
    estimate = wasi_peft.estimate_wasi(base, config, batch=batch(labels=True), optimizer=None)
    model = get_peft_model(base, config)
    stored = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert abs(estimate.weights_bytes - stored) < 0.02 * stored
