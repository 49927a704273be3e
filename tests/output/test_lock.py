"""One writer per folder; a lock ends with its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gradrun.core.errors import ConfigError
from gradrun.output.lock import FILE_NAME, FolderLock, check_unlocked
from tests.conftest import ROOT


def test_a_second_writer_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    message = f"process {os.getpid()} on {socket.gethostname()} is writing to"
    with pytest.raises(ConfigError, match=message):
        second.acquire()
    with pytest.raises(ConfigError, match=message):
        check_unlocked(tmp_path)
    first.release()
    check_unlocked(tmp_path)
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_check_does_not_lock_the_folder(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    check_unlocked(tmp_path / "not there")
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"junk", b"[]", b'{"host": "x"}'])
def test_a_lock_file_of_a_dead_process_has_no_effect(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    check_unlocked(tmp_path)
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from gradrun.output.lock import FolderLock; "
        "FolderLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        owner.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {owner.pid} on"):
            FolderLock(tmp_path).acquire()
        owner.kill()
        owner.wait()
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
