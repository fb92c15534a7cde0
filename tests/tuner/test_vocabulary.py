"""`WasiConfig(vocabulary="int8")` from a user's view: what it saves, that all else works, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, checkpoint_activations
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from strategies import relative_error
from torch import Tensor, nn

from wasi_peft import WasiConfig, estimate_wasi, load_adapter, measure_peak_memory
from wasi_peft.forms.dense import build_dense
from wasi_peft.forms.vocabulary import Vocabulary, VocabularyWeight
from wasi_peft.memory import MEMORY_MODES
from wasi_peft.memory.loss import DeferredLogits

NAMES = ["llama", "llama_tied", "gpt2", "t5", "bert"]


def llama(tied: bool = True, **sizes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, **sizes}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**options))


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, WasiConfig(**{"weight_rank": 4, "vocabulary": "int8", **options}))


def tokens(samples: int = 3, length: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(5, 400, (samples, length))
    return {"input_ids": ids, "labels": ids}


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def with_rounded_tables(model: Any) -> Any:
    """The model with the values in its embedding and head that 8 bits have, dense."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is not None:
            table.weight.data.copy_(Vocabulary(build_dense(nn.Linear, table.weight.detach(), None)).dense_weight())
    return model


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_computes_what_the_rounded_table_would(name: str, mode: str) -> None:
    architecture = ARCHITECTURES[name]
    batch = architecture.batch()
    options = {"memory_mode": mode, "residual_product": "restored"}
    dense = adapted(with_rounded_tables(architecture.model()), vocabulary=None, **options)
    small = adapted(architecture.model(), **options)
    assert small.get_memory_footprint() < dense.get_memory_footprint()
    assert any(isinstance(module, Vocabulary) for module in small.modules())
    loss, wanted = step(dense, batch)
    found_loss, found = step(small, batch)
    assert found_loss == pytest.approx(float(loss), rel=1e-4)
    assert found.keys() == wanted.keys()
    assert relative_error(flat(found), flat(wanted)) < (1e-3 if mode == "exact" else 2e-2)
    dense.eval(), small.eval()
    with torch.no_grad():
        assert relative_error(small(**batch).logits, dense(**batch).logits) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_quarter_of_the_table_is_left(tied: bool) -> None:
    tables = 1 if tied else 2
    dense, small = (adapted(llama(tied), vocabulary=kind) for kind in (None, "int8"))
    saved = dense.get_memory_footprint() - small.get_memory_footprint()
    assert saved == tables * (400 * 32 * 4 - 400 * (32 + 4))
    base = small.get_base_model()
    assert (base.model.embed_tokens.weight.vocabulary is base.lm_head.weight.vocabulary) == tied
    assert type(base.lm_head) is nn.Linear and base.get_input_embeddings() is base.model.embed_tokens


