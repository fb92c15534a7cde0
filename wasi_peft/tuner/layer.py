"""The tuner layer: a form for every adapter in place of a dense weight."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..forms.compressed import Compressed
from ..forms.compressing import base_beside, compressed, own_factors
from ..forms.dense import (
    FactoredWeight,
    ParkedLinear,
    dense_bias,
    dense_weight,
    empty_like_weight,
    is_quantized,
    weight_shape,
)
from ..forms.factored import FactoredLinear
from ..forms.products import ProductChoice
from ..forms.residual import RESIDUALS, ExactResidual, Residual, ResidualLinear
from ..forms.shards import is_distributed, write_through
from ..memory.meeting import Meeting
from ..memory.watching import OutOfSight
from ..updates.base import InitialFactors, ProductGradientSink, Update
from .config import WasiConfig
from .inputs import InputCompression, SharedInputs
from .meeting import MetFactor
from .steps import check_convergence, watch
from .vectors import AdapterVectors

RELEASED = (
    "The dense weights were released when the WASI adapter was injected, so {action} is not possible. "
    "Create the adapter with WasiConfig(base_weight='keep') or 'cpu', or reload the base model."
)
BASE = "__base__"  # PEFT's name for the base model in a mixed batch


class WasiLayer(BaseTunerLayer):
    """Mixin with the forms and everything PEFT needs of a layer. Exactly one adapter is active at a time.

    Attributes:
        wasi_form: What each adapter stores.
        wasi_update: What of it trains, and how.
        wasi_input: How each adapter compresses the layer's input.
        residual: The frozen weight that the factors of adapters are beside; None where they replace it.
        inputs: What the layers of the model share of their inputs.
        vectors: The vectors of the model that train with each adapter.
        experts: How many weights it stands for, each (out_features, in_features).
        tells_divergence: Whether this layer raises an error when a step leaves NaN or Inf in it; one of a model does.
    """

    adapter_layer_names: tuple[str, ...] = ("wasi_form",)
    other_param_names: tuple[str, ...] = ("wasi_update", "wasi_input")
    experts = 1

    def __init__(
        self, base_layer: nn.Module, inputs: SharedInputs | None = None, vectors: AdapterVectors | None = None
    ) -> None:
        self._modules["base_layer"] = base_layer
        self.out_features, self.in_features = weight_shape(base_layer)
        self.dense_class: type[nn.Module] = type(base_layer)
        self._like = empty_like_weight(base_layer)  # has the device and dtype of the dense layer
        self.wasi_form = nn.ModuleDict()
        self.wasi_update: dict[str, Update] = {}
        self.wasi_input: dict[str, InputCompression] = {}
        self.inputs = SharedInputs() if inputs is None else inputs
        self.vectors = AdapterVectors() if vectors is None else vectors
        self.vectors.model_dtype.add(self._like.dtype)
        self.frozen_biases: set[str] = set()  # adapters whose bias does not train
        self.tells_divergence = False
        self.merged_adapters: list[str] = []
        self.weight_scale = 1.0  # what the model has multiplied the weight by (RWKV)
        self._disable_adapters = False
        self._unmerged_base: list[nn.Module] = []
        self._sinks: dict[str, weakref.ref[ProductGradientSink]] = {}
        self._awaiting: set[str] = set()  # adapters whose factors have not been loaded yet
        self._answers_before = True  # whether the dense layer answers until then
        self._loading_group: dict[str, WasiLayer] = {}  # all layers of an adapter that is being loaded, by name
        self._release_to: str | None = None
        self._products: ProductChoice | None = None  # of a residual to come
        self._starts_fresh: set[str] = set()  # adapters whose first factors had met no data
        self._fresh: set[str] = set()  # adapters whose factors have met no data yet
        self._seen: dict[str, Any] = {}  # of those, what a first batch that came in parts says, until the next call
        self._met: dict[str, MetFactor] = {}  # of those, what the first batch made of factors that may be in shards

    # ---------------------------------------------------------------- what is in the layer's place

    @property
    def base_layer(self) -> Any:
        """The dense layer where there is one: kept, parked, or merged; else the form that took its place."""
        dense = self._modules.get("base_layer")
        return self.form if dense is None else dense

    @base_layer.setter
    def base_layer(self, layer: nn.Module) -> None:
        self._modules["base_layer"] = layer

    @property
    def original(self) -> Any:
        """The dense layer of before the injection: in place, parked, or below a merged one; None if released."""
        if self.merged_adapters:
            return self._unmerged_base[0] if self._unmerged_base else None
        return self._modules.get("base_layer")

    @property
    def residual(self) -> Residual | None:
        """The frozen weight beside the factors of adapters; None where no adapter's are beside one."""
        for form in self._forms.values():
            if isinstance(form, ResidualLinear):
                return form.residual
        return None

    @property
    def base_factors(self) -> FactoredLinear | None:
        """What adapters of factors share on a layer of a compressed model that is stored as such (`own_factors`)."""
        return own_factors(self.original)

    def original_weight(self) -> tuple[Tensor, Tensor | None]:
        """Weight, (out, in), and bias of before the injection, where they are still there; rounded, if they were."""
        original = self.original
        if isinstance(original, Residual):
            return original.dense_weight(), dense_bias(original)
        return dense_weight(original), dense_bias(original)

    @property
    def base_is_released(self) -> bool:
        """Whether the original dense weight no longer exists."""
        return self.original is None

    @property
    def active_name(self) -> str | None:
        """Name of the active adapter, None where this layer has none."""
        active, forms = self._active_adapter, self._forms
        for name in (active,) if isinstance(active, str) else active:
            if name in forms:
                return name
        return None

    @property
    def _forms(self) -> dict[str, nn.Module | None]:
        """By adapter; asked for in every forward pass, where the attribute would take ten times as long."""
        forms: Any = self._modules["wasi_form"]
        return forms._modules

    @property
    def form(self) -> FactoredLinear:
        """The active adapter's form."""
        name = self.active_name
        return self.form_of(next(iter(self.wasi_form)) if name is None else name)

    def form_of(self, adapter_name: str) -> FactoredLinear:
        """What an adapter stores."""
        form = self._forms[adapter_name]
        assert isinstance(form, FactoredLinear)
        return form

    @property
    def update(self) -> Update:
        """What of the active adapter trains."""
        assert self.active_name is not None
        return self.wasi_update[self.active_name]

    @property
    def needs_whole_batches(self) -> bool:
        """Whether the active adapter keeps a compressed input for backward, whose bases belong to whole batches."""
        name = self.active_name
        return name is not None and self.wasi_input[name].rule is not None

    @property
    def _uses_base(self) -> bool:
        """Whether the base layer answers: the adapter is merged into it, disabled, not on this layer, not loaded."""
        if self._disable_adapters or self.merged_adapters or self.active_name is None:
            return True
        if self._awaiting:
            self._settle()  # not every loader tells when factors have arrived: transformers' own does not
            return self._answers_before and self.active_name in self._awaiting and "base_layer" in self._modules
        return False

    @property
    def weight(self) -> Tensor | FactoredWeight:
        """What the layer multiplies by: a stand-in for the form's weight, or the base layer's where that is in use."""
        weight: Tensor | FactoredWeight = (self.base_layer if self._uses_base else self.form).weight
        if isinstance(weight, Tensor) and self.weight_scale == 1:
            return weight
        dtype: torch.dtype = self._like.dtype  # that of the model: factors for training may be in a higher one

        def dense() -> Tensor:
            value = weight.multiplied_out() if isinstance(weight, FactoredWeight) else weight
            return value.to(dtype) if self.weight_scale == 1 else value.to(dtype) * self.weight_scale

        out, inner = weight.shape
        return FactoredWeight((out, inner), dtype, weight.device, dense, self._rescale)

    def _rescale(self, factor: float) -> None:
        """Multiply the weight of every adapter, and of the base, by a number; what is stored and saved stays."""
        self.weight_scale *= factor

    @property
    def bias(self) -> Tensor | None:
        """Bias of the active adapter, or of the base layer where that is in use, in the dtype of the model."""
        bias: Tensor | None = (self.base_layer if self._uses_base else self.form).bias
        return None if bias is None else bias.to(self._like.dtype)

    # ---------------------------------------------------------------- adapters

    def update_layer(
        self,
        adapter_name: str,
        config: WasiConfig,
        name: str,
        rank: int,
        initial: InitialFactors | FactoredLinear | None,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            name: Full name of this module in the base model, by which the configuration knows it.
            rank: K.
            initial: Factors to start from, or a form that is taken over. None leaves the form to be loaded: until then
                the dense layer answers.
        """
        update, like, products = config.update_of(name), self._like, ProductChoice(config.residual_product)
        form: FactoredLinear
        if isinstance(initial, FactoredLinear):
            form = initial
        elif initial is None:
            form = self._new_form(update, rank, like, products)
        else:
            form = self._form_of(update, initial, rank, products)
        if initial is None and config.awaits_loading:
            for _, tensor in form.tensors():
                if tensor.is_floating_point():  # codes have no NaN, but their scales do
                    tensor.data.fill_(torch.nan)
            self._awaiting.add(adapter_name)
            self._answers_before = not config.names_fitted
        fresh = isinstance(initial, InitialFactors) and initial.residual is not None and not initial.met_data
        for known in (self._starts_fresh, self._fresh):
            (known.add if fresh else known.discard)(adapter_name)
        (self.frozen_biases.add if config.bias == "none" else self.frozen_biases.discard)(adapter_name)
        self._sinks.pop(adapter_name, None)
        self.wasi_update[adapter_name] = update
        self.wasi_input[adapter_name] = InputCompression(config.compression_rule(name), config.activation_interval)
        self.wasi_form[adapter_name] = form
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._watch_steps()

    def _form_of(self, update: Update, initial: InitialFactors, rank: int, products: ProductChoice) -> FactoredLinear:
        """The form that an adapter starts with."""
        form = update.form_of(initial, rank, self.dense_class, self._like)
        update.store(form, products)
        return form

    def _new_form(self, update: Update, rank: int, like: Tensor, products: ProductChoice) -> FactoredLinear:
        """A form with random values, on the device and in the dtype of a tensor."""
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if update.residual is not None:
            return ResidualLinear(self.beside(), rank, self._has_bias, **options)
        factors = self.base_factors
        if factors is not None and update.frozen_factors():
            return update.form_on(factors, like)
        options["dense_class"] = self.dense_class
        form = update.new_form(self.in_features, self.out_features, rank, self._has_bias, **options)
        update.store(form, products)
        return form

    def new_form(self, adapter_name: str, rank: int) -> FactoredLinear:
        """A form such as an adapter has, with another rank K and without values, on the meta device."""
        form = self.form_of(adapter_name)
        like = torch.empty(0, dtype=form.dtype, device="meta")
        stored = [form.frozen(part) for part in form.parts if form.frozen(part) is not None]
        products = stored[0].products if stored else ProductChoice()
        return self._new_form(self.wasi_update[adapter_name], rank, like, products)

    def _watch_steps(self) -> None:
        """Ask to be called after an optimizer's steps, where an adapter has anything to do then."""
        for name, update in self.wasi_update.items():
            if self.tells_divergence or update.after_step is not None or self.wasi_input[name].rule is not None:
                return watch(self)

    def tell_divergence(self) -> None:
        """Have this layer raise an error when a step leaves NaN or Inf in it."""
        self.tells_divergence = True
        self._watch_steps()

    def after_step(self, moved: Mapping[int, float], retracted: bool) -> None:
        """What an optimizer's step calls for (:mod:`steps`): one more step for warm bases, a retraction.

        Raises:
            FloatingPointError: If it left NaN or Inf, in a layer that :attr:`tells_divergence`.
        """
        for name in list(self.wasi_form):
            form, update, state = self.form_of(name), self.wasi_update[name], self.wasi_input[name]
            trained = [form.part(part) for part in update.trained]
            if not any(id(part) in moved for part in trained):
                continue
            if self.tells_divergence:
                check_convergence(trained, moved)
            state.age += 1
            self.inputs.clear()
            if update.after_step is not None and not retracted and any(part.requires_grad for part in trained):
                update.after_step(form)

    def rank(self, adapter_name: str) -> int:
        """Directions that an adapter's weight is made of: K, and those that train beside them."""
        return self.form_of(adapter_name).rank

    def fold(self, adapter_name: str) -> bool:
        """Replace an adapter's form by a smaller one that computes the same, if there is one."""
        self._require_loaded(adapter_name)
        folded = self.wasi_update[adapter_name].fold(self.form_of(adapter_name))
        if folded is None:
            return False
        trained = any(parameter.requires_grad for parameter in self.wasi_form.parameters())
        self.wasi_form[adapter_name], self.wasi_update[adapter_name] = folded
        self.set_adapter(self.active_adapters, inference_mode=not trained)
        return True

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.wasi_form]
        if len(own) > 1:
            raise ValueError(f"WASI factors replace the weight, so only one adapter can be active, got {own}.")
        super().set_adapter(names, inference_mode=inference_mode)
        if not self._disable_adapters:
            self.vectors.activate_one_of(names)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.base_is_released:
            raise ValueError(RELEASED.format(action="disabling the adapter"))
        super().enable_adapters(enabled)
        self.vectors.activate_one_of(self.active_adapters if enabled else [])

    def delete_adapter(self, adapter_name: str) -> None:
        if self.base_is_released and set(self.wasi_form) == {adapter_name}:
            raise ValueError(RELEASED.format(action=f"deleting the only adapter ({adapter_name!r})"))
        self.vectors.remove(adapter_name)
        super().delete_adapter(adapter_name)
        self.forget_adapter(adapter_name)

    def forget_adapter(self, adapter_name: str) -> None:
        """Drop what is known of an adapter beside its form."""
        for known in (self._awaiting, self._starts_fresh, self._fresh, self.frozen_biases):
            known.discard(adapter_name)
        for table in (self.wasi_update, self.wasi_input, self._sinks, self._met, self._seen):
            table.pop(adapter_name, None)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.wasi_form if names is None else names:
            if name not in self.wasi_form:
                continue
            form = self.form_of(name)
            trained = {form.prefix + part for part in self.wasi_update[name].trained}
            for part, parameter in form.named_parameters():
                if name in self.frozen_biases if part == "bias" else part not in trained:
                    parameter.requires_grad_(False)

    # ---------------------------------------------------------------- the dense weight

    def beside(self) -> Residual:
        """What factors of a new adapter are beside: the residual that there is, else the dense weight as it is."""
        base = self._modules["base_layer"]
        if isinstance(base, Residual):
            return base
        return self.residual or base_beside(base)

    @property
    def _has_bias(self) -> bool:
        return self.base_layer.bias is not None

    def keeps_base(self, base_form: str) -> bool:
        """Whether :meth:`release_base` leaves something that answers without an adapter."""
        return base_form != "release" or self.base_factors is not None

    def release_base(self, base_form: str, products: ProductChoice | None = None) -> None:
        """Give up the dense weight as a configuration says; waits until factors that are to be loaded have arrived.

        The factors of a compressed model stay: there is no dense weight to give up.

        Args:
            base_form: `WasiConfig.base_form`.
            products: How layers multiply by a residual in 8 bits.
        """
        dense = self._modules.get("base_layer")
        if base_form in ("keep", ExactResidual.name) or dense is None or isinstance(dense, (ParkedLinear, Residual)):
            return
        if base_form not in RESIDUALS and own_factors(dense) is not None:
            return
        if self._awaiting:
            self._release_to, self._products = base_form, products
            return
        self._release_to = None
        if base_form == "cpu":
            self._modules["base_layer"] = self._parked(dense)
        elif base_form in RESIDUALS:
            stored = [part for part in dense.modules() if isinstance(part, Residual)]
            if isinstance(dense, Compressed) and products is not None:
                for part in stored:
                    part.products = products
            if is_quantized(dense):
                return  # it is in few bits already, which the factors are beside as they are
            residual = self._rounded(dense, base_form, products)
            residual.train(dense.training)
            for form in self._forms.values():
                if isinstance(form, ResidualLinear):
                    form.move_beside(residual)
            self._modules["base_layer"] = residual
        else:
            del self._modules["base_layer"]

    def _parked(self, dense: nn.Module) -> ParkedLinear:
        """The dense weight in main memory."""
        return ParkedLinear(dense)

    def _rounded(self, dense: nn.Module, name: str, products: ProductChoice | None) -> Residual:
        """The dense weight in few bits."""
        return RESIDUALS[name](dense, products)

    # ---------------------------------------------------------------- merging

    def get_dense_layer(self, adapter_name: str, safe_merge: bool = False) -> nn.Module:
        """A dense layer that computes what the adapter computes.

        Raises:
            ValueError: If `safe_merge` and the product has NaN or Inf.
        """
        self._require_loaded(adapter_name)
        dense = self.form_of(adapter_name).to_dense().to(self._like.dtype)
        if safe_merge:
            _check_finite(adapter_name, [dense_weight(dense)])
        return dense

    def get_compressed_layer(self, adapter_name: str, safe_merge: bool = False) -> nn.Module:
        """A compressed layer that computes what the adapter computes; a dense one where that is not larger.

        Raises:
            ValueError: If `safe_merge` and the factors have NaN or Inf.
        """
        self._require_loaded(adapter_name)
        form = self.form_of(adapter_name)
        if safe_merge:
            _check_finite(adapter_name, form.parameters())
        return compressed(form, self._like.dtype) or self.get_dense_layer(adapter_name, safe_merge)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, dense: bool | None = None
    ) -> None:
        """Put the adapter into the base layer; the factors stay, for :meth:`unmerge`.

        Args:
            safe_merge: Refuse NaN and Inf.
            adapter_names: One adapter, by default the active one.
            dense: Whether the factors are multiplied out into a dense layer; by default unless the base is compressed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.wasi_form]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"WASI factors replace the weight, so only one adapter can be merged at a time, got {names} with "
                f"{self.merged_adapters} merged already."
            )
        if dense is None:
            dense = not isinstance(self._modules.get("base_layer"), Compressed)
        merged = (self.get_dense_layer if dense else self.get_compressed_layer)(names[0], safe_merge)
        self._unmerged_base = [self._modules["base_layer"]] if "base_layer" in self._modules else []
        self._modules["base_layer"] = merged
        self.merged_adapters.append(names[0])
        self.vectors.activate_one_of(names)  # which may not be those of the active adapter

    def unmerge(self) -> None:
        """Undo :meth:`merge` exactly: the base layer of before comes back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._take_apart()
        self.vectors.activate_one_of([] if self._disable_adapters else self.active_adapters)

    def _take_apart(self) -> None:
        """What :meth:`unmerge` does to this layer alone."""
        self.merged_adapters.clear()
        if self._unmerged_base:
            self._modules["base_layer"] = self._unmerged_base.pop()  # in its place: a state dict has an order
        else:
            del self._modules["base_layer"]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The dense layer that takes this layer's place: merged, or the original one where it was kept."""
        layer = self._unloaded(merge, safe_merge, adapter_names)
        if self.weight_scale != 1:
            with torch.no_grad():
                layer.weight.mul_(self.weight_scale)  # type: ignore[operator]
        return layer

    def _unloaded(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        if merge:
            if not self.merged or set(adapter_names or self.merged_adapters) != set(self.merged_adapters):
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)  # which refuses a second one
            if self.merged:
                return self.base_layer
        if self.merged:
            self._take_apart()
        if self.base_is_released:
            raise ValueError(RELEASED.format(action="unloading without merging"))
        base = self.base_layer
        if isinstance(base, ParkedLinear):
            return base.restore(self._like.device, self._like.dtype).train(base.training)
        return self._unrounded(base).train(base.training) if isinstance(base, Residual) else base

    def _unrounded(self, residual: Residual) -> nn.Module:
        """The dense layer that a residual stands for."""
        return residual.to_dense()

    # ---------------------------------------------------------------- loading

    def await_loading(self, group: dict[str, WasiLayer], name: str) -> None:
        """Join the layers whose factors are loaded together: none gives up its dense weight before all have them."""
        group[name] = self
        self._loading_group = group

    def _settle(self) -> None:
        """Check whether awaited factors have arrived; once all layers have theirs, the dense weights may go."""
        for name in list(self._awaiting):
            tensors = [tensor for _, tensor in self.form_of(name).tensors()]
            if not any(tensor.is_meta for tensor in tensors) and all(
                bool(tensor.isfinite().all()) for tensor in tensors
            ):
                self._awaiting.discard(name)
                self._freeze_non_trainable_peft_weights(name)  # a loader may have replaced the parameters
                if self._like.is_meta:  # of a dense weight that was never there
                    self._like = self._like.new_empty(0, device=tensors[0].device)
        group = self._loading_group
        if self._awaiting or any(layer._awaiting for layer in group.values()):
            return
        layers = list(group.values())
        group.clear()
        for layer in layers:
            layer._loading_group = {}
            if layer._release_to is not None:
                layer.release_base(layer._release_to, layer._products)

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
                "adapter has `ranks`: load the adapter with PeftModel.from_pretrained(model, path), or set "
                "ranks=None to compute new factors."
            )

    # ---------------------------------------------------------------- the product's gradient

    def record_product_gradient(self, sink: ProductGradientSink) -> None:
        """Have backward hand the active adapter's product gradient to `sink`, for as long as `sink` lives."""
        assert self.active_name is not None
        self._sinks[self.active_name] = weakref.ref(sink)

    @property
    def fresh_adapters(self) -> frozenset[str]:
        """Adapters with factors that have met no data; a batch in training mode gives them their coordinates."""
        return frozenset(self._fresh)

    def product_gradient_sink(self, adapter_name: str) -> ProductGradientSink | None:
        """What :meth:`record_product_gradient` was given last, while it lives."""
        reference = self._sinks.get(adapter_name) if self._sinks else None
        return None if reference is None else reference()


