"""What an update offers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..linalg.coordinates import ImageMoments


@dataclass
class InitialFactors:
    """What injection gives a layer: its factors, and its bias corrected for the mean input that the factors drop.

    **Shape**
        - L: (out, n), orthonormal columns; R: (n, in); bias: (out,) or None; n is K, and with `update="low_rank"` as
          many more as train
        - moments: what the data look like in these coordinates, where R does not train
    """

    L: Tensor
    R: Tensor
    bias: Tensor | None
    moments: ImageMoments | None = None
