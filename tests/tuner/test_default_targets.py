"""What is targeted where nobody names layers: what is worth it, and nothing that is no plain linear map."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, wasi_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig, wasi_summary
from wasi_peft.models.structure import Structure
from wasi_peft.tuner.targets import default_target_names, is_plain_linear

TEXT = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def names(model: nn.Module, **options: Any) -> set[str]:
    return default_target_names(model, WasiConfig(**options))


def unchanged(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# ---------------------------------------------------------------- layers that are no plain linear maps


class Router(nn.Linear):
    """Answers a tuple."""

    def forward(self, x: Tensor) -> Any:
        return torch.topk(super().forward(x), 2)


class Spelled(nn.Linear):
    """A linear map in other words, as Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Adds(nn.Linear):
    """More than a linear map of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


class Needs(nn.Linear):
    """Cannot run on its input alone."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * other


class Block(nn.Module):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.up, self.odd, self.down = nn.Linear(8, 12), kind(12, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.up(x))
        y = y if isinstance(y, Tensor) else y[0].repeat_interleave(6, -1)
        z: Tensor = self.down(y)
        return z


def odd_model(kind: type[nn.Linear]) -> nn.Module:
    return nn.Sequential(nn.Sequential(Block(kind), Block(kind)))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("kind", [Router, Adds, Needs, Spelled, nn.Linear])
def test_only_linear_maps_are_default_targets(kind: type[nn.Linear], meta: bool) -> None:
    model = odd_model(kind).to("meta") if meta else odd_model(kind)
    plain = kind in (Spelled, nn.Linear) or (meta and kind is Adds)  # without values it cannot be told
    assert is_plain_linear(model[0][0].odd) == plain
    assert {name for name in names(model) if "odd" in name} == ({"0.0.odd", "0.1.odd"} if plain else set())


@pytest.mark.parametrize("kind", [Router, Adds, Needs])
@pytest.mark.parametrize("targets", [["odd"], r".*\.odd", "all-linear"])
def test_others_are_refused_by_name_alone(kind: type[nn.Linear], targets: Any) -> None:
    model = odd_model(kind)
    before = unchanged(model)
    if targets == "all-linear":
        adapted = get_peft_model(model, WasiConfig(target_modules=targets, residual="exact"))
        assert {layer.name for layer in wasi_summary(adapted).layers} == {
            f"0.{block}.{part}" for block in (0, 1) for part in ("up", "down")
        }
        return
    with pytest.raises(TypeError, match=rf"0\.0\.odd: .*, got {kind.__name__}, .* Leave it out with exclude_modules"):
        get_peft_model(model, WasiConfig(target_modules=targets))
    assert unchanged(model) == before


def test_the_routers_of_experts_stay() -> None:
    sizes = {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 2}
    model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, intermediate_size_mlp=24, head_dim=8))
    tokens = torch.randint(23, (2, 5))
    expected = model.eval()(tokens).logits
    assert names(model) and not any("router" in name for name in names(model))
    adapted = wasi_model(model, residual=None, explained_variance_threshold=1.0).eval()
    torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- heads


def test_the_head_of_a_segmenter_is_no_target_nor_its_blocks() -> None:
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    model = tf.SegformerForSemanticSegmentation(config)
    assert names(model) and all(name.startswith("segformer.") for name in names(model))


def test_hypernetworks_and_predictors_are_heads() -> None:
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.SamConfig(
        vision_config={
            **vision,
            "image_size": 16,
            "patch_size": 4,
            "window_size": 2,
            "num_pos_feats": 8,
            "mlp_dim": 24,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 16, "patch_size": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2},
    )
    found = names(tf.SamModel(config))
    assert "vision_encoder.layers.0.attn.qkv" in found and "mask_decoder.transformer.layers.0.mlp.lin1" in found
    assert not any("hypernetworks" in name or "prediction_head" in name for name in found)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))


class MaskPredictor(MultiHead):
    pass


@pytest.mark.parametrize(
    ("name", "module", "is_head"),
    [
        ("encoder", MultiHead, False),
        ("heads", MultiHead, True),
        ("mask_head", MultiHead, True),
        ("header", MultiHead, False),
        ("part", MaskPredictor, True),
        ("class_embed", MultiHead, True),
    ],
)
def test_names_and_classes_that_tell_a_head(name: str, module: type[nn.Module], is_head: bool) -> None:
    """Attention heads inside of blocks are none."""
    model = nn.Module()
    model.add_module(name, module())
    structure = Structure(model)
    assert len(structure.layers) == 4
    assert {structure.is_in_head(layer) for layer in structure.layers} == {is_head}


