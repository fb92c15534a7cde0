"""WASI for PEFT: fine-tune with weights and activations kept in small subspaces.

Importing this package registers the PEFT type `WASI`.
"""

from . import memory, report
from .cost.estimate import Estimate, estimate_wasi
from .cost.peak import PeakMemory, measure_peak_memory
from .cost.profile import StepProfile, profile_wasi
from .factors.block_repair import repair_blocks
from .factors.calibration import Calibration, calibrate_wasi
from .factors.model_repair import repair_factors
from .factors.prepare import preprocess_wasi
from .factors.token_repair import repair_tokens
from .hub import cards
from .hub.adapters import load_adapter
from .hub.cards import write_card
from .hub.compressed import compress
from .hub.export import export
from .hub.from_lora import start_from_lora
from .hub.plain import to_plain
from .hub.prepare import prepare_checkpoint
from .planner.inference import fold_cores, merge_slow_layers
from .planner.planner import plan_wasi
from .ranks.plan import WasiPlan
from .training.callback import WasiCallback
from .training.optimizer import create_wasi_optimizer
from .training.optimizer_in_backward import OptimizerInBackward
from .training.resize import resize_rank
from .training.subspace_sgd import SubspaceSGD
from .tuner import hotswap
from .tuner.config import WasiConfig
from .tuner.layer import WasiLayer
from .tuner.model import WasiModel
from .tuner.prepared import WasiFactors
from .tuner.registration import register
from .tuner.summary import WasiSummary, wasi_summary

__version__ = "0.1.0.dev0"

__all__ = [
    "Calibration",
    "Estimate",
    "OptimizerInBackward",
    "PeakMemory",
    "StepProfile",
    "SubspaceSGD",
    "WasiCallback",
    "WasiConfig",
    "WasiFactors",
    "WasiLayer",
    "WasiModel",
    "WasiPlan",
    "WasiSummary",
    "calibrate_wasi",
    "compress",
    "create_wasi_optimizer",
    "estimate_wasi",
    "export",
    "fold_cores",
    "load_adapter",
    "measure_peak_memory",
    "memory",
    "merge_slow_layers",
    "plan_wasi",
    "prepare_checkpoint",
    "preprocess_wasi",
    "profile_wasi",
    "repair_blocks",
    "repair_factors",
    "repair_tokens",
    "report",
    "resize_rank",
    "start_from_lora",
    "to_plain",
    "wasi_summary",
    "write_card",
]

register(WasiConfig, WasiModel)
cards.install()
hotswap.install()
