"""Errors that gradrun raises on purpose, each with an exit code.

    GradrunError            1
    ├── ConfigError         2  bad usage or config; nothing was written
    │   ├── ModelInputError    the model failed on its first batch
    │   └── UnsupportedValues  the format cannot store the model's output
    ├── RunFailed           1  the run stopped early; earlier output stays valid
    └── Interrupted       130  stopped by the user (143 after SIGTERM)

The command line catches them in one place and prints the message.
"""

from __future__ import annotations

from typing import Any, Self

EXIT_CHECK_FAILED = 3
EXIT_INCONCLUSIVE = 4


class GradrunError(Exception):
    """An expected failure. The message names location, problem, allowed values and a remedy.

    Args:
        message: the sentence.
        result: the RunResult measured before the failure, if any.
        resumable: whether the same command with `--resume` continues the run.
        resume_options: options without which a resume would fail at the same sample.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        result: Any = None,
        resumable: bool = False,
        resume_options: str = "",
    ) -> None:
        super().__init__(message)
        self.result = result
        self.resumable = resumable
        self.resume_options = resume_options

    def reworded(self, message: str, result: Any) -> Self:
        """Return the same error with another message and result."""
        new = type(self)(message)
        vars(new).update(vars(self) | {"result": result})
        return new


class ConfigError(GradrunError):
    """The request is invalid; nothing was written.

    Args:
        message: the sentence.
        key: the dotted config key at fault ("data.path"), which `LoadedConfig` turns
            into file:line:col. Empty if the message names the location or no key is at fault.
    """

    exit_code = 2

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ModelInputError(ConfigError):
    """The model failed on its first batch: model and data do not match."""


class UnsupportedValues(ConfigError):
    """The format of the predictions cannot store the values that the model returns."""


class SampleError(Exception):
    """One sample cannot be read; `run.on_error` decides whether the run continues."""


class RunFailed(GradrunError):
    """The run stopped early; predictions committed before stay valid."""


class Interrupted(GradrunError):
    """The user stopped the run; predictions committed before stay valid."""

    def __init__(self, message: str = "interrupted", *, exit_code: int = 130, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a C++ or Python traceback."""
    try:
        lines = str(error).strip().splitlines() or [type(error).__name__]
    except Exception:  # a user's __str__ may raise
        return type(error).__name__
    # The TorchScript interpreter prints the traceback first and the reason last.
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0]
