"""`gradrun tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gradrun.cli.console import command_output
from gradrun.cli.options import Debug, JsonFile, Quiet, Sets, Trust
from gradrun.core.errors import EXIT_INCONCLUSIVE, ConfigError


def tune(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File of the tuned config; default: NAME-tuned."
        ),
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help="Tolerated change of the outputs: bitwise, max_abs=, max_rel=, cosine=, top1= or "
            "metric=NAME,drop= (repeatable) [default: that of compare].",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help='Limit of the process peak: "600 MiB".')
    ] = None,
    p99: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Limit of the 99th percentile of a batch: 50ms."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Approximate time limit.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples of a job, over which the start must pay."),
    ] = None,
    steady: Annotated[
        bool, typer.Option("--steady", help="Ignore the time of the start, as for a service.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key not to change: data.batch_size (repeatable)."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an earlier search that ended before its end."),
    ] = False,
    sets: Sets = None,
    trust_code: Trust = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the fastest settings within a tolerance, and write them."""
    with command_output(debug=debug, json_file=json_file, quiet=quiet) as out:
        from gradrun.config.load import load_config
        from gradrun.tuning.tune import tune as run

        changes: dict[str, Any] = {
            "memory": memory,
            "p99": p99,
            "budget": budget,
            "samples": samples,
            "steady": steady or None,
            "keep": keep or None,
            "within": _parse_within(within) if within else None,
        }
        given = {f"tune.{key}": value for key, value in changes.items() if value is not None}
        limits = [f"{key}={json.dumps(value)}" for key, value in given.items()]  # as for --set
        loaded = load_config(config, [*(sets or []), *limits])
        with out.progress() as progress:
            result = run(loaded, output, trust_code=trust_code, resume=resume, progress=progress)
        out.show_result(result)
        if result.status == "inconclusive":
            raise typer.Exit(EXIT_INCONCLUSIVE)


def _parse_within(words: list[str]) -> Any:
    """Parse `max_rel=1e-2` or `metric=accuracy,drop=0.002`.

    Raises:
        ConfigError: a word is neither.
    """
    limits: dict[str, Any] = {}
    for word in (part for words_ in words for part in words_.split(",")):
        name, equals, value = word.partition("=")
        if word == "bitwise":
            limits["bitwise"] = True
        elif name == "metric" and value:
            limits["metric"] = value
        elif equals:
            try:
                limits[name] = float(value)
            except ValueError:
                raise ConfigError(f"--within {word}: {value!r} is not a number") from None
        else:
            raise ConfigError(f"--within {word}: expected bitwise or NAME=NUMBER, as max_rel=0.01")
    return limits
