"""`gradrun report` and `gradrun verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from gradrun.cli.console import command_output, fast_imports, write_file
from gradrun.cli.options import Debug, JsonFile, Quiet
from gradrun.core.errors import EXIT_CHECK_FAILED, ConfigError


class PlainPathsCommand(typer.core.TyperCommand):
    """Convert arguments to Path without Typer's pydantic, which takes longer than a report."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave --help, completion and missing arguments to Typer."""
        params, _, _ = self.make_parser(ctx).parse_args(args=[*args])
        if ctx.resilient_parsing or "help" in params or not params.get("results"):
            return super().parse_args(ctx, args)
        params["results"] = [Path(word) for word in params["results"]]
        if params.get("output") is not None:
            params["output"] = Path(params["output"])
        ctx.params = params
        return []


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs or their result.json; several are shown in columns."),
    ],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="table, markdown, csv, json or html."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write; its suffix selects the format."
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show saved results in any format, without running anything."""
    with command_output(debug=debug, quiet=quiet) as out:
        with fast_imports():
            from gradrun import report as renderers
            from gradrun.report.wording import display_path
            from gradrun.results.ratios import recompute
            from gradrun.results.result import RunResult

        chosen = _choose_format(form, output, results)
        named = [(display_path(path), recompute(RunResult.load(path))) for path in results]
        if chosen == "table" and output is None:
            renderers.show(named, out.console)
            return
        text = renderers.render(named, chosen)
        if output is None:
            sys.stdout.write(text)
            return
        write_file(text, output, "-o")
        out.print(f"wrote {display_path(output)}")


def _choose_format(form: str | None, output: Path | None, results: list[Path]) -> str:
    """Return the format of --format, or else of the file's suffix."""
    from gradrun.report import FORMATS, SUFFIXES

    if form is not None and form not in FORMATS:
        from gradrun.core.suggest import suggest

        raise ConfigError(f"unknown format {form!r}; {suggest(form, FORMATS)}")
    if output is None:
        return form or "table"
    if output.is_dir():
        raise ConfigError(f"-o {output}: is a folder, not a file")
    sources = {(path / "result.json" if path.is_dir() else path).resolve() for path in results}
    if output.resolve() in sources:
        raise ConfigError(f"-o {output} is the result itself; choose another file")
    chosen = form or SUFFIXES.get(output.suffix.lower())
    if chosen is None:
        raise ConfigError(
            f"-o {output}: no format has this suffix ({', '.join(SUFFIXES)}); "
            f"pass --format {'|'.join(FORMATS)}"
        )
    return chosen


def verify(
    folder: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify a run's predictions against the checksums in its journal.

    Lists missing and changed samples. Exit code 3: there are any.
    """
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        from gradrun.output.remote_folder import verify as run
        from gradrun.report.document import describe_verification
        from gradrun.report.terminal import show

        verification = run(folder)
        show(describe_verification(verification), out.console)
        out.write_json(json.dumps(verification.to_dict(), indent=1))
        if not verification.complete:
            raise typer.Exit(EXIT_CHECK_FAILED)
