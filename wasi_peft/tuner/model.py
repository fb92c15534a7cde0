"""The tuner: injects the layers, decides what trains, translates the adapter's state dict."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..forms.attention import conceal_projections, expose_projections, pack_projections
from ..forms.compressing import base_beside, own_factors
from ..forms.convolution import CONVOLUTIONS, Patches
from ..forms.dense import dense_bias, dense_weight, empty_like_weight
from ..forms.factored import FactoredLinear
from ..forms.products import ProductChoice
from ..forms.stacked import FactoredStack
from ..forms.vocabulary import Vocabulary, check_vocabulary, hold_rounded, restore_vocabulary, rounded_vocabulary
from ..linalg.coordinates import addition_basis
from ..linalg.spectra import factorize_weight, rank_for_threshold
from ..memory.modes import check_memory_mode, enter_memory_mode, leave_memory_mode
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from ..models.rescaling import undo_rescaling
from ..models.tokens import drop_tokens, keep_tokens, token_places
from ..ranks.allocate import allocate_ranks
from ..ranks.spectrum import LayerSpectrum
from ..updates.base import InitialFactors, Update
from .borrowed import MappedFiles, borrowed_bytes, own_remainder
from .config import WasiConfig
from .convolution import Convolution
from .coverage import coverage
from .experts import Experts, stack_energies, stack_factors, stored_factors
from .first_batch import await_first_batch, forget_first_batch
from .heads import FRESH_HEAD, UNMATCHED, check_trained_tokens, fresh_heads, unmatched_names
from .inputs import SharedInputs
from .layer import BASE, RELEASED, Linear, WasiLayer, wasi_layers
from .prepared import PreparedLayer, check_prepared, drop_prepared, prepared_for
from .renaming import fit_names
from .saving import allow_saving, guard_saving
from .state import FORM, check_loadable, shared_vectors, take_ranks, vectors_by_key, with_model_keys
from .summary import WasiSummary, wasi_summary
from .targets import asked_rank, check_targets, log_left_dense, plain_name, resolve_targets, selected_modules
from .undo import Structure
from .vectors import AdapterVectors, vector_places
from .weighted import add_up, check_weighted

logger = logging.getLogger(__name__)

PLAIN_SVD_WARNING = (
    "The initial factors come from a plain truncated SVD of the weights. On pretrained models this usually destroys "
    "what the model knows at any rank that saves something (docs/benchmarks has a measured case). Run "
    "wasi_peft.preprocess_wasi(model, config, dataloader) first, or load an adapter."
)


def rank_for(asked: int | float, energies: torch.Tensor) -> int:
    """K as asked for: a rank (int), or the smallest whose energies reach a threshold (float)."""
    return asked if isinstance(asked, int) else rank_for_threshold(energies, asked)


def initial_rank(rank: int, update_rank: int, shape: Sequence[int]) -> int:
    """Directions that a layer starts with: K, and those of the update as far as the weight, (out, in), has them."""
    return min(rank + update_rank, *shape)


def _is_packed(target: nn.Module) -> bool:
    return isinstance(target, (ExpertStack, Experts))


def _dense_parts(target: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense weight, in Linear layout, and bias of a target, which may be a layer with another adapter."""
    if isinstance(target, WasiLayer):
        return target.original_weight()
    if isinstance(target, ExpertStack):
        return target.matrices(), None
    linear = Patches.linear(target) if isinstance(target, CONVOLUTIONS) else target
    return dense_weight(linear), dense_bias(linear)


