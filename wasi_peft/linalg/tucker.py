"""The compressed activation: what a layer keeps of its input for the backward pass.

An input of canonical shape [batch, tokens, features] is kept as a Tucker form: a small core and one orthonormal basis
per compressed mode. Modes are truncated one after the other, features first, so that every later contraction works on
an already small tensor (ST-HOSVD, Vannieuwenhoven et al. 2012). State is a value that is passed in and returned.

A map, [batch, height, width, features], may keep its four modes: two small bases for its places in place of a large
one for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .spectra import rank_for_threshold
from .subspaces import leading_subspace, range_finder, subspace_iteration

MODES = ("feature", "token", "batch", "height", "width")
_PLACES = ("height", "width")


class Tucker(NamedTuple):
    """A compressed activation `X ~ core x_feature U_f x_token U_t x_batch U_b`; None for a mode kept whole.

    **Shape**
        - core: (B or r_b, N or r_t, r_f); of a map (B or r_b, H or r_h, W or r_w, r_f)
        - feature: (I, r_f); token: (N, r_t) or None; batch: (B, r_b) or None
        - height: (H, r_h), width: (W, r_w), of a map; or None
    """

    core: Tensor
    feature: Tensor
    token: Tensor | None = None
    batch: Tensor | None = None
    height: Tensor | None = None
    width: Tensor | None = None

    @property
    def bases(self) -> list[tuple[int, Tensor]]:
        """Axes of the core and their bases, the axis of features not among them."""
        axes = {"token": 1, "batch": 0, "height": 1, "width": 2}
        pairs = ((axis, getattr(self, mode)) for mode, axis in axes.items())
        return [(axis, basis) for axis, basis in pairs if basis is not None]

    @property
    def elements(self) -> int:
        """Numbers that are kept."""
        return sum(part.numel() for part in self if part is not None)


NOTHING: tuple[None, ...] = (None,) * len(Tucker._fields)  # in place of the parts of a form, where there is none


class Bases(NamedTuple):
    """Warm-start state of one input: the bases that the next compression continues from."""

    feature: Tensor | None = None
    token: Tensor | None = None
    height: Tensor | None = None
    width: Tensor | None = None


class CompressionRule(NamedTuple):
    """How strongly each mode is compressed: an explained-variance threshold or fixed ranks.

    `ranks` wins over `threshold` for the modes it names. `modes` is a subset of :data:`MODES` with "feature" in it;
    "height" and "width" are those of maps, in the place of "token", or, with "token" too, where they keep less.
    """

    modes: tuple[str, ...] = ("feature",)
    threshold: float | None = None
    ranks: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_options(
        cls, modes: tuple[str, ...], threshold: float | None, ranks: Mapping[str, int] | None
    ) -> CompressionRule:
        """Build a (hashable) rule from configuration values."""
        return cls(tuple(modes), threshold, tuple(sorted((ranks or {}).items())))

    def rank(self, mode: str, energies: Tensor) -> int:
        """Rank of a mode whose energies (descending) are given."""
        fixed = dict(self.ranks).get(mode)
        if fixed is not None:
            return min(fixed, energies.numel())
        assert self.threshold is not None
        return rank_for_threshold(energies, self.threshold)


def roundable(tensor: Tensor) -> Tensor:
    """Marks what a layer keeps for the gradients of its own parameters as fit to be stored in few bits."""
    tensor._wasi_roundable = True  # type: ignore[attr-defined]
    return tensor


def is_roundable(tensor: Tensor) -> bool:
    """Whether :func:`roundable` marked a tensor."""
    return getattr(tensor, "_wasi_roundable", False)


def canonical(x: Tensor) -> Tensor:
    """View an input as [batch, tokens, features]; a 2-D input is one sequence, dims between are tokens.

    Example:
        >>> canonical(torch.zeros(5, 4, 4, 8)).shape, canonical(torch.zeros(7, 8)).shape
        (torch.Size([5, 16, 8]), torch.Size([1, 7, 8]))
    """
    if x.dim() <= 2:
        return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding as a matrix whose columns run over that mode: (everything else, size of the mode)."""
    return tensor.movedim(mode, -1).reshape(-1, tensor.shape[mode])


