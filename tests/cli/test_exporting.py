"""What the command line writes: merged models and exports; what it says of them without loading anything."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import experts_model
from models import ARCHITECTURES, logits, wasi_model
from safetensors.torch import load_file
from tokenizing import byte_llama, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from wasi_peft import WasiConfig, compress
from wasi_peft.cli import inspecting, loading, making
from wasi_peft.cli import main as cli
from wasi_peft.cli.options import build_parser
from wasi_peft.cost.estimate import estimate_wasi
from wasi_peft.forms.compressed import CompressedLinear

FACTORS = {"residual": None, "weight_rank": 3, "update": "frozen_basis", "activation_threshold": None}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, an adapter of factors and one beside a weight, a compressed checkpoint."""
    folder = tmp_path_factory.mktemp("assets")
    ARCHITECTURES["vit"].model().save_pretrained(folder / "vit")
    for name, options in {
        "factors": FACTORS,
        "beside": {"residual": "int8", "train_vectors": False, "weight_rank": 3},
    }.items():
        adapter = wasi_model(ARCHITECTURES["vit"].model(), **{"update": None, **options})
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "vit")
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapter.save_pretrained(folder / name)
        torch.save(answers(adapter), folder / f"{name}.pt")
    compress(ARCHITECTURES["vit"].model(), WasiConfig(**FACTORS)).save_pretrained(folder / "small")
    return folder


def answers(model: Any) -> torch.Tensor:
    batch = ARCHITECTURES["vit"].batch()
    return logits(model, {"pixel_values": batch["pixel_values"]})


