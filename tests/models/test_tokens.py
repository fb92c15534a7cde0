"""Token dropping: blocks see some of the patches while a model trains, all of them otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, checkpoint_activations
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig, estimate_wasi
from wasi_peft.models.structure import Structure
from wasi_peft.models.tokens import TokenDropping, drop_patches, token_places

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
PATCHES = 16


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.ViTForImageClassification(tf.ViTConfig(**{**sizes, **options}))


def dinov2_with_registers() -> nn.Module:
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return tf.Dinov2WithRegistersForImageClassification(
        tf.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=4)
    )


def clip() -> nn.Module:
    text = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {name: value for name, value in SIZES.items() if name != "num_labels"}
    return tf.CLIPModel(tf.CLIPConfig(text_config={**text, "intermediate_size": 24}, vision_config=sizes))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batch() -> dict[str, Tensor]:
    return {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}


def rows_seen(model: nn.Module, run: Any) -> list[int]:
    """Tokens of a sample in what each block answers."""
    seen: list[int] = []

    def look(_: nn.Module, args: Any, output: Any) -> None:
        seen.append((output if torch.is_tensor(output) else output[0]).shape[1])

    handles = [block.register_forward_hook(look) for block in Structure(model).blocks.values()]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_each_sample_keeps_patches_of_its_own_in_their_order() -> None:
    """Values that tell where they were."""
    states = torch.arange(10.0).view(1, 10, 1).expand(50, 10, 2) + 100 * torch.arange(50.0).view(50, 1, 1)
    fewer = drop_patches(states, prefix=2, keep=0.5)
    assert fewer.shape == (50, 6, 2)
    positions = (fewer[..., 0] - 100 * torch.arange(50.0).view(50, 1)).long()
    assert torch.equal(positions[:, :2], torch.tensor([0, 1]).expand(50, 2))
    assert bool((positions[:, 1:] > positions[:, :-1]).all())
    counts = torch.bincount(positions[:, 2:].flatten(), minlength=10)[2:]
    assert counts.sum() == 200 and bool((counts > 5).all()) and len(set(map(tuple, positions.tolist()))) > 20
    assert drop_patches(states, prefix=2, keep=0.01).shape[1] == 3  # one at least


@pytest.mark.parametrize(
    ("make", "prefix"), [(vit, 1), (dinov2_with_registers, 5), (clip, 1)], ids=["vit", "dinov2 with registers", "clip"]
)
def test_blocks_see_fewer_tokens_in_training_alone(make: Any, prefix: int) -> None:
    model = get_peft_model(make(), WasiConfig(token_keep=0.25, weight_rank=2))
    call = model.get_image_features if isinstance(model.get_base_model(), tf.CLIPModel) else model
    few, all_of_them = [prefix + 4] * 2, [prefix + PATCHES] * 2
    assert rows_seen(model.train(), lambda: call(pixel_values=images())) == few
    assert rows_seen(model.eval(), lambda: call(pixel_values=images())) == all_of_them


def test_a_step_is_that_of_the_patches_that_were_drawn() -> None:
    """Against the parts of the model, called one by one."""
    model = get_peft_model(vit(), WasiConfig(token_keep=0.5, weight_rank=2, residual="exact")).train()
    torch.manual_seed(3)
    answer = model(pixel_values=images()).logits
    base = model.get_base_model()
    torch.manual_seed(3)
    states = drop_patches(base.vit.embeddings(images()), 1, 0.5)
    (dropping,) = [
        hook.__self__
        for module in base.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), TokenDropping)
    ]
    dropping.keep = 1.0  # the parts are hooked too
    for block in Structure(base).blocks.values():
        block.eval()
        states = block(states)
    torch.testing.assert_close(answer, base.classifier(base.vit.layernorm(states)[:, 0]))


@pytest.mark.parametrize("mode", ["fast", "small"])
def test_memory_modes_train_on_the_same_patches(mode: str) -> None:
    """They round by a few per cent; other patches change far more."""
    gradients = []
    for memory_mode, seed in (("exact", 3), (mode, 3), ("exact", 4)):
        config = WasiConfig(token_keep=0.5, weight_rank=2, residual="exact", memory_mode=memory_mode)
        model = get_peft_model(vit(), config).train()
        torch.manual_seed(seed)
        model(**batch()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, rounded, others = gradients
    assert float((exact - rounded).norm()) < 0.1 * float(exact.norm()) < 0.3 * float((exact - others).norm())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_draw_the_same_patches(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(vit(), WasiConfig(token_keep=0.5, weight_rank=2, residual="exact")).train()
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**batch()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_the_estimate_counts_the_tokens_that_are_left() -> None:
    whole, half = (estimate_wasi(vit(), WasiConfig(token_keep=keep), batch=batch()) for keep in (None, 0.5))
    assert half.inference_flops == whole.inference_flops
    assert 0.4 < half.training_flops / whole.training_flops < 0.7
    assert half.saved_bytes < 0.7 * whole.saved_bytes


def test_a_saved_adapter_and_a_merged_model(tmp_path: Path) -> None:
    model = get_peft_model(vit(), WasiConfig(token_keep=0.5, weight_rank=2, modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True)
    assert rows_seen(loaded.train(), lambda: loaded(**batch())) == [9, 9]
    merged = loaded.merge_and_unload(dense=True).train()
    assert rows_seen(merged, lambda: merged(**batch())) == [17, 17]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.modules())


def test_adapters_of_a_model_drop_alike() -> None:
    model = get_peft_model(vit(), WasiConfig(token_keep=0.5, weight_rank=2))
    with pytest.raises(ValueError, match=r"same token_keep, got \[0.5, None\]"):
        model.add_adapter("other", WasiConfig(weight_rank=2))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: ARCHITECTURES["swin"].model(), "stages of several sizes"),
        (lambda: ARCHITECTURES["bert"].model(), "one patch embedding.* has 0"),
        (
            lambda: tf.BeitForImageClassification(tf.BeitConfig(**SIZES, use_relative_position_bias=True)),
            r"relative_position.* is made for all tokens",
        ),
    ],
)
def test_models_of_other_kinds_are_refused_before_anything_changes(make: Any, rule: str) -> None:
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rule):
        get_peft_model(model, WasiConfig(token_keep=0.5))
    assert dict(model.named_modules()) == before


def test_positions_that_blocks_are_told_are_refused() -> None:
    """DINOv3 rotates what each patch asks and answers."""
    config = tf.DINOv3ViTConfig(**{name: SIZES[name] for name in SIZES if name != "num_labels"})
    model = get_peft_model(tf.DINOv3ViTModel(config), WasiConfig(token_keep=0.5, weight_rank=2))
    with pytest.raises(ValueError, match="told nothing about each token"):
        model.train()(pixel_values=images())


@pytest.mark.parametrize("value", [0, 1.5, float("nan"), "half"])
def test_a_share_is_in_zero_to_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"token_keep must be a number in \(0, 1\]"):
        WasiConfig(token_keep=value)


def test_all_of_the_patches_is_no_dropping() -> None:
    assert WasiConfig(token_keep=1).token_keep is None
    assert token_places(vit())[0].endswith("projection")
