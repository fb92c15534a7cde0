"""WASI for PEFT: fine-tune with weights and activations kept in small subspaces.

Importing this package registers the PEFT type `WASI`.
"""

from .cost.estimate import Estimate, estimate_wasi
from .cost.peak import PeakMemory, measure_peak_memory
from .cost.profile import StepProfile, profile_wasi
from .factors.blockwise import repair_blocks
from .factors.calibration import Calibration, calibrate_wasi
from .factors.prepare import preprocess_wasi
from .factors.repair import REPAIR_STEPS, repair_factors
from .factors.token_repair import repair_tokens
from .memory.attention import low_bit_attention
from .memory.chunked_mlp import chunk_mlps, unchunk_mlps
from .memory.loss import chunked_cross_entropy, remove_chunked_loss, use_chunked_loss
from .memory.recompute import BlockRecomputation, recompute_blocks
from .memory.saved import LowBitSavedTensors, store_saved_tensors
from .memory.slices import BatchSlices, slice_blocks, unslice_blocks
from .planner.inference import fold_cores, merge_slow_layers
from .planner.planner import plan_wasi
from .ranks.plan import WasiPlan
from .report.plots import plot_calibration, plot_estimates, plot_plan
from .report.profiles import costs_table, plot_profiles, profiles_table
from .training.callback import WasiCallback
from .training.optimizer import create_wasi_optimizer
from .training.optimizer_in_backward import OptimizerInBackward
from .training.resize import resize_rank
from .training.subspace_sgd import SubspaceSGD
from .tuner.config import WasiConfig
from .tuner.layer import Linear, WasiLayer
from .tuner.model import WasiModel
from .tuner.registration import register
from .tuner.summary import WasiSummary, wasi_summary

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
