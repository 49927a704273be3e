"""Variants timed against each other in worker processes."""
