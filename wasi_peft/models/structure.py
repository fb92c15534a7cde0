"""What a transformer block is to this package: one answer, from the module tree and no table of architectures.

A *block* is an element of a list of modules, numbered by its name (`layer.3`, `encoder_layer_0`), that holds linear
layers. Lists nest, and the element of the outer one is the block, as in T5, whose `block.0` holds the list
`[attention, MLP]`, and where a block holds experts; unless it is only a frame around blocks:

- it cannot run, being a list itself (SegFormer's `block.0`, around `block.0.1`);
- it holds a whole transformers model (`0` of a `Sequential` of a model and a head);
- all its layers lie in one inner list of modules of one class (Swin's `layers.0`, around `layers.0.blocks.1`; patch
  merging between stages is no part of a block).

So a block runs attention and MLP once: what is recomputed at a time, and what repair compares. The outermost frame
that can run is a *stage*; blocks that are in none are stages themselves. Slices of the batch pass through a stage
without being joined in between, and what is stored in few bits includes the patch merging at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .experts import ExpertStack

_HEAD = re.compile(r"(^|_)(heads?|predictor|classifier|hypernetworks?|bbox_embed|class_embed)(_|$)")
_HEAD_CLASS = re.compile("(?<!Multi)(Head|Predictor|Classifier)$")

# one with an adapter counts as the layer that it adapts
LINEAR_LAYERS = (nn.Linear, Conv1D, ExpertStack, BaseTunerLayer)


def linear_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the linear layers below a module, those with an adapter as one."""
    for name, child in module.named_children():
        if isinstance(child, LINEAR_LAYERS):
            yield prefix + name, child
        else:
            yield from linear_layers(child, f"{prefix}{name}.")


class Structure:
    """The blocks of a model.

    Attributes:
        layers: Linear layers inside numbered modules, by name, without the output embedding and patch merging.
        blocks: The blocks that hold them, by name, in the model's order.
        stages: The stages, by name; those of most models are the blocks.

    Example:
        >>> from transformers import SwinConfig, SwinModel
        >>> small = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2])
        >>> structure = Structure(SwinModel(small))
        >>> list(structure.blocks), list(structure.stages)
        (['encoder.layers.0.blocks.0', 'encoder.layers.1.blocks.0'], ['encoder.layers.0', 'encoder.layers.1'])
        >>> structure.block_of("encoder.layers.1.blocks.0.intermediate.dense")
        'encoder.layers.1.blocks.0'
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._numbered = set(_numbered_modules(model))
        self.layers = {
            name: layer
            for name, layer in linear_layers(model)
            if layer is not head and self.is_inside_blocks(name) and not _is_patch_merging(model, name)
        }
        self._base = self._find_base()
        self._frames = set(self._find_frames())
        self.blocks = self._modules(self.block_of(name) for name in self.layers)
        self.stages = self._modules(self._stage_of(name) for name in self.layers)

    def is_inside_blocks(self, name: str) -> bool:
        """Whether a module is part of a numbered one: `encoder.layer.3.output.dense`, not `classifier`."""
        return bool(self._around(name))

    def block_of(self, name: str) -> str | None:
        """Name of the block that a module is part of; None if there is none."""
        return next((outer for outer in self._around(name) if outer not in self._frames), None)

    def is_in_head(self, name: str) -> bool:
        """Whether a module belongs to a head on the blocks (SegFormer's decoder, SAM's hypernetworks): it is fresh.

        Heads are what a transformers model has beside its base model, and what is called one before any number: in
        `decode_head.linear_c.0`, not in `blocks.0.attention.heads.1`.
        """
        if self._base is not None and not name.startswith(self._base):
            return True
        outermost = next(iter(self._around(name)), name)
        module = self._model
        for part in outermost.split("."):
            if _HEAD.search(part):
                return True
            module = module.get_submodule(part)
            if _HEAD_CLASS.search(type(module).__name__):
                return True
        return False

    def _stage_of(self, name: str) -> str | None:
        return next((outer for outer in self._around(name) if self._runs_blocks_alone(outer)), None)

    def _around(self, name: str) -> list[str]:
        """Numbered modules around a module, the outermost first."""
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        return [prefix for prefix in prefixes if prefix in self._numbered]

    def _modules(self, names: Iterable[str | None]) -> dict[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name in names if name is not None}

    def _runs_blocks_alone(self, name: str) -> bool:
        """Whether a numbered module can run, and is not around a whole model."""
        module = self._model.get_submodule(name)
        able = type(module).forward is not nn.Module.forward
        return able and not any(isinstance(part, PreTrainedModel) for part in module.modules())

    def _find_base(self) -> str | None:
        """Prefix of names in the base model, None where that is the model itself, or has none of the layers."""
        base = getattr(self._model, "base_model", self._model)
        if not isinstance(self._model, PreTrainedModel) or base is self._model:
            return None
        prefix = next(f"{name}." for name, module in self._model.named_modules() if module is base)
        return prefix if any(name.startswith(prefix) for name in self.layers) else None

    def _find_frames(self) -> Iterator[str]:
        inner: dict[str, set[str | None]] = {}  # the next numbered modules around the layers in each
        for layer in self.layers:
            around = self._around(layer)
            for outer, following in zip(around, [*around[1:], None], strict=True):
                inner.setdefault(outer, set()).add(following)
        for name, elements in inner.items():
            if not self._runs_blocks_alone(name):
                yield name
            elif None not in elements:
                lists = {str(element).rpartition(".")[0] for element in elements}
                kinds = {type(module) for module in self._modules(elements).values()}
                if len(lists) == len(kinds) == 1:
                    yield name


def _numbered_modules(model: nn.Module) -> Iterator[str]:
    """Names of the elements of lists: those that are numbers, and those of a list that end in one."""
    for name, module in model.named_modules():
        for child in module._modules:
            if child.isdigit() or (isinstance(module, (nn.ModuleList, nn.Sequential)) and child[-1:].isdigit()):
                yield f"{name}.{child}" if name else child


def _is_patch_merging(model: nn.Module, name: str) -> bool:
    """Whether a layer only halves the resolution between stages (Swin), which is no part of a block."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(word in type(parent).__name__.lower() for word in ("merging", "downsample"))


def blocks_of(model: nn.Module) -> Structure:
    """The structure of a model that has blocks.

    Raises:
        ValueError: If it has none.
    """
    structure = Structure(model)
    if not structure.blocks:
        raise ValueError(
            "the model must have transformer blocks, numbered modules that hold Linear or Conv1D layers, got "
            f"{type(model).__name__} without any."
        )
    return structure


def block_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that blocks are made up of, such as attention and MLP; none of a model without blocks.

    What is put around these and not around blocks is there again when checkpointing calls a block again.
    """
    for block in Structure(model).blocks.values():
        yield from (part for part in block.children() if next(part.children(), None) is not None)


def vocabulary_head(model: nn.Module) -> nn.Linear | None:
    """The plain linear layer over a vocabulary that a language model ends in; None for any other model."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return head if type(head) is nn.Linear else None


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments: the first positional one, or the keyword of that name."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


def without_cache(argument: Any) -> Any:
    """An argument of a block, or None for a cache of keys and values, to which every run of the block would add."""
    return None if isinstance(argument, Cache) else argument