class Linear(nn.Module, WasiLayer):
    """`y = (x R^T) L^T + b`, or another form of a weight, in place of an `nn.Linear` or a transformers `Conv1D`."""

    _z3_leaf = True  # DeepSpeed's ZeRO-3 gathers what is in it at once: it calls no module that holds the factors
    meeting: Meeting | None = None  # where it adds what it sees of a first batch that comes in parts

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: WasiConfig,
        name: str,
        rank: int,
        initial: InitialFactors | FactoredLinear | None,
        inputs: SharedInputs | None = None,
        vectors: AdapterVectors | None = None,
    ) -> None:
        super().__init__()
        WasiLayer.__init__(self, base_layer, inputs, vectors)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name, rank, initial)
        self.register_load_state_dict_post_hook(_settle_after_load)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sinks": {}, "_met": {}}  # a copy is stepped by another optimizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_steps()

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        before, self._like = self._like.dtype, fn(self._like)
        if self._like.dtype != before:
            self.vectors.model_dtype.cast(before, self._like.dtype)
        for base in self._unmerged_base:
            base._apply(fn)
        return self

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.weight_scale != 1:
            x = x * self.weight_scale
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if adapter_names is not None and not self._disable_adapters:
            return self._mixed_forward(x, adapter_names)
        name = self.active_name
        if name is None or self._disable_adapters or self.merged_adapters or (self._awaiting and self._uses_base):
            return self.base_layer(x, *args, **kwargs)
        if self._awaiting or self._loading_group:
            self._require_loaded(name)

        if torch.compiler.is_compiling():
            return self._factors_forward(x, name)
        with OutOfSight(self, x):
            return self._factors_forward(x, name)

    def _factors_forward(self, x: Tensor, name: str) -> Tensor:
        form: Any = self._forms[name]
        update = self.wasi_update[name]
        compute_dtype = compute_dtype_of(x, form.dtype)
        trains = self._trains(name)
        if name in self._fresh and trains and self.training and not torch.compiler.is_exporting():
            # without gradients too: a block that runs again in backward meets its input before, for factors stay then
            self._meet(name, x)
        if not torch.is_grad_enabled() or not trains:
            rows = x if x.dtype == compute_dtype else x.to(compute_dtype)
            plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
            if plain or not form.takes_rounded(rows.shape[:-1].numel(), rows.dtype):
                return form.forward(rows)
            return form.forward(rows, self.inputs.round_for(self, x, rows))

        if torch.compiler.is_exporting():
            return form.forward(x.to(compute_dtype))  # ordinary operations, whatever trains
        compiling = torch.compiler.is_compiling()
        rows = x.to(compute_dtype) if compiling else self.inputs.cast(x, compute_dtype)
        state = self.wasi_input[name]
        compressed: Any = None
        if update.reads_input is not None and form.part(update.reads_input).requires_grad:
            if state.rule is not None:
                compressed = self.inputs.compress(x, rows, state, name)
            elif update.residual is not None and form.residual.rounds_inputs and compute_dtype != torch.float64:
                compressed = self.inputs.round(x, rows)
        sink = None if compiling else self.product_gradient_sink(name)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return update.forward(form, rows, compressed, sink)

    @property
    def meets_next_batch(self) -> bool:
        """Whether the next batch in training mode gives fresh factors their coordinates."""
        name = self.active_name
        if name is None or name not in self._fresh or self._disable_adapters:
            return False
        waits = name not in self._seen and name not in self._met
        return waits and self.training and self._trains(name)

    def _trains(self, name: str) -> bool:
        form: Any = self._forms[name]
        return any(form.part(part).requires_grad for part in self.wasi_update[name].trained)

    def meet_again(self, adapter_name: str) -> None:
        """Have the next training batch do what the first one did, for factors that were put in since.

        That is nothing where L is not zero, and where the first factors of the adapter had met data before.
        """
        if adapter_name in self._starts_fresh:
            self._met.pop(adapter_name, None)
            self._seen.pop(adapter_name, None)
            self._fresh.add(adapter_name)

    @torch.compiler.disable
    def _meet(self, name: str, rows: Tensor) -> None:
        met = self._met.get(name)
        if met is not None:
            if not met.restore():
                self._has_met(name)
            return
        sums = self._seen.pop(name, None) if self.meeting is None else None
        if sums is None:
            sums = self.wasi_update[name].input_sums(self.form_of(name), rows.detach().reshape(-1, rows.shape[-1]))
        if sums is None:
            self._has_met(name)
        elif self.meeting is None:
            self._learn(name, sums)
        else:
            self.meeting.add((self, name), sums, functools.partial(self._seen.__setitem__, name))

    def _learn(self, name: str, sums: Tensor) -> None:
        """What the sums over the first batch make of fresh factors."""
        form = self.form_of(name)
        self.wasi_update[name].meet(form, sums)
        if is_distributed() and not write_through(form.R, form.R.detach()):
            self._met[name] = MetFactor(form)
        else:
            self._has_met(name)

    def _has_met(self, name: str) -> None:
        self._met.pop(name, None)
        self._fresh.discard(name)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Every sample by an adapter of its own, without gradients for the factors.

        Raises:
            ValueError: If there is not one name for every sample, or an adapter is merged.
        """
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name an adapter for every sample, got {len(adapter_names)} for {len(x)} samples."
            )
        if self.merged:
            raise ValueError("adapter_names needs adapters that are not merged; call unmerge_adapter() first.")
        y: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            samples = [index for index, other in enumerate(adapter_names) if other == name]
            if name in self.wasi_form:
                self._require_loaded(name)
                form = self.form_of(name)
                rows = x[samples].to(compute_dtype_of(x, form.dtype))
                with torch.autocast(device_type=x.device.type, enabled=False):
                    part = form(rows)
            elif self.base_is_released:
                raise ValueError(RELEASED.format(action=f"{name!r} in adapter_names"))
            else:
                part = self.base_layer(x[samples])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[samples] = part.to(y.dtype)
        assert y is not None
        return y

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "wasi." + super().__repr__()


def compute_dtype_of(x: Tensor, held: torch.dtype) -> torch.dtype:
    """The dtype to compute in, for an input and factors that are held in a dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    # factors are in float32 for the optimizer in a model of 16 bits
    return x.dtype if x.dtype != held and x.dtype.itemsize < held.itemsize else held


def _check_finite(adapter_name: str, tensors: Iterable[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


def _settle_after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, WasiLayer)
    layer._settle()


def wasi_layers(module: nn.Module) -> Iterator[tuple[str, WasiLayer]]:
    """Names and layers of all WASI layers inside a module."""
    for name, layer in module.named_modules():
        if isinstance(layer, WasiLayer):
            yield name, layer
