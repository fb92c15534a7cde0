"""The tuner layer in place of a convolution: a linear one over its patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..forms.convolution import Patches
from .layer import Linear


class Convolution(Linear):
    """`y = (x R^T) L^T + b` for every patch x, or another form of a weight, in place of a convolution.

    Forms, adapters, merging and files know the weight as a matrix, (out, in * k * k).

    Args:
        base_layer: The linear layer over patches (:meth:`forms.convolution.Patches.linear`).
        patches: How the convolution goes over its input.
        *args: As for :class:`layer.Linear`.
    """

    def __init__(self, base_layer: nn.Module, patches: Patches, *args: Any) -> None:
        super().__init__(base_layer, *args)
        self.patches = patches

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.patches.image(super().forward(self.patches.rows(x), *args, **kwargs))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The convolution that takes this layer's place: merged, or the original one where it was kept."""
        linear = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.patches.convolution(linear)
