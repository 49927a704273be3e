"""A temporary worktree of a git revision, and its removal."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gradrun.checks.git_worktree import git_worktree
from gradrun.core.errors import ConfigError

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="requires git")


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


def test_the_worktree_has_the_revision_and_is_removed_with_the_block(repository):
    with git_worktree("HEAD", Path("in"), []) as worktree:
        folder = worktree.path_of(Path("in").resolve())
        assert (folder / "kept").read_text() == "old"
        assert folder.name == "in"
    assert not folder.exists()
    assert Path("in/kept").read_text() == "new"
    assert len(git("worktree", "list").splitlines()) == 1


def test_the_worktree_is_removed_if_the_block_fails(repository):
    with pytest.raises(KeyboardInterrupt), git_worktree("HEAD", Path("in"), []) as worktree:
        raise KeyboardInterrupt
    assert not worktree.path.exists()
    assert len(git("worktree", "list").splitlines()) == 1


def test_untracked_files_are_linked(repository, tmp_path_factory):
    Path("in/data.npy").write_bytes(b"much")
    outside = tmp_path_factory.mktemp("outside") / "far"
    outside.touch()
    files = [Path("in/data.npy").resolve(), Path("in/kept").resolve(), outside]
    with git_worktree("HEAD", Path("in"), files) as worktree:
        folder = worktree.path_of(Path("in").resolve())
        assert (folder / "data.npy").read_bytes() == b"much"
        assert (folder / "kept").read_text() == "old", "tracked files come from the revision"
    assert Path("in/data.npy").read_bytes() == b"much"


def test_untracked_files_of_a_partly_tracked_folder_are_linked(repository):
    Path(".gitignore").write_text("*.bin\n")
    Path("in/far").mkdir()
    for name in ("in/model.bin", "in/far/model.bin", "in/plain.txt"):
        Path(name).write_text("much")
    Path("in/later").write_text("tracked since")
    git("add", "in/later")
    with git_worktree("HEAD", Path("in"), [Path("in").resolve()]) as worktree:
        folder = worktree.path_of(Path("in").resolve())
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert found == ["far", "far/model.bin", "kept", "model.bin", "plain.txt"]
        assert (folder / "kept").read_text() == "old"


def test_hooks_of_the_repository_do_not_run(repository):
    hook = Path(".git/hooks/post-checkout")
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    hook.chmod(0o755)
    with git_worktree("HEAD", Path("in"), []):
        pass
    assert not (repository / "ran").exists()


def test_the_index_of_a_commit_in_progress_is_not_modified(repository, monkeypatch):
    git("add", ".")
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / ".git" / "index"))
    before = git("ls-files", "--stage")
    with git_worktree("HEAD", Path("in"), []) as worktree:
        assert (worktree.path / "in" / "kept").read_text() == "old"
    assert git("ls-files", "--stage") == before


@pytest.mark.parametrize("revision", ["nope", "--all", "-h", "HEAD~5", "", "HEAD:in"])
def test_an_invalid_revision_is_reported(repository, revision):
    with pytest.raises(ConfigError, match="neither a file nor a git revision"):
        check_out(revision, Path("in"))


def test_a_missing_repository_or_git_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="git rev-parse failed"):
        check_out("HEAD", tmp_path)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ConfigError, match="requires git"), git_worktree("HEAD", tmp_path, []):
        pass
