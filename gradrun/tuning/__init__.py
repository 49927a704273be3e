"""Search the settings of a run for the fastest within a tolerance, and confirm it."""
