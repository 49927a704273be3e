"""The optional libraries: which extra of gradrun brings each, and the sentence when it is missing.

Knows names only; the one file that uses a library asks for it here, when it is needed.
"""

from __future__ import annotations

import importlib
from typing import Any

from gradrun.errors import ConfigError

EXTRAS = {"torchmetrics": "metrics"}
"""library -> the extra that installs it."""


def library(name: str, key: str, part: str = "") -> Any:
    """The library, or a part of it ("torchmetrics", part "classification").

    Args:
        name: a library of EXTRAS.
        key: the config key that asks for it.
        part: the submodule wanted; default: the library itself.

    Raises:
        ConfigError: it is not installed, or is and cannot be imported.
    """
    try:
        return importlib.import_module(f"{name}.{part}" if part else name)
    except Exception as error:  # a library built for another torch raises RuntimeError
        first = str(error).partition("\n")[0]
        said = "" if isinstance(error, ImportError) else f", which failed with: {first}"
        raise ConfigError(
            f"this needs {name}{said}; pip install 'gradrun[{EXTRAS[name]}]'", key
        ) from error
