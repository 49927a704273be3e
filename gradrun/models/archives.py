"""Archives of torch's, before torch opens them: none takes much more memory than disk.

Knows zip files, as zipfile and as torch see them; not what the members mean.
"""

from __future__ import annotations

import os
import zipfile
from typing import IO, Any

import torch

from gradrun.core.units import format_bytes

_MOST_PACKED = 256 * 2**20


class HostileError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


def opened(file: IO[bytes]) -> Any:
    """torch's reader of a zip archive that does not grow when it is read.

    Raises:
        HostileError: it would unpack to far more than it is.
        Exception: it is no archive, as zipfile or torch say in any of a dozen ways.
    """
    held = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        check_claim(held, sum(member.file_size for member in archive.infolist()))
    file.seek(0)
    # A crafted file shows each of them other members.
    reader = torch._C.PyTorchFileReader(file)
    check_claim(held, sum(map(reader.get_record_size, reader.get_all_records())))
    return reader


def check_claim(held: int, claimed: int) -> None:
    """See that members are not packed, given their bytes and the archive's.

    Raises:
        HostileError: they are; torch packs a program's code alone.
    """
    if claimed > held + _MOST_PACKED:
        raise HostileError(
            f"has {format_bytes(held)} and would unpack to {format_bytes(claimed)}, as nothing "
            "does that torch writes"
        )
