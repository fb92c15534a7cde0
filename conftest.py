"""Modules whose optional package is not installed have no doctests to collect."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("flwr") else ["wasi_peft/training/flower.py"]