def shared_ranks(
    targets: Mapping[str, nn.Module], prepared: Mapping[str, PreparedLayer], config: WasiConfig
) -> dict[str, int]:
    """Ranks of all targets under `weight_share`: those they were prepared at, else allocated from their weights.

    Energies of plain weights are not comparable between layers, so each counts as a share of its layer's total. Packed
    experts, which are not prepared, keep the share among themselves where the other layers were.

    Raises:
        ValueError: If only some of the targets were prepared.
    """
    ranks = {name: layer.rank for name, layer in prepared.items()}
    if prepared:
        stacks = {name: module for name, module in targets.items() if _is_packed(module)}
        missing = sorted(set(targets) - set(prepared) - set(stacks))
        stacks = {name: module for name, module in stacks.items() if name not in prepared}
        if missing:
            raise ValueError(
                f"{missing[0]}: preprocess_wasi did not prepare this layer ({len(missing)} in all), so the share of "
                "all layers is unknown. Run preprocess_wasi again with this configuration; convolutions, which it "
                "never prepares, take a weight_rank."
            )
        targets = stacks
    spectra = [plain_spectrum(name, _dense_parts(module)[0], config.layer_update) for name, module in targets.items()]
    assert config.weight_share is not None
    return {**ranks, **(allocate_ranks(spectra, config.weight_share) if spectra else {})}


def plain_spectrum(name: str, weight: torch.Tensor, update: Update) -> LayerSpectrum:
    """What ranks are allocated by where there are no data: shares of the energies of a weight.

    **Shape**
        - weight: (out, in), or (E, out, in) of packed experts

    Args:
        name: Of the layer.
        weight: Its dense weight.
        update: What is going to train.
    """
    stack = weight if weight.dim() == 3 else weight[None]
    experts, out_features, in_features = stack.shape
    return LayerSpectrum(
        name,
        out_features,
        in_features,
        name,
        tuple(stack_energies(stack).tolist()),
        update=update,
        bytes_per_element=weight.element_size(),
        experts=experts,
    )


