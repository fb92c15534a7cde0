"""Which modules of a model a configuration selects, and whether they can be factored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..forms.compressed import CompressedLinear
from ..forms.compressing import own_factors
from ..forms.convolution import CONVOLUTIONS, Patches, unsuited
from ..forms.dense import dense_bias, dense_weight, is_quantized, weight_shape
from ..forms.factored import FactoredLinear
from ..forms.residual import Int4Residual
from ..forms.shards import full_shape
from ..models.experts import ExpertStack
from ..models.structure import Structure
from ..updates import UPDATES
from .borrowed import MappedFiles
from .config import RESIDUAL_RANK, WasiConfig
from .layer import WasiLayer

SMALLEST_SIDE = 8  # rows or columns of a weight, below which factors or few bits save next to nothing

logger = logging.getLogger(__name__)


def plain_name(name: str) -> str:
    """A module's name without what `torch.compile` puts into it: configurations and files know the plain one.

    Example:
        >>> plain_name("_orig_mod.encoder.layer.0.fc1")
        'encoder.layer.0.fc1'
    """
    return name.replace("_orig_mod.", "")


def resolve_targets(model: nn.Module, config: WasiConfig) -> list[str]:
    """Replace the default (None), 'all-linear' or a plan in `config.target_modules` by names of modules.

    Returns:
        Names of the layers that nobody named and that stay dense, because `weight_rank` is more than they have.

    Raises:
        ValueError: If there is nothing to target by default.
    """
    if config.plan is not None:
        config.target_modules = config.planned_names()
        return []
    default = config.target_modules is None
    if default:
        config.target_modules = default_target_names(model, config)
    named = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is named and not default:
        return []
    assert isinstance(config.target_modules, set)
    layers = {plain_name(name): module for name, module in model.named_modules()}
    names = {name for name in config.target_modules if is_plain_linear(layers[plain_name(name)])}
    config.target_modules = names
    if config.ranks is not None or config.weight_rank is None:
        return []
    small = {
        name
        for name in names
        if pattern_rank(name, config) is None and min(layer_shape(layers[plain_name(name)])) < config.weight_rank
    }
    if small == names:
        return []  # a rank that no layer has is refused
    left = sorted(name for name in small if check_target_module_exists(config, name))
    config.target_modules = names - small
    return left


def log_left_dense(names: Sequence[str], config: WasiConfig) -> None:
    """One line for the layers that :func:`resolve_targets` left out."""
    if names:
        logger.warning(
            "%s: stays dense, being smaller than weight_rank=%d (%d layers in all). To have it too, give it a rank of "
            "its own in rank_pattern.",
            names[0],
            config.weight_rank,
            len(names),
        )


def default_target_names(model: nn.Module, config: WasiConfig) -> set[str]:
    """Names of the Linear and Conv1D layers and packed experts in the blocks that are worth it, never those of a head.

    Works without a table of architectures (:mod:`wasi_peft.models.structure`). Left out are layers with fewer than
    :data:`SMALLEST_SIDE` rows or columns, with a weight that is tied to another's, and those that compute anything
    but a linear map, such as routers; packed experts where the update cannot train them, which one log line says.
    Respects `layers_to_transform`, which PEFT would ignore for full names.

    Raises:
        ValueError: If the model has no such layer.
    """
    structure, shared = Structure(model), _shared_weights(model)
    layers = {
        plain_name(name): layer
        for name, layer in structure.layers.items()
        if isinstance(layer, (nn.Linear, Conv1D, ExpertStack, WasiLayer))
        and not structure.is_in_head(name)
        and min(layer_shape(layer)) >= SMALLEST_SIDE
        and (isinstance(layer, (ExpertStack, WasiLayer)) or id(layer.weight) not in shared)
        and is_plain_linear(layer)
        and (config.layers_to_transform is None or _layer_selected(name, config))
    }
    names = set(layers)
    stacks = {name for name, layer in layers.items() if isinstance(layer, ExpertStack)}
    if stacks and not config.layer_update.takes_stacks:
        logger.info("%d packed expert weights stay dense: %s", len(stacks), _no_stack(config))
        names -= stacks
    if config.residual is None:  # of a compressed model, its factors: what is dense there was not to be factored
        names = {name for name, layer in layers.items() if _own_factors(layer) is not None} or names
    if not names and config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} selects no layer of {type(model).__name__} that "
            "could be a target: blocks are counted from 0"
            + (f", in modules called layers_pattern={config.layers_pattern!r}." if config.layers_pattern else ".")
        )
    if not names:
        raise ValueError(
            f"{type(model).__name__} has nothing to target by default: no Linear or Conv1D layers with at least "
            f"{SMALLEST_SIDE} rows and columns were found inside numbered blocks of this model. "
            "Please specify `target_modules` in the WasiConfig."
        )
    return names


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes `x W^T + b` and nothing else; routers and others that extend Linear do not.

    A subclass with a forward pass of its own is asked for two rows; one on the meta device, or of another library's
    format, only as far as that goes.

    Example:
        >>> class Router(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).topk(2)
        >>> is_plain_linear(nn.Linear(8, 8)), is_plain_linear(Router(8, 8))
        (True, False)
    """
    forward = type(layer).forward
    if isinstance(layer, (BaseTunerLayer, CompressedLinear, ExpertStack)) or forward in (
        nn.Linear.forward,
        Conv1D.forward,
    ):
        return True
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return False
    if is_quantized(layer):
        return True
    weight, bias = dense_weight(layer), dense_bias(layer)
    rows = torch.linspace(-1, 1, 2 * weight.shape[1]).reshape(2, -1).to(weight)
    try:
        with torch.no_grad():
            answer = forward(layer, rows)
    except Exception:  # whatever it needs beside its input, it is no linear map of that alone
        return False
    expected = F.linear(rows, weight, bias)
    if not isinstance(answer, torch.Tensor) or answer.shape != expected.shape:
        return False
    return weight.is_meta or bool((answer - expected).abs().max() <= 1e-2 * expected.abs().max())


