"""Standard input as data, and predictions on standard output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, BinaryIO

import typer

from gradrun.cli.console import discard_stdout
from gradrun.core.errors import ConfigError

if TYPE_CHECKING:
    from gradrun.config.load import LoadedConfig
    from gradrun.config.schema import RunConfig
    from gradrun.core.progress import Progress, ProgressCallback

_CHUNK = 1024 * 1024
_BROKEN_PIPE = 141
"""Exit code of a program whose reader has ended, as shells report it: 128 + SIGPIPE."""


@contextmanager
def standard_input(loaded: LoadedConfig) -> Iterator[LoadedConfig]:
    """Yield the config with a temporary file in place of `data.path: "-"`.

    Standard input is read to its end first, because sources count and read rows again.

    Raises:
        ConfigError: standard input is empty.
    """
    config = loaded.config
    if getattr(config.data, "path", None) != Path("-"):
        yield loaded
        return
    from gradrun.config.load import LoadedConfig

    with TemporaryDirectory(prefix="gradrun-") as folder:
        source = sys.stdin.buffer
        head = source.read(_CHUNK)
        if not head:
            raise ConfigError("standard input is empty", "data.path")
        path = Path(folder) / f"stdin{_suffix(config, head)}"
        with path.open("wb") as file:
            file.write(head)
            shutil.copyfileobj(source, file, _CHUNK)
        yield LoadedConfig(config.replace({"data.path": path}), loaded.locations)


def _suffix(config: RunConfig, head: bytes) -> str:
    """Return the suffix of the format: lines of text, JSON lines or csv."""
    if config.data.source == "text" and config.data.field is None:
        return ".txt"
    return ".jsonl" if head.lstrip().startswith(b"{") else ".csv"


class PredictionStream:
    """Copies the predictions of a run to standard output as they are written.

    A context manager that copies the last ones at its end.
    """

    def __init__(self, folder: Path) -> None:
        """Copy from a run folder, which the user does not see."""
        self.folder = folder
        self.closed = False
        """Whether the reader of standard output has ended."""
        self._output = sys.stdout.buffer  # a run redirects sys.stdout
        self._file: BinaryIO | None = None
        self._rest = b""

    def __enter__(self) -> PredictionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.copy()

    def changed(self, loaded: LoadedConfig) -> LoadedConfig:
        """Return the config with a format of lines: csv if it is set, otherwise jsonl."""
        from gradrun.config.load import LoadedConfig

        config = loaded.config
        if config.output.format == "csv":
            return loaded
        return LoadedConfig(config.replace({"output.format": "jsonl"}), loaded.locations)

    def copying(self, progress: ProgressCallback) -> ProgressCallback:
        """Return a progress callback that also copies new predictions."""

        def show(step: Progress) -> None:
            self.copy()
            progress(step)

        return show

    def copy(self) -> None:
        """Write the complete lines since the last call.

        Raises:
            KeyboardInterrupt: nobody reads standard output; the run should end.
        """
        if self.closed:
            return
        if self._file is None:
            found = next(self.folder.glob("predictions.*"), None)
            if found is None:
                return
            self._file = found.open("rb")
        try:
            while chunk := self._file.read(_CHUNK):
                lines, newline, self._rest = (self._rest + chunk).rpartition(b"\n")
                rest = memoryview(lines + newline)
                while rest:  # with PYTHONUNBUFFERED, a write may end before the last byte
                    rest = rest[self._output.write(rest) :]
            self._output.flush()
        except BrokenPipeError:
            self.closed = True
            discard_stdout()
            raise KeyboardInterrupt from None


@contextmanager
def standard_output() -> Iterator[PredictionStream]:
    """Yield the stream for `--output -`; its folder stays only if the run fails."""
    folder = Path(mkdtemp(prefix="gradrun-"))
    stream = PredictionStream(folder / "predictions")
    try:
        yield stream
    except typer.Exit:  # after the error was printed
        if not stream.closed:
            if not stream.folder.exists():
                folder.rmdir()
            raise
    shutil.rmtree(folder)
    if stream.closed:
        raise typer.Exit(_BROKEN_PIPE)
