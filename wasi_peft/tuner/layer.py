"""The tuner layer: two thin factors in place of a dense weight, compressed inputs for backward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from ..forms.dense import FactoredWeight, ReleasedLinear, build_dense, dense_bias, dense_weight
from ..linalg.coordinates import basis_form, core_form
from ..linalg.subspaces import retraction
from ..linalg.tucker import Bases, CompressionRule, Tucker, canonical, compress, placeholder
from ..updates.base import InitialFactors
from ..updates.core import core_linear, three_linears
from ..updates.factored import ProductGradientSink, factored_linear
from ..updates.low_rank import joined, lay_side_by_side, low_rank_linear, split_off
from .config import WasiConfig

RELEASED = (
    "The dense weights were released when the WASI adapter was injected, so {action} is not possible. "
    "Create the adapter with WasiConfig(base_weight='keep') or 'cpu', or reload the base model."
)

_live_layers: weakref.WeakSet[WasiLayer] = weakref.WeakSet()


class _SharedInput:
    """What the layers that read one input tensor share: its cast and its compressed form."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.casts: dict[torch.dtype, Tensor] = {}
        self.compressed: dict[tuple[CompressionRule, torch.dtype], Tucker | None] = {}
        # by adapter too: what form a first pass gave out, and whose bases it has; recomputation may come to another
        # reader of the input first
        self.announced: dict[tuple[CompressionRule, torch.dtype, str], tuple[WasiLayer, Tucker | None]] = {}


# Keyed by identity and weakly: an entry lives as long as the input tensor it describes, at most until the next
# optimizer step.
_shared_inputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# L of a layer -> weak reference to the recorder of its product gradient, owned by the optimizer that wants it
_product_sinks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def record_product_gradient(L: Tensor, sink: ProductGradientSink) -> None:
    """Have backward hand the product gradient of the layer with this L to `sink`, for as long as `sink` lives."""
    _product_sinks[L] = weakref.ref(sink)


def product_gradient_sink(L: Tensor) -> ProductGradientSink | None:
    """The live recorder for the layer with this L, if there is one."""
    reference = _product_sinks.get(L) if len(_product_sinks) else None
    return None if reference is None else reference()


def _shared(x: Tensor) -> _SharedInput:
    entry = _shared_inputs.get(x)
    if entry is None or entry.version != x._version:
        entry = _shared_inputs[x] = _SharedInput(x._version)
    return entry


