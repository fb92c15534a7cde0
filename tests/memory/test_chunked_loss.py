"""The chunked cross-entropy against all logits at once, alone and inside transformers models."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import ARCHITECTURES, VOCABULARY, wasi_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from wasi_peft import measure_peak_memory
from wasi_peft.linalg import low_bit
from wasi_peft.memory import ChunkedLoss, chunked_cross_entropy
from wasi_peft.memory.loss import DeferredLogits, default_chunk_rows

V, H = 23, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# ------------------------------------------------------------------------------------------------- the function


def problem(
    bias: bool = True, dtype: torch.dtype = torch.float64, ignored: str = "some"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states of 3 x 7 tokens, head weight, head bias, labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(V, (3, 7), generator=generator)
    if ignored == "some":
        labels[torch.rand(3, 7, generator=generator) < 0.4] = -100
    elif ignored == "all":
        labels[:] = -100
    return hidden, weight, b, labels


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **options: Any) -> Tensor:
    """What transformers computes; in float64 where the inputs are, which its `float()` would lower."""
    logits = F.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        return ForCausalLMLoss(logits, labels, vocab_size=V, **options)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    items = options.get("num_items_in_batch")
    loss = F.cross_entropy(logits.view(-1, V), shifted, reduction="mean" if items is None else "sum")
    return loss if items is None else loss / items


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs if x is not None and x.requires_grad]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(
    dtype: torch.dtype, items: Any, chunk_rows: int | None, bias: bool
) -> None:
    hidden, weight, b, labels = problem(bias, dtype)
    expected = reference(hidden, weight, b, labels, num_items_in_batch=items)
    loss = chunked_cross_entropy(hidden, weight, b, labels, num_items_in_batch=items, chunk_rows=chunk_rows)
    assert loss.dtype == expected.dtype and loss.shape == ()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(3 * loss, hidden, weight, b), gradients(3 * expected, hidden, weight, b), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("tile", [1, 2 * V, 3 * V - 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tiles_of_a_chunk_change_nothing(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *inputs, labels = problem(dtype=dtype)
    whole = chunked_cross_entropy(*inputs, labels, chunk_rows=5)
    expected = gradients(whole, *inputs)
    monkeypatch.setattr(low_bit, "TILE", tile)
    loss = chunked_cross_entropy(*inputs, labels, chunk_rows=5)
    torch.testing.assert_close(loss, whole)
    for own, other in zip(gradients(loss, *inputs), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_logits_in_16_bits_are_widened_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 64, 4096
    monkeypatch.setattr(low_bit, "TILE", vocabulary)
    hidden, weight = torch.randn(1, rows, 4).bfloat16().requires_grad_(), torch.randn(vocabulary, 4).bfloat16()
    labels = torch.zeros(1, rows, dtype=torch.int64)
    peak = measure_peak_memory(lambda: chunked_cross_entropy(hidden, weight, None, labels).backward())
    assert peak.peak_bytes < 1.5 * 2 * rows * vocabulary  # the logits in 16 bits; those in 32 would come on top


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_gradients_of_what_requires_one(needs: tuple[bool, bool, bool]) -> None:
    *tensors, labels = problem()
    inputs = [x.requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    own = gradients(chunked_cross_entropy(*inputs, labels, chunk_rows=4), *inputs)
    other = gradients(reference(*inputs, labels), *inputs)
    assert len(own) == sum(needs)
    torch.testing.assert_close(own, other)


def test_gradcheck() -> None:
    *inputs, labels = problem()
    assert torch.autograd.gradcheck(lambda *x: chunked_cross_entropy(*x, labels, chunk_rows=4), tuple(inputs))


def test_a_head_that_shares_its_weight_with_the_embedding() -> None:
    _, weight, _, labels = problem(bias=False)
    tokens = labels.clamp_min(0)
    own = gradients(chunked_cross_entropy(F.embedding(tokens, weight).tanh(), weight, None, labels), weight)
    torch.testing.assert_close(
        own, gradients(reference(F.embedding(tokens, weight).tanh(), weight, None, labels), weight)
    )


@pytest.mark.parametrize("items", [None, 5])
def test_all_labels_ignored(items: int | None) -> None:
    hidden, weight, bias, labels = problem(dtype=torch.float32, ignored="all")
    loss = chunked_cross_entropy(hidden, weight, bias, labels, num_items_in_batch=items)
    expected = reference(hidden, weight, bias, labels, num_items_in_batch=items)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    own, other = gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias)
    torch.testing.assert_close(own, other, equal_nan=True)


def test_another_ignored_label() -> None:
    hidden, weight, bias, labels = problem(ignored="none")
    labels[0, 2:5] = 0
    loss = chunked_cross_entropy(hidden, weight, bias, labels, ignore_index=0)
    torch.testing.assert_close(loss, reference(hidden, weight, bias, labels.masked_fill(labels == 0, -100)))


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, bias, labels = problem(dtype=torch.float32)
    hidden = (1e4 * hidden).detach().requires_grad_()
    own, other = (function(hidden, weight, bias, labels) for function in (chunked_cross_entropy, reference))
    torch.testing.assert_close(own, other)
    torch.testing.assert_close(gradients(own, hidden), gradients(other, hidden))


def test_backward_again_gives_the_same_and_a_second_derivative_is_refused() -> None:
    hidden, weight, bias, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, bias, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden, retain_graph=True), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="only be differentiated once, got backward with create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_without_grad_only_the_loss_is_computed() -> None:
    hidden, weight, bias, labels = problem(dtype=torch.float32)

    def loss() -> Tensor:
        with torch.no_grad():
            return chunked_cross_entropy(hidden, weight, bias, labels, chunk_rows=1)

    assert not loss().requires_grad
    torch.testing.assert_close(loss(), reference(hidden, weight, bias, labels).detach())
    assert measure_peak_memory(loss).peak_bytes < 4 * hidden.numel() + 4 * weight.numel()


def test_under_autocast_the_product_is_lowered_once() -> None:
    hidden, weight, bias, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, other = (function(hidden, weight, bias, labels) for function in (chunked_cross_entropy, reference))
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, other)
    for a, b in zip(gradients(own, hidden, weight, bias), gradients(other, hidden, weight, bias), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_hooks_that_make_saved_tensors_small_do_not_touch_the_gradient() -> None:
    hidden, weight, bias, labels = problem()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, torch.zeros_like):
        loss = chunked_cross_entropy(hidden, weight, bias, labels)
    torch.testing.assert_close(gradients(loss, hidden), gradients(reference(hidden, weight, bias, labels), hidden))


def test_peak_is_that_of_a_chunk() -> None:
    vocabulary, tokens, chunk = 4096, 256, 16
    hidden, weight = torch.randn(1, tokens, 8), torch.randn(vocabulary, 8)
    labels = torch.randint(vocabulary, (1, tokens))

    def run(loss: Any) -> None:
        x = hidden.clone().requires_grad_()
        loss(x).backward()

    full = measure_peak_memory(lambda: run(lambda x: ForCausalLMLoss(x @ weight.T, labels, vocabulary)))
    chunked = measure_peak_memory(
        lambda: run(lambda x: chunked_cross_entropy(x, weight, None, labels, chunk_rows=chunk))
    )
    logits_bytes = 4 * tokens * vocabulary
    assert full.peak_bytes > 3 * logits_bytes
    assert chunked.peak_bytes < 1.3 * logits_bytes * chunk / tokens
    labels[:, chunk // 2 :] = -100  # rows that are ignored have no logits
    few = measure_peak_memory(lambda: run(lambda x: chunked_cross_entropy(x, weight, None, labels, chunk_rows=tokens)))
    assert few.peak_bytes < chunked.peak_bytes


def test_default_chunk() -> None:
    assert default_chunk_rows(1000) == 16 * 2**20 // 4000
    assert default_chunk_rows(49152) == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 7, H + 1)}, "hidden must be"),
        ({"hidden": torch.zeros(H), "labels": torch.tensor(1)}, "hidden must be"),
        ({"weight": torch.zeros(V, H, 1)}, "weight"),
        ({"bias": torch.zeros(V - 1)}, r"bias must have shape \(23,\), got \(22,\)"),
        ({"bias": torch.zeros(V, dtype=torch.float64)}, "one floating dtype, got"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, r"labels must be int64 of shape \(3, 7\)"),
        ({"labels": torch.zeros(3, 7)}, "got torch.float32"),
        ({"labels": torch.full((3, 7), V)}, r"in \[0, 23\), got values from 23 to 23"),
        ({"labels": torch.full((3, 7), -1)}, "got values from -1 to -1"),
        ({"chunk_rows": 0}, "chunk_rows must be an integer of at least 1, or None, got 0"),
        ({"chunk_rows": 2.5}, "got 2.5"),
        ({"chunk_rows": True}, "got True"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 7, H),
        "weight": torch.zeros(V, H),
        "bias": None,
        "labels": torch.zeros(3, 7, dtype=torch.int64),
    }
    chunked_cross_entropy(**good)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{**good, **change})


# ------------------------------------------------------------------------------------------------- in a model

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "llama_tied": lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**GROUPED),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=2, output_router_logits=True),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED),
    "gemma": lambda: tf.GemmaConfig(**GROUPED),
    "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "phi": lambda: tf.PhiConfig(**SIZES, resid_pdrop=0.0),  # its head has a bias
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "stablelm": lambda: tf.StableLmConfig(**GROUPED),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
}
TRANSFORMING: dict[str, Any] = {
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, final_logit_softcapping=3.0),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=2.0),
    "cohere": lambda: tf.CohereConfig(**SIZES, logit_scale=0.25),
}


def build(config: Any, seed: int = 0) -> Any:
    """A model of a causal language model's configuration, in training mode."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
    return model.train()


