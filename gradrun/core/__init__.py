"""Errors, records, files and units that every package uses; imports nothing of gradrun."""
