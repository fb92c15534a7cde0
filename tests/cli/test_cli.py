"""The command line, run in this process on tiny models saved to a folder, and once as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expert_models import experts_model
from models import ARCHITECTURES, wasi_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from wasi_peft import Calibration, WasiConfig, WasiPlan
from wasi_peft.cli import comparing, inspecting, loading, planning
from wasi_peft.cli import main as cli
from wasi_peft.cli.options import build_parser, size_in_bytes
from wasi_peft.cost.estimate import CATEGORIES, Estimate, estimate_wasi
from wasi_peft.planner.planner import plan_wasi
from wasi_peft.ranks.plan import LayerPlan

TEXTS = ["a b c d", "e f", "g h i j k l", "b d f h j"]
ESTIMATED = ("--batch-size", "4", "--update", "factor")
PLANNED = ("--batch-size", "4", "--weight-share", "0.6", "--update", "factor")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models with processors, images and texts, an adapter, a calibration and a plan made of it."""
    folder = tmp_path_factory.mktemp("assets")
    for name in ("vit", "bert", "t5", "llama", "swin"):
        ARCHITECTURES[name].model().save_pretrained(folder / name)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    words = ["[PAD]", "[UNK]", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("bert", "t5", "llama"):
        special = {"unk_token": "[UNK]", "eos_token": "[PAD]"} | ({} if name == "llama" else {"pad_token": "[PAD]"})
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / name)
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    _save_images(folder / "images")
    adapter = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=3, activation_ranks=4, update="factor")
    adapter.save_pretrained(folder / "adapter")
    code = cli.main(
        [
            *("plan", str(folder / "vit"), "--data", str(folder / "images"), *PLANNED),
            *("--calibration", str(folder / "calibration"), "--output", str(folder / "plan.json")),
        ]
    )
    assert code == 0
    return folder


def _save_images(folder: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="folders of images need Pillow")
    generator = torch.Generator().manual_seed(0)
    for label in ("one", "two"):
        (folder / label).mkdir(parents=True)
        for index in range(6):
            pixels = torch.randint(255, (9, 11, 3), generator=generator).byte().numpy()
            image_module.fromarray(pixels).save(folder / label / f"{index}.png")


