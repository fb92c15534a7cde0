"""Weights as the blocks of GGUF files: codes that a layer stores go over as they are, others are rounded by `gguf`.

A block is 32 entries of a row. Q8_0: a scale in float16, 32 codes. Q4_1: a scale and a smallest value in float16, 32
codes of 4 bits, the first 16 in the low halves of bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..forms.residual import Int4Residual, Int8Residual, Residual
from ..linalg.low_bit import GROUP

Rows = Tensor | slice  # which rows of a weight, in which order
OWN_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Blocks(NamedTuple):
    """The bytes of a tensor, a numpy array, and the name of their type."""

    data: Any
    type: str


def blocks_of(weight: Tensor | Residual, rows: Rows = slice(None), int8: bool = False) -> Blocks:
    """A tensor as a GGUF file has it.

    Codes of 8 bits keep their one scale a row, rounded to float16: an error of at most 2^-11 of every entry, or of
    4e-6 in rows without an entry above 0.008. Rounding anew with a scale a block would lose about as much as the codes
    have lost already. Codes of 4 bits lose nothing. Rows whose length 32 does not divide have no blocks: they are
    written in their own dtype.

    **Shape**
        - weight: (out, in), or a vector

    Args:
        weight: Dense, or in few bits.
        rows: Their order.
        int8: Round a dense matrix to 8 bits.
    """
    if isinstance(weight, Residual):
        if weight.in_features % GROUP == 0 and isinstance(weight, Int8Residual):
            return _q8_0(weight.codes[rows], weight.scale[rows])
        if weight.in_features % GROUP == 0 and isinstance(weight, Int4Residual):
            return _q4_1(weight.codes[rows], weight.scale[rows], weight.smallest[rows])
        dtype, weight = weight.dtype, weight.dense_weight()
    else:
        dtype = weight.dtype
    if weight.ndim < 2:
        kind = "F32"  # llama.cpp multiplies norms and adds biases in no other
    elif int8 and weight.shape[1] % GROUP == 0:
        kind = "Q8_0"
    else:
        kind = OWN_TYPES[dtype]
    return _rounded(weight[rows], kind)


def _rounded(weight: Tensor, kind: str) -> Blocks:
    import gguf

    return Blocks(gguf.quantize(weight.detach().cpu().float().numpy(), gguf.GGMLQuantizationType[kind]), kind)


def _q8_0(codes: Tensor, scale: Tensor) -> Blocks:
    count = codes.shape[1] // GROUP
    scales = scale.to(torch.float16).expand(-1, count)
    return _joined("Q8_0", [_bytes(scales), codes.contiguous().view(torch.uint8).unflatten(1, (count, GROUP))])


def _q4_1(codes: Tensor, scale: Tensor, smallest: Tensor) -> Blocks:
    halves = torch.stack([codes & 15, codes >> 4], -1).view(len(codes), -1, GROUP)
    first, second = halves.chunk(2, -1)
    return _joined("Q4_1", [_bytes(scale), _bytes(smallest), first | (second << 4)])


def _bytes(values: Tensor) -> Tensor:
    """Numbers in float16, one a block, as their two bytes: (out, blocks, 2)."""
    return values.unsqueeze(-1).contiguous().view(torch.uint8)


def _joined(kind: str, parts: list[Tensor]) -> Blocks:
    return Blocks(torch.cat(parts, -1).flatten(1).cpu().numpy(), kind)
