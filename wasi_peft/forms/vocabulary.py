"""A language model's vocabulary in 8 bits: the table that embeds tokens, and the head that is tied to it or not.

In a small language model this table is half of the weights (SmolLM2-135M: 108 of 214 MiB once its other layers are in
8 bits). The modules stay, with class, hooks and place in the model; what changes is their `weight`, for which a
stand-in answers (:class:`VocabularyWeight`). So code that scales embeddings, moves or counts them works as before.

Rows of a product are not rounded to 8 bits as in other layers: of the gradient of the logits, whose rows are
probabilities, that loses 13 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from ..linalg.low_bit import TILE, RoundedRows
from .dense import LOST, METADATA, StandIn, build_dense, refuse_in_place
from .products import ProductChoice, Thin, WeightOnlyProduct, add_thin
from .residual import Int8Residual

VOCABULARIES = ("int8",)
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
NAME = "vocabulary"  # of the child that holds the codes, in each of the modules


class Vocabulary(Int8Residual):
    """Codes of a vocabulary, (V, H), one scale a token. For products they are restored, some tokens at a time.

    Rows in float32 are multiplied in bfloat16 where that is faster on this machine, or as `products` asks for.
    """

    def look_up(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens: (...) to (..., H), in the dtype of the model."""
        return self.restore(F.embedding(tokens, self.codes), F.embedding(tokens, self.scale))

    def take(self, index: Any) -> Tensor:
        """`weight[index]` of the table in full; where the index begins with rows, others are not restored."""
        first, *others = index if isinstance(index, tuple) else (index,)
        if isinstance(first, (int, slice, Tensor)) and all(isinstance(other, slice) for other in others):
            rows = self.restore(self.codes[first], self.scale[first])
            return rows[(..., *others)] if others else rows
        return self.dense_weight()[index]

    def product(
        self, x: Tensor, rounded: RoundedRows | None = None, thin: Thin | None = None, out: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Residual.product`, in `out` if there is one, (rows, V) in the dtype of x."""
        y = x.new_empty(len(x), self.out_features) if out is None else out
        product, scale = self.products.restored(x, self.codes), self.scale.t()
        if issubclass(product, WeightOnlyProduct):
            torch.mul(product.with_codes(x, self.codes_for(product)), scale, out=y)
            return add_thin(y, thin)
        dtype = product.compute or x.dtype
        rows = x.to(dtype)
        for part in self._parts(len(x)):
            if dtype == torch.float16:  # whose range a product with codes would leave
                torch.mm(rows, self.restore(self.codes[part], self.scale[part], dtype).t(), out=y[:, part])
            else:
                torch.mul(rows @ self.codes[part].to(dtype).t(), scale[:, part], out=y[:, part])
        return add_thin(y, thin)

    def transposed_product(self, dY: Tensor) -> Tensor:
        dtype, scale = self._compute_dtype(dY), self.scale.t()
        dX = dY.new_zeros(len(dY), self.in_features, dtype=torch.promote_types(dY.dtype, torch.float32))
        for part in self._parts(len(dY)):
            if dtype == torch.float16:
                dX += dY[:, part] @ self.restore(self.codes[part], self.scale[part], dtype)
            else:
                dX += (dY[:, part] * scale[:, part]).to(dtype) @ self.codes[part].to(dtype)
        return dX.to(dY.dtype)

    def _parts(self, rows: int) -> Iterator[slice]:
        """Ranges of tokens, whose restored rows and whose columns of a product are small temporary tensors."""
        step = max(1, TILE // max(1, rows, self.in_features))
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.products.restored(x, self.codes).compute or x.dtype


class VocabularyWeight(Tensor):
    """Stand-in for the table in full: rows are looked up and products formed from its codes.

    A tensor in the eyes of autograd and of code that asks for one, without values: `F.embedding`, `F.linear` and rows
    (`weight[tokens]`, `weight[start:stop]`) are computed from the codes, any other operation restores the table for
    that one use. It cannot be changed in place, except by a factor. Dtype and device are those of the model at the
    moment, which may be moved or cast after this was made.

    Args:
        vocabulary: The codes.
    """

    vocabulary: Vocabulary

    @staticmethod
    def __new__(cls, vocabulary: Vocabulary) -> VocabularyWeight:
        shape = (vocabulary.out_features, vocabulary.in_features)
        weight: VocabularyWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=vocabulary.dtype, device=vocabulary.codes.device
        )
        weight.__dict__.update(vocabulary=vocabulary, _is_hf_initialized=True)  # transformers must not fill it
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding and isinstance(args[1], VocabularyWeight):
            return args[1].vocabulary.look_up(args[0])
        if func is F.linear and isinstance(args[1], VocabularyWeight) and type(args[0]) in _PLAIN:
            return _linear(args[1].vocabulary, args[0], *args[2:], **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[0], VocabularyWeight):
            return args[0].vocabulary.take(args[1])
        name = getattr(func, "__name__", "")
        if isinstance(kwargs.get("out"), VocabularyWeight):
            refuse_in_place(f"{name}_")
        if args and isinstance(args[0], VocabularyWeight):
            refuse_in_place(name)
        restored = tree_map_only(VocabularyWeight, VocabularyWeight.multiplied_out, (args, kwargs))
        return func(*restored[0], **restored[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What reaches the dispatcher past the above."""
        restored = tree_map_only(VocabularyWeight, VocabularyWeight.multiplied_out, (args, kwargs or {}))
        return func(*restored[0], **restored[1])

    def multiplied_out(self) -> Tensor:
        """The table in full, a tensor of its own."""
        return self.vocabulary.dense_weight()

    def mul_(self, factor: Any) -> VocabularyWeight:
        """Multiply the table by a number, for good."""
        if not isinstance(factor, (int, float)):
            refuse_in_place("mul_")
        self.vocabulary.rescale(float(factor))
        return self

    def div_(self, divisor: Any) -> VocabularyWeight:  # type: ignore[override]
        """Divide the table by a number, for good."""
        return self.mul_(1 / divisor)

    def requires_grad_(self, requires_grad: bool = True) -> VocabularyWeight:
        """As it is: nobody trains a stand-in."""
        self.requires_grad = requires_grad
        return self

    def data_ptr(self) -> int:
        """Of the codes: by this, PEFT and others tell whether modules share a weight."""
        return self.vocabulary.codes.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the codes."""
        return self.vocabulary.codes.untyped_storage()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.vocabulary.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.vocabulary.codes.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return self.device.type == "meta"

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(Tensor, name):
            self.__dict__[name] = value  # libraries note things on tensors
        elif name != "requires_grad" or value:
            raise AttributeError(LOST.format(what=f"{name} cannot be set"))

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"VocabularyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabularyWeight:
        if id(self) not in memo:
            memo[id(self)] = VocabularyWeight(copy.deepcopy(self.vocabulary, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return VocabularyWeight, (self.vocabulary,)


StandIn.register(VocabularyWeight)


def _linear(vocabulary: Vocabulary, x: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = vocabulary.multiply(x)
    return y if bias is None else y + bias.to(y.dtype)


# ---------------------------------------------------------------- in a model


def _owners(model: nn.Module, weight: Tensor) -> dict[str, nn.Module]:
    """The modules that have a parameter as theirs, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(parameter is weight for parameter in module._parameters.values())
    }


def _tables(model: nn.Module) -> dict[str, Any]:
    """The module that embeds tokens and, in a language model, the head, by what they are."""
    makers = {"embedding": "get_input_embeddings", "head": "get_output_embeddings"}
    found = {}
    for what, maker in makers.items():
        try:
            found[what] = getattr(model, maker, lambda: None)()
        except NotImplementedError:  # of a model that has none
            found[what] = None
    return {what: module for what, module in found.items() if module is not None}


def check_vocabulary(model: nn.Module, trained: Callable[[str], bool] = lambda name: False) -> None:
    """Refuse, before anything changes, a model whose vocabulary cannot be rounded.

    Args:
        model: The base model, with or without adapters in it.
        trained: Whether a module, by its name, is going to train.

    Raises:
        ValueError: If it embeds no tokens, or the embedding or the head is no plain module with a dense weight of its
            own, trains, or changes as it is used.
    """
    tables = _tables(model)
    if not isinstance(tables.get("embedding"), nn.Embedding):
        found = type(tables["embedding"]).__name__ if "embedding" in tables else "none"
        raise ValueError(
            f"vocabulary='int8' needs a model that embeds tokens by an nn.Embedding, got {type(model).__name__} with "
            f"{found}."
        )
    for what, module in tables.items():
        own_name = next(name for name, other in model.named_modules() if other is module)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or trained(own_name):
            raise ValueError(f"vocabulary='int8' keeps the {what} frozen, but {own_name} is to train.")
        if isinstance(getattr(module, "weight", None), VocabularyWeight):
            continue
        weight = module._parameters.get("weight")
        if type(weight) not in _PLAIN or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"vocabulary='int8' needs a dense weight of floating point numbers in the {what}, got "
                f"{type(module).__name__} with {type(weight).__name__}."
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            raise ValueError(
                f"vocabulary='int8' keeps the {what} as it is, but it has max_norm={module.max_norm} and "
                f"sparse={module.sparse}."
            )
        for name, owner in _owners(model, weight).items():
            if not isinstance(owner, (nn.Embedding, nn.Linear)):
                raise ValueError(
                    f"{name}: vocabulary='int8' rounds tables of nn.Embedding and nn.Linear, and this "
                    f"{type(owner).__name__} shares one."
                )


@torch.no_grad()
def rounded_vocabulary(model: nn.Module, products: ProductChoice) -> list[tuple[Tensor, Vocabulary]]:
    """The weights of the embedding of tokens and of the head, one where they are tied, each with its codes.

    Args:
        model: One that passes :func:`check_vocabulary`; not changed.
        products: How layers of the model multiply.
    """
    weights = [table._parameters.get("weight") for table in _tables(model).values()]
    if len(weights) > 1 and weights[0] is weights[1]:
        del weights[1]
    return [
        (weight, Vocabulary(build_dense(nn.Linear, weight.detach(), None), products))
        for weight in weights
        if weight is not None  # else it is rounded already
    ]


def hold_rounded(model: nn.Module, rounded: list[tuple[Tensor, Vocabulary]]) -> None:
    """Put the codes of :func:`rounded_vocabulary` in the place of the weights, in every module that has one."""
    for weight, vocabulary in rounded:
        for owner in _owners(model, weight).values():
            _hold(owner, vocabulary.train(owner.training))


def _hold(module: nn.Module, vocabulary: Vocabulary) -> None:
    del module._parameters["weight"]
    module._modules[NAME] = vocabulary
    module.__dict__["weight"] = VocabularyWeight(vocabulary)


@torch.no_grad()
def restore_vocabulary(model: nn.Module) -> None:
    """Undo :func:`hold_rounded` with the rounded values; nothing happens where it is not in use."""
    restored: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        vocabulary = module._modules.get(NAME)
        if not isinstance(vocabulary, Vocabulary):
            continue
        if id(vocabulary) not in restored:
            restored[id(vocabulary)] = nn.Parameter(vocabulary.dense_weight(), requires_grad=False)
        del module._modules[NAME], module.__dict__["weight"]
        module._parameters["weight"] = restored[id(vocabulary)]
