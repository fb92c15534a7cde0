"""Compressed models with packed experts: made, saved, loaded, restored, trained and adapted."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import FAMILIES, experts_model, packed_names, run_by, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wasi_peft
from wasi_peft import WasiConfig, compress
from wasi_peft.cli.main import main
from wasi_peft.forms.compressed_stack import CompressedStack
from wasi_peft.hub.cards import FOLDER, loading_snippet

pytestmark = pytest.mark.usefixtures("exact_products")

CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"residual": "int4"},
    "factors": {"residual": None, "weight_rank": 3, "update": "factor"},
}
EXPERTS = r".*experts\.(gate_up|down)_proj"
BATCHES = [{"input_ids": tokens(4, 8)}, {"input_ids": tokens(4, 8).flip(1)}]


def dense(family: str) -> Any:
    model = experts_model(family, torch.float32)
    run_by(model, "eager")
    return model


def made(family: str, kind: str, **options: Any) -> Any:
    return compress(dense(family), WasiConfig(**CONFIGS[kind], **options)).eval()


def stacks(model: nn.Module) -> dict[str, CompressedStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedStack)}


def load(model: nn.Module, folder: Path, **options: Any) -> Any:
    loaded: Any = type(model).from_pretrained(folder, **options).eval()  # type: ignore[attr-defined]
    run_by(loaded, "eager")
    return loaded


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def file_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_line_reads_it_again(family: str, kind: str, tmp_path: Path) -> None:
    base, model = dense(family), made(family, kind)
    assert list(stacks(model)) == packed_names(base)
    assert {stack.form_name for stack in stacks(model).values()} == {kind}
    model.save_pretrained(tmp_path / "a")
    loaded, before = load(model, tmp_path / "a"), answers(model)
    assert torch.equal(answers(loaded), before)
    assert list(loaded.state_dict()) == list(model.state_dict())
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    dense_bytes = sum(parameter.nbytes for parameter in base.parameters())
    assert file_bytes(tmp_path / "a") < (0.55 if kind != "factors" else 0.85) * dense_bytes
    restored = loaded.dequantize()
    assert packed_names(restored) == packed_names(base) and not stacks(restored)
    assert list(restored.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(answers(restored), before, rtol=1e-4, atol=1e-5)
    for name, stack in stacks(model).items():
        weight = base.get_parameter(name)
        assert stack.shape == weight.shape
        if kind != "factors":
            assert (stack.multiplied_out() - weight).norm() < (0.02 if kind == "int8" else 0.15) * weight.norm()


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_way_that_transformers_runs_experts(kind: str, way: str) -> None:
    model = made("mixtral", kind)
    before = answers(model)
    run_by(model, way)
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_the_restored_weights(kind: str, family: str) -> None:
    """Of the input through the experts; of factors, `dL = G R^T` and `dR = L^T G` with those G of the weights."""
    model = made(family, kind).double()
    restored = copy.deepcopy(model).dequantize(torch.float64)

    def gradients(net: Any) -> Tensor:
        embedded = net.get_input_embeddings()(tokens()).detach().requires_grad_(True)
        net(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    for parameter in restored.parameters():
        parameter.requires_grad_(True)
    torch.testing.assert_close(gradients(model), gradients(restored))
    for name, stack in stacks(model).items():
        weight = restored.get_parameter(name).grad
        gradient = weight.mT if stack.transposed else weight
        if kind == "factors":
            torch.testing.assert_close(stack.form.L.grad, gradient @ stack.form.R.detach().mT)
            torch.testing.assert_close(stack.form.R.grad, stack.form.L.detach().mT @ gradient)


def test_factors_are_prepared_from_data(tmp_path: Path) -> None:
    """As an adapter's are; and they lose less on these data than those of the weights alone."""
    base, config = dense("mixtral"), WasiConfig(**CONFIGS["factors"])
    expected = torch.cat([base(**batch).logits for batch in BATCHES]).detach()
    prepared = compress(copy.deepcopy(base), config, BATCHES, repair_steps=0, progress_bar=False)
    blind = compress(copy.deepcopy(base), config)

    def error(model: Any) -> float:
        with torch.no_grad():
            return float((torch.cat([model(**batch).logits for batch in BATCHES]) - expected).norm())

    assert len(stacks(prepared)) == len(stacks(blind)) == 2
    assert error(prepared) < 0.95 * error(blind)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("update", ["addition", "factor", "frozen_basis"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_adapter_trains_on_it(family: str, kind: str, update: str, tmp_path: Path) -> None:
    base = made(family, kind)
    base.save_pretrained(tmp_path / "base")
    own = kind == "factors" and update != "addition"  # the adapter starts from the factors that are there
    form: dict[str, Any] = {"residual": "int8"} if update == "addition" else {"residual": None}
    options = {**form, "update": update, "activation_threshold": None, "bias": "none", "train_vectors": False}
    if not own:
        options["weight_rank"] = 2 if update == "addition" else 3
    model = peft.get_peft_model(load(base, tmp_path / "base"), WasiConfig(**options, target_modules=EXPERTS))
    before = answers(model.eval())
    if own or update == "addition":
        torch.testing.assert_close(before, answers(base), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = answers(model.eval())
    if own or update == "addition":
        with model.disable_adapter():
            torch.testing.assert_close(answers(model), answers(base), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert saved and not any("base_layer" in key for key in saved)
    loaded = peft.PeftModel.from_pretrained(load(base, tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(loaded), after, rtol=1e-4, atol=1e-5)
    restored = copy.deepcopy(loaded).merge_and_unload(dense=True)
    assert not any("experts" in name for name in stacks(restored))
    torch.testing.assert_close(answers(restored), after, rtol=1e-3, atol=1e-3)
    merged = loaded.merge_and_unload(dense=False)
    torch.testing.assert_close(answers(merged), after, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(load(base, tmp_path / "merged")), after, rtol=1e-3, atol=1e-4)
    if update == "addition":
        forms = {name: (stack.form_name, stack.rank) for name, stack in stacks(base).items()}
        assert {name: (stack.form_name, stack.rank) for name, stack in stacks(merged).items()} == {
            name: (form_name, rank + 2) for name, (form_name, rank) in forms.items()
        }


def test_lora_trains_beside_it_and_not_on_it() -> None:
    base = made("mixtral", "int8")
    before = answers(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    torch.testing.assert_close(answers(model.eval()), before)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    moved = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert moved and all("lora_" in name for name in moved)


def test_an_adapter_becomes_a_compressed_model(tmp_path: Path) -> None:
    for kind, options in CONFIGS.items():
        adapter = peft.get_peft_model(dense("olmoe"), WasiConfig(**options))
        expected, folder = answers(adapter.eval()), tmp_path / kind
        small = compress(adapter)
        assert len(stacks(small)) == 2
        small.save_pretrained(folder)
        torch.testing.assert_close(answers(load(small, folder)), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- files


def test_who_does_not_know_the_format_stops(tmp_path: Path) -> None:
    model = made("mixtral", "factors", target_modules=EXPERTS)
    model.save_pretrained(tmp_path)
    code = f"import transformers, sys\ntransformers.{type(model).__name__}.from_pretrained(sys.argv[1])\n"
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode != 0 and "size mismatch" in ran.stderr + ran.stdout


def test_state_dicts_of_files_copies_and_half_precision(tmp_path: Path) -> None:
    model = made("qwen3_moe", "factors")
    model.save_pretrained(tmp_path)
    other = made("qwen3_moe", "factors")
    with torch.no_grad():
        for stack in stacks(other).values():
            stack.form.L.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(answers(other), answers(model))
    assert torch.equal(answers(copy.deepcopy(other)), answers(model))
    half = load(model, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (answers(half).float() - answers(model)).norm() < 0.1 * answers(model).norm()


def test_cards_and_inspect_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("mixtral", "int8")
    model.save_pretrained(tmp_path)
    text = wasi_peft.write_card(model, tmp_path).read_text()
    assert f"| compressed layers | {4 + 2} |" in text
    scope: dict[str, Any] = {}
    exec(loading_snippet(model).replace(FOLDER, str(tmp_path)), scope)
    assert torch.equal(answers(scope["model"]), answers(model))
    assert main(["inspect", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "gate_up_proj" in line)
    assert "int8" in line


NAME = "model.layers.0.mlp.experts.down_proj"


def edit(kind: str, change: Any, folder: Path) -> nn.Module:
    """A saved model of which something was changed."""
    model: nn.Module = made("mixtral", kind)
    model.save_pretrained(folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config["quantization_config"]["layers"][NAME], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "a form of linear layers": ("factors", lambda entry, _: entry.update(form="split"), "form of packed experts must"),
    "bits": ("factors", lambda entry, _: entry.update(bits={"R": "int8"}), "has no side_rank and bits like these"),
    "another rank": (
        "factors",
        lambda entry, _: entry.update(rank=2),
        r"down_proj_wasi_L: must be of shape \(4, 16, 2\)",
    ),
    "huge rank": ("factors", lambda entry, _: entry.update(rank=10**9), "rank must be from 1 to"),
    "missing codes": ("int8", lambda _, tensors: tensors.pop(f"{NAME}_wasi_codes"), f"{NAME}: the checkpoint lacks"),
    "missing scale": ("int8", lambda _, tensors: tensors.pop(NAME), f"{NAME}: the checkpoint lacks 'weight'"),
    "a tensor too many": (
        "int8",
        lambda _, tensors: tensors.update({f"{NAME}_wasi_L": torch.zeros(2)}),
        f"{NAME}: the checkpoint has, besides what its form stores, 'wasi_L'",
    ),
    "a part of another stack": (
        "int8",
        lambda _, tensors: tensors.update({"model.layers.7.mlp.experts.down_proj_wasi_L": torch.zeros(2)}),
        "holds a part of a layer that its configuration does not name",
    ),
}


@pytest.mark.parametrize(("kind", "change", "match"), DAMAGES.values(), ids=DAMAGES.keys())
def test_files_that_claim_what_is_not_so(kind: str, change: Any, match: str, tmp_path: Path) -> None:
    model = edit(kind, change, tmp_path)
    with pytest.raises(ValueError, match=match):
        load(model, tmp_path)
