"""Closed-form sizes and FLOPs of one dense or factored linear layer: plain integers, no tensors.

A multiply-add counts as 2 FLOPs, as in torch's flop counter. `rows` is batch times tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def dense_elements(out_features: int, in_features: int) -> int:
    """Elements of a dense weight, `out * in`."""
    return out_features * in_features


def factored_elements(out_features: int, in_features: int, rank: int, core: bool = False) -> int:
    """Elements of both factors, `K * (out + in)`, and of the core between them, `K * K`, where there is one.

    Example:
        >>> factored_elements(4, 6, 2), factored_elements(4, 6, 2, core=True)
        (20, 24)
    """
    return rank * (out_features + in_features + (rank if core else 0))


def break_even_rank(out_features: int, in_features: int, core: bool = False) -> int:
    """Largest rank whose factors are smaller (and cheaper) than the dense weight: `K < out * in / (out + in)`.

    With a core, `K (out + in + K) < out * in`. Zero means that no rank saves anything.

    Example:
        >>> break_even_rank(384, 384), break_even_rank(384, 1536)
        (191, 307)
        >>> break_even_rank(384, 384, core=True), break_even_rank(384, 1536, core=True)
        (159, 269)
    """
    most, sides = out_features * in_features - 1, out_features + in_features
    return (math.isqrt(sides * sides + 4 * most) - sides) // 2 if core else most // sides


def rank_step(out_features: int, in_features: int) -> int:
    """What the inner width of factors that a budget chooses, K plus the rank of the update, is a multiple of.

    `max{s in (16, 8, 4, 2) : 8 s <= break-even rank}`, else 1. Thin matrix products lose up to a third of their speed
    at other widths than multiples of 16; but a small layer needs more than a few ranks to choose from.

    Example:
        >>> rank_step(384, 384), rank_step(192, 192), rank_step(64, 64), rank_step(8, 8)
        (16, 8, 2, 1)
    """
    eighth = break_even_rank(out_features, in_features) // 8
    return next((step for step in (16, 8, 4, 2) if step <= eighth), 1)


def dense_forward_flops(rows: int, out_features: int, in_features: int) -> int:
    """FLOPs of `x W^T`."""
    return 2 * rows * out_features * in_features


def input_elements(batch: int, tokens: int, in_features: int, ranks: Mapping[str, int] | None) -> int:
    """Elements of what backward keeps of an input [batch, tokens, features]: a Tucker form at the ranks, or a copy.

    With the ranks `r_f`, `r_t`, `r_b` of the modes that are compressed, `core + I r_f + N r_t + B r_b`, where the core
    is `B N r_f` with `r_t` in place of `N` and `r_b` in place of `B`. Ranks are cut to what the input can have. A form
    that is not smaller than the exact copy is not used (:func:`tucker.compress`).

    Args:
        batch: B. An input of two dimensions is one sequence, B = 1.
        tokens: N, all dimensions between.
        in_features: I.
        ranks: By mode, with "feature" among them; None for the exact copy.

    Example:
        >>> input_elements(2, 10, 8, None), input_elements(2, 10, 8, {"feature": 3})
        (160, 84)
        >>> input_elements(2, 10, 8, {"feature": 3, "token": 4})
        88
    """
    if ranks is None:
        return batch * tokens * in_features
    feature = min(ranks["feature"], in_features, batch * tokens)
    core, bases = [batch, tokens, feature], in_features * feature
    for axis, mode in ((1, "token"), (0, "batch")):
        size = core[axis]
        if mode in ranks and size > 1:
            core[axis] = min(ranks[mode], size, core[0] * core[1] * core[2] // size)
            bases += size * core[axis]
    return core[0] * core[1] * core[2] + bases
