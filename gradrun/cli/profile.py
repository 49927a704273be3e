"""`gradrun profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradrun.cli.compare import parse_over
from gradrun.cli.console import check_writable, command_output, fast_imports
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import ConfigError


def profile(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of the run.")] = None,
    over: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=A,B", help="Find the modules that differ between values of a config key."
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(min=0, metavar="N", help="Levels of modules to show; 0: all.")
    ] = 0,
    top: Annotated[
        int, typer.Option(min=0, metavar="N", help="Modules to show, longest first; 0: all.")
    ] = 20,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a trace of some batches for Perfetto or Chrome."),
    ] = None,
    peaks: Annotated[
        bool,
        typer.Option("--peaks/--no-peaks", help="Measure the machine's peaks if not yet known."),
    ] = True,
    machine: Annotated[
        bool, typer.Option("--machine", help="Measure and show the peaks of this machine.")
    ] = False,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the time per module, against the peak of the machine."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        if machine:
            if config or over or trace or sets:
                raise ConfigError(
                    "--machine measures this machine without a config; run it alone, optionally "
                    "with --json"
                )
            with fast_imports():
                from gradrun.profiling.peaks import machine_peaks
            from gradrun.report.document import describe_machine
            from gradrun.report.terminal import show

            with out.progress() as progress:
                measured = machine_peaks(progress=progress)
            show(describe_machine(measured), out.console)
            out.write_json(measured.to_json())
            return
        if config is None:
            raise ConfigError(
                "a config is required, such as gradrun profile mine.yaml; --machine works without"
            )
        check_writable("--trace", trace)
        from gradrun.config.load import load_config

        loaded = load_config(config, sets or [])
        with fast_imports():
            from gradrun.profiling.profile import profile as run
        with out.progress() as progress:
            result = run(
                loaded,
                over=parse_over(over) if over else None,
                depth=depth,
                top=top,
                trace=trace,
                peaks=peaks,
                trust_code=trust_code,
                progress=progress,
            )
        out.show_result(result)
        if trace:
            out.print(f"trace: {trace} (open it at https://ui.perfetto.dev)")
