"""Check out a git revision to a temporary worktree."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradrun.core.errors import ConfigError
from gradrun.core.options import option


@dataclass(frozen=True)
class Worktree:
    """A worktree of another revision, and the repository that it belongs to."""

    repository: Path
    path: Path

    def path_of(self, folder: Path) -> Path:
        """Return the worktree's path of a folder of the repository."""
        return self.path / folder.relative_to(self.repository)


@contextmanager
def git_worktree(
    revision: str, folder: Path, untracked_files: Iterable[Path]
) -> Iterator[Worktree]:
    """Check out a revision to a temporary worktree, removed when the block ends.

    Args:
        untracked_files: files that the revision may lack, such as data that git does not track; the
            worktree gets symbolic links to them.

    Raises:
        ConfigError: git, the repository or the revision does not exist.
    """
    folder = folder.resolve()
    repository = Path(_git(folder, "rev-parse", "--show-toplevel")).resolve()
    commit = _git(
        folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}",
        error=f"{option('against', revision)}: {revision} is neither a file nor a git revision",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gradrun-") as temporary:
        path = Path(temporary).resolve() / "tree"
        _git(folder, "worktree", "prune")
        # Do not run the repository's hooks: the user only asked for a comparison.
        no_hooks = ("-c", f"core.hooksPath={os.devnull}")
        _git(folder, *no_hooks, "worktree", "add", "--quiet", "--detach", str(path), commit)
        try:
            for file in untracked_files:
                _link_untracked(file, repository, path)
            yield Worktree(repository, path)
        finally:
            _git(folder, "worktree", "remove", "--force", str(path))


def _link_untracked(file: Path, repository: Path, worktree: Path) -> None:
    # Use the path of a link, not its target, which can be outside the repository.
    source = file.parent.resolve() / file.name
    if not source.is_relative_to(repository):
        return
    link = worktree / source.relative_to(repository)
    if not link.exists() and not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    elif link.is_dir() and source.is_dir():  # partly tracked
        untracked = _git(source, "ls-files", "-z", "--others").split("\0")
        for name in filter(None, untracked):
            _link_untracked(source / name, repository, worktree)


def _git(folder: Path, *words: str, error: str = "") -> str:
    try:
        done = subprocess.run(  # noqa: S603 - user input cannot be taken for an option
            ["git", "-C", str(folder), *words],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=False,
            # In a commit hook GIT_INDEX_FILE names the index of that commit; leave it alone.
            env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
        )
    except OSError as failure:
        raise ConfigError(
            f"{option('against', 'REVISION')} requires git: {failure.strerror}"
        ) from failure
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        command = next(word for word in words if word[0] != "-" and "=" not in word)
        raise ConfigError(error or f"git {command} failed: {lines[-1] if lines else 'no message'}")
    return done.stdout.strip()
