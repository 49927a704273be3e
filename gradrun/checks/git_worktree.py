"""A git revision as files: checked out into a folder of its own, and removed again.

Knows git's commands; not what the files mean.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradrun.core.errors import ConfigError


@dataclass(frozen=True)
class CheckedOut:
    """A repository's folder, and the one that holds it as it was in a revision."""

    top: Path
    tree: Path

    def of(self, folder: Path) -> Path:
        """The place in the revision of a folder of the repository."""
        return self.tree / folder.relative_to(self.top)


@contextmanager
def git_worktree(
    revision: str, beside: Path, untracked_files: Iterable[Path]
) -> Iterator[CheckedOut]:
    """A repository as it was in a revision, as long as the block runs.

    Args:
        revision: a branch, a tag or a commit.
        beside: a folder of the repository.
        borrowed: files that the revision may lack because git does not track them, such as data;
            where it does, it gets a link to them.

    Raises:
        ConfigError: there is no git, no repository or no such revision.
    """
    beside = beside.resolve()
    top = Path(_git(beside, "rev-parse", "--show-toplevel")).resolve()
    commit = _git(
        beside, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}",
        otherwise=f"--against {revision}: neither a file nor a revision that git knows",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gradrun-") as made:
        tree = Path(made).resolve() / "tree"
        # No hook of the repository's: nobody asked for it to run.
        plain = ("-c", f"core.hooksPath={os.devnull}")
        _git(beside, "worktree", "prune")
        _git(beside, *plain, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            for file in untracked_files:
                _lend(file, top, tree)
            yield CheckedOut(top, tree)
        finally:
            _git(beside, "worktree", "remove", "--force", str(tree))


def _lend(file: Path, top: Path, tree: Path) -> None:
    # By where it lies, and not by where a link leads: it may lead out of the repository.
    held = file.parent.resolve() / file.name
    if not held.is_relative_to(top):
        return
    place = tree / held.relative_to(top)
    if not place.exists() and not place.is_symlink():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())
    elif place.is_dir() and held.is_dir():  # tracked in part
        untracked = _git(held, "ls-files", "-z", "--others").split("\0")
        for name in filter(None, untracked):
            _lend(held / name, top, tree)


def _git(folder: Path, *words: str, otherwise: str = "") -> str:
    try:
        done = subprocess.run(  # noqa: S603 - no word of these is an option that a user wrote
            ["git", "-C", str(folder), *words],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=False,
            # In a hook git names the index of the commit that is being made; it is not ours.
            env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
        )
    except OSError as error:
        raise ConfigError(f"--against a revision takes git: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        command = next(word for word in words if word[0] != "-" and "=" not in word)
        raise ConfigError(otherwise or f"git {command} failed: {said[-1] if said else 'silently'}")
    return done.stdout.strip()
