"""A run whose machine loses its network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gradrun.inference import timed_loop
from gradrun.output import checkpointer, remote_folder
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.remote_folder import RemoteFolder


@contextmanager
def lost_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Upload after the batches 20, 40 and 60, and fail after batch 67 without another upload."""
    folder: list[RemoteFolder] = []
    commits = 0

    def remember(self: RemoteFolder, *words: Any) -> None:
        prepare(self, *words)
        folder.append(self)

    def commit(self: Checkpointer) -> None:
        nonlocal commits
        checkpoint(self)
        commits += 1
        if commits % 20 == 0:
            folder[0]._upload()
        if commits == 67:
            raise RuntimeError

    def upload(self: RemoteFolder, *, finished: bool = False) -> None:
        if commits >= 67:
            raise OSError(5, "the network is lost")
        original(self)

    prepare, checkpoint = RemoteFolder._prepare, Checkpointer.commit
    original = RemoteFolder._upload
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "SECONDS", 0)
        patch.setattr(checkpointer, "_TIME_SHARE", 1e9)
        patch.setattr(timed_loop, "_CALLBACK_NS", 0)
        patch.setattr(remote_folder, "SECONDS", 100)
        patch.setattr(Checkpointer, "commit", commit)
        patch.setattr(RemoteFolder, "_prepare", remember)
        patch.setattr(RemoteFolder, "_upload", upload)
        yield
