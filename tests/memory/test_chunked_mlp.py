"""MLPs in chunks of tokens against the same models as they are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, checkpoint_activations, wasi_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from wasi_peft import SubspaceSGD, measure_peak_memory
from wasi_peft.memory import ChunkedMLPs, leave_memory_mode
from wasi_peft.models.position_wise import is_position_wise

EXPECTED = {
    "vit": ["vit.layers.0.mlp", "vit.layers.1.mlp"],
    "dinov2": ["dinov2.encoder.layer.0.mlp", "dinov2.encoder.layer.1.mlp"],
    "gpt2": ["transformer.h.0.mlp", "transformer.h.1.mlp"],
    "llama": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "t5": [
        "encoder.block.0.layer.1",
        "encoder.block.1.layer.1",
        "decoder.block.0.layer.2",
    ],
}


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one training step and the gradients it left."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    return ARCHITECTURES[name].model().train(), ARCHITECTURES[name].batch()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_step_is_the_same(name: str, recompute: bool) -> None:
    model, batch = built(name)
    ordinary = step(model, batch)
    state = model.state_dict().keys()
    if recompute:
        checkpoint_activations(model, {"use_reentrant": False})
    ChunkedMLPs(3).install(model)
    assert list(ChunkedMLPs.find(model)) == EXPECTED[name]
    assert [each for each, module in model.named_modules() if "forward" in vars(module)] == EXPECTED[name]
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(step(model, batch), ordinary, rtol=1e-4, atol=1e-6)
    assert model.state_dict().keys() == state


@pytest.mark.parametrize("kind", ["lora", "wasi"])
@pytest.mark.parametrize("before", [True, False])
def test_peft_models(kind: str, before: bool) -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return (wasi_model(model) if kind == "wasi" else get_peft_model(model, lora)).train()

    model, batch = built("llama")
    ordinary = step(adapted(model), batch)
    model, _ = built("llama")
    if before:
        ChunkedMLPs(3).install(model)
        model = adapted(model)
    else:
        model = adapted(model)
        ChunkedMLPs(3).install(model)
    assert len(ChunkedMLPs.find(model)) == 2
    torch.testing.assert_close(step(model, batch), ordinary, rtol=1e-4, atol=1e-5)


def test_the_product_gradient_of_the_papers_step_is_that_of_all_chunks() -> None:
    models = []
    for chunked in (False, True):
        model, batch = built("llama")
        if chunked:
            ChunkedMLPs(3).install(model)
        model = wasi_model(model).train()
        optimizer = SubspaceSGD(model, lr=0.1)
        model(**batch).loss.backward()
        optimizer.step()
        models.append(model.state_dict())
    torch.testing.assert_close(*models, rtol=1e-4, atol=1e-5)


def test_chunks_are_what_the_mlp_sees() -> None:
    model, batch = built("llama")
    ChunkedMLPs(5).install(model)
    seen: list[int] = []
    mlp = model.model.layers[0].mlp
    forward = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: seen.append(x.shape[-2]) or forward(x)
    with torch.no_grad():
        model.eval()(**batch)
        assert seen == [5, 5, 5, 5, 5, 3]  # of 4 x 7 tokens
        seen.clear()
        mlp(torch.zeros(1, 4, 16))
        assert seen == [4]
        seen.clear()
        handle = mlp.down_proj.register_forward_hook(lambda *_: None)
        mlp(torch.zeros(1, 8, 16))
        assert seen == [8]  # what the hook records is of all tokens
        handle.remove()
        mlp(torch.zeros(1, 8, 16))
        assert seen == [8, 5, 3]


def test_copies_pickles_and_undoing() -> None:
    model, batch = built("llama")
    ChunkedMLPs(3).install(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = duplicate.model.layers[0].mlp
        assert mlp.forward.__self__ is mlp
        torch.testing.assert_close(step(duplicate, batch), step(model, batch))
    ChunkedMLPs(4).install(model)  # again: another size
    assert model.model.layers[0].mlp.forward.run.rows == 4 and model.model.layers[0].mlp.forward.inner.replaced is None
    ChunkedMLPs().remove(model)
    ChunkedMLPs().remove(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_peak_of_a_recomputed_block_is_lower() -> None:
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = get_peft_model(tf.LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear")).train()
    checkpoint_activations(model, {"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(32, (4, 64))

    def peak() -> int:
        return measure_peak_memory(lambda: step(model, {"input_ids": ids, "labels": ids})).peak_bytes

    ordinary = peak()
    ChunkedMLPs(32).install(model)
    assert peak() < 0.6 * ordinary


def test_compressed_inputs_are_refused_and_left_alone() -> None:
    model, batch = built("llama")
    compressed = wasi_model(model, activation_ranks=4)
    with pytest.raises(ValueError, match=r"mlp: its layers need whole batches"):
        ChunkedMLPs().install(compressed)
    leave_memory_mode(compressed, "exact")
    assert not any("forward" in module.__dict__ for module in compressed.modules())
    expected = step(compressed.train(), batch)
    model, _ = built("llama")
    ChunkedMLPs(3).install(model)
    torch.testing.assert_close(step(wasi_model(model, activation_ranks=4).train(), batch), expected)


class Mixing(nn.Module):
    """Two linear layers around a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.b(self.a(hidden).relu() + self.a(hidden).mean(1, keepdim=True))


class Bottleneck(Mixing):
    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.a(hidden).relu())


class NeedsMore(Mixing):
    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.b(self.a(hidden).relu()) + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_position_wise_modules_are_told_by_trying(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert is_position_wise(Bottleneck().to(dtype))
    assert not is_position_wise(Mixing().to(dtype))
    assert not is_position_wise(NeedsMore().to(dtype))
    assert not is_position_wise(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5)).to(dtype))
    assert not is_position_wise(nn.ReLU())


def test_bad_input_changes_nothing() -> None:
    for rows in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"rows must be an integer of at least 1, got {rows}"):
            ChunkedMLPs(rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no module inside the blocks of Linear"):
        ChunkedMLPs().install(nn.Linear(3, 3))


def test_a_module_says_whether_it_needs_whole_batches() -> None:
    class Whole(nn.Linear):
        needs_whole_batches = True

    model, _ = built("llama")
    model.model.layers[1].mlp.up_proj = Whole(16, 24, bias=False)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp: its layers need whole batches"):
        ChunkedMLPs().install(model)
    model.model.layers[1].mlp.up_proj.needs_whole_batches = False
    ChunkedMLPs().install(model)
