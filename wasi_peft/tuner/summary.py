"""What an injected adapter amounts to: layers, ranks, share of weights kept, layers that cost more than dense."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..updates.base import Update
from ..updates.costs import dense_elements
from .layer import wasi_layers


@dataclass(frozen=True)
class LayerSummary:
    """One layer: full module name, sizes, rank K, update, elements dense and stored."""

    name: str
    out_features: int
    in_features: int
    weight_rank: int
    update: Update

    @property
    def rank(self) -> int:
        """Directions that the weight is made of: K, and those that train beside them."""
        return self.weight_rank + self.update.side_rank_of(self.out_features, self.in_features)

    @property
    def dense_elements(self) -> int:
        """Elements of the dense weight."""
        return dense_elements(self.out_features, self.in_features)

    @property
    def factored_elements(self) -> int:
        """Elements that are stored in its place."""
        return self.update.elements(self.out_features, self.in_features, self.weight_rank)

    @property
    def past_break_even(self) -> bool:
        """Whether the factors cost more memory and compute than the dense weight."""
        return self.weight_rank > self.update.break_even_rank(self.out_features, self.in_features)


@dataclass(frozen=True)
class WasiSummary:
    """All targeted layers of one adapter. `str()` gives a table, :meth:`headline` one line."""

    adapter_name: str
    layers: tuple[LayerSummary, ...]

    @property
    def kept_share(self) -> float:
        """Elements of all factors over elements of all dense weights they replace."""
        return sum(layer.factored_elements for layer in self.layers) / sum(x.dense_elements for x in self.layers)

    @property
    def past_break_even(self) -> tuple[LayerSummary, ...]:
        """Layers whose factors cost more than the dense weight."""
        return tuple(layer for layer in self.layers if layer.past_break_even)

    def headline(self) -> str:
        """One line for a log."""
        ranks = sorted(layer.rank for layer in self.layers)
        text = (
            f"WASI adapter {self.adapter_name!r}: {len(self.layers)} layers, rank {ranks[0]} to {ranks[-1]} "
            f"(median {ranks[len(ranks) // 2]}), {self.kept_share:.1%} of their weights kept"
        )
        past = len(self.past_break_even)
        return text + (f"; {past} layers are past break-even and cost more than dense" if past else "")

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'out x in':>13}  {'rank':>5}  {'kept':>6}"]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            kept = layer.factored_elements / layer.dense_elements
            note = "  costs more than dense" if layer.past_break_even else ""
            lines.append(f"{layer.name:<{width}}  {shape:>13}  {layer.rank:>5}  {kept:>6.1%}{note}")
        return "\n".join([*lines, self.headline()])


def wasi_summary(model: nn.Module, adapter_name: str = "default") -> WasiSummary:
    """Summary of an adapter in a PEFT model, or in a transformers model with a natively added adapter.

    Raises:
        ValueError: If the model has no WASI adapter of that name.
    """
    layers = tuple(
        LayerSummary(
            name.removeprefix("base_model.").removeprefix("model."),
            layer.out_features,
            layer.in_features,
            layer.form_of(adapter_name).weight_rank,
            layer.wasi_update[adapter_name],
        )
        for name, layer in wasi_layers(model)
        if adapter_name in layer.wasi_form
    )
    if not layers:
        raise ValueError(f"The model has no WASI adapter named {adapter_name!r}.")
    return WasiSummary(adapter_name, layers)
