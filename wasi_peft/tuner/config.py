"""Configuration of the WASI tuner."""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft.config import PeftConfig

from ..forms.products import PRODUCTS
from ..forms.residual import RESIDUALS, ExactResidual
from ..forms.vocabulary import VOCABULARIES
from ..linalg.tucker import MODES, CompressionRule
from ..memory.modes import MEMORY_MODES, recomputes
from ..ranks.plan import LayerPlan, WasiPlan, layer_plan
from ..ranks.spectrum import DENSE
from ..updates import DEFAULT_UPDATE, RESIDUAL_UPDATE, UPDATES, Subspace, Update, make_update
from .kinds import check_kinds
from .registration import PEFT_TYPE

BASE_WEIGHTS = ("release", "cpu", "keep")
DEFAULT_RESIDUAL, AUTO = "int8", "auto"
RESIDUAL_RANK = 32  # K beside a residual, where nothing else is asked for
KEPT_ENERGY = 0.95  # of factors, where nothing else is asked for
BIASES = ("none", "all", "wasi_only")
_OF_FACTORS = ("weight_share", "explained_variance_threshold", "plan")  # ask for factors alone
_PLANNED = (  # what a plan decides instead
    "weight_rank",
    "rank_pattern",
    "weight_share",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "activation_ranks",
    "activation_modes",
)


_DECIDED = (*_PLANNED, "target_modules", "residual", "explained_variance_threshold", "activation_threshold", "ranks")


def _check_threshold(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}.")


