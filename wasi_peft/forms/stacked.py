"""Forms of packed experts: a pair of factors for each, in two 3-D tensors, by themselves or beside a frozen weight.

Model code reads a packed weight in a few ways: one expert's matrix, the matrices of given rows, all of them in a
grouped or batched product. :class:`StackedWeight` answers each by products through the factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from typing_extensions import Self

from ..models.experts import ExpertStack
from .dense import ParkedLinear, StandIn, build_dense
from .factored import FactoredLinear, check_rank
from .products import ProductChoice
from .residual import RESIDUALS, ExactResidual, Residual, ResidualLinear

RowMultiply = Callable[[Tensor, Sequence["Segment"]], Tensor]


class Segment(NamedTuple):
    """Rows of an input that one expert answers: from start to stop."""

    expert: int
    start: int
    stop: int


def segments_of(offsets: Tensor, rows: int) -> list[Segment]:
    """Rows by expert, of an input that is sorted by expert; those of an input without values are spread evenly.

    **Shape**
        - offsets: (E,), where the rows of each expert end; rows after the last belong to none

    Example:
        >>> segments_of(torch.tensor([2, 2, 5]), 6)
        [Segment(expert=0, start=0, stop=2), Segment(expert=2, start=2, stop=5)]
    """
    experts = len(offsets)
    if offsets.is_meta or is_fake(offsets):
        ends = [rows * (expert + 1) // experts for expert in range(experts)]
    else:
        ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [Segment(index, *ends) for index, ends in enumerate(zip(starts, ends, strict=True)) if ends[0] < ends[1]]


class StackedWeight(StandIn):
    """Stand-in for packed weights: what model code multiplies by them goes through `multiply`.

    Served without the dense weight: `F.linear(x, w[e])` and `x @ w[e]` of one expert; `w[experts]` in `torch.bmm`, one
    expert a row; `torch.bmm` with all experts; grouped products. Any other use computes the dense weight for that use.

    Args:
        shape: Of the packed weight as model code sees it, (E, rows, columns).
        outputs_last: Whether the columns are outputs.
        like: Has its dtype and device.
        multiply: `y` (rows, out) of x (rows, in) and segments of it; what lies in no segment gets zeros.
        dense: The dense weight, in the shape as it is seen with `outputs_last` false, (E, out, in).
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs_last: bool,
        like: Tensor,
        multiply: RowMultiply,
        dense: Callable[[], Tensor],
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype, self.device = like.dtype, like.device
        self.outputs_last = outputs_last
        self.is_meta = like.is_meta
        self.ndim = len(self.shape)
        self._is_hf_initialized = True  # transformers must not fill it with numbers
        self._multiply, self._dense = multiply, dense
        self._experts = len(self)
        self._chosen: Any = None  # one expert, or an expert for each row; None for all of them

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.multiplied_out(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> Any:
        one = isinstance(chosen, int) or (isinstance(chosen, Tensor) and chosen.dim() == 0)
        rows = isinstance(chosen, Tensor) and chosen.dim() == 1 and chosen.dtype in (torch.int64, torch.int32)
        if self._chosen is not None or not (one or rows):
            return self.multiplied_out()[chosen]
        return self._as(self.shape[1:] if one else (len(chosen), *self.shape[1:]), self.outputs_last, chosen)

    def _as(self, shape: Sequence[int], outputs_last: bool, chosen: Any) -> StackedWeight:
        other = copy.copy(self)
        state = {"shape": torch.Size(shape), "ndim": len(shape), "outputs_last": outputs_last, "_chosen": chosen}
        other.__dict__.update(state)
        return other

    def dim(self) -> int:
        """Number of dimensions, as `Tensor.dim`."""
        return self.ndim

    def transpose(self, first: int, second: int) -> Any:
        """The same with rows and columns exchanged, as `Tensor.transpose`."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            return self.multiplied_out().transpose(first, second)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self._as(shape, not self.outputs_last, self._chosen)

    def t(self) -> Any:
        """The transposed matrix, as `Tensor.t`."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:
        """Rows and columns exchanged, as `Tensor.mT`."""
        return self.transpose(-1, -2)

    @property
    def T(self) -> Any:
        """The transposed matrix, as `Tensor.T`."""
        return self.t() if self.ndim == 2 else self.multiplied_out().T

    def multiplied_out(self) -> Tensor:
        weight = self._dense()
        if self._chosen is not None:
            weight = weight[self._chosen]
        return weight.mT if self.outputs_last else weight

    # ---------------------------------------------------------------- products

    def _of_one(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), by the one expert that is chosen."""
        rows = x.reshape(-1, x.shape[-1])
        y = self._multiply(rows, [Segment(int(self._chosen), 0, len(rows))] if len(rows) else [])
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _of_rows(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out), each row by its own expert."""
        order = self._chosen.argsort(stable=True)
        experts = torch.arange(self._experts, device=order.device, dtype=self._chosen.dtype)
        offsets = torch.searchsorted(self._chosen[order], experts, right=True)
        y = self._multiply(x[order], segments_of(offsets, len(x)))
        return torch.zeros_like(y).index_copy(0, order, y)

    def _of_all(self, x: Tensor) -> Tensor:
        """(E, rows, in) to (E, rows, out)."""
        experts, rows = x.shape[:2]
        segments = [Segment(expert, expert * rows, (expert + 1) * rows) for expert in range(experts)] if rows else []
        return self._multiply(x.reshape(-1, x.shape[-1]), segments).view(experts, rows, -1)

    def _served(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """A product through the factors; None for a use that is none of the known ones."""
        if func in _GROUPED and len(args) == 2 and args[1] is self:
            plain = all(value is None for name, value in kwargs.items() if name != "offs")
            if plain and self._chosen is None and self.outputs_last and args[0].dim() == 2:
                return self._multiply(args[0], segments_of(kwargs["offs"], len(args[0])))
        elif func is F.linear and args[1] is self:
            if not self.outputs_last and self.ndim == 2:
                y, bias = self._of_one(args[0]), args[2] if len(args) > 2 else kwargs.get("bias")
                return y if bias is None else y + bias
        elif func in _MATMULS and args[1] is self:
            if self.outputs_last and self.ndim == 2:
                return self._of_one(args[0])
            if self.outputs_last and self._chosen is None and args[0].dim() == 3 and len(args[0]) == len(self):
                return self._of_all(args[0])
        elif func is torch.bmm and args[1] is self and self.outputs_last:
            if self._chosen is None:
                return self._of_all(args[0])
            if args[0].shape[1] == 1:
                return self._of_rows(args[0][:, 0])[:, None]
        elif func is torch.bmm and args[0] is self and not self.outputs_last:
            if self._chosen is not None and args[1].shape[2] == 1:
                return self._of_rows(args[1][..., 0])[..., None]
        return None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in args:
            if isinstance(value, StackedWeight):
                y = value._served(func, args, kwargs)
                if y is not None:
                    return y

        def dense(value: Any) -> Any:
            if isinstance(value, StackedWeight):
                return value.multiplied_out()
            if isinstance(value, (tuple, list)):
                return type(value)(dense(item) for item in value)
            return value

        return func(*dense(args), **{key: dense(value) for key, value in kwargs.items()})


class PackedWeight:
    """A module that model code may read as the packed weight that its `weight` gives."""

    weight: Any

    def __getitem__(self, chosen: Any) -> Any:
        return self.weight[chosen]

    def __len__(self) -> int:
        return len(self.weight)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """What is asked of a tensor, and no module has: `shape`, `dtype`, `transpose`."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or "weight" in name or not self.__dict__.get("_modules"):  # not made yet
                raise
            return getattr(self.weight, name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def read(value: Any) -> Any:
            if isinstance(value, PackedWeight):
                return value.weight
            if isinstance(value, (tuple, list)):
                return type(value)(read(item) for item in value)
            return value

        return func(*read(args), **{key: read(value) for key, value in (kwargs or {}).items()})


_GROUPED = (getattr(F, "grouped_mm", None), torch._grouped_mm)
_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


# ---------------------------------------------------------------- frozen weights


def residual_of(stack: ExpertStack, name: str, products: ProductChoice | None) -> Residual:
    """All experts' weights in few bits, as the rows of one matrix: a scale an expert and output channel.

    Args:
        stack: The packed weight.
        name: Of the residual.
        products: How layers multiply by int8 codes.
    """
    kind, rows = RESIDUALS[name], stack.out_features
    shape, weight = (stack.experts * rows, stack.in_features), stack.weight
    buffers = {
        part: torch.empty(size, dtype=dtype, device=weight.device)
        for part, (size, dtype) in kind.layout(*shape).items()
    }
    for expert, matrix in enumerate(stack.matrices()):  # one at a time: all may be most of a model
        for part, buffer in kind(build_dense(nn.Linear, matrix, None)).named_buffers():
            buffers[part][expert * rows : (expert + 1) * rows] = buffer
    return kind.from_buffers(buffers, None, shape, nn.Linear, weight.dtype, products)


class ExactStack(ExactResidual):
    """The packed weight stays in place as it is; this refers to it and owns no tensor.

    Args:
        stack: The packed weight.
    """

    def __init__(self, stack: ExpertStack) -> None:
        nn.Module.__init__(self)
        self._dense = (stack,)  # not a child: it belongs to the model
        self.out_features, self.in_features = stack.experts * stack.out_features, stack.in_features
        self.dense_class = nn.Linear
        self._dtype = None

    _expert: int | None = None  # the only one of which this is the weight

    @property
    def _stack(self) -> ExpertStack:
        stack = self._dense[0]
        assert isinstance(stack, ExpertStack)
        return stack

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        matrices = self._stack.matrices()
        weight: Tensor = matrices.reshape(-1, self.in_features) if self._expert is None else matrices[self._expert]
        return weight.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._stack.weight.dtype

    def to_dense(self) -> nn.Module:
        return self._stack

    def rows(self, start: int, stop: int) -> Self:
        part = copy.copy(self)
        part._expert, part.out_features = start // self._stack.out_features, stop - start
        return part


class ParkedStack(ParkedLinear):
    """A packed weight that waits in main memory: it owns no parameter and no buffer.

    Args:
        stack: The packed weight.
    """

    def __init__(self, stack: ExpertStack) -> None:
        nn.Module.__init__(self)
        self.dense_class = ExpertStack
        self.transposed = stack.transposed
        self.weight, self.bias = stack.weight.detach().cpu(), None
        self.out_features, self.in_features = stack.out_features, stack.in_features

    def restore(self, device: torch.device, dtype: torch.dtype) -> ExpertStack:
        return ExpertStack(nn.Parameter(self.weight.to(device, dtype), requires_grad=False), self.transposed)


# ---------------------------------------------------------------- factors


class _Stack(FactoredLinear):
    """What both forms share: the packed weight that they stand for."""

    transposed: bool

    @property
    def experts(self) -> int:
        """E."""
        return len(self.L)

    @property
    def bias(self) -> None:  # type: ignore[override]
        return None

    def _hold(self, parts: Mapping[str, Any], bias: Tensor | None, dense_class: type[nn.Module]) -> None:
        self.out_features, self.in_features = parts["L"].shape[1], parts["R"].shape[2]
        self.dense_class = dense_class
        for name in self.parts:
            self.register_parameter(self.prefix + name, nn.Parameter(parts[name]))

    def _make_stack(self, experts: int, out_features: int, in_features: int, rank: int, options: Any) -> None:
        check_rank("rank", rank, out_features, in_features)
        nn.Module.__init__(self)
        shapes = {"L": (experts, out_features, rank), "R": (experts, rank, in_features)}
        parts = {name: torch.empty(shape, **options) for name, shape in shapes.items()}
        for part in parts.values():
            part.uniform_(-1, 1).mul_(part.shape[2] ** -0.5)
        self._hold(parts, None, ExpertStack)

    @property
    def weight_rank(self) -> int:
        return int(self.L.shape[2])

    def matrices(self) -> Tensor:
        """All weights as linear layers hold them, (E, out, in)."""
        outer, inner = self.factors()
        return outer @ inner

    def multiply_out(self) -> Tensor:
        """The packed weight, in the layout in which model code reads it."""
        weight = self.matrices()
        return weight.mT if self.transposed else weight

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The packed weight that computes the same, a frozen copy."""
        return ExpertStack(nn.Parameter(self.multiply_out().contiguous(), requires_grad=False), self.transposed)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class FactoredStack(_Stack):
    """`y = (x R_e^T) L_e^T`: packed weights as one pair of factors an expert.

    **Shape**
        - L: (E, out, K); R: (E, K, in)

    Args:
        experts: E.
        in_features: Of one expert.
        out_features: Of one expert.
        rank: K, the same for all.
        transposed: Whether model code reads the weight as (E, in, out).
        device: Where the parameters are made.
        dtype: Of the parameters.

    Example:
        >>> form = FactoredStack(4, 8, 6, rank=2)
        >>> form.experts, form.weight_rank, form.multiply_out().shape
        (4, 2, torch.Size([4, 6, 8]))
    """

    def __init__(
        self, experts: int, in_features: int, out_features: int, rank: int, transposed: bool = False, **options: Any
    ) -> None:
        self._make_stack(experts, out_features, in_features, rank, options)
        self.transposed = transposed

    @classmethod
    def around(cls, parts: Mapping[str, Tensor], transposed: bool) -> Self:
        """A form around existing tensors."""
        form = cls.from_parts(parts, None, ExpertStack)
        form.transposed = transposed
        return form


class ResidualStack(_Stack, ResidualLinear):
    """`y = x Q_e^T + (x R_e^T) L_e^T`: frozen weights, the rows of one matrix, and one pair of factors an expert.

    **Shape**
        - Q: (E out, in); L: (E, out, K); R: (E, K, in)

    Args:
        residual: Q.
        experts: E.
        rank: K, the same for all.
        transposed: Whether model code reads the weight as (E, in, out).
        device: Where the parameters are made; by default that of the residual.
        dtype: Of the parameters; by default that of the residual.
    """

    def __init__(
        self,
        residual: Residual,
        experts: int,
        rank: int,
        transposed: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"device": device or residual.device, "dtype": dtype or residual.dtype}
        self._make_stack(experts, residual.out_features // experts, residual.in_features, rank, options)
        self.transposed = transposed
        self._residual = (residual,)

    @classmethod
    def around(cls, residual: Residual, parts: Mapping[str, Tensor], transposed: bool) -> Self:
        """A form around existing tensors."""
        form = cls.from_parts(parts, None, ExpertStack)
        form.transposed = transposed
        form._residual = (residual,)
        return form

    def copy(self) -> Self:
        parts = {name: self.part(name).detach().clone() for name in self.parts}
        return type(self).around(self.residual, parts, self.transposed)

    def matrices(self) -> Tensor:
        outer, inner = self.factors()
        product = outer @ inner
        return product + self.residual.dense_weight().to(product.dtype).view_as(product)
