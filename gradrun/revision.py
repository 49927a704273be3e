"""A git revision as files: checked out into a folder of its own, and removed again.

Knows git's commands; not what the files mean.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradrun.errors import ConfigError


@contextmanager
def checked_out(revision: str, beside: Path, borrowed: Iterable[Path]) -> Iterator[Path]:
    """The folder that holds, in a revision, what the folder `beside` holds now.

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
        _git(beside, *plain, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            for file in borrowed:
                _lend(file, top, tree)
            yield tree / beside.relative_to(top)
        finally:
            _git(beside, "worktree", "remove", "--force", str(tree))


def _lend(file: Path, top: Path, tree: Path) -> None:
    if not file.resolve().is_relative_to(top):
        return
    place = tree / file.resolve().relative_to(top)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())


def _git(folder: Path, *words: str, otherwise: str = "") -> str:
    try:
        done = subprocess.run(  # noqa: S603 - no word of these is an option that a user wrote
            ["git", "-C", str(folder), *words],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"--against a revision takes git: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(otherwise or f"git {words[0]} failed: {said[-1] if said else 'silently'}")
    return done.stdout.strip()
