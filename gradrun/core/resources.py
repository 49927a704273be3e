"""Folders of the example configs and the zoo: in an installed wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def bundled(folder: str) -> Path:
    """Return the folder "configs" or "models" of this installation."""
    installed = _PACKAGE / "_bundled" / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def examples() -> list[str]:
    """Return the names of the bundled examples, for `--example`."""
    return sorted(path.stem for path in bundled("configs").glob("*.yaml"))
