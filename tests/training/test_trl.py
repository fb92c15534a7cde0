"""TRL's trainers as people use them: `peft_config=WasiConfig()`, with the settings that TRL has by default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizing import byte_llama, byte_tokenizer

from wasi_peft import WasiConfig
from wasi_peft.memory.modes import MEMORY_MODES

trl = pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

TOKENIZER = byte_tokenizer()


def language_model() -> transformers.LlamaForCausalLM:
    return byte_llama(initializer_range=0.2)


def question(index: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": answer}]


def chats() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"messages": question(i, "yes, I do" * (1 + i % 3))} for i in range(12)])


def preferences() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"chosen": question(i, "yes"), "rejected": question(i, "no")} for i in range(8)]
    )


def options(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 0,
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "use_cpu": True, "bf16": False,
        "disable_tqdm": True, **others,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def fine_tuned(folder: Path, config: Any, model: Any = None, **others: Any) -> Any:
    return trl.SFTTrainer(
        language_model() if model is None else model, trl.SFTConfig(**options(folder, **others)),
        train_dataset=chats(), processing_class=TOKENIZER, peft_config=config,
    )  # fmt: skip


def preferring(folder: Path, config: Any, model: Any = None, **others: Any) -> Any:
    return trl.DPOTrainer(
        language_model() if model is None else model, args=trl.DPOConfig(**options(folder, **others)),
        train_dataset=preferences(), processing_class=TOKENIZER, peft_config=config,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("others", [{}, {"packing": True}, {"assistant_only_loss": True}], ids=str)
def test_supervised_fine_tuning_in_every_memory_mode(tmp_path: Path, mode: str, others: dict[str, Any]) -> None:
    """TRL checkpoints blocks by default; the first loss is that of the plain model, and a step changes the second."""
    config = WasiConfig(residual="exact", weight_rank=4, memory_mode=mode)
    trainer = fine_tuned(tmp_path, config, max_length=48, **others)
    assert trainer.args.gradient_checkpointing
    first, second = losses(trainer)
    plain, _ = losses(fine_tuned(tmp_path, LoraConfig(r=4), max_length=48, **others))
    assert first == pytest.approx(plain, rel=1e-4) and second != first


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("start", ["fresh", "saved"])
def test_preference_starts_at_a_margin_of_zero(tmp_path: Path, mode: str, start: str) -> None:
    """The reference is the model without its adapter, or a copy of the adapter from which training goes on."""
    config, model = WasiConfig(weight_rank=4, memory_mode=mode), None
    if start == "saved":
        adapted = get_peft_model(language_model(), config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and name.endswith("L"):
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / "sft")
        model, config = PeftModel.from_pretrained(language_model(), tmp_path / "sft", is_trainable=True), None
    trainer = preferring(tmp_path, config, model, max_length=48)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/margins" in line]
    assert float(lines[0]["rewards/margins"]) == 0 and float(lines[1]["rewards/margins"]) != 0
    assert float(lines[0]["loss"]) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("make", [fine_tuned, preferring])
def test_a_vocabulary_in_8_bits(make: Any, mode: str, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight in a function of its own, which keeps it for backward and reads parts."""
    config = {"weight_rank": 4, "memory_mode": mode}
    found = losses(make(tmp_path, WasiConfig(**config, vocabulary="int8"), max_length=48))
    assert found == pytest.approx(losses(make(tmp_path, WasiConfig(**config), max_length=48)), rel=0.01)
    assert found[0] != found[1]


def test_a_reference_adapter_stays_as_it_was(tmp_path: Path) -> None:
    model = get_peft_model(language_model(), WasiConfig(weight_rank=4))
    trainer = preferring(tmp_path, None, model, max_length=48)
    state = {name: value.clone() for name, value in model.state_dict().items() if ".ref." in name}
    trainer.train()
    assert state and all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def reward(folder: Path) -> Any:
    config = transformers.LlamaConfig(**{**language_model().config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    return trl.RewardTrainer(
        transformers.LlamaForSequenceClassification(config), args=trl.RewardConfig(**options(folder, max_length=48)),
        train_dataset=preferences(), processing_class=TOKENIZER,
        peft_config=WasiConfig(task_type="SEQ_CLS", weight_rank=4),
    )  # fmt: skip


def kto(folder: Path) -> Any:
    rows = [{"prompt": f"say {i}", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(8)]
    return trl.KTOTrainer(
        language_model(), args=trl.KTOConfig(**options(folder, max_length=48)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=TOKENIZER,
        peft_config=WasiConfig(weight_rank=4),
    )  # fmt: skip


def orpo(folder: Path) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    return ORPOTrainer(
        language_model(), args=ORPOConfig(**options(folder, max_length=48)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=TOKENIZER,
        peft_config=WasiConfig(weight_rank=4),
    )  # fmt: skip


def grpo(folder: Path) -> Any:
    rows = [{"prompt": f"say {i}"} for i in range(8)]
    settings = options(folder, num_generations=4, max_completion_length=6)
    return trl.GRPOTrainer(
        language_model(), args=trl.GRPOConfig(**settings), train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER, peft_config=WasiConfig(weight_rank=4),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )  # fmt: skip


@pytest.mark.parametrize("make", [reward, kto, orpo, grpo])
def test_other_trainers_move_the_factors(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    trainer = make(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if name.endswith("added_L"))
    assert all(bool(torch.isfinite(after[name]).all()) for name in before)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "WASI"
