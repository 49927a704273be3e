"""The errors that gradrun raises on purpose, each with its exit code.

Knows no config, no tensor and no terminal; cli.py is the one place that catches them.
"""

from __future__ import annotations

from typing import Any


class GradrunError(Exception):
    """A sentence for a person: where, what, what is allowed, what to do."""

    exit_code = 1
    result: Any = None
    """The RunResult of what had run when the error came, where anything had."""
    resumable: bool = False
    """Whether the same command with --resume goes on from there."""


class ConfigError(GradrunError):
    """What was asked for cannot be done, and nothing was written.

    `key` is the dotted config key at fault ("data.path"); yamlfile.located turns it into
    file:line:col. Empty where the text already says where, or where no key is at fault.
    """

    exit_code = 2

    def __init__(self, text: str, key: str = "") -> None:
        super().__init__(text)
        self.key = key


class ModelInputError(ConfigError):
    """The model raised on its first batch: config and model do not go together."""


class SampleError(Exception):
    """One sample that cannot be read, as a sentence; `run.on_error` says what becomes of it."""


class RunFailed(GradrunError):
    """The run began and could not end; what was written before stays valid."""

    exit_code = 1


class CheckFailed(GradrunError):
    """A check found what its limits do not allow; the result holds the figures."""

    exit_code = 3


class Inconclusive(GradrunError):
    """A check could not be decided, such as time on another machine than the baseline's."""

    exit_code = 4


class Interrupted(GradrunError):
    """The user stopped the run; what was written before stays valid."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the C++ or Python traceback in it."""
    try:
        lines = str(error).strip().splitlines() or [type(error).__name__]
    except Exception:  # __str__ of a user's exception may raise
        return type(error).__name__
    # The TorchScript interpreter puts its traceback first and the reason last.
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0]
