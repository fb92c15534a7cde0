"""A plan for a model: ranks, memory mode and forms under a budget."""
