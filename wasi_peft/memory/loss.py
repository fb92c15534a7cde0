"""Cross-entropy over a large vocabulary that never holds all logits.

A language model's head multiplies its hidden states by a (vocabulary, hidden) matrix. The logits, their float32 copy,
their log-softmax and its gradient are often the largest tensors of a training step. :class:`LinearCrossEntropy` forms
them for a few tokens at a time and turns each piece into gradients at once.

The technique :class:`ChunkedLoss` brings this to any transformers model without touching its code: in training, the
head returns :class:`DeferredLogits`, which know what they are the product of. Handed to `cross_entropy` they take the
path above; any other operation gets the ordinary logits. So a model that caps or scales its logits, or a loss with
label smoothing, computes what it always did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..forms.dense import METADATA
from ..forms.vocabulary import VocabularyWeight
from ..linalg.low_bit import row_tiles

CHUNK_BYTES = 16 * 2**20  # of one chunk of float32 logits, while that makes enough rows
LEAST_CHUNK_ROWS = 128  # each chunk reads the head's whole weight, so fewer cost time


def default_chunk_rows(vocabulary: int) -> int:
    """Tokens in a chunk: as many as make `CHUNK_BYTES` of float32 logits, but no fewer than `LEAST_CHUNK_ROWS`.

    With a hidden size of H, the least chunk takes `LEAST_CHUNK_ROWS / H` of the bytes of the head's float32 weight.
    """
    return max(LEAST_CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary))


def _to_loss_and_gradient(logits: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
    """Sum of the cross-entropies of the rows of `logits`, which become its gradient with respect to them."""
    targets = targets[:, None]
    top = logits.amax(1, keepdim=True)
    of_target = logits.gather(1, targets)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    loss = (total.log() + top - of_target).sum()
    if needs_gradient:
        logits.div_(total).scatter_add_(1, targets, torch.full_like(top, -1.0))
    return loss


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if isinstance(weight, VocabularyWeight):
        weight.vocabulary.product(x, out=out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _transposed_product(gradient: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, VocabularyWeight):
        return weight.vocabulary.transposed_product(gradient)
    return gradient @ weight


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the `kept` rows of `hidden weight^T + bias`, and its gradients, chunk by chunk.

    One chunk of logits is alive at a time; backward only scales what forward computed. The products run in the dtype
    of the inputs, the softmax in float32 (float64 for float64 inputs), gradients of half-precision weights are summed
    in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        mean: bool,
        chunk_rows: int,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        product = hidden.new_empty(min(chunk_rows, len(kept)), len(weight))
        tiles = row_tiles(
            len(product), len(weight), product.device
        )  # of a chunk: the passes of its softmax find them in a cache
        widened = None
        if precise != product.dtype:
            widened = hidden.new_empty(tiles[0].stop if tiles else 0, len(weight), dtype=precise)
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and needs[2] else None

        loss = hidden.new_zeros((), dtype=precise)
        for rows in kept.split(chunk_rows) if len(kept) else ():
            x, gradient = hidden[rows], product[: len(rows)]
            _product(x, weight, bias, out=gradient)
            for tile in tiles:
                part, targets = gradient[tile], labels[rows[tile]]
                logits = part if widened is None else widened[: len(part)].copy_(part)
                loss += _to_loss_and_gradient(logits, targets, needs_gradient=any(needs))
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                if widened is not None:
                    part.copy_(logits)
            if grad_hidden is not None:
                grad_hidden[rows] = _transposed_product(gradient, weight)
            if grad_weight is not None:
                if widened is None:
                    grad_weight.addmm_(gradient.T, x)
                else:
                    grad_weight += gradient.T @ x

        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.scale = 1 / max(1, len(kept)) if mean else 1.0
        return loss / len(kept) if mean else loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The chunked cross-entropy computes its gradient in the forward pass, so it can only be "
                "differentiated once, got backward with create_graph=True."
            )
        scale = grad_loss * ctx.scale
        gradients = (None if gradient is None else gradient * scale for gradient in ctx.saved_tensors)
        return *gradients, None, None, None, None


def _lowered_by_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype in which autocast, where it is on, multiplies matrices; one in 8 bits as it is."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    as_they_are = (type(None), VocabularyWeight)
    return tuple(tensor if isinstance(tensor, as_they_are) else tensor.to(dtype) for tensor in tensors)


def _kept_rows(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Indices of the rows whose label counts: all of them where labels have no values, as in an estimate."""
    if isinstance(labels, FakeTensor):
        return torch.arange(len(labels), device=labels.device)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if len(kept):
        least, most = int(labels[kept].min()), int(labels[kept].max())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"labels must be {ignore_index} (ignored) or in [0, {vocabulary}), got values from {least} to {most}."
            )
    return kept


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    chunk_rows: int | None,
) -> Tensor:
    """`LinearCrossEntropy` of (rows, hidden) states and (rows,) labels, outside autocast."""
    kept = _kept_rows(labels, ignore_index, len(weight))
    if not torch.is_grad_enabled():
        hidden, bias = hidden.detach(), None if bias is None else bias.detach()
        weight = weight if isinstance(weight, VocabularyWeight) else weight.detach()
    rows = chunk_rows or default_chunk_rows(len(weight))
    # what is saved are gradients, not activations: no pack hook in force may make them small
    with torch.autocast(hidden.device.type, enabled=False), saved_tensors_hooks(lambda x: x, lambda x: x):
        return LinearCrossEntropy.apply(hidden, weight, bias, labels, kept, mean, rows)


