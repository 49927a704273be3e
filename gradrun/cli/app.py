"""The Typer app: registers the commands, and runs them as the console script."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from gradrun.cli.audit import audit, modes
from gradrun.cli.check import check
from gradrun.cli.compare import BareModesCommand, compare
from gradrun.cli.config import init, schema, validate
from gradrun.cli.infer import infer
from gradrun.cli.profile import profile
from gradrun.cli.report import PlainPathsCommand, report, verify
from gradrun.cli.tune import tune
from gradrun.core.errors import Interrupted
from gradrun.core.options import command_line
from gradrun.core.version import __version__

app = typer.Typer(
    name="gradrun",
    help="Run PyTorch inference from a YAML file and report latency, throughput and peak memory.",
    no_args_is_help=True,
    # Rich panels import Markdown and tracebacks, which doubles the time of --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Typer's default None makes it import pydantic, which doubles the time of a short command.
        "default_map": dict.fromkeys(("help", "install_completion", "show_completion"), False),
    },
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of gradrun itself."""
    context.with_resource(command_line())
    if version:
        typer.echo(f"gradrun {__version__}")
        raise typer.Exit


app.command()(infer)
app.command(cls=BareModesCommand)(compare)
app.command()(profile)
app.command()(audit)
app.command()(check)
app.command()(tune)
app.command()(modes)
app.command()(verify)
app.command(cls=PlainPathsCommand)(report)
app.command()(validate)
app.command()(init)
app.command()(schema)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for µ on an ASCII terminal
    try:
        app()
    except KeyboardInterrupt:  # before a command has started
        sys.exit(Interrupted().exit_code)
