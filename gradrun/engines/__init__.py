"""Spread a run over worker processes, on this machine or on a cluster."""