def test_no_step_holds_all_logits() -> None:
    model = adapted(llama()).train()
    output = model(**tokens())
    assert isinstance(output.logits, DeferredLogits) and "computed=False" in repr(output.logits)
    base = model.get_base_model()
    hidden = base.model(input_ids=tokens()["input_ids"]).last_hidden_state
    weight = base.lm_head.weight.multiplied_out()
    assert relative_error(output.logits.float(), hidden @ weight.T) < 1e-2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains(dtype: torch.dtype, autocast: bool) -> None:
    losses: dict[str | None, list[float]] = {"int8": [], None: []}
    batch = tokens()
    for kind, found in losses.items():
        model = adapted(llama().to(dtype), vocabulary=kind)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(float(step(model, batch)[0]))
            optimizer.step()
    assert losses["int8"][-1] < 0.97 * losses["int8"][0]
    assert losses["int8"] == pytest.approx(losses[None], rel=5e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    batch = tokens()
    loss, wanted = step(adapted(llama()), batch)
    model = adapted(llama())
    checkpoint_activations(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found_loss, found = step(model, batch)
    assert torch.allclose(found_loss, loss) and relative_error(flat(found), flat(wanted)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_without_a_break(dtype: torch.dtype) -> None:
    """Also after the model was cast, which the stand-in follows."""
    model, batch = adapted(llama(num_hidden_layers=1), residual_product="restored"), tokens()
    step(model, batch)  # first factors meet their data
    model.to(dtype)
    loss, wanted = step(model, batch)
    torch._dynamo.reset()
    found_loss, found = step(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    assert found_loss == pytest.approx(float(loss), rel=1e-5)
    assert relative_error(flat(found), flat(wanted)) < (1e-5 if dtype == torch.float32 else 2e-2)
    model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        answer = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
        assert relative_error(answer, model(**batch).logits) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("form", ["residual", "factors"])
def test_an_adapter_that_is_saved_and_loaded_answers_the_same(form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if form == "residual" else {"residual": None, "activation_threshold": None}
    model, batch = adapted(llama(), **options), tokens()
    step(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path)
    assert not any("vocabulary" in key or "embed" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].vocabulary == "int8"
    assert isinstance(loaded.get_base_model().lm_head.weight, VocabularyWeight)
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, wanted)
        ids = batch["input_ids"][:1]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(input_ids=ids, **options), model.generate(input_ids=ids, **options))
        merged = loaded.merge_and_unload().eval()
        assert (
            type(merged.lm_head.weight) is nn.Parameter and merged.lm_head.weight is merged.model.embed_tokens.weight
        )
        assert merged.config.tie_word_embeddings  # PEFT unties a model whose tables lie in two places
        assert relative_error(merged(**batch).logits, wanted) < 0.05
    merged.save_pretrained(tmp_path / "merged")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, merged(**batch).logits)


def test_adapters_share_the_table_and_the_base_model_has_it_too() -> None:
    model, batch = adapted(llama()), tokens()
    vocabulary = model.get_base_model().lm_head.vocabulary
    model.add_adapter("second", WasiConfig(weight_rank=4, vocabulary="int8"))
    model.set_adapter("second")
    step(model, batch)
    assert model.get_base_model().lm_head.vocabulary is vocabulary
    with pytest.raises(ValueError, match=r"All adapters of a model must have the same vocabulary, got \['int8'.*None"):
        model.add_adapter("third", WasiConfig(weight_rank=4))
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        answer = model(**batch).logits
    plain = llama().eval()
    with torch.no_grad():
        assert relative_error(answer, plain(**batch).logits) < 0.05
        base = model.unload().eval()
        assert relative_error(base(**batch).logits, answer) < 0.05
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not any(isinstance(module, Vocabulary) for module in base.modules())
    assert not any(isinstance(value, VocabularyWeight) for module in base.modules() for value in vars(module).values())


@pytest.mark.parametrize("change", ["tie_weights", "resize_token_embeddings"])
def test_what_needs_the_dense_table_says_so_and_changes_nothing(change: str) -> None:
    model, batch = adapted(llama()).eval(), tokens()
    base = model.get_base_model()
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises((AttributeError, ValueError), match="weight"):
            base.tie_weights() if change == "tie_weights" else base.resize_token_embeddings(410)
        assert torch.equal(model(**batch).logits, before)
    assert isinstance(base.lm_head.weight, VocabularyWeight) and base.lm_head.out_features == 400


def test_estimates_know_it() -> None:
    config = WasiConfig(weight_rank=8, vocabulary="int8")
    sizes = {"vocab_size": 20000, "hidden_size": 128, "intermediate_size": 128}
    batch = tokens(8, 32)
    estimates = {
        kind: estimate_wasi(llama(**sizes), WasiConfig(weight_rank=8, vocabulary=kind), batch=batch).peak_bytes
        for kind in ("int8", None)
    }
    base = llama(**sizes)
    kept = list(base.parameters())  # what was there before may not be freed: the profiler guesses at its size

    def steps() -> None:
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for _ in range(2):
            step(model, batch)
            optimizer.step()

    measured = measure_peak_memory(steps).peak_bytes
    assert kept and estimates["int8"] < estimates[None]
    assert 0.9 * measured < estimates["int8"] < 1.1 * measured


@pytest.mark.parametrize("form", ["residual", "factors"])
def test_an_interrupt_leaves_a_dense_model(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, but for layers that had been rounded."""
    model, batch = llama().eval(), tokens()
    before, keys = model(**batch).logits, set(model.state_dict())

    def interrupted(self: Any, weight: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Vocabulary, "_hold", interrupted)
    options: dict[str, Any] = {} if form == "residual" else {"residual": None, "activation_threshold": None}
    with pytest.raises(KeyboardInterrupt):
        adapted(model, **options)
    assert set(model.state_dict()) == keys
    assert relative_error(model(**batch).logits, before) < (0.02 if form == "residual" else 1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocabulary": "int4"}, r"vocabulary must be one of 'int8', None, got 'int4'"),
        ({"residual": "exact"}, r"residual='exact' with base_weight='release' leaves exact"),
        ({"residual": None, "base_weight": "keep"}, r"base_weight='keep' leaves exact"),
        ({"trainable_token_indices": [1, 2]}, r"keeps all embeddings frozen, got trainable_token_indices=\[1, 2\]"),
    ],
)
def test_settings_that_do_not_go_with_it(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WasiConfig(**{"vocabulary": "int8", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "keeps the head frozen, but lm_head is to train"),
        ({"modules_to_save": ["embed_tokens"]}, "keeps the embedding frozen, but model.embed_tokens is to train"),
        ({"target_modules": ["q_proj", "lm_head"]}, "keeps the head frozen, but lm_head is to train"),
    ],
)
def test_what_trains_is_not_rounded(options: dict[str, Any], said: str) -> None:
    model = llama(tied=False)
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=said):
        adapted(model, **options)
    assert set(model.state_dict()) == keys


def test_models_without_such_a_table_are_refused() -> None:
    model = ARCHITECTURES["vit"].model()
    with pytest.raises(ValueError, match=r"needs a model that embeds tokens by an nn.Embedding, got ViT"):
        adapted(model)
    lora = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"])).get_base_model()
    with pytest.raises(ValueError, match="keeps the head frozen, but lm_head is to train"):
        adapted(lora)
    renormalised = llama()
    renormalised.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match=r"it has max_norm=1.0 and sparse=False"):
        adapted(renormalised)
    half = llama()
    half.model.embed_tokens.weight = half.lm_head.weight = nn.Parameter(
        torch.zeros(400, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="needs a dense weight of floating point numbers in the embedding"):
        adapted(half)


def test_a_table_that_another_kind_of_module_shares_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = llama()
    model.model.table = Table(model.lm_head.weight)
    with pytest.raises(
        ValueError, match=r"model.table: vocabulary='int8' rounds tables .*, and this Table shares one"
    ):
        adapted(model)
    assert type(model.lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"residual": None, "weight_rank": 20}], ids=["residual", "factors"])
def test_loading_without_a_second_copy_in_memory(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    llama(tied).save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, batch = adapted(base, **options).eval(), tokens()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits + 0
        for loaded in (
            PeftModel.from_pretrained(llama(tied), tmp_path / "adapter", low_cpu_mem_usage=True),
            load_adapter(tmp_path / "adapter"),
        ):
            assert not any(buffer.is_meta for buffer in loaded.buffers())
            torch.testing.assert_close(loaded.eval()(**batch).logits + 0, expected)
