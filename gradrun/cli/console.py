"""Output of a command: consoles, results, JSON files, and errors with their exit codes."""

from __future__ import annotations

import gc
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gradrun.core.errors import ConfigError, GradrunError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from gradrun.core.progress import ProgressCallback
    from gradrun.results.result import AnyResult


class Output:
    """Where a command prints: stdout, or stderr if stdout is used for data."""

    def __init__(self, json_file: str | None, *, quiet: bool, to_stdout: bool = False) -> None:
        """Decide where to print; `to_stdout`: the command writes predictions to stdout."""
        self._json_file, self._quiet = json_file, quiet
        self._stderr = to_stdout or json_file == "-"
        self.console = make_console(stderr=self._stderr, quiet=quiet)

    def print(self, text: str) -> None:
        """Print a line."""
        print_line(self.console, text)

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Yield a callback that draws a progress bar; keep prints of a model off stdout."""
        from gradrun.report.progress import progress_bar

        redirect = redirect_stdout(sys.stderr) if self._stderr else nullcontext()
        with redirect, progress_bar(make_console(stderr=True, quiet=self._quiet)) as callback:
            yield callback

    def write_json(self, text: str) -> None:
        """Write to the file of --json, if given."""
        if self._json_file == "-":
            sys.stdout.write(text + "\n")
        elif self._json_file:
            write_file(text + "\n", Path(self._json_file), "--json")

    def show_result(self, result: AnyResult) -> None:
        """Print a result, write its JSON, and print the command that makes a report of it."""
        from rich.text import Text

        from gradrun import report
        from gradrun.report.escaping import escape_control_chars
        from gradrun.report.wording import display_path

        report.show([("", result)], self.console)
        self.write_json(result.to_json())
        if not result.info.output_path:
            return
        saved = Path(result.info.output_path)
        if not (saved / "result.json").is_file():
            if self._json_file in (None, "-"):
                return
            saved = Path(str(self._json_file))
        page = f"{saved.stem or 'report'}.html"
        command = shlex.join(["gradrun", "report", display_path(saved), "-o", page])
        line = Text(escape_control_chars(f"more: {command}"), "dim")
        self.console.print(line, soft_wrap=True)


@contextmanager
def command_output(
    *,
    debug: bool,
    json_file: str | None = None,
    quiet: bool = False,
    resume_command: str = "",
    to_stdout: bool = False,
) -> Iterator[Output]:
    """Yield the output of a command; print an error as one sentence and exit with its code."""
    output = Output(json_file, quiet=quiet, to_stdout=to_stdout)
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        try:
            check_writable("--json", json_file)
            try:
                yield output
            finally:
                if sys.stdout:
                    sys.stdout.flush()  # report a failed write here, not at interpreter exit
        except KeyboardInterrupt:
            _exit_with(Interrupted())
        except OSError as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            discard_stdout()
            _exit_with(GradrunError(f"cannot print the report: {error.strerror or error}"))
        except GradrunError as error:
            if debug:
                raise
            if error.result is not None:
                # Report the first error, even if printing the result fails too.
                with suppress(GradrunError, OSError, KeyboardInterrupt):
                    output.show_result(error.result)
            _exit_with(error, resume_command)


def _exit_with(error: GradrunError, resume_command: str = "") -> None:
    from rich.text import Text

    from gradrun.report.escaping import escape_control_chars

    text = str(error)
    if error.resumable and resume_command and error.resume_options:
        text += f"\nto resume past the failing sample: {resume_command} {error.resume_options}"
    elif error.resumable and resume_command:
        text += f"\nto resume: {resume_command}"
    line = Text.assemble(("error: ", "bold red"), escape_control_chars(text))
    make_console(stderr=True).print(line, soft_wrap=True)
    raise typer.Exit(error.exit_code) from None


def discard_stdout() -> None:
    """Redirect buffered output to the null device; Python would write it again at exit."""
    with suppress(OSError, ValueError, AttributeError):  # stdout of a notebook has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def make_console(*, stderr: bool, quiet: bool = False) -> Console:
    """Return a console; NO_COLOR disables all styles (https://no-color.org)."""
    from rich.console import Console

    colors: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, quiet=quiet, color_system=colors, highlight=False)


def print_line(console: Console, text: str) -> None:
    """Print text without markup or wrapping."""
    from gradrun.report.escaping import escape_control_chars

    console.print(escape_control_chars(text), markup=False, highlight=False, soft_wrap=True)


def check_writable(option: str, file: str | Path | None) -> None:
    """Raise ConfigError if an option's file cannot be written, before a long run."""
    if file is None or file == "-":
        return
    if Path(file).is_dir():
        raise ConfigError(f"{option} {file}: is a folder, not a file")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"{option} {file}: folder {Path(file).parent} does not exist")


def write_file(text: str, file: Path, option: str) -> None:
    """Write the file of an option.

    Raises:
        GradrunError: it cannot be written.
    """
    from gradrun.core.files import replace_file

    try:
        if file.exists() and not file.is_file():  # write into a device or a pipe
            file.write_text(text, encoding="utf-8")
        else:
            replace_file(file, text)
    except OSError as error:
        raise GradrunError(f"{option} {file} cannot be written: {error.strerror}") from error


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch without garbage collection, and exclude its objects from later collections.

    torch creates about 500,000 objects that live until exit. Traversing them during the import, in
    full collections and at exit takes a fifth of a short run's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
