"""Two thin factors in place of a dense weight."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..linalg.low_bit import RoundedRows
from .dense import FactoredWeight, build_dense, is_transposed
from .products import ProductChoice, Thin, add_thin
from .shards import full_shape


def check_rank(name: str, rank: Any, out_features: int, in_features: int) -> None:
    """Refuse a rank that a weight cannot have, before anything of its size is made.

    Args:
        name: Of the argument.
        rank: Its value.
        out_features: Of the layer.
        in_features: Of the layer.

    Raises:
        ValueError: If it is no integer from 1 to min(out_features, in_features).
    """
    largest = min(out_features, in_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"{name} must be from 1 to min(out_features, in_features) = {largest}, got {rank!r}.")


def _sizes(part: Tensor | nn.Module) -> tuple[int, int]:
    return (part.out_features, part.in_features) if isinstance(part, nn.Module) else tuple(part.shape)  # type: ignore


def alike(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the widest of their dtypes: those that train may be held in float32, beside others in 16 bits."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return tuple(part.to(dtype) for part in parts)


class FactoredLinear(nn.Module):
    """`y = (x R^T) L^T + b`: a linear layer that stores two thin factors in place of its weight.

    An ordinary module: `state_dict`, `to`, deepcopy, pickle, `torch.export` and FSDP see contiguous parameters, named
    wasi_L, wasi_R and bias: PEFT knows what belongs to an adapter by the prefix. `weight` answers what model code asks
    of a dense weight (:class:`dense.FactoredWeight`). Parts that do not train can be in few bits (:meth:`store`), or
    those of other factors, which are there anyway (:meth:`sharing`).

    **Shape**
        - L: (out, K); R: (K, in); bias: (out,) or None
        - input (..., in), output (..., out)

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: K.
        bias: Whether there is a bias.
        dense_class: The class of the dense layer whose place this one takes, `nn.Linear` or transformers' `Conv1D`,
            in whose layout `weight` answers.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        ValueError: If the rank is not in 1 to min(out_features, in_features).

    Example:
        >>> form = FactoredLinear(8, 6, rank=2)
        >>> form(torch.zeros(5, 8)).shape, form.weight.shape, sum(p.numel() for p in form.parameters())
        (torch.Size([5, 6]), torch.Size([6, 8]), 34)
    """

    parts: ClassVar[tuple[str, ...]] = ("L", "R")
    outer_parts: ClassVar[tuple[str, ...]] = ("L",)  # those of which the weight is a sum of products, one each
    prefix: ClassVar[str] = "wasi_"  # of the names of parameters

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        dense_class: type[nn.Module] = nn.Linear,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shapes = self.part_shapes(out_features, in_features, rank)
        self._make(shapes, bias, dense_class, {"device": device, "dtype": dtype})

    @classmethod
    def part_shapes(cls, out_features: int, in_features: int, rank: int, **_: int) -> dict[str, tuple[int, int]]:
        """Shapes of the parts, by name.

        Raises:
            ValueError: If a rank is none that a weight can have.
        """
        check_rank("rank", rank, out_features, in_features)
        return {"L": (out_features, rank), "R": (rank, in_features)}

    bias: nn.Parameter | None
    _lender: tuple[FactoredLinear, ...] = ()  # whose factors stand in for the parts that this form does not have

    def part(self, name: str) -> nn.Parameter:
        """A parameter by its name in `parts`; in the tenth of the time that attribute access takes.

        Of a part in few bits, its restored values, a tensor of its own.
        """
        part = self._parameters.get(self.prefix + name)
        if part is None:
            return self._lender[0].part(name) if self.shares(name) else self.frozen(name).dense_weight(self.dtype)
        return part

    def frozen(self, name: str) -> Any:
        """What a part in few bits is stored as (:data:`frozen.FROZEN`); None for a parameter."""
        stored = self._modules.get(self.prefix + name)
        return self._lender[0].frozen(name) if stored is None and self.shares(name) else stored

    def shares(self, name: str) -> bool:
        """Whether a part is that of other factors (:meth:`sharing`)."""
        own = self.prefix + name
        return bool(self._lender) and own not in self._parameters and own not in self._modules

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Names of those that are."""
        return tuple(name for name in self.parts if self.shares(name)) if self._lender else ()

    @property
    def L(self) -> nn.Parameter:
        """The left factor."""
        return self.part("L")

    @property
    def R(self) -> nn.Parameter:
        """The right factor."""
        return self.part("R")

    def _make(
        self, shapes: dict[str, tuple[int, int]], bias: bool, dense_class: type[nn.Module], options: dict[str, Any]
    ) -> None:
        """Random values of the size that a dense layer starts with, as `nn.Linear` does."""
        out_features, in_features = shapes["L"][0], shapes["R"][1]
        nn.Module.__init__(self)
        parts = {name: torch.empty(shape, **options) for name, shape in shapes.items()}
        for part in parts.values():
            part.uniform_(-1, 1).mul_(part.shape[1] ** -0.5)
        biases = torch.empty(out_features, **options).uniform_(-1, 1).mul_(in_features**-0.5) if bias else None
        self._hold(parts, biases, dense_class)

    def _hold(
        self, parts: Mapping[str, Tensor | nn.Module], bias: Tensor | None, dense_class: type[nn.Module]
    ) -> None:
        self.out_features, self.in_features = _sizes(parts["L"])[0], _sizes(parts["R"])[1]
        self.dense_class = dense_class
        for name in self.parts:
            part = parts[name]
            if isinstance(part, nn.Module):
                self.add_module(self.prefix + name, part)
            else:
                self.register_parameter(self.prefix + name, nn.Parameter(part))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor | nn.Module], bias: Tensor | None, dense_class: type[nn.Module] = nn.Linear
    ) -> Self:
        """A form around existing tensors; those that are not contiguous are copied, and so is the bias.

        Args:
            parts: A tensor for every name in `cls.parts`, of one dtype and device; or what one is stored as in few
                bits (:data:`frozen.FROZEN`), which is taken over.
            bias: (out,) or None.
            dense_class: As in the constructor.
        """
        form = cls.__new__(cls)
        nn.Module.__init__(form)
        taken = {
            name: part if isinstance(part, nn.Module) else part.detach().contiguous() for name, part in parts.items()
        }
        form._hold(taken, None if bias is None else bias.detach().clone(), dense_class)
        return form

    @classmethod
    def sharing(cls, lender: FactoredLinear, parts: Mapping[str, Tensor], bias: Tensor | None) -> Self:
        """A form with some parts of its own; the others are those of existing factors, as they are at any time.

        Those are not copied, saved, moved or counted with this form, and must not train.

        Args:
            lender: Has the other parts.
            parts: This form's own; taken over.
            bias: (out,) or None; taken over.
        """
        form = cls.__new__(cls)
        nn.Module.__init__(form)
        form._lender = (lender,)  # in a tuple: not a child, it belongs to the model
        form.out_features, form.in_features = lender.out_features, lender.in_features
        form.dense_class = lender.dense_class
        for name in cls.parts:
            if name in parts:
                form.register_parameter(cls.prefix + name, nn.Parameter(parts[name].contiguous()))
        form.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        return form

    def copy(self) -> Self:
        """Another form with copies of all tensors, but for those that are shared."""
        return copy.deepcopy(self, {id(lender): lender for lender in self._lender})

    # ---------------------------------------------------------------- parts in few bits

    def store(
        self,
        names: Iterable[str],
        stored_cls: Callable[[nn.Module, ProductChoice], nn.Module],
        products: ProductChoice,
    ) -> None:
        """Round parts that do not train, in place: they are submodules then, `wasi_R.codes` and the like in files.

        Args:
            names: Of the parts.
            stored_cls: What they are stored as (:data:`frozen.FROZEN`).
            products: How the layers of a model multiply by int8 codes.

        Example:
            >>> from wasi_peft.forms.frozen import FROZEN
            >>> form = FactoredLinear(8, 6, rank=2)
            >>> form.store(["R"], FROZEN["int8"], ProductChoice())
            >>> list(form.state_dict()), form.R.shape
            (['wasi_L', 'bias', 'wasi_R.codes', 'wasi_R.scale'], torch.Size([2, 8]))
        """
        for name in names:
            value = self.part(name).detach()
            del self._parameters[self.prefix + name]
            self.add_module(self.prefix + name, stored_cls(build_dense(nn.Linear, value, None), products))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, parts in few bits are frozen parameters with the values that they stand for; rounded again after."""
        stored: dict[str, Any] = {name: self._modules.get(self.prefix + name) for name in self.parts}
        stored = {name: frozen for name, frozen in stored.items() if frozen is not None}
        for name in stored:
            value = self.part(name)
            del self._modules[self.prefix + name]
            self.register_parameter(self.prefix + name, nn.Parameter(value, requires_grad=False))
        try:
            yield
        finally:
            for name, frozen in stored.items():
                self.store([name], type(frozen), frozen.products)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is stored, as in a state dict."""
        yield from self.named_parameters()
        yield from self.named_buffers()

    # ---------------------------------------------------------------- what it is and computes

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self._parameters.values())).dtype  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self._parameters.values())).device  # type: ignore[union-attr]

    @property
    def weight_rank(self) -> int:
        """K."""
        frozen = self.frozen("L")
        return int(full_shape(self.L)[1] if frozen is None else frozen.in_features)

    @property
    def rank(self) -> int:
        """Directions that the weight is made of."""
        return self.weight_rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """All directions of the weight: W = outer @ inner.

        **Shape**
            - returns outer (out, rank), inner (rank, in)
        """
        L, R = alike(self.L, self.R)
        return L, R

    @property
    def weight(self) -> FactoredWeight:
        """Stand-in for the dense weight, in the layout of `dense_class`; multiplied out only on use."""
        shape = (self.out_features, self.in_features)
        transposed = is_transposed(self.dense_class)
        shape = shape[::-1] if transposed else shape
        return FactoredWeight(shape, self.dtype, self.device, self.multiply_out, self.rescale)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the weight by a number, in place."""
        for name in self.outer_parts:
            frozen = self.frozen(name)
            if frozen is None:
                self.part(name).mul_(factor)
            else:
                frozen.rescale(factor)

    def multiply_out(self) -> Tensor:
        """The dense weight, in the layout of `dense_class`."""
        outer, inner = self.factors()
        weight = outer @ inner
        return weight.T if is_transposed(self.dense_class) else weight

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same, its parameters frozen copies."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return build_dense(self.dense_class, self.multiply_out().contiguous(), bias)

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        """`x W^T + h L^T` without gradients, as that of a frozen weight (:meth:`residual.Residual.product`)."""
        outer, inner = (part.detach().to(x.dtype) for part in self.factors())
        return add_thin((x @ inner.t()) @ outer.t(), thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        """`dY W`, (rows, in), without gradients, of dY (rows, out)."""
        outer, inner = (part.detach().to(dY.dtype) for part in self.factors())
        return (dY @ outer) @ inner

    def takes_rounded(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether `forward` without gradients takes so many rows in 8 bits (:class:`residual.ResidualLinear`)."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """`(x R^T) L^T + b` in the dtype of x.

        **Shape**
            - x: (..., in); returns (..., out)
        """
        return self.multiply(self.multiply(x, "R"), "L", self.bias)

    def multiply(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """`x P^T + b` with one part P, however it is stored, in the dtype of x."""
        frozen = self.frozen(name)
        if frozen is None:
            return F.linear(x, self.part(name).to(x.dtype), None if bias is None else bias.to(x.dtype))
        y: Tensor = frozen.multiply(x)
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    def cast(dtype: torch.dtype, *parts: Any) -> Any:
        """Tensors in a dtype, None as it is; at once where the first one has it, which they share but for the bias."""
        bias = parts[-1]
        if parts[0].dtype == dtype and (bias is None or bias.dtype == dtype):
            return parts
        return [part if part is None else part.to(dtype) for part in parts]

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.weight_rank}, bias={bias}"
        )
