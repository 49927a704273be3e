"""The optional libraries: which extra of gradrun brings each, and the sentence when it is missing.

Knows names only; the one file that uses a library asks for it here, when it is needed.
"""

from __future__ import annotations

import importlib
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


def library(name: str, key: str, part: str = "") -> Any:
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