# ---------------------------------------------------------------- small and tied ones


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Sequential())
    for _ in range(2):
        block = nn.Module()
        block.wide, block.thin, block.gate = nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(16, 1)
        model[0].append(block)
    return model


def test_slivers_are_no_targets() -> None:
    assert names(small_model()) == {f"0.{block}.{part}" for block in (0, 1) for part in ("wide", "thin")}


def test_tied_weights_are_no_targets() -> None:
    model: Any = small_model()
    model[0][1].wide.weight = model[0][0].wide.weight
    assert names(model) == {"0.0.thin", "0.1.thin"}


def test_blocks_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError) as error:
        names(small_model(), layers_to_transform=[7])
    assert str(error.value) == (
        "layers_to_transform=[7] selects no layer of Sequential that could be a target: blocks are counted from 0."
    )


def test_a_model_with_nothing_to_target() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Sequential(nn.Linear(16, 7)))):
        with pytest.raises(ValueError, match=r"nothing to target by default.*specify `target_modules`"):
            get_peft_model(model, WasiConfig())


@pytest.mark.parametrize("residual", [None, "int8"])
def test_a_rank_above_a_layers_size_leaves_it_dense(
    residual: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = WasiConfig(weight_rank=12, residual=residual)
    model, base = small_model(), small_model()
    base.load_state_dict(model.state_dict())
    adapted = get_peft_model(model, config)
    assert config.resolved_ranks == {"0.0.wide": 12, "0.1.wide": 12}
    lines = [record.getMessage() for record in caplog.records if "stays dense" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(
        "0.0.thin: stays dense, being smaller than weight_rank=12 (2 layers"
    )
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert wasi_summary(loaded).layers == wasi_summary(adapted).layers
    assert len(wasi_summary(adapted).layers) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"weight_rank": 12, "target_modules": ["wide", "thin"]},
        {"weight_rank": 12, "target_modules": r".*\.(wide|thin)"},
        {"rank_pattern": {"thin": 12}},
        {"weight_rank": 17},
    ],
    ids=["list", "expression", "pattern", "no layer has it"],
)
def test_a_rank_of_layers_that_were_named_is_refused(options: dict[str, Any]) -> None:
    model = small_model()
    before = unchanged(model)
    with pytest.raises(ValueError, match=r"the rank must be at most min\(out_features, in_features\) = "):
        get_peft_model(model, WasiConfig(**options))
    assert unchanged(model) == before


def test_a_rank_of_its_own_keeps_a_small_layer() -> None:
    config = WasiConfig(weight_rank=12, rank_pattern={"0.1.thin": 8})
    get_peft_model(small_model(), config)
    assert config.resolved_ranks == {"0.0.wide": 12, "0.1.wide": 12, "0.1.thin": 8}


# ---------------------------------------------------------------- what is said


def said(model: nn.Module, caplog: pytest.LogCaptureFixture, **options: Any) -> logging.LogRecord:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="wasi_peft"):
        get_peft_model(model, WasiConfig(**options))
    (record,) = [record for record in caplog.records if "of the model's weights stay dense" in record.getMessage()]
    return record


def test_what_trains_whole_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    for name, module in (("vit", "classifier"), ("llama", "lm_head")):
        plain = said(ARCHITECTURES[name].model(), caplog).getMessage()
        assert said(ARCHITECTURES[name].model(), caplog, modules_to_save=[module]).getMessage() == plain


def test_what_stays_dense_is_said_with_its_share(caplog: pytest.LogCaptureFixture) -> None:
    model = ARCHITECTURES["llama"].model()
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    dense = {name: size for name, size in matrices.items() if name.removesuffix(".weight") not in names(model)}
    record = said(model, caplog)
    share = sum(dense.values()) / sum(matrices.values())
    assert record.getMessage().startswith(f"{share:.1%} of the model's weights stay dense: ")
    assert "lm_head" in record.getMessage() and "model.embed_tokens" in record.getMessage()
    assert record.levelno == logging.INFO


def test_layers_that_stay_are_a_warning_unless_they_were_chosen(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.Module:
        packed = small_model()
        packed[0][0].experts = nn.Parameter(torch.zeros(8, 24, 16))
        return packed

    record = said(model(), caplog)
    assert record.levelno == logging.WARNING and "0.0 (" in record.getMessage()
    assert said(model(), caplog, target_modules=["wide"]).levelno == logging.INFO
