"""The user's function in output.transform, which turns the model's output into what is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from gradrun.core.errors import ConfigError, GradrunError, SampleError
from gradrun.core.imports import describe_user_error, import_target, require_trust

KEY = "output.transform"

Decoder = Callable[[Any], Any]
"""The model's output of a batch -> tensors, columns of values, or a dict of them."""


def open_decoder(target: str, *, beside: Collection[Path], trust_code: bool) -> Decoder:
    """Import a function; its errors become SampleErrors, so that `run.on_error` applies to them.

    Args:
        target: FILE.py:FUNCTION.
        beside: root folders of the code of the model and the data, which stays imported.
        trust_code: whether the user allows the config to run code.

    Raises:
        ConfigError: the function needs trust or cannot be imported, or is not one.
    """
    name = Path(target).name
    require_trust(trust_code, f"{target} is Python code", KEY)
    function = import_target(target, None, KEY, beside=beside)
    if not callable(function):
        raise ConfigError(f"{target} is not a function of the model's output", KEY)

    @functools.wraps(function)
    def decode(returned: Any) -> Any:
        try:
            return function(returned)
        except (GradrunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code may raise anything
            raise SampleError(f"{name} failed: {describe_user_error(error)}") from error

    return decode
