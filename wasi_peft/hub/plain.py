"""The plain form of a model: ordinary torch modules, which need neither this package nor PEFT."""

from __future__ import annotations

import copy
import math
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..forms.compressed import CompressedLinear
from ..forms.compressed_stack import CompressedStack
from ..forms.dense import build_dense, dense_bias, is_quantized
from ..forms.factored import FactoredLinear
from ..forms.products import ProductChoice
from ..forms.residual import Int8Residual
from ..models.experts import conceal_experts
from ..tuner.model import WasiModel
from .cases import Case, answered, cases_of, example_batch, tolerance_of
from .formats import Format, Source

_OF_A_LINEAR = ("weight", "bias", "in_features", "out_features")


class LinearPair(nn.Sequential):
    """Two thin layers, `x -> L (R x) + b`, which tell what model code asks of the one whose place they take.

    T5 reads `layer.weight.dtype`. The weight has shape, dtype and device of the product L R, and NaN for numbers, so
    that nothing wrong comes of computing with it unnoticed.
    """

    @property
    def weight(self) -> Tensor:
        """Of the one layer, without its numbers, (out, in)."""
        outer: Any = self[1].weight
        weight: Tensor = outer.new_full((), math.nan).expand(len(outer), self.in_features)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """(out,) or None."""
        outer: Any = self[1]
        bias: nn.Parameter | None = outer.bias
        return bias

    @property
    def in_features(self) -> int:
        """Of the one layer."""
        inner: Any = self[0]
        size: int = inner.in_features
        return size

    @property
    def out_features(self) -> int:
        """Of the one layer."""
        outer: Any = self[1]
        size: int = outer.out_features
        return size


def to_plain(
    model: nn.Module, batch: Any = None, *, adapter_name: str | None = None, tolerance: float | None = None
) -> nn.Module:
    """A copy of a model that is made of ordinary modules, for tools that look for `nn.Linear`.

    Two factors become `nn.Sequential(nn.Linear(in, K, bias=False), nn.Linear(K, out))`. A weight in few bits has no
    ordinary module: it is restored to the dense layer that it was made of, with factors beside it multiplied in.
    torchao, torch's dynamic quantisation and exporters then find every layer. Packed experts, which are parameters,
    are restored too.

    The copy is run, and must answer as the model does. Where the model's code asks for more than what a layer answers,
    such as `layer.weight.dtype`, two layers are a :class:`LinearPair`, which tells it; code that computes with the
    weight itself is refused.

    Args:
        model: A compressed model, a PEFT model with a WASI adapter, or a dense one; not changed, and nothing of it is
            shared.
        batch: What the model is called with, as for [`estimate_wasi`]; by default noise, for transformers models of
            images or texts.
        adapter_name: Of a PEFT model; by default the active one.
        tolerance: Largest difference of answers, relative to their largest element; by default the square root of the
            dtype's precision. Products with weights in 8 bits count as they are without rounding of their input.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: If code computes with the weight of a layer that became two, answers differ, or no batch is known.
        TypeError: If the adapter is no WASI adapter, or a layer is kept in few bits by another library.

    Example:
        >>> import torch
        >>> from wasi_peft import WasiConfig, compress
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> small = compress(net, WasiConfig(target_modules=["0"], weight_rank=2, residual=None, train_vectors=False))
        >>> to_plain(small, torch.zeros(4, 8))[0]
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=8, bias=True)
        )
    """
    return plain_form(Source(model, batch, adapter_name, tolerance)).module


class PlainForm(NamedTuple):
    """A plain module, the names of the layers that became two, and what it must answer."""

    module: nn.Module
    pairs: dict[str, nn.Sequential]
    cases: list[Case]
    tolerance: float

    def differs(self, module: nn.Module) -> float:
        """How far a module's answers are from those of the model.

        Raises:
            ValueError: If that is further than the tolerance.
        """
        return answered(module, self.cases, self.tolerance)


