"""Block recomputation: of a transformer block only its input is kept, in few bits if wanted; backward runs it again.

The first pass of a block records nothing, so its layers take the path of inference: no input is compressed, no basis
moves. What it returns is exact, also where the kept input is rounded: rounding moves the point at which one block's
gradient is taken, and does not add up from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import _get_autocast_kwargs, _infer_device_type, get_device_states, set_device_states

from ..models.structure import blocks_of, hidden_states
from . import quantization
from .pieces import unpartial, without_caches
from .quantization import Quantized, bits_per_value, dequantize, quantize
from .recording import records
from .watching import Watch
from .wrapping import unwrap_all, wrap

KINDS = ("exact", *quantization.KINDS)
HANDS_ON = object()  # in place of a result: of a function that leaves tensors in its arguments
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes


def _check_kind(kind: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")


# -------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class _Kept:
    """A tensor as it is kept: `parts` go to autograd, `restore` makes the tensor of them."""

    parts: tuple[Tensor | None, ...]
    restore: Callable[..., Tensor]


def _keep(tensor: Tensor, kind: str) -> _Kept:
    """A tensor in parts. Those of a rounded one are integers, so that hooks around the model do not round it again."""
    smaller = kind != "exact" and tensor.is_floating_point() and 8 * tensor.itemsize > bits_per_value(kind)
    if not smaller:
        return _Kept((tensor,), lambda part: part)
    rounded = quantize(tensor, kind)
    parts = (rounded.packed, rounded.rest)
    dtypes = [part.dtype for part in parts]
    form = (rounded.dtype, rounded.shape, rounded.stride)

    def restore(*parts: Tensor) -> Tensor:
        packed, rest = map(Tensor.view, parts, dtypes)
        return dequantize(Quantized(kind, packed, rest, *form))

    return _Kept(tuple(part.view(INTEGERS[part.itemsize]) for part in parts), restore)


@dataclass(frozen=True)
class _Surroundings:
    """Random and autocast state of a moment, to be replayed as `torch.utils.checkpoint` does."""

    device_type: str
    random_state: Tensor
    device_random_states: tuple[list[int], list[Tensor]]
    autocast: tuple[dict[str, Any] | None, dict[str, Any]]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> _Surroundings:
        device_type = _infer_device_type(*tensors)
        states = get_device_states(*tensors)
        return cls(device_type, torch.get_rng_state(), states, _get_autocast_kwargs(device_type))

    @contextmanager
    def again(self) -> Iterator[None]:
        devices, states = self.device_random_states
        on_device, on_cpu = self.autocast
        device_autocast = nullcontext() if on_device is None else torch.autocast(self.device_type, **on_device)
        with torch.random.fork_rng(devices, device_type=self.device_type):
            torch.set_rng_state(self.random_state)
            set_device_states(devices, states, device_type=self.device_type)
            with device_autocast, torch.autocast("cpu", **on_cpu):
                yield


# -------------------------------------------------------------------- the call of a block


class _Call:
    """The call of a function, its tensor arguments taken out: `tensors` holds each of them once."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = tree_flatten((args, kwargs))
        self._function = function
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        places = {key: place for place, key in enumerate(distinct)}
        self._places = [places.get(id(leaf)) for leaf in leaves]
        self.tensors = list(distinct.values())
        # the modules that take part: the owner of a bound method or an argument, and all that is in them
        owners = (getattr(function, "__self__", function), *self._fixed)
        self.modules = dict.fromkeys(
            part for owner in owners if isinstance(owner, nn.Module) for part in owner.modules()
        )

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        pairs = zip(self._fixed, self._places, strict=True)
        args, kwargs = tree_unflatten([fixed if at is None else tensors[at] for fixed, at in pairs], self._spec)
        return self._function(*args, **kwargs)

    def left_in_arguments(self) -> list[Tensor]:
        """Tensors in mappings among the arguments that blocks hand each other, such as keys and values to share."""
        mappings = [dict(value) for value in self._fixed if isinstance(value, MutableMapping)]
        return [leaf for leaf in tree_leaves(mappings) if isinstance(leaf, Tensor)]

    def parameters(self) -> Iterator[Tensor]:
        """Those of the modules that take part."""
        for module in self.modules:
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)

    @contextmanager
    def without_traces(self) -> Iterator[None]:
        """Leaves tensors that modules note in plain attributes as they were: a state that goes on from call to call.

        Such a tensor would hold the graph of this call, and the next call would go back through it.
        """
        tables = [module.__dict__ for module in self.modules]
        noted = [
            (table, {key: value for key, value in table.items() if isinstance(value, Tensor)}) for table in tables
        ]
        try:
            yield
        finally:
            for table, tensors in noted:
                table.update(tensors)


_CHOICES = frozenset(("topk", "argmax", "argsort", "sort"))


