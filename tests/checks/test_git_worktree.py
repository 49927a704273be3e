"""A git revision checked out beside, and every trace of it removed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gradrun.checks.git_worktree import git_worktree
from gradrun.core.errors import ConfigError

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def git(*words: str) -> str:
    words = ("-c", "user.name=a", "-c", "user.email=a@b", *words)
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def check_out(revision: str, beside: Path) -> None:
    with git_worktree(revision, beside, []):
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path("in").mkdir()
    Path("in/kept").write_text("old")
    git("add", ".")
    git("commit", "-qm", "one")
    Path("in/kept").write_text("new")
    return tmp_path


def test_the_folder_holds_the_revision_and_goes_with_the_block(repository):
    with git_worktree("HEAD", Path("in"), []) as out:
        folder = out.of(Path("in").resolve())
        assert (folder / "kept").read_text() == "old"
        assert folder.name == "in"
    assert not folder.exists()
    assert Path("in/kept").read_text() == "new"
    assert len(git("worktree", "list").splitlines()) == 1


def test_it_goes_when_the_block_fails(repository):
    with pytest.raises(KeyboardInterrupt), git_worktree("HEAD", Path("in"), []) as out:
        raise KeyboardInterrupt
    assert not out.tree.exists()
    assert len(git("worktree", "list").splitlines()) == 1


def test_files_that_git_does_not_track_are_lent(repository, tmp_path_factory):
    Path("in/data.npy").write_bytes(b"much")
    outside = tmp_path_factory.mktemp("outside") / "far"
    outside.touch()
    lent = [Path("in/data.npy").resolve(), Path("in/kept").resolve(), outside]
    with git_worktree("HEAD", Path("in"), lent) as out:
        folder = out.of(Path("in").resolve())
        assert (folder / "data.npy").read_bytes() == b"much"
        assert (folder / "kept").read_text() == "old", "what the revision has is its own"
    assert Path("in/data.npy").read_bytes() == b"much"


def test_of_a_folder_that_is_tracked_in_part_the_rest_is_lent(repository):
    Path(".gitignore").write_text("*.bin\n")
    Path("in/far").mkdir()
    for name in ("in/model.bin", "in/far/model.bin", "in/plain.txt"):
        Path(name).write_text("much")
    Path("in/later").write_text("tracked since")
    git("add", "in/later")
    with git_worktree("HEAD", Path("in"), [Path("in").resolve()]) as out:
        folder = out.of(Path("in").resolve())
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert found == ["far", "far/model.bin", "kept", "model.bin", "plain.txt"]
        assert (folder / "kept").read_text() == "old"


def test_no_hook_of_the_repository_runs(repository):
    hook = Path(".git/hooks/post-checkout")
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    hook.chmod(0o755)
    with git_worktree("HEAD", Path("in"), []):
        pass
    assert not (repository / "ran").exists()


def test_the_commit_that_a_hook_runs_for_is_left_alone(repository, monkeypatch):
    git("add", ".")
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / ".git" / "index"))
    before = git("ls-files", "--stage")
    with git_worktree("HEAD", Path("in"), []) as out:
        assert (out.tree / "in" / "kept").read_text() == "old"
    assert git("ls-files", "--stage") == before


@pytest.mark.parametrize("revision", ["nope", "--all", "-h", "HEAD~5", "", "HEAD:in"])
def test_what_is_no_revision_is_told(repository, revision):
    with pytest.raises(ConfigError, match="neither a file nor a revision"):
        check_out(revision, Path("in"))


def test_without_a_repository_or_git_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="git rev-parse failed"):
        check_out("HEAD", tmp_path)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ConfigError, match="takes git"), git_worktree("HEAD", tmp_path, []):
        pass