def mode_dot(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply a tensor by a matrix along one mode: the mode of size n becomes m for a (m, n) matrix."""
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)


def _fits(unfolded: Tensor, previous: Tensor | None, mode: str, rule: CompressionRule) -> bool:
    """Whether a basis can be continued: same size, dtype and device, and no narrower than a fixed rank asks for."""
    if previous is None or previous.shape[0] != unfolded.shape[1]:
        return False
    asked = dict(rule.ranks).get(mode, 0)
    wide_enough = previous.shape[1] >= min(asked, *unfolded.shape)
    return wide_enough and previous.dtype == unfolded.dtype and previous.device == unfolded.device


def _basis(
    unfolded: Tensor, previous: Tensor | None, mode: str, rule: CompressionRule, advance: bool
) -> Tensor | None:
    """Basis of one mode: warm-started where the previous one still fits, from the spectrum otherwise.

    None where the input has no usable subspace: it is zero, or holds NaN or Inf.
    """
    fits = _fits(unfolded, previous, mode, rule)
    # fewer rows than directions would leave part of the new basis undefined
    if fits and not (advance and previous is not None and unfolded.shape[0] >= previous.shape[1]):
        return previous
    # products of three factors leave the range of float16
    work = unfolded if unfolded.dtype in (torch.float32, torch.float64) else unfolded.float()
    if not 0 < float(torch.linalg.vector_norm(work)) < math.inf:
        return None
    if fits and previous is not None:
        return subspace_iteration(work, previous.to(work.dtype)).to(unfolded.dtype)
    rank = dict(rule.ranks).get(mode)
    if rank is not None and 4 * rank < min(work.shape):  # beyond, random directions cost as much as all of them
        return range_finder(work, rank).to(unfolded.dtype)
    energies, vectors = leading_subspace(work)
    # a copy: a view, or what `contiguous` takes for contiguous, would keep all vectors alive
    kept = vectors[:, : rule.rank(mode, energies)]
    return kept.to(unfolded.dtype).clone(memory_format=torch.contiguous_format)


def arranged(x: Tensor, rule: CompressionRule) -> Tensor:
    """An input as a rule takes it: a map with its four modes where the rule names both of its places, else canonical.

    Example:
        >>> x = torch.zeros(5, 4, 4, 8)
        >>> arranged(x, CompressionRule(("feature", "height", "width"))).shape, arranged(x, CompressionRule()).shape
        (torch.Size([5, 4, 4, 8]), torch.Size([5, 16, 8]))
    """
    return x if x.dim() == 4 and set(_PLACES) <= set(rule.modes) else canonical(x)


def compress(x: Tensor, rule: CompressionRule, bases: Bases, advance: bool = True) -> tuple[Tucker, Bases] | None:
    """Compress one input, one warm-started subspace iteration per mode.

    **Shape**
        - x: (..., I), which is taken as (B, N, I), or as a map, (B, H, W, I) (:func:`arranged`)
        - returns a :class:`Tucker` and the bases to continue from

    Args:
        x: Input; not modified and not kept.
        rule: Modes and ranks or threshold.
        bases: State of the previous call (`Bases()` for a cold start). A basis whose size, dtype or device no longer
            fits the input is rebuilt from the spectrum; the batch basis always is, because samples are reshuffled.
        advance: Whether warm bases take one iteration towards this input, or are used as they are.

    Returns:
        None where the compressed form would not be smaller than the input, or the input is empty, zero or not finite.
    """
    if x.numel() == 0:
        return None
    x = arranged(x, rule)
    feature = _basis(unfold(x, x.dim() - 1), bases.feature, "feature", rule, advance)
    if feature is None:
        return None
    image = x @ feature  # (B, N or H, W, r_f)
    forms = []
    for modes in _ways(x, rule, bases):
        form = Tucker(image.flatten(1, -2) if modes == ("token",) else image, feature)
        for axis, mode in enumerate(modes, 1):
            form = _contracted(form, mode, axis, getattr(bases, mode), rule, advance)
        forms.append(form)
    form = min(forms, key=lambda form: form.elements)
    if "batch" in rule.modes:
        form = _contracted(form, "batch", 0, None, rule, advance)
    if form.elements >= x.numel():
        return None
    state = Bases(form.feature, form.token, form.height, form.width)
    return form._replace(core=roundable(form.core.contiguous())), state


def _ways(x: Tensor, rule: CompressionRule, bases: Bases) -> list[tuple[str, ...]]:
    """What the places of an input may be compressed as; of a map in two ways, until one has been taken."""
    flat: list[tuple[str, ...]] = [("token",)] if "token" in rule.modes else []
    if x.dim() == 3:
        return flat or [()]
    if bases.token is not None and bases.token.shape[0] == x.shape[1] * x.shape[2]:
        return flat or [_PLACES]
    warm = bases.height is not None and bases.width is not None
    return [_PLACES] if warm else [_PLACES, *flat]


def _contracted(
    form: Tucker, mode: str, axis: int, previous: Tensor | None, rule: CompressionRule, advance: bool
) -> Tucker:
    """A form with one mode more compressed; as it is where that mode has one entry or no usable subspace."""
    if form.core.shape[axis] < 2:
        return form
    basis = _basis(unfold(form.core, axis), previous, mode, rule, advance)
    return form if basis is None else form._replace(core=mode_dot(form.core, basis.T, axis), **{mode: basis})


def placeholder(x: Tensor, rule: CompressionRule, bases: Bases) -> Tucker | None:
    """What :func:`compress` would return, with the bases of before and a core without values, which takes no memory.

    **Shape**
        - x: as for :func:`compress`, whose shapes are returned

    Returns:
        None where they depend on the values of the input: a basis cannot be continued, or the batch is compressed; and
        where the form would not be smaller than the input.
    """
    if "batch" in rule.modes or x.numel() == 0:
        return None
    x = arranged(x, rule)
    if not _fits(unfold(x, x.dim() - 1), bases.feature, "feature", rule):
        return None
    feature, ways = bases.feature, _ways(x, rule, bases)
    if len(ways) > 1:
        return None
    assert feature is not None
    core = x.new_empty(()).expand(*x.shape[:-1], feature.shape[1])
    form = Tucker(core.flatten(1, -2) if ways == [("token",)] else core, feature)
    for axis, mode in enumerate(ways[0], 1):
        if form.core.shape[axis] < 2:
            continue
        basis = getattr(bases, mode)
        if basis is None or not _fits(unfold(form.core, axis), basis, mode, rule):
            return None
        shape = [*form.core.shape]
        shape[axis] = basis.shape[1]
        form = form._replace(core=x.new_empty(()).expand(shape), **{mode: basis})
    return None if form.elements >= x.numel() else form


def expand_rows(compressed: Tucker) -> Tensor:
    """Rows of the compressed input in the feature basis: `Z` with `X ~ Z U_f^T`.

    **Shape**
        - returns (B * N, r_f)
    """
    core = compressed.core
    for axis, basis in compressed.bases:
        core = mode_dot(core, basis, axis)
    return core.reshape(-1, core.shape[-1])


def expand(compressed: Tucker) -> Tensor:
    """The approximation of the input that a :class:`Tucker` stands for, (B, N, I) or (B, H, W, I).

    For reports and tests only.
    """
    core = compressed.core
    for axis, basis in compressed.bases:
        core = mode_dot(core, basis, axis)
    return core @ compressed.feature.T