class _Sources(Watch):
    """Notes the tensors with `requires_grad` that operations meet.

    While nothing is recorded, no operation makes such a tensor, so all of them come from outside.

    Args:
        modules: Whose parameters need not be noted.

    Attributes:
        met: The tensors, by identity.
        chose: Whether an operation picked the largest of some values, as routers of experts do.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self.met: dict[int, Tensor] = {}
        self.chose = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.chose |= getattr(func, "__name__", None) in _CHOICES
        self._note(args)
        self._note(kwargs.values())
        return func(*args, **kwargs)

    def skip(self, layer: nn.Module, x: Tensor) -> None:
        self._note((x,) if layer in self._modules else (x, *layer.parameters()))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._note(value)
            elif isinstance(value, Tensor) and value.requires_grad:
                self.met[id(value)] = value


def _check_independent(captured: Sequence[Tensor]) -> None:
    """Refuse a captured tensor that was computed from another one: its gradient would reach that one twice."""
    nodes = {tensor.grad_fn: tensor for tensor in captured if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in captured if tensor.grad_fn is None}
    waiting = [below for node in nodes for below, _ in node.next_functions]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes or id(getattr(node, "variable", None)) in leaves:
            raise ValueError(
                "A tensor that a recomputed block reads from outside must not depend on another such tensor or on a "
                f"parameter of the block, got one of shape {[tuple(tensor.shape) for tensor in nodes.values()]} that "
                "does. Pass it to the block as an argument."
            )
        waiting.extend(below for below, _ in node.next_functions)


@contextmanager
def _hooks_asleep(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensor hooks run once, on the gradient that leaves the block, and not on the way to it as well."""
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(registered) for registered in hooks]
    try:
        for registered in hooks:
            registered.clear()
        yield
    finally:
        for registered, before in zip(hooks, kept, strict=True):
            registered.update(before)