def llama() -> Any:
    return build(CONFIGS["llama"]())


def tokens(samples: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Ids of `samples` x 7 tokens with labels, the first two of which are ignored."""
    ids = torch.randint(3, VOCABULARY, (samples, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Output of one training step and the gradients it left."""
    model.zero_grad()
    output = model(**{**tokens(), **options})
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_deferred(output: Any) -> bool:
    """Whether the logits of an output were never computed."""
    return isinstance(output.logits, DeferredLogits) and "computed=False" in repr(output.logits)


def assert_same_step(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first[0].loss, second[0].loss, rtol=tolerance, atol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.fixture(autouse=True)
def no_warning_unless_expected() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The logits were computed in full")
        yield


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(9)}], ids=["mean", "items"])
@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_take_the_same_step(name: str, options: dict[str, Any]) -> None:
    model = build(CONFIGS[name]())
    ordinary = step(model, **options)
    ChunkedLoss(3).install(model)
    chunked = step(model, **options)
    assert is_deferred(chunked[0])
    assert_same_step(chunked, ordinary)


def test_sequence_to_sequence_takes_the_same_step() -> None:
    architecture = ARCHITECTURES["t5"]
    model = architecture.model().train()
    ordinary = step(model, **architecture.batch())
    ChunkedLoss(3).install(model)
    chunked = step(model, **architecture.batch())
    assert is_deferred(chunked[0])
    assert_same_step(chunked, ordinary)