def _layer_selected(name: str, config: WasiConfig) -> bool:
    """`layers_to_transform` applied to one full name, by PEFT's own matcher with the last part as suffix."""
    suffix_config = WasiConfig(
        target_modules=[name.rpartition(".")[2]],
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(suffix_config, name))


def _no_stack(config: WasiConfig) -> str:
    able = ", ".join(repr(name) for name, update in UPDATES.items() if update.takes_stacks)
    return f"packed experts train with update={able}, got {config.update!r}."


def selected_modules(model: nn.Module, config: WasiConfig) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that the configuration (with `target_modules` resolved) matches."""
    inner_names = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for name, module in model.named_modules():
        if name and not name.startswith(inner_names) and check_target_module_exists(config, name):
            yield name, module


def check_targets(
    model: nn.Module, config: WasiConfig, copied: bool = False, skeleton: bool = False, convolutions: bool = False
) -> None:
    """Check every selected module before anything is changed.

    Args:
        model: The base model.
        config: With `target_modules` resolved.
        copied: Whether the layers start as copies of another adapter's, so that no dense weight is needed.
        skeleton: Whether weights come later, on which :func:`check_weight` is then called.
        convolutions: Whether convolutions may be targets.

    Raises:
        TypeError: If one is neither a Linear nor a Conv1D, nor such a convolution.
        ValueError: If one is tied, on the meta device, offloaded, not finite, has no free rank, or is already adapted
            by another method; if a fresh adapter would need a dense weight that was released; or if a plan or the
            saved ranks are those of another model.
    """
    shared = _shared_weights(model)
    targets = dict(selected_modules(model, config))
    if config.ranks is not None:
        _check_saved_ranks(map(plain_name, targets), config.ranks)
    if config.plan is not None:
        _check_planned_names({plain_name(name) for name in targets}, config)
    files = MappedFiles()
    for name, module in targets.items():
        if isinstance(module, CONVOLUTIONS) and convolutions:
            module = _linear_over_patches(name, module, shared)
        _check_target(name, module, config, shared, copied, skeleton)
        files.forget(module.parameters())
    _check_side_rank(targets, config)
    for name, module in model.named_modules():
        if isinstance(module, WasiLayer) and module.base_is_released and name not in targets:
            raise ValueError(
                f"{name}: its dense weight was released by the first WASI adapter, so a further adapter must target "
                "it too. Create the first adapter with base_weight='keep' to combine adapters with different targets."
            )


def _check_side_rank(targets: Mapping[str, nn.Module], config: WasiConfig) -> None:
    """Refuse directions beside the factors that no layer has; small layers among larger ones train what they have."""
    side_rank, default = config.layer_update.side_rank, type(config.layer_update).from_options(None).side_rank
    largest = max((min(layer_shape(module)) for module in targets.values()), default=side_rank)
    if side_rank > max(largest, default):
        raise ValueError(
            f"update_rank must be at most min(out_features, in_features) of the largest targeted layer, {largest}, "
            f"got {side_rank}."
        )


def _linear_over_patches(name: str, layer: nn.Module, shared: dict[int, list[str]]) -> nn.Module:
    """The linear layer that a convolution is; refuses one that is none, and one whose weight cannot be looked at."""
    reason = unsuited(layer)
    if reason is not None:
        raise ValueError(
            f"{name}: a convolution can be a target with groups=1, dilation=1 and padding_mode='zeros', where it is a "
            f"linear layer over patches; got {reason}. Leave it out with exclude_modules."
        )
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if weight.device.type == "meta" or is_quantized(layer):
        raise ValueError(f"{name}: the weight of a convolution must be in memory, as floating point numbers.")
    _check_not_tied(name, weight, shared)
    return Patches.linear(layer)


def _own_factors(module: nn.Module) -> FactoredLinear | None:
    return module.base_factors if isinstance(module, WasiLayer) else own_factors(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer, dense or with an adapter; of packed experts, of one."""
    if isinstance(module, (WasiLayer, nn.Linear)):
        return module.out_features, module.in_features
    if isinstance(module, CONVOLUTIONS):
        return weight_shape(Patches.linear(module))
    return weight_shape(module)


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that appear under more than one name, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}


