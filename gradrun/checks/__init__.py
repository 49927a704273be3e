"""Compare a model with its limits, a baseline or another revision."""
