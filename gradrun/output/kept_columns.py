"""Names of columns that are carried through from the input, beside the predictions of a batch."""

from __future__ import annotations

_KEY = "keep:"
"""Starts the names of kept columns among the outputs; no output has a colon in its name."""


def kept_key(name: str) -> str:
    """Return the name of a column of the input among the outputs of a batch."""
    return f"{_KEY}{name}"


def is_kept(name: str) -> bool:
    """Report whether an entry of the outputs of a batch is a column of the input."""
    return name.startswith(_KEY)


def title_of(name: str) -> str:
    """Return the title in the files of an entry of the outputs of a batch."""
    return name.removeprefix(_KEY)
