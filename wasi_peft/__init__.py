"""WASI for PEFT: fine-tune with weights and activations kept in small subspaces.

Importing this package registers the PEFT type `WASI`.
"""

from torch.optim.optimizer import register_optimizer_step_post_hook

from ._registration import register
from .calibration import preprocess_wasi
from .config import WasiConfig
from .layer import Linear, WasiLayer, after_optimizer_step
from .model import WasiModel
from .optimizer import SubspaceSGD, create_wasi_optimizer
from .profiling import PeakMemory, measure_peak_memory
from .summary import WasiSummary, wasi_summary

__version__ = "0.1.0.dev0"

__all__ = [
    "Linear",
    "PeakMemory",
    "SubspaceSGD",
    "WasiConfig",
    "WasiLayer",
    "WasiModel",
    "WasiSummary",
    "create_wasi_optimizer",
    "measure_peak_memory",
    "preprocess_wasi",
    "wasi_summary",
]

register(WasiConfig, WasiModel)
_step_hook = register_optimizer_step_post_hook(after_optimizer_step)
