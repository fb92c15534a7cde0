"""A frozen weight Q, in few bits or as it was, beside two factors that train: `W = Q + L R`.

The hybrid of low rank and quantisation. At the start `L R` is zero, or what Q misses of the dense weight, so nothing
that a model knows is lost.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self

from ..linalg.low_bit import (
    GROUP,
    LARGEST_CODE,
    Groups,
    RoundedRows,
    largest_magnitude,
    quantize_groups,
    restore_groups,
)
from .dense import FactoredWeight, build_dense, dense_bias, dense_weight, is_quantized, is_transposed
from .factored import FactoredLinear, check_rank
from .products import (
    FEW_ROWS,
    Int8Product,
    ProductChoice,
    Thin,
    add_thin,
    aligned,
    by_tiles,
    scaled_codes,
    tiles,
    transposed_by_tiles,
)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of tensors, by name


class Residual(nn.Module, ABC):
    """A frozen linear layer of which factors can train an addition; also a factor that does not train (:mod:`frozen`).

    An ordinary module: what it holds are buffers, and a frozen bias. Its `weight` answers what model code asks of a
    dense weight.

    **Shape**
        - input (..., in), output (..., out)

    Args:
        dense: The dense layer, Linear or Conv1D; not changed, its bias is taken over as it is.
        products: How the layers of a model multiply (:mod:`products`); where that does not matter, ignored.
    """

    name: ClassVar[str]
    rounds_inputs: ClassVar[bool] = True  # what backward keeps of an input may be rounded to 8 bits

    def __init__(self, dense: nn.Module, products: ProductChoice | None = None) -> None:
        super().__init__()
        weight = dense_weight(dense)
        self.out_features, self.in_features = weight.shape
        self.dense_class = type(dense)
        self.products = ProductChoice() if products is None else products
        self._parameters["bias"] = _frozen(dense_bias(dense))  # see build_dense
        self._like = weight.new_empty(0)  # has the device and dtype of the dense layer
        self._hold(weight)

    bias: nn.Parameter | None

    @abstractmethod
    def _hold(self, weight: Tensor) -> None:
        """Take over a weight, (out, in)."""

    @staticmethod
    @abstractmethod
    def layout(out_features: int, in_features: int) -> Layout:
        """Shapes and dtypes of the buffers that stand for a weight, by name."""

    @classmethod
    def stored_bytes(cls, out_features: int, in_features: int, bytes_per_element: int) -> int:
        """Bytes of what is kept of a weight.

        Args:
            out_features: Of the layer.
            in_features: Of the layer.
            bytes_per_element: Of the dense weight.
        """
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in cls.layout(out_features, in_features).values()
        )

    @classmethod
    def from_buffers(
        cls,
        buffers: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        dense_class: type[nn.Module] = nn.Linear,
        dtype: torch.dtype = torch.float32,
        products: ProductChoice | None = None,
    ) -> Self:
        """A frozen weight around existing tensors.

        Args:
            buffers: As :meth:`layout` says; taken over.
            bias: (out,) or None; taken over.
            shape: Of the weight, (out, in).
            dense_class: Of the layer whose place it takes.
            dtype: In which it answers.
            products: As in the constructor.
        """
        residual = cls.__new__(cls)
        nn.Module.__init__(residual)
        residual.out_features, residual.in_features = shape
        residual.dense_class = dense_class
        residual.products = ProductChoice() if products is None else products
        residual._parameters["bias"] = _frozen(bias)
        for name in cls.layout(*shape):
            residual.register_buffer(name, buffers[name])
        first = next(iter(buffers.values()))
        residual._like = torch.empty(0, dtype=dtype, device=first.device)
        return residual

    def copy(self, bias: Tensor | None) -> Self:
        """The same frozen weight, its buffers shared, with a copy of another bias, in its dtype."""
        bias = None if bias is None else bias.detach().to(self.dtype, copy=True)
        shape = (self.out_features, self.in_features)
        return self.from_buffers(
            dict(self.named_buffers()), bias, shape, self.dense_class, self.dtype, self.products
        ).train(self.training)

    def rows(self, start: int, stop: int) -> Self:
        """Some outputs of the weight, from start to stop, without bias, in the memory of all of them."""
        part = copy.copy(self)
        part._buffers = {
            name: None if buffer is None else buffer[start:stop] for name, buffer in self._buffers.items()
        }
        part._parameters, part.out_features = {"bias": None}, stop - start
        return part

    @property
    def module(self) -> nn.Module:
        """What stands where the dense layer was."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense layer."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._like.device

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that this stands for, (out, in), a tensor of its own or the dense weight itself.

        Args:
            dtype: To restore it in; by default that of the dense layer.
        """

    @abstractmethod
    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        """`x Q^T + h L^T`, (rows, out), of x (rows, in): a tensor of its own, to which more may be added.

        Args:
            x: Rows.
            rounded: The same in 8 bits, where that is known already; a product that rounds takes it.
            thin: h (rows, K) and L (out, K), in the dtype of x; None for nothing to add.
        """

    @abstractmethod
    def transposed_product(self, dY: Tensor) -> Tensor:
        """`dY Q`, (rows, in), of dY (rows, out): a tensor of its own."""

    def takes_rounded(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether :meth:`product` with so many rows takes them in 8 bits: then it need not round them again."""
        return False

    def multiply(self, x: Tensor) -> Tensor:
        """`x Q^T` with a gradient for x, in the dtype of x; (..., in) to (..., out)."""
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _transformed():
            return _product(x, self)
        y: Tensor = _Product.apply(x, self)
        return y

    @property
    def weight(self) -> FactoredWeight:
        """Stand-in for the dense weight, in the layout of `dense_class`."""
        shape = (self.out_features, self.in_features)
        transposed = is_transposed(self.dense_class)

        def dense() -> Tensor:
            weight = self.dense_weight()
            return weight.T if transposed else weight

        shape = shape[::-1] if transposed else shape
        return FactoredWeight(shape, self.dtype, self.device, dense, self.rescale)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the weight by a number, in place: whatever it is stored as, scales carry it."""
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer.mul_(factor)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same, its parameters frozen."""
        weight = self.dense_weight()
        weight = weight.T if is_transposed(self.dense_class) else weight
        bias = None if self.bias is None else self.bias.detach().clone()
        return build_dense(self.dense_class, weight.contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x Q^T + b` in the dtype of x, or in that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Scales are not rounded to 16 bits: `to`, `half` and the like change the dtype that the layer answers in."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        if "_like" in self.__dict__:
            like = self._like
            if like.is_meta:  # of a layer that was made there, and whose buffers have been loaded since
                like = like.new_empty(0, device=next(self.buffers()).device)
            self._like = fn(like)
        for name, buffer in self._buffers.items():
            before = kept[name]
            if buffer is not None and before is not None and buffer.dtype != before.dtype:
                self._buffers[name] = buffer.to(before.dtype) if before.is_meta else before.to(buffer.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight={self.name}, "
            f"bias={self.bias is not None}"
        )


class ExactResidual(Residual):
    """The layer stays in place as it is; this refers to it and owns no tensor.

    One that another library keeps in few bits is restored for each product.
    """

    name: ClassVar[str] = "exact"
    rounds_inputs: ClassVar[bool] = False

    def __init__(self, dense: nn.Module, products: ProductChoice | None = None) -> None:
        nn.Module.__init__(self)
        self._dense = (dense,)  # not a child: it belongs to the model
        weight = dense_weight(dense)
        self.out_features, self.in_features = weight.shape
        self.dense_class = type(dense)
        self._dtype = weight.dtype if is_quantized(dense) else None

    @property
    def module(self) -> nn.Module:
        return self._dense[0]

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.module.bias  # type: ignore[return-value]

    @staticmethod
    def layout(out_features: int, in_features: int) -> Layout:
        return {}

    @classmethod
    def stored_bytes(cls, out_features: int, in_features: int, bytes_per_element: int) -> int:
        return out_features * in_features * bytes_per_element

    def _hold(self, weight: Tensor) -> None:
        raise NotImplementedError  # the dense layer holds it

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or self.dense_weight().dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device  # type: ignore[return-value]

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        if self._dtype is not None:
            return dense_weight(self.module).to(dtype)
        weight: Tensor = self.module.weight.detach().to(dtype)  # type: ignore[operator]
        return weight.T if is_transposed(self.dense_class) else weight

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        self.module.weight.mul_(factor)  # type: ignore[operator]

    def to_dense(self) -> nn.Module:
        return self.module

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        return add_thin(F.linear(x, self.dense_weight().to(x.dtype)), thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        return dY @ self.dense_weight().to(dY.dtype)


class Int8Residual(Residual):
    """int8 codes with one scale an output channel: a quarter of the bytes of float32, an error of about 0.4 %.

    **Shape**
        - codes: (out, in), int8; scale: (out, 1), float32
    """

    name: ClassVar[str] = "int8"
    codes: Tensor
    scale: Tensor

    def _hold(self, weight: Tensor) -> None:
        scale = largest_magnitude(weight, 1)[:, None].float().div_(LARGEST_CODE)
        divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for start, stop in tiles(*weight.shape):  # so that no second copy of a large weight exists
            codes[start:stop] = (weight[start:stop] / divisor[start:stop]).round_()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @staticmethod
    def layout(out_features: int, in_features: int) -> Layout:
        return {"scale": ((out_features, 1), torch.float32), "codes": ((out_features, in_features), torch.int8)}

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.restore(self.codes, self.scale, dtype)

    def restore(self, codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The entries that some of the codes stand for, with the scales of their rows."""
        return scaled_codes(codes, scale, dtype or self.dtype)

    def takes_rounded(self, rows: int, dtype: torch.dtype) -> bool:
        return self.products.product_of(rows, dtype, self.codes).rounds

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        product = self.products.product(x, self.codes)
        return product.forward(x, self.codes_for(product), self.scale, rounded, thin)

    def codes_for(self, product: type[Int8Product]) -> Tensor:
        """The codes, at an address that a product can read; those of a file are copied once, the first time.

        Those of an expert (:meth:`rows`) each time, which is less than to restore them.
        """
        codes = self.codes if product.alignment == 1 else aligned(self.codes, product.alignment)
        if codes is not self.codes:
            self.codes = codes
        return codes

    def transposed_product(self, dY: Tensor) -> Tensor:
        return self.products.product(dY, self.codes).transposed(dY, self.codes, self.scale)


class Int4Residual(Residual):
    """4 bits in groups of 32 with a scale and a smallest value each: 5 bits an element, an error of about 7 %.

    Products restore the weight a tile at a time, so they save memory and, next to a dense product, no time.

    **Shape**
        - codes: (out, in_padded / 2), uint8; scale, smallest: (out, in_padded / 32)
    """

    name: ClassVar[str] = "int4"
    codes: Tensor
    scale: Tensor
    smallest: Tensor

    def _hold(self, weight: Tensor) -> None:
        parts = [quantize_groups(weight[start:stop]) for start, stop in tiles(*weight.shape)]
        for name, values in zip(Groups._fields, zip(*parts, strict=True), strict=True):
            self.register_buffer(name, torch.cat(values))

    @staticmethod
    def layout(out_features: int, in_features: int) -> Layout:
        groups = (out_features, -(-in_features // GROUP))
        return {
            "scale": (groups, torch.float16),
            "codes": ((out_features, groups[1] * GROUP // 2), torch.uint8),
            "smallest": (groups, torch.float16),
        }

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        groups = Groups(self.codes[start:stop], self.scale[start:stop], self.smallest[start:stop])
        return restore_groups(groups, self.in_features, dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        parts, dtype = tiles(self.out_features, self.in_features), dtype or self.dtype
        exact = _at_least_float32(dtype)
        return torch.cat([self._tile(start, stop, exact).to(dtype) for start, stop in parts])

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        sizes = self.out_features, self.in_features
        return add_thin(by_tiles(x, sizes, lambda start, stop: x @ self._tile(start, stop, x.dtype).t()), thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        sizes = self.out_features, self.in_features
        return transposed_by_tiles(dY, sizes, lambda start, stop: self._tile(start, stop, dY.dtype))


RESIDUALS: dict[str, type[Residual]] = {cls.name: cls for cls in (Int8Residual, Int4Residual, ExactResidual)}


def _transformed() -> bool:
    """Whether a transform of torch.func is at work, which must see what has a derivative of its own."""
    return torch._C._are_functorch_transforms_active()


def _product(x: Tensor, residual: Residual) -> Tensor:
    y = residual.product(x.reshape(-1, x.shape[-1]))
    # no view of another tensor: models may add to what a layer answers, in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], residual.out_features))


class _Product(torch.autograd.Function):
    """`x Q^T`, of which x alone has a gradient: nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Residual) -> Tensor:
        ctx.residual, ctx.shape = residual, x.shape
        return _product(x, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(device_type=dY.device.type, enabled=False):
            dX = ctx.residual.transposed_product(dY.reshape(-1, dY.shape[-1]))
            return torch.ops.aten._unsafe_view(dX, ctx.shape), None


class ResidualLinear(FactoredLinear):
    """`y = x Q^T + (x R^T) L^T + b`: a frozen weight and two factors, with a bias of its own.

    The frozen weight is shared by all forms of a layer and belongs to none: it is not saved, moved or counted with
    the form. Parameters are named wasi_added_L and wasi_added_R: factors that add to a weight are no factors of one.

    **Shape**
        - L: (out, K); R: (K, in); bias: (out,) or None
        - input (..., in), output (..., out)

    Args:
        residual: Q.
        rank: K.
        bias: Whether there is a bias.
        device: Where the parameters are made; by default that of the residual.
        dtype: Of the parameters; by default that of the residual.

    Raises:
        ValueError: If the rank is not in 1 to min(out_features, in_features).

    Example:
        >>> dense = nn.Linear(64, 32)
        >>> form = ResidualLinear(Int8Residual(dense), rank=4)
        >>> x = torch.randn(5, 64)
        >>> bool((form(x) - form.to_dense()(x)).norm() < 0.03 * form(x).norm())
        True
    """

    prefix: ClassVar[str] = "wasi_added_"

    def __init__(
        self,
        residual: Residual,
        rank: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_features, in_features = residual.out_features, residual.in_features
        check_rank("rank", rank, out_features, in_features)
        shapes = {"L": (out_features, rank), "R": (rank, in_features)}
        options = {"device": device or residual.device, "dtype": dtype or residual.dtype}
        self._make(shapes, bias, residual.dense_class, options)
        self._residual = (residual,)

    @classmethod
    def beside(cls, residual: Residual, parts: Mapping[str, Tensor], bias: Tensor | None) -> Self:
        """A form around existing tensors, see :meth:`FactoredLinear.from_parts`."""
        form = cls.from_parts(parts, bias, residual.dense_class)
        form._residual = (residual,)
        return form

    @property
    def residual(self) -> Residual:
        """The frozen weight beside the factors."""
        residual: Residual = self._residual[0]
        return residual

    def move_beside(self, residual: Residual) -> None:
        """Have the factors beside another frozen weight of the same size."""
        self._residual = (residual,)

    def copy(self) -> Self:
        """Another form beside the same frozen weight, with copies of the parameters."""
        parts = {name: self.part(name).detach().clone() for name in self.parts}
        return type(self).beside(self.residual, parts, self.bias)

    def multiply_out(self) -> Tensor:
        """The dense weight `Q + L R`, in the layout of `dense_class`."""
        outer, inner = self.factors()
        weight = self.residual.dense_weight().to(outer.dtype) + outer @ inner
        return weight.T if is_transposed(self.dense_class) else weight

    def rescale(self, factor: float) -> None:
        self.residual.rescale(factor)
        super().rescale(factor)

    def product(self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None) -> Tensor:
        outer, inner = (part.detach().to(x.dtype) for part in self.factors())
        h = x @ inner.t()
        if thin is not None:
            h, outer = torch.cat([h, thin[0]], 1), torch.cat([outer, thin[1]], 1)
        return self.residual.product(x, rounded, (h, outer))

    def transposed_product(self, dY: Tensor) -> Tensor:
        outer, inner = (part.detach().to(dY.dtype) for part in self.factors())
        return self.residual.transposed_product(dY).addmm_(dY @ outer, inner)

    def takes_rounded(self, rows: int, dtype: torch.dtype) -> bool:
        return self.residual.takes_rounded(rows, dtype)

    def forward(self, x: Tensor, rounded: RoundedRows | None = None) -> Tensor:
        """`x Q^T + (x R^T) L^T + b` in the dtype of x.

        **Shape**
            - x: (..., in); returns (..., out)

        Args:
            x: Input.
            rounded: Its rows in 8 bits, where they are known already; of no use with gradients, nor to a compiler.
        """
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._without_gradients(x, rounded)
        outer, inner, bias = self.cast(x.dtype, *self.factors(), self.bias)
        return self.residual.multiply(x) + F.linear(F.linear(x, inner), outer, bias)

    def _without_gradients(self, x: Tensor, rounded: RoundedRows | None) -> Tensor:
        rows, parts = x.reshape(-1, self.in_features), self.factors()
        # to cast the factors takes longer than to multiply few rows by them as they are; autocast would cast again
        few = len(rows) <= FEW_ROWS and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
        dtype = torch.promote_types(x.dtype, parts[0].dtype) if few else x.dtype
        outer, inner, bias = self.cast(dtype, *parts, self.bias)
        # a view of a parameter claims to need a gradient even here, and a recomputed block would ask for it
        thin = rows.to(dtype) @ inner.detach().t(), outer.detach()
        if dtype == x.dtype:
            y = self.residual.product(rows, rounded, thin)
        else:
            y = add_thin(self.residual.product(rows, rounded).to(dtype), thin)
        y = y if bias is None else y.add_(bias)
        return torch.ops.aten._unsafe_view(y.to(x.dtype), (*x.shape[:-1], self.out_features))  # no view: see _product

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual={self.residual.name}"


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias, requires_grad=False)
