"""WASI for PEFT: fine-tune with weights and activations kept in small subspaces.

Importing this package registers the PEFT type `WASI`.
"""

from torch.optim.optimizer import register_optimizer_step_post_hook

from ._registration import register
from .attention import low_bit_attention
from .blockwise import repair_blocks
from .calibration import Calibration, calibrate_wasi
from .callbacks import WasiCallback, resize_rank
from .chunked_loss import chunked_cross_entropy, remove_chunked_loss, use_chunked_loss
from .chunked_mlp import chunk_mlps, unchunk_mlps
from .config import WasiConfig
from .estimate import Estimate, estimate_wasi
from .inference import fold_cores, merge_slow_layers
from .layer import Linear, WasiLayer, after_optimizer_step
from .model import WasiModel
from .optimizer import SubspaceSGD, create_wasi_optimizer
from .optimizer_in_backward import OptimizerInBackward
from .planner import plan_wasi
from .planning import WasiPlan
from .preprocessing import preprocess_wasi
from .profile_report import costs_table, plot_profiles, profiles_table
from .profiling import PeakMemory, measure_peak_memory
from .recompute import BlockRecomputation, recompute_blocks
from .repair import REPAIR_STEPS, repair_factors
from .report import plot_calibration, plot_estimates, plot_plan
from .saved import LowBitSavedTensors, store_saved_tensors
from .slices import BatchSlices, slice_blocks, unslice_blocks
from .step_profile import StepProfile, profile_wasi
from .summary import WasiSummary, wasi_summary
from .token_repair import repair_tokens

__version__ = "0.1.0.dev0"

__all__ = [
    "REPAIR_STEPS",
    "BatchSlices",
    "BlockRecomputation",
    "Calibration",
    "Estimate",
    "Linear",
    "LowBitSavedTensors",
    "OptimizerInBackward",
    "PeakMemory",
    "StepProfile",
    "SubspaceSGD",
    "WasiCallback",
    "WasiConfig",
    "WasiLayer",
    "WasiModel",
    "WasiPlan",
    "WasiSummary",
    "calibrate_wasi",
    "chunk_mlps",
    "chunked_cross_entropy",
    "costs_table",
    "create_wasi_optimizer",
    "estimate_wasi",
    "fold_cores",
    "low_bit_attention",
    "measure_peak_memory",
    "merge_slow_layers",
    "plan_wasi",
    "plot_calibration",
    "plot_estimates",
    "plot_plan",
    "plot_profiles",
    "preprocess_wasi",
    "profile_wasi",
    "profiles_table",
    "recompute_blocks",
    "remove_chunked_loss",
    "repair_blocks",
    "repair_factors",
    "repair_tokens",
    "resize_rank",
    "slice_blocks",
    "store_saved_tensors",
    "unchunk_mlps",
    "unslice_blocks",
    "use_chunked_loss",
    "wasi_summary",
]

register(WasiConfig, WasiModel)
_step_hook = register_optimizer_step_post_hook(after_optimizer_step)