def _check_chunk_rows(rows: int | None, name: str = "chunk_rows") -> None:
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ValueError(f"{name} must be an integer of at least 1, or None, got {rows!r}.")


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Next-token cross-entropy of a language model's head, as `transformers` computes it from all logits at once.

    The loss is `cross_entropy(hidden[..., :-1, :] weight^T + bias, labels[..., 1:])`, with rows whose label is
    ignored left out before their logits are computed. Gradients with respect to the hidden states, and to `weight` and
    `bias` where they require one, are computed in the forward pass, a chunk of tokens at a time. With no label left it
    is nan (0 with `num_items_in_batch`) and its gradient 0, as in torch.

    **Shape**
        - hidden: (..., tokens, H); weight: (V, H); bias: (V,) or None; labels: (..., tokens); returns a scalar

    Args:
        hidden: What the head is given.
        weight: The head's weight; it may be that of the embedding, or stand for one in 8 bits.
        bias: The head's bias.
        labels: Token ids in [0, V) or `ignore_index`, not shifted.
        ignore_index: The label that is left out.
        num_items_in_batch: Divisor of the summed loss, for gradient accumulation; None takes the mean.
        chunk_rows: Tokens in a chunk; by default as many as make 16 MiB of float32 logits, at least 128.

    Returns:
        The loss in float32 (float64 for float64 inputs). Not differentiable twice.

    Raises:
        ValueError: If shapes or dtypes do not fit together, a label is out of range, or `chunk_rows` is not positive.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> labels = torch.randint(100, (2, 5))
        >>> full = F.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())
        >>> torch.allclose(chunked_cross_entropy(hidden, weight, None, labels, chunk_rows=3), full)
        True

    References:
        Hsu et al., "Liger Kernel", arXiv 2410.10989: the fused linear cross-entropy.
    """
    _check_chunk_rows(chunk_rows)
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., tokens, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}.")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(hidden.shape[:-1])}, got {labels.dtype} of {tuple(labels.shape)}."
        )
    hidden, weight, bias = _lowered_by_autocast(hidden, weight, bias)
    multiplied = (hidden, bias) if isinstance(weight, VocabularyWeight) else (hidden, weight, bias)
    dtypes = {tensor.dtype for tensor in multiplied if tensor is not None}
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden, weight and bias must have one floating dtype, got {sorted(map(str, dtypes))}.")
    following = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    mean = num_items_in_batch is None
    loss = _linear_cross_entropy(rows, weight, bias, following, ignore_index, mean, chunk_rows)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# -------------------------------------------------------------------- logits that are computed only when used


_StandIn = TypeVar("_StandIn", bound=Tensor)


def _stand_in(kind: type[_StandIn], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _StandIn:
    """A tensor of this subclass and shape that takes no memory, also where a mode would make a tensor of its own.

    It holds NaN, so that code which reads its memory past the subclass cannot take that for values.
    """
    with _disable_current_modes():
        return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape).as_subclass(kind)


@dataclass
class _Head:
    """What all tensors derived from one call of the head share; `used` once anything looked at the logits' values."""

    weight: Tensor
    bias: Tensor | None
    settings: ChunkedLoss
    grad_enabled: bool
    used: bool = False


