"""`gradrun audit` and `gradrun modes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradrun.cli.console import command_output, fast_imports
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import EXIT_CHECK_FAILED


def audit(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    compile_too: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also check torch.compile.")
    ] = True,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find problems in each gradient mode, and memory use per module."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        from gradrun.config.load import load_config

        loaded = load_config(config, sets or [])
        with fast_imports():
            from gradrun.audits.audit import audit as run
        from gradrun.results.summary import has_errors

        with out.progress() as progress:
            result = run(loaded, trust_code=trust_code, compile=compile_too, progress=progress)
        out.show_result(result)
        if has_errors(result):
            raise typer.Exit(EXIT_CHECK_FAILED)


def modes(
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where to run: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what each gradient mode does on the installed torch."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        with fast_imports():
            from gradrun.audits.mode_behavior import mode_behavior
        from gradrun.report.document import describe_modes
        from gradrun.report.terminal import show

        facts = mode_behavior(device)
        show(describe_modes(facts), out.console)
        out.write_json(facts.to_json())
        if facts.differing:
            raise typer.Exit(EXIT_CHECK_FAILED)
