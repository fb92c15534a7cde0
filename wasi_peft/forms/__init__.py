"""Forms: what is stored in place of a dense weight. Plain modules that know neither PEFT nor training."""

from .cored import CoredLinear
from .dense import FactoredWeight, ParkedLinear, build_dense, dense_bias, dense_weight
from .factored import FactoredLinear
from .split import SplitLinear

__all__ = [
    "CoredLinear",
    "FactoredLinear",
    "FactoredWeight",
    "ParkedLinear",
    "SplitLinear",
    "build_dense",
    "dense_bias",
    "dense_weight",
]
