"""Archives of torch's, before torch opens them: none takes much more memory than disk.

Knows zip files, as zipfile and as torch see them; not what the members mean.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from gradrun.errors import ConfigError
from gradrun.units import bytes_text

_MOST_PACKED = 256 * 2**20


def opened(path: Path, key: str) -> Any:
    """torch's reader of a zip archive that does not grow when it is read.

    Args:
        path: what is no archive raises what zipfile or torch raise.
        key: the config's key that names it.

    Raises:
        ConfigError: it would unpack to far more than the file holds.
    """
    with zipfile.ZipFile(path) as archive:
        check_claim(path, key, sum(member.file_size for member in archive.infolist()))
    # A crafted file shows each of them other members.
    reader = torch._C.PyTorchFileReader(str(path))
    check_claim(path, key, sum(map(reader.get_record_size, reader.get_all_records())))
    return reader


def check_claim(path: Path, key: str, claimed: int) -> None:
    """See that members of so many bytes are not packed: torch packs a program's code alone.

    Raises:
        ConfigError: they are.
    """
    held = path.stat().st_size
    if claimed > held + _MOST_PACKED:
        raise ConfigError(
            f"{path} has {bytes_text(held)} and would unpack to {bytes_text(claimed)}, as nothing "
            "does that torch writes; save it again",
            key,
        )
