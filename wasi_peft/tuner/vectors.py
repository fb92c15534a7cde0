"""The vectors of a model that train beside its factors, for each adapter its own.

Norms, layer scales, position and class tokens cost next to nothing, so they train with an adapter
(`WasiConfig.train_vectors`), and so do all biases with `bias="all"`; running statistics of batch norms follow the
data. They are parameters and buffers of the base model. The active adapter's are registered where the model looks for
them, under the names that the model gives them; those of other adapters, and the base model's own, wait here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forms.compressed import Compressed
from ..memory.wrapping import OWN_PARAMETERS, runner_of, unwrap, wrap

# layers that hold matrices, tables or filters: never "vectors that cost nothing"
_MATRIX_HOLDERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.modules.rnn.RNNBase,
    Conv1D,
)
_POSITION = re.compile(r"pos(ition)?_?(emb|bias)|position|cls_token|class_token|class_embedding|register|lambda|scale")


class Place(NamedTuple):
    """Where a vector is registered: a module, and the name of its parameter or buffer."""

    owner: nn.Module
    name: str

    @property
    def table(self) -> dict[str, Any]:
        """The owner's parameters, or its buffers, whichever the vector is one of."""
        return self.owner._parameters if self.name in self.owner._parameters else self.owner._buffers


def vector_places(model: nn.Module, vectors: bool = True, biases: bool = False) -> Iterator[tuple[str, Place]]:
    """Full names and places of what trains beside the factors, outside tuner layers and modules that are saved whole.

    Args:
        model: The base model, with or without adapters.
        vectors: Every parameter with a single long dimension that does not belong to a matrix-shaped layer, and
            position tables; not the mask token, which supervised training does not use. And the running statistics of
            batch norms.
        biases: Every bias.
    """
    skipped: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()  # of compressed layers, which hold a matrix and perhaps a bias
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            skipped += (prefix,)
        if isinstance(module, Compressed):
            forms += (prefix,)
        if prefix.startswith(skipped):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_vector = not prefix.startswith(forms) and _is_vector(module, name, parameter)
            if (vectors and is_vector) or (biases and name == "bias"):
                yield prefix + name, Place(module, name)
        if vectors and isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, _ in module.named_buffers(recurse=False):
                yield prefix + name, Place(module, name)


