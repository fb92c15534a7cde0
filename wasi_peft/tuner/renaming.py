"""Names of a saved adapter in a model that calls its modules otherwise, as with `key_mapping` of `from_pretrained`.

PEFT maps the keys of the file, but no method learns of that mapping: LoRA finds its layers by the ends of their names.
The full names of `WasiConfig.ranks` are fitted to the model here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from .config import WasiConfig
from .targets import plain_name

logger = logging.getLogger(__name__)


def fitted_names(names: Collection[str], modules: Collection[str]) -> dict[str, str]:
    """New names for those that are of no module: their beginnings are replaced, in one way for all that share one.

    Blocks keep their numbers, and no two names become one. Nothing for names to which no module, or more than one,
    belongs in that way.

    Example:
        >>> modules = ["model.language_model.layers.0.q", "model.visual.layers.0.qkv"]
        >>> fitted_names(["model.layers.0.q"], modules)
        {'model.layers.0.q': 'model.language_model.layers.0.q'}
        >>> fitted_names(["layers.0.q"], ["text.layers.0.q", "image.layers.0.q"])
        {}
    """
    free = set(modules) - set(names)
    missing = [name for name in names if name not in modules]
    fitted: dict[str, str] = {}
    while missing:
        alike = _fitted_alike(missing, free)
        fitted |= alike
        free -= set(alike.values())
        missing = [name for name in missing[1:] if name not in alike]
    return fitted


def _fitted_alike(names: list[str], modules: set[str]) -> dict[str, str]:
    """New names for the first one and all that begin as it does; the longest end that a module has decides."""
    parts = names[0].split(".")
    for count in range(len(parts)):
        end, beginning = ".".join(parts[count:]), "".join(f"{part}." for part in parts[:count])
        others = {module.removesuffix(end) for module in modules if f".{module}".endswith(f".{end}")}
        others = {other for other in others if _numbers(other) == _numbers(beginning)}
        alike = [name for name in names if name.startswith(beginning)]
        fitting = [new for new in others if all(new + name.removeprefix(beginning) in modules for name in alike)]
        if len(fitting) == 1:
            return {name: fitting[0] + name.removeprefix(beginning) for name in alike}
        if others:
            break
    return {}


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def fit_names(model: nn.Module, config: WasiConfig) -> None:
    """Have a configuration of a saved adapter name the layers of this model, where there is one way to do so."""
    if config.ranks is None:
        return
    new = fitted_names(config.ranks, {plain_name(name) for name, _ in model.named_modules()})
    if not new:
        return
    config.ranks = {new.get(name, name): rank for name, rank in config.ranks.items()}
    if isinstance(config.target_modules, set):
        config.target_modules = {new.get(name, name) for name in config.target_modules}
    if isinstance(config.plan, dict):
        layers = {new.get(name, name): layer for name, layer in config.plan["layers"].items()}
        config.plan = {**config.plan, "layers": layers}
    config.names_fitted = True
    logger.info("%d layers of the saved adapter have other names in this model.", len(new))
