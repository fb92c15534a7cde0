"""How any model is called with a batch, what it answers, and how its modules are watched meanwhile.

Everything that takes a batch (calibration, repair, estimates, profiles, plans) takes it in the same way. A batch is

* a mapping: keyword arguments of the model;
* a tensor: its only argument;
* a tuple or list: its first element is one of the two, and the model is called with that alone.

A tuple is what a `DataLoader` over pairs of inputs and targets yields (`TensorDataset`, torchvision). The target is
for a loss that the caller computes; as a second positional argument a transformers model would take it for its
attention mask, without a word. A model with several inputs gets them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .rescaling import without_rescaling

LABEL_KEYS = ("labels", "label", "label_ids")
UNFIT = (TypeError, AttributeError, IndexError)  # what models raise where a batch lacks or exceeds something


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------- a batch


class Arguments(NamedTuple):
    """What a model is called with: `model(*positional, **named)`."""

    positional: tuple[Tensor, ...]
    named: dict[str, Any]


def call_arguments(batch: Any) -> Arguments:
    """What a batch means.

    Raises:
        TypeError: If it is neither a mapping nor a tensor, nor a tuple or list that begins with one.
        ValueError: If it holds no tensor, or an empty one.

    Example:
        >>> images, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> call_arguments([images, labels]).positional[0] is images
        True
        >>> list(call_arguments({"pixel_values": images, "labels": labels}).named)
        ['pixel_values', 'labels']
    """
    first = batch
    if isinstance(batch, (tuple, list)):
        first = batch[0] if batch else {}
    if isinstance(first, Mapping):
        arguments = Arguments((), dict(first))
    elif isinstance(first, Tensor):
        arguments = Arguments((first,), {})
    else:
        got = _kind(batch) if first is batch else f"{_kind(batch)} that begins with {_kind(first)}"
        raise TypeError(f"a batch must be a mapping, a tensor, or a tuple that begins with one of them, got {got}.")
    tensors = tensors_in(arguments)
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"a batch must hold at least one tensor and no empty one, got shapes {shapes}.")
    return arguments


def _kind(value: Any) -> str:
    return type(value).__name__


def model_output(model: nn.Module, batch: Any, with_labels: bool = False) -> Any:
    """What a model answers a batch, which is moved to where the model is.

    Labels are left out unless they are asked for, or make the input of a decoder.

    Raises:
        TypeError: If the batch is of no known kind.
        ValueError: If it holds no input, or not what the model's forward pass needs.
    """
    positional, named = call_arguments(batch)
    if not with_labels:
        decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        # what a detector is to find is a list, and no input of its decoder
        inputs = {key for key, value in named.items() if decodes and isinstance(value, Tensor)}
        named = {key: value for key, value in named.items() if key in inputs or key not in LABEL_KEYS}
    if not positional and not set(named) - set(LABEL_KEYS):
        raise ValueError(f"a batch must hold model inputs, got only {sorted(call_arguments(batch).named)}.")
    device = next(model.parameters()).device
    named = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in named.items()}
    arguments = Arguments(tuple(value.to(device) for value in positional), named)
    with call_explained(model, arguments, (*UNFIT, ValueError)):
        return model(*arguments.positional, **arguments.named)


@contextmanager
def call_explained(
    model: nn.Module, arguments: Arguments, kinds: tuple[type[Exception], ...] = UNFIT
) -> Iterator[None]:
    """Says of an error in a forward pass which model it was, what the batch held and what to do.

    Args:
        model: What is called inside.
        arguments: With these.
        kinds: Errors that a batch makes that lacks something, or has something that the model does not take.

    Raises:
        ValueError: In the place of an error of these kinds.
    """
    try:
        yield
    except kinds as error:
        given, reason = ", ".join(arguments.named) or "one tensor", str(error).strip().rstrip(".")
        raise ValueError(
            f"{type(model).__name__} cannot run a batch of {given}: {reason}. Give batches that hold by name what its "
            "forward pass needs."
        ) from error


def token_mask(batch: Any) -> Tensor | None:
    """The attention mask of a batch, which says which tokens are no padding, if it has one."""
    mask = call_arguments(batch).named.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of (..., features), without those of padded tokens where the mask is one of these very tokens."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])


# ---------------------------------------------------------------- an answer


def features_of(output: Any) -> Tensor:
    """The features in a model's output: the last hidden state, the logits, or the first floating point tensor.

    Raises:
        ValueError: If it holds no floating point tensor.
    """
    for name in ("last_hidden_state", "logits"):
        value = _part(output, name)
        if isinstance(value, Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in (output, *values, *tensors_in(output)):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"the model's output must hold a floating point tensor, got {_kind(output)}.")


def loss_of(output: Any) -> Tensor | None:
    """The loss that a model gives, if it gives one."""
    loss = _part(output, "loss")
    return loss if isinstance(loss, Tensor) else None


def training_loss(output: Any) -> Tensor:
    """What a step goes back from: the model's own loss, or the sum of its features."""
    loss = loss_of(output)
    return features_of(output).sum() if loss is None else loss


def _part(output: Any, name: str) -> Any:
    """A named part of an output; some are properties that a mapping does not list."""
    return output[name] if isinstance(output, Mapping) and name in output else getattr(output, name, None)


# ---------------------------------------------------------------- modules, watched


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear layer is called with."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def differentiable(y: Tensor) -> Tensor:
    """The output of a layer, or a new start of the graph where every parameter before it is frozen."""
    return y if y.requires_grad else y.requires_grad_(True).clone()  # the model could not change a leaf in place


class Reached(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def hooked(
    root: nn.Module,
    names: Iterable[str],
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """`before(name, args, kwargs)` and `after(name, output)` around every call of some modules."""
    handles = []
    try:
        for name in names:
            module = root.get_submodule(name)
            if before is not None:

                def on_call(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    before(name, args, kwargs)

                handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
            if after is not None:

                def on_return(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    after(name, output)

                handles.append(module.register_forward_hook(on_return))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _config_of(module: nn.Module) -> Any:
    return getattr(module, "config", None)


@contextmanager
def evaluating(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Evaluation mode; frozen parameters, so that a backward pass computes no gradient of a weight.

    And no caches: they take memory, and recurrent ones are written to while autograd still needs what was there.
    """
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    configs: list[Any] = list({id(config): config for config in map(_config_of, training)}.values())
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for config in caching:
            config.use_cache = False
        with torch.set_grad_enabled(gradients), without_rescaling(model):
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