def check_positive_integer(name: str, value: Any) -> None:
    """Raise a ValueError for a setting that is none; a bool is none either."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_choice(name: str, value: Any, options: tuple[str | None, ...]) -> None:
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


@dataclass
class WasiConfig(PeftConfig):
    """Configuration of a WASI model (arXiv 2510.09160).

    Every targeted Linear becomes one of two forms. By default its weight stays in 8 bits, frozen, and two thin factors
    beside it train, `W = Q + L R`: nothing that the model knows is lost, and no preparation is needed. Where
    `weight_share`, `explained_variance_threshold` or a plan asks for it, two thin factors take its place, `W ~ L R`,
    which is smaller and faster still, and needs [`preprocess_wasi`].

    Args:
        residual (`Optional[str]`, default 'auto'):
            The frozen weight beside the factors: 'int8', one scale an output channel; 'int4', groups of 32; 'exact',
            the dense weight as it is; None for factors alone. 'auto' is 'int8', unless factors alone are asked for, by
            `weight_share`, `explained_variance_threshold`, `plan`, `frozen_dtype` or an update that cannot train
            beside a residual.
        residual_product (`Optional[str]`):
            How products with an int8 weight or factor are computed: 'int8' (rows are rounded on the way), 'restored'
            (it is restored in the dtype of the rows, a tile at a time: exact), 'bfloat16' (the same in that dtype) or,
            for up to 16 rows on a CPU, 'weight_only' (codes are read as they are, rows in bfloat16); by default what
            is fastest on this machine, measured for few and for many rows.
        vocabulary (`Optional[str]`):
            In what a language model's token embedding, and the head, tied to it or not, are held: 'int8', one scale a
            token, frozen; by default as they are. In small language models they are half of all weights. Training and
            evaluation restore some tokens at a time. Not where they train (`modules_to_save`,
            `trainable_token_indices`), nor where the base model stays exact (`residual="exact"`, `base_weight`), nor
            with TRL's trainers, which multiply by the head's weight themselves.
        frozen_dtype (`Optional[str]`):
            For factors: in what those that do not train are stored, R with 'frozen_basis', L and R with 'low_rank' and
            'core': 'int8', codes with one float32 scale a row, or 'bfloat16'; by default what `plan` says, else in the
            dtype of the model. What they are rounded to counts in bytes, so a `weight_share` keeps more directions.
            Not with 'subspace' and 'factor', which train both.
        explained_variance_threshold (`Optional[float]`):
            For factors: share of energy that each layer keeps, in (0, 1], by default 0.95; the rank is the smallest
            one that reaches it. After [`preprocess_wasi`] the energy is what dropping a direction costs the model,
            without it that of the weight. 1 keeps the full rank.
        weight_rank (`Optional[int]`):
            One fixed rank for every layer: K of factors, instead of the threshold, or of those beside a residual, by
            default 32, or all that a smaller layer has.
        rank_pattern (`dict[str, int]`):
            Ranks by layer name or regular expression (matched as in LoRA, against the end of the name); they override
            `weight_rank` and the threshold.
        weight_share (`Optional[float]`):
            Budget for all targeted layers together instead of the threshold: bytes of all factors over those of all
            dense weights, in (0, 1]. Ranks are allocated across layers by kept energy per parameter, from the energies
            of [`preprocess_wasi`], else from those of the weights, each relative to its layer's total, in steps that
            suit matrix products. Not together with `weight_rank` or `rank_pattern`.
        plan (`Optional[Union[WasiPlan, dict, str]]`):
            Form, weight rank and activation ranks of every layer: a [`WasiPlan`], its dict, or the path of its JSON
            file. The plan's layers are the targets, but for those that it leaves dense. Stored as a dict and saved
            with the adapter. Not together with anything else that chooses layers or ranks; the thresholds are not
            used.
        target_modules (`Optional[Union[list[str], str]]`):
            Names or a regular expression of the modules to replace. By default all Linear and Conv1D layers inside the
            transformer blocks of any architecture, never the head. 'all-linear' takes those outside the blocks too.
            Convolutions (groups=1, dilation=1) may be named: they are linear layers over patches.
        exclude_modules (`Optional[Union[list[str], str]]`):
            Names or a regular expression of modules to leave dense.
        modules_to_save (`Optional[list[str]]`):
            Modules that are trained and saved whole, such as a new classifier head.
        trainable_token_indices (`Optional[Union[list[int], dict[str, list[int]]]]`):
            Tokens whose embeddings train, as in LoRA: indices, for the model's input embedding, or by name of the
            embedding. For tokens that were added to the vocabulary. Only their rows are trained and saved; where the
            head is tied to the embedding, it follows.
        ensure_weight_tying (`bool`, default False):
            Raise an error where what `modules_to_save` or `trainable_token_indices` train could not stay tied.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            Indices of the only blocks to transform. Not together with a string in `target_modules`.
        layers_pattern (`Optional[Union[list[str], str]]`):
            Name of the module list that `layers_to_transform` counts, for instance 'layers'.
        bias (`str`, default 'wasi_only'):
            Which biases train: 'none', 'wasi_only' (those of the targeted layers, stored with each adapter) or 'all'.
        train_vectors (`bool`, default True):
            Also train and save what costs next to nothing: norms, layer scales, position and class tokens.
        activation_threshold (`Optional[float]`, default 0.95):
            Share of the input's energy that is kept for the backward pass, in (0, 1]; the rank is chosen on the first
            training batch. None, with `activation_ranks` None too, keeps the exact input. Only with the updates that
            keep inputs: 'low_rank', 'subspace' and 'factor'.
        activation_ranks (`Optional[Union[int, dict[str, int]]]`):
            Fixed ranks instead, by mode ({'feature': 48, 'token': 12}); an integer is the rank of the feature mode.
        activation_modes (`list[str]`, default ['feature']):
            Modes of the input [batch, token, feature] that are compressed. 'feature' is always one of them; 'token'
            pays while every batch has the same number of tokens. 'height' and 'width', which go together, are the
            modes of maps, [batch, height, width, feature]; with 'token' too, whichever keeps less is taken.
        activation_interval (`int`, default 8):
            Optimizer steps from one subspace iteration of the activation bases to the next. 1 is the paper's choice;
            the bases move slowly, and an iteration costs twice as much as the compression itself.
        update (`Optional[str]`):
            What trains; by default what `plan` says, else 'addition' beside a residual and 'frozen_basis' of factors.
            'addition', beside a residual only: L and R, at LoRA's learning rates; backward keeps `R x` and the input
            in 8 bits. 'frozen_basis', in both forms: only L, at LoRA's learning rates or above; R keeps its row space,
            in which [`preprocess_wasi`] with batches whitens what L sees. Backward keeps `R x`, K numbers of each
            token, from which gradients are exact, so inputs need no compression. 'low_rank': the K most important
            directions, L R, stay as they are, and the `update_rank` next ones, B A, train, as in MiLoRA (arXiv
            2406.09044), at LoRA's learning rates. 'core': a K x K matrix M between frozen factors, `W = L M R`, at the
            same rates; backward keeps K numbers of each token here too. [`preprocess_wasi`] with batches whitens both
            sides of M. M counts in `weight_share` and in plans. 'subspace': both factors, by tangent-space gradients
            and, after each optimizer step, a retraction, which together are the paper's subspace iteration to first
            order. 'factor': both factors, by plain gradients.
        update_rank (`Optional[int]`):
            Directions that train with `update="low_rank"`, beside the K that a rank or threshold asks for; by default
            what `plan` says, else 16; in a layer with a smaller side, as many as that. They count in `weight_share`
            and in plans.
        memory_mode (`Optional[str]`):
            How far a training step goes to need little memory; by default what `plan` says, else 'exact'. 'exact': the
            inputs of the targeted layers are compressed, norms and gated products keep only their inputs and, in
            language models, the loss never holds all logits. 'fast': what runs no layer twice on top: what transformer
            blocks keep for backward in 8 bits, the inputs of GELU and SiLU in 4, blocks in slices of the batch.
            'small': everything that lowers the peak: blocks keep only their input, in 8 bits, and run again in
            backward (nothing is compressed then, since layer inputs exist for one block at a time), the same slices,
            the same loss, and MLPs that run some tokens at a time where one sample is longer than a slice. The forward
            pass is exact in every mode.
        slice_tokens (`Optional[int]`):
            Tokens that a transformer block takes at once in training, in slices of whole samples, one at least, and
            its MLP, whose tensors are the largest, half as many: fewer take less memory and, from some hundred down,
            more time. By default as `memory_mode` says: 'exact' takes the whole batch, 'fast' about 3200 (MLPs 1600),
            'small' about 800.
        skip_padding (`bool`, default False):
            Have transformer blocks neither compute nor keep padded tokens in training: samples run in groups of about
            one length, each cut to its longest sample, in every memory mode. For losses that do not depend on padded
            tokens (labels of -100, pooling by the attention mask), of which the gradients stay exact; backward raises
            an error for others.
        token_keep (`Optional[float]`):
            For vision transformers that answer by class: share of an image's patches, in (0, 1], that blocks see while
            the model trains, drawn anew for each image and step; class and register tokens stay. Evaluation sees all.
            None and 1 drop none.
        base_weight (`str`, default 'release'):
            What happens to the dense weight that factors replace: 'release' frees it, 'cpu' parks it in main memory,
            'keep' leaves it in place. `disable_adapter()`, `unload()` and a second fresh adapter need 'cpu' or
            'keep'. A residual is a base of its own: all of them work, with the weight as it was rounded; so do they on
            the factors of a compressed model, which always stay.
        init_weights (`bool`, default True):
            Compute the factors from the dense weights. False gives them random values: the layers then compute
            something else than the dense ones, which is for tests.
        ranks (`Optional[dict[str, int]]`):
            Rank of every targeted layer by full module name, as saved with an adapter. With it, factors are not
            computed but expected from the adapter's file: the layers answer as the dense ones do until they come.
    """

    residual: str | None = field(
        default=AUTO, metadata={"help": "Frozen weight beside the factors: 'int8', 'int4', 'exact', None or 'auto'."}
    )
    residual_product: str | None = field(
        default=None,
        metadata={"help": "How int8 products are computed, by name; None: what is fastest on this machine."},
    )
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "How token embedding and head are held, frozen: 'int8'; None: as they are."},
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata={"help": "How factors that do not train are stored: 'int8', 'bfloat16'; None: as the model."},
    )
    explained_variance_threshold: float | None = field(
        default=None, metadata={"help": "Factors: share of energy that each layer keeps, in (0, 1]; decides its rank."}
    )
    weight_rank: int | None = field(
        default=None, metadata={"help": "One fixed rank for every layer instead of the threshold."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks by layer name or regular expression; override the default."}
    )
    weight_share: float | None = field(
        default=None, metadata={"help": "Budget for all layers together: share of their parameters kept, in (0, 1]."}
    )
    plan: WasiPlan | dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Ranks of every layer: a WasiPlan, its dict, or the path of its JSON file."}
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to replace; by default all Linear/Conv1D of the transformer blocks, not the head."},
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Names or regular expression of modules to leave dense."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, such as a classifier head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train: indices, or indices by name of the embedding."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Refuse to train tied modules so that they would come apart."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the only blocks to transform."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts."}
    )
    bias: Literal["none", "all", "wasi_only"] = field(
        default="wasi_only", metadata={"help": "Which biases train: 'none', 'wasi_only' or 'all'."}
    )
    train_vectors: bool = field(
        default=True, metadata={"help": "Also train norms, layer scales, position and class tokens."}
    )
    activation_threshold: float | None = field(
        default=0.95, metadata={"help": "Share of the input's energy kept for backward; None: the exact input."}
    )
    activation_ranks: int | dict[str, int] | None = field(
        default=None, metadata={"help": "Fixed activation ranks by mode, or an integer for the feature mode."}
    )
    activation_modes: list[str] = field(
        default_factory=lambda: ["feature"],
        metadata={"help": "Modes of the input that are compressed: 'feature', 'token', 'batch', 'height', 'width'."},
    )
    activation_interval: int = field(
        default=8, metadata={"help": "Optimizer steps between two iterations of the activation bases."}
    )
    update: str | None = field(
        default=None,
        metadata={
            "help": "What trains and how: a name in wasi_peft.updates.UPDATES; by default 'addition' beside a "
            "residual, 'frozen_basis' of factors."
        },
    )
    update_rank: int | None = field(
        default=None, metadata={"help": "Rank of what trains with update='low_rank', by default 16."}
    )
    memory_mode: Literal["exact", "fast", "small"] | None = field(
        default=None, metadata={"help": "How far a step goes to need little memory: 'exact', 'fast' or 'small'."}
    )
    slice_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a block takes at once in training; None: as memory_mode says."},
    )
    skip_padding: bool = field(
        default=False, metadata={"help": "Neither compute nor keep padded tokens, on which the loss must not depend."}
    )
    token_keep: float | None = field(
        default=None, metadata={"help": "Vision: share of the patches that blocks see while training, in (0, 1]."}
    )
    base_weight: Literal["release", "cpu", "keep"] = field(
        default="release", metadata={"help": "What happens to the dense weight: 'release', 'cpu' or 'keep'."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Compute the factors from the dense weights; False: random values."}
    )
    ranks: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Rank of every targeted layer of a saved adapter, whose factors are then expected."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # ranks of every layer once injected; no field: a configuration that was used is still a fresh one
        self.resolved_ranks: dict[str, int] | None = None
        self.names_fitted = False  # whether they are of a model with other names than the one that was saved
        from_file = getattr(self, "peft_type", None) is not None  # PEFT names the type of what it reads
        self.peft_type = PEFT_TYPE
        check_kinds(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, (tuple, set, frozenset)):
            self.modules_to_save = list(self.modules_to_save)  # a task type adds to it
        if isinstance(self.plan, (str, os.PathLike)):
            if from_file:
                raise ValueError(
                    "a saved configuration holds its plan as an object, and never the path of another file, which "
                    "would be read; got a string."
                )
            self.plan = WasiPlan.load(self.plan)
        asked_rank = self.update_rank
        if self.plan is not None:
            plan = self.plan if isinstance(self.plan, WasiPlan) else WasiPlan.from_dict(self.plan)
            self.plan = plan.to_dict()
            for name in ("memory_mode", "update", "update_rank"):
                if getattr(self, name) is None:
                    setattr(self, name, getattr(plan, name))
            if self.frozen_dtype is None and self.update == plan.update:
                self.frozen_dtype = plan.frozen_dtype
        if self.memory_mode is None:
            self.memory_mode = "exact"
        self._resolve_residual()
        self._validate()
        self.update_rank = self.layer_update.side_rank or None
        if asked_rank is not None and self.update_rank is None:
            warnings.warn(
                f"update_rank={asked_rank} has no effect: update={self.update!r} trains no directions beside the K of "
                "the factors, which weight_rank chooses.",
                UserWarning,
                stacklevel=3,
            )
        self._validate_budgets()

    def _resolve_residual(self) -> None:
        """Which form the layers have, and what rank where none is asked for."""
        _check_choice("update", self.update, (*UPDATES, None))
        _check_choice("residual", self.residual, (*RESIDUALS, AUTO, None))
        _check_choice("base_weight", self.base_weight, BASE_WEIGHTS)
        takes_residual = self.update is None or UPDATES[self.update].takes_residual
        asks = [name for name in _OF_FACTORS if getattr(self, name) is not None]
        if self.residual == AUTO:
            of_factors = asks or self.frozen_dtype is not None or not takes_residual
            self.residual = None if of_factors else DEFAULT_RESIDUAL
        _check_choice("vocabulary", self.vocabulary, (*VOCABULARIES, None))
        if self.vocabulary is not None and (self.residual == ExactResidual.name or self.base_weight != "release"):
            raise ValueError(
                f"vocabulary={self.vocabulary!r} rounds tables of the base model, which residual={self.residual!r} "
                f"with base_weight={self.base_weight!r} leaves exact."
            )
        if self.vocabulary is not None and self.trainable_token_indices is not None:
            raise ValueError(
                f"vocabulary={self.vocabulary!r} keeps all embeddings frozen, got trainable_token_indices="
                f"{self.trainable_token_indices!r}."
            )
        if self.update is None:
            self.update = DEFAULT_UPDATE if self.residual is None else RESIDUAL_UPDATE
        make_update(self.update, None, self.residual, self.frozen_dtype)  # raises where they do not go together
        if self.residual is None:
            if self.explained_variance_threshold is None:
                self.explained_variance_threshold = KEPT_ENERGY
            return
        if asks:
            if self.plan is not None:
                raise ValueError(f"plan decides the form of every layer; leave residual={self.residual!r} out.")
            raise ValueError(
                f"{asks[0]} chooses ranks of factors alone; leave out residual={self.residual!r}, or choose K "
                f"beside it by weight_rank; got {asks[0]}={getattr(self, asks[0])!r}."
            )
        if self.base_weight != "release":
            raise ValueError(
                f"base_weight is for factors that replace the weight; a residual is the base itself, so leave it out, "
                f"got base_weight={self.base_weight!r} with residual={self.residual!r}."
            )

    @classmethod
    def paper(cls, epsilon: float, **overrides: Any) -> WasiConfig:
        """The method of the paper (arXiv 2510.09160) instead of this package's defaults, with one threshold for all.

        Weights start as their truncated SVD at the smallest rank K with `s_1^2 + ... + s_K^2 >= epsilon * total`, and
        both factors train. Inputs are compressed in all three modes, at ranks that the same threshold gives on the
        first batch, and their bases take one subspace iteration every step. Biases and vectors of the model train too.

        The optimizer that goes with it is :class:`training.subspace_sgd.SubspaceSGD`, SGD on the product and one
        subspace iteration of the weight, as in the paper's recipe: `SubspaceSGD(model, lr=0.05, weight_decay=1e-4,
        max_grad_norm=2.0)`. Do not call [`preprocess_wasi`]: factors that it prepared would be used instead.

        Args:
            epsilon: Share of the energy that weights and inputs keep, in (0, 1]; the paper runs 0.4 to 0.9.
            **overrides: Other fields, or other values for these: `modules_to_save`, `target_modules` and so on.

        Raises:
            ValueError: If epsilon is not in (0, 1], or an override is not valid.

        Example:
            >>> config = WasiConfig.paper(0.8, modules_to_save=["classifier"])
            >>> config.explained_variance_threshold, config.activation_threshold, config.activation_interval
            (0.8, 0.8, 1)
        """
        _check_threshold("epsilon", epsilon)
        fields: dict[str, Any] = {
            "residual": None,
            "explained_variance_threshold": epsilon,
            "update": Subspace.name,
            "activation_threshold": epsilon,
            "activation_modes": list(MODES),
            "activation_interval": 1,
            "memory_mode": "exact",
            "train_vectors": True,
            "bias": "all",
        }
        return cls(**{**fields, **overrides})

    def _validate(self) -> None:
        if self.explained_variance_threshold is not None:
            _check_threshold("explained_variance_threshold", self.explained_variance_threshold)
        _check_choice("residual_product", self.residual_product, (*PRODUCTS, None))
        if self.weight_rank is not None:
            check_positive_integer("weight_rank", self.weight_rank)
        for name in ("rank_pattern", "ranks"):
            for pattern, rank in (getattr(self, name) or {}).items():
                check_positive_integer(f"{name}[{pattern!r}]", rank)
        if self.activation_threshold is not None:
            _check_threshold("activation_threshold", self.activation_threshold)
        check_positive_integer("activation_interval", self.activation_interval)
        if self.token_keep is not None:
            _check_threshold("token_keep", self.token_keep)
            self.token_keep = None if self.token_keep == 1 else float(self.token_keep)
        for name in ("update_rank", "slice_tokens"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        _check_choice("bias", self.bias, BIASES)
        _check_choice("memory_mode", self.memory_mode, MEMORY_MODES)
        modes = self.activation_modes
        if isinstance(modes, str) or "feature" not in modes or not set(modes) <= set(MODES):
            raise ValueError(
                f"activation_modes must be a list with 'feature' and any of {list(MODES[1:])}, got {modes!r}."
            )
        if ("height" in modes) != ("width" in modes):
            raise ValueError(f"activation_modes must hold both 'height' and 'width' or neither, got {modes!r}.")
        for mode, rank in (self._mode_ranks() or {}).items():
            if mode not in modes:
                raise ValueError(f"activation_ranks names the mode {mode!r}, not in activation_modes={modes!r}.")
            check_positive_integer(f"activation_ranks[{mode!r}]", rank)
        if self.layer_update.keeps_image and self.activation_ranks is not None:
            others = " or ".join(repr(name) for name, update in UPDATES.items() if update.reads_input is not None)
            raise ValueError(
                f"activation_ranks compresses inputs, and update={self.update!r} keeps none of them; leave it out, or "
                f"choose update={others}, got {self.activation_ranks!r}."
            )
        if self.activation_ranks is not None and self.activation_threshold is None:
            missing = sorted(set(modes) - set(self._mode_ranks() or {}))
            if missing:
                raise ValueError(
                    f"activation_ranks must name every mode in activation_modes when activation_threshold is None; "
                    f"missing {missing}, got {self.activation_ranks!r}."
                )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be used when target_modules is a string (a regular expression or "
                f"'all-linear'), got target_modules={self.target_modules!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern needs layers_to_transform, got layers_pattern={self.layers_pattern!r} alone."
            )

    def _validate_budgets(self) -> None:
        if self.weight_share is not None:
            _check_threshold("weight_share", self.weight_share)
            for name in ("weight_rank", "rank_pattern"):
                if getattr(self, name):
                    raise ValueError(
                        f"weight_share decides the rank of every layer; leave {name} out, got {getattr(self, name)!r}."
                    )
        if self.plan is None:
            return
        # an injected configuration, which has ranks, also names the targets that the plan gave it
        for name in _PLANNED if self.awaits_loading else (*_PLANNED, "target_modules"):
            if getattr(self, name) and getattr(self, name) != ["feature"]:
                raise ValueError(f"plan decides layers and ranks; leave {name} out, got {getattr(self, name)!r}.")

    @property
    def layer_update(self) -> Update:
        """What of each layer trains, and how; of factors where a plan chooses a form for each layer."""
        return make_update(self.update or DEFAULT_UPDATE, self.update_rank, self.residual, self.frozen_dtype)

    def update_of(self, name: str) -> Update:
        """The same of one layer, by its full name."""
        planned = self.planned_layer(name)
        if planned is None or planned.residual is None:
            return self.layer_update
        assert isinstance(self.plan, dict)
        return make_update(self.plan["residual_update"] or RESIDUAL_UPDATE, None, planned.residual)

    def residual_of(self, name: str) -> str | None:
        """The frozen weight beside the factors of one layer, by its full name; None where they replace it."""
        planned = self.planned_layer(name)
        return self.residual if planned is None else planned.residual

    def base_form_of(self, name: str) -> str:
        """What becomes of the dense weight of one layer, by its full name: see :attr:`base_form`."""
        return self.residual_of(name) or self.base_weight

    @property
    def planned_residuals(self) -> dict[str, str]:
        """Residuals that a plan chooses, by layer name."""
        residuals = {name: self.residual_of(name) for name in self.planned_names()}
        return {name: residual for name, residual in residuals.items() if residual is not None}

    @property
    def uses_residuals(self) -> bool:
        """Whether any layer has a frozen weight beside its factors."""
        return self.residual is not None or bool(self.planned_residuals)

    def for_factors(self) -> WasiConfig:
        """The same for factors that replace weights, which is what plans and budgets are about."""
        if self.residual is None:
            return self
        changed = copy.copy(self)
        changed.residual, changed.explained_variance_threshold = None, KEPT_ENERGY
        if UPDATES[self.update or DEFAULT_UPDATE].needs_residual:
            changed.update = DEFAULT_UPDATE
        return changed

    def with_plan(self, plan: WasiPlan) -> WasiConfig:
        """A fresh one with this plan, which decides layers, forms and ranks; everything else stays."""
        others = (*_DECIDED, "plan", "peft_type", "inference_mode")  # the last says how it was loaded
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return WasiConfig(plan=plan, **kept)

    @property
    def base_form(self) -> str:
        """What becomes of the dense weights: 'release', 'cpu', 'keep', or a residual that they are rounded to."""
        return self.base_weight if self.residual is None else self.residual

    @property
    def resolved_memory_mode(self) -> str:
        """How far a step goes to need little memory."""
        return self.memory_mode or "exact"

    @property
    def how_blocks_run(self) -> tuple[str, bool, int | None]:
        """What :func:`memory.modes.enter_memory_mode` takes after the model."""
        return self.resolved_memory_mode, self.skip_padding, self.slice_tokens

    @property
    def awaits_loading(self) -> bool:
        """Whether the factors are to come from a saved adapter: then its ranks are given."""
        return self.ranks is not None

    def planned_names(self) -> set[str]:
        """Names of the layers that the plan replaces, not of those that it leaves dense; none without a plan."""
        layers = self.plan["layers"] if isinstance(self.plan, dict) else {}
        return {name for name, layer in layers.items() if layer["form"] != DENSE}

    def planned_layer(self, name: str) -> LayerPlan | None:
        """What the plan says of a layer; None without a plan, or where it does not name the layer."""
        layers = self.plan["layers"] if isinstance(self.plan, dict) else {}
        return layer_plan(name, layers[name]) if name in layers else None

    def _mode_ranks(self) -> dict[str, int] | None:
        if self.activation_ranks is None or isinstance(self.activation_ranks, dict):
            return self.activation_ranks
        return {"feature": self.activation_ranks}

    def compression_rule(self, name: str) -> CompressionRule | None:
        """The rule for compressing a layer's input, or None where nothing of it is compressed."""
        if self.update_of(name).keeps_image or recomputes(self.resolved_memory_mode):
            return None
        planned = self.planned_layer(name)
        if planned is not None:
            ranks = planned.activation_ranks
            modes = tuple(mode for mode in MODES if mode in (ranks or {}))
            return None if ranks is None else CompressionRule.from_options(modes, None, ranks)
        threshold = self.activation_threshold if self.residual is None else None
        if threshold is None and self.activation_ranks is None:
            return None
        return CompressionRule.from_options(tuple(self.activation_modes), threshold, self._mode_ranks())

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration; loading it builds the factors' shapes from `ranks` and decomposes nothing."""
        saved = copy.copy(self)
        if self.resolved_ranks is not None:
            saved.ranks = dict(self.resolved_ranks)
        PeftConfig.save_pretrained(saved, save_directory, **kwargs)