@pytest.mark.parametrize("name", TRANSFORMING)
def test_models_that_change_their_logits_compute_them(name: str) -> None:
    model = build(TRANSFORMING[name]())
    ordinary = step(model)
    ChunkedLoss().install(model)
    with pytest.warns(UserWarning, match="The logits were computed in full, because '.*(div|mul).*' was applied"):
        changed = step(model)
    assert not isinstance(changed[0].logits, DeferredLogits)
    assert_same_step(changed, ordinary)
    torch.testing.assert_close(changed[0].logits, ordinary[0].logits)


@pytest.mark.parametrize("name", TRANSFORMING)
def test_they_do_so_in_silence_where_that_is_asked_for(name: str) -> None:
    model = build(TRANSFORMING[name]())
    ordinary = step(model)
    ChunkedLoss(warns=False).install(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = step(model)
    assert_same_step(changed, ordinary)


def test_replicas_of_data_parallel_return_logits_that_can_be_gathered() -> None:
    model = llama()
    ChunkedLoss().install(model)
    model.lm_head = model.lm_head._replicate_for_data_parallel()
    model.lm_head._parameters = dict(llama().lm_head._parameters)  # which replicate() fills in
    assert type(model(**tokens()).logits) is Tensor


def test_in_half_precision() -> None:
    model = llama().bfloat16()
    ordinary = step(model)
    ChunkedLoss(3).install(model)
    chunked = step(model)
    assert is_deferred(chunked[0])
    assert chunked[0].loss.dtype == torch.float32
    torch.testing.assert_close(chunked[0].loss, ordinary[0].loss)
    own, other = (x[1]["lm_head.weight"].float() for x in (chunked, ordinary))
    torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_under_autocast() -> None:
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ordinary = model(**tokens())
        ChunkedLoss(3).install(model)
        chunked = model(**tokens())
    assert is_deferred(chunked)
    assert chunked.logits.dtype == torch.bfloat16
    torch.testing.assert_close(chunked.loss, ordinary.loss)
    with pytest.warns(UserWarning, match="computed in full"):
        torch.testing.assert_close(chunked.logits + 0, ordinary.logits)


def test_eval_and_removal_leave_everything_as_it_was() -> None:
    model = llama()
    expected = model(**tokens())
    ChunkedLoss().install(model)
    model.eval()
    assert type(model(**tokens()).logits) is Tensor
    torch.testing.assert_close(model(**tokens()).logits, expected.logits)
    ids = tokens()["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)
    model.train()
    ChunkedLoss().install(model)  # once more changes nothing
    assert is_deferred(model(**tokens()))
    ChunkedLoss().remove(model)
    ChunkedLoss().remove(model)
    assert type(model(**tokens()).logits) is Tensor
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_logits_without_labels_are_the_ordinary_ones_when_used(keep: int) -> None:
    model = llama()
    ids = tokens()["input_ids"]
    expected = model(ids, logits_to_keep=keep).logits
    ChunkedLoss().install(model)
    logits = model(ids, logits_to_keep=keep).logits
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert (logits.ndim, len(logits), logits.size(-1)) == (3, 2, VOCABULARY)
    with pytest.warns(UserWarning, match="because 'softmax' was applied to them"):
        own = gradients(logits.softmax(-1)[..., 0].sum(), model.lm_head.weight, model.model.norm.weight)
    other = gradients(expected.softmax(-1)[..., 0].sum(), model.lm_head.weight, model.model.norm.weight)
    torch.testing.assert_close(own, other)


def losses_by_hand(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Ways in which training loops write the loss; the chunked ones first."""
    last = logits.shape[-1]
    target = labels[:, 1:].reshape(-1)
    criterion = nn.CrossEntropyLoss()
    return {
        "chunked view": lambda: criterion(logits[..., :-1, :].contiguous().view(-1, last), target),
        "chunked slice": lambda: F.cross_entropy(logits[:, :-1].float().reshape((-1, last)), target, reduction="sum"),
        "smoothed": lambda: F.cross_entropy(logits[:, :-1].reshape(-1, last), target, label_smoothing=0.1),
        "none": lambda: F.cross_entropy(logits[:, :-1].reshape(-1, last), target, reduction="none").sum(),
        "transposed": lambda: F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]),
        "class weights": lambda: F.cross_entropy(
            logits[:, :-1].reshape(-1, last), target, weight=torch.linspace(1, 2, last)
        ),
        "probabilities": lambda: F.cross_entropy(logits.reshape(-1, last), torch.full((14, last), 1 / last)),
        "part of the vocabulary": lambda: F.cross_entropy(logits[0, :-1, :20], labels[0, 1:].clamp(max=19)),
        "indexed": lambda: F.cross_entropy(logits[:, 3], labels[:, 4]),
        "other shape": lambda: logits.view(2, -1).square().sum() + logits[..., None].sum(),
        "scaled in place": lambda: (logits.div_(2.0), F.cross_entropy(logits[:, 3], labels[:, 4]))[1],
        "written to": lambda: (logits.__setitem__((..., 5), -3.0), F.cross_entropy(logits[:, 3], labels[:, 4]))[1],
    }


@pytest.mark.parametrize("way", losses_by_hand(torch.zeros(2, 7, 3), torch.zeros(2, 7)))
def test_losses_written_by_hand(way: str) -> None:
    model = llama()
    batch = tokens()
    results = []
    for chunked in (False, True):
        ChunkedLoss().remove(model)
        if chunked:
            ChunkedLoss(3).install(model)
        logits = model(batch["input_ids"]).logits
        loss = losses_by_hand(logits, batch["labels"])[way]
        if chunked and not way.startswith("chunked"):
            with pytest.warns(UserWarning, match="computed in full"):
                results.append(gradients(loss(), *model.parameters()))
        else:
            results.append(gradients(loss(), *model.parameters()))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_what_is_done_to_the_logits_in_place_reaches_those_derived_before() -> None:
    model = llama()
    ChunkedLoss().install(model)
    logits = model(**tokens()).logits
    flat = logits.float().view(-1, VOCABULARY)
    with pytest.warns(UserWarning, match="computed in full"):
        logits.mul_(0.0)
    target = tokens()["labels"].view(-1)
    torch.testing.assert_close(F.cross_entropy(flat, target), torch.tensor(float(VOCABULARY)).log())


def test_without_grad_in_training_mode() -> None:
    model = llama()
    with torch.no_grad():
        expected = model(**tokens())
        ChunkedLoss().install(model)
        output = model(**tokens())
    assert is_deferred(output) and not output.loss.requires_grad
    torch.testing.assert_close(output.loss, expected.loss)
    with pytest.warns(UserWarning, match="computed in full"):
        torch.testing.assert_close(output.logits.clone(), expected.logits)
    assert not output.logits.clone().requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_the_whole_model(reentrant: bool) -> None:
    model = llama()
    ordinary = step(model)
    ChunkedLoss(3).install(model)
    batch = tokens()
    model.zero_grad()

    def loss(embedded: Tensor) -> Tensor:
        return model(inputs_embeds=embedded, labels=batch["labels"], return_dict=False)[0]

    result = checkpoint(loss, model.get_input_embeddings()(batch["input_ids"]), use_reentrant=reentrant)
    result.backward()
    torch.testing.assert_close(result, ordinary[0].loss)
    own = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(own, ordinary[1], rtol=1e-4, atol=1e-5)


def test_an_exception_leaves_nothing_behind() -> None:
    model = llama()
    ChunkedLoss().install(model)
    expected = step(model)
    with pytest.raises(ValueError, match="labels must be"):
        model(**{**tokens(), "labels": torch.full((2, 7), VOCABULARY)})
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**tokens())
    handle.remove()
    assert_same_step(step(model), expected)
    assert type(model.eval()(**tokens()).logits) is Tensor


def test_copies_pickles_and_checkpoints(tmp_path: Path) -> None:
    model = llama()
    ChunkedLoss(3).install(model)
    expected = step(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_deferred(step(duplicate)[0])
        assert_same_step(step(duplicate), expected)
        ChunkedLoss().remove(duplicate)
        assert type(duplicate(**tokens()).logits) is Tensor
    assert is_deferred(model(**tokens()))
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded(**tokens()).logits) is Tensor
    assert_same_step(step(loaded), expected)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["lora", "wasi", "trained head"])
def test_peft_models(kind: str, before: bool, tmp_path: Path) -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        if kind == "wasi":
            return wasi_model(model)
        extra = {"modules_to_save": ["lm_head"]} if kind == "trained head" else {}
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **extra))

    ordinary = step(adapted(llama()).train())
    model = llama()
    if before:
        ChunkedLoss(3).install(model)
    model = adapted(model).train()
    if not before:
        ChunkedLoss(3).install(model)
    chunked = step(model)
    assert is_deferred(chunked[0])
    assert_same_step(chunked, ordinary)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    torch.testing.assert_close(step(loaded)[0].loss, ordinary[0].loss)
    ChunkedLoss().remove(model)
    assert type(model(**tokens()).logits) is Tensor


def test_an_adapter_on_the_head_is_left_alone() -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).train()

    ordinary = step(adapted(llama()))
    model = llama()
    ChunkedLoss().install(model)
    model = adapted(model)
    with pytest.warns(UserWarning, match="computed in full, because '.*add.*' was applied"):
        assert_same_step(step(model), ordinary)
    with pytest.raises(ValueError, match=r"plain linear layer without an adapter.*got peft.tuners.lora"):
        ChunkedLoss().install(model)


def test_models_without_a_head_are_refused() -> None:
    for model in (llama().model, nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="must have an output embedding"):
            ChunkedLoss().install(model)
    model = llama()
    with pytest.raises(ValueError, match="rows must be an integer of at least 1, or None, got 0"):
        ChunkedLoss(0).install(model)
    assert not model.lm_head._forward_pre_hooks


def test_a_training_step_peaks_lower() -> None:
    config = tf.LlamaConfig(**{**GROUPED, "vocab_size": 8192, "tie_word_embeddings": True})
    model = build(config).requires_grad_(False)
    model.model.norm.weight.requires_grad_()

    def peak() -> int:
        return measure_peak_memory(lambda: step(model)).peak_bytes

    logits_bytes = 4 * tokens()["input_ids"].numel() * config.vocab_size
    ordinary = peak()
    ChunkedLoss(1).install(model)
    assert ordinary - peak() > 2.5 * logits_bytes


# ------------------------------------------------------------------------------------------------- Trainer


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples of different numbers of labels, so that a mean of means is not the mean."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: value[0] for name, value in tokens(1, seed=index).items()}
        row["labels"][: index % 5] = -100
        return row


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(smoothing: float, tmp_path: Path) -> None:
    def run(chunked: bool) -> tuple[list[float], dict[str, float], Any, Any]:
        model = llama()
        if chunked:
            ChunkedLoss(3).install(model)
        arguments = tf.TrainingArguments(
            str(tmp_path / str(chunked)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            label_smoothing_factor=smoothing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
        if chunked and smoothing:
            with pytest.warns(UserWarning, match="computed in full"):
                trainer.train()
        else:
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate(), trainer.predict(Rows()).predictions, model.state_dict()

    own, other = run(chunked=True), run(chunked=False)
    assert own[0] == pytest.approx(other[0], rel=1e-4) and len(own[0]) == 4
    assert own[1]["eval_loss"] == pytest.approx(other[1]["eval_loss"], rel=1e-4)
    assert own[2].shape == (12, 7, VOCABULARY)
    torch.testing.assert_close(torch.tensor(own[2]), torch.tensor(other[2]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(own[3], other[3], rtol=1e-3, atol=1e-3)
