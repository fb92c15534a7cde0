"""Closed-form sizes and FLOPs of one dense or factored linear layer: plain integers, no tensors.

A multiply-add counts as 2 FLOPs, as in torch's flop counter. `rows` is batch times tokens.
"""

from __future__ import annotations


def dense_elements(out_features: int, in_features: int) -> int:
    """Elements of a dense weight, `out * in`."""
    return out_features * in_features


def factored_elements(out_features: int, in_features: int, rank: int) -> int:
    """Elements of both factors, `K * (out + in)`.

    Example:
        >>> factored_elements(4, 6, 2)
        20
    """
    return rank * (out_features + in_features)


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank whose factors are smaller (and cheaper) than the dense weight: `K < out * in / (out + in)`.

    Zero means that no rank saves anything.

    Example:
        >>> break_even_rank(384, 384), break_even_rank(384, 1536)
        (191, 307)
    """
    return (out_features * in_features - 1) // (out_features + in_features)


def dense_forward_flops(rows: int, out_features: int, in_features: int) -> int:
    """FLOPs of `x W^T`."""
    return 2 * rows * out_features * in_features


def factored_forward_flops(rows: int, out_features: int, in_features: int, rank: int) -> int:
    """FLOPs of `(x R^T) L^T`."""
    return 2 * rows * factored_elements(out_features, in_features, rank)
