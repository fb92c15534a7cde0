"""What an update offers: which part of a form trains, how, and what that costs.

A new update is one file with one subclass of :class:`Update`, and one line in the registry (`updates/__init__.py`).
Configuration, layers, budgets, plans, estimates, timers, summaries and the command line ask the object and know no
update by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..forms.factored import FactoredLinear
from ..forms.frozen import FROZEN
from ..forms.products import ProductChoice
from ..forms.residual import RESIDUALS, Residual, ResidualLinear
from ..linalg.coordinates import ImageMoments
from ..linalg.subspaces import orthonormalize
from . import costs
from .resizing import Carry

ProductGradientSink = Callable[[Tensor, Tensor], None]


@dataclass
class InitialFactors:
    """What injection gives a layer: its factors, and its bias corrected for the mean input that the factors drop.

    **Shape**
        - L: (out, n), orthonormal columns; R: (n, in); bias: (out,) or None; n is K, and as many directions more as
          the update trains beside it (:attr:`Update.side_rank`), as far as the weight has them
        - moments: what the data look like in these coordinates, where R does not train
        - residual: the frozen weight beside the factors; their coordinates then are those to train in, and L is zero,
          or makes good for what the residual misses
        - met_data: whether those coordinates come from data; else the first training batch gives them
    """

    L: Tensor
    R: Tensor
    bias: Tensor | None
    moments: ImageMoments | None = None
    residual: Residual | None = None
    met_data: bool = False


@dataclass(frozen=True)
class Update(ABC):
    """Which part of a form trains, and how. A value: two with the same options are equal.

    Attributes:
        name: By which configurations and plans know it.
        form_cls: What a layer stores.
        trained: Names of the form's parts that train.
        reads_input: Name of the trained part whose gradient needs the input, which can be compressed; None where
            backward needs no more than the input's image `R x`, K numbers a row.
        basis: Name of the part that trains in directions of its own scale, orthonormal columns: optimizers give it a
            learning rate of its own and no weight decay.
        hands_out_product: Whether backward can hand the gradient of the product `L R` to an optimizer.
        takes_image: Whether it can start from the image `R x` (:meth:`from_image`), wherever that comes from.
        takes_residual: Whether the factors can be an addition to a frozen weight.
        needs_residual: Whether they can be nothing else.
        residual: Name of the frozen weight beside the factors (:data:`forms.residual.RESIDUALS`), None for none.
        takes_stacks: Whether packed experts can have it: plain gradients of L and R are all that it needs.
        frozen_dtype: In what factors that do not train are stored (:data:`forms.frozen.FROZEN`), None for parameters.
    """

    residual: str | None = field(default=None, kw_only=True)
    frozen_dtype: str | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    form_cls: ClassVar[type[FactoredLinear]] = FactoredLinear
    trained: ClassVar[tuple[str, ...]]
    reads_input: ClassVar[str | None] = None
    basis: ClassVar[str | None] = None
    hands_out_product: ClassVar[bool] = False
    takes_image: ClassVar[bool] = False
    takes_residual: ClassVar[bool] = False
    needs_residual: ClassVar[bool] = False
    takes_stacks: ClassVar[bool] = False

    @classmethod
    def from_options(cls, update_rank: int | None) -> Update:
        """The update as a configuration asks for it.

        Args:
            update_rank: `WasiConfig.update_rank`; updates without a rank of their own ignore it.
        """
        return cls()

    # ---------------------------------------------------------------- forms

    @property
    def stored_cls(self) -> type[FactoredLinear]:
        """What a layer stores, beside a residual if there is one."""
        return self.form_cls if self.residual is None else ResidualLinear

    @classmethod
    def frozen_factors(cls) -> tuple[str, ...]:
        """Factors of the weight that do not train, so that they can be stored in few bits."""
        return tuple(part for part in ("L", "R") if part not in cls.trained)

    def store(self, form: FactoredLinear, products: ProductChoice) -> None:
        """Round the frozen factors of a form, in place, where they are to be stored in few bits.

        Args:
            form: Of :attr:`form_cls`, with all parts as parameters.
            products: How layers multiply by int8 codes.
        """
        if self.frozen_dtype is not None:
            form.store(self.frozen_factors(), FROZEN[self.frozen_dtype], products)

    @property
    def keeps_image(self) -> bool:
        """Whether backward keeps the image `R x` of an input alone."""
        return self.reads_input is None

    @property
    def side_rank(self) -> int:
        """Directions that train beside the K of the weight, where it has as many; they count in every budget."""
        return 0

    def side_rank_of(self, out_features: int, in_features: int) -> int:
        """Those of one layer: no more than a weight of its size can have."""
        return min(self.side_rank, out_features, in_features)

    def start(self, initial: InitialFactors, rank: int) -> Mapping[str, Tensor]:
        """Values of the form's parts, of which `initial` is the weight.

        Args:
            initial: Factors of K and :attr:`side_rank` directions, as far as the weight has them.
            rank: K.
        """
        return {"L": initial.L, "R": initial.R}

    def parts_on(self, factors: FactoredLinear) -> Mapping[str, Tensor]:
        """Values of what trains in an adapter on the factors of a compressed model; the other parts are those factors.

        The layer then computes what it does without the adapter.

        Args:
            factors: L and R, in no particular coordinates; not changed.

        Raises:
            ValueError: If the update trains something else than factors, and does not say what of these.
        """
        if not set(self.trained) <= set(FactoredLinear.parts):
            raise ValueError(
                f"update={self.name!r} does not say what it trains on the factors of a compressed model (parts_on); "
                "model.dequantize() restores the dense layers."
            )
        return {name: factors.part(name).detach().clone() for name in self.trained}

    def form_on(self, factors: FactoredLinear, like: Tensor) -> FactoredLinear:
        """The form of such an adapter, with the device and dtype of `like`."""
        parts = {name: part.to(like.device, like.dtype) for name, part in self.parts_on(factors).items()}
        bias = None if factors.bias is None else factors.bias.detach().to(like.device, like.dtype, copy=True)
        return self.form_cls.sharing(factors, parts, bias)

    def form_of(
        self, initial: InitialFactors, rank: int, dense_class: type[nn.Module], like: Tensor | None = None
    ) -> FactoredLinear:
        """The form that a layer starts with, with the device and dtype of `like`, else those of `initial`."""
        parts, bias = self.start(initial, rank), initial.bias
        if like is not None:
            parts = {name: part.to(like.device, like.dtype) for name, part in parts.items()}
            bias = None if bias is None else bias.to(like.device, like.dtype)
        if initial.residual is not None:
            return ResidualLinear.beside(initial.residual, parts, bias)
        return self.form_cls.from_parts(parts, bias, dense_class)

    def new_form(self, in_features: int, out_features: int, rank: int, bias: bool, **options: Any) -> FactoredLinear:
        """A form with random values, to be loaded.

        Args:
            in_features: Of the layer.
            out_features: Of the layer.
            rank: K.
            bias: Whether the layer has a bias.
            **options: `dense_class`, `device` and `dtype` of :class:`forms.factored.FactoredLinear`.
        """
        return self.form_cls(in_features, out_features, rank, bias, **options)

    @abstractmethod
    def forward(self, form: Any, x: Tensor, compressed: Any, sink: ProductGradientSink | None) -> Tensor:
        """What the form computes, recorded so that what trains gets its gradients. Without gradients, call the form.

        **Shape**
            - x: (..., in), in the compute dtype; returns (..., out)

        Args:
            form: Of :attr:`form_cls`.
            x: Input.
            compressed: Compressed form of x (:class:`linalg.tucker.Tucker`), to be kept instead of it; beside a
                residual also x in 8 bits (:class:`linalg.low_bit.RoundedRows`). None keeps what is needed exactly.
            sink: Given with :attr:`hands_out_product` where an optimizer wants the product's gradient.
        """

    def from_image(self, form: Any, h: Tensor) -> Tensor:
        """What :meth:`forward` computes, of the image `h = x R^T`, with :attr:`takes_image`; no residual is beside.

        **Shape**
            - h: (..., K); returns (..., out)
        """
        raise NotImplementedError

    @property
    def after_step(self) -> Callable[[Any], None] | None:
        """What is to be done to a form, in place, after every step of an optimizer that moved it.

        None for nothing: then no hook is installed and no layer registered anywhere.
        """
        return None

    def input_sums(self, form: Any, rows: Tensor) -> Tensor | None:
        """What :meth:`meet` asks of an input, (rows, in): numbers that add up over its rows; by default nothing."""
        return None

    def meet(self, form: Any, sums: Tensor) -> None:
        """Meet the first input with which a form of fresh factors trains, before it answers.

        What the form computes must stay as it is; the coordinates in which it trains may change.

        Args:
            form: The form.
            sums: :meth:`input_sums` of the input, or of its parts together.
        """
        return None

    def image_width(self, form: Any) -> int:
        """Numbers of each row that backward keeps of a form's input beside the (compressed) input itself."""
        return int(form.weight_rank) if self.keeps_image and getattr(form, self.trained[0]).requires_grad else 0

    def fold(self, form: Any) -> tuple[FactoredLinear, Update] | None:
        """A form of fewer parts that computes the same after training, and its update; None where there is none."""
        return None

    def column_space(self, form: Any) -> Tensor | None:
        """Orthonormal basis of what the trained part can answer with, (out, n); None where that does not turn."""
        outer = getattr(form, self.trained[0]).detach()
        return orthonormalize(outer) if bool(outer.any()) else None

    # ---------------------------------------------------------------- ranks that change

    @abstractmethod
    def shrink(self, form: Any, rank: int, carry: Carry) -> None:
        """Give a form a smaller rank K in place, keeping what matters most; parameters stay the same objects.

        Args:
            form: Of :attr:`form_cls`.
            rank: The new K, smaller than the present one.
            carry: Transforms the optimizer's state of a parameter that still has its old shape (:mod:`resizing`).
        """

    @abstractmethod
    def grow(self, form: Any, rank: int, carry: Carry) -> None:
        """Give a form a larger rank K in place; it computes the same."""

    # ---------------------------------------------------------------- costs

    def elements(self, out_features: int, in_features: int, rank: int) -> int:
        """Elements that a layer stores in place of a dense weight at rank K, all that trains included."""
        beside = 0 if self.residual is None else out_features * in_features
        total = rank + self.side_rank_of(out_features, in_features)
        return beside + costs.factored_elements(out_features, in_features, total)

    def stored_bytes(self, out_features: int, in_features: int, rank: int, bytes_per_element: int) -> int:
        """Bytes of them.

        Args:
            out_features: Of the layer.
            in_features: Of the layer.
            rank: K.
            bytes_per_element: Of the dense weight, and of factors.
        """
        sizes: list[tuple[int, int]] = []
        stored_cls = Residual
        if self.residual is not None:
            stored_cls, sizes = RESIDUALS[self.residual], [(out_features, in_features)]
        elif self.frozen_dtype is not None:
            of_factors = {"L": (out_features, rank), "R": (rank, in_features)}
            stored_cls, sizes = FROZEN[self.frozen_dtype], [of_factors[part] for part in self.frozen_factors()]
        parameters = self.elements(out_features, in_features, rank) - sum(rows * columns for rows, columns in sizes)
        frozen = sum(stored_cls.stored_bytes(rows, columns, bytes_per_element) for rows, columns in sizes)
        return parameters * bytes_per_element + frozen

    def trained_elements(self, out_features: int, in_features: int, rank: int) -> int:
        """Those of them that train: gradients and optimizer states are as large."""
        sizes = {"L": out_features * rank, "R": rank * in_features}
        return sum(sizes[part] for part in self.trained)

    def break_even_rank(self, out_features: int, in_features: int) -> int:
        """Largest K at which a layer is smaller (and cheaper) than the dense one; 0 where none is.

        Beside a residual: smaller in bytes than a float32 weight.
        """
        if self.residual is not None:
            kept = RESIDUALS[self.residual].stored_bytes(out_features, in_features, 4)
            return max(0, 4 * out_features * in_features - kept - 1) // (4 * (out_features + in_features))
        return max(0, costs.break_even_rank(out_features, in_features) - self.side_rank_of(out_features, in_features))

    def forward_flops(self, rows: int, out_features: int, in_features: int, rank: int) -> int:
        """FLOPs of a forward pass; the gradient of the input costs as much."""
        return 2 * rows * self.elements(out_features, in_features, rank)

    @abstractmethod
    def gradient_flops(self, rows: int, out_features: int, in_features: int, rank: int, exact: bool) -> int:
        """FLOPs of a step for the gradients of what trains and :attr:`after_step`: the part that depends on K alone.

        Args:
            rows: Batch times tokens.
            out_features: Of the layer.
            in_features: Of the layer.
            rank: K.
            exact: Whether the input is kept exactly; then that is all.
        """

    def compressed_gradient_flops(self, rows: int, out_features: int, in_features: int, input_rank: int) -> int:
        """The part that depends on the rank of the compressed input alone."""
        return 0

    def product_flops(self, out_features: int, in_features: int, rank: int, input_rank: int) -> int:
        """The part that depends on both."""
        return 0
