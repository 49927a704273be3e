"""How messages name options: flags on the command line, arguments in Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)


@contextmanager
def command_line() -> Iterator[None]:
    """Name options as flags within the block."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def option(name: str, value: str = "True") -> str:
    """Name an option of a command and the argument of its function.

    Args:
        name: of the argument, such as "trust_code".
        value: the argument's value in Python; a flag takes none.

    Returns:
        "--trust-code" on the command line, and "trust_code=True" in Python.
    """
    return f"--{name.replace('_', '-')}" if _on_command_line.get() else f"{name}={value}"