def _check_target(
    name: str, module: nn.Module, config: WasiConfig, shared: dict[int, list[str]], copied: bool, skeleton: bool
) -> None:
    if isinstance(module, WasiLayer):
        if not (config.awaits_loading or copied) and module.base_is_released:
            raise ValueError(
                f"{name}: a second fresh WASI adapter needs the dense weight, which was released. "
                "Create the first adapter with base_weight='keep' or 'cpu'."
            )
    elif isinstance(module, BaseTunerLayer):
        raise ValueError(f"{name}: already adapted by {type(module).__module__}; WASI needs the plain dense layer.")
    elif isinstance(module, ExpertStack):
        _check_stack(name, module, config, shared, skeleton)
    elif not isinstance(module, (nn.Linear, Conv1D)):
        raise TypeError(
            f"{name}: target modules must be torch.nn.Linear or transformers Conv1D, got {type(module).__name__}. "
            "Leave it out with exclude_modules, or name the layers in it."
        )
    elif not is_plain_linear(module):
        raise TypeError(
            f"{name}: target modules must compute x W^T + b and nothing else, got {type(module).__name__}, which "
            "answers something else, as routers do. Leave it out with exclude_modules."
        )
    else:
        weight = module.weight
        if weight is None or getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"{name}: its weight is offloaded; load it into memory first.")
        if full_shape(weight) != weight.shape:
            raise ValueError(
                f"{name}: its weight is in shards of DeepSpeed's ZeRO-3. Load the model and add the adapter before "
                "TrainingArguments are made, which have transformers load models in shards from then on."
            )
        if weight.device.type == "meta" and not skeleton:
            return _check_absent(name, module, config)
        if is_quantized(module):
            return _check_rank(name, module, config)
        if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.dim() != 2:  # not float8 either
            raise ValueError(f"{name}: WASI needs a floating point weight matrix, got {weight.dtype}.")
        _check_not_tied(name, weight, shared)
        if not skeleton:
            check_weight(name, weight, config)
    _check_rank(name, module, config)


def _check_not_tied(name: str, weight: torch.Tensor, shared: dict[int, list[str]]) -> None:
    tied = shared.get(id(weight))
    if tied is not None:
        raise ValueError(
            f"{name}: its weight is tied ({', '.join(sorted(tied))}); factoring one would untie them. "
            "Leave it out with exclude_modules, or untie the weights first."
        )


def _check_stack(
    name: str, module: ExpertStack, config: WasiConfig, shared: dict[int, list[str]], skeleton: bool
) -> None:
    if not config.update_of(plain_name(name)).takes_stacks:
        raise ValueError(f"{name}: {_no_stack(config)}")
    _check_not_tied(name, module.weight, shared)
    if module.weight.is_meta and not skeleton:
        return _check_absent(name, module, config)
    if not skeleton and not is_quantized(module):
        check_weight(name, module.weight, config)


def _check_absent(name: str, module: nn.Module, config: WasiConfig) -> None:
    """Refuse a layer without numbers, unless factors from a file are going to take its place."""
    if not config.awaits_loading or config.base_form_of(plain_name(name)) != "release":
        raise ValueError(
            f"{name}: its weight is on the meta device; load it into memory first. Only saved factors that replace "
            "weights, with base_weight='release', need none; a frozen weight that is small to load is a compressed "
            "model's (wasi_peft.compress)."
        )
    _check_rank(name, module, config)


def check_weight(name: str, weight: torch.Tensor, config: WasiConfig) -> None:
    """Check the values of a target's weight.

    Raises:
        ValueError: If it is not finite, or not in the range of what it is to be rounded to.
    """
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"{name}: its weight holds NaN or Inf.")
    if config.residual_of(plain_name(name)) == Int4Residual.name and not bool(
        torch.isfinite(weight.detach().to(torch.float16)).all()
    ):
        raise ValueError(f"{name}: residual='int4' needs a weight in the range of float16, got larger values.")


