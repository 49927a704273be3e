"""The `gradrun` command; the only importer of Typer.

Packages are imported inside the commands, so that --help needs neither torch nor pydantic.
"""
