"""Checkpoints and export: compressed models that load in one line, and forms that others read."""
