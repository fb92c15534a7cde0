"""Token dropping: vision transformers train on some of an image's patches, and are used on all of them.

PatchDropout (arXiv 2208.07220), as in masked autoencoders (arXiv 2111.06377): each image of a batch keeps patches of
its own, drawn anew in every forward pass, and what stands before them (class and register tokens) stays. Position
embeddings have been added by then, so a patch knows where it was. Attention and MLPs then see fewer rows: time and
what backward keeps fall with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .structure import Structure, hidden_states


class TokenDropping:
    """Hooks that count an image's patches where they are made, and drop some of them before the first block.

    Both are the same object, which lies in the hooks of the model: a copy of the model has one of its own.

    Args:
        keep: Share of the patches that stay, in (0, 1).
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.patches = 0  # of an image, in the running forward pass

    def count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """After the patch embedding, (batch, features, height, width)."""
        self.patches = output.shape[2:].numel()

    def drop(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first block: its arguments, with fewer tokens while the model trains."""
        if not block.training:
            return None
        states = hidden_states(args, kwargs)
        if states is None or states.dim() != 3 or states.shape[1] < self.patches:
            shape = None if states is None else tuple(states.shape)
            raise ValueError(
                f"token_keep needs blocks that take (batch, tokens, features) with a token for each of the "
                f"{self.patches} patches, got {shape}."
            )
        others = [value for value in (*args, *kwargs.values()) if value is not states]
        if any(states.shape[1] in value.shape or self.patches in value.shape for value in _tensors(others)):
            raise ValueError(
                "token_keep needs blocks that are told nothing about each token but its hidden state, got a tensor "
                "(a mask, or rotary position embeddings) whose shape depends on the number of tokens. Leave it out."
            )
        fewer = drop_patches(states, states.shape[1] - self.patches, self.keep)
        if args and args[0] is states:
            return (fewer, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fewer}


def drop_patches(states: Tensor, prefix: int, keep: float) -> Tensor:
    """The first tokens of each sample, and some of the others, in their order, each sample its own.

    Args:
        states: Hidden states, (batch, prefix + patches, features).
        prefix: Number of tokens that always stay.
        keep: Share of the others that stays, of which at least one does.

    Returns:
        (batch, prefix + patches_left(patches, keep), features).

    Example:
        >>> drop_patches(torch.randn(2, 1 + 8, 4), prefix=1, keep=0.5).shape
        torch.Size([2, 5, 4])
    """
    batch, tokens, features = states.shape
    patches = tokens - prefix
    left = patches_left(patches, keep)
    order = torch.rand(batch, patches, device=states.device).topk(left).indices.sort(1).values + prefix
    first = torch.arange(prefix, device=states.device).expand(batch, prefix)
    index = torch.cat([first, order], 1)
    return states.gather(1, index.unsqueeze(2).expand(-1, -1, features))


def patches_left(patches: int, keep: float) -> int:
    """Number of an image's patches that stay.

    Example:
        >>> patches_left(16, 0.4), patches_left(3, 0.1)
        (6, 1)
    """
    return max(1, round(keep * patches))


def _tensors(values: list[Any]) -> list[Tensor]:
    nested = [item for value in values if isinstance(value, (tuple, list)) for item in value]
    return [value for value in (*values, *nested) if isinstance(value, Tensor)]


def token_places(model: nn.Module) -> tuple[str, str]:
    """Names of the patch embedding and of the first block of a vision transformer.

    Raises:
        ValueError: If the model is none whose blocks all work on one row of patch tokens.
    """
    structure = Structure(model)
    patching = [(name, module) for name, module in model.named_modules() if is_patch_embedding(module)]
    if len(patching) != 1:
        raise ValueError(
            "token_keep is for vision transformers with one patch embedding, a convolution whose stride is its size; "
            f"{type(model).__name__} has {len(patching)}."
        )
    name, lists = patching[0][0], [block.rpartition(".")[0] for block in structure.blocks]
    if not lists:
        raise ValueError(f"token_keep needs transformer blocks, got {type(model).__name__} without any.")
    nearest = max(lists, key=lambda blocks: _common(blocks, name))  # of several towers, the one that sees images
    near = {blocks for blocks in lists if _common(blocks, name) == _common(nearest, name)}
    staged = len(near) > 1 or structure.stages.keys() != structure.blocks.keys()
    relative = [part for part, _ in model.get_submodule(nearest).named_parameters() if "relative" in part]
    if staged or relative:
        reason = "it has stages of several sizes" if staged else f"{nearest}.{relative[0]} is made for all tokens"
        raise ValueError(
            f"token_keep needs blocks that work on any number of tokens; {type(model).__name__}: {reason}."
        )
    return name, next(block for block in structure.blocks if block.rpartition(".")[0] == nearest)


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module cuts an image into patches that do not overlap."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and module.kernel_size != (1, 1)


def _common(first: str, second: str) -> int:
    """Number of leading parts that two names share."""
    count = 0
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def drop_tokens(model: nn.Module, keep: float, places: tuple[str, str]) -> None:
    """Have a model drop patches while it trains; in the place of what it dropped before.

    Args:
        model: The model, with adapters or without.
        keep: Share of the patches that stay, in (0, 1).
        places: What :func:`token_places` said of the model.
    """
    keep_tokens(model)
    dropping = TokenDropping(keep)
    convolution, block = map(model.get_submodule, places)
    convolution.register_forward_hook(dropping.count)
    block.register_forward_pre_hook(dropping.drop, with_kwargs=True)


def keep_tokens(model: nn.Module) -> None:
    """Undo :func:`drop_tokens`; nothing happens where it is not in use."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), TokenDropping):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
