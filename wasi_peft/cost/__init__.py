"""What a training step takes: simulated, traced, timed."""
