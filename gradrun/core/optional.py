"""Import optional libraries on use; a missing one is an error that names gradrun's extra."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gradrun.core.errors import ConfigError, first_line
from gradrun.core.options import option

EXTRAS = {
    "torchmetrics": ("torchmetrics", "metrics"),
    "pyarrow": ("pyarrow", "parquet"),
    "PIL": ("Pillow", "images"),
    "transformers": ("transformers", "hf"),
    "timm": ("timm", "timm"),
    "torchvision": ("torchvision", "timm"),
    "ray": ("Ray", "ray"),
    "backports": ("backports.zstd", "zstd"),
    "soundfile": ("soundfile", "audio"),
    "datasets": ("datasets", "datasets"),
    "soxr": ("soxr", "audio"),
    "cloudpickle": ("cloudpickle", "notebook"),
    "fsspec": ("fsspec", "remote"),
}
"""import name -> package name, and the extra that installs it."""

_LOWER_BOUND = re.compile(r"([\w.-]+)>=([\d.]+)")

_MAX_PIXELS = 1024**3 // 4 // 3
"""Pillow's own limit of pixels."""


def needs_trust() -> str:
    """Return the end of an error about code that was not run."""
    return f"which was not run; if you trust it, pass {option('trust_code')}"


def import_optional(name: str, key: str, submodule: str = "") -> Any:
    """Import a library of EXTRAS or one of its submodules.

    Args:
        submodule: such as "classification" of torchmetrics; default: the library itself.

    Raises:
        ConfigError: the library is not installed, is too old or fails to import.
    """
    package, extra = EXTRAS[name]
    check_version(package, f"'gradrun[{extra}]'", key)
    try:
        return importlib.import_module(f"{name}.{submodule}" if submodule else name)
    except ImportError as error:
        raise ConfigError(f"this needs {package}; pip install 'gradrun[{extra}]'", key) from error
    except Exception as error:  # a build for another torch may raise anything
        raise ConfigError(
            f"{package} is installed but cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}): it, or a dependency, does not match this torch; "
            f"pip install 'gradrun[{extra}]' from the index that torch was installed from",
            key,
        ) from error


def check_version(package: str, install: str, key: str = "") -> None:
    """Refuse a package that is older than gradrun's extras require.

    pip ignores their bounds where a package was installed without the extra, and old versions may
    give other predictions.

    Args:
        install: the argument of pip install that brings a newer one.

    Raises:
        ConfigError: the package is installed and too old.
    """
    if problem := _version_problem(package):
        raise ConfigError(f"{problem}; pip install --upgrade {install}", key)


@cache
def _version_problem(package: str) -> str:
    """Compare the version with the bound in the metadata of gradrun; "" if it is new enough."""
    try:
        installed, required = metadata.version(package), metadata.requires("gradrun") or []
    except metadata.PackageNotFoundError:  # of the package, or of a checkout of gradrun
        return ""
    for bound in filter(None, map(_LOWER_BOUND.match, required)):
        name, oldest = bound.groups()
        if _normalized(name) == _normalized(package) and _release(installed) < _release(oldest):
            return f"this needs {package} {oldest} or newer, and {installed} is installed"
    return ""


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _release(version: str) -> list[int]:
    """Return the numbers of a version: [2, 13, 0] of "2.13.0+cpu"."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def import_transformers(key: str) -> Any:
    """Import transformers without its progress bars and log messages, within `library_settings`.

    Raises:
        ConfigError: it is not installed; `key` needs it.
    """
    transformers = import_optional("transformers", key)
    _set_transformers_logging(transformers, logging.ERROR, progress_bar=False)
    return transformers


def import_pillow(key: str, max_pixels: int) -> Any:
    """Import PIL.Image without its warnings, and with its limit of pixels, in `library_settings`.

    Raises:
        ConfigError: Pillow is not installed; `key` needs it.
    """
    pillow = import_optional("PIL", key, "Image")
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    pillow.MAX_IMAGE_PIXELS = max_pixels
    return pillow


@contextmanager
def library_settings() -> Iterator[None]:
    """Restore warning filters, Pillow's limit and transformers' log settings at the end."""
    max_pixels = getattr(sys.modules.get("PIL.Image"), "MAX_IMAGE_PIXELS", _MAX_PIXELS)
    loaded = sys.modules.get("transformers")
    level = loaded.logging.get_verbosity() if loaded else logging.WARNING
    progress_bar = loaded.logging.is_progress_bar_enabled() if loaded else True
    try:
        with warnings.catch_warnings():
            yield
    finally:
        pillow: Any = sys.modules.get("PIL.Image")
        if pillow:
            pillow.MAX_IMAGE_PIXELS = max_pixels
        if transformers := sys.modules.get("transformers"):
            _set_transformers_logging(transformers, level, progress_bar=progress_bar)


def _set_transformers_logging(transformers: Any, level: int, *, progress_bar: bool) -> None:
    settings = transformers.logging
    settings.set_verbosity(level)
    (settings.enable_progress_bar if progress_bar else settings.disable_progress_bar)()


@contextmanager
def hub_errors(source: Path | str, key: str, advice: str = "") -> Iterator[None]:
    """Convert errors of transformers to a ConfigError for `key`.

    Args:
        advice: the end of the message if the source contains Python code.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a damaged folder may raise anything
        raise ConfigError(_hub_message(source, error, advice or needs_trust()), key) from error


def _hub_message(source: Path | str, error: Exception, advice: str) -> str:
    text = str(error)
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in text:
        return f"{source} contains Python code, {advice}"
    if isinstance(error, OSError) and "safetensors" in text:
        return (
            f"{source} has no .safetensors weights; save them with save_pretrained, or, if you "
            f"trust its other files, pass {option('trust_code')}"
        )
    if isinstance(source, str):
        return f"{source!r} is neither a folder relative to the config nor on the hub: {line:.300}"
    return f"{source} cannot be loaded: {line:.300}"
