"""transformers, which is imported here and nowhere else, and what it says when it cannot open.

Knows that a name is a folder or lies on the hub; not whether a model or a tokenizer is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradrun.core import optional
from gradrun.core.errors import ConfigError

NEEDS_TRUST = "which would run with your rights; if you trust it, run with --trust-code"


def library(key: str) -> Any:
    """The package transformers, told to be quiet.

    Raises:
        ConfigError: it is not installed; `key` asks for it.
    """
    # Bars and advice of its own would stand among our tables; what matters of it raises.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers = optional.library("transformers", key)
    said: Any = transformers.logging
    said.set_verbosity_error()
    said.disable_progress_bar()
    return transformers


@contextmanager
def opening(place: Path | str, key: str, of_code: str = NEEDS_TRUST) -> Iterator[None]:
    """Turn what transformers raises into a ConfigError about `key`.

    `of_code` goes on about a place that brings code.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a folder can be broken in any of a hundred ways
        raise ConfigError(_said(place, error, of_code), key) from error


def _said(place: Path | str, error: Exception, of_code: str) -> str:
    text = str(error)
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in text:
        return f"{place} brings code of its own, {of_code}"
    if isinstance(error, OSError) and "safetensors" in text:
        return (
            f"{place} holds no .safetensors weights; save them with save_pretrained, or, if you "
            "trust its other files, run with --trust-code"
        )
    if isinstance(place, str):
        return (
            f"there is no folder {place!r} beside the config, and the hub gives nothing of that "
            f"name: {line:.300}"
        )
    return f"{place} cannot be opened: {line:.300}"
