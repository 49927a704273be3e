"""One writer a folder: the second is told of the first, and the dead hold nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gradrun.core.errors import ConfigError
from gradrun.output.lock import NAME, FolderLock, check_free
from tests.conftest import ROOT


def test_the_second_is_told_of_the_first_by_host_and_process(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    told = f"process {os.getpid()} on {socket.gethostname()} is writing into"
    with pytest.raises(ConfigError, match=told):
        second.take()
    with pytest.raises(ConfigError, match=told):
        check_free(tmp_path)
    first.release()
    check_free(tmp_path)
    second.take()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_to_look_is_not_to_hold(tmp_path: Path) -> None:
    check_free(tmp_path)
    check_free(tmp_path / "not there")
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"junk", b"[]", b'{"host": "x"}'])
def test_what_a_dead_process_left_holds_nobody_up(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    check_free(tmp_path)
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from gradrun.output.lock import FolderLock; "
        "FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            FolderLock(tmp_path).take()
        holder.kill()
        holder.wait()
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