def plain_form(source: Source) -> PlainForm:
    """The plain form, and what the model answers: with exact products, since those that round differ by machine."""
    batch = example_batch(source.model) if source.batch is None else source.batch
    plain = standalone(source.model, source.adapter_name)
    multiply_exactly(plain)
    cases = cases_of(plain, batch)
    pairs = _replace(plain)
    for name, module in plain.named_modules():
        check_ordinary(name, module)
    _forget_quantizer(plain)
    tolerance = tolerance_of(plain) if source.tolerance is None else source.tolerance
    form = PlainForm(plain, pairs, cases, tolerance)
    with _watched(pairs):
        form.differs(plain)
    return form


def check_ordinary(name: str, module: nn.Module) -> None:
    """Refuse a module of which nobody knows what it holds.

    Raises:
        TypeError: If another adapter is in it, or another library keeps its weight in few bits.
    """
    if isinstance(module, BaseTunerLayer) or is_quantized(module):
        raise TypeError(
            f"{name}: {type(module).__name__} has no plain form; merge adapters, and dequantize() layers that "
            "another library keeps in few bits, first."
        )


def standalone(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """A copy without an adapter, in evaluation mode; of a WASI adapter the forms are kept.

    Raises:
        TypeError: If the adapter is another one.
        ValueError: If there is no adapter of that name.
    """
    if not isinstance(model, PeftModel):
        return copy.deepcopy(model).eval()
    twin = wasi_copy(model, adapter_name)
    merged: nn.Module = twin.base_model.merge_and_unload(dense=False)
    return merged


def wasi_copy(model: nn.Module, adapter_name: str | None) -> PeftModel:
    """A copy of a PEFT model with a WASI adapter, that one active, in evaluation mode.

    Raises:
        TypeError: If it is none.
        ValueError: If there is no adapter of that name.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel) or not isinstance(tuner, WasiModel):
        raise TypeError(f"the model must be a PEFT model with a WASI adapter, got {type(tuner).__name__}.")
    if adapter_name is not None and adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}.")
    twin = copy.deepcopy(model).eval()
    if adapter_name is not None:
        twin.set_adapter(adapter_name)
    return twin


def multiply_exactly(model: nn.Module) -> None:
    """Have products with weights in 8 bits restore the weight, instead of rounding what it is multiplied with."""
    exact = ProductChoice("restored")
    for module in model.modules():
        if isinstance(module, Int8Residual):
            module.products = exact


def plain_layer(layer: CompressedLinear) -> nn.Module:
    """The ordinary modules that compute what a compressed layer computes."""
    if layer.frozen is not None:
        return layer.to_dense().to(layer.dtype)
    assert isinstance(layer.form, FactoredLinear)
    outer, inner = (factor.detach().clone() for factor in layer.form.factors())
    bias = dense_bias(layer)
    pair = build_dense(nn.Linear, inner, None), build_dense(nn.Linear, outer, None if bias is None else bias.clone())
    return nn.Sequential(*pair).train(layer.training)


def _replace(model: nn.Module) -> dict[str, nn.Sequential]:
    """Put plain layers in place of compressed ones; those that became two, by name. Packed experts become dense."""
    made: dict[int, nn.Module] = {}  # a layer may be in a model twice
    names = [name for name, module in _every_name(model) if isinstance(module, CompressedLinear)]
    for name, stack in _every_name(model):
        if isinstance(stack, CompressedStack):
            model.set_submodule(name, stack.to_dense())
    conceal_experts(model)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, CompressedLinear)
        if id(layer) not in made:
            made[id(layer)] = plain_layer(layer)
        model.set_submodule(name, made[id(layer)])
    return {name: pair for name in names if isinstance(pair := model.get_submodule(name), nn.Sequential)}


def _every_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _forget_quantizer(model: nn.Module) -> None:
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


class _Watched(LinearPair):
    """A pair that notes what it is asked."""

    asked: list[str]
    own_name: str

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_A_LINEAR:
            self.asked.append(self.own_name)
        return super().__getattribute__(name)


@contextmanager
def _watched(pairs: dict[str, nn.Sequential]) -> Iterator[None]:
    """While the model runs, find the pairs that its code asks; they stay :class:`LinearPair`, the others ordinary.

    Raises:
        ValueError: If the model answers something else, as it does where its code computes with a weight.
    """
    asked: list[str] = []
    for name, pair in pairs.items():
        pair.__dict__.update(asked=asked, own_name=name)
        pair.__class__ = _Watched
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not asked:
            raise
        raise ValueError(
            f"{error} The model's code asks {asked[-1]} for its weight, of which two layers know shape and dtype "
            "alone. If it computes with it, leave that layer dense (exclude_modules), or give it a weight in few "
            "bits (residual)."
        ) from error
    finally:
        for name, pair in pairs.items():
            for note in ("asked", "own_name"):
                pair.__dict__.pop(note, None)
            pair.__class__ = LinearPair if name in asked else nn.Sequential


# ---------------------------------------------------------------- as a folder

LOADER = '''"""The MODEL_CLASS of this folder, by torch, transformers and safetensors: `model = load.load()`.

Layers in `factored_layers` of config.json are two thin ones here: `<layer>.0.weight`, `<layer>.1.weight` in the file.
"""

from pathlib import Path

import transformers
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).resolve().parent


class Pair(nn.Sequential):
    """Model code may ask for the dtype and shape of the one weight, and not compute with it."""

    @property
    def weight(self):
        outer = self[1].weight
        return outer.new_full((), float("nan")).expand(len(outer), self[0].in_features)

    @property
    def bias(self):
        return self[1].bias


class Model(transformers.MODEL_CLASS):
    def __init__(self, config):
        super().__init__(config)
        for name, (inputs, rank, outputs) in config.factored_layers.items():
            bias = self.get_submodule(name).bias is not None
            pair = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias)
            self.set_submodule(name, Pair(*pair))


def load(**options):
    """The model in evaluation mode; options are those of from_pretrained, such as dtype or device_map."""
    config, state = transformers.AutoConfig.from_pretrained(FOLDER), load_file(FOLDER / "WEIGHTS")
    own = {"generation_config": transformers.GenerationConfig.from_pretrained(FOLDER)} if Model.can_generate() else {}
    own |= {"config": config, "state_dict": state, "output_loading_info": True, "dtype": config.dtype}
    model, report = Model.from_pretrained(None, **{**own, **options})
    if wrong := {key: names for key, names in report.items() if names}:
        raise ValueError(f"WEIGHTS does not fit config.json: {wrong}")
    return model


if __name__ == "__main__":
    print(load())
'''


@dataclass(frozen=True)
class PlainFormat(Format):
    """safetensors, config.json and a `load.py` that needs torch, transformers and safetensors alone.

    Where layers became two, the file of the weights has a name that transformers does not look for: its own loading
    would fill dense layers with random numbers instead.
    """

    name: ClassVar[str] = "plain"

    def write(self, source: Source, folder: Path) -> float:
        base = source.model.get_base_model() if isinstance(source.model, PeftModel) else source.model
        cls = type(base)
        if not isinstance(base, PreTrainedModel) or getattr(transformers, cls.__name__, None) is not cls:
            raise TypeError(f"format 'plain' is for model classes of transformers, got {cls.__name__}; see to_plain.")
        form = plain_form(source)
        plain: Any = form.module
        plain.config.architectures = [cls.__name__]
        plain.config.factored_layers = {
            name: [first.in_features, first.out_features, second.out_features]
            for name, (first, second) in form.pairs.items()
        }
        plain.config.save_pretrained(folder)
        if plain.can_generate():
            plain.generation_config.save_pretrained(folder)
        weights = "factored.safetensors" if form.pairs else "model.safetensors"
        state = remove_tied_weights_from_state_dict(plain.state_dict(), plain)
        state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        save_file(state, folder / weights, metadata={"format": "pt"})
        text = LOADER.replace("MODEL_CLASS", cls.__name__).replace("WEIGHTS", weights)
        (folder / "load.py").write_text(text, encoding="utf-8")
        return form.differs(runpy.run_path(str(folder / "load.py"))["load"]().to(plain.device))
