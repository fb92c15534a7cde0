"""The tuner layer in place of a convolution: a linear one over its patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..forms.convolution import Patches
from .layer import Linear, compute_dtype_of


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
        if self._can_multiply(x, kwargs):
            return self.patches.image(self._multiplied(x))
        return self.patches.image(super().forward(self.patches.rows(x), *args, **kwargs))

    def _can_multiply(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the image can come from a convolution, where rows would hold every entry several times."""
        if not self.patches.overlap or x.dim() != 2 + len(self.patches.kernel_size):
            return False
        if torch.compiler.is_exporting():
            return False  # ordinary operations
        if kwargs.get("adapter_names") is not None or self._uses_base or self._loading_group:
            return False
        return self.update.takes_image and self.update.residual is None

    def _multiplied(self, x: Tensor) -> Tensor:
        """What the form answers by a convolution with R and one of 1 x 1 after it."""
        form = self.form
        dtype = compute_dtype_of(x, form.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False):
            h = self.patches.multiply(x.to(dtype), form.R.to(dtype))
            return self.update.from_image(form, h)

    def get_compressed_layer(self, adapter_name: str, safe_merge: bool = False) -> nn.Module:
        """A dense layer: compressed models hold no convolutions in few bits."""
        return self.get_dense_layer(adapter_name, safe_merge)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The convolution that takes this layer's place: merged, or the original one where it was kept."""
        linear = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.patches.convolution(linear)