@dataclass(frozen=True)
class _Plan:
    """How backward gets the gradients of a block.

    Attributes:
        call: The block's call, without its tensors.
        restores: What makes each tensor argument of its kept parts, with the number of parts.
        differentiable: Whether each tensor argument needs a gradient.
        captured: Parameters, and other tensors that the block reads from outside, that need one.
        versions: Their versions in the first pass.
        recorded: Which leaves of the block's output autograd knows.
        surroundings: Random and autocast state of the first pass.
    """

    call: _Call
    restores: list[tuple[int, Callable[..., Tensor]]]
    differentiable: list[bool]
    captured: list[Tensor]
    versions: list[int]
    recorded: list[int]
    surroundings: _Surroundings

    def arguments(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        remaining = iter(parts)
        arguments = []
        for (count, restore), differentiable in zip(self.restores, self.differentiable, strict=True):
            tensor = restore(*(next(remaining) for _ in range(count)))
            arguments.append(tensor.detach().requires_grad_(differentiable))
        return arguments

    def gradients(self, parts: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Gradients of the differentiable arguments and of what is captured."""
        for tensor, version in zip(self.captured, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} that a recomputed block reads was modified in place "
                    f"between forward and backward (version {version} became {tensor._version})."
                )
        arguments = self.arguments(parts)
        with self.surroundings.again(), torch.enable_grad(), self.call.without_traces():
            leaves = tree_leaves(self.call(arguments))
        outputs = [leaves[index] for index in self.recorded]
        reached = [
            (get_gradient_edge(output), grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        del leaves, outputs  # autograd needs the edges, not the values
        inputs = [tensor for tensor in arguments if tensor.requires_grad] + self.captured
        if not reached:
            return [None] * len(inputs)
        with _hooks_asleep(self.captured):
            edges, reaching = zip(*reached, strict=True)
            return torch.autograd.grad(edges, inputs, reaching, allow_unused=True)


class _Recompute(torch.autograd.Function):
    """Gives outputs that were computed without a graph their place in it."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, parts: list[Tensor | None], outputs: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*parts)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.plan.gradients(ctx.saved_tensors, grads)


@dataclass(frozen=True)
class BlockRecomputation:
    """Runs a function without recording it, keeps its input, and runs it again in backward.

    Takes the place of `torch.utils.checkpoint.checkpoint` where a transformers model asks for a
    `gradient_checkpointing_func`. Hidden states (the first argument) are kept as `kind` says, all other arguments as
    they are. Gradients reach tensors anywhere in the arguments and in nested tuples, lists and dicts of them,
    parameters, and tensors that the function reads from outside. Random numbers and autocast are those of the first
    pass. A function that leaves tensors in a mapping among its arguments, for others to read, is recorded as usual:
    without a graph they would have no gradient. Not differentiable twice.

    Args:
        kind: How hidden states are kept: "exact", or rounded (:mod:`quantization`): "int16" or "bf16", in
            about 2 bytes an element, "int8" in 1.08, "int4" in 0.58.

    Raises:
        ValueError: If `kind` is none of these.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(2, 4, requires_grad=True)
        >>> BlockRecomputation("exact")(block, x).sum().backward()
        >>> gradient = x.grad.clone()
        >>> x.grad = None
        >>> block(x).sum().backward()
        >>> torch.allclose(x.grad, gradient)
        True
    """

    kind: str = "exact"

    def __post_init__(self) -> None:
        _check_kind(self.kind)

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns.

        Raises:
            ValueError: If the function reads, from outside, a tensor that depends on another such tensor.
            RuntimeError: If the function modifies an argument in place; in backward, if a tensor it needs was
                modified since.
        """
        result = self.attempt(function, *args, **kwargs)
        return function(*args, **kwargs) if result is HANDS_ON else result

    @torch.compiler.disable
    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same, but `HANDS_ON` where the function leaves tensors in its arguments."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        function, args, kwargs = unpartial(function, args, kwargs)
        block = getattr(function, "__self__", function)
        if isinstance(block, nn.Module) and records(block):
            return function(*args, **kwargs)
        hidden = hidden_states(args, kwargs)
        call = _Call(function, args, kwargs)
        arguments, call.tensors = call.tensors, []
        there = call.left_in_arguments()
        surroundings = _Surroundings.now(arguments)
        versions = [tensor._version for tensor in arguments]
        with torch.no_grad(), _Sources(call.modules) as sources:
            result = call(arguments)
        if any(tensor is not before for tensor, before in zip_longest(call.left_in_arguments(), there)):
            return HANDS_ON
        if versions != [tensor._version for tensor in arguments]:
            raise RuntimeError("A block that is recomputed must not modify its arguments in place, and this one did.")
        kind = self.kind if not sources.chose or self.kind == "exact" else "int16"  # so that it chooses again the same
        kept = [_keep(tensor, kind if tensor is hidden else "exact") for tensor in arguments]

        own = {id(tensor) for tensor in arguments}
        met = {id(tensor): tensor for tensor in call.parameters() if tensor.requires_grad} | sources.met
        captured = [tensor for key, tensor in met.items() if key not in own]
        _check_independent(captured)
        leaves, structure = tree_flatten(result)
        recorded = [index for index, leaf in enumerate(leaves) if _is_new(leaf, own)]
        inputs = [tensor for tensor in arguments if tensor.requires_grad] + captured
        if not inputs or not recorded:
            return result
        plan = _Plan(
            call,
            [(len(tensor.parts), tensor.restore) for tensor in kept],
            [tensor.requires_grad for tensor in arguments],
            captured,
            [tensor._version for tensor in captured],
            recorded,
            surroundings,
        )
        parts = [part for tensor in kept for part in tensor.parts]
        outputs = _Recompute.apply(plan, parts, [leaves[index].detach() for index in recorded], *inputs)
        for index, output in zip(recorded, outputs, strict=True):
            leaves[index] = output
        return tree_unflatten(leaves, structure)


def _is_new(leaf: Any, own: set[int]) -> bool:
    """Whether a leaf of the output was computed, rather than handed through, and can have a gradient."""
    if not isinstance(leaf, Tensor) or leaf.requires_grad or id(leaf) in own:
        return False
    return leaf.is_floating_point() or leaf.is_complex()


# -------------------------------------------------------------------- models


class _Recomputed:
    """Calls a block by :class:`BlockRecomputation` in training mode, unless the model checkpoints it on its own."""

    def __init__(self, kind: str) -> None:
        self.recomputation = BlockRecomputation(kind)
        self.hands_on = False  # whether the block was seen to leave tensors in its arguments

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block: nn.Module = forward.__self__  # type: ignore[attr-defined]
        if not block.training or getattr(block, "gradient_checkpointing", False):
            return forward(*args, **kwargs)
        args, kwargs = without_caches(block, args, kwargs)
        result = HANDS_ON if self.hands_on else self.recomputation.attempt(forward, *args, **kwargs)
        if result is HANDS_ON:
            self.hands_on = True
            return forward(*args, **kwargs)
        return result


@dataclass(frozen=True)
class RecomputedBlocks:
    """Technique: the blocks of a model keep their input only, and run again in backward (:class:`BlockRecomputation`).

    In training mode. Blocks get no cache of keys and values then, as under the gradient checkpointing of
    transformers; where that is on, it stays in charge.

    Args:
        kind: How the input of a block is kept.

    Raises:
        ValueError: If `kind` is unknown.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = ViTModel(small).train()
        >>> RecomputedBlocks("int8").install(model)
        >>> model(torch.randn(2, 3, 224, 224)).last_hidden_state.sum().backward()
        >>> RecomputedBlocks().remove(model)
    """

    kind: str = "exact"

    def __post_init__(self) -> None:
        _check_kind(self.kind)

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no blocks."""
        blocks_of(model)

    def install(self, model: nn.Module) -> None:
        """Have the blocks run again; raises as :meth:`check`."""
        blocks = blocks_of(model).blocks
        self.remove(model)
        for block in blocks.values():
            wrap(block, _Recomputed(self.kind))

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _Recomputed)