@pytest.fixture
def run(assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in the folder of the assets; returns standard output, or the line of the error."""
    monkeypatch.chdir(assets)

    def run(*arguments: Any, code: int = 0) -> str:
        capsys.readouterr()
        returned = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert returned == code, err
        lines = [line for line in err.splitlines() if line.startswith("wasi-peft: error: ")]
        assert len(lines) == bool(code) and (not code or out == "")
        return lines[0] if code else out

    return run


@pytest.mark.parametrize("adapter", ["factors", "beside"])
@pytest.mark.parametrize("dense", [False, True])
def test_merge(run: Any, assets: Path, adapter: str, dense: bool, tmp_path: Path) -> None:
    options = ["--dense"] if dense else []
    data = json.loads(run("merge", adapter, "--output", tmp_path / "merged", *options, "--json"))
    assert data["bytes"] == sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert any(isinstance(module, CompressedLinear) for module in merged.modules()) is not dense
    expected = torch.load(assets / f"{adapter}.pt")
    rounding = 0.05 if adapter == "beside" else 1e-5  # products round
    assert float((answers(merged) - expected).abs().max() / expected.abs().max()) < rounding


@pytest.mark.parametrize("source", ["factors", "small", "vit"])
def test_export_plain(run: Any, assets: Path, source: str, tmp_path: Path) -> None:
    text = run("export", source, "--output", tmp_path / "plain")
    assert f"{tmp_path}/plain: format plain, answers differ by " in text
    weights = "model.safetensors" if source == "vit" else "factored.safetensors"
    keys = load_file(tmp_path / "plain" / weights)
    assert ("vit.layers.0.mlp.fc1.1.weight" in keys) is (source != "vit")


def test_export_lora(run: Any, tmp_path: Path) -> None:
    data = json.loads(run("export", "beside", "--format", "lora", "--output", tmp_path / "lora", "--json"))
    assert data["difference"] < 1e-5 and data["format"] == "lora"
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_export_gguf(run: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    byte_llama(merges=1).save_pretrained(tmp_path / "model")
    command = ["export", tmp_path / "model", "--format", "gguf", "--int8", "--output", tmp_path / "gguf"]
    assert "tokenizer= is needed" in run(*command, code=2)
    byte_tokenizer(merges=[("a", "b")]).save_pretrained(tmp_path / "tokenizer")
    data = json.loads(run(*command, "--tokenizer", tmp_path / "tokenizer", "--tokens", "20", "--json"))
    assert 0 < data["difference"] < 0.09 and data["format"] == "gguf"
    assert "Q8_0" in {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}


def test_inspect_a_compressed_checkpoint(run: Any, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", None)
    data = json.loads(run("inspect", "small", "--json"))
    tensors = load_file(assets / "small" / "model.safetensors")
    assert data["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(data["layers"]) == 12
    assert {(layer["form"], layer["rank"]) for layer in data["layers"]} == {("factors", 3)}
    fc1 = next(layer for layer in data["layers"] if layer["name"] == "vit.layers.0.mlp.fc1")
    assert fc1["stored_bytes"] == 4 * (3 * (16 + 24) + 24)
    assert "vit.layers.0.mlp.fc1" in run("inspect", "small", "--layers")
    text = run("inspect", "small")
    assert "fc1         2     0-1  factors     3" in text and "compressed checkpoint: 12 layers in" in text


def test_a_checkpoint_that_is_no_folder_is_inspected_by_its_configuration(
    run: Any, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_files = json.loads(run("inspect", "small", "--json"))
    monkeypatch.setattr(inspecting, "is_compressed", lambda folder: False)
    found = json.loads(run("inspect", "small", "--json"))
    found["layers"].sort(key=lambda layer: layer["name"])
    assert found == by_files


@pytest.mark.parametrize("kind", ["factors", "int8", "experts"])
def test_estimates_of_a_compressed_checkpoint_are_those_of_the_model(run: Any, tmp_path: Path, kind: str) -> None:
    config = WasiConfig(**FACTORS) if kind != "int8" else WasiConfig()
    if kind == "experts":
        model, auto_class = experts_model("mixtral", torch.float32), AutoModelForCausalLM
    else:
        model, auto_class = ARCHITECTURES["vit"].model(), AutoModelForImageClassification
    compress(model, config).save_pretrained(tmp_path)
    arguments = ("estimate", tmp_path, "--batch-size", "2", "--weight-rank", "2")
    estimates = json.loads(run(*arguments, "--json"))["estimates"]
    loaded = auto_class.from_pretrained(tmp_path)
    adapter = WasiConfig(weight_rank=2, modules_to_save=None if kind == "experts" else ["classifier"])
    batch = loading.dummy_batch(
        build_parser(cli.COMMANDS).parse_args(list(map(str, arguments))),
        loaded,
        "causal-lm" if kind == "experts" else "image-classification",
    )
    assert estimates["WASI K=2"] == estimate_wasi(loaded, adapter, batch=batch).to_dict()
    assert estimates["compressed"] == estimate_wasi(loaded, batch=batch).to_dict()
    assert estimates.keys() == {"compressed", "LoRA r=16", "WASI K=2"}


def test_profiles_do_not_call_a_compressed_model_dense(run: Any) -> None:
    options = ("--batch-size", "2", "--rounds", "1", "--weight-rank", "2", "--json")
    assert list(json.loads(run("profile", "small", *options))["profiles"]) == ["compressed", "LoRA r=16", "WASI K=2"]


def test_the_base_of_an_adapter_may_be_elsewhere(run: Any, assets: Path, tmp_path: Path) -> None:
    settings = json.loads((assets / "beside" / "adapter_config.json").read_text())
    (tmp_path / "moved").mkdir()
    for path in (assets / "beside").iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    lost = {**settings, "base_model_name_or_path": None}
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(lost))
    command = ["merge", tmp_path / "moved", "--output", tmp_path / "merged"]
    assert "the adapter does not name its base model; give it with --base" in run(*command, code=2)
    run(*command, "--base", "vit")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_head_of_another_size(run: Any, tmp_path: Path) -> None:
    line = run("export", "vit", "--output", tmp_path / "x", "--num-labels", "5", code=2)
    assert "cannot be read" in line or "size" in line
    assert list(tmp_path.iterdir()) == []


def test_a_bare_call_helps(run: Any) -> None:
    text = run()
    assert text.startswith("usage: wasi-peft") and all(
        command in text for command in ("inspect", "estimate", "profile", "plan", "merge", "export")
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"wasi-peft {importlib.metadata.version('wasi_peft')}\n"


BAD = {
    "no output": (("export", "vit"), "arguments are required: --output"),
    "unknown format": (("export", "vit", "--output", "x", "--format", "tflite"), "invalid choice: 'tflite'"),
    "tokenizer elsewhere": (
        ("export", "vit", "--output", "x", "--tokenizer", "x"),
        "format 'plain' has the options []",
    ),
    "other models as GGUF": (("export", "vit", "--format", "gguf", "--output", "x"), "is for LlamaForCausalLM,"),
    "8 bits elsewhere": (("export", "vit", "--output", "x", "--int8"), "format 'plain' has the options [], got"),
    "there": (("export", "vit", "--output", "small"), "small: there is something already"),
    "merge into what is there": (("merge", "factors", "--output", "small"), "small: there is something already"),
    "merge of a model": (("merge", "vit", "--output", "x"), "vit: must be the folder of a WASI adapter"),
    "base of a model": (("export", "vit", "--base", "vit", "--output", "x"), "--base goes with an adapter's folder"),
    "a file": (
        ("export", "vit/config.json", "--output", "x"),
        "vit/config.json: must be a folder or a hub id, got a file",
    ),
    "nameless base": (("merge", "nameless", "--output", "x"), "does not name its base model; give it with --base"),
    "LoRA of a model": (("export", "vit", "--format", "lora", "--output", "x"), "a PEFT model with a WASI adapter"),
    "LoRA of factors": (("export", "factors", "--format", "lora", "--output", "x"), "its factors replace the weight"),
    "plot of a checkpoint": (("inspect", "small", "--plot", "x.png"), "got a compressed checkpoint"),
    "plan of a checkpoint": (
        ("plan", "small", "--data", "x", "--weight-share", "0.5", "--batch-size", "2"),
        "small: a plan is made for a dense model, got a compressed checkpoint.",
    ),
    "estimate of other bits": (
        ("estimate", "others", "--batch-size", "2"),
        "others: must be dense or compressed by wasi_peft, got weights stored by 'bitsandbytes'.",
    ),
    "estimate of an adapter": (
        ("estimate", "nameless", "--batch-size", "2"),
        "nameless: must be a model, got an adapter of type WASI; its base model is None.",
    ),
    "preparation of an adapter": (("prepare", "factors", "--output", "x"), "got an adapter of type WASI; its base"),
    "merge without weights": (
        ("merge", "weightless", "--output", "x"),
        "weightless: must hold the adapter's weights, adapter_model.safetensors, got none.",
    ),
    "merge of half a configuration": (
        ("merge", "halved", "--output", "x"),
        "halved/adapter_config.json: must be a JSON file",
    ),
    "export of half a configuration": (
        ("export", "halved", "--output", "x"),
        "halved/adapter_config.json: must be a JSON file",
    ),
    "half a configuration": (("inspect", "halved"), "halved/adapter_config.json: must be a JSON file"),
    "half a configuration of a model": (("inspect", "torn"), "torn/config.json: must be a JSON file: Exp"),
    "half a configuration of a base": (("merge", "factors", "--base", "torn", "--output", "x"), "torn"),
    "configuration that cannot be": (("inspect", "impossible"), "impossible/adapter_config.json: weight_rank must"),
    "merge where it cannot be": (("merge", "factors", "--output", "/proc/x"), "/proc/x: cannot be written"),
    "export where it cannot be": (("export", "vit", "--output", "/proc/x"), "/proc/x: cannot be written"),
    "incomplete checkpoint": (("inspect", "incomplete"), "is in config.json and in no file"),
    "damaged checkpoint": (("inspect", "damaged"), "the file is damaged or no safetensors file"),
    "checkpoint of a later version": (("inspect", "later"), "format_version 1, got 2"),
}
EARLY = (
    "no output", "unknown format", "8 bits elsewhere", "tokenizer elsewhere", "there", "merge into what is there",
    "merge of a model", "merge where it cannot be", "export where it cannot be",
)  # fmt: skip


@pytest.fixture(scope="module")
def bad_assets(assets: Path) -> None:
    text = (assets / "small" / "config.json").read_text()
    shutil.copytree(assets / "factors", assets / "nameless")
    config = json.loads((assets / "nameless" / "adapter_config.json").read_text())
    (assets / "nameless" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    shutil.copytree(assets / "factors", assets / "weightless")
    (assets / "weightless" / "adapter_model.safetensors").unlink()
    for name in ("halved", "impossible"):
        shutil.copytree(assets / "factors", assets / name)
        bad = "{" if name == "halved" else json.dumps({**config, "weight_rank": "big"})
        (assets / name / "adapter_config.json").write_text(bad)
    for name in ("others", "torn"):
        (assets / name).mkdir()
        settings = {**json.loads(text), "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        (assets / name / "config.json").write_text(json.dumps(settings) if name == "others" else "{")
    for name in ("incomplete", "damaged", "later"):
        (assets / name).mkdir()
        (assets / name / "config.json").write_text(text)
    (assets / "damaged" / "model.safetensors").write_bytes(b"x" * 50)
    (assets / "later" / "config.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))


@pytest.mark.usefixtures("bad_assets")
@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_code_2(run: Any, assets: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.startswith("plot"):
        pytest.importorskip("matplotlib")
    if case in EARLY:  # before a model is loaded
        monkeypatch.setattr(making, "load_with_adapter", None)
    arguments, message = BAD[case]
    before = sorted(path.name for path in assets.iterdir())
    assert message in run(*arguments, code=2)
    assert sorted(path.name for path in assets.iterdir()) == before


def test_a_base_that_is_gone_is_named(run: Any, assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "factors", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    gone = "gone/base"  # a folder then, a hub id now
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": gone}))
    error = run("merge", tmp_path / "adapter", "--output", tmp_path / "merged", code=2)
    assert f"its base model {gone!r} cannot be read; give another place with --base" in error
    assert not (tmp_path / "merged").exists()


def test_merging_does_not_replace_the_adapter(run: Any, assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "factors", tmp_path / "adapter")
    before = {each.name for each in (tmp_path / "adapter").iterdir()}
    error = run("merge", tmp_path / "adapter", "--output", tmp_path / "adapter", "--overwrite", code=2)
    assert "the output must be another folder than the adapter's" in error
    assert {each.name for each in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize("command", ["merge", "export"])
def test_neither_base_nor_model_is_written_over(run: Any, assets: Path, tmp_path: Path, command: str) -> None:
    """A tokenizer that lies there is in no new folder."""
    shutil.copytree(assets / "factors", tmp_path / "adapter")
    base = json.loads((assets / "factors/adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.copytree(base, tmp_path / "base")
    before = {each.name for each in (tmp_path / "base").iterdir()}
    options = ["--base", tmp_path / "base", "--output", tmp_path / "base", "--overwrite"]
    error = run(command, tmp_path / "adapter", *options, code=2)
    assert "the output must be another folder than the base's, and not around it." in error
    assert {each.name for each in (tmp_path / "base").iterdir()} == before


def test_export_does_not_replace_the_model(run: Any, assets: Path, tmp_path: Path) -> None:
    base = json.loads((assets / "factors/adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.copytree(base, tmp_path / "base")
    error = run("export", tmp_path / "base", "--output", tmp_path / "base", "--overwrite", code=2)
    assert "the output must be another folder than the model's" in error


@pytest.mark.parametrize("place", ["keep", "keep/../keep/tokenizer"])
def test_what_a_tokenizer_is_read_from_is_not_replaced(run: Any, tmp_path: Path, place: str) -> None:
    pytest.importorskip("gguf")
    kept = tmp_path / "keep" / "tokenizer"
    byte_tokenizer().save_pretrained(kept)
    options = ("--format", "gguf", "--tokenizer", kept, "--overwrite")
    error = run("export", "vit", *options, "--output", tmp_path / place, code=2)
    assert "the output must be another folder than the tokenizer's" in error
    assert (kept / "tokenizer.json").is_file()


@pytest.mark.parametrize("owner", ["base", "adapter", None])
def test_tokenizers_come_along(run: Any, tmp_path: Path, owner: str | None) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    byte_llama().save_pretrained(base)
    (base / "model.safetensors.index.json").write_text("{}")
    wasi_model(byte_llama(), update=None, residual="int8", weight_rank=3).save_pretrained(adapter)
    (adapter / "trainer_state.json").write_text("{}")
    if owner is not None:
        byte_tokenizer().save_pretrained(base)
    if owner == "adapter":
        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(adapter)
    run("merge", adapter, "--base", base, "--output", merged)
    own = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    names = {path.name for path in merged.iterdir()} - own
    assert names == ({"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} if owner else set())
    if owner is not None:
        assert (AutoTokenizer.from_pretrained(merged).model_max_length == 77) is (owner == "adapter")


def test_tokenizers_of_a_hub_id_come_along(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "snapshot")
    template = tmp_path / "snapshot" / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    asked: list[str] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    (tmp_path / "merged").mkdir()
    arguments = build_parser(cli.COMMANDS).parse_args(["merge", "factors", "--base", "some/base", "--output", "x"])
    loading.bring_processors(arguments, tmp_path / "merged")
    assert asked == ["some/base"] and (tmp_path / "merged" / "tokenizer.json").is_file()
    assert (tmp_path / "merged" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
