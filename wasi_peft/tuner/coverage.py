"""How much of a model's weights an adapter's layers hold, and what stays dense."""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils import ModulesToSaveWrapper
from torch import nn

from .layer import WasiLayer

NAMED = 3  # dense modules that a log line names, the largest ones


@dataclass(frozen=True)
class Coverage:
    """Elements of a model's matrices, tables and filters; vectors do not count, and tied weights count once.

    Attributes:
        covered: Of the dense weights in whose place an adapter's layers are.
        dense: Of what stays as it is, by name of the module that owns it.
        tables: Of that, what embeddings and the output embedding hold, which have no layers to be replaced.
    """

    covered: int
    dense: dict[str, int]
    tables: int

    @property
    def is_small(self) -> bool:
        """Whether more of the layers stays dense than not."""
        return sum(self.dense.values()) - self.tables > self.covered

    def __str__(self) -> str:
        total = self.covered + sum(self.dense.values())
        largest = sorted(self.dense, key=lambda name: -self.dense[name])
        parts = [f"{name or 'the model itself'} ({self.dense[name] / total:.1%})" for name in largest[:NAMED]]
        rest = len(largest) - len(parts)
        return (
            f"{1 - self.covered / total:.1%} of the model's weights stay dense"
            + (": " if parts else "")
            + ", ".join(parts)
            + (f" and {rest} more" if rest > 0 else "")
        )


def coverage(model: nn.Module, adapter_name: str) -> Coverage:
    """What an adapter covers of a model, which has its layers, with or without their dense weights.

    Example:
        >>> from peft import get_peft_model
        >>> from wasi_peft import WasiConfig
        >>> model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
        >>> print(coverage(get_peft_model(model, WasiConfig(target_modules=["0"])).base_model.model, "default"))
        20.0% of the model's weights stay dense: 2 (20.0%)
    """
    covered, tables, dense, seen = 0, 0, dict[str, int](), set[int]()
    inside: tuple[str, ...] = ()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "original_module", head)
    for name, module in model.named_modules():
        if inside and f"{name}.".startswith(inside):
            continue
        if isinstance(module, WasiLayer):
            inside += (f"{name}.",)
            size = module.experts * module.out_features * module.in_features
            if adapter_name in module.wasi_form:
                covered += size
            else:
                dense[name] = size
            continue
        if isinstance(module, ModulesToSaveWrapper):
            inside += (f"{name}.modules_to_save.",)  # copies
        own = [part for part in module.parameters(recurse=False) if part.dim() > 1 and id(part) not in seen]
        seen.update(map(id, own))
        if own:
            name = name.replace(".original_module", "")
            dense[name] = sum(part.numel() for part in own)
            tables += dense[name] if module is head or isinstance(module, nn.Embedding) else 0
    return Coverage(covered, dense, tables)
