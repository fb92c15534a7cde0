"""Refit: right factors that make up for what truncation did to the layers before them.

Each layer's factors were cut for the inputs of the dense model. In the compressed model a layer sees other inputs, and
a linear map of those tells much of what the dense model's would have been. Layer after layer, in the order in which
they run, R takes in the best such map: a closed form, no learning rate (the sequential calibration of GPTQ, arXiv
2210.17323, and SparseGPT, arXiv 2301.00774, for factors).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration import check_repeatable, evaluating, features_of, limited, model_output, real_rows, token_mask
from .layer import InitialFactors, Linear, dense_bias, dense_weight
from .repair import ADAPTER, compared_blocks, student_of
from .slices import block_input

REFIT_ROWS = 2**15
RIDGE = 1e-2


def refit_factors(
    model: nn.Module,
    factors: Mapping[str, InitialFactors],
    data: Iterable[Any],
    *,
    rows: int = REFIT_ROWS,
    ridge: float = RIDGE,
    progress_bar: bool = True,
) -> dict[str, InitialFactors]:
    """Refit the right factors of the layers in the transformer blocks, one after the other.

    With x* the dense model's input of a layer and x that in the model compressed so far, the least squares fit of x*
    from x is `M = E[x* x^T] E[x x^T]^-1`, and `R <- R M` makes `L R x` approximate `L R_old x*` (:func:`input_map`).
    Where there is a bias, both inputs are centered and the bias becomes `b + W E[x*] - L R E[x]`. R must be a
    projection of the weight, as truncation gives it. Each block runs alone, a few layers at a time, on hidden states
    that are kept: in all about four passes of the dense model over the data and two of the compressed one.

    Layers outside of blocks, and those of blocks that run more than once or not at all, stay as they are.

    **Shape**
        - factors: by module name, L (out, K), R (K, in), bias (out,) or None

    Args:
        model: The dense model; not changed.
        factors: Truncated factors of its target layers.
        data: Batches without labels.
        rows: Samples times tokens to look at; of these, twice the hidden states are kept.
        ridge: Added to the diagonal of both moments, relative to the mean of `E[x x^T]`'s: it draws M to the identity.
        progress_bar: Show a progress bar.

    Returns:
        New factors with the same L.

    Raises:
        ValueError: If a number is out of range; or if the data are empty, a function, can be iterated only once, or
            make a layer's input NaN or Inf.
    """
    for name, value in (("rows", rows), ("ridge", ridge)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    if callable(data):
        raise ValueError("refitting needs batches, got a function.")
    check_repeatable(data)
    with evaluating(model, gradients=False):
        student, layers = student_of(model, factors)
        (first,) = limited(data, 1, None)
        segments, first_rows = _segments(model, compared_blocks(factors, every=1), first)
        batches = list(limited(data, math.ceil(rows / max(1, first_rows)), None))
        with tqdm(total=sum(map(len, segments)), desc="WASI refit", disable=not progress_bar) as bar:
            for blocks in segments:
                dense, compressed = (_States.before(blocks, each, batches) for each in (model, student))
                for block in blocks:
                    _refit_block(block, dense, compressed, layers, ridge)
                    dense.advance(block)
                    compressed.advance(block)
                    bar.update()
    return {name: _factors(layer, factors[name]) for name, layer in layers.items()}


def input_map(cross: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """The least squares map of one input to another, `M = (C* + t I) (C + t I)^-1` with `t = ridge mean(diag C)`.

    It minimises `E|x* - M x|^2 + t |M - I|_F^2`.

    **Shape**
        - cross: (in, in), `C* = E[x* x^T]`; moment: (in, in), `C = E[x x^T]`; returns (in, in), float64

    Example:
        >>> x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> wanted = x @ torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 0, 1]]).double()
        >>> input_map(wanted.T @ x, x.T @ x, ridge=1e-9).round(decimals=4).tolist()
        [[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    """
    shift = ridge * moment.diagonal().mean().double() * torch.eye(len(moment), dtype=torch.float64).to(moment.device)
    # the mean is 0 where the input always is: nothing is known then
    shift = torch.where(shift.any(), shift, torch.eye(len(moment)).to(shift))
    corner = torch.linalg.cholesky(moment.double() + shift)
    return torch.cholesky_solve((cross.double() + shift).T, corner).T


# -------------------------------------------------------------------- blocks


class _Reached(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass
class _Call:
    """A block's call without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if "hidden_states" in self.kwargs:
            return features_of(block(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return features_of(block(hidden, *self.args, **self.kwargs))


@contextmanager
def _hooked(root: nn.Module, names: Iterable[str], before: Any, after: Any = None) -> Iterator[None]:
    """`before(name, args, kwargs)` and `after(name, output)` around every call of some modules."""
    handles = []
    for name in names:
        module = root.get_submodule(name)

        def on_call(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            before(name, args, kwargs)

        handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
        if after is not None:

            def on_return(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                after(name, output)

            handles.append(module.register_forward_hook(on_return))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _segments(model: nn.Module, blocks: Sequence[str], batch: Any) -> tuple[list[list[str]], int]:
    """Blocks in the order in which they run, cut where one does not read what the one before it returned.

    Blocks that run more than once, or read no hidden states, are left out. Also the rows of the first block's input.
    """
    calls: list[tuple[str, Tensor | None]] = []
    outputs: dict[str, Tensor] = {}

    def before(name: str, args: Any, kwargs: Any) -> None:
        calls.append((name, block_input(args, kwargs)))

    def after(name: str, output: Any) -> None:
        outputs[name] = features_of(output)

    with _hooked(model, blocks, before, after):
        model_output(model, batch)
    count = Counter(name for name, _ in calls)
    segments: list[list[str]] = []
    rows = 0
    for name, hidden in calls:
        if hidden is None or count[name] > 1:
            continue
        rows = rows or hidden.shape[:-1].numel()
        if segments and outputs[segments[-1][-1]] is hidden:
            segments[-1].append(name)
        else:
            segments.append([name])
    return segments, rows


@dataclass
class _States:
    """A model on its way through the blocks of a segment: the hidden states of every batch before the next block."""

    root: nn.Module
    hidden: list[Tensor]
    masks: list[Tensor | None]
    calls: dict[str, list[_Call]]

    @classmethod
    def before(cls, blocks: Sequence[str], root: nn.Module, batches: Sequence[Any]) -> _States:
        """The states before the first of some blocks."""
        states = cls(root, [], [token_mask(batch) for batch in batches], {name: [] for name in blocks})

        def on_call(name: str, args: Any, kwargs: Any) -> None:
            named = "hidden_states" in kwargs
            if name == blocks[0]:
                hidden = block_input(args, kwargs)
                assert hidden is not None
                states.hidden.append(hidden)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            rest |= {"hidden_states": None} if named else {}
            states.calls[name].append(_Call(args if named else args[1:], rest))
            if name == blocks[-1]:
                raise _Reached

        for batch in batches:
            with _hooked(root, blocks, on_call):
                try:
                    model_output(root, batch)
                except _Reached:
                    continue
        return states

    def run(self, block: str, index: int) -> Tensor:
        """What a block answers one batch."""
        return self.calls[block][index](self.root.get_submodule(block), self.hidden[index])

    def rows_before(self, block: str, index: int, layer: str) -> Tensor | None:
        """The rows of one batch, without padding, that a layer of a block reads; None if they are not its tokens'."""
        found: list[Tensor] = []

        def on_call(_: str, args: Any, kwargs: Any) -> None:
            found.append(args[0] if args else next(iter(kwargs.values())))
            raise _Reached

        with _hooked(self.root, [layer], on_call):
            try:
                self.run(block, index)
            except _Reached:
                pass
        if not found or found[0].shape[:-1].numel() != self.hidden[index].shape[:-1].numel():
            return None
        return real_rows(found[0], self.masks[index]).to(torch.float32)

    def advance(self, block: str) -> None:
        """Run a block on every batch."""
        for index in range(len(self.hidden)):
            self.hidden[index] = self.run(block, index)


# -------------------------------------------------------------------- layers


@dataclass
class _Moments:
    """Sums over the rows of two inputs of a layer: x* in the dense model, x in the compressed one.

    **Shape**
        - cross: (in, in), sum of `x* x^T`; moment: (in, in), sum of `x x^T`; wanted: (in,), sum of x*; total: (in,)
    """

    cross: Tensor
    moment: Tensor
    wanted: Tensor
    total: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> _Moments:
        square, row = torch.zeros(size, size, device=device), torch.zeros(size, device=device)
        return cls(square, square.clone(), row, row.clone())

    def update(self, wanted: Tensor, rows: Tensor) -> None:
        """Add rows, (n, in) both."""
        self.cross.addmm_(wanted.T, rows)
        self.moment.addmm_(rows.T, rows)
        self.wanted += wanted.sum(0)
        self.total += rows.sum(0)
        self.rows += len(rows)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`E[x* x^T]`, `E[x x^T]`, `E[x*]`, `E[x]`, float64."""
        parts = (self.cross, self.moment, self.wanted, self.total)
        cross, moment, wanted, mean = (part.double() / self.rows for part in parts)
        return cross, moment, wanted, mean


def _refit_block(block: str, dense: _States, compressed: _States, layers: Mapping[str, Linear], ridge: float) -> None:
    """Refit the layers of a block in the order in which they run, those that read one input together."""
    inside = [name for name in layers if f"{name}.".startswith(f"{block}.")]  # or the block itself
    for names in _readers(block, dense, inside):
        moments = None
        for index in range(len(dense.hidden)):
            wanted = dense.rows_before(block, index, names[0])
            rows = compressed.rows_before(block, index, names[0])
            if wanted is None or rows is None or wanted.shape != rows.shape:
                moments = None
                break
            moments = moments or _Moments.zeros(rows.shape[1], rows.device)
            moments.update(wanted, rows)
        if moments is None:
            continue
        if not bool(torch.isfinite(moments.cross).all() & torch.isfinite(moments.moment).all()):
            raise ValueError(f"{names[0]}: its input holds NaN or Inf on the calibration data.")
        for name in names:
            _refit(layers[name], dense.root.get_submodule(name), moments, ridge)


def _readers(block: str, dense: _States, names: Sequence[str]) -> list[list[str]]:
    """Layers of a block, in the order in which they run, those together that read the same tensor."""
    calls: list[tuple[str, Tensor]] = []

    def on_call(name: str, args: Any, kwargs: Any) -> None:
        calls.append((name, args[0] if args else next(iter(kwargs.values()))))

    with _hooked(dense.root, names, on_call):
        dense.run(block, 0)
    count = Counter(name for name, _ in calls)
    groups: list[tuple[list[str], Tensor]] = []
    for name, x in calls:
        if count[name] > 1:
            continue
        if groups and groups[-1][1] is x:
            groups[-1][0].append(name)
        else:
            groups.append(([name], x))
    return [group for group, _ in groups]


def _refit(layer: Linear, target: nn.Module, moments: _Moments, ridge: float) -> None:
    """Give a layer the right factor, and the bias, that suit its inputs in the compressed model."""
    cross, moment, wanted, mean = moments.means()
    L, R = layer.wasi_L[ADAPTER], layer.wasi_R[ADAPTER]
    bias = dense_bias(target)
    if bias is not None:
        cross, moment = cross - torch.outer(wanted, mean), moment - torch.outer(mean, mean)
    refitted = R.double() @ input_map(cross, moment, ridge)
    if bias is not None:
        corrected = bias.double() + dense_weight(target).double() @ wanted - L.double() @ (refitted @ mean)
        layer.wasi_bias[ADAPTER].copy_(corrected)
    R.copy_(refitted)


def _factors(layer: Linear, given: InitialFactors) -> InitialFactors:
    bias = layer.wasi_bias[ADAPTER].detach() if ADAPTER in layer.wasi_bias else None
    return InitialFactors(given.L, layer.wasi_R[ADAPTER].detach(), bias)
