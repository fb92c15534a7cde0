"""PEFT's other methods on compressed layers: they train; what would write to a weight is refused in one sentence."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, logits, train
from peft import get_peft_model
from torch import Tensor

from wasi_peft import WasiConfig, compress
from wasi_peft.forms.compressed import Compressed

pytestmark = pytest.mark.usefixtures("exact_products")

LLAMA = ARCHITECTURES["llama"]
BOTH: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
SQUARE: dict[str, Any] = {"target_modules": ["q_proj"]}
METHODS: dict[str, Any] = {
    "lora": peft.LoraConfig(**BOTH, r=2),
    "rslora": peft.LoraConfig(**BOTH, r=2, use_rslora=True),
    "lora with bias": peft.LoraConfig(**BOTH, r=2, lora_bias=True),
    "lora from orthogonal": peft.LoraConfig(**BOTH, r=2, init_lora_weights="orthogonal"),
    "dora": peft.LoraConfig(**BOTH, r=2, use_dora=True),
    "adalora": peft.AdaLoraConfig(**BOTH, init_r=2, target_r=1, total_step=10),
    "loha": peft.LoHaConfig(**BOTH, r=2),
    "lokr": peft.LoKrConfig(**BOTH, r=2),
    "ia3": peft.IA3Config(**BOTH, feedforward_modules=["up_proj"]),
    "vera": peft.VeraConfig(**SQUARE, r=2),
    "oft": peft.OFTConfig(**BOTH, r=0, oft_block_size=4),
    "boft": peft.BOFTConfig(**BOTH, boft_block_size=4),
    "hra": peft.HRAConfig(**BOTH, r=2),
    "vblora": peft.VBLoRAConfig(**BOTH, num_vectors=8, vector_length=4, topk=2, r=2),
    "fourierft": peft.FourierFTConfig(**BOTH, n_frequency=8),
}
STARTS_ELSEWHERE = {"fourierft", "vblora"}  # these change the answers before they have trained
WRITES = ["pissa", "pissa_niter_2", "olora"]  # starts of LoRA that take something out of the base


def base(kind: str) -> Any:
    return compress(LLAMA.model(), WasiConfig(**{"int8": {}, "factors": {"weight_share": 0.6}}[kind])).eval()


def weights(model: Any) -> dict[str, Tensor]:
    """Of the compressed layers, by what their names have in common with and without an adapter."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Compressed)}
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer.weight.multiplied_out()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("kind", ["int8", "factors"])
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_cannot_be_merged(method: str, kind: str) -> None:
    model, batch = base(kind), LLAMA.batch()
    before, stored = logits(model, batch), weights(model)
    model = get_peft_model(model, METHODS[method])
    if method not in STARTS_ELSEWHERE:
        torch.testing.assert_close(logits(model.eval(), batch), before, atol=1e-4, rtol=1e-4)
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    with pytest.raises(AttributeError, match=r"model\.dequantize\(\)"):
        model.merge_and_unload()
    after = weights(model)
    assert after.keys() == stored.keys() and all(torch.equal(after[name], value) for name, value in stored.items())
    for parameter in (part for name, part in model.named_parameters() if ".form." in name or ".residual." in name):
        assert not parameter.requires_grad


@pytest.mark.parametrize("start", WRITES)
def test_a_start_that_writes_to_the_base_is_refused(start: str) -> None:
    model = base("int8")
    stored = weights(model)
    with pytest.raises(AttributeError, match=r"this weight is multiplied out .* would be lost.*model\.dequantize\(\)"):
        get_peft_model(model, peft.LoraConfig(**BOTH, r=2, init_lora_weights=start))
    assert all(torch.equal(weights(model)[name], value) for name, value in stored.items())


def test_dora_on_a_compressed_layer_is_dora_on_its_weight() -> None:
    """The same answers as on the dense layers that it stands for, before and after a step."""
    config = peft.LoraConfig(**BOTH, r=2, use_dora=True)
    batch, answers = LLAMA.batch(), []
    for model in (base("int8"), base("int8").dequantize()):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        train(adapted, batch, steps=3)
        answers.append(logits(adapted.eval(), batch))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-3)
