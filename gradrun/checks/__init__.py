"""Check a model against limits, a baseline or another revision."""
