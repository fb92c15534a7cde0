"""What an injected adapter amounts to: layers, ranks, share of weights kept, layers that cost more than dense."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..forms.compressed import CompressedResidual
from ..forms.compressed_stack import CompressedStackResidual
from ..ranks.plan import rank_range
from ..updates.base import Update
from ..updates.costs import dense_elements
from .layer import WasiLayer, wasi_layers


@dataclass(frozen=True)
class LayerSummary:
    """One layer: full module name, sizes, rank K, update, bytes of an element of the dense weight.

    Attributes:
        frozen: What the factors are beside: a residual, or the form of a compressed layer; None where they replace it.
        frozen_bytes: Bytes of that.
        experts: How many weights of this size it has: packed experts have one each.
    """

    name: str
    out_features: int
    in_features: int
    weight_rank: int
    update: Update
    bytes_per_element: int
    frozen: str | None = None
    frozen_bytes: int = 0
    experts: int = 1

    @property
    def rank(self) -> int:
        """Directions that the weight is made of: K, and those that train beside them."""
        return self.weight_rank + self.update.side_rank_of(self.out_features, self.in_features)

    @property
    def dense_elements(self) -> int:
        """Elements of the dense weight."""
        return self.experts * dense_elements(self.out_features, self.in_features)

    @property
    def stored_elements(self) -> int:
        """Elements of what is stored in its place."""
        return self.experts * self.update.elements(self.out_features, self.in_features, self.weight_rank)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight."""
        return self.dense_elements * self.bytes_per_element

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored in its place."""
        sizes = self.out_features, self.in_features, self.weight_rank
        if self.frozen is None:
            return self.experts * self.update.stored_bytes(*sizes, self.bytes_per_element)
        factors = self.stored_elements - self.dense_elements
        return self.frozen_bytes + factors * self.bytes_per_element

    @property
    def past_break_even(self) -> bool:
        """Whether factors cost more memory and compute than the dense weight that they replace."""
        if self.update.residual is not None:
            return False
        return self.weight_rank > self.update.break_even_rank(self.out_features, self.in_features)


@dataclass(frozen=True)
class WasiSummary:
    """All targeted layers of one adapter. `str()` gives a table, :meth:`headline` one line."""

    adapter_name: str
    layers: tuple[LayerSummary, ...]

    @property
    def kept_share(self) -> float:
        """Bytes of all that is stored over those of the dense weights in whose place it is."""
        return sum(layer.stored_bytes for layer in self.layers) / sum(layer.dense_bytes for layer in self.layers)

    @property
    def past_break_even(self) -> tuple[LayerSummary, ...]:
        """Layers whose factors cost more than the dense weight."""
        return tuple(layer for layer in self.layers if layer.past_break_even)

    def headline(self) -> str:
        """One line for a log."""
        ranks = sorted(layer.rank for layer in self.layers)
        residuals = sorted({layer.frozen or "" for layer in self.layers} - {""})
        kinds = ["exact weights" if kind == "exact" else f"weights in {kind}" for kind in residuals]
        beside = f" beside {' and '.join(kinds)}" if residuals else ""
        text = (
            f"WASI adapter {self.adapter_name!r}: {len(self.layers)} layers, rank {rank_range(ranks)}{beside}, "
            f"{self.kept_share:.1%} of their bytes kept"
        )
        past = len(self.past_break_even)
        return text + (f"; {past} layers are past break-even and cost more than dense" if past else "")

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        wide = 18 if any(layer.experts > 1 for layer in self.layers) else 13
        lines = [f"{'layer':<{width}}  {'out x in':>{wide}}  {'rank':>5}  {'kept':>6}"]
        for layer in self.layers:
            packed = f"{layer.experts} x " if layer.experts > 1 else ""
            shape = f"{packed}{layer.out_features} x {layer.in_features}"
            kept = layer.stored_bytes / layer.dense_bytes
            note = "  costs more than dense" if layer.past_break_even else ""
            lines.append(f"{layer.name:<{width}}  {shape:>{wide}}  {layer.rank:>5}  {kept:>6.1%}{note}")
        return "\n".join([*lines, self.headline()])


def wasi_summary(model: nn.Module, adapter_name: str = "default") -> WasiSummary:
    """Summary of an adapter in a PEFT model, or in a transformers model with a natively added adapter.

    Raises:
        ValueError: If the model has no WASI adapter of that name.
    """
    layers = tuple(
        LayerSummary(
            name.removeprefix("base_model.model."),
            layer.out_features,
            layer.in_features,
            layer.form_of(adapter_name).weight_rank,
            layer.wasi_update[adapter_name],
            layer._like.dtype.itemsize,
            *_frozen(layer),
            layer.experts,
        )
        for name, layer in wasi_layers(model)
        if adapter_name in layer.wasi_form
    )
    if not layers:
        raise ValueError(f"The model has no WASI adapter named {adapter_name!r}.")
    return WasiSummary(adapter_name, layers)


def _frozen(layer: WasiLayer) -> tuple[str | None, int]:
    """What the factors of a layer are beside, and its bytes."""
    residual = layer.residual
    if residual is None:
        return None, 0
    if isinstance(residual, (CompressedResidual, CompressedStackResidual)):
        compressed = residual.layer
        return compressed.form_name, sum(tensor.nbytes for tensor in compressed.state_dict().values())
    sizes = residual.out_features, residual.in_features, layer._like.dtype.itemsize
    return residual.name, residual.stored_bytes(*sizes)
