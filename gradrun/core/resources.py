"""Where the example configs and the zoo lie: inside an installed wheel, or beside a checkout.

Knows the two folders' names and nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def bundled(folder: str) -> Path:
    """The folder "configs" or "models" of this installation."""
    installed = _PACKAGE / "_bundled" / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def examples() -> list[str]:
    """The names that `--example` takes."""
    return sorted(path.stem for path in bundled("configs").glob("*.yaml"))
