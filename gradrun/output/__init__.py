"""Predictions written to files that survive a crash."""
