"""The user's function in output.transform, which turns the model's output into what is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradrun.core.errors import GradrunError, SampleError
from gradrun.core.imports import describe_user_error, import_function, require_trust

KEY = "output.transform"

Decoder = Callable[[Any], Any]
"""The model's output of a batch -> tensors, columns of values, or a dict of them."""


def open_decoder(target: str, *, trust_code: bool) -> tuple[Decoder, dict[str, Path]]:
    """Import a function; its errors become SampleErrors, so that `run.on_error` applies to them.

    Args:
        target: FILE.py:FUNCTION.
        trust_code: whether the user allows the config to run code.

    Returns:
        The function, and the name and path of each file of its code.

    Raises:
        ConfigError: the function needs trust or cannot be imported.
    """
    name = Path(target).name
    require_trust(trust_code, f"{target} is Python code", KEY)
    function, files = import_function(target, KEY)

    @functools.wraps(function)
    def decode(returned: Any) -> Any:
        try:
            return function(returned)
        except (GradrunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code may raise anything
            raise SampleError(f"{name} failed: {describe_user_error(error)}") from error

    return decode, files
