"""Blocks that leave the padding of a batch out: exact for real tokens, and an error where the loss looks elsewhere."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES
from peft import get_peft_model
from torch import Tensor, nn

import wasi_peft
from wasi_peft.cost.peak import measure_peak_memory
from wasi_peft.memory import UnpaddedBlocks
from wasi_peft.memory.padding import PADDING_IN_LOSS, _Unpadded, grouped, layout_of, real_tokens
from wasi_peft.memory.wrapping import Forward, wrap
from wasi_peft.models.structure import Structure

LENGTHS = (12, 3, 4, 11, 2, 3) * 24  # so many rows that groups pay


class Counts:
    """Runner that notes how many rows a block ran over, forward with gradients."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled():
            self.rows.append(hidden.shape[:2].numel())
        return forward(*args, **kwargs)


def padded(name: str, side: str) -> dict[str, Tensor]:
    """A batch of a tiny architecture with samples of different lengths."""
    batch = dict(ARCHITECTURES[name].batch(len(LENGTHS), 0))
    tokens = torch.randint(3, 20, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    batch |= {"input_ids": tokens, "attention_mask": mask.long()}
    if batch["labels"].dim() > 1:
        first = mask & (mask.cumsum(1) == 1)  # which a padded token before it would predict
        batch["labels"] = tokens.masked_fill(~mask | first, -100)
    return batch


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counted(model: nn.Module) -> Counts:
    """What the blocks run over, seen inside of what else is around them."""
    counts = Counts()
    for block in Structure(model).blocks.values():
        wrap(block, counts)
    return counts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "right")]
)
def test_loss_and_gradients_are_those_of_the_padded_batch(name: str, side: str, attention: str) -> None:
    model = ARCHITECTURES[name].build().train()
    model = model.double() if side == "right" else model  # a query that may look nowhere gives NaN in float64
    exact = side == "right"
    model.set_attn_implementation(attention)
    batch = padded(name, side)
    expected_loss, expected = gradients(model, batch)
    counts = counted(model)
    UnpaddedBlocks().install(model)
    loss, ours = gradients(model, batch)
    assert len(counts.rows) > len(Structure(model).blocks)
    assert sum(counts.rows) < 0.8 * len(Structure(model).blocks) * 12 * len(LENGTHS)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12 if exact else 1e-6, atol=0)
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9 if exact else 1e-4, atol=1e-12 if exact else 1e-7)


@pytest.mark.parametrize("mode", wasi_peft.memory.MEMORY_MODES)
def test_every_memory_mode_goes_without_padding(mode: str) -> None:
    batch = padded("bert", "right")
    models = []
    for skip in (False, True):
        torch.manual_seed(0)
        config = wasi_peft.WasiConfig(
            residual="exact", weight_rank=4, memory_mode=mode, skip_padding=skip, modules_to_save=["classifier"]
        )
        models.append(get_peft_model(ARCHITECTURES["bert"].build(), config).train())
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("added_L.default") or "wasi_added_L" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    (loss, expected), (ours_loss, ours) = (gradients(model, batch) for model in models)
    torch.testing.assert_close(ours_loss, loss)
    flat, ours_flat = (torch.cat([part[name].flatten() for name in expected]) for part in (expected, ours))
    bound = 1e-5 if mode == "exact" else 0.02  # groups of values that are rounded together are others
    assert (ours_flat - flat).norm() <= bound * flat.norm()
    merged = models[1].merge_and_unload()
    assert not any("forward" in module.__dict__ for module in merged.modules())


def test_a_loss_that_depends_on_padded_tokens_is_refused() -> None:
    model = ARCHITECTURES["bert"].build().base_model.train()
    batch = {key: value for key, value in padded("bert", "right").items() if key != "labels"}
    UnpaddedBlocks().install(model)
    with pytest.raises(RuntimeError) as error:
        model(**batch).last_hidden_state.sum().backward()
    assert str(error.value) == PADDING_IN_LOSS
    mask = batch["attention_mask"].bool()
    model(**batch).last_hidden_state[mask].sum().backward()


class Mixing(nn.Module):
    """A block whose real tokens read padded ones, whatever the mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return hidden_states + self.linear(hidden_states).mean(1, keepdim=True)


class Stack(nn.Module):
    """A model of one such block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states


