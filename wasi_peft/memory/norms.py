"""Root-mean-square norms that keep their input and one number a row for backward.

Written out, as model code has them, they keep the normalised rows as well, in float32: the inputs of two norms a
block are then a third of all that a language model keeps when its linear layers are compressed. Here backward forms
the normalised rows again, one multiplication. The output is the same to the bit.

A norm is known by what it computes, not by the name of its class: it is tried on a few rows.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from ..linalg.low_bit import row_tiles
from .wrapping import OWN_COMPUTATION, unwrap_all, wrap

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what models call it
_PROBED = (torch.float32, torch.bfloat16)
_DTYPES = (*_PROBED, torch.float16)


class RMSFormula(NamedTuple):
    """`y = w n` with `n = x / sqrt(mean(x^2) + epsilon)`, where models differ.

    Attributes:
        epsilon: Added to the mean square.
        offset: Added to the weight: 0, or 1 as in Gemma.
        scales_rounded: Whether n is rounded to the dtype of x before it is multiplied by the weight, as in Llama.
    """

    epsilon: float
    offset: int
    scales_rounded: bool


class RMSNormFunction(torch.autograd.Function):
    """A root-mean-square norm by rows, in float32 as in model code; kept are x and `r = 1 / sqrt(mean(x^2) + e)`.

    With `n = r x`, `y = w n` and `g = w dY` of a row: `dX = r (g - n mean(g n))`, and dw is the sum of `dY n` over the
    rows (Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, has the forward pass).

    **Shape**
        - x: (..., H); weight: (H,); returns (..., H)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, formula: RMSFormula) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dtype = torch.promote_types(weight.dtype, x.dtype) if formula.scales_rounded else x.dtype
        y, inverse = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(len(rows), 1, dtype=torch.float32)
        factor = weight.float() + formula.offset if formula.offset else weight
        for part in row_tiles(len(rows), rows.shape[1], x.device):
            piece = rows[part].float()
            work = piece.square()
            torch.rsqrt(work.mean(-1, keepdim=True).add_(formula.epsilon), out=inverse[part])
            normalised = torch.mul(piece, inverse[part], out=work)
            if formula.scales_rounded:
                normalised = normalised.to(x.dtype)
            torch.mul(factor, normalised, out=y[part])
        ctx.save_for_backward(x, inverse, weight)
        ctx.formula = formula
        return torch.ops.aten._unsafe_view(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        factor = weight.float() + ctx.formula.offset
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for part in row_tiles(len(rows), rows.shape[1], x.device):
            normalised, given = rows[part] * inverse[part], grad_rows[part].float()
            if grad_weight is not None:
                grad_weight += (given * normalised).sum(0)
            if grad_x is not None:
                through = given * factor
                along = torch.linalg.vecdot(through, normalised)[:, None].div_(-rows.shape[1])
                through.addcmul_(normalised, along)
                torch.mul(through, inverse[part], out=grad_x[part])
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def rms_formula(module: nn.Module) -> RMSFormula | None:
    """What a module computes, if that is a root-mean-square norm with a weight; else None.

    A copy of it with another weight is tried on a few rows, in float32 and in bfloat16. The module may be on any
    device, also on that without memory.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
        >>> rms_formula(LlamaRMSNorm(16, eps=1e-5))
        RMSFormula(epsilon=1e-05, offset=0, scales_rounded=True)
        >>> rms_formula(nn.LayerNorm(16)) is None
        True
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    epsilon = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if epsilon is None or isinstance(module, nn.modules.batchnorm._NormBase):
        return None
    formulas = [RMSFormula(epsilon, offset, rounded) for rounded in (True, False) for offset in (0, 1)]
    for dtype in _PROBED:
        formulas = [formula for formula in formulas if _computes(module, formula, dtype, dtype)]
    return formulas[0] if formulas else None


def mixed_dtypes(module: nn.Module, formula: RMSFormula) -> frozenset[tuple[torch.dtype, torch.dtype]]:
    """Dtypes of input and weight that differ, with which a norm of this formula follows it too.

    T5's rounds to the weight's 16 bits, Llama's to the input's.
    """
    return frozenset(pair for pair in itertools.permutations(_DTYPES, 2) if _computes(module, formula, *pair))


@torch.no_grad()
def _computes(module: nn.Module, formula: RMSFormula, dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether a formula gives what a module does, to the bit."""
    with _disable_current_modes():  # of an estimate, in which nothing has values
        width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
        # the first rows are so small that it is the epsilon that decides
        x = torch.linspace(-1, 1, 4 * width, device="cpu").sin_().view(4, -1).to(dtype)
        x[:2] *= formula.epsilon**0.5
        values = torch.linspace(0.4, 1.7, width, device="cpu").to(weight_dtype)
        probe = copy.copy(module)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(values)}
        try:
            found = type(module).forward(probe, x)
        except Exception:  # whatever a class that is no norm says to such an input
            return False
        ours: Tensor = RMSNormFunction.apply(x, values, formula)
        return isinstance(found, Tensor) and ours.dtype == found.dtype and torch.equal(ours, found)


class _LeanNorm:
    """Calls a norm by :class:`RMSNormFunction` where a gradient is recorded.

    Args:
        formula: What the norm computes.
        mixed: Dtypes of input and weight that differ, with which it does.
    """

    level = OWN_COMPUTATION

    def __init__(self, formula: RMSFormula, mixed: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()) -> None:
        self.formula, self.mixed = formula, mixed

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weight = forward.__self__.weight  # type: ignore[attr-defined]
        if len(args) != 1 or kwargs or not _is_ordinary(args[0], weight):
            return forward(*args, **kwargs)
        dtypes = args[0].dtype, weight.dtype
        if dtypes[0] != dtypes[1] and dtypes not in self.mixed:
            return forward(*args, **kwargs)
        return RMSNormFunction.apply(args[0], weight, self.formula)


def _is_ordinary(x: Any, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, FakeTensor)
        and type(weight) in (Tensor, nn.Parameter, FakeTensor)
        and (x.requires_grad or weight.requires_grad)
        and x.dtype in _DTYPES
        and x.device == weight.device
        and x.shape[-1:] == weight.shape
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
    )


@dataclass(frozen=True)
class LeanNorms:
    """Technique: the root-mean-square norms of a model keep their input and one number a row.

    Nothing happens without gradients, while `torch.compile` traces, nor to a model without such norms.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> small = LlamaConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaModel(small)
        >>> LeanNorms().install(model)
        >>> type(model(torch.tensor([[1, 2, 3]])).last_hidden_state.grad_fn).__name__
        'RMSNormFunctionBackward'
        >>> LeanNorms().remove(model)
    """

    def check(self, model: nn.Module) -> None:
        """Every model will do."""

    def install(self, model: nn.Module) -> None:
        """Put it around every such norm."""
        self.remove(model)
        for module in model.modules():
            formula = rms_formula(module)
            if formula is not None:
                wrap(module, _LeanNorm(formula, mixed_dtypes(module, formula)))

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        unwrap_all(model, _LeanNorm)
