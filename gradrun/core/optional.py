"""The optional libraries: which extra of gradrun brings each, and the sentence when it is missing.

Knows names only; the one file that uses a library asks for it here, when it is needed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradrun.core.errors import ConfigError

EXTRAS = {
    "torchmetrics": ("torchmetrics", "metrics"),
    "pyarrow": ("pyarrow", "parquet"),
    "PIL": ("Pillow", "images"),
    "transformers": ("transformers", "hf"),
    "timm": ("timm", "timm"),
    "torchvision": ("torchvision", "timm"),
}
"""library as it is imported -> its name, and the extra that installs it."""


def import_optional(name: str, key: str, part: str = "") -> Any:
    """The library, or a part of it ("torchmetrics", part "classification").

    Args:
        name: a library of EXTRAS.
        key: the config key that asks for it.
        part: the submodule wanted; default: the library itself.

    Raises:
        ConfigError: it is not installed, or is and cannot be imported.
    """
    package, extra = EXTRAS[name]
    try:
        return importlib.import_module(f"{name}.{part}" if part else name)
    except ImportError as error:
        raise ConfigError(f"this needs {package}; pip install 'gradrun[{extra}]'", key) from error
    except Exception as error:  # what was built for another torch fails in its own way
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"{package} is installed and cannot be imported ({said}): it, or what it needs, does "
            f"not fit this torch; pip install 'gradrun[{extra}]' from where torch came from",
            key,
        ) from error


NEEDS_TRUST = "which would run with your rights; if you trust it, run with --trust-code"


def import_transformers(key: str) -> Any:
    """The package transformers, told to be quiet.

    Raises:
        ConfigError: it is not installed; `key` asks for it.
    """
    # Bars and advice of its own would stand among our tables; what matters of it raises.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers = import_optional("transformers", key)
    said: Any = transformers.logging
    said.set_verbosity_error()
    said.disable_progress_bar()
    return transformers


@contextmanager
def hub_errors(place: Path | str, key: str, of_code: str = NEEDS_TRUST) -> Iterator[None]:
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