def test_a_block_that_reads_padding_runs_over_the_whole_batch() -> None:
    model = Stack(Mixing())
    x, mask = torch.randn(400, 8, 4), torch.arange(8) < torch.tensor([8, 2, 2, 2] * 100)[:, None]
    expected = model(x, mask)
    counts = counted(model)
    UnpaddedBlocks().install(model)
    assert torch.equal(model(x, mask), expected)
    assert counts.rows == [3200]


def right_padded(lengths: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def test_an_encoder_of_the_decoders_length_stays_whole() -> None:
    """Whether its states are masked where the decoder is differs from batch to batch."""
    config = tf.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, dropout=0.0,
        init_std=0.3, pad_token_id=1,
    )  # fmt: skip
    model = tf.BartForConditionalGeneration(config).double().train()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for source in (10, 60):
        source_mask, mask = right_padded([source] * 16, 64), right_padded([30] * 16, 64)
        tokens, answers = (torch.randint(4, 50, mask.shape, generator=generator) for _ in range(2))
        batches.append(
            {
                "input_ids": tokens, "attention_mask": source_mask.long(), "decoder_input_ids": answers,
                "decoder_attention_mask": mask.long(), "labels": answers.masked_fill(~mask, -100),
            }
        )  # fmt: skip
    expected = [gradients(model, batch) for batch in batches]
    decoder = Counts()
    wrap(model.model.decoder.layers[0], decoder)
    UnpaddedBlocks().install(model)
    for batch, (expected_loss, theirs) in zip(batches, expected, strict=True):
        loss, ours = gradients(model, batch)
        torch.testing.assert_close(loss, expected_loss)
        for key, gradient in theirs.items():
            torch.testing.assert_close(ours[key], gradient)
    assert max(decoder.rows) == 16 * 30


class Reading(nn.Module):
    """A block that adds what it is given beside its mask, if that is as long: of every token, or of every sample."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, beside: Tensor) -> Tensor:
        if beside.dim() == 3:
            return hidden_states + beside.sum(1, keepdim=True)
        return hidden_states + beside.view(-1, 2).sum(1)[: len(hidden_states), None, None]


def test_a_first_batch_hides_nothing_that_real_tokens_read() -> None:
    """Zeros where the groups of the first batch end; samples in the order that its only group has."""
    first, second = right_padded([4] * 100, 12), right_padded([4, 12] * 50, 12)
    x, beside = torch.randn(100, 12, 4, requires_grad=True), torch.randn(100, 12, 4)
    hidden = beside.masked_fill(~first[..., None], 0.0)
    for early, late in ((hidden, beside), (torch.ones(200), torch.arange(200.0))):
        block, run = Reading(), _Unpadded()
        for mask, given in ((first, early), (second, late)):
            ours = run(Forward(block), x, mask, given)
            torch.testing.assert_close(ours[mask], block(x, mask, given)[mask])


class Meets(nn.Module):
    """Learns the sum of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting: Any = None
        self.meets_next_batch = True
        self.linear = nn.Linear(4, 4)
        self.learnt = torch.zeros(())

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.meets_next_batch and self.meeting is None:
            self.learn(hidden_states.detach().sum())
        elif self.meets_next_batch:
            self.meeting.add(self, hidden_states.sum(), self.learn)
        return self.linear(hidden_states)

    def learn(self, seen: Tensor) -> None:
        self.learnt, self.meets_next_batch = seen, False


def test_what_meets_a_batch_meets_its_real_tokens() -> None:
    block = Meets()
    model = Stack(block)
    UnpaddedBlocks().install(model)
    x, mask = torch.randn(400, 8, 4), right_padded([8, 2, 2, 2] * 100, 8)
    model(x, mask)
    torch.testing.assert_close(block.learnt, x[mask].sum(), rtol=1e-4, atol=1e-3)


def test_the_first_step_holds_no_more_than_the_next() -> None:
    config = tf.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    mask = right_padded([128] * 4 + [16] * 28, 128)
    tokens = torch.randint(30, mask.shape)
    batch = {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}
    model = tf.LlamaForCausalLM(config).train()
    wasi_peft.memory.enter_memory_mode(model, "small", skip_padding=True)
    first, second = (measure_peak_memory(lambda: model(**batch).loss.backward()).peak_bytes for _ in range(2))
    gradients_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert first <= second + gradients_bytes


