"""Optimizer steps inside backward: a gradient is used and freed as soon as it is complete, parameter by parameter."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tuner.steps import step_in_parts
from .optimizer import check_single_process
from .subspace_sgd import SubspaceSGD

CONSUMED = (
    "OptimizerInBackward has already used and freed this gradient, and {action} came too late for it. Leave out what "
    "changes or reads gradients between backward and step: clipping (max_grad_norm=0 in TrainingArguments), gradient "
    "scalers (fp16=True), accumulation (gradient_accumulation_steps must be 1; call step after every backward)."
)


class _Consumed(Tensor):
    """Stands in `.grad` for a gradient that is gone, and refuses to be used; it has no memory.

    The Trainer takes the norm of all gradients also where it does not clip. That norm, unknown here, is infinite:
    then "clipping" to an infinite norm multiplies by NaN, which is let pass, and to any other one by zero.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor) -> _Consumed:
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "storage_size": 0}
        return Tensor._make_wrapper_subclass(cls, like.shape, **kind)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.linalg_vector_norm.default:
            return torch.full((), torch.inf, dtype=args[0].dtype, device=args[0].device)
        if func is torch.ops.aten.mul_.Tensor and bool(torch.as_tensor(args[1]).isnan()):
            return args[0]
        raise RuntimeError(CONSUMED.format(action=func))


class OptimizerInBackward(torch.optim.Optimizer):
    """Has an optimizer step each parameter inside backward, as soon as its gradient is complete, and frees the latter.

    So one gradient exists at a time instead of all (of a recomputed block: those of the block). The values are, bit
    for bit, those of the optimizer itself. `step` ends the step: it sets off what torch does after the step of an
    optimizer, WASI's retraction included. Learning rates, state and parameter
    groups are those of the optimizer; schedulers and `state_dict` work.

    In a `Trainer`, pass it as `optimizers=(optimizer, None)` and set `max_grad_norm=0`. There, `grad_norm` is logged
    as infinite, for nobody knows it.

    Not possible, and refused: clipping by norm, gradient accumulation, gradient scalers, more than one process. An
    exception inside backward leaves those parameters stepped that came before it.

    Args:
        optimizer: An optimizer that treats every parameter by itself, as all of torch's do except LBFGS. Only this
            object is to be used from now on.

    Raises:
        ValueError: If the optimizer needs all gradients at once, or a closure.
        RuntimeError: In a distributed run; in backward, if the optimizer keeps state in its parameter groups; later,
            if anything uses a gradient that is gone.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = OptimizerInBackward(torch.optim.AdamW(layer.parameters(), lr=1e-2))
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(3, 4)).sum().backward()
        >>> torch.equal(layer.weight, before)
        False
        >>> optimizer.step()
        >>> layer.weight.grad is None
        True
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        _check_steps_apart(optimizer)
        _check_single_process()
        self._optimizer = optimizer
        self._lock = threading.Lock()  # a model on several devices has one backward thread for each
        self._handles: list[Any] = []
        self._adopt()
        for index in range(len(self.param_groups)):
            self._register(index)

    def _adopt(self) -> None:
        """Take the optimizer's present groups and state for one's own."""
        optimizer = self._optimizer
        self.__setstate__(
            {"defaults": optimizer.defaults, "state": optimizer.state, "param_groups": optimizer.param_groups}
        )

    def _register(self, index: int) -> None:
        reference = weakref.ref(self)  # parameters outlive optimizers

        def step_parameter(parameter: Tensor) -> None:
            owner = reference()
            if owner is not None:
                owner._step_parameter(parameter, index)

        for parameter in self.param_groups[index]["params"]:
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # a frozen one, which may thaw, would not take the hook
            self._handles.append(parameter.register_post_accumulate_grad_hook(step_parameter))
            parameter.requires_grad_(trains)

    def _step_parameter(self, parameter: Tensor, index: int) -> None:
        """The optimizer's own step, while it knows of no other parameter."""
        _check_single_process()
        optimizer, group = self._optimizer, self.param_groups[index]
        with self._lock:
            options = dict(group)
            optimizer.param_groups, group["params"] = [group], [parameter]
            try:
                with step_in_parts():
                    optimizer.step()
            finally:
                optimizer.param_groups, group["params"] = self.param_groups, options["params"]
        changed = [name for name, value in group.items() if options.get(name) is not value]
        if changed:
            raise RuntimeError(
                f"OptimizerInBackward needs an optimizer that keeps its state by parameter, got "
                f"{type(optimizer).__name__}, which keeps {', '.join(changed)} in its parameter groups."
            )
        parameter.grad = _Consumed(parameter)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step: forget that gradients were used, and step parameters that got one from elsewhere than backward.

        Args:
            closure: Run first, once; its backward steps the parameters.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if isinstance(parameter.grad, _Consumed):
                parameter.grad = None
        if any(parameter.grad is not None for parameter in parameters):
            with step_in_parts():
                self._optimizer.step()
            self.zero_grad()
        return loss

    def remove(self) -> None:
        """Take the hooks off the parameters, whose gradients then stay as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._optimizer.add_param_group(param_group)
        self._register(len(self.param_groups) - 1)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)
        self._adopt()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "OptimizerInBackward cannot be copied or pickled, since its hooks are on the parameters; save its "
            "state_dict(), or make a new one for the copy of the model."
        )


def _check_steps_apart(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, (SubspaceSGD, OptimizerInBackward)):
        raise ValueError(f"OptimizerInBackward needs an optimizer that treats every parameter by itself, got {name}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"OptimizerInBackward needs an optimizer that steps without a closure, got {name}.")


def _check_single_process() -> None:
    check_single_process("OptimizerInBackward steps before gradients are reduced over processes; use its optimizer")
