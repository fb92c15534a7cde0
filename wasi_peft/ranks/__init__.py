"""Which ranks fit a budget: plain numbers, no tensors."""
