"""Repair of a language model against the tokens that the dense model predicts, without labels.

Hidden states are only a means to them, and a few tokens have states a hundred times as large as the others'. So here
the factors of all layers are trained together for a short while on the Kullback-Leibler divergence of the two models'
next-token distributions (distillation, arXiv 1503.02531). Logits exist for a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..forms.attention import with_projections
from ..forms.factored import FactoredLinear
from ..memory.loss import default_chunk_rows
from ..models.calls import Reached, evaluating, layer_input, model_output, real_rows, token_mask
from ..models.structure import vocabulary_head
from ..tuner.prepared import WasiFactors
from .data import limited
from .descent import Descent, check_arguments, lowered, shuffled
from .moments import with_initial
from .student import orthonormal_factors, student_of

TOKEN_ROWS = 2**16
TOKEN_STEPS = 128
COMPARED_BATCHES = 8  # on which the divergence is measured before and after


class TokenDivergence(torch.autograd.Function):
    """`mean_n KL(softmax(W target_n + b) || softmax(W hidden_n + b))` and its gradient for `hidden`, in chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        gradient = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=precise)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_p = F.log_softmax(F.linear(target[rows], weight, bias), -1, dtype=precise)
            log_q = F.log_softmax(F.linear(hidden[rows], weight, bias), -1, dtype=precise)
            p = log_p.exp()
            loss += (log_p.sub_(log_q).mul_(p)).sum()
            gradient[rows] = log_q.exp_().sub_(p).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(gradient.dtype), None, None, None, None


@with_projections
def repair_tokens(
    model: nn.Module,
    factors: WasiFactors,
    data: Iterable[Any],
    *,
    rows: int = TOKEN_ROWS,
    steps: int = TOKEN_STEPS,
    rate: float = 1.5e-3,
    progress_bar: bool = True,
) -> WasiFactors:
    """Train factors and biases until the compressed model predicts the tokens that the dense one does.

    The loss is `mean_n KL(p*_n || p_n)` over the tokens n, p* and p being what the head makes of the last hidden state
    of the dense and of the compressed model; padded tokens do not count, and a cap or scale that the model puts on its
    logits afterwards is left out. AdamW (on float32 copies of factors in low precision), warm-up, cosine decay. Both
    models share everything but the target layers; on top of the dense model there are the factors, their gradients and
    two optimizer moments, one batch, and the dense model's last hidden states.

    Args:
        model: The dense model, which ends in a linear layer over a vocabulary; not changed.
        factors: What :func:`preprocess_wasi` made for it. Those of the head, if it is a target, stay as they are.
        data: Batches without labels.
        rows: Tokens to look at, about: as many whole batches as hold them.
        steps: Optimizer steps, each on one batch.
        rate: Peak learning rate, relative to the root mean square of each factor.
        progress_bar: Show a progress bar.

    Returns:
        New factors, L with orthonormal columns, to be attached; the given ones, with a warning, if the loss of the
        first batches did not fall.

    Raises:
        ValueError: If a number is out of range; if the model has no such head; or if the data are empty, a function,
            can be iterated only once, or make the dense model answer NaN or Inf.
    """
    factors.require_factors("repair_tokens")
    head = require_head(model)
    check_arguments(data, rows=rows, steps=steps, rate=rate)
    inside = {name: initial for name, initial in factors.initial.items() if model.get_submodule(name) is not head}
    with evaluating(model, gradients=True):
        student, layers = student_of(model, inside)
        batches = _batches(model, data, rows, progress_bar)
        before = _mean_divergence(student, batches[:COMPARED_BATCHES])
        _train(student, layers, batches, steps, rate, progress_bar)
        after = _mean_divergence(student, batches[:COMPARED_BATCHES])
    if not lowered(before, after, "the divergence of predicted tokens"):
        return factors
    repaired = {name: orthonormal_factors(layer) for name, layer in layers.items()}
    return with_initial(model, factors, {**factors.initial, **repaired}, data, progress_bar=progress_bar)


def require_head(model: nn.Module) -> nn.Linear:
    """The linear layer over a vocabulary that a model ends in.

    Raises:
        ValueError: If there is none.
    """
    head = vocabulary_head(model)
    if head is None:
        raise ValueError(
            f"repair='tokens' needs a model that ends in a linear layer over a vocabulary, got {type(model).__name__}."
        )
    return head


@torch.no_grad()
def _batches(model: nn.Module, data: Iterable[Any], rows: int, progress_bar: bool) -> list[tuple[Any, Tensor]]:
    """Batches of about so many tokens, each with the dense model's last hidden states, (tokens, H)."""
    batches: list[tuple[Any, Tensor]] = []
    with tqdm(total=rows, desc="WASI dense model", unit="token", disable=not progress_bar) as bar:
        for batch in limited(data, None, None):
            hidden = before_head(model, batch)
            bar.update(len(hidden))
            if not bool(torch.isfinite(hidden).all()):
                raise ValueError("the dense model answers NaN or Inf on the calibration data.")
            batches.append((batch, hidden))
            if sum(len(states) for _, states in batches) >= rows:
                break
    return batches


def before_head(model: nn.Module, batch: Any) -> Tensor:
    """What the head over the vocabulary is given of one batch, padding left out, (tokens, H). It does not run."""
    inputs: list[Tensor] = []

    def on_call(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(layer_input(args, kwargs))
        raise Reached

    handle = require_head(model).register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        model_output(model, batch)
    except Reached:
        pass
    finally:
        handle.remove()
    if not inputs:
        raise ValueError(f"{type(model).__name__} does not run its head on a calibration batch.")
    return real_rows(inputs[0], token_mask(batch))


def _divergence(student: nn.Module, batch: Any, target: Tensor) -> Tensor:
    """The loss of one batch."""
    head = require_head(student)
    hidden = before_head(student, batch)
    loss: Tensor = TokenDivergence.apply(hidden, target, head.weight, head.bias, default_chunk_rows(len(head.weight)))
    return loss


@torch.no_grad()
def _mean_divergence(student: nn.Module, batches: Sequence[tuple[Any, Tensor]]) -> float:
    return float(torch.stack([_divergence(student, *batch) for batch in batches]).mean())


def _train(
    student: nn.Module,
    layers: Mapping[str, FactoredLinear],
    batches: Sequence[tuple[Any, Tensor]],
    steps: int,
    rate: float,
    progress_bar: bool,
) -> None:
    """Up to the first loss that is not finite; not at all where gradients do not reach the factors."""
    descent = Descent.relative(layers.values(), rate, steps)
    with tqdm(total=steps, desc="WASI repair", disable=not progress_bar) as bar:
        for index in shuffled(len(batches), steps):
            loss = _divergence(student, *batches[index])
            if not (bool(torch.isfinite(loss)) and loss.requires_grad):
                return
            loss.backward()
            descent.step()
            bar.set_postfix(divergence=f"{float(loss.detach()):.4f}")
            bar.update()