class WasiLayer(BaseTunerLayer):
    """Mixin with the factors and everything PEFT needs of a layer. Exactly one adapter is active at a time."""

    adapter_layer_names: tuple[str, ...] = ("wasi_L", "wasi_R", "wasi_A", "wasi_B", "wasi_M", "wasi_bias")
    other_param_names: tuple[str, ...] = (
        "wasi_update",
        "wasi_rule",
        "wasi_bases",
        "wasi_basis_age",
        "wasi_basis_interval",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        weight = dense_weight(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = weight.shape
        self.wasi_L = nn.ParameterDict()
        self.wasi_R = nn.ParameterDict()
        self.wasi_A = nn.ParameterDict()  # B A trains with update="low_rank"
        self.wasi_B = nn.ParameterDict()
        self.wasi_M = nn.ParameterDict()  # the core of update="core"
        self.wasi_bias = nn.ParameterDict()
        self.wasi_update: dict[str, str] = {}
        self.wasi_rule: dict[str, CompressionRule | None] = {}
        self.wasi_bases: dict[str, Bases] = {}
        self.wasi_basis_age: dict[str, int] = {}  # optimizer steps since the bases last moved
        self.wasi_basis_interval: dict[str, int] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_base: list[nn.Module] = []
        self._awaiting: set[str] = set()  # adapters whose factors have not been loaded yet
        self._loading_group: dict[str, WasiLayer] = {}  # all layers of an adapter that is being loaded, by name
        self._release_to: str | None = None
        self._dense_device, self._dense_dtype = weight.device, weight.dtype
        _live_layers.add(self)

    # ---------------------------------------------------------------- factors

    def update_layer(
        self, adapter_name: str, config: WasiConfig, name: str, rank: int, initial: InitialFactors | None
    ) -> None:
        """Add an adapter: its factors, or empty (NaN) factors of the right shape that are to be loaded.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            name: Full name of this module in the base model, by which the configuration knows it.
            rank: K.
            initial: Factors to start from; None leaves them to be loaded, the layer refuses to run before.
        """
        trained = config.reserved_rank
        if initial is None:
            nan = torch.full((), torch.nan, device=self._dense_device, dtype=self._dense_dtype)
            L, B = (nan.repeat(self.out_features, size) for size in (rank, trained))
            R, A = (nan.repeat(size, self.in_features) for size in (rank, trained))
            M = nan.repeat(rank, rank) if config.has_core else None
            bias = None if self.bias is None else torch.full_like(L[:, 0], torch.nan)
            self._awaiting.add(adapter_name)
        else:
            L, R, B, A = split_off(initial.L, initial.R, rank, trained)
            M = None
            if config.has_core:
                L, M, R = core_form(L, R, initial.moments)
            elif config.keeps_image:
                L, R = basis_form(L, R, initial.moments)
            bias = initial.bias
        self.wasi_L[adapter_name] = self._new_parameter(L)
        self.wasi_R[adapter_name] = self._new_parameter(R)
        if bias is not None:
            self.wasi_bias[adapter_name] = self._new_parameter(bias.clone())
        if trained:
            self.wasi_A[adapter_name] = self._new_parameter(A)
            self.wasi_B[adapter_name] = self._new_parameter(B)
            self._lay_out(adapter_name)
        if M is not None:
            self.wasi_M[adapter_name] = self._new_parameter(M)
        both = ("wasi_L", "wasi_R")
        frozen = {"frozen_basis": ("wasi_R",), "low_rank": both, "core": both}.get(config.resolved_update, ())
        self.frozen_peft_weight_names[adapter_name] = frozen + (("wasi_bias",) if config.bias == "none" else ())
        self.wasi_update[adapter_name] = config.resolved_update
        self.wasi_rule[adapter_name] = config.compression_rule(name)
        self.wasi_bases[adapter_name] = Bases()
        self.wasi_basis_age[adapter_name] = 0
        self.wasi_basis_interval[adapter_name] = config.activation_interval
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self._dense_device, self._dense_dtype).contiguous())

    def release_base(self, mode: str) -> None:
        """Give up the dense weight as `base_weight` says; waits until factors that are to be loaded have arrived."""
        if mode == "keep" or isinstance(self.base_layer, ReleasedLinear):
            return
        if self._awaiting:
            self._release_to = mode
            return
        dense, self._release_to = self.base_layer, None
        parked = None
        if mode == "cpu":
            weight, bias = dense.weight, dense_bias(dense)
            assert isinstance(weight, Tensor)
            parked = (weight.detach().cpu(), None if bias is None else bias.cpu())
        self._modules.pop("base_layer")
        self.base_layer = ReleasedLinear(self, dense, parked)
        # the injection loop still holds the old module: free its weight, not only our reference to it
        dense._parameters["weight"] = None

    def await_loading(self, group: dict[str, WasiLayer], name: str) -> None:
        """Join the layers whose factors are loaded together: none gives up its dense weight before all have them."""
        group[name] = self
        self._loading_group = group

    def _settle(self) -> None:
        """Check whether awaited factors have arrived; once all layers have theirs, the dense weights may go."""
        for name in list(self._awaiting):
            parts = [getattr(self, part)[name] for part in self.adapter_layer_names if name in getattr(self, part)]
            if not any(part.is_meta for part in parts) and all(bool(torch.isfinite(part).all()) for part in parts):
                self._awaiting.discard(name)
                self._freeze_non_trainable_peft_weights(name)  # a loader may have replaced the parameters
                self._lay_out(name)
        group = self._loading_group
        if self._awaiting or any(layer._awaiting for layer in group.values()):
            return
        for layer in list(group.values()):
            layer._loading_group = {}
            if layer._release_to is not None:
                layer.release_base(layer._release_to)

    def _lay_out(self, adapter_name: str) -> None:
        """Make the factors lie in memory as they are multiplied by."""
        if adapter_name in self.wasi_A:
            parts = (part[adapter_name] for part in (self.wasi_L, self.wasi_R, self.wasi_B, self.wasi_A))
            lay_side_by_side(*parts)

    def _lay_out_all(self) -> None:
        for name in self.wasi_A:
            self._lay_out(name)

    def rank(self, adapter_name: str) -> int:
        """Directions that an adapter's weight is made of: K, and those that train with `update="low_rank"`."""
        trained = self.wasi_A[adapter_name].shape[0] if adapter_name in self.wasi_A else 0
        return int(self.wasi_L[adapter_name].shape[1]) + int(trained)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """All directions of an adapter's weight, (out, rank) and (rank, in)."""
        L, R, B, A = self._parts(adapter_name)
        M = self._find("wasi_M", adapter_name)
        return joined(L if M is None else L @ M, R, B, A)

    def fold_core(self, adapter_name: str) -> None:
        """Multiply the core of an adapter into L; its update is "factor" from then on."""
        self._require_loaded(adapter_name)
        M = self.wasi_M.pop(adapter_name)
        L = self.wasi_L[adapter_name]
        L.data = (L.double() @ M.double()).to(L.dtype)
        self.wasi_update[adapter_name] = "factor"

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        L, R = self._find("wasi_L", name), self._find("wasi_R", name)
        assert L is not None and R is not None
        return L, R, self._find("wasi_B", name), self._find("wasi_A", name)

    def _find(self, part: str, name: str) -> nn.Parameter | None:
        """A parameter of an adapter, if it has it; item access of a `ParameterDict` takes ten times as long."""
        parameters = self._modules[part]
        assert parameters is not None
        return parameters._parameters.get(name)

    @property
    def active_name(self) -> str | None:
        """Name of the active adapter, None where this layer has none."""
        names = self.active_adapters
        return names[0] if names and names[0] in self.wasi_L else None

    @property
    def needs_whole_batches(self) -> bool:
        """Whether the active adapter keeps inputs compressed, by bases that belong to whole batches."""
        return self.wasi_rule.get(self.active_name or "") is not None

    @property
    def base_is_released(self) -> bool:
        """Whether the original dense weight no longer exists."""
        base = self._unmerged_base[0] if self._unmerged_base else self.base_layer
        return isinstance(base, ReleasedLinear) and base.parked is None

    def factored_weight(self) -> FactoredWeight:
        """Stand-in for the dense weight of the active adapter, in the layout of the original layer."""
        name = self.active_name
        assert name is not None
        L = self.wasi_L[name]
        transposed = issubclass(self._dense_class(), Conv1D)
        shape = (self.out_features, self.in_features)
        shape = shape[::-1] if transposed else shape
        return FactoredWeight(shape, L.dtype, L.device, lambda: self._multiply_out(name))

    def _dense_class(self) -> type[nn.Module]:
        base = self._unmerged_base[0] if self._unmerged_base else self.base_layer
        return base._dense_class if isinstance(base, ReleasedLinear) else type(base)

    def _multiply_out(self, name: str) -> Tensor:
        outer, inner = self.factors(name)
        weight = outer @ inner
        return weight.T if issubclass(self._dense_class(), Conv1D) else weight

    @property
    def _uses_base(self) -> bool:
        """Whether the base layer answers: the adapter is merged into it, disabled, or not on this layer."""
        return self.disable_adapters or self.merged or self.active_name is None

    @property
    def weight(self) -> Any:
        """What the layer multiplies by: a stand-in for `L R`, or the base layer's weight where that is in use."""
        return self.base_layer.weight if self._uses_base else self.factored_weight()

    @property
    def bias(self) -> Tensor | None:
        """Bias of the active adapter, or of the base layer where that is in use."""
        if self._uses_base:
            return self.base_layer.bias  # type: ignore[return-value]
        return self.factored_bias()

    def factored_bias(self) -> Tensor | None:
        """Bias of the active adapter."""
        name = self.active_name
        return self.wasi_bias[name] if name is not None and name in self.wasi_bias else None

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        name = self.active_name
        if name is None or self.wasi_L[name].is_meta:
            return self._dense_device, self._dense_dtype
        return self.wasi_L[name].device, self.wasi_L[name].dtype

    # ---------------------------------------------------------------- adapters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"WASI factors replace the weight, so only one adapter can be active, got {names}.")
        super().set_adapter(names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.base_is_released:
            raise ValueError(RELEASED.format(action="disabling the adapter"))
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.base_is_released and set(self.wasi_L) == {adapter_name}:
            raise ValueError(RELEASED.format(action=f"deleting the only adapter ({adapter_name!r})"))
        super().delete_adapter(adapter_name)
        self._awaiting.discard(adapter_name)

    # ---------------------------------------------------------------- merging

    def _base_weight(self) -> Tensor:
        """The original dense weight, in Linear layout."""
        if isinstance(self.base_layer, ReleasedLinear):
            assert self.base_layer.parked is not None
            weight = self.base_layer.parked[0]
            return weight.T if issubclass(self._dense_class(), Conv1D) else weight
        return dense_weight(self.base_layer)

    def _base_bias(self) -> Tensor | None:
        """The original bias, None where the dense layer has none."""
        if isinstance(self.base_layer, ReleasedLinear):
            assert self.base_layer.parked is not None
            return self.base_layer.parked[1]
        return dense_bias(self.base_layer)

    def get_dense_layer(self, adapter_name: str, safe_merge: bool = False) -> nn.Module:
        """A dense layer that computes what the adapter computes.

        Raises:
            ValueError: If `safe_merge` and the product has NaN or Inf.
        """
        self._require_loaded(adapter_name)
        with torch.no_grad():
            weight = self._multiply_out(adapter_name).contiguous()
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            bias = self.wasi_bias[adapter_name].detach().clone() if adapter_name in self.wasi_bias else None
        return build_dense(self._dense_class(), weight, bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the factors out into a dense base layer; the factors stay, for :meth:`unmerge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.wasi_L]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"WASI factors replace the weight, so only one adapter can be merged at a time, got {names} with "
                f"{self.merged_adapters} merged already."
            )
        merged = self.get_dense_layer(names[0], safe_merge)
        self._unmerged_base = [self.base_layer]
        self.base_layer = merged
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Undo :meth:`merge` exactly: the base layer of before comes back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.base_layer = self._unmerged_base.pop()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The dense layer that takes this layer's place: merged, or the original one where it was kept."""
        if merge:
            if not self.merged:
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            if self.merged:
                return self.base_layer
        if self.merged:
            self.unmerge()
        if self.base_is_released:
            raise ValueError(RELEASED.format(action="unloading without merging"))
        if isinstance(self.base_layer, ReleasedLinear):
            device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
            self.base_layer = self.base_layer.restore(device, dtype)  # PEFT reads the weight of what it takes out
        return self.base_layer

    def _require_loaded(self, name: str) -> None:
        if not self._awaiting and not self._loading_group:
            return
        group = self._loading_group or {"this layer": self}
        for layer in list(group.values()):
            layer._settle()
        missing = [key for key, layer in group.items() if name in layer._awaiting]
        if missing:
            raise RuntimeError(
                f"{missing[0]}: the factors of the WASI adapter {name!r} were never loaded, or hold NaN or Inf "
                f"({len(missing)} layers in all). A configuration read from a saved "
                "adapter has init_weights=False: load the adapter with PeftModel.from_pretrained(model, path), or set "
                "init_weights=True and ranks=None to compute new factors."
            )


class Linear(nn.Module, WasiLayer):
    """`y = (x R^T) L^T + b` in place of an `nn.Linear` or a transformers `Conv1D`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: WasiConfig,
        name: str,
        rank: int,
        initial: InitialFactors | None,
    ) -> None:
        super().__init__()
        WasiLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name, rank, initial)
        self.register_load_state_dict_post_hook(_settle_after_load)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _live_layers.add(self)  # a copy retracts after its own optimizer's steps
        self._lay_out_all()

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)  # each parameter for itself: `to`, `half`, `cuda`
        self._lay_out_all()
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = self.active_name
        if self._uses_base or name is None:
            return self.base_layer(x, *args, **kwargs)
        if self._awaiting or self._loading_group:
            self._require_loaded(name)

        L, R, B, A = self._parts(name)
        bias = self._find("wasi_bias", name)
        M = self._find("wasi_M", name)
        # those that train
        outer, inner = (M, R) if M is not None else (L, R) if B is None or A is None else (B, A)
        trains = torch.is_grad_enabled() and (outer.requires_grad or inner.requires_grad)
        compute_dtype = L.dtype
        if torch.is_autocast_enabled(x.device.type):
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        if not trains:
            if M is not None:
                return three_linears(x.to(compute_dtype), L, M, R, bias)
            return _two_linears(x.to(compute_dtype), *joined(L, R, B, A, compute_dtype), bias)

        compressed = None
        if torch.compiler.is_compiling():
            rows = x.to(compute_dtype)
        else:
            rows = self._cast(x, compute_dtype)
        if inner.requires_grad and self.wasi_rule[name] is not None:
            compressed = self._compress(x, rows, name)
        with torch.autocast(device_type=x.device.type, enabled=False):
            if M is not None:
                return core_linear(rows, L, M, R, bias)
            if B is not None and A is not None:
                return low_rank_linear(rows, L, R, B, A, bias, compressed)
            tangent = self.wasi_update[name] == "subspace"
            sink = None if torch.compiler.is_compiling() else product_gradient_sink(L)
            return factored_linear(rows, L, R, bias, compressed, tangent, sink)

    @staticmethod
    def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the compute dtype; layers that read the same tensor get the same cast."""
        if x.dtype == dtype:
            return x
        if x.is_leaf and x.requires_grad:
            return x.to(dtype)  # its graph would hold the leaf, so the entry would never go
        casts = _shared(x).casts
        if dtype not in casts:
            casts[dtype] = x.to(dtype)
        return casts[dtype]

    @torch.compiler.disable
    def _compress(self, x: Tensor, rows: Tensor, name: str) -> Tucker | None:
        """The compressed form of the input, shared with the other layers that read the same tensor.

        The basis takes one iteration every `activation_interval` optimizer steps, in the first forward pass that
        trains: a further micro-batch meets the same basis again. In a pass whose saved tensors are thrown away nothing
        is compressed as soon as bases exist; the first step makes them there.
        """
        rule = self.wasi_rule[name]
        assert rule is not None
        seen, key = _shared(x), (rule, rows.dtype)
        if key in seen.compressed:
            return seen.compressed[key]
        owner, _ = seen.announced.get((*key, name), (self, None))
        rows, bases = canonical(rows.detach()), owner.wasi_bases[name]
        if _saved_tensors_are_dropped():
            form = placeholder(rows, rule, bases)
            seen.announced[(*key, name)] = owner, form
            if form is not None:
                return form
        advance = owner.wasi_basis_age[name] >= owner.wasi_basis_interval[name]
        with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
            result = compress(rows, rule, bases, advance)
            if result is None and advance:  # NaN and Inf move no basis, but the form may have been announced
                advance, result = False, compress(rows, rule, bases, False)
        if result is not None:
            owner.wasi_bases[name] = result[1]
            owner.wasi_basis_age[name] = 0 if advance else owner.wasi_basis_age[name]
        seen.compressed[key] = None if result is None else result[0]
        return seen.compressed[key]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "wasi." + super().__repr__()


def _saved_tensors_are_dropped() -> bool:
    """Whether this is the first pass of non-reentrant checkpointing, which looks only at what form saved tensors have.

    Where it also keeps the results of some operations, to replay them in their order, both passes must run the same.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = None if hooks is None else hooks[0]
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return False
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):  # the other one is of the second pass
        return False
    return not any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())


def _two_linears(x: Tensor, outer: Tensor, inner: Tensor, bias: Tensor | None) -> Tensor:
    """`(x inner^T) outer^T + b` in the dtype of x, which the factors have."""
    return F.linear(F.linear(x, inner), outer, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))


def _settle_after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, WasiLayer)
    layer._settle()


def wasi_layers(module: nn.Module) -> Iterator[tuple[str, WasiLayer]]:
    """Names and layers of all WASI layers inside a module."""
    for name, layer in module.named_modules():
        if isinstance(layer, WasiLayer):
            yield name, layer


@torch.no_grad()
def after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Hook that torch runs once after every step of every optimizer: retract the factors that it moved.

    Only layers whose factors are parameters of that optimizer are touched, so gradient accumulation, evaluation and
    recomputation never trigger it, nor does a step that a gradient scaler skipped inside the optimizer. It also counts
    the steps since the activation bases last moved, and forgets what layers shared of inputs that are still alive.
    """
    layers = list(_live_layers)
    found_inf = getattr(optimizer, "found_inf", None)  # set by torch.amp.GradScaler for fused optimizers
    skipped = found_inf is not None and bool(found_inf)
    partial = getattr(optimizer, "steps_in_parts", False)  # an OptimizerInBackward around it says when all are done
    if not layers or skipped or partial:
        return
    _shared_inputs.clear()
    retracts = getattr(optimizer, "retracts", False)
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        for name, L in layer.wasi_L.items():
            R = layer.wasi_R[name]
            inner = layer.wasi_A[name] if name in layer.wasi_A else R
            if id(L) in moved or id(inner) in moved:
                layer.wasi_basis_age[name] += 1
            if id(L) in moved and layer.wasi_update[name] == "subspace" and L.requires_grad and not retracts:
                _retract(L, R)


def _retract(L: Tensor, R: Tensor) -> None:
    """In place; the changes of one layer are gone before those of the next are computed."""
    change_L, change_R = retraction(L, R)
    L.add_(change_L)
    R.add_(change_R)
