"""`gradrun check`, and its output for CI servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gradrun.cli.console import (
    check_writable,
    command_output,
    fast_imports,
    make_console,
    print_line,
    write_file,
)
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import EXIT_CHECK_FAILED, EXIT_INCONCLUSIVE, GradrunError, Interrupted

if TYPE_CHECKING:
    from gradrun.results.result import CheckResult

_INCONCLUSIVE_CODES = {"pass": 0, "fail": EXIT_CHECK_FAILED, None: EXIT_INCONCLUSIVE}


def check(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with a saved baseline."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="CONFIG|REV", help="Compare with another config or a git revision."),
    ] = None,
    save_baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result as a baseline.")
    ] = None,
    update_expected: Annotated[
        bool, typer.Option("--update-expected", help="Write the golden outputs of check.expected.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML for a CI server.")
    ] = None,
    inconclusive: Annotated[
        Literal["pass", "fail"] | None,
        typer.Option(help="Treat inconclusive checks as pass or fail [default: exit code 4]."),
    ] = None,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check limits, golden outputs and regressions in CI.

    Exit code 3: a check failed. Exit code 4: a check was inconclusive.
    """
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        check_writable("--junit", junit)
        check_writable("--save-baseline", save_baseline)
        with fast_imports():
            from gradrun.checks.check import check as run
        from gradrun.report.wording import display_path

        with _report_errors_to_ci(junit), out.progress() as progress:
            result = run(
                config,
                baseline=baseline,
                against=against,
                save_baseline=save_baseline,
                update_expected=update_expected,
                trust_code=trust_code,
                sets=sets or [],
                progress=progress,
            )
        out.show_result(result)
        if save_baseline:
            note = ", of a failed check" if result.status == "fail" else ""
            out.print(f"wrote {display_path(save_baseline)}{note}")
        if update_expected and any(o.key == "check.expected" for o in result.outcomes):
            out.print(f"wrote {display_path(result.config['check']['expected'])}")
        _report_to_ci(result, junit)
        codes = {"fail": EXIT_CHECK_FAILED, "inconclusive": _INCONCLUSIVE_CODES[inconclusive]}
        if code := codes.get(result.status, 0):
            if quiet:
                names = ", ".join(o.check for o in result.outcomes if o.status == result.status)
                print_line(make_console(stderr=True), f"{result.status}: {names}")
            raise typer.Exit(code)


def _report_to_ci(result: CheckResult, junit: Path | None) -> None:
    from gradrun.report import github, render
    from gradrun.report import junit as junit_xml

    if junit:
        write_file(junit_xml.render(result), junit, "--junit")
    _write_to_github(github.annotate(result), lambda: render([("", result)], "markdown"))


@contextmanager
def _report_errors_to_ci(junit: Path | None) -> Iterator[None]:
    """Report an error of the check in the formats of CI servers too."""
    try:
        yield
    except Interrupted:
        raise
    except GradrunError as error:
        from gradrun.report import github, markdown
        from gradrun.report import junit as junit_xml

        message = str(error)
        if junit:
            write_file(junit_xml.render_error(message), junit, "--junit")
        _write_to_github([github.annotate_error(message)], lambda: markdown.render_error(message))
        raise


def _write_to_github(annotations: Iterable[str], summary: Callable[[], str]) -> None:
    """Write annotations and the step's summary, if this is a GitHub workflow."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotations:
            sys.stderr.write(f"{line}\n")
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary())
