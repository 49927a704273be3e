"""Measurements and their meaning: records, statistics, verdicts and warnings."""