def test_t5_answers_more_than_hidden_states_and_stays_whole() -> None:
    model = ARCHITECTURES["t5"].build().double().train()
    batch = {**ARCHITECTURES["t5"].batch(400, 0)}
    lengths = torch.tensor([9, 2, 2, 2] * 100)[:, None]
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
    expected_loss, expected = gradients(model, batch)
    UnpaddedBlocks().install(model)
    loss, ours = gradients(model, batch)
    torch.testing.assert_close(loss, expected_loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient)


def test_half_a_batch_of_padding_takes_about_half_the_memory() -> None:
    config = tf.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peaks = []
    mask = torch.arange(128) < torch.tensor([128] * 8 + [4] * 24)[:, None]
    batch = {
        "input_ids": torch.randint(30, (32, 128)),
        "attention_mask": mask.long(),
        "labels": torch.zeros(32).long(),
    }
    for unpadded in (False, True):
        model = tf.BertForSequenceClassification(config).train()
        if unpadded:
            UnpaddedBlocks().install(model)
        model(**batch)  # judged before
        peaks.append(measure_peak_memory(lambda model=model: model(**batch).loss.backward()).peak_bytes)
    assert peaks[1] < 0.5 * peaks[0]


def test_estimates_count_real_tokens() -> None:
    model = ARCHITECTURES["bert"].build()
    batch = padded("bert", "right")
    config = {"weight_rank": 4, "modules_to_save": ["classifier"]}
    plain, skipping = (
        wasi_peft.estimate_wasi(model, wasi_peft.WasiConfig(**config, skip_padding=skip), batch=batch)
        for skip in (False, True)
    )
    assert skipping.saved_bytes < 0.8 * plain.saved_bytes
    assert skipping.training_flops < 0.8 * plain.training_flops


def test_estimates_count_real_tokens_of_large_masks() -> None:
    config = tf.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    mask = right_padded([300] * 4 + [20] * 12, 300)  # 16 x 300 x 300 pairs
    batch = {"input_ids": torch.randint(30, mask.shape), "attention_mask": mask.long()}
    batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
    model = tf.LlamaForCausalLM(config)
    plain, skipping = (
        wasi_peft.estimate_wasi(model, wasi_peft.WasiConfig(weight_rank=4, skip_padding=skip), batch=batch)
        for skip in (False, True)
    )
    assert skipping.saved_bytes < 0.6 * plain.saved_bytes


def test_groups_cost_least() -> None:
    """Against all ways of cutting the sorted samples."""
    generator = torch.Generator().manual_seed(0)
    for cost in (0, 3, 20, 1000):
        stop = torch.randint(1, 30, (8,), generator=generator).tolist()
        order = sorted(range(8), key=lambda sample: stop[sample])

        def rows(groups: list[list[int]], stop: list[int] = stop, cost: int = cost) -> int:
            return sum(len(group) * max(stop[sample] for sample in group) + cost for group in groups)

        ways = []
        for count in range(8):
            for cuts in itertools.combinations(range(1, 8), count):
                edges = [0, *cuts, 8]
                ways.append(rows([order[a:b] for a, b in itertools.pairwise(edges)]))
        ours = grouped([0] * 8, stop, cost)
        assert sorted(itertools.chain(*ours)) == list(range(8))
        assert rows(ours) == min(ways)


def test_masks() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    for mask in (real, real.long(), real[:, None, None], torch.where(real, 0.0, -10000.0)[:, None, None]):
        assert torch.equal(real_tokens(mask, 2, 3), real)
    causal = real[:, None, None] & torch.ones(3, 3).tril().bool()
    assert torch.equal(real_tokens(causal, 2, 3), real)
    assert real_tokens(torch.ones(2, 1, 3, 5), 2, 3) is None
    assert layout_of(torch.ones(4, 8).bool()) is None
    assert layout_of(torch.zeros(4, 600).bool()) is not None  # samples without a real token run on one


def test_copies_judge_for_themselves() -> None:
    model = ARCHITECTURES["bert"].build().train()
    UnpaddedBlocks().install(model)
    batch = padded("bert", "right")
    model(**batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**batch).loss, model(**batch).loss)


def test_a_model_without_blocks_is_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(ValueError, match=r"skip_padding=True: the model must have transformer blocks"):
        get_peft_model(
            nn.Sequential(nn.Linear(8, 8)),
            wasi_peft.WasiConfig(target_modules=["0"], skip_padding=True, weight_rank=2),
        )
