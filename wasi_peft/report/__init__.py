"""Tables and plots of plans, calibrations, estimates, profiles and training.

Plots need matplotlib: `pip install wasi_peft[plot]`.
"""

from .kinds import kinds_table
from .plots import plot_calibration, plot_estimates, plot_plan
from .profiles import costs_table, plot_profiles, profiles_table
from .tables import estimates_table, markdown_table, plan_table, print_table
from .training import plot_training

__all__ = [
    "costs_table",
    "estimates_table",
    "kinds_table",
    "markdown_table",
    "plan_table",
    "plot_calibration",
    "plot_estimates",
    "plot_plan",
    "plot_profiles",
    "plot_training",
    "print_table",
    "profiles_table",
]