@pytest.fixture
def run(assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in the folder of the assets; returns standard output."""
    monkeypatch.chdir(assets)

    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        returned = cli.main(arguments)
        out, err = capsys.readouterr()
        assert returned == code, err
        if code:
            assert out == ""
            (line,) = (line for line in err.splitlines() if line.startswith("wasi-peft: error: "))
            return line
        return out

    return run


# ------------------------------------------------------------------------------------------------ prepare


def test_prepare(run: Any, tmp_path: Path) -> None:
    text = run("prepare", "vit", "--output", str(tmp_path / "int8"))
    assert "int8: 12 int8 layers, 9612.0 B in all" in text
    assert (tmp_path / "int8" / "preprocessor_config.json").is_file()
    options = ("--data", "texts.txt", "--residual", "int4", "--weight-rank", "2", "--dtype", "bfloat16", "--json")
    data = json.loads(run("prepare", "llama", "--output", str(tmp_path / "int4"), *options))
    assert set(map(str, data["layers"].values())) == {"{'form': 'int4', 'rank': 2}"}
    assert data["output"] == str(tmp_path / "int4") and len(data["layers"]) == 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(tmp_path / "int4")("a b")["input_ids"]
    stored = sum(tensor.nbytes for name, tensor in model.hf_quantizer.get_state_dict_and_metadata(model)[0].items())
    assert data["total_bytes"] == stored


def test_prepare_factors(run: Any, tmp_path: Path) -> None:
    options = ("--data", "images", "--batch-size", "4", "--weight-share", "0.6", "--output", str(tmp_path / "small"))
    text = run("prepare", "vit", *options)
    assert "small: 12 factors layers of rank " in text
    assert "needs overwrite=True" in run("prepare", "vit", *options, code=2)
    assert run("prepare", "vit", *options, "--overwrite") == text


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_model(run: Any) -> None:
    text = run("inspect", "vit")
    assert "4,883 parameters, 73.4% in 12 target layers" in text
    data = json.loads(run("inspect", "vit", "--json"))
    model = ARCHITECTURES["vit"].model()
    assert set(data["layers"]) == ARCHITECTURES["vit"].targets(model)
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["architecture"] == "ViTForImageClassification" and data["task"] == "image-classification"
    assert {row["layers"]: row["break-even rank"] for row in data["kinds"]}["fc1"] == 9
    assert json.loads(run("inspect", "vit", "--json", "--task", "features"))["architecture"] == "ViTModel"
    layers = run("inspect", "vit", "--layers").splitlines()
    assert layers[0].split() == ["layer", "out", "in", "break-even", "rank", "parameters"]
    assert [line.split()[0] for line in layers[1:-1]] == list(data["layers"])
    assert layers[-1] == text.splitlines()[-1]


def test_packed_experts_count(run: Any, tmp_path: Path) -> None:
    model: Any = experts_model("mixtral", torch.float32)
    model.save_pretrained(tmp_path / "experts")
    data = json.loads(run("inspect", str(tmp_path / "experts"), "--json"))
    packed = {row["layers"]: (row["count"], row["parameters"]) for row in data["kinds"] if "proj" in row["layers"]}
    assert packed["gate_up_proj"] == (4, 4 * 32 * 16) and packed["down_proj"] == (4, 4 * 16 * 16)
    elements = 4 * 16 * 16 + 4 * 32 * 16 + 4 * 16 * 16
    assert data["target_share"] == elements / sum(parameter.numel() for parameter in model.parameters())
    lines = [line.split() for line in run("inspect", str(tmp_path / "experts"), "--layers").splitlines()]
    assert lines[0][:2] == ["layer", "experts"]
    assert {line[0].rpartition(".")[2]: line[1] for line in lines[1:-1]}["gate_up_proj"] == "4"
    estimates = json.loads(run("estimate", str(tmp_path / "experts"), "--batch-size", "2", "--json"))["estimates"]
    packed_names = [name for name, layer in data["layers"].items() if layer["experts"] > 1]
    layers = sorted(set(data["layers"]) - set(packed_names))
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=layers, target_parameters=packed_names))
    assert estimates["LoRA r=16"]["gradients_bytes"] == 4 * lora.get_nb_trainable_parameters()[0]


def test_inspect_adapter(run: Any) -> None:
    text = run("inspect", "adapter")
    assert "12 layers, rank 3, " in text
    assert "update factor" in text and "input kept for backward: feature 4" in text
    data = json.loads(run("inspect", "adapter", "--json"))
    assert data["update"] == "factor"
    assert 0 < data["kept_share"] < 1
    assert {layer["weight_rank"] for layer in data["layers"]} == {3}
    assert {layer["input"] for layer in data["layers"]} == {"feature 4"}
    assert {(layer["out_features"], layer["in_features"]) for layer in data["layers"]} == {
        (16, 16),
        (24, 16),
        (16, 24),
    }


def test_inspect_adapter_with_cores(run: Any, tmp_path: Path) -> None:
    model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=3, update="core")
    model.save_pretrained(tmp_path)
    text = run("inspect", str(tmp_path))
    assert "update core" in text and "input kept for backward: image" in text
    data = json.loads(run("inspect", str(tmp_path), "--json"))
    assert data["kept_share"] == model.wasi_summary().kept_share


@pytest.mark.parametrize("update", ["frozen_basis", "core"])
@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
def test_inspect_adapter_with_factors_in_few_bits(run: Any, tmp_path: Path, update: str, stored: str) -> None:
    model = wasi_model(ARCHITECTURES["vit"].model(), weight_rank=3, update=update, frozen_dtype=stored)
    model.save_pretrained(tmp_path)
    data = json.loads(run("inspect", str(tmp_path), "--json"))
    assert data["kept_share"] == model.wasi_summary().kept_share
    assert [layer["weight_rank"] for layer in data["layers"]] == [3] * 12


@pytest.mark.parametrize("update", ["factor", "frozen_basis", "core", "low_rank"])
def test_inspect_adapter_made_from_a_plan(run: Any, assets: Path, tmp_path: Path, update: str) -> None:
    plan = WasiPlan.load(assets / "plan.json")
    model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(plan=plan, update=update, update_rank=1))
    model.save_pretrained(tmp_path)
    text, data = run("inspect", str(tmp_path)), json.loads(run("inspect", str(tmp_path), "--json"))
    assert data["kept_share"] == model.wasi_summary().kept_share
    assert f"update='{update}'" in text and f"{data['kept_share']:.1%} of their bytes kept" in text
    assert ("  image" in text) == (update in ("frozen_basis", "core"))
    ranks = {layer["layer"]: layer["weight_rank"] for layer in data["layers"]}
    more = int(update == "low_rank")  # its direction is in the saved factors
    assert ranks == {layer.name: layer.weight_rank + more for layer in plan.layers}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activation_threshold": None}, "exact"),
        ({"activation_threshold": 0.9}, "feature 90%"),
        (
            {"activation_threshold": 0.9, "activation_modes": ["feature", "token"], "activation_ranks": 4},
            "feature 4, token 90%",
        ),
    ],
)
def test_how_inputs_are_kept_in_words(options: dict[str, Any], expected: str) -> None:
    assert inspecting._input_rule(WasiConfig(update="factor", **options), "fc1") == expected
    assert inspecting._input_rule(WasiConfig(residual=None, update="frozen_basis"), "fc1") == "image"


def test_inspect_plan(run: Any, assets: Path) -> None:
    plan = WasiPlan.load(assets / "plan.json")
    assert plan.headline() in run("inspect", "plan.json")
    assert len(run("inspect", "plan.json").splitlines()) < len(run("inspect", "plan.json", "--layers").splitlines())
    assert json.loads(run("inspect", "plan.json", "--json")) == plan.to_dict()


def test_inspect_calibration(run: Any, assets: Path) -> None:
    assert "rank at 95%" in run("inspect", "calibration")
    data = json.loads(run("inspect", "calibration", "--json"))
    assert [row["layer"] for row in data["layers"]] == list(Calibration.load(assets / "calibration").layers)


@pytest.mark.parametrize("what", ["plan.json", "adapter", "calibration"])
def test_inspect_plots(run: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    saved: list[str] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: saved.append(path))
    run("inspect", what, "--plot", str(tmp_path / "figure.png"))
    assert saved == [str(tmp_path / "figure.png")]


# ------------------------------------------------------------------------------------------------ estimate


def test_estimates_next_to_each_other(run: Any, tmp_path: Path) -> None:
    """The model has no weights here, and the batch no content: neither changes a number."""
    pytest.importorskip("matplotlib")
    figure = tmp_path / "e.png"
    text = run("estimate", "vit", *ESTIMATED, "--plan", "plan.json", "--json", "--plot", str(figure))
    data = json.loads(text)
    assert list(data["estimates"]) == ["dense", "LoRA r=16", "WASI plan"]
    assert data["batch"] == {"pixel_values": [4, 3, 8, 8], "labels": [4]}
    model, batch = ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch()
    assert data["estimates"]["dense"] == estimate_wasi(model, batch=batch).to_dict()
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the estimator was called with: configurations by PEFT type, and the other arguments."""
    asked: dict[str, Any] = {}

    def estimate_wasi(model: Any, config: Any, **options: Any) -> Estimate:
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        asked.update(options)
        asked[config.peft_type if config else "dense"] = config
        return Estimate(*[1024] * 7, dict.fromkeys(CATEGORIES, 1024), *[1024] * 5)

    monkeypatch.setattr(comparing, "estimate_wasi", estimate_wasi)
    return asked


def test_estimate_table(run: Any, estimated: dict[str, Any]) -> None:
    text = run(
        *("estimate", "bert", *ESTIMATED, "--weight-rank", "3", "--activation-rank", "2", "--lora", "2"),
        *("--sequence-length", "7", "--optimizer", "sgd"),
    )
    header, *lines = text.splitlines()
    assert header.split() == ["dense", "LoRA", "r=2", "WASI", "K=3"]
    assert lines[-1] == "BertForSequenceClassification, sgd, input_ids 4 x 7, attention_mask 4 x 7, labels 4"
    assert estimated["optimizer"] == "sgd"
    assert estimated["LORA"].r == 2 and estimated["LORA"].modules_to_save == ["classifier"]
    assert len(estimated["LORA"].target_modules) == 12
    wasi = estimated["WASI"]
    assert (wasi.weight_rank, wasi.activation_ranks, wasi.modules_to_save) == (3, 2, ["classifier"])


def test_estimates_that_are_asked_for(run: Any, estimated: dict[str, Any], assets: Path) -> None:
    labels = json.loads(run("estimate", "llama", "--batch-size", "4", "--json"))["estimates"]
    assert list(labels) == ["dense", "LoRA r=16", "WASI K=32"]
    assert estimated["LORA"].modules_to_save is None
    assert (estimated["WASI"].residual, estimated["WASI"].weight_rank) == ("int8", None)
    labels = json.loads(run("estimate", "vit", *ESTIMATED, "--json", "--weight-rank", "3"))["estimates"]
    assert list(labels) == ["dense", "LoRA r=16", "WASI K=3"]
    assert estimated["WASI"].compression_rule("fc1") is None
    for options, residual in (((), "int8"), (("--residual", "none"), None), (("--residual", "int4"), "int4")):
        run("estimate", "vit", "--batch-size", "4", "--weight-rank", "3", *options)
        assert estimated["WASI"].residual == residual
    run("estimate", "vit", "--batch-size", "4", "--residual", "int4")
    assert estimated["WASI"].residual == "int4"
    labels = json.loads(run("estimate", "vit", *ESTIMATED, "--json", "--dense"))["estimates"]
    assert list(labels) == ["dense"]
    run("estimate", "vit", *ESTIMATED, "--plan", "plan.json")
    assert estimated["WASI"].plan == WasiPlan.load(assets / "plan.json").to_dict()


def test_how_a_step_runs_reaches_the_estimator(run: Any, estimated: dict[str, Any]) -> None:
    run("estimate", "bert", "--batch-size", "4", "--skip-padding", "--padding", "0.5", "--sequence-length", "8")
    mask = estimated["batch"]["attention_mask"]
    assert estimated["WASI"].skip_padding and mask.sum(1).tolist() == [8, 4, 3, 2]
    run("estimate", "vit", "--batch-size", "4", "--token-keep", "0.5")
    config = estimated["WASI"]
    assert (config.token_keep, config.skip_padding, config.slice_tokens) == (0.5, False, None)
    run("estimate", "vit", "--batch-size", "4", "--memory-mode", "small")
    assert estimated["WASI"].memory_mode == "small"
    run("estimate", "vit", "--batch-size", "4", "--slice-tokens", "30")
    assert estimated["WASI"].memory_mode == "exact"
    assert estimated["WASI"].slice_tokens == 30
    run("estimate", "llama", "--batch-size", "4", "--vocabulary", "int8")
    assert estimated["WASI"].vocabulary == "int8"


def test_padding_gets_no_labels(run: Any, estimated: dict[str, Any]) -> None:
    run("estimate", "llama", "--batch-size", "4", "--padding", "0.5", "--sequence-length", "8")
    batch = estimated["batch"]
    assert batch["labels"].eq(-100).equal(batch["attention_mask"] == 0)


def test_plans_measure_padding_on_their_data(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def plan_wasi(*args: Any, **options: Any) -> WasiPlan:
        asked.update(options)
        return WasiPlan((LayerPlan("fc", 8, 8, 2, None, 0.9),))

    monkeypatch.setattr(planning, "plan_wasi", plan_wasi)
    run("plan", "bert", *PLANNED, "--data", "texts.txt", "--skip-padding", "--sequence-length", "6")
    # texts of 4, 2, 6 and 5 tokens
    assert asked["config"].skip_padding and asked["batch"]["attention_mask"].sum() in (17, 18)
    run("plan", "bert", *PLANNED, "--data", "texts.txt", "--sequence-length", "6")
    assert asked["batch"]["attention_mask"].all()


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("bert", ("--sequence-length", "7"), {"input_ids": (4, 7), "labels": (4,)}),
        ("llama", (), {"input_ids": (4, 12), "labels": (4, 12)}),  # as many tokens as the model has positions
        ("t5", (), {"input_ids": (4, 128), "labels": (4, 128)}),
        ("vit", ("--image-size", "12"), {"pixel_values": (4, 3, 12, 12), "labels": (4,)}),
        ("swin", (), {"pixel_values": (4, 3, 16, 16), "labels": (4,)}),
    ],
)
def test_the_batch_suits_the_model(name: str, options: tuple[str, ...], shapes: dict[str, Any]) -> None:
    model = ARCHITECTURES[name].model()
    model.config.architectures = [type(model).__name__]
    arguments = build_parser(cli.COMMANDS).parse_args(["estimate", name, *ESTIMATED, *options])
    batch = loading.dummy_batch(arguments, model, loading.task_of(model.config.architectures[0]))
    assert {key: batch[key].shape for key in shapes} == shapes
    assert model(**batch).loss.isfinite()
    assert "labels" not in loading.dummy_batch(arguments, model, "features")


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"num_labels": 1}, (4,), torch.float32),
        ({"problem_type": "multi_label_classification"}, (4, 3), torch.float32),
        ({}, (4,), torch.long),
    ],
)
def test_labels_suit_the_problem(changes: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = ARCHITECTURES["bert"].model()
    for key, value in changes.items():
        setattr(model.config, key, value)
    arguments = build_parser(cli.COMMANDS).parse_args(["estimate", "bert", *ESTIMATED])
    labels = loading.dummy_batch(arguments, model, "text-classification")["labels"]
    assert (labels.shape, labels.dtype) == (shape, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", [True, False])
def test_dtype(assets: Path, dtype: str, weights: bool) -> None:
    arguments = build_parser(cli.COMMANDS).parse_args(["inspect", str(assets / "llama"), "--dtype", dtype])
    model, task = loading.load_model(arguments, weights)
    assert (model.dtype, model.device.type) == (getattr(torch, dtype), "cpu" if weights else "meta")
    assert task == "causal-lm"


# ------------------------------------------------------------------------------------------------ profile


def test_profiles_next_to_each_other(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "p.png"
    options = (*ESTIMATED, "--plan", "plan.json", "--lora", "2", "--rounds", "1")
    data = json.loads(run("profile", "vit", *options, "--json", "--plot", str(figure)))
    assert list(data["profiles"]) == ["dense", "LoRA r=2", "WASI plan"]
    assert data["batch"] == {"pixel_values": [4, 3, 8, 8], "labels": [4]} and data["optimizer"] == "adamw"
    dense = data["profiles"]["dense"]
    estimate = estimate_wasi(ARCHITECTURES["vit"].model(), batch=ARCHITECTURES["vit"].batch())
    assert dense["saved_bytes"] == estimate.saved_bytes
    assert sum(dense["seconds_by_kind"].values()) == pytest.approx(dense["step_seconds"])
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_profile_of_texts_by_block(run: Any, name: str) -> None:
    options = ("--dense", "--rounds", "1", "--by", "block", "--optimizer", "sgd", "--sequence-length", "6")
    text = run("profile", name, "--batch-size", "2", *options)
    header, *lines = text.splitlines()
    assert header.split() == ["dense"]
    assert any(line.startswith("step, ms") for line in lines)
    assert any("sgd, input_ids 2 x 6" in line for line in lines)
    assert any(line.startswith("block ") for line in lines) and any(line.startswith("(model) ") for line in lines)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_random_content_is_ordinary_and_the_same_every_time(name: str) -> None:
    model = ARCHITECTURES[name].model()
    batch, again = ARCHITECTURES[name].batch(), ARCHITECTURES[name].batch(seed=2)
    for one in (batch, again):
        loading.random_content(one, model)
    key = model.main_input_name
    assert torch.equal(batch[key], again[key])
    assert batch[key].unique().numel() > 5
    if key == "input_ids":
        assert not bool((batch[key] == model.config.pad_token_id).any())


def test_profile_refuses_what_estimate_refuses(run: Any) -> None:
    assert "--activation-rank goes with" in run("profile", "vit", *ESTIMATED, "--activation-rank", "2", code=2)
    assert "give --lora or --dense" in run("profile", "vit", *ESTIMATED, "--dense", "--lora", "2", code=2)
    assert "at least 1" in run("profile", "vit", *ESTIMATED, "--rounds", "0", code=2)
    assert "--memory-mode, --" in run("profile", "vit", *ESTIMATED, "--dense", "--memory-mode", "fast", code=2)


def test_a_text_may_end_in_several_ways(run: Any, tmp_path: Path) -> None:
    model: Any = ARCHITECTURES["llama"].model()
    model.config.eos_token_id = [1, 2]
    model.save_pretrained(tmp_path)
    options = ("--batch-size", "2", "--sequence-length", "6", "--rounds", "1", "--dense", "--json")
    assert list(json.loads(run("profile", str(tmp_path), *options))["profiles"]) == ["dense"]


@pytest.mark.parametrize("command", ["estimate", "profile", "plan"])
def test_help_says_which_update_is_the_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what a plan says; else addition beside a residual, frozen_basis for factors alone" in text


# ------------------------------------------------------------------------------------------------ plan


def test_plan_is_the_librarys(run: Any, assets: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    text = run("plan", "vit", "--calibration", "calibration", *PLANNED, "--output", str(output))
    plan = WasiPlan.load(output)
    assert plan.headline() in text
    assert plan == WasiPlan.load(assets / "plan.json")  # the calibration is used again
    model, batch = ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch()
    assert plan == plan_wasi(
        model,
        Calibration.load(assets / "calibration"),
        weight_share=0.6,
        batch=batch,
        config=WasiConfig(update="factor"),
    )


def test_a_plan_with_forms_from_start_to_end(run: Any, assets: Path, tmp_path: Path) -> None:
    output, asked = tmp_path / "plan.json", ("--weight-share", "0.7", "--batch-size", "4")
    text = run("plan", "vit", "--calibration", "calibration", *asked, "--output", str(output))
    plan = WasiPlan.load(output)
    assert plan.headline() in text and {layer.form for layer in plan.layers} - {"factors"}
    forms = {line.split()[0]: line.split()[3] for line in run("inspect", str(output), "--layers").splitlines()[1:-2]}
    assert f"to train under it: WasiConfig(plan='{output}', modules_to_save=['classifier'])" in text
    assert forms == {layer.name: layer.form for layer in plan.layers}
    narrow = ("--forms", "int8", "int4", "--addition-rank", "2", "--json")
    only = json.loads(run("plan", "vit", "--calibration", "calibration", *asked, *narrow))["layers"].values()
    assert {(layer["form"], layer["weight_rank"]) for layer in only} <= {("int8", 2), ("int4", 2)}

    peft_model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(plan=plan))
    peft_model.save_pretrained(tmp_path / "adapter")
    shown = json.loads(run("inspect", str(tmp_path / "adapter"), "--json"))["layers"]
    assert {layer["layer"]: layer["form"] for layer in shown} == forms
    inputs = {"factors": "image", "int8": "8 bits", "int4": "8 bits", "exact": "exact"}
    assert all(layer["input"] == inputs[layer["form"]] for layer in shown)


def test_inspect_an_adapter_beside_residuals(run: Any, tmp_path: Path) -> None:
    peft_model = get_peft_model(ARCHITECTURES["vit"].model(), WasiConfig(weight_rank=2))
    peft_model.save_pretrained(tmp_path / "adapter")
    data = json.loads(run("inspect", str(tmp_path / "adapter"), "--json"))
    assert data["kept_share"] == peft_model.wasi_summary().kept_share
    assert {(layer["form"], layer["weight_rank"], layer["input"]) for layer in data["layers"]} == {
        ("int8", 2, "8 bits")
    }
    assert "input kept for backward: 8 bits" in run("inspect", str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("budget", "name", "value"),
    [
        (("--peak-memory", "100kB"), "peak_bytes", 100_000),
        (("--training-flops", "0.6"), "training_flops", 0.6),
        (("--inference-flops", "2e5"), "inference_flops", 2e5),
        (("--step-time", "0.9"), "step_seconds", 0.9),
        (("--inference-time", "1"), "inference_seconds", 1.0),
        (("--error", "0.1"), "error", 0.1),
    ],
)
def test_every_budget_reaches_the_planner(
    run: Any, monkeypatch: pytest.MonkeyPatch, budget: tuple[str, ...], name: str, value: float
) -> None:
    asked: dict[str, Any] = {}

    def plan_wasi(model: Any, calibration: Any, **options: Any) -> WasiPlan:
        asked.update(options)
        return WasiPlan((LayerPlan("fc", 4, 4, 1, None, 0.5),))

    monkeypatch.setattr(planning, "plan_wasi", plan_wasi)
    run("plan", "vit", "--calibration", "calibration", "--batch-size", "3", "--optimizer", "sgd", *budget)
    assert {key: asked[key] for key in planning.BUDGETS if asked[key] is not None} == {name: value}
    assert asked["optimizer"] == "sgd" and asked["batch"]["pixel_values"].shape == (3, 3, 8, 8)


def test_plan_with_memory_modes(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    asked = ("plan", "vit", "--calibration", "calibration", "--batch-size", "3", "--update", "factor")
    for options, mode in (((), "exact"), (("--memory-mode", "small", "exact"), "small")):
        text = run(*asked, "--peak-memory", "1GiB", *options, "--output", str(output))
        assert f"memory_mode={mode!r}" in text
        assert WasiPlan.load(output).memory_mode == mode
    assert "memory_modes is for peak_bytes alone" in run(*asked, "--error", "0.1", "--memory-mode", "fast", code=2)


@pytest.mark.parametrize(
    ("model", "data"),
    [("bert", ("texts.txt",)), ("llama", ("texts.jsonl", "--text-key", "body")), ("t5", ("texts.txt",))],
)
def test_plan_from_text(run: Any, model: str, data: tuple[str, ...]) -> None:
    plan = json.loads(run("plan", model, "--data", *data, *PLANNED, "--sequence-length", "6", "--json"))
    assert plan["budget"] == {"weight_share": 0.6}
    assert len(plan["layers"]) == ARCHITECTURES[model].target_count


def test_plan_with_larger_images_and_a_plot(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: Path(path).write_text("figure"))
    options = ("--image-size", "12", "--samples", "8", "--calibration", str(tmp_path / "calibration"))
    run("plan", "vit", "--data", "images", *PLANNED, *options, "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").is_file()
    assert Calibration.load(tmp_path / "calibration").rows == 8 * 10  # nine patches and the class token


def test_samples_are_spread_over_sorted_files(run: Any, assets: Path) -> None:
    arguments = build_parser(cli.COMMANDS).parse_args(["plan", "vit", "--data", "images", *PLANNED, "--samples", "4"])
    loader = loading.calibration_batches(arguments, ARCHITECTURES["vit"].model(), "image-classification")
    assert [path.parent.name for path in loader.dataset] == ["one", "one", "two", "two"]  # type: ignore[attr-defined]


def test_cropping_processors_resize_the_shorter_side(run: Any, assets: Path, tmp_path: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    settings |= {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    AutoConfig.from_pretrained(assets / "vit").save_pretrained(tmp_path)
    arguments = build_parser(cli.COMMANDS).parse_args(["plan", str(tmp_path), *PLANNED, "--image-size", "12"])
    collate = loading._image_collator(arguments, ARCHITECTURES["vit"].model())
    assert collate([assets / "images" / "one" / "0.png"])["pixel_values"].shape == (1, 3, 12, 12)


# ------------------------------------------------------------------------------------------------ errors


def test_sizes() -> None:
    assert size_in_bytes("1.5GiB") == 3 * 2**29
    assert size_in_bytes("20 MB") == 20_000_000
    assert size_in_bytes("7kb") == 7000 and size_in_bytes(".5KiB") == 512 and size_in_bytes("12B") == 12


BAD = {
    "unknown command": (("train",), "invalid choice: 'train'"),
    "unknown option": (("inspect", "vit", "--fast"), "unrecognized arguments: --fast"),
    "no such file": (("inspect", "missing.json"), "missing.json: no such file or folder."),
    "no such hub id": (("inspect", "nobody/nothing"), ""),
    "not a plan": (("inspect", "texts.txt"), "texts.txt: Expecting value"),
    "other JSON": (("inspect", "vit/config.json"), "a plan must be a dict with the dict 'layers'"),
    "not a model": (("inspect", "images"), "Unrecognized model"),
    "plot of a model": (("inspect", "vit", "--plot", "x.png"), "--plot needs a plan, an adapter or a calibration"),
    "no folder for the plot": (("inspect", "plan.json", "--plot", "none/x.png"), "none/x.png: the folder must exist."),
    "no batch size": (("estimate", "vit"), "arguments are required: --batch-size"),
    "batch beyond numbers": (("estimate", "vit", "--batch-size", "9" * 5000), "must be at most 2,147,483,647"),
    "batch beyond memory": (
        ("profile", "vit", "--batch-size", "2000000000"),
        "--batch-size 2000000000: there is no memory for such a batch",
    ),
    "batch of zero": (("estimate", "vit", "--batch-size", "0"), "a whole number of at least 1, got '0'"),
    "unknown optimizer": (("estimate", "vit", *ESTIMATED, "--optimizer", "lion"), "invalid choice: 'lion'"),
    "two methods": (("estimate", "vit", *ESTIMATED, "--plan", "plan.json", "--weight-rank", "2"), "not allowed with"),
    "dense with LoRA": (("estimate", "vit", *ESTIMATED, "--dense", "--lora", "2"), "give --lora or --dense, not both"),
    "rank of factors unknown": (("estimate", "vit", *ESTIMATED), "need --weight-rank, or --plan"),
    "residual of a plan": (("estimate", "vit", *ESTIMATED, "--plan", "p.json", "--residual", "int4"), "has its own"),
    "padding unknown": (("estimate", "bert", "--batch-size", "4", "--skip-padding"), "give it with --padding"),
    "padding of a plan unknown": (
        ("plan", "bert", *PLANNED, "--calibration", "calibration", "--skip-padding"),
        "or --data to measure it on",
    ),
    "too much padding": (
        ("estimate", "bert", "--batch-size", "2", "--sequence-length", "4", "--padding", "0.6"),
        "--padding must be at most 0.375 for 2 texts of which one has 4 tokens, got 0.6",
    ),
    "padding of images": (("estimate", "vit", "--batch-size", "4", "--padding", "0.6"), "--padding is for text"),
    "patches of texts": (
        ("estimate", "bert", "--batch-size", "4", "--token-keep", "0.6"),
        "--token-keep is for image",
    ),
    "padding of the dense model": (
        ("estimate", "bert", "--batch-size", "4", "--dense", "--skip-padding", "--padding", "0.5"),
        "--vocabulary, --slice-tokens, --skip-padding and --token-keep are for WASI",
    ),
    "vocabulary of images": (
        ("estimate", "vit", "--batch-size", "4", "--vocabulary", "int8"),
        "vocabulary='int8' needs",
    ),
    "patches where they are not alike": (
        ("estimate", "swin", "--batch-size", "4", "--token-keep", "0.5"),
        "token_keep needs blocks that work on any number of tokens",
    ),
    "activation rank alone": (("estimate", "vit", *ESTIMATED, "--activation-rank", "2"), "goes with --weight-rank"),
    "rank too large": (
        ("estimate", "vit", *ESTIMATED, "--weight-rank", "99"),
        "at most min(out_features, in_features)",
    ),
    "no such plan": (("estimate", "vit", *ESTIMATED, "--plan", "none.json"), "none.json: no such file or folder."),
    "plan that is a folder": (("estimate", "vit", *ESTIMATED, "--plan", "vit"), "vit: must be a file, got a folder."),
    "plan of another model": (
        ("estimate", "bert", *ESTIMATED, "--plan", "plan.json"),
        "the plan is for another model",
    ),
    "tokens for images": (
        ("estimate", "vit", "--batch-size", "4", "--sequence-length", "8"),
        "--sequence-length is for text",
    ),
    "pixels for text": (("estimate", "bert", "--batch-size", "4", "--image-size", "8"), "--image-size is for images"),
    "too many tokens": (
        ("estimate", "bert", "--batch-size", "4", "--sequence-length", "13"),
        "must be at most 12 for this model",
    ),
    "task of another kind": (
        ("estimate", "vit", "--batch-size", "4", "--task", "causal-lm"),
        "Unrecognized configuration class",
    ),
    "no budget": (("plan", "vit", "--data", "images", *ESTIMATED), "one of the arguments --weight-share"),
    "two budgets": (("plan", "vit", "--data", "images", *PLANNED, "--error", "0.1"), "not allowed with argument"),
    "size without unit": (("plan", "vit", *ESTIMATED, "--peak-memory", "1500"), "must be a number with a unit"),
    "unknown unit": (("plan", "vit", *ESTIMATED, "--peak-memory", "2 gallons"), "such as 1.5GiB, got '2 gallons'"),
    "share above 1": (("plan", "vit", *ESTIMATED, "--weight-share", "1.1"), "a number in (0, 1], got '1.1'"),
    "not a number": (("plan", "vit", *ESTIMATED, "--error", "little"), "a number in (0, 1], got 'little'"),
    "infinite": (("plan", "vit", *ESTIMATED, "--inference-flops", "inf"), "a number above 0, got 'inf'"),
    "no data": (("plan", "vit", *PLANNED), "--data is needed, or --calibration"),
    "plan in place of a folder": (("plan", "vit", *PLANNED, "--data", "images", "--output", "images"), "got a folder"),
    "plan where it cannot be": (
        ("plan", "vit", *PLANNED, "--data", "images", "--output", "/proc/x.json"),
        "/proc/x.json: cannot be written",
    ),
    "plan in place of its data": (
        ("plan", "bert", *PLANNED, "--data", "texts.txt", "--output", "texts.txt"),
        "texts.txt: holds something else than a plan",
    ),
    "plan in place of a model": (
        ("plan", "vit", *PLANNED, "--data", "images", "--output", "vit/config.json"),
        "vit/config.json: holds something else than a plan",
    ),
    "plot in place of its data": (
        ("plan", "vit", *PLANNED, "--data", "images", "--plot", "images/one/0.png"),
        "the output must be outside of the data's folder, images.",
    ),
    "plot of an unknown kind": (
        ("plan", "vit", *PLANNED, "--data", "images", "--plot", "x.foo"),
        "x.foo: a figure must",
    ),
    "profile plotted to an unknown kind": (("profile", "vit", *ESTIMATED, "--plot", "x.foo"), "x.foo: a figure must"),
    "plot in place of a folder": (
        ("inspect", "plan.json", "--plot", "images"),
        "images: must be a file, got a folder",
    ),
    "no folder for the plan": (("plan", "vit", *PLANNED, "--output", "none/p.json"), "the folder must exist"),
    "no calibration": (("plan", "vit", *PLANNED, "--calibration", "images"), "must hold a saved calibration"),
    "calibration of another": (("plan", "bert", *PLANNED, "--calibration", "calibration"), "belongs to another model"),
    "least feasible": (
        ("plan", "vit", *ESTIMATED, "--calibration", "calibration", "--weight-share", "0.001"),
        "must be at least",
    ),
    "data missing": (("plan", "vit", *PLANNED, "--data", "none"), "none: no such file or folder."),
    "no images": (("plan", "vit", *PLANNED, "--data", "calibration"), "must be a folder with images"),
    "broken image": (("plan", "vit", *PLANNED, "--data", "broken"), "cannot identify image file"),
    "folder for text": (("plan", "bert", *PLANNED, "--data", "images"), "must be a text file or a .jsonl file"),
    "empty text": (("plan", "bert", *PLANNED, "--data", "empty.txt"), "must hold at least one line of text"),
    "wrong key": (("plan", "bert", *PLANNED, "--data", "texts.jsonl"), "line 1: must be an object with the text"),
    "no JSON": (("plan", "bert", *PLANNED, "--data", "bad.jsonl"), "bad.jsonl, line 2: Expecting property name"),
    "deep JSON": (("inspect", "deep.json"), "maximum recursion depth exceeded"),
    "damaged configuration": (("inspect", "worded"), "worded: cannot be read: "),
    "damaged weights": (("plan", "cut", "--data", "images", *PLANNED), "cut: cannot be read: SafetensorError"),
    "no tokenizer": (("plan", "bare", *PLANNED, "--data", "texts.txt"), "error: bare: "),
    "half an image": (("plan", "vit", *PLANNED, "--data", "halves"), "halves/image.png: "),
    "other letters": (("plan", "bert", *PLANNED, "--data", "latin.txt"), "latin.txt: 'utf-8' codec can't decode"),
    "image like a bomb": (
        ("plan", "vit", "--data", "bomb", *PLANNED),
        "bomb/image.png: Image size (400000000 pixels)",
    ),
    "no output": (("prepare", "vit"), "arguments are required: --output"),
    "no folder for the output": (("prepare", "vit", "--output", "none/x"), "none/x: the folder in which it is to be"),
    "output that is there": (("prepare", "none", "--output", "vit"), "vit: the output must not exist yet"),
    "factors without data": (("prepare", "none", "--output", "x", "--weight-share", "0.5"), "--data is needed"),
    "rank of factors": (("prepare", "none", "--output", "x", "--residual", "none"), "--data is needed"),
    "share and residual": (
        ("prepare", "vit", "--output", "x", "--residual", "int4", "--weight-share", "0.5"),
        "leave out residual='int4'",
    ),
    "nothing to prepare": (("prepare", "images", "--output", "x"), "a checkpoint must have a config.json, got none"),
    "output around its data": (
        ("prepare", "vit", "--output", "images", "--data", "images/one", "--overwrite"),
        "the output must be another folder than the data's, and not around it.",
    ),
    "output around texts": (
        ("prepare", "bert", "--output", "around", "--data", "around/in/texts.txt", "--overwrite"),
        "the output must be another folder than the data's, and not around it.",
    ),
    "output in its data": (
        ("prepare", "vit", "--output", "images/one", "--data", "images", "--overwrite"),
        "the output must be outside of the data's folder, images.",
    ),
    "output in place of the model": (("prepare", "vit", "--output", "vit", "--overwrite"), "another folder than"),
    "output where it cannot be": (("prepare", "vit", "--output", "/proc/x"), "/proc/x: cannot be written"),
    "data that is not there": (("prepare", "vit", "--output", "x", "--data", "none"), "none: no such file or folder."),
    "another adapter": (("inspect", "lora"), "lora: must be an adapter of type WASI, got LORA."),
    "not an adapter": (("inspect", "listed"), "listed/adapter_config.json: must hold a JSON object, got list."),
    "adapter without weights": (("inspect", "empty"), "No such file"),
    "damaged adapter": (("inspect", "damaged"), "adapter_model.safetensors"),
    "adapter without factors": (("inspect", "unfactored"), "must hold WASI factors, got none."),
    "adapter with half a factor": (("inspect", "halved"), "must have a matching wasi_R"),
}


@pytest.fixture(scope="module")
def bad_assets(assets: Path) -> None:
    """Files that are no good, next to the others."""
    import shutil

    from PIL import Image
    from safetensors.torch import save_file

    (assets / "deep.json").write_text("[" * 100_000)
    (assets / "worded").mkdir()
    words = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": "big"}
    (assets / "worded" / "config.json").write_text(json.dumps(words))
    shutil.copytree(assets / "vit", assets / "cut")
    (assets / "cut" / "model.safetensors").write_bytes(b"x" * 50)
    (assets / "bomb").mkdir()
    Image.new("1", (20_000, 20_000)).save(assets / "bomb" / "image.png")
    (assets / "broken").mkdir()
    (assets / "broken" / "image.png").write_text("no image")
    ARCHITECTURES["llama"].model().save_pretrained(assets / "bare")
    (assets / "halves").mkdir()
    whole = (assets / "images" / "one" / "0.png").read_bytes()
    (assets / "halves" / "image.png").write_bytes(whole[: len(whole) // 2])
    (assets / "latin.txt").write_bytes("a\xe9b".encode("latin-1"))
    (assets / "around" / "in").mkdir(parents=True)
    shutil.copy(assets / "texts.txt", assets / "around" / "in")
    (assets / "empty.txt").write_text("\n \n")
    (assets / "bad.jsonl").write_text('{"text": "a"}\n{text}\n')
    get_peft_model(ARCHITECTURES["vit"].model(), LoraConfig(target_modules=["fc1"])).save_pretrained(assets / "lora")
    for name in ("empty", "damaged", "unfactored", "halved", "listed"):
        (assets / name).mkdir()
        settings: Any = [] if name == "listed" else {"peft_type": "WASI", "residual": None}
        (assets / name / "adapter_config.json").write_text(json.dumps(settings))
    (assets / "damaged" / "adapter_model.safetensors").write_text("no tensors")
    save_file({"other": torch.zeros(2)}, assets / "unfactored" / "adapter_model.safetensors")
    save_file({"fc.wasi_form.wasi_L": torch.zeros(2, 1)}, assets / "halved" / "adapter_model.safetensors")


EARLY = (
    "plan in place of a folder", "plan where it cannot be", "plan in place of its data", "plan in place of a model",
    "plot in place of its data", "plot of an unknown kind", "profile plotted to an unknown kind",
    "output around its data", "output around texts", "output in its data", "output where it cannot be",
    "no such plan", "plan that is a folder",
)  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_code_2(
    run: Any, bad_assets: None, assets: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = BAD[case]
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    if case in EARLY:  # before a model is loaded
        for module in (comparing, inspecting, planning):
            monkeypatch.setattr(module, "load_model", None)
    before = set(assets.rglob("*"))
    assert message in run(*arguments, code=2)
    assert set(assets.rglob("*")) == before


@pytest.mark.parametrize("architectures", [None, ["BertForPreTraining"]])
def test_unknown_architecture_asks_for_the_task(run: Any, assets: Path, tmp_path: Path, architectures: Any) -> None:
    config = AutoConfig.from_pretrained(assets / "bert")
    config.architectures = architectures
    config.save_pretrained(tmp_path)
    assert "with --task" in run("inspect", str(tmp_path), code=2)
    assert "12 target layers" in run("inspect", str(tmp_path), "--task", "masked-lm")


def test_models_that_read_something_else() -> None:
    sound = SimpleNamespace(main_input_name="input_values")
    with pytest.raises(ValueError, match="must read 'pixel_values' or 'input_ids', got 'input_values'"):
        loading._reads_images(sound)  # type: ignore[arg-type]
    any_size = SimpleNamespace(config=SimpleNamespace())
    arguments = build_parser(cli.COMMANDS).parse_args(["estimate", "vit", *ESTIMATED])
    with pytest.raises(ValueError, match="--image-size is needed"):
        loading._image_size(arguments, any_size)  # type: ignore[arg-type]


def test_code_that_comes_with_a_model_is_not_run(run: Any, tmp_path: Path) -> None:
    settings = {"model_type": "novel", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["NovelModel"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    assert "trust_remote_code" in run("inspect", str(tmp_path), code=2)


def test_a_closed_pipe_is_no_error(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(assets)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["inspect", "plan.json"]) == 0


def test_progress_goes_to_standard_error(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(assets / "vit"), "--data", str(assets / "images"), *PLANNED, "--json"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == WasiPlan.load(assets / "plan.json").to_dict()
    assert "WASI calibration" in err


def test_as_a_process(assets: Path) -> None:
    command = [sys.executable, "-m", "wasi_peft.cli.main", "inspect", "plan.json", "--json"]
    done = subprocess.run(command, cwd=assets, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == WasiPlan.load(assets / "plan.json").to_dict()
    assert "RuntimeWarning" not in done.stderr


# -------------------------------------------------------------------- run


def test_a_program_runs_with_another_heap_and_its_own_arguments(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.environ['GLIBC_TUNABLES'])\nsys.exit(3)\n")
    command = [sys.executable, "-m", "wasi_peft.cli.main", "run"]
    found = subprocess.run([*command, script, "--json", "-m", "--", "-x"], capture_output=True, text=True)
    assert found.returncode == 3
    assert found.stdout.startswith("['--json', '-m', '--', '-x'] glibc.malloc.tcache_count=0:")
    found = subprocess.run([*command, "-m", "json.tool", "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and "json.tool" in found.stdout


def test_run_needs_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run"]) == 2
    assert "run needs a program" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert "what would follow `python`" in capsys.readouterr().out