def _is_vector(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if isinstance(module, _MATRIX_HOLDERS) or "mask_token" in name:
        return False
    is_token = parameter.dim() > 1 and _POSITION.search(name) is not None
    return sum(size > 1 for size in parameter.shape) <= 1 or is_token


class ModelDtype:
    """What the layers of a model have been cast to, all of them, since they were made."""

    def __init__(self) -> None:
        self._made: set[torch.dtype] = set()
        self._layers: Counter[torch.dtype] = Counter()

    def add(self, dtype: torch.dtype) -> None:
        """There is one more layer."""
        self._made.add(dtype)
        self._layers[dtype] += 1

    def cast(self, before: torch.dtype, after: torch.dtype) -> None:
        """A layer has been cast."""
        self._layers[before] -= 1
        self._layers[after] += 1

    @property
    def value(self) -> torch.dtype | None:
        """The dtype; None as long as layers are as they were, or differ."""
        now = {dtype for dtype, count in self._layers.items() if count > 0}
        return next(iter(now)) if len(now) == 1 and now != self._made else None


class Lowered:
    """Runner of a module that computes with 16-bit casts of the vectors that it holds, for training, in float32.

    Outside the module's forward pass, the float32 vectors are what it holds. The casts pass gradients on. A model that
    is cast computes in its new dtype.

    Args:
        model_dtype: Of the model that the module is in.
    """

    level = OWN_PARAMETERS

    def __init__(self, model_dtype: ModelDtype) -> None:
        self._model_dtype = model_dtype
        self._dtypes: dict[str, torch.dtype] = {}  # by name of the vector, what the module computes in

    @classmethod
    def install(cls, module: nn.Module, name: str, dtype: torch.dtype, model_dtype: ModelDtype) -> None:
        """Have a module compute with one more of its vectors in a dtype."""
        lowered = runner_of(module, cls)
        if lowered is None:
            lowered = cls(model_dtype)
            wrap(module, lowered)
        lowered._dtypes[name] = dtype

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Leave a module with the 16-bit values of what it holds; nothing happens where this is not in use."""
        lowered = runner_of(module, cls)
        if lowered is None:
            return
        unwrap(module, cls)
        for name, dtype in lowered._dtypes.items():
            vector = module._parameters[name]
            if vector is not None:
                vector.data = vector.data.to(lowered._model_dtype.value or dtype)

    def __call__(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        table = forward.__self__._parameters
        high = {name: table[name] for name in self._dtypes if getattr(table.get(name), "dtype", None) == torch.float32}
        cast = self._model_dtype.value
        try:
            for name, vector in high.items():
                table[name] = vector.to(cast or self._dtypes[name])
            return forward(*args, **kwargs)
        finally:
            table.update(high)


class AdapterVectors:
    """The vectors of all adapters of one model. One object that all tuner layers of the model share.

    Attributes:
        active: The adapter whose vectors are registered in the model; None for the base model's own.
        model_dtype: What the model has been cast to.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.model_dtype = ModelDtype()
        self._places: dict[str, Place] = {}
        # by adapter (None: the base model) and full name; those of the active one may be older than what is registered
        self._values: dict[str | None, dict[str, Any]] = {}
        self._raised: set[str] = set()  # adapters whose vectors are held in float32, in a model of 16 bits

    @property
    def keeps_base(self) -> bool:
        """Whether the base model's own vectors are still there."""
        return not self._values or None in self._values

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters that have vectors."""
        return {name for name in self._values if name is not None}

    def names(self, adapter: str) -> tuple[str, ...]:
        """Full names of an adapter's vectors."""
        return tuple(self._values.get(adapter, ()))

    def add(self, adapter: str, places: dict[str, Place], keep_base: bool, source: str | None = None) -> None:
        """Give an adapter vectors of its own, equal to those of the base model, or of another adapter.

        Args:
            adapter: Its name.
            places: By full name.
            keep_base: Whether the base model's own stay, for when no adapter is active. Otherwise the first adapter
                takes them over as they are.
            source: The other adapter; by default the base model, where its vectors were kept, else the active one.
        """
        registered = {name: place.table[place.name] for name, place in places.items()}
        if not self._values and not keep_base:
            self._values[adapter], self.active = registered, adapter
        else:
            if self.keeps_base:
                base = self._values.setdefault(None, {})
                base |= {name: value for name, value in registered.items() if name not in base}
                for value in base.values():
                    if isinstance(value, nn.Parameter):
                        value.requires_grad_(False)
                registered |= base
            registered |= dict(self.items(source)) if source is not None else {}
            copies = {id(registered[name]): _copy(registered[name]) for name in places}  # tied ones stay tied
            self._values[adapter] = {name: copies[id(registered[name])] for name in places}
        self._places |= places

    def hold_in_float32(self, adapter: str) -> None:
        """Hold an adapter's 16-bit vectors in float32, so that small steps are not lost; the model computes as before.

        Source: mixed precision training, master weights (arXiv 1710.03740).
        """
        raised: dict[int, nn.Parameter] = {}  # tied ones stay tied
        for name, vector in list(self.items(adapter)):
            if not isinstance(vector, nn.Parameter) or vector.dtype not in (torch.float16, torch.bfloat16):
                continue
            self._raised.add(adapter)
            owner, key = self._places[name]
            Lowered.install(owner, key, vector.dtype, self.model_dtype)
            if id(vector) not in raised:
                raised[id(vector)] = nn.Parameter(vector.detach().float(), vector.requires_grad)
            self._values[adapter][name] = raised[id(vector)]
            if adapter == self.active:
                self._places[name].table[key] = raised[id(vector)]

    def lower(self) -> None:
        """Leave the model with vectors in 16 bits again, for when it has no adapters any more."""
        for owner, _ in self._places.values():
            Lowered.remove(owner)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's vectors; where they are in use, the base model's come back, if there are any.

        Otherwise they stay registered until another adapter's take their places.
        """
        if adapter == self.active:
            self.activate(None)
            self.active = None
        self._values.pop(adapter, None)
        self._raised.discard(adapter)

    def activate(self, adapter: str | None) -> None:
        """Register the vectors of an adapter, or those of the base model for None and for an adapter without any."""
        target = adapter if adapter in self._values else None
        if target == self.active or target not in self._values:
            return
        leaving, coming = self._values.get(self.active, {}), self._values[target]
        leaving |= dict(self._registered(leaving))  # wrappers for distributed training replace parameters
        base = self._values.get(None, {})
        for name in {**leaving, **coming}:
            place = self._places[name]
            value = coming[name] if name in coming else base[name]
            like = place.table[place.name]
            own_dtype = target in self._raised or self.active in self._raised
            place.table[place.name] = _moved(value, like.device, value.dtype if own_dtype else like.dtype)
        self.active = target

    def one_of(self, adapters: Sequence[str]) -> str | None:
        """The one adapter among these that has vectors, None if none has.

        Raises:
            ValueError: If several of them have.
        """
        trained = [name for name in adapters if name in self._values]
        if len(trained) > 1:
            raise ValueError(f"only one adapter that trains vectors of the model can be active, got {trained}.")
        return trained[0] if trained else None

    def activate_one_of(self, adapters: Sequence[str]) -> None:
        """Register the vectors of the one adapter among these that has any; raises as :meth:`one_of`."""
        self.activate(self.one_of(adapters))

    def require_grad(self, adapter: str, trains: bool) -> None:
        """Have an adapter's vectors train or not."""
        for _, vector in self.items(adapter):
            if isinstance(vector, nn.Parameter):
                vector.requires_grad_(trains)

    def items(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        """Full names and vectors of an adapter, whether it is active or not."""
        values = self._values.get(adapter, {})
        yield from self._registered(values) if adapter == self.active else values.items()

    def base_items(self) -> Iterator[tuple[str, Tensor]]:
        """Full names and vectors of the base model, where they were kept."""
        values = self._values.get(None, {})
        yield from self._registered(values) if self.active is None else values.items()

    def tensors(self) -> Iterator[Tensor]:
        """All that are held: those of every adapter, and the base model's own where they are kept."""
        for values in self._values.values():
            yield from values.values()

    def _registered(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            place = self._places[name]
            yield name, place.table[place.name]


def _copy(vector: Tensor) -> Tensor:
    if isinstance(vector, nn.Parameter):
        return nn.Parameter(vector.detach().clone(), vector.requires_grad)
    return vector.detach().clone()


def _moved(vector: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A vector that waited while the model was moved or cast."""
    if vector.is_floating_point() and (vector.device != device or vector.dtype != dtype):
        vector.data = vector.data.to(device, dtype)
    return vector