class WasiModel(BaseTuner):
    """Weight-activation subspace iteration (arXiv 2510.09160) with weights that really are gone.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`): The model to be adapted.
        config ([`WasiConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`): Create empty adapter weights on meta device.

    Example:
        ```py
        >>> import wasi_peft
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification

        >>> vit_config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTForImageClassification(vit_config)
        >>> model = get_peft_model(model, wasi_peft.WasiConfig(weight_rank=4))
        >>> len(model.wasi_summary().layers)
        6

        ```
    """

    prefix: str = "wasi_"
    tuner_layer_cls = WasiLayer
    after_unloading: ClassVar[
        list[Callable[[nn.Module], Any]]
    ] = []  # what rooms above do with a model without adapters
    target_module_mapping: dict[str, list[str]] = {}

    def wasi_summary(self, adapter_name: str | None = None) -> WasiSummary:
        """Layers, ranks and share of weights kept of an adapter (the active one by default)."""
        return wasi_summary(self.model, adapter_name or self.active_adapters[0])

    # ---------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the target modules, all or none; one log line says what it amounts to.

        Dense weights go last, when everything else is done. Whatever ends the injection before, an interrupt too,
        leaves the model as it was.
        """
        config = self.peft_config[adapter_name]
        if config.resolved_ranks is not None and self._source(config) is None:
            config = self.peft_config[adapter_name] = copy.copy(config)  # those of another model's layers stay
        if adapter_name.startswith(self.prefix) or adapter_name in ("base_layer", BASE):
            raise ValueError(
                f"an adapter's name must not start with {self.prefix!r}, nor be 'base_layer' or {BASE!r}: PEFT could "
                f"not tell its tensors from others; got {adapter_name!r}."
            )
        self._used_plain_svd = False
        # layers whose factors have not been loaded yet, by name
        loading: dict[str, WasiLayer] = self.__dict__.setdefault("_loading_group", {})
        loading_before = dict(loading)
        shared = next((layer for _, layer in wasi_layers(model)), None)
        self._inputs = SharedInputs() if shared is None else shared.inputs
        self._vectors = AdapterVectors() if shared is None else shared.vectors
        undo_rescaling(model)  # what is made of its weights is to be of those that a file holds
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        drops = config.token_keep is not None and shared is None
        places = token_places(model) if drops else None
        borrowed = borrowed_bytes(self._tensors(model))
        self._files = MappedFiles()
        before = Structure(model)
        try:
            expose_experts(model)
            attentions = expose_projections(model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            conceal_experts(model)
            conceal_projections(model, attentions)
            del attentions  # which hold dense weights
            self._add_vectors(model, adapter_name)
            enter_memory_mode(model, *config.how_blocks_run)
            if places is not None:
                drop_tokens(model, config.token_keep or 1.0, places)
            if self._used_plain_svd:
                warnings.warn(PLAIN_SVD_WARNING, UserWarning, stacklevel=2)
            layers = [layer for _, layer in wasi_layers(model)]
            if not any(layer.tells_divergence for layer in layers):
                layers[0].tell_divergence()  # it is watched first, and NaN in one layer is soon in all
            for head in fresh_heads(model, config):
                logger.warning(FRESH_HEAD.format(head=head))
            for name in unmatched_names(model, config):
                logger.warning(UNMATCHED.format(name=name, model=type(model).__name__))
            summary = wasi_summary(model, adapter_name)
            logger.log(logging.WARNING if summary.past_break_even else logging.INFO, summary.headline())
            reach = coverage(model, adapter_name)
            logger.log(logging.WARNING if reach.is_small and self._by_default else logging.INFO, "%s", reach)
            vocabulary: list[tuple[torch.Tensor, Vocabulary]] = []
            if config.vocabulary is not None and self._alone and not config.uses_residuals:
                vocabulary = rounded_vocabulary(model, ProductChoice(config.residual_product))
            self._release(model, config)
        except BaseException:
            before.restore()
            await_first_batch(model)  # of those that are left
            loading.clear()
            loading.update(loading_before)
            self.peft_config.pop(adapter_name, None)  # PEFT does so too, but not after an interrupt
            raise
        guard_saving(model)
        await_first_batch(model)
        del before  # which holds the dense weights
        hold_rounded(model, vocabulary)
        if config.uses_residuals and self._alone:
            self._round(model, config, trained)
        own_remainder(self._tensors(model), borrowed)

    def _tensors(self, model: nn.Module) -> Iterator[torch.Tensor]:
        yield from itertools.chain(model.parameters(), model.buffers(), self._vectors.tensors())

    def _prepare_adapter_config(self, peft_config: WasiConfig, model_config: dict[str, Any]) -> WasiConfig:
        fit_names(self.model, peft_config)
        self._by_default = peft_config.target_modules is None and peft_config.plan is None
        log_left_dense(resolve_targets(self.model, peft_config), peft_config)
        return peft_config

    def _source(self, config: WasiConfig) -> str | None:
        """The adapter, if there is one, whose very configuration a new adapter has: it starts as a copy of it."""
        names = [name for name, other in self.peft_config.items() if other is config]
        return names[0] if len(names) > 1 else None

    def _prepare_model(self, peft_config: WasiConfig, model: nn.Module) -> None:
        """Everything that can be wrong is found here, before the first layer is replaced."""
        copied = self._source(peft_config) is not None
        check_targets(model, peft_config, copied, convolutions=True)
        check_memory_mode(model, *peft_config.how_blocks_run)
        check_trained_tokens(model, peft_config)
        if peft_config.vocabulary is not None:
            names = {plain_name(name) for name, _ in selected_modules(model, peft_config)}
            saved = peft_config.modules_to_save or ()
            check_vocabulary(model, lambda name: name in names or any(f".{name}".endswith(f".{own}") for own in saved))
        if copied:
            return
        if peft_config.ranks is not None:
            peft_config.resolved_ranks = dict(peft_config.ranks)
            return
        peft_config.resolved_ranks = None
        targets = {plain_name(name): module for name, module in selected_modules(model, peft_config)}
        prepared = check_prepared(targets, peft_config)
        stacks = [name for name, module in targets.items() if _is_packed(module)]
        if set(prepared) - set(stacks) and set(stacks) - set(prepared):
            count = len(set(stacks) - set(prepared))
            logger.info("%d packed expert weights start from their weights alone: no data prepared them.", count)
        shared = peft_config.weight_share is not None
        peft_config.resolved_ranks = shared_ranks(targets, prepared, peft_config) if shared else {}

    def _check_new_adapter_config(self, config: WasiConfig) -> None:
        others = [other for other in self.peft_config.values() if other is not config]
        forms = [other.planned_residuals or other.base_form for other in [*others, config]]
        if any(form != forms[0] for form in forms) and any(other.uses_residuals for other in [*others, config]):
            raise ValueError(
                f"All adapters of a model must have the same residual, which is their common base, got {forms}."
            )
        if others and config.residual_product not in (None, others[0].residual_product):
            logger.warning(
                "residual_product=%r has no effect: the model multiplies by its residuals as its first adapter asked "
                "for, %r.",
                config.residual_product,
                others[0].residual_product,
            )
        for field in ("memory_mode", "slice_tokens", "skip_padding", "token_keep", "vocabulary"):
            values = [getattr(other, field) for other in [*others, config]]
            if len(set(values)) > 1:
                raise ValueError(f"All adapters of a model must have the same {field}, got {values}.")
        trained = [(other.train_vectors, other.bias == "all") for other in [*others, config]]
        released = any(layer.base_is_released for _, layer in wasi_layers(self.model))
        if released and len(set(trained)) > 1:
            raise ValueError(
                "The base model's own norms and tokens were given up with its dense weights, so all adapters must "
                f"train the same; got train_vectors and bias='all' as {trained}. Use base_weight='keep' or 'cpu'."
            )

    def _create_and_replace(
        self,
        peft_config: WasiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        name = plain_name(current_key)
        assert peft_config.resolved_ranks is not None  # _prepare_model saw to it
        replaced = target
        if isinstance(target, CONVOLUTIONS):
            target = Patches.linear(target)
        initial: InitialFactors | FactoredLinear | None = None
        source = self._source(peft_config)
        if source is not None and isinstance(target, WasiLayer) and source in target.wasi_form:
            target._require_loaded(source)
            initial = target.form_of(source).copy()
        elif not peft_config.awaits_loading:
            initial, peft_config.resolved_ranks[name] = self._initial_factors(peft_config, target, current_key)
            self._files.forget(target.parameters())  # pages of a checkpoint that were read; they come again when used
        rank = peft_config.resolved_ranks[name]
        if not peft_config.init_weights and not isinstance(initial, FactoredLinear):
            initial = None
        if isinstance(target, WasiLayer):
            layer = target
            layer.update_layer(adapter_name, peft_config, name, rank, initial)
        else:
            options = (adapter_name, peft_config, name, rank, initial, self._inputs, self._vectors)
            if isinstance(target, ExpertStack):
                layer = Experts(target, *options)
            elif replaced is target:
                layer = Linear(target, *options)
            else:
                layer = Convolution(target, Patches.of(replaced), *options)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, replaced)
        if peft_config.awaits_loading and initial is None:
            layer.await_loading(self._loading_group, current_key)

    def _initial_factors(
        self, config: WasiConfig, target: nn.Module, name: str
    ) -> tuple[InitialFactors | FactoredLinear, int]:
        update, base = config.update_of(plain_name(name)), target.original if isinstance(target, WasiLayer) else target
        factors = own_factors(base)
        if factors is not None and update.residual is None:
            if isinstance(factors, FactoredStack):
                return stored_factors(factors), factors.weight_rank
            return update.form_on(factors, empty_like_weight(base)), factors.weight_rank
        prepared = prepared_for(target)
        residual = None
        if update.residual is not None:
            residual = target.beside() if isinstance(target, WasiLayer) else base_beside(target)
        if prepared is not None:
            return replace(prepared.initial, residual=residual), prepared.rank
        weight, bias = _dense_parts(target)
        if weight.dim() == 3:
            self._used_plain_svd |= residual is None
            return stack_factors(weight, asked_rank(name, config), residual, config.init_weights)
        asked = asked_rank(name, config)
        if residual is not None:
            assert isinstance(asked, int)
            rank = min(asked, *weight.shape)
            R = addition_basis(weight, rank) if config.init_weights else weight[:rank]  # which is not used then
            return InitialFactors(weight.new_zeros(len(weight), rank), R, bias, None, residual), rank

        def directions(energies: torch.Tensor) -> int:
            return initial_rank(rank_for(asked, energies), update.side_rank, weight.shape)

        L, R, energies = factorize_weight(weight, directions)
        self._used_plain_svd |= L.shape[1] < min(weight.shape)
        return InitialFactors(L, R, bias), rank_for(asked, energies)

    def _release(self, model: nn.Module, config: WasiConfig) -> None:
        """Give up the dense weights of the layers that are complete, and the factors that were prepared for them."""
        for name, layer in wasi_layers(model):
            if layer.original is not None:
                drop_prepared(layer.original)
            if config.residual_of(plain_name(name)) is None and self._alone:
                layer.release_base(config.base_form)

    @property
    def _alone(self) -> bool:
        """Whether no other adapter may need a layer dense that it does not target."""
        return len(self.peft_config) == 1

    def _round(self, model: nn.Module, config: WasiConfig, trained: set[str]) -> None:
        """Round the dense weights to the residual, layer by layer, so that the peak is the model and one layer.

        The vocabulary, where it is to be rounded, comes last: its table is the largest.

        Whatever interrupts this leaves dense layers again, those that had been rounded with their rounded weights.

        Args:
            model: The model with the layers in it.
            config: Of the only adapter.
            trained: Names of the parameters that trained before the injection.
        """
        products, files = ProductChoice(config.residual_product), self._files
        try:
            for name, layer in wasi_layers(model):
                dense = layer.original
                layer.release_base(config.base_form_of(plain_name(name)), products)
                if dense is not None and layer.original is not dense:
                    files.forget(dense.parameters())
            if config.vocabulary is not None:
                vocabulary = rounded_vocabulary(model, products)
                hold_rounded(model, vocabulary)
                files.forget(weight for weight, _ in vocabulary)
        except BaseException:
            self.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            raise

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return list(super()._get_module_names_tied_with_embedding())
        except NotImplementedError:  # of models that read no tokens and tie other things, such as heads of detectors
            return []

    def _add_vectors(self, model: nn.Module, adapter_name: str) -> None:
        config, source = self.peft_config[adapter_name], self._source(self.peft_config[adapter_name])
        if config.train_vectors or config.bias == "all":
            places = dict(vector_places(model, config.train_vectors, config.bias == "all"))
            keep = all(layer.keeps_base(config.base_form_of(plain_name(name))) for name, layer in wasi_layers(model))
            self._vectors.add(adapter_name, places, keep_base=keep, source=source)
        if not self._disabled:
            self._vectors.activate_one_of(self.active_adapters)
        if adapter_name in self.active_adapters:
            self._vectors.require_grad(adapter_name, not config.inference_mode)

    @property
    def _disabled(self) -> bool:
        return any(layer.disable_adapters for _, layer in wasi_layers(self.model))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Forms are made where they belong, so nothing is moved; a head that is a container has no weight to move."""
        setattr(parent, child_name, new_module)

    # ---------------------------------------------------------------- what trains

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """All that trains is held in float32 in a model of 16 bits, the vectors of the model too."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            self._vectors.hold_in_float32(adapter_name)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        managed = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, (WasiLayer, AuxiliaryTrainingWrapper))
        )
        for name, parameter in model.named_parameters():
            if not name.startswith(managed):
                parameter.requires_grad_(False)
        for _, layer in wasi_layers(model):
            if "base_layer" in layer._modules:
                layer._modules["base_layer"].requires_grad_(False)
            layer._freeze_non_trainable_peft_weights()
        for name in self.active_adapters:
            if name in self.peft_config:
                self._vectors.require_grad(name, not self.peft_config[name].inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, or several that have no layer and no vectors in common.

        Raises:
            ValueError: If two of them have; nothing is changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for key, layer in wasi_layers(self.model):
            own = [name for name in names if name in layer.wasi_form]
            if len(own) > 1:
                raise ValueError(
                    f"{key}: WASI factors replace the weight, so only one adapter can be active, got {own}."
                )
        self._vectors.one_of(names)
        super().set_adapter(adapter_name, inference_mode=inference_mode)  # in which layers activate them
        for name in self.active_adapters:
            self._vectors.require_grad(name, not inference_mode)
        await_first_batch(self.model)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Have adapters train or not, whether they are active or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        for _, layer in wasi_layers(self.model):
            layer._freeze_non_trainable_peft_weights(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._vectors.require_grad(name, requires_grad)

    # ---------------------------------------------------------------- inference

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around every call of the model: adapters by sample, and no call before they are loaded."""
        for layer in list(self._loading_group.values()):
            if layer.active_name is not None and not layer.disable_adapters:
                layer._require_loaded(layer.active_name)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_mixed_batch(adapter_names)
        if (kwargs.get("num_beams") or 1) > 1:
            raise ValueError(f"adapter_names needs num_beams=1, got {kwargs['num_beams']}.")

        def add_names(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "adapter_names": adapter_names}

        handles = [
            layer.register_forward_pre_hook(add_names, with_kwargs=True)
            for layer in self.model.modules()
            if isinstance(layer, (WasiLayer, AuxiliaryTrainingWrapper))
        ]
        active = self._vectors.active
        try:
            if not self._disabled:
                self._vectors.activate_one_of(sorted(set(adapter_names)))
            yield
        finally:
            self._vectors.activate(active)
            for handle in handles:
                handle.remove()

    def _check_mixed_batch(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        stack = next((name for name, layer in wasi_layers(self.model) if isinstance(layer, Experts)), None)
        if stack is not None:
            raise ValueError(f"{stack}: adapter_names cannot tell whose rows packed experts get; call one at a time.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(f"adapter_names must name adapters of the model, got {', '.join(unknown)}.")
        for key, module in self.model.named_modules():
            missing = {*adapter_names, *self.active_adapters} - {BASE} - {*getattr(module, "_adapters", ())}
            if missing and isinstance(module, AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"{key}: adapter_names can mix adapters that all train this module, or all do not; "
                    f"{', '.join(sorted(missing))} has none of its own."
                )
        different = sorted(name for name in set(adapter_names) if self._vectors.names(name))
        if different and len(set(adapter_names)) > 1:
            raise ValueError(
                f"adapter_names cannot mix adapters of which one trains vectors of the model (train_vectors, or "
                f"bias='all'): a batch has one norm. Got {different}."
            )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is a weighted sum of others: factors, biases, vectors, trained tokens, whole modules.

        Args:
            adapters: Names of the adapters, whose factors are L and R, beside the same frozen weights or instead of
                them.
            weights: One for each. Beside a frozen weight they may be any; what replaces a weight can be averaged.
            adapter_name: Name of the new one, which is not made active.
            combination_type: 'cat' for the exact sum, whose rank is that of all together, unless they share R; 'svd'
                for the best approximation of a rank.
            svd_rank: That rank; by default the largest of the adapters' own, layer by layer.

        Raises:
            ValueError: As :func:`weighted.check_weighted`. Nothing has changed then.
        """
        configs = self.peft_config
        check_weighted(self.model, configs, adapters, weights, adapter_name, combination_type, svd_rank)
        config = configs[adapters[0]]
        configs[adapter_name] = config  # the very object: the new adapter starts as a copy of that one
        try:
            self.inject_adapter(self.model, adapter_name)
            ranks = add_up(self.model, adapters, weights, adapter_name, combination_type == "svd", svd_rank)
        except BaseException:
            if adapter_name in configs:
                self.delete_adapter(adapter_name)
            raise
        configs[adapter_name] = copy.copy(config)
        configs[adapter_name].resolved_ranks = {plain_name(name): rank for name, rank in ranks.items()}
        if config.ranks is not None:
            configs[adapter_name].ranks = configs[adapter_name].resolved_ranks

    # ---------------------------------------------------------------- base model

    def _require_base(self, action: str) -> None:
        for name, layer in wasi_layers(self.model):
            if layer.base_is_released:
                raise ValueError(f"{name}: {RELEASED.format(action=action)}")

    def disable_adapter_layers(self) -> None:
        """Switch to the base model's weights; needs `base_weight="keep"` or "cpu"."""
        self._require_base("disabling the adapter")
        self._enable_adapter_layers(enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the last one only where the dense weights were kept."""
        if set(self.peft_config) == {adapter_name}:
            self._require_base(f"deleting the only adapter ({adapter_name!r})")
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for name in self.active_adapters if was_active else ():
            self._vectors.require_grad(name, True)  # as the factors of the one that takes its place

    def unload(self) -> nn.Module:
        """The base model with its original weights; needs `base_weight="keep"` or "cpu"."""
        self._require_base("unloading without merging")
        self._vectors.activate(None)
        return super().unload()

    def _check_names(self, adapter_names: Sequence[str] | None) -> None:
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"adapter_names must name adapters of the model, {sorted(self.peft_config)}, got {', '.join(unknown)}."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put an adapter, by default the active one, into the base layers, its vectors too; see `unmerge_adapter`."""
        self._check_names(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dense: bool | None = None,
    ) -> nn.Module:
        """The base model with an adapter in it, without PEFT.

        Args:
            progressbar: Whether to show one.
            safe_merge: Refuse adapters with NaN or Inf.
            adapter_names: One adapter, by default the active one.
            dense: True multiplies forms out into dense layers, False keeps them ([`compress`] gives a model like
                that); by default layers become what those of the base are.
        """
        self._check_names(adapter_names)
        # all before the first is unloaded, where one may be refused
        layers = [] if dense is None and not safe_merge else [layer for _, layer in wasi_layers(self.model)]
        try:
            for layer in layers:
                if not layer.merged:
                    layer.merge(safe_merge, adapter_names, dense)
        except BaseException:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
            raise
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        conceal_experts(model)
        pack_projections(model)
        allow_saving(model)
        forget_first_batch(model)
        for finish in self.after_unloading:
            finish(model)
        self._vectors.lower()
        for how in {config.how_blocks_run for config in self.peft_config.values()}:
            leave_memory_mode(model, *how)
        keep_tokens(model)
        restore_vocabulary(model)
        return model

    # ---------------------------------------------------------------- state dict

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: WasiConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected = {key: value for key, value in selected.items() if f"{FORM}{adapter_name}." in key}
        active = shared_vectors(model).active == adapter_name
        for key, vector in vectors_by_key(model, adapter_name):
            # those of the active adapter are in the state dict, where a distributed run has gathered them
            selected[plain_name(key)] = state_dict[key] if active and key in state_dict else vector.detach()
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return plain_name(key).replace(f"{FORM}{adapter_name}.", FORM)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: WasiConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped = with_model_keys(model, adapter_name, remapped)
        check_loadable(model, config, adapter_name, remapped)
        take_ranks(model, config, adapter_name, remapped)
        waits = shared_vectors(model).active != adapter_name  # such are not where the model looks for them
        for key, vector in vectors_by_key(model, adapter_name):
            if waits:
                vector.data.copy_(remapped.pop(key))
            else:
                remapped[key] = remapped[key].to(vector.dtype)  # a loader may put it there as it is
        return remapped