class DeferredLogits(Tensor):
    """Logits of a head that have not been computed: shape, dtype and device, and what they are the product of.

    `cross_entropy` (mean or sum, no label smoothing or class weights) works on them in chunks, and so it does after
    `float`, `contiguous`, `view` and `reshape` that keep the vocabulary last, and slices of the other dimensions.
    Every other operation computes the ordinary logits, with their graph, and goes on with those; a warning says so
    unless `ChunkedLoss(warns=False)`.
    """

    _hidden: Tensor
    _head: _Head
    _compute: Callable[[Any], Tensor]
    _value: Tensor | None

    @staticmethod
    def create(hidden: Tensor, head: _Head, dtype: torch.dtype, compute: Callable[[Any], Tensor]) -> DeferredLogits:
        """Stand-in for the product of `hidden` with the head's weight, which `compute` returns when it is needed."""
        logits = _stand_in(DeferredLogits, (*hidden.shape[:-1], len(head.weight)), dtype, hidden.device)
        logits._hidden, logits._head, logits._compute, logits._value = hidden, head, compute, None
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DEFERRED and args and isinstance(args[0], DeferredLogits) and not args[0]._head.used:
            result = _DEFERRED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(DeferredLogits, lambda logits: logits.value(func), (args, kwargs))
        return func(*args, **kwargs)

    def value(self, wanted_by: Callable[..., Any]) -> Tensor:
        """The ordinary logits. They stay, so that what is done to them in place is not lost."""
        head = self._head
        if not head.used and head.settings.warns:
            warnings.warn(
                f"The logits were computed in full, because {getattr(wanted_by, '__name__', wanted_by)!r} was applied "
                "to them: ChunkedLoss saves nothing in this step.",
                UserWarning,
                stacklevel=4,
            )
        head.used = True
        if self._value is None:
            with torch.set_grad_enabled(head.grad_enabled), torch.autocast(self.device.type, enabled=False):
                self._value = self._compute(wanted_by)
        return self._value

    def derive(self, hidden: Tensor, dtype: torch.dtype, step: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """What `step` makes of these logits, still not computed; `hidden` are the states it is the product of."""
        return DeferredLogits.create(hidden, self._head, dtype, lambda wanted_by: step(self.value(wanted_by)))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, computed={self._head.used})"


def _deferred_float(logits: DeferredLogits) -> Any:
    return logits.derive(logits._hidden, torch.float32, Tensor.float)


def _deferred_contiguous(logits: DeferredLogits) -> Any:
    return logits.derive(logits._hidden, logits.dtype, Tensor.contiguous)