def _check_rank(name: str, module: nn.Module, config: WasiConfig) -> None:
    """Raise a ValueError where a plan or a fixed rank does not fit a layer."""
    shape = layer_shape(module)
    planned = config.planned_layer(plain_name(name))
    if planned is not None and (planned.out_features, planned.in_features) != shape:
        raise ValueError(
            f"{name}: the plan is for another model: it has {planned.out_features} x {planned.in_features} there, "
            f"this model {shape[0]} x {shape[1]}."
        )
    experts = getattr(module, "experts", 1)
    if planned is not None and planned.experts != experts:
        raise ValueError(
            f"{name}: the plan is for another model: it has {planned.experts} weights there, this model {experts}."
        )
    rank, factors = fixed_rank(name, config), _own_factors(module)
    if config.residual_of(plain_name(name)) is None:
        if factors is not None:
            _check_shared(name, factors, config, rank)
        elif isinstance(module, CompressedLinear) and module.stored_form.bits:
            raise ValueError(
                f"{name}: it is stored as {module.form_name!r}, factors in few bits and what is beside them, to which "
                f"an adapter can only add: use a residual, as WasiConfig() has, got update={config.update!r} without."
            )
    if rank is not None and rank > min(shape):
        if config.awaits_loading:
            raise ValueError(
                f"{name}: the saved adapter has rank {rank}, and this layer is {shape[0]} x {shape[1]}. The adapter "
                "belongs to another model."
            )
        raise ValueError(
            f"{name}: the rank must be at most min(out_features, in_features) = {min(shape)}, got {rank}."
        )


def _check_shared(name: str, factors: FactoredLinear, config: WasiConfig, rank: int | None) -> None:
    """Refuse to give the factors of a compressed model another rank, or other bits."""
    own = factors.weight_rank
    if config.awaits_loading:
        if rank != own and config.update_of(plain_name(name)).frozen_factors():
            raise ValueError(
                f"{name}: the adapter trains on factors of rank {rank}, got a base model with {own}. It belongs to "
                "another compressed model."
            )
        return
    options = {"weight_share": config.weight_share, "frozen_dtype": config.frozen_dtype}
    given = next((option for option, value in options.items() if value is not None), None)
    if given is not None or rank not in (None, own):
        asked = f"a rank of {rank}" if given is None else f"{given}={options[given]!r}"
        raise ValueError(
            f"{name}: it is stored as factors of rank {own}, which an adapter takes as they are, so leave out what "
            f"would change them; got {asked}. model.dequantize() restores the dense layers."
        )


def _check_saved_ranks(targets: Iterable[str], ranks: Mapping[str, int]) -> None:
    different = sorted(set(ranks).symmetric_difference(targets))
    if different:
        raise ValueError(
            f"{different[0]}: the saved adapter and this model do not have the same targeted layers "
            f"({len(different)} differ). The adapter belongs to another model."
        )


def _check_planned_names(targets: set[str], config: WasiConfig) -> None:
    different = sorted(config.planned_names().symmetric_difference(targets))
    if different:
        where = "in this model but not in the plan" if different[0] in targets else "in the plan but not in this model"
        raise ValueError(
            f"{different[0]}: the plan is for another model: this layer is {where} ({len(different)} differ)."
        )


def fixed_rank(name: str, config: WasiConfig) -> int | None:
    """The rank that the configuration fixes for a layer, None where a threshold decides.

    With `weight_share` that is what was allocated, in `config.resolved_ranks`; None before.
    """
    name = plain_name(name)
    if config.ranks is not None:
        return config.ranks.get(name)
    if config.weight_share is not None and config.resolved_ranks is not None:
        return config.resolved_ranks.get(name)
    planned = config.planned_layer(name)
    if planned is not None:
        return planned.weight_rank
    patterned = pattern_rank(name, config)
    return config.weight_rank if patterned is None else patterned


def pattern_rank(name: str, config: WasiConfig) -> int | None:
    """The rank that `rank_pattern` gives a layer, None where no pattern is of it."""
    patterns = config.rank_pattern or {}
    return patterns.get(get_pattern_key(patterns.keys(), plain_name(name)))


def asked_rank(name: str, config: WasiConfig) -> int | float:
    """What the configuration asks of a layer: a rank (int) or a threshold (float).

    Raises:
        ValueError: If `weight_share` is to decide and ranks have not been allocated.
    """
    fixed = fixed_rank(name, config)
    if fixed is None and config.weight_share is not None:
        raise ValueError(f"{name}: weight_share must be allocated over all layers first, got no ranks yet.")
    if fixed is not None:
        return fixed
    if config.residual is not None:
        return RESIDUAL_RANK
    assert config.explained_variance_threshold is not None  # of a configuration without residual
    return float(config.explained_variance_threshold)
