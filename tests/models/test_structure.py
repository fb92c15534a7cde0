"""What counts as a block, a stage, an MLP and the head, in real models and in ones that are built by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers as tf
from models import ARCHITECTURES, Architecture
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.memory import LowBitBlocks
from wasi_peft.models.position_wise import position_wise_modules
from wasi_peft.models.structure import Structure, blocks_of, hidden_states, vocabulary_head
from wasi_peft.tuner.targets import default_target_names

BLOCKS = {
    "vit": ["vit.layers.0", "vit.layers.1"],
    "dinov2": ["dinov2.encoder.layer.0", "dinov2.encoder.layer.1"],
    "swin": ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "llama_tied": ["model.layers.0", "model.layers.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0"],
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    """Named as torchvision names the layers of its encoder block: an MLP that is a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Experts(nn.Module):
    """A block around a list of alike MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + sum(expert(x) for expert in self.experts)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layers, self.head = nn.Linear(8, 8), layers, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)))


def torchvision_like() -> Encoder:
    """`torchvision.models.VisionTransformer` holds `encoder.layers.encoder_layer_0`, children of a Sequential."""
    return Encoder(nn.Sequential(OrderedDict((f"encoder_layer_{index}", Block()) for index in range(2))))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_architectures(name: str) -> None:
    structure = Structure(ARCHITECTURES[name].model())
    assert list(structure.blocks) == BLOCKS[name]
    stages = ["swin.encoder.layers.0", "swin.encoder.layers.1"] if name == "swin" else BLOCKS[name]
    assert list(structure.stages) == stages


def test_layers_are_those_of_the_blocks_without_head_and_patch_merging(architecture: Architecture) -> None:
    model = architecture.model()
    assert set(Structure(model).layers) == architecture.targets(model)
    adapted = get_peft_model(model, WasiConfig(residual=None, weight_rank=2)).base_model.model
    assert set(Structure(adapted).layers) == architecture.targets(architecture.model())
    lora = get_peft_model(architecture.model(), LoraConfig(target_modules="all-linear")).base_model.model
    assert set(Structure(lora).layers) == architecture.targets(architecture.model())


@pytest.mark.parametrize(
    ("make", "blocks", "stages"),
    [
        (torchvision_like, ["layers.encoder_layer_0", "layers.encoder_layer_1"], None),
        (lambda: nn.Sequential(nn.Linear(8, 8), Stage()), ["1.blocks.0", "1.blocks.1"], ["1"]),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block())), ["1.0", "1.1"], ["1"]),
        (lambda: nn.Sequential(nn.Linear(8, 8), Block()), ["1"], None),
        (lambda: nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block()])]), ["0.0", "1.0"], None),
        (lambda: nn.ModuleList([Experts(), Experts()]), ["0", "1"], None),
        (lambda: nn.ModuleList([nn.Sequential(Attention(), nn.Sequential(nn.Linear(8, 8)))]), ["0"], None),
        (lambda: nn.ModuleDict({"text": Encoder(nn.Sequential(Block()))}), ["text.layers.0"], None),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), [], None),
    ],
    ids="torchvision swin nested plain segformer experts sublayers dict none".split(),
)
def test_blocks_of_models_made_by_hand(make: Any, blocks: list[str], stages: list[str] | None) -> None:
    structure = Structure(make())
    assert list(structure.blocks) == blocks
    assert list(structure.stages) == (blocks if stages is None else stages)


def test_a_model_in_a_list_is_no_block() -> None:
    model = nn.Sequential(ARCHITECTURES["bert"].model(), nn.Linear(3, 3))
    assert list(Structure(model).blocks) == ["0.bert.encoder.layer.0", "0.bert.encoder.layer.1"]
    assert list(Structure(model).stages) == ["0.bert.encoder.layer.0", "0.bert.encoder.layer.1"]


def test_the_block_of_a_layer() -> None:
    structure = Structure(nn.Sequential(nn.Linear(8, 8), Stage()))
    assert structure.block_of("1.blocks.1.mlp.0") == "1.blocks.1"
    assert structure.block_of("1.blocks") is None and structure.block_of("0") is None
    assert structure.is_inside_blocks("1.blocks.0.mlp") and not structure.is_inside_blocks("0")


def test_segformer_and_hiera() -> None:
    sizes: dict[str, Any] = {"num_labels": 3}
    segformer = tf.SegformerForImageClassification(
        tf.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 2], num_attention_heads=[1] * 4, **sizes)
    )
    names = list(Structure(segformer).blocks)
    assert len(names) == 5 and all(type(segformer.get_submodule(n)).__name__ == "SegformerLayer" for n in names)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have transformer blocks, numbered modules .* got Linear without any"):
        blocks_of(nn.Linear(3, 3))


def test_hidden_states_are_the_first_argument_or_have_the_name() -> None:
    x = torch.zeros(2, 3)
    assert hidden_states((x, 1), {}) is x and hidden_states((), {"hidden_states": x}) is x
    assert hidden_states((None, x), {}) is None and hidden_states((), {"x": x}) is None


def test_vocabulary_heads() -> None:
    assert vocabulary_head(ARCHITECTURES["llama"].model()) is not None
    assert vocabulary_head(ARCHITECTURES["vit"].model()) is None and vocabulary_head(nn.Linear(3, 3)) is None


# -------------------------------------------------------------------- the kind of names that torchvision gives


def test_blocks_with_names_are_targets_and_hold_mlps() -> None:
    model = torchvision_like()
    prefix = "layers.encoder_layer_{}."
    parts = ("attention.qkv", "attention.out", "mlp.0", "mlp.3")
    assert default_target_names(model, WasiConfig(residual=None)) == {
        prefix.format(i) + part for i in range(2) for part in parts
    }
    assert list(position_wise_modules(model)) == [prefix.format(i) + "mlp" for i in range(2)]


@pytest.mark.parametrize("mode", ["fast", "small"])
def test_blocks_with_names_train_in_every_mode(mode: Any) -> None:
    x = torch.randn(4, 7, 8)

    def run(mode: Any) -> Tensor:
        torch.manual_seed(0)
        config = WasiConfig(residual=None, weight_rank=4, target_modules=["mlp.0", "mlp.3"], memory_mode=mode)
        model = get_peft_model(torchvision_like(), config).train()
        blocks = [module for name, module in model.named_modules() if name[:-1].endswith("encoder_layer_")]
        assert blocks and all(("forward" in vars(block)) == (mode != "exact") for block in blocks)
        model(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected, actual = run("exact"), run(mode)
    assert float((actual - expected).norm() / expected.norm()) < 0.05


def test_techniques_are_on_the_blocks_with_names() -> None:
    model = torchvision_like()
    LowBitBlocks().install(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == [
        "layers.encoder_layer_0",
        "layers.encoder_layer_1",
    ]