def _deferred_reshape(logits: DeferredLogits, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not all(isinstance(size, int) for size in sizes) or sizes[-1] != logits.shape[-1]:
        return NotImplemented
    hidden = logits._hidden.reshape(*sizes[:-1], logits._hidden.shape[-1])
    return logits.derive(hidden, logits.dtype, lambda value: value.reshape(sizes))


def _deferred_getitem(logits: DeferredLogits, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not index or not all(part is Ellipsis or isinstance(part, slice) for part in index):
        return NotImplemented
    reaches_vocabulary = Ellipsis in index or len(index) == logits.dim()
    if reaches_vocabulary and index[-1] not in (Ellipsis, slice(None)):
        return NotImplemented
    # the last dimension of the hidden states is another one, but it too is taken whole
    return logits.derive(logits._hidden[index], logits.dtype, lambda value: value[index])


def _deferred_cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or reduction not in ("mean", "sum") or logits.dim() != 2:
        return NotImplemented
    if target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        return NotImplemented
    head = logits._head
    loss = _linear_cross_entropy(
        logits._hidden, head.weight, head.bias, target, ignore_index, reduction == "mean", head.settings.rows
    )
    return loss.to(logits.dtype)


_DEFERRED: dict[Any, Callable[..., Any]] = {
    Tensor.float: _deferred_float,
    Tensor.contiguous: _deferred_contiguous,
    Tensor.view: _deferred_reshape,
    Tensor.reshape: _deferred_reshape,
    Tensor.__getitem__: _deferred_getitem,
    F.cross_entropy: _deferred_cross_entropy,
}


class _HeadInput(Tensor):
    """Stands for hidden states on their way into the head: `F.linear` on it gives :class:`DeferredLogits`."""

    _hidden: Tensor
    _settings: ChunkedLoss

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and type(args[0]) is _HeadInput:
            return _defer_linear(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(_HeadInput, lambda x: x._hidden, (args, kwargs or {}))
        return func(*args, **kwargs)


def _defer_linear(x: _HeadInput, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # quantized or distributed ones multiply their own way
    if type(weight) not in (Tensor, nn.Parameter, FakeTensor, VocabularyWeight):
        return F.linear(x._hidden, weight, bias)
    hidden, weight, bias = _lowered_by_autocast(x._hidden, weight, bias)
    head = _Head(weight, bias, x._settings, torch.is_grad_enabled())
    return DeferredLogits.create(hidden, head, hidden.dtype, lambda _: F.linear(hidden, weight, bias))


@dataclass(frozen=True)
class _DeferProduct:
    """Forward pre-hook of a head: in training, its product is put off until it is used."""

    settings: ChunkedLoss

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        symbolic = torch.compiler.is_compiling() or torch.jit.is_tracing()
        # nn.DataParallel gathers what its replicas return from their memory, past any subclass
        replica = getattr(head, "_is_replica", False)
        if not head.training or symbolic or replica or len(args) != 1 or type(args[0]) not in (Tensor, FakeTensor):
            return None
        hidden = args[0]
        x = _stand_in(_HeadInput, hidden.shape, hidden.dtype, hidden.device)
        x._hidden, x._settings = hidden, self.settings
        return (x,)


@dataclass(frozen=True)
class ChunkedLoss:
    """Technique: a transformers language model computes its training loss without ever holding all logits.

    In training mode the output's `logits` are then :class:`DeferredLogits`, and the loss is computed from them in
    chunks; values, gradients and `num_items_in_batch` are as before. In eval mode nothing changes. Models that do
    something to the logits before the loss (soft-capping, scaling) still compute them in full, and a warning says so
    with `warns`.

    The model stays as it is but for a hook on its head, which is copied with it and not saved. It may become a PEFT
    model before or after; after `resize_token_embeddings`, which makes a new head, install this again.

    Args:
        rows: Tokens in a chunk; by default as many as make 16 MiB of float32 logits, at least 128.
        warns: Whether a step that computes all logits nevertheless says so.

    Raises:
        ValueError: If `rows` is not positive.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).train()
        >>> ChunkedLoss().install(model)
        >>> tokens = torch.randint(50, (2, 6))
        >>> model(tokens, labels=tokens).logits
        DeferredLogits(shape=(2, 6, 50), dtype=torch.float32, computed=False)
    """

    rows: int | None = None
    warns: bool = True

    def __post_init__(self) -> None:
        _check_chunk_rows(self.rows, "rows")

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if the model has no output embedding, or that is not a plain linear layer."""
        _head_of(model)

    def install(self, model: nn.Module) -> None:
        """Put the head's product off; raises as :meth:`check`."""
        head = _head_of(model)
        self.remove(model)
        head.register_forward_pre_hook(_DeferProduct(self))

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`, wherever the head went since."""
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _DeferProduct):
                    del module._forward_pre_hooks[key]


def _head_of(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"the model must have an output embedding (a language model head), got {type(model).__name__}."
        )
    if isinstance(head, BaseTunerLayer) or not isinstance(head, (nn.Linear, AuxiliaryTrainingWrapper)):
        raise ValueError(
            "the head must be a plain linear layer without an adapter, because its product is formed in chunks from "
            f"its weight, got {type(head).__module__}.{type(head).__name__}."
        )
    return head
